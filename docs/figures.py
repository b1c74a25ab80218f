"""The figures of docs/, drawn from committed metrics. `python docs/pages.py` draws them all."""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from engine.files import METRICS_FILE, ROOT
from engine.metrics import best_iteration, reason_to_stop, validations
from plot_metrics import COLOURS, draw_series, read_metrics, save_figure, series

RESULTS = ROOT / "results"
STYLE = {"axes.grid": True, "grid.alpha": 0.3, "font.size": 10, "legend.fontsize": 8.5}
# Line styles differ too, so that a black-and-white print can be read.
HEALTHY = {
    "good": (COLOURS[0], "-"),
    "rate too high": (COLOURS[1], "--"),
    "no signal": (COLOURS[2], "-."),
    "truncation": (COLOURS[3], ":"),
}


@cache
def committed(run: str) -> dict:
    """The metrics of a run in results/."""
    return read_metrics(RESULTS / run / METRICS_FILE)


def healthy_run(label: str) -> dict:
    return committed(f"healthy/{label.replace(' ', '_')}")


def draw_smooth(axes, metrics: dict, name: str, colour: str, line: str, label: str) -> None:
    """Draw the moving average of one metric."""
    _, smooth = series(metrics, name)
    axes.plot(range(1, len(smooth) + 1), smooth, line, color=colour, label=label, linewidth=1.8)
    axes.set_xlabel("iteration")


def draw_healthy(axes, name: str, title: str) -> None:
    """Draw one metric of the good run and of the sick ones."""
    for label, (colour, line) in HEALTHY.items():
        draw_smooth(axes, healthy_run(label), name, colour, line, label)
    axes.set_ylabel(title)


def two_panels() -> tuple[Figure, list]:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    return figure, list(figure.subplots(1, 2))


def legend_above(figure: Figure, axes) -> None:
    """One legend for all panels, above them, where it covers no line."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)


def healthy_reward() -> Figure:
    figure, (reward, entropy) = two_panels()
    draw_healthy(reward, "reward", "reward per completion")
    draw_healthy(entropy, "entropy", "entropy (nats per token)")
    reward.set_ylim(0, 1.02)
    entropy.set_yscale("log")
    legend_above(figure, reward)
    return figure


def healthy_signal() -> Figure:
    figure, (zero_std, truncated) = two_panels()
    draw_healthy(zero_std, "frac_zero_std_groups", "share of groups with equal rewards")
    draw_healthy(truncated, "truncated", "share of completions truncated")
    for axes in (zero_std, truncated):
        axes.set_ylim(-0.02, 1.04)
    legend_above(figure, zero_std)
    return figure


def healthy_loss() -> Figure:
    figure, (kl, loss) = two_panels()
    draw_healthy(kl, "kl", "KL from the reference (nats per token)")
    kl.set_yscale("symlog", linthresh=0.1)
    kl.yaxis.set_major_formatter("{x:g}")
    kl.set_ylim(bottom=0)
    legend_above(figure, kl)
    good = healthy_run("good")
    draw_series(loss, good, "loss", HEALTHY["good"][0], "loss of the good run", faint=True)
    _, penalty = series(good, "kl_penalty")
    label = f"its KL term, {good['config']['beta']} x kl_penalty"
    loss.plot(range(1, len(penalty) + 1), good["config"]["beta"] * penalty, "k--", label=label)
    loss.set(xlabel="iteration", ylabel="loss (mean of two updates)")
    loss.axhline(0, color="0.35", linewidth=0.8)
    loss.legend(loc="upper right")
    return figure


PAST_BEST = {"rate 2e-4": "lr2e-4_s0", "rate 5e-4, beta 0, seed 1": "lr5e-4_beta0_s1"}
STOPS = {"--patience 3": {"patience": 3}, "--max_kl 1": {"max_kl": 1}}
FORGETTING = [  # a list per learning rate and seed
    ["beta0_s0", "base_s0", "beta0.4_s0"],
    ["lr5e-4_beta0_s0", "lr5e-4_s0", "lr5e-4_beta0.4_s0"],
    ["lr5e-4_beta0_s1", "lr5e-4_s1", "lr5e-4_beta0.4_s1"],
]
BASES = {
    "bundled, 8000 steps": ("bundled.json", "base_s0"),
    "240 steps": ("less.json", "less_s0"),
}
LINES = ("o-", "s--", "D-.", "^:", "v-")  # markers, because a run has few validations


def lesson_run(name: str) -> dict:
    return committed(f"lessons/{name}")


def short(number: float) -> str:
    """A setting as one would type it: 0.04, 5e-5."""
    return f"{number:.0e}".replace("e-0", "e-") if 0 < number < 0.001 else f"{number:g}"


def draw_validations(axes, metrics: dict, value: Callable, style: int, label: str) -> None:
    """Draw `value(evaluation)` of each validation, in the colour and line of this number."""
    points = [(e["iteration"], value(e)) for e in validations(metrics)]
    colour, line = COLOURS[style], LINES[style]
    axes.plot(*zip(*points, strict=True), line, color=colour, markersize=4, label=label)
    axes.set_xlabel("iteration")


def part_of(name: str) -> Callable[[dict], float]:
    """The mean of one part of the reward over the completions sampled in an evaluation."""
    return lambda evaluation: evaluation["accuracies"]["sampled"]["parts"][name]


def accuracy_of(kind: str, evaluation: dict) -> float:
    return evaluation["accuracies"][kind]["accuracy"]


def stopped(metrics: dict, **flags) -> dict:
    """The metrics of a run up to where these flags would have ended it, by the trainer's rule."""
    for done in range(1, len(metrics["iterations"]) + 1):
        seen = {
            "config": metrics["config"] | flags,
            "iterations": metrics["iterations"][:done],
            "evaluations": [e for e in validations(metrics) if e["iteration"] <= done],
        }
        if reason_to_stop(seen):
            break
    return seen


def lesson_reward() -> Figure:
    figure, panels = two_panels()
    for axes, judge in zip(panels, ("last_number", "exact"), strict=True):
        for style, part in enumerate(("last_number", "exact")):
            draw_validations(axes, lesson_run(judge), part_of(part), style, f"earn {part}")
        axes.set(ylabel="share of validation answers", ylim=(-0.02, 1.02))
        axes.set_title(f"trained on {judge}", fontsize=10)
    legend_above(figure, panels[0])
    return figure


def lesson_forgetting() -> Figure:
    figure, panels = two_panels()
    for axes, runs in zip(panels, FORGETTING, strict=False):  # seed 0
        for style, metrics in enumerate(map(lesson_run, runs)):
            label = f"beta {short(metrics['config']['beta'])}"
            draw_validations(axes, metrics, lambda e: e["off_task"]["accuracy"], style, label)
        axes.set(ylabel="share of sums answered right", ylim=(-0.02, 1.04))
        axes.set_title(f"learning rate {short(metrics['config']['learning_rate'])}", fontsize=10)
    legend_above(figure, panels[0])
    return figure


def lesson_stopping() -> Figure:
    figure, panels = two_panels()
    for axes, (label, name) in zip(panels, PAST_BEST.items(), strict=True):
        metrics = lesson_run(name)
        draw_validations(axes, metrics, partial(accuracy_of, "sampled"), 0, "sampled accuracy")
        draw_validations(axes, metrics, lambda e: e["off_task"]["accuracy"], 3, "off-task sums")
        axes.axvline(
            best_iteration(metrics), color=COLOURS[2], linewidth=5, alpha=0.4, label="best"
        )
        for line, (flag, settings) in zip(("--", ":"), STOPS.items(), strict=True):
            end = len(stopped(metrics, **settings)["iterations"])
            if end < len(metrics["iterations"]):
                axes.axvline(end, color=COLOURS[6], linestyle=line, label=f"{flag} stops")
        axes.set(ylabel="share of answers right", ylim=(-0.02, 1.04))
        axes.set_title(label, fontsize=10)
    handles = panels[1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=5)
    return figure


def pass_at_of(base: str) -> dict[str, float]:
    """pass@k of a model before training, by k."""
    return json.loads((RESULTS / "lessons" / base).read_text())["pass_at"]


def lesson_base() -> Figure:
    figure, (pass_at, accuracy) = two_panels()
    for style, (label, (base, run)) in enumerate(BASES.items()):
        colour, line = COLOURS[style], LINES[style]
        points = [(int(k), share) for k, share in pass_at_of(base).items()]
        pass_at.plot(*zip(*points, strict=True), line, color=colour, markersize=4, label=label)
        draw_validations(accuracy, lesson_run(run), partial(accuracy_of, "sampled"), style, label)
    pass_at.set_xscale("log", base=2)
    pass_at.xaxis.set_major_formatter("{x:g}")
    pass_at.set(xlabel="k, samples per problem", ylabel="pass@k before training")
    accuracy.set(ylabel="sampled validation accuracy")
    for axes in (pass_at, accuracy):
        axes.set_ylim(-0.02, 1.02)
    legend_above(figure, pass_at)
    return figure


TASKS = {"arithmetic, two steps": "smollm2/linear0", "spelling backwards": "smollm2/spelling"}
RATES = {"rate falls to 0": "smollm2/falling_rate", "constant rate": "smollm2/constant_rate"}


def lesson_task() -> Figure:
    figure, (exact, signal) = two_panels()
    for style, (label, run) in enumerate(TASKS.items()):
        metrics = committed(run)
        for axes, name in ((exact, "accuracy"), (signal, "frac_zero_std_groups")):
            draw_smooth(axes, metrics, name, COLOURS[style], LINES[style][1:], label)
            axes.set_ylim(-0.02, 1.02)
    exact.set_ylabel("share of exact completions")
    signal.set_ylabel("share of groups with equal rewards")
    legend_above(figure, exact)
    return figure


def smollm2_rate() -> Figure:
    figure, (exact, validation) = two_panels()
    for style, (label, run) in enumerate(RATES.items()):
        metrics = committed(run)
        draw_smooth(exact, metrics, "accuracy", COLOURS[style], LINES[style][1:], label)
        draw_validations(validation, metrics, partial(accuracy_of, "sampled"), style, label)
    exact.set_ylabel("share of exact completions")
    validation.set_ylabel("sampled validation accuracy")
    for axes in (exact, validation):
        axes.set_ylim(-0.02, 1.02)
    legend_above(figure, exact)
    return figure


DRAWN = [healthy_reward, healthy_signal, healthy_loss, lesson_reward, lesson_forgetting]
DRAWN += [lesson_stopping, lesson_base, lesson_task, smollm2_rate]
FIGURES: dict[str, Callable[[], Figure]] = {f"{draw.__name__}.png": draw for draw in DRAWN}


def draw_figures(output: Path) -> None:
    with matplotlib.rc_context(STYLE):
        for name, draw in FIGURES.items():
            save_figure(draw(), output / name)

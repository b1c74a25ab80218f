"""Time this loop and TRL's GRPOTrainer side by side: the same model, problems and settings.

    python benchmarks/vs_trl.py                       # bundled model, 6 x 16, 2 updates, float32
    python benchmarks/vs_trl.py --model smollm2       # SmolLM2-135M, 4 x 8, 5 updates, bfloat16
    python benchmarks/vs_trl.py --worst_case True     # either model's shape with random weights
    python benchmarks/vs_trl.py --growth True         # how seconds and memory grow, tree or not
    python benchmarks/vs_trl.py --accuracy True       # test accuracy against seconds of training

Completions end when they end. In the worst case all have full length and differ from the first
tokens on, so that reading each distinct prefix once gains nothing.

Each loop has a process of its own, so that its peak memory is its own. They take turns and never
compute at once, so that other load on the machine slows both. An iteration is one batch of groups
and all its updates; both loops take equally many, so that their policies have learned as much. Both
keep float32 weights and use the same compute type and fused AdamW, each with the attention kernel
that is faster for it. TRL runs without what would slow it down: gradient checkpointing, logging,
saving, progress bars.

Writes vs_trl.json here (_smollm2, _worst_case, _growth or _accuracy before the dot), or to
--output; --growth and --accuracy also draw a .png.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import WORKS, ModelSettings, Work, read_settings, worst_case, write_result
from benchmarks.turns import Turn, take_turns
from engine.cli import setting
from engine.files import exit_code

LABELS = {"ours": "this loop", "trl": "TRL"}
POLICIES = {"ours": "tree", "plain": "plain policy", "trl": "TRL"}
GROWTH = {  # what grows, from the work's 4 problems x 8 completions of at most 16 tokens
    "num_generations": (4, 8, 16, 32, 64),
    "batch_size": (1, 4, 16, 64),
    # In the worst case, where the tree has the least to share.
    "max_new_tokens": (8, 16, 32, 64),
    "hidden_size": (64, 128, 256, 512),
}
AXES = ["G, completions per problem", "B, problems", "new tokens, worst case"]
AXES += ["hidden size, worst case"]


@dataclass
class Settings(ModelSettings):
    worst_case: bool = setting(False, "random weights and no end token")
    growth: bool = setting(False, "several sizes of group, batch, completion and model")
    accuracy: bool = setting(False, "train both for --seconds each and measure test accuracy")
    rounds: int = setting(0, "turns that each loop takes; 0 is 8, or 3 for smollm2", 0)
    iterations: int = setting(0, "per turn; 0 is 10, or 1 for smollm2", 0)
    seconds: int = setting(120, "with --accuracy: seconds of training for each loop", 1)


def compare_speed(settings: Settings, work: Work, loops: tuple[str, ...] = ("ours", "trl")) -> dict:
    """Seconds per iteration and peak memory of the loops; how much longer TRL takes."""
    rounds, iterations = (8, 10) if settings.model == "bundled" else (3, 1)
    turn = Turn(settings.iterations or iterations)
    reports = take_turns(work, [Turn(1)] + [turn] * (settings.rounds or rounds), loops)
    result = {}
    for loop, (_, *played) in reports.items():  # the first turn is to warm up
        lengths, samples = played[-1]["lengths"], [report["samples"] for report in played]
        assert not work.endless or set(lengths) == {work.config.max_new_tokens}, lengths
        result[loop] = found = {
            "seconds": median(sum(samples, [])),
            "peak_memory_mib": played[-1]["memory"],
            "completion_length": fmean(lengths),
            "rounds": samples,
        }
        print(
            f"{POLICIES[loop]:>12}: {found['seconds']:.3f} s per iteration, completions of"
            f" {fmean(lengths):.1f} tokens, peak memory {found['peak_memory_mib']:.0f} MiB"
        )
    pairs = zip(result["ours"]["rounds"], result["trl"]["rounds"], strict=True)
    by_round = [median(theirs) / median(ours) for ours, theirs in pairs]
    ratio = result["trl"]["seconds"] / result["ours"]["seconds"]
    low, high = min(by_round), max(by_round)
    print(f"TRL takes {ratio:.1f} times as long ({low:.1f} to {high:.1f} by round)")
    return {**result, "ratio": ratio, "ratio_by_round": by_round}


def compare_growth(settings: Settings, work: Work, folder: Path) -> dict:
    """Speed and memory of this loop with either policy, and of TRL, as one size grows."""
    counts = {"rounds": settings.rounds or 3, "iterations": settings.iterations or 2}
    settings = replace(settings, **counts)
    base = replace(work.config, batch_size=4, num_generations=8)
    points: dict[str, list[dict]] = {name: [] for name in GROWTH}
    for name, sizes in GROWTH.items():
        for size in sizes:
            print(f"{name} {size}")
            if name == "hidden_size":
                shape = {"hidden_size": size, "intermediate_size": 4 * size}
                shape |= {"num_attention_heads": size // 32, "num_key_value_heads": size // 32}
                grown = worst_case(replace(work, config=base), folder, **shape)
            else:
                grown = replace(work, config=replace(base, **{name: size}))
            if name == "max_new_tokens":
                grown = worst_case(grown, folder)
            points[name].append({name: size, **compare_speed(settings, grown, tuple(POLICIES))})
    return points


def compare_accuracy(settings: Settings, work: Work) -> dict:
    """Test accuracy of both loops after equal times of training; evaluating is not counted."""
    count = settings.rounds or 8
    turn = Turn(float("inf"), settings.seconds / count, evaluate=True)
    reports = take_turns(work, [Turn(0, evaluate=True)] + [turn] * count)
    result = {}
    for loop, played in reports.items():
        samples, result[loop] = [], []
        for report in played:
            samples += report["samples"]
            point = {"seconds": sum(samples), "iterations": len(samples)}
            result[loop].append({**point, "accuracies": report["accuracies"]})
    return result


def draw_growth(figure, colours: dict[str, str], result: dict) -> None:
    rows = figure.subplots(2, 4, sharex="col", sharey="row")
    for row, (what, label) in zip(
        rows, (("seconds", "seconds per iteration"), ("peak_memory_mib", "MiB")), strict=True
    ):
        row[0].set_ylabel(label)
        for axes, name in zip(row, GROWTH, strict=True):
            for loop, policy in POLICIES.items():
                values = [point[loop][what] for point in result[name]]
                axes.loglog(GROWTH[name], values, "o-", color=colours[loop], label=policy, ms=4)
            axes.minorticks_off()
            axes.set_xticks(GROWTH[name], GROWTH[name])
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.3)
    for axes, label in zip(rows[1], AXES, strict=True):
        axes.set_xlabel(label)
    rows[0][0].legend()


def draw_accuracy(figure, colours: dict[str, str], result: dict) -> None:
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("sampled", "greedy"), strict=True):
        for loop, label in LABELS.items():
            x = [point["seconds"] for point in result[loop]]
            points = [point["accuracies"][kind] for point in result[loop]]
            y, low, high = ([p[name] for p in points] for name in ("accuracy", "low", "high"))
            axes.plot(x, y, "o-", color=colours[loop], label=label, ms=4)
            axes.fill_between(x, low, high, color=colours[loop], alpha=0.2, linewidth=0)
        axes.set(xlabel="seconds of training", title=f"{kind} answers", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share of exact answers, test")
    figure.axes[0].legend(loc="lower right")


def draw(function, width: float, height: float, result: dict, picture: Path) -> None:
    from matplotlib.figure import Figure  # here, or it would count as memory of both loops

    from plot_metrics import COLOURS, save_figure

    figure = Figure(figsize=(width, height), layout="constrained")
    function(figure, dict(zip(("ours", "trl", "plain"), COLOURS, strict=False)), result)
    save_figure(figure, picture)


def main(argv: list[str] | None = None) -> int:
    settings = read_settings(Settings, __doc__, argv)
    flags = {"worst_case": "_worst_case", "growth": "_growth", "accuracy": "_accuracy"}
    ending = "".join(words for flag, words in flags.items() if getattr(settings, flag))
    output, work = settings.result_file("vs_trl", ending), WORKS[settings.model]
    picture = output.with_suffix(".png")
    with TemporaryDirectory() as folder:
        if settings.worst_case:
            work = worst_case(work, Path(folder))
        if settings.accuracy:
            result = compare_accuracy(settings, work)
            draw(draw_accuracy, 8, 3.2, result, picture)
        elif settings.growth:
            result = compare_growth(settings, work, Path(folder))
            draw(draw_growth, 11, 5, result, picture)
        else:
            result = compare_speed(settings, work)
    write_result(output, {"work": work.describe(), **result})
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))

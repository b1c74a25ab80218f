"""Time this loop and TRL's GRPOTrainer side by side: the same model, problems and settings.

    python benchmarks/vs_trl.py                       # bundled model, 6 x 16, 2 updates, float32
    python benchmarks/vs_trl.py --model smollm2       # SmolLM2-135M, 4 x 8, 5 updates, bfloat16
    python benchmarks/vs_trl.py --worst_case True     # either model's shape with random weights
    python benchmarks/vs_trl.py --vary_group True     # 4 prompts, groups of 4 to 64
    python benchmarks/vs_trl.py --accuracy True       # test accuracy against seconds of training

Completions end when they end. In the worst case all have full length and differ from the first
tokens on, so that nothing is gained by reading each distinct prefix once.

Each loop has a process of its own, so that its peak memory is its own too. They take turns and
never compute at once: what disturbs the machine disturbs both. An iteration is one batch of groups
and all its updates; both loops make equally many, so that their policies have learned as much. Both
keep float32 weights and use the same compute type and fused AdamW, each with the attention kernel
that is faster for it. TRL runs without what would slow it down: gradient checkpointing, logging,
saving, progress bars.

Writes vs_trl.json here (_smollm2, _worst_case, _groups or _accuracy before the dot), or to
--output; --vary_group and --accuracy also draw a .png.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import HERE, WORKS, Work, read_settings, worst_case, write_result
from benchmarks.turns import LOOPS, Turn, take_turns
from engine.cli import exit_code, setting

GROUPS = (4, 8, 16, 32, 64)
LABELS = {"ours": "this loop", "trl": "TRL"}


@dataclass
class Settings:
    model: Literal["bundled", "smollm2"] = setting("bundled", "the model and its recipe")
    worst_case: bool = setting(False, "random weights and no end token")
    vary_group: bool = setting(False, "4 prompts, and groups of several sizes")
    accuracy: bool = setting(False, "train both for --seconds each and watch the test accuracy")
    rounds: int = setting(0, "turns that each loop takes; 0 is 8, or 3 for smollm2", 0)
    iterations: int = setting(0, "per turn; 0 is 10, or 1 for smollm2", 0)
    seconds: int = setting(120, "with --accuracy: seconds of training for each loop", 1)
    output: str = setting("", "result file; by default it goes beside this script")


def compare_speed(settings: Settings, work: Work) -> dict:
    """Seconds per iteration and peak memory of both loops, and the ratio of the former."""
    small = settings.model == "bundled"
    count = settings.rounds or (8 if small else 3)
    turn = Turn(settings.iterations or (10 if small else 1))
    reports = take_turns(work, [Turn(1)] + [turn] * count)  # the first is to warm up
    result = {}
    for loop, (_, *played) in reports.items():
        lengths = played[-1]["lengths"]
        assert not work.endless or set(lengths) == {work.config.max_new_tokens}, lengths
        samples = [turn["samples"] for turn in played]
        result[loop] = {
            "seconds": median(sum(samples, [])),
            "peak_memory_mib": played[-1]["memory"],
            "completion_length": fmean(lengths),
            "rounds": samples,
        }
    pairs = zip(result["ours"]["rounds"], result["trl"]["rounds"], strict=True)
    by_round = [median(theirs) / median(ours) for ours, theirs in pairs]
    ratio = result["trl"]["seconds"] / result["ours"]["seconds"]
    for loop in LOOPS:
        seconds, length = result[loop]["seconds"], result[loop]["completion_length"]
        print(
            f"{LABELS[loop]:>9}: {seconds:.3f} s per iteration, completions of {length:.1f}", end=""
        )
        print(f" tokens, peak memory {result[loop]['peak_memory_mib']:.0f} MiB")
    print(
        f"TRL takes {ratio:.1f} times as long ({min(by_round):.1f} to {max(by_round):.1f} by round)"
    )
    return {**result, "ratio": ratio, "ratio_by_round": by_round}


def compare_groups(settings: Settings, work: Work, picture: Path) -> dict:
    """Speed of both loops with 4 prompts and groups of several sizes."""
    points = []
    for group in GROUPS:
        print(f"groups of {group}")
        config = replace(work.config, batch_size=4, num_generations=group)
        speed = compare_speed(settings, replace(work, config=config))
        points.append({"num_generations": group, **speed})
    from matplotlib.figure import Figure  # here, or it would count as memory
    from matplotlib.ticker import LogLocator

    from plot_metrics import COLOURS, save_figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for loop, colour in zip(LOOPS, COLOURS, strict=False):
        seconds = [point[loop]["seconds"] for point in points]
        axes.plot(GROUPS, seconds, "o-", color=colour, label=LABELS[loop])
    for group, point in zip(GROUPS, points, strict=True):
        axes.text(group, 1.15 * point["trl"]["seconds"], f"{point['ratio']:.0f} x", ha="center")
    axes.set(xscale="log", yscale="log", xlabel="G, completions of each of 4 prompts")
    axes.margins(y=0.15)
    axes.set_xticks(GROUPS, GROUPS)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("seconds per iteration")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, picture)
    return {"points": points}


def compare_accuracy(settings: Settings, work: Work, picture: Path) -> dict:
    """Test accuracy of both loops after equal times of training; evaluating is not counted."""
    count = settings.rounds or 8
    turn = Turn(float("inf"), settings.seconds / count, evaluate=True)
    reports = take_turns(work, [Turn(0, evaluate=True)] + [turn] * count)
    result = {}
    for loop, played in reports.items():
        seconds, iterations, result[loop] = 0.0, 0, []
        for turn in played:
            seconds, iterations = seconds + sum(turn["samples"]), iterations + len(turn["samples"])
            point = {"seconds": seconds, "iterations": iterations}
            result[loop].append({**point, "accuracies": turn["accuracies"]})
    from matplotlib.figure import Figure

    from plot_metrics import COLOURS, save_figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, kind in zip(panels, ("sampled", "greedy"), strict=True):
        for loop, colour in zip(LOOPS, COLOURS, strict=False):
            x = [point["seconds"] for point in result[loop]]
            points = [point["accuracies"][kind] for point in result[loop]]
            shares = [p["accuracy"] for p in points]
            axes.plot(x, shares, "o-", color=colour, label=LABELS[loop], ms=4)
            low, high = [p["low"] for p in points], [p["high"] for p in points]
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set(xlabel="seconds of training", title=f"{kind} answers", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of exact answers, test")
    panels[0].legend(loc="lower right")
    save_figure(figure, picture)
    return result


def main(argv: list[str] | None = None) -> int:
    settings = read_settings(Settings, __doc__, argv)
    name = "vs_trl" if settings.model == "bundled" else f"vs_trl_{settings.model}"
    for flag, ending in (("worst_case", ""), ("vary_group", "groups"), ("accuracy", "")):
        name += f"_{ending or flag}" if getattr(settings, flag) else ""
    output = Path(settings.output or HERE / f"{name}.json")
    picture, work = output.with_suffix(".png"), WORKS[settings.model]
    with TemporaryDirectory() as folder:
        if settings.worst_case:
            work = worst_case(work, Path(folder))
        if settings.accuracy:
            result = compare_accuracy(settings, work, picture)
        elif settings.vary_group:
            result = compare_groups(settings, work, picture)
        else:
            result = compare_speed(settings, work)
    write_result(output, {"work": work.describe(), **result})
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))

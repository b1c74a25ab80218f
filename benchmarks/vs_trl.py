"""Time this loop and TRL's GRPOTrainer side by side: the same model, problems and settings.

    python benchmarks/vs_trl.py                    # the bundled model, float32
    python benchmarks/vs_trl.py --shape 135m       # SmolLM2-135M's shape, random, bfloat16 compute
    python benchmarks/vs_trl.py --accuracy True    # test accuracy against seconds of training

Writes vs_trl.json, vs_trl_135m.json or vs_trl_accuracy.json and .png here, or to --output.

Each loop lives in a process of its own, so that peak memory is its own too. They take turns, many
times, and never compute at once: what disturbs the machine disturbs both. An iteration is one batch
of groups and all its updates. Both compute in the same precision on float32 weights, with fused
AdamW. TRL runs without what would slow it down here: gradient checkpointing, logging, saving,
progress bars.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import (
    HERE,
    Work,
    large_work,
    read_settings,
    write_result,
)
from benchmarks.turns import LOOPS, Turn, take_turns
from cli import exit_code, setting
from plot_metrics import COLOURS, plt, save_figure
from train_grpo import PRESETS, Config


@dataclass
class Settings:
    shape: Literal["bundled", "135m"] = setting("bundled", "the model; 135m has random weights")
    accuracy: bool = setting(False, "train both for --seconds each and watch the test accuracy")
    rounds: int = setting(0, "turns that each loop takes; 0 is 8, or 2 for 135m", 0)
    iterations: int = setting(0, "of ours per turn; 0 is 20, or 3 for 135m", 0)
    trl_iterations: int = setting(0, "of TRL's per turn; 0 is 4, or 1 for 135m", 0)
    warmup: int = setting(-1, "iterations before the first turn; -1 is 2, or none for 135m", -1)
    seconds: int = setting(120, "with --accuracy: seconds of training for each loop", 1)
    trl_weights: Literal["float32", "bfloat16"] = setting(
        "float32", "bfloat16: TRL as it is often run, which is no longer the same precision"
    )
    trl_attention: Literal["sdpa", "eager"] = setting("sdpa", "TRL's attention kernel")
    output: str = setting("", "result file; by default it goes beside this script")


def compare_speed(settings: Settings, work: Work, trl: dict[str, str]) -> dict:
    """Seconds per iteration and peak memory of both loops, and the ratio of the former."""
    large = settings.shape == "135m"
    count = settings.rounds or (2 if large else 8)
    warmup = (0 if large else 2) if settings.warmup < 0 else settings.warmup
    turns = {
        "ours": Turn(settings.iterations or (3 if large else 20)),
        "trl": Turn(settings.trl_iterations or (1 if large else 4)),
    }
    rounds = [dict.fromkeys(LOOPS, Turn(warmup))] if warmup else []
    reports = take_turns(work, rounds + [turns] * count, trl)
    result = {}
    for loop, (ready, *played) in reports.items():
        lengths = set(played[-1]["lengths"])
        assert lengths == {work.config.max_new_tokens}, f"{loop}: completions of {lengths} tokens"
        samples = [turn["samples"] for turn in played[-count:]]
        result[loop] = {
            "seconds": median(seconds for turn in samples for seconds in turn),
            "peak_memory_mib": played[-1]["peak_memory_mib"],
            "memory_after_setup_mib": ready["peak_memory_mib"],
            "completion_length": work.config.max_new_tokens,
            "rounds": samples,
        }
    result["ratio"] = result["trl"]["seconds"] / result["ours"]["seconds"]
    pairs = zip(result["ours"]["rounds"], result["trl"]["rounds"], strict=True)
    result["ratio_by_round"] = [median(theirs) / median(ours) for ours, theirs in pairs]
    for loop in LOOPS:
        seconds, peak = result[loop]["seconds"], result[loop]["peak_memory_mib"]
        print(f"{loop:>4}: {seconds:.3f} s per iteration, peak memory {peak:.0f} MiB")
    low, high = min(result["ratio_by_round"]), max(result["ratio_by_round"])
    print(f"TRL takes {result['ratio']:.1f} times as long ({low:.1f} to {high:.1f} by round)")
    return result


def compare_accuracy(settings: Settings, work: Work, trl: dict[str, str], picture: Path) -> dict:
    """Test accuracy of both loops after equal times of training; evaluating is not counted."""
    count = settings.rounds or 8
    rounds = [dict.fromkeys(LOOPS, Turn(0, evaluate=True))]
    turn = Turn(10**9, settings.seconds / count, evaluate=True)
    reports = take_turns(work, rounds + [dict.fromkeys(LOOPS, turn)] * count, trl)
    result = {}
    for loop, (_, *played) in reports.items():
        seconds, iterations, result[loop] = 0.0, 0, []
        for turn in played:
            seconds, iterations = seconds + sum(turn["samples"]), iterations + len(turn["samples"])
            point = {"seconds": seconds, "iterations": iterations}
            result[loop].append({**point, "accuracies": turn["accuracies"]})
    draw(result, picture)
    print(f"wrote {picture}")
    return result


def draw(result: dict, picture: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained", sharey=True)
    for axes, kind in zip(panels, ("sampled", "greedy"), strict=True):
        for loop, colour in zip(LOOPS, COLOURS, strict=False):
            x = [point["seconds"] for point in result[loop]]
            points = [point["accuracies"][kind] for point in result[loop]]
            label = {"ours": "this loop", "trl": "TRL"}[loop]
            axes.plot(x, [p["accuracy"] for p in points], "o-", color=colour, label=label, ms=4)
            low, high = [p["low"] for p in points], [p["high"] for p in points]
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set(xlabel="seconds of training", title=f"{kind} answers", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of exact answers, test")
    panels[0].legend(loc="lower right")
    save_figure(figure, picture)


def main(argv: list[str] | None = None) -> int:
    settings = read_settings(Settings, __doc__, argv)
    name = "accuracy" if settings.accuracy else settings.shape
    name = "vs_trl" if name == "bundled" else f"vs_trl_{name}"
    output = Path(settings.output or HERE / f"{name}.json")
    with TemporaryDirectory() as folder:
        work = Work()
        trl = {"weights": settings.trl_weights, "attention": settings.trl_attention}
        if settings.accuracy:
            # The preset's recipe, whose KL term is TRL's, on its own range of operands.
            recipe = Config(**PRESETS["tiny"])
            work = Work(prompt_tokens=0, endless=False, config=recipe)
            result = compare_accuracy(settings, work, trl, output.with_suffix(".png"))
        else:
            if settings.shape == "135m":
                work = large_work(folder)
            result = compare_speed(settings, work, trl)
    write_result(output, {"work": work.describe(), "trl_settings": trl, **result})
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""Does the time of an iteration grow as its operation count does, and what bounds its memory?

    python benchmarks/growth.py

One axis at a time, from the bundled model at 4 prompts x 8 completions of 16 tokens: group size,
prompts, new tokens, model size. Each point is measured in a process of its own, so that its peak
memory is its own. On each axis, seconds = overhead + operations / rate is fitted, which tells what
a larger run will take. The prompts' axis is measured again with a fixed micro_batch_size.

Writes growth.json and growth.png here, or to --output.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import (
    HERE,
    Work,
    in_own_process,
    read_settings,
    time_work,
    write_random_model,
    write_result,
)
from benchmarks.operations import count_flops
from cli import exit_code, setting
from plot_metrics import COLOURS, plt, save_figure

# Layers and hidden size of random Llamas with heads of 32 and a feed-forward of 4 x hidden.
SIZES = ((2, 64), (4, 128), (6, 256), (8, 512))
PROMPTS = (1, 2, 4, 8, 16, 32, 64)
AXES = {
    "num_generations": (2, 4, 8, 16, 32, 64),
    "batch_size": PROMPTS,
    "batch_size in micro-batches": PROMPTS,
    "max_new_tokens": (4, 8, 16, 32, 64, 128, 256),
    "parameters": SIZES,
}


@dataclass
class Settings:
    seconds: float = setting(3.0, "of iterations per point, three at least, after a warm-up", 0)
    micro_batch_size: int = setting(32, "completions per backward pass on that one axis", 8)
    largest: int = setting(256, "leave out what is larger than this on an axis of counts", 2)
    output: str = setting("", "result file; by default it goes beside this script")


def works(axis: str, settings: Settings, folder: Path) -> list[tuple[int, Work]]:
    """The points of an axis: (where it stands on the axis, work); a model's place is its size."""
    points, base = [], Work()
    for value in AXES[axis]:
        if axis == "parameters":
            layers, hidden = value
            shape = {"num_hidden_layers": layers, "hidden_size": hidden}
            shape |= {"num_attention_heads": hidden // 32, "intermediate_size": 4 * hidden}
            model = in_own_process(write_random_model, folder / str(hidden), shape)
            points.append((0, replace(base, model=model)))
        elif value <= settings.largest:
            name, _, micro = axis.partition(" ")
            changes = {name: value, "micro_batch_size": settings.micro_batch_size if micro else 0}
            points.append((value, replace(base, config=replace(base.config, **changes))))
    return points


def fit(flops: list[int], seconds: list[float]) -> tuple[float, float]:
    """(overhead, seconds per operation), both >= 0, with the least sum of squared relative errors.

    Relative, as otherwise the largest point alone would decide both.
    """
    x, y = np.array(flops, dtype=float), np.array(seconds)
    (overhead, slope), *_ = np.linalg.lstsq(np.stack([1 / y, x / y], axis=1), np.ones(len(y)))
    if overhead < 0:
        return 0.0, float((x / y).sum() / (x * x / y / y).sum())
    if slope < 0:
        return float((1 / y).sum() / (1 / y / y).sum()), 0.0
    return float(overhead), float(slope)


def measure_axis(axis: str, settings: Settings, folder: Path) -> dict:
    """Time and memory of each point of an axis, the fit, and how far each point lies from it."""
    points = []
    for value, work in works(axis, settings, folder):
        model = AutoConfig.from_pretrained(work.model)
        flops = sum(count_flops(model, work).values())
        done = in_own_process(time_work, work, settings.seconds)
        points.append({"value": value or done["parameters"], "flops": flops, **done})
        where = f"{axis} = {points[-1]['value']:,}"
        print(
            f"{where:<40}{done['seconds']:>9.3f} s {done['peak_memory_mib']:>7.0f} MiB", flush=True
        )
    overhead, slope = fit([p["flops"] for p in points], [p["seconds"] for p in points])
    for point in points:
        predicted = overhead + slope * point["flops"]
        point["predicted"] = predicted
        point["deviation"] = point["seconds"] / predicted - 1
    # Where the overhead outweighs the operations, time tells nothing about how those grow.
    past = [p for p in points if slope * p["flops"] > overhead]
    worst = max((abs(p["deviation"]) for p in past), default=None)
    rate = 1e-9 / slope if slope else None
    if worst is not None:
        print(f"  {overhead:.3f} s + operations / {rate:.0f} GFLOP/s, within {worst:.0%}")
    fitted = {"overhead_seconds": overhead, "gflop_per_second": rate}
    return {**fitted, "worst_deviation_past_overhead": worst, "points": points}


def draw(axes: dict[str, dict], micro_batch_size: int, picture: Path) -> None:
    """Seconds above, memory below, an axis per column; micro-batches share their axis's column."""
    columns = [axis for axis in axes if " " not in axis]
    size = (3 * len(columns), 5.2)
    figure, panels = plt.subplots(2, len(columns), figsize=size, layout="constrained")
    for column, axis in enumerate(columns):
        curves = [(axes[axis], COLOURS[0], "all at once")]
        curves += [
            (axes[name], COLOURS[1], f"micro_batch_size {micro_batch_size}")
            for name in axes
            if name.startswith(f"{axis} ")
        ]
        seconds, memory = panels[:, column]
        for measured, colour, label in curves:
            points = measured["points"]
            x = [p["value"] for p in points]
            seconds.plot(x, [p["seconds"] for p in points], "o", color=colour, ms=4, label=label)
            seconds.plot(x, [p["predicted"] for p in points], "-", color=colour, lw=1)
            memory.plot(x, [p["peak_memory_mib"] for p in points], "o-", color=colour, ms=4, lw=1)
        seconds.set(xscale="log", yscale="log", title=axis)
        memory.set(xscale="log", xlabel=axis, ylim=(0, None))
        if len(curves) > 1:
            seconds.legend(fontsize=7.5)
        for each in (seconds, memory):
            each.set_xticks(x, [f"{v / 1e6:.1f}M" if v > 9999 else v for v in x])
            each.grid(alpha=0.3)
        for scale in (seconds.xaxis, seconds.yaxis, memory.xaxis):
            scale.set_minor_formatter(NullFormatter())
        seconds.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        seconds.yaxis.set_major_formatter("{x:g}")
    panels[0, 0].set_ylabel("seconds per iteration; line: fit")
    panels[1, 0].set_ylabel("peak memory, MiB")
    save_figure(figure, picture)


def main(argv: list[str] | None = None) -> int:
    settings = read_settings(Settings, __doc__, argv)
    output = Path(settings.output or HERE / "growth.json")
    with TemporaryDirectory() as folder:
        axes = {axis: measure_axis(axis, settings, Path(folder)) for axis in AXES}
    draw(axes, settings.micro_batch_size, output.with_suffix(".png"))
    write_result(
        output,
        {
            "work": Work().describe(),
            "micro_batch_size": settings.micro_batch_size,
            "axes": axes,
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))

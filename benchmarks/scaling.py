"""How the seconds and the memory of an iteration grow with G, B, T and the size of the model.

    python benchmarks/scaling.py

One axis at a time, from 4 prompts x 8 completions of at most 16 tokens and 5 updates. `natural` is
the bundled model, whose completions end when they end and share most of their tokens; `worst case`
has random weights and no end token: full length, and next to nothing shared. Each point is measured
in a process of its own, so that its peak memory is its own.

Writes scaling.json and scaling.png here, or to --output.
"""

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import (
    HERE,
    Work,
    memory,
    read_settings,
    recorded_rollouts,
    start,
    worst_case,
    write_random_model,
    write_result,
)
from engine.cli import exit_code, setting
from engine.tree import RolloutTree
from train_grpo import Config, train_iteration

BASE = Work(Config(model_name="tiny_model", device="cpu", kl_estimator="k3"))
AXES = {
    "num_generations": (4, 8, 16, 32, 64),
    "batch_size": (1, 4, 16, 64),
    "max_new_tokens": (4, 16, 64, 256),
}
# Layers and hidden size of random Llamas with heads of 32 and a feed-forward of 4 x hidden.
SIZES = ((2, 64), (4, 128), (6, 256), (8, 512))


@dataclass
class Settings:
    seconds: float = setting(3.0, "of iterations per point, three at least, after a warm-up", 0)
    points: int = setting(9, "of each axis at most, from the smallest on", 1)
    output: str = setting("", "result file; by default it goes beside this script")


def time_work(work: Work, seconds: float) -> dict:
    """Seconds per iteration after one to warm up, peak memory, and how many tokens were read."""
    state, samples = start(work), []
    train_iteration(state, work.config)
    while len(samples) < 3 or sum(samples) < seconds:
        started = time.perf_counter()
        with recorded_rollouts() as rollouts:
            train_iteration(state, work.config)
        samples.append(time.perf_counter() - started)
    [batch] = rollouts
    tokens = batch.prompt_mask.sum() + batch.mask.sum() - len(batch)  # no one reads the last ones
    return {
        "policy": state.policy.name,
        "parameters": state.policy.model.num_parameters(),
        "seconds": median(samples),
        "samples": samples,
        "peak_memory_mib": memory(),
        "tokens": int(tokens),
        "distinct_tokens": len(RolloutTree(batch)),
    }


def measure(axis: str, value: int, work: Work, seconds: float) -> dict:
    """A point on an axis, measured in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        done = pool.submit(time_work, work, seconds).result()
    size, policy = done["peak_memory_mib"], done["policy"]
    tokens = f"{done['distinct_tokens']:,} distinct of {done['tokens']:,} tokens, {policy} policy"
    print(f"{axis:>15} = {value:<4} {done['seconds']:.3f} s, {size:.0f} MiB; {tokens}", flush=True)
    return {"value": value, **done}


def draw(axes: dict[str, dict], picture: Path) -> None:
    """A column per axis: seconds above, memory below."""
    from matplotlib.figure import Figure  # here, or it would count as memory
    from matplotlib.ticker import LogLocator, NullFormatter

    from plot_metrics import COLOURS, save_figure

    figure = Figure(figsize=(12, 5.2), layout="constrained")
    panels = figure.subplots(2, len(axes))
    for (axis, curves), (seconds, mebibytes) in zip(axes.items(), panels.T, strict=True):
        size = axis == "hidden_size"
        for label, points in curves.items():
            x = [p["parameters" if size else "value"] for p in points]
            style = {"color": COLOURS[label != "natural"], "ms": 4, "label": label}
            seconds.plot(x, [p["seconds"] for p in points], "o-", **style)
            mebibytes.plot(x, [p["peak_memory_mib"] for p in points], "o-", **style)
        for panel in (seconds, mebibytes):
            panel.set_xscale("log")
            panel.set_xticks(x, [f"{n / 1e6:.1f}M" if size else n for n in x])
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.grid(alpha=0.3)
        seconds.set(yscale="log", title="parameters" if size else axis)
        seconds.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        seconds.yaxis.set_major_formatter("{x:g}")
        seconds.yaxis.set_minor_formatter(NullFormatter())
        mebibytes.set_ylim(bottom=0)
    panels[0][0].set_ylabel("seconds per iteration")
    panels[0][0].legend()
    panels[1][0].set_ylabel("peak memory, MiB")
    save_figure(figure, picture)


def main(argv: list[str] | None = None) -> int:
    settings = read_settings(Settings, __doc__, argv)
    output = Path(settings.output or HERE / "scaling.json")
    axes: dict[str, dict[str, list]] = {}
    with TemporaryDirectory() as folder:
        worst = worst_case(BASE, Path(folder))
        for axis, values in AXES.items():
            axes[axis] = {"natural": [], "worst case": []}
            for value in values[: settings.points]:
                for label, work in zip(axes[axis], (BASE, worst), strict=True):
                    work = replace(work, config=replace(work.config, **{axis: value}))
                    axes[axis][label].append(measure(axis, value, work, settings.seconds))
        axes["hidden_size"] = {"worst case": []}
        for layers, hidden in SIZES[: settings.points]:
            shape = {"num_hidden_layers": layers, "hidden_size": hidden}
            shape |= {"intermediate_size": 4 * hidden, "num_attention_heads": hidden // 32}
            shape |= {"num_key_value_heads": hidden // 32}
            model = write_random_model("tiny_model", Path(folder) / str(hidden), **shape)
            work = replace(worst, config=replace(worst.config, model_name=model))
            point = measure("hidden_size", hidden, work, settings.seconds)
            axes["hidden_size"]["worst case"].append(point)
    draw(axes, output.with_suffix(".png"))
    write_result(output, {"work": BASE.describe(), "axes": axes})
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""How near is an iteration to the fastest that this machine could make it, and where does it go?

    python benchmarks/roofline.py                    # the bundled model, 6 x 16, 2 updates
    python benchmarks/roofline.py --model smollm2    # SmolLM2-135M, bfloat16, the reference batch

Repeats one iteration (learning rate 0, the same seed), times its phases, and counts the operations
that it needs: each distinct prefix of its rollout once per pass. Two floors:

by peak rate   all operations at the best rate that any matrix product reached here
at the shapes  each matrix product as fast as it alone runs at its own shape

In both floors a token attends to its ancestors only, at the best rate; real passes compute all
pairs of tokens and mask the others. Norms, activations, softmax, casts and Python are in neither.
Writes roofline.json or roofline_smollm2.json here, or to --output.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import (
    CPU,
    WORKS,
    ModelSettings,
    read_settings,
    time_phases,
    write_result,
)
from benchmarks.operations import Pass, needed_passes
from engine.cli import setting
from engine.files import exit_code
from engine.machine import choose_dtype


@dataclass
class Settings(ModelSettings):
    iterations: int = setting(10, "to time, after one to warm up", 1)


def time_product(shape: tuple[int, int, int], dtype: torch.dtype, copies: int) -> float:
    """Best mean seconds of an (m, k) by (k, n) product.

    So many copies of the weights take turns, so that they come from memory, as a model's do.
    """
    m, k, n = shape
    x, weights = torch.randn(m, k).to(dtype), [torch.randn(n, k).to(dtype) for _ in range(copies)]
    F.linear(x, weights[0])
    best, spent = float("inf"), 0.0
    while spent < 0.05:
        calls, started = 0, time.perf_counter()
        while calls < copies or time.perf_counter() - started < 0.005:
            F.linear(x, weights[calls % copies])
            calls += 1
        elapsed = time.perf_counter() - started
        best, spent = min(best, elapsed / calls), spent + elapsed
    return best


def floors(passes: dict[str, list[Pass]], dtype: torch.dtype, layers: int):
    """Return (best rate, {phase: {"peak": seconds, "shapes": seconds}})."""
    shapes = {(size, size, size): 1 for size in (512, 1024, 2048)}
    for each in sum(passes.values(), []):
        shapes |= each.products
    seconds = {shape: time_product(shape, dtype, min(n, layers)) for shape, n in shapes.items()}
    rate = max(2 * m * k * n / s for (m, k, n), s in seconds.items())

    def at_the_shapes(each: Pass) -> float:
        return each.attention / rate + sum(seconds[p] * n for p, n in each.products.items())

    result = {
        phase: {
            "peak": sum(each.flops for each in of_phase) / rate,
            "shapes": sum(map(at_the_shapes, of_phase)),
        }
        for phase, of_phase in passes.items()
    }
    result["all"] = {way: sum(f[way] for f in result.values()) for way in ("peak", "shapes")}
    return rate, result


def main(argv: list[str] | None = None) -> int:
    settings = read_settings(Settings, __doc__, argv)
    work = WORKS[settings.model]
    learner, batch, _, seconds = time_phases(work, settings.iterations)
    model = learner.policy.model.config
    passes = needed_passes(model, batch, work.config.num_inner_updates)
    flops = {phase: sum(each.flops for each in of_phase) for phase, of_phase in passes.items()}
    flops["all"] = sum(flops.values())
    with torch.no_grad():
        dtype = choose_dtype(work.config.dtype, CPU)
        rate, floor = floors(passes, dtype, model.num_hidden_layers)
    print("| phase | GFLOP | by peak rate | at the shapes | actual | actual / at the shapes |")
    print("|---|---|---|---|---|---|")
    for phase, actual in seconds.items():
        cells = ["", "", "", f"{actual:.3f} s", ""]
        if phase in floor:
            peak, shapes = floor[phase].values()
            cells = [f"{flops[phase] / 1e9:,.1f}", f"{peak:.3f} s", f"{shapes:.3f} s", cells[3]]
            cells.append(f"{actual / shapes:.1f}")
        print("| " + " | ".join([phase, *cells]) + " |")
    ratio = {way: seconds["all"] / floor["all"][way] for way in ("peak", "shapes")}
    print(
        f"best rate {rate / 1e9:.0f} GFLOP/s; an iteration takes {ratio['peak']:.1f} times the"
        f" floor by peak rate, {ratio['shapes']:.1f} times the one at the shapes"
    )
    result = {"work": work.describe(), "flops": flops, "gflop_per_second": rate / 1e9}
    result |= {"floor": floor, "seconds": seconds, "times_the_floor": ratio}
    write_result(settings.result_file("roofline"), result)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))

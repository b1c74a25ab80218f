"""How near is an iteration to the fastest that this machine could make it, and where does it go?

    python benchmarks/limit.py                  # the bundled model, float32
    python benchmarks/limit.py --shape 135m     # SmolLM2-135M's shape, random, bfloat16 compute

Writes limit.json or limit_135m.json here, or to --output. It counts the floating-point operations
that an iteration needs, times this machine's matrix products at the very shapes they come in, and
times the parts of real iterations. Two floors:

by peak rate   all operations at the best rate that any product reached here in this precision
at the shapes  each product and each attention as fast as it alone runs at its own shape (attention
               by the fused kernel or step by step, whichever is faster)

Both leave out norms, activations, softmax, casts and Python. Decoding reads every weight for a few
rows, so the first floor is out of its reach; the second is not.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Literal
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_grpo
from benchmarks.common import (
    HERE,
    Work,
    in_own_process,
    large_work,
    read_settings,
    start,
    write_result,
)
from benchmarks.operations import PHASES, Op, count_flops, operations, optimizer_bytes
from cli import exit_code, setting
from policy import Policy


@dataclass
class Settings:
    shape: Literal["bundled", "135m"] = setting("bundled", "the model; 135m has random weights")
    iterations: int = setting(0, "to time, after one to warm up; 0 is 20, or 2 for 135m", 0)
    output: str = setting("", "result file; by default it goes beside this script")


def seconds_per_call(call: Callable[[int], object], copies: int) -> float:
    """Best mean time of `call(i)` over rounds of at least `copies` calls and 5 ms."""
    call(0)
    best, spent = float("inf"), 0.0
    while spent < 0.05:
        calls, started = 0, time.perf_counter()
        while calls < copies or time.perf_counter() - started < 0.005:
            call(calls % copies)
            calls += 1
        elapsed = time.perf_counter() - started
        best, spent = min(best, elapsed / calls), spent + elapsed
    return best


def time_op(op: Op, dtype: torch.dtype, layers: int) -> tuple[float, float]:
    """Seconds of one `op`, forward and backward.

    As many weights as the model has layers take turns, so that they come from where they would.
    """
    if op.kind == "linear":
        tokens, inputs, outputs = op.sizes
        copies = layers if op.times >= layers else 1
        x, gradient = torch.randn(tokens, inputs).to(dtype), torch.randn(tokens, outputs).to(dtype)
        weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(copies)]
        with torch.no_grad():
            forward = seconds_per_call(lambda i: F.linear(x, weights[i]), copies)
            backward = seconds_per_call(lambda i: gradient @ weights[i], copies)
            return forward, backward + seconds_per_call(lambda i: gradient.T @ x, copies)
    rows, heads, queries, context, size = op.sizes
    q = torch.randn(rows, heads, queries, size).to(dtype).requires_grad_()
    k, v = (torch.randn(rows, heads, context, size).to(dtype).requires_grad_() for _ in range(2))
    gradient = torch.randn(q.shape).to(dtype)
    times = []
    for attention in (F.scaled_dot_product_attention, plain_attention):
        out = attention(q, k, v)
        back = partial(torch.autograd.grad, out, (q, k, v), gradient, retain_graph=True)
        with torch.no_grad():
            forward = seconds_per_call(lambda _, attention=attention: attention(q, k, v), 1)
        times.append((forward, seconds_per_call(lambda _, back=back: back(), 1)))
    # Which of the two is faster depends on precision and shape, and on the direction.
    return min(times)[0], min(backward for _, backward in times)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What scaled_dot_product_attention computes, in separate steps."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v


def best_rate(dtype: torch.dtype) -> float:
    """Operations per second of the best of some large square products."""
    rates = []
    for size in (512, 1024, 2048):
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        rates.append(2 * size**3 / seconds_per_call(lambda _, a=a, b=b: F.linear(a, b), 1))
    return max(rates)


def floors(model, work: Work) -> tuple[float, dict[str, dict[str, float]]]:
    """Return (best rate, {phase: {"peak": seconds, "shapes": seconds}})."""
    phases, timed = operations(model, work), {}
    # Each decoding step attends to one position more: one measurement, near the middle, is enough.
    middle = work.prompt_tokens + work.config.max_new_tokens // 2
    shapes: dict[str, Counter] = {}
    for phase, ops in phases.items():
        shapes[phase] = Counter()
        for op in ops:
            if op.kind == "attention" and op.sizes[2] == 1:
                op = op._replace(sizes=(*op.sizes[:3], middle, op.sizes[4]))
            shapes[phase][op._replace(times=0)] += op.times
    rate = best_rate(work.dtype)
    for phase in PHASES:
        for op, times in shapes[phase].items():
            if op not in timed:
                op_timed = op._replace(times=times)
                timed[op] = time_op(op_timed, work.dtype, model.num_hidden_layers)
                if op.kind == "linear":
                    rate = max(rate, op._replace(times=1).flops / timed[op][0])
    flops, result = count_flops(model, work), {}
    for phase in PHASES:
        way = 1 if phase == "backward" else 0
        at_shapes = sum(timed[op][way] * times for op, times in shapes[phase].items())
        result[phase] = {"peak": flops[phase] / rate, "shapes": at_shapes}
    return rate, result


class Stopwatch:
    """Adds up the time spent in functions, by name; in a function within one, to the outer one."""

    def __init__(self):
        self.seconds, self.inside = Counter(), False

    def wrap(self, name: str | Callable[[], str], function: Callable) -> Callable:
        @wraps(function)
        def timed(*arguments, **options):
            if self.inside:
                return function(*arguments, **options)
            self.inside, phase = True, name if isinstance(name, str) else name()
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[phase] += time.perf_counter() - started
                self.inside = False

        return timed


def time_phases(work: Work, iterations: int) -> tuple[object, int, dict[str, float]]:
    """Return (model config, parameters, median seconds per iteration by phase) of real ones."""
    inputs = start(work)
    model, optimizer, watch = inputs[0].policy.model, inputs[0].optimizer, Stopwatch()
    watched = [
        (train_grpo, "encode_prompts", "tokenising"),
        (train_grpo, "rollout", "rollout"),
        (train_grpo, "reward_function", "rewards"),
        (train_grpo, "grpo_loss", "loss"),
        (Policy, "forward", lambda: "forward" if torch.is_grad_enabled() else "reference"),
        (torch.Tensor, "backward", "backward"),
        (torch.nn.utils, "clip_grad_norm_", "clipping"),
        (optimizer, "step", "optimiser"),
    ]
    train_grpo.train_iteration(*inputs)  # to warm up
    history = []
    with ExitStack() as stack:
        for owner, attribute, name in watched:
            timed = watch.wrap(name, getattr(owner, attribute))
            stack.enter_context(patch.object(owner, attribute, timed))
        for _ in range(iterations):
            watch.seconds.clear()
            started = time.perf_counter()
            train_grpo.train_iteration(*inputs)
            total = time.perf_counter() - started
            other = total - sum(watch.seconds.values())
            history.append({**watch.seconds, "other": other, "all": total})
    order = ("tokenising", "rollout", "rewards", "reference", "forward", "loss", "backward")
    order += ("clipping", "optimiser", "other", "all")
    seconds = {name: median(once.get(name, 0.0) for once in history) for name in order}
    return model.config, model.num_parameters(), seconds


def print_table(result: dict) -> None:
    print(f"{'':>12}{'GFLOP':>10}{'by peak':>10}{'at shapes':>10}{'actual':>10}{'share':>8}")
    for name, seconds in result["seconds"].items():
        line = f"{name:>12}"
        flops = sum(result["flops"].values()) if name == "all" else result["flops"].get(name)
        floor = result["floor"].get(name)
        line += f"{flops / 1e9:>10.2f}" if flops else " " * 10
        line += f"{floor['peak']:>10.3f}{floor['shapes']:>10.3f}" if floor else " " * 20
        print(line + f"{seconds:>10.3f}{seconds / result['seconds']['all']:>8.0%}")
    print(f"best rate {result['gflop_per_second']:.0f} GFLOP/s; each optimiser step moves", end=" ")
    print(f"{result['optimizer_bytes'] / 1e6:.0f} MB; times in seconds per iteration")


def main(argv: list[str] | None = None) -> int:
    settings = read_settings(Settings, __doc__, argv)
    large = settings.shape == "135m"
    with TemporaryDirectory() as folder:
        work = large_work(folder) if large else Work()
        count = settings.iterations or (2 if large else 20)
        model, parameters, seconds = in_own_process(time_phases, work, count)
        rate, floor = in_own_process(floors, model, work)
    floor["all"] = {way: sum(floor[p][way] for p in PHASES) for way in ("peak", "shapes")}
    result = {
        "work": work.describe(),
        "parameters": parameters,
        "flops": count_flops(model, work),
        "gflop_per_second": rate / 1e9,
        "optimizer_bytes": optimizer_bytes(parameters),
        "floor": floor,
        "seconds": seconds,
        "times_the_floor": {w: seconds["all"] / floor["all"][w] for w in ("peak", "shapes")},
    }
    print_table(result)
    name = "limit_135m.json" if large else "limit.json"
    write_result(Path(settings.output or HERE / name), result)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))

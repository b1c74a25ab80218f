"""Seconds per iteration with one process and with several, each held to one thread.

    python benchmarks/scaling.py                              # the bundled model, float32
    python benchmarks/scaling.py --shape 135m --cores 2,3     # SmolLM2-135M's shape, bfloat16

Strong: the same batch for all together. Weak: the same batch for each process. Efficiency 1 would
be a half of the time, or the same time, with two. The processes talk by Gloo over the loopback
device; `all-reduce alone` is what exchanging the gradients of an iteration takes with no
computation beside it. Prints a table and writes scaling.json or scaling_135m.json here, or to
--output.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import spread
from benchmarks.common import (
    HERE,
    SMOLLM2,
    Work,
    read_settings,
    start,
    write_random_model,
    write_result,
)
from cli import exit_code, setting
from train_grpo import train_iteration

# Qwen2.5-0.5B, for which the estimate is.
PARAMETERS, DEVICES = 494_032_768, 8
# Assumed, not measured: bytes per second that an all-reduce moves through each device.
BANDWIDTHS = {"NVLink within a machine": 400e9, "200 Gbit/s between machines": 20e9}


@dataclass
class Settings:
    shape: Literal["bundled", "135m"] = setting("bundled", "the model; 135m has random weights")
    iterations: int = setting(0, "to time, after one to warm up; 0 is 20, or 2 for 135m", 0)
    batch_size: int = setting(4, "problems for one process", 1)
    processes: int = setting(2, "how many to compare with one", 2)
    cores: str = setting("", "pin the processes to these cores: 2,3")
    output: str = setting("", "result file; by default it goes beside this script")
    worker: str = setting("", "folder of the model: measure as one of the processes")


def bytes_sent(parameters: int, updates: int, processes: int) -> float:
    """What each process sends per iteration: a ring all-reduce of float32 gradients per update."""
    return parameters * 4 * updates * 2 * (processes - 1) / processes


def measure(settings: Settings) -> dict:
    """Train for some iterations, on this process's own core if `cores` are named."""
    if settings.cores:
        os.sched_setaffinity(0, {int(settings.cores.split(",")[spread.rank()])})
    torch.set_num_threads(1)
    large = settings.shape == "135m"
    work = Work(model=settings.worker, dtype=torch.bfloat16 if large else torch.float32)
    work = replace(work, config=replace(work.config, batch_size=settings.batch_size))
    inputs = start(work)
    train_iteration(*inputs)
    count = settings.iterations or (2 if large else 20)
    done = [train_iteration(*inputs) for _ in range(count)]
    seconds = [metrics["seconds"] for metrics in done]
    with FlopCounterMode(display=False) as counter:
        train_iteration(*inputs)
    parameters, updates = inputs[1].model.num_parameters(), work.config.num_inner_updates
    exchange = torch.zeros(parameters)
    started = time.perf_counter()
    for _ in range(updates if spread.size() > 1 else 0):
        dist.all_reduce(exchange)
    return {
        "parameters": parameters,
        "processes": spread.size(),
        "batch_size": settings.batch_size,
        "updates": updates,
        "seconds": statistics.median(seconds),
        "samples": seconds,
        "gflop_per_process": counter.get_total_flops() / 1e9,
        "bytes_sent_per_process": bytes_sent(parameters, updates, spread.size()),
        "allreduce_alone": time.perf_counter() - started,
    }


def launch(settings: Settings, model: str, processes: int, batch_size: int) -> dict:
    """Measure in processes of their own."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(several if processes > 1 else []), __file__]
    command += [f"--worker={model}", f"--batch_size={batch_size}", f"--shape={settings.shape}"]
    command += [f"--iterations={settings.iterations}", f"--cores={settings.cores}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def estimate(one: dict) -> list[str]:
    """What exchanging gradients costs a model of 0.5B parameters on eight devices."""
    sent = bytes_sent(PARAMETERS, one["updates"], DEVICES)
    lines = [f"{DEVICES} devices, {PARAMETERS:,} parameters: each sends {sent / 1e9:.1f} GB"]
    lines[0] += " per iteration"
    lines += [f"  {place}: {sent / rate:.3f} s" for place, rate in BANDWIDTHS.items()]
    work = one["gflop_per_process"] / one["parameters"] * PARAMETERS / 1e3
    lines.append(f"  work of one process's share: {work:.1f} TFLOP, by the count for this shape")
    return lines


def print_table(runs: list[dict]) -> None:
    print("| processes | problems | scaling | seconds | efficiency | MB sent | all-reduce alone |")
    print("|---|---|---|---|---|---|---|")
    for run in runs:
        cells = [str(run["processes"]), str(run["batch_size"]), run["scaling"]]
        cells += [f"{run['seconds']:.3f}", f"{run['efficiency']:.2f}"]
        cells += [f"{run['bytes_sent_per_process'] / 1e6:,.0f}", f"{run['allreduce_alone']:.3f} s"]
        print("| " + " | ".join(cells) + " |")


def main(argv: list[str] | None = None) -> int:
    settings = read_settings(Settings, __doc__, argv)
    if settings.worker:
        with spread.joined():
            print(json.dumps(measure(settings)))
        return 0
    n, batch, large = settings.processes, settings.batch_size, settings.shape == "135m"
    with TemporaryDirectory() as folder:
        model = write_random_model(Path(folder) / "model", SMOLLM2) if large else Work().model
        one = launch(settings, model, 1, batch) | {"scaling": "-", "efficiency": 1.0}
        strong = launch(settings, model, n, batch) | {"scaling": "strong"}
        weak = launch(settings, model, n, batch * n) | {"scaling": "weak"}
    strong["efficiency"] = one["seconds"] / n / strong["seconds"]
    weak["efficiency"] = one["seconds"] / weak["seconds"]
    print_table([one, strong, weak])
    print("\n".join(estimate(one)))
    name = "scaling_135m.json" if large else "scaling.json"
    write_result(Path(settings.output or HERE / name), {"runs": [one, strong, weak]})
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""Seconds per iteration with one process and with several, each held to one thread.

    python benchmarks/distributed.py                                   # the bundled model
    python benchmarks/distributed.py --model smollm2 --cores 2,3       # SmolLM2-135M, bfloat16

Strong scaling: the same batch for all together. Weak: the same batch for each process. Efficiency 1
would be half the time, or the same time, with two. The processes talk by Gloo over the loopback
device; `all-reduce alone` is how long it takes to exchange an iteration's gradients when nothing
else is computed. Prints a table and writes distributed.json or distributed_smollm2.json here, or to
--output.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import WORKS, ModelSettings, read_settings, start, write_result
from engine.cli import setting
from engine.distributed import process_group, rank, world_size
from engine.files import exit_code
from train_grpo import train_iteration


@dataclass
class Settings(ModelSettings):
    iterations: int = setting(0, "to time, after one to warm up; 0 is 20, or 3 for smollm2", 0)
    batch_size: int = setting(4, "problems for one process", 1)
    processes: int = setting(2, "how many to compare with one", 2)
    cores: str = setting("", "pin the processes to these cores: 2,3")
    worker: bool = setting(False, "measure as one of the processes")


def measure(settings: Settings) -> dict:
    """Train for some iterations, on this process's own core if `cores` are named."""
    if settings.cores:
        os.sched_setaffinity(0, {int(settings.cores.split(",")[rank()])})
    torch.set_num_threads(1)
    work = WORKS[settings.model]
    config = replace(work.config, batch_size=settings.batch_size)
    task, learner = start(replace(work, config=config))
    count = settings.iterations or (20 if settings.model == "bundled" else 3)
    metrics = [train_iteration(task, learner, config)[0] for _ in range(1 + count)]
    samples = [m["seconds"] for m in metrics[1:]]
    gradients, sent = torch.zeros(learner.policy.model.num_parameters()), 0.0
    started = time.perf_counter()
    if world_size() > 1:
        for _ in range(config.num_inner_updates):
            torch.distributed.all_reduce(gradients)
        # A ring all-reduce sends each gradient to the sum, and each sum to all.
        sent = 4 * len(gradients) * config.num_inner_updates * 2 * (1 - 1 / world_size())
    return {
        "processes": world_size(),
        "batch_size": settings.batch_size,
        "seconds": median(samples),
        "samples": samples,
        "mb_sent_per_process": sent / 1e6,
        "allreduce_alone": time.perf_counter() - started,
    }


def launch(settings: Settings, processes: int, batch_size: int) -> dict:
    """Measure in processes of their own."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(several if processes > 1 else []), __file__, "--worker=True"]
    command += [f"--model={settings.model}", f"--batch_size={batch_size}"]
    command += [f"--iterations={settings.iterations}", f"--cores={settings.cores}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    settings = read_settings(Settings, __doc__, argv)
    if settings.worker:
        with process_group():
            print(json.dumps(measure(settings)))
        return 0
    n, batch = settings.processes, settings.batch_size
    one = launch(settings, 1, batch) | {"scaling": "-", "efficiency": 1.0}
    strong = launch(settings, n, batch) | {"scaling": "strong"}
    weak = launch(settings, n, batch * n) | {"scaling": "weak"}
    strong["efficiency"] = one["seconds"] / n / strong["seconds"]
    weak["efficiency"] = one["seconds"] / weak["seconds"]
    print("| processes | problems | scaling | seconds | efficiency | MB sent | all-reduce alone |")
    print("|---|---|---|---|---|---|---|")
    for run in (one, strong, weak):
        cells = [str(run["processes"]), str(run["batch_size"]), run["scaling"]]
        cells += [f"{run['seconds']:.3f}", f"{run['efficiency']:.2f}"]
        cells += [f"{run['mb_sent_per_process']:,.0f}", f"{run['allreduce_alone']:.3f} s"]
        print("| " + " | ".join(cells) + " |")
    work = WORKS[settings.model].describe() | {"batch_size": batch}
    write_result(settings.result_file("distributed"), {"work": work, "runs": [one, strong, weak]})
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))

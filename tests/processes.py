"""Trainings in processes of their own, to be watched and killed, and what they leave behind."""

import io
import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

from conftest import ROOT
from safetensors.torch import load_file

from checkpoint import CHECKPOINTS, METRICS_FILE, checkpoints_in
from train_grpo import main

# Small, but with a rate at which the weights do move.
FLAGS = (
    *("--preset", "tiny", "--batch_size", "2", "--num_generations", "4", "--max_new_tokens", "8"),
    *("--num_inner_updates", "2", "--learning_rate", "1e-4", "--eval_problems", "8"),
    *("--eval_every", "4", "--checkpoint_every", "2"),
)


def torchrun(processes: int, *flags: str) -> list[str]:
    """The command that runs a script in several processes."""
    several = ["--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, "-m", "torch.distributed.run", *several, *flags]


def start(folder: Path, *flags, launcher=(sys.executable,), **options) -> subprocess.Popen:
    """Start a training in `folder`; what it prints goes to the files `out` and `err` beside it."""
    with open(f"{folder}.out", "a") as out, open(f"{folder}.err", "a") as err:
        return subprocess.Popen(
            [*launcher, str(ROOT / "train_grpo.py"), *FLAGS, *map(str, flags)],
            cwd=folder,
            stdout=out,
            stderr=err,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            **options,
        )


def printed(folder: Path) -> str:
    return Path(f"{folder}.out").read_text() + Path(f"{folder}.err").read_text()


def finish(folder: Path, *flags) -> str:
    """Train to the end in `folder`, in this process; returns what was printed."""
    out, here = io.StringIO(), os.getcwd()
    os.chdir(folder)
    try:
        with redirect_stdout(out):
            assert main([*FLAGS, *map(str, flags)]) == 0
    finally:
        os.chdir(here)
    return out.getvalue()


def wait_until(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} too early"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.0005)


def newest(folder: Path) -> int:
    """The iteration of the newest checkpoint, 0 if there is none."""
    return max((int(path.name) for path in checkpoints_in(folder)), default=0)


def is_writing(folder: Path) -> bool:
    """Whether a checkpoint is being written (or was, when the run was killed)."""
    return any((folder / CHECKPOINTS).glob("[0-9]*[0-9].tmp"))


def metrics_but_for_times(folder: Path) -> dict:
    """What the metrics file holds, but for times and the command (which may be pytest's)."""
    metrics = json.loads((folder / METRICS_FILE).read_text())
    for name in ("seconds", "peak_memory_mib"):
        del metrics[name]
    del metrics["environment"]["command"]
    for iteration in metrics["iterations"]:
        del iteration["seconds"]
    return metrics


def assert_same_run(folder: Path, other: Path) -> None:
    """Metrics (but for times), saved model, weights and optimiser agree to the last bit."""
    assert metrics_but_for_times(folder) == metrics_but_for_times(other)
    last = other / CHECKPOINTS / str(newest(other))
    files = [str(path.relative_to(other)) for path in last.glob("*.safetensors")]
    assert len(files) == 4  # the weights, and three of the optimiser
    for file in ("saved_model/model.safetensors", *files):
        ours, theirs = load_file(folder / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        assert all(ours[n].equal(theirs[n]) for n in theirs), file

"""Trainings, in this process or in their own, and what they leave behind."""

import io
import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

from conftest import ROOT

import plot_metrics
from engine.checkpoint import checkpoints_in, load_checkpoint
from engine.files import METRICS_FILE
from train_grpo import main

# Small, with a learning rate that moves the weights.
FLAGS = (
    *("--preset", "tiny", "--batch_size", "2", "--num_generations", "4", "--max_new_tokens", "8"),
    *("--num_inner_updates", "2", "--learning_rate", "1e-4", "--eval_problems", "8"),
    *("--eval_every", "4", "--checkpoint_every", "2", "--lr_schedule", "constant"),
)


def torchrun(processes: int, *flags: str) -> list[str]:
    """The command that runs a script in several processes."""
    several = ["--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, "-m", "torch.distributed.run", *several, *flags]


def start(folder: Path, *flags, launcher=(sys.executable,)) -> subprocess.Popen:
    """Start a training in `folder`; its output goes to the files `<folder>.out` and `.err`."""
    folder.mkdir(exist_ok=True)
    with open(f"{folder}.out", "a") as out, open(f"{folder}.err", "a") as err:
        return subprocess.Popen(
            [*launcher, str(ROOT / "train_grpo.py"), *arguments(*flags)],
            cwd=folder,
            stdout=out,
            stderr=err,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )


def printed(folder: Path) -> str:
    return Path(f"{folder}.out").read_text() + Path(f"{folder}.err").read_text()


def arguments(*flags) -> list[str]:
    return [str(flag) for flag in (*FLAGS, *flags)]


def finish(folder: Path, *flags, code: int = 0) -> str:
    """Train in `folder`, in this process and without plots; returns what it prints."""
    out, here = io.StringIO(), os.getcwd()
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    try:
        with redirect_stdout(out), patch.object(plot_metrics, "draw"):
            assert main(arguments(*flags)) == code
    finally:
        os.chdir(here)
    return out.getvalue()


def read_metrics(folder: Path) -> dict:
    return json.loads((folder / METRICS_FILE).read_text())


def wait_until(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended early with {process.returncode}"
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.0005)


def newest(folder: Path) -> int:
    """The iteration of the newest checkpoint, 0 if there is none."""
    return max((int(path.name) for path in checkpoints_in(folder)), default=0)


def metrics_but_for_times(folder: Path) -> dict:
    """The metrics without times, memory and the command (which may be pytest's), at any depth."""
    own = {"seconds", "set_up_seconds", "rollout_seconds", "peak_memory_mib", "command"}
    raw = (folder / METRICS_FILE).read_text()
    return json.loads(raw, object_pairs_hook=lambda pairs: {n: v for n, v in pairs if n not in own})


def assert_same_checkpoint(folder: Path, other: Path) -> None:
    """Weights, optimizer and generators of the newest checkpoints agree to the last bit."""
    (ours, _), (theirs, _) = load_checkpoint(folder), load_checkpoint(other)
    assert ours.keys() == theirs.keys()
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())


def assert_same_run(folder: Path, other: Path) -> None:
    """Metrics (but for times), saved model and newest checkpoint agree to the last bit."""
    assert metrics_but_for_times(folder) == metrics_but_for_times(other)
    assert_same_checkpoint(folder, other)
    ours, theirs = (f / "saved_model" / "model.safetensors" for f in (folder, other))
    assert ours.read_bytes() == theirs.read_bytes()

"""Atomic files, checkpoints, the lock on a run's folder, and signals.

Whatever kills the process, each file and folder in `output_dir` is complete or absent. New content
is written to a temporary name, flushed to disk, and renamed into place.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import distributed
from engine.cli import UserError

METRICS_FILE, COMPLETIONS_FILE = "grpo_metrics.json", "grpo_completions.jsonl"
CHECKPOINTS = "checkpoints"
STATE, MANIFEST = "state.json", "manifest.json"


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows syncs only these
    os.fsync(handle)
    os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically."""
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_bytes(content)
        sync(beside)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)  # frees the space if the disk is full
        raise


def write_json(path: Path, content: dict) -> None:
    """Write valid JSON: NaN and infinities become null."""
    write_bytes(path, json.dumps(finite(content), allow_nan=False, indent=1).encode())


def append_line(path: Path, content: dict) -> None:
    """Append a line of JSON and flush it to disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(finite(content), allow_nan=False) + "\n")
    sync(path)


def cut_lines(path: Path, iteration: int) -> None:
    """Drop the lines of a JSONL file that a kill left after an iteration, whole or half."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if not line.endswith(b"\n") or json.loads(line)["iteration"] > iteration:
                break
        except (ValueError, TypeError, KeyError):
            break
        kept.append(line)
    write_bytes(path, b"".join(kept))


def finite(value):
    """Replace non-finite floats by None and round floats to six significant digits."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises UserError if the file is missing or is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON (truncated?): {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, not a JSON object")
    return content


def prepare_output_dir(path: Path) -> None:
    """Create `path` and check that it is writable. Raises UserError."""
    probe = path / ".write_test"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = f"cannot be written ({getattr(error, 'strerror', error)}); choose another folder"
        raise UserError(f"--output_dir {path} {reason}") from error


@contextmanager
def run_folder(path: Path) -> Iterator[None]:
    """Lock `path` for one run. Raises UserError if it is taken, or if a write fails inside."""
    prepare_output_dir(path)
    lock = FileLock(path / ".lock")  # the operating system frees it if the run dies
    try:
        with lock.acquire(timeout=0):
            yield
    except Timeout as error:
        text = f"another run is writing to {path.resolve()}; choose another --output_dir"
        raise UserError(text) from error
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's message
        place, reason = getattr(error, "filename", None), getattr(error, "strerror", None)
        text = f"cannot write {place or path}: {reason or error}. The last checkpoint in {path} is"
        raise UserError(f"{text} intact; fix this and rerun with --resume") from error


def replace_folder(new: Path, target: Path) -> None:
    """Replace `target` by the finished folder `new`; the old one is deleted last."""
    for path in (*new.iterdir(), new):
        sync(path)
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if (target / ".gitkeep").exists():
        (new / ".gitkeep").touch()
    if target.exists():
        target.rename(old)
    new.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def checkpoints_in(output: Path) -> list[Path]:
    """The folders checkpoints/<iteration>/ of a run, oldest first."""
    found = (path for path in (output / CHECKPOINTS).glob("[0-9]*") if path.name.isdecimal())
    return sorted(found, key=lambda path: int(path.name))


def save_checkpoint(state, metrics: dict, generators: Tensor, output: Path) -> None:
    """Write checkpoints/<iteration>/ from a TrainState and its metrics; keep the last two.

    `generators` (uint8) are the token generators' states of all processes, concatenated.
    No pickle: tensors go to safetensors, the rest to JSON, which keeps every bit of a float.
    """
    root, iteration = output / CHECKPOINTS, len(metrics["iterations"])
    root.mkdir(exist_ok=True)  # not `output`: if the user deleted it, the run must stop
    for left_over in root.glob("*.tmp"):
        shutil.rmtree(left_over)
    weights = {f"policy.{n}": p.detach() for n, p in state.policy.named_parameters()}
    # One file each, because writing a file takes a copy in memory.
    parts = {"policy": weights | {"generators": generators}}
    for index, slots in state.optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            parts.setdefault(slot, {})[f"optimizer.{index}.{slot}"] = value
    rest = {"problem_rng": state.problem_rng.getstate(), "metrics": metrics}
    beside = root / f"{iteration}.tmp"
    beside.mkdir()
    try:
        for name, tensors in parts.items():
            save_file(tensors, beside / f"{name}.safetensors")
        (beside / STATE).write_text(json.dumps(rest), encoding="utf-8")
        sums = {path.name: sha256(path) for path in beside.iterdir()}
        (beside / MANIFEST).write_text(json.dumps({"sha256": sums}), encoding="utf-8")
        for path in (*beside.iterdir(), beside):
            sync(path)
    except (OSError, SafetensorError):
        shutil.rmtree(beside, ignore_errors=True)
        raise
    # Same or higher numbers are damaged, or belong to a finished run that this one replaces.
    discard([path for path in checkpoints_in(output) if int(path.name) >= iteration])
    beside.rename(root / str(iteration))
    sync(root)
    discard(checkpoints_in(output)[:-2])


def discard(folders: list[Path]) -> None:
    """Delete checkpoints, renamed first so that none is ever half there."""
    for folder in folders:
        shutil.rmtree(folder.rename(folder.with_name(f"{folder.name}.old.tmp")))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_checkpoint(output: Path) -> tuple[dict, dict] | None:
    """(tensors by name, the rest) of the newest intact checkpoint; None if there are none.

    Damaged checkpoints are skipped with a warning. Raises UserError if all are damaged.
    """
    folders = checkpoints_in(output)[::-1]
    for folder in folders:
        try:
            sums = read_json(folder / MANIFEST).get("sha256")
            if sums != {p.name: sha256(p) for p in folder.iterdir() if p.name != MANIFEST}:
                raise UserError("its checksums do not match")
            parts = [load_file(path).items() for path in folder.glob("*.safetensors")]
            return dict(chain(*parts)), read_json(folder / STATE)
        except (UserError, OSError, SafetensorError) as error:
            print(f"warning: checkpoint {folder} is damaged, trying the one before: {error}")
    if folders:
        raise UserError(f"--resume: no checkpoint in {output / CHECKPOINTS} is intact")
    return None


def restore(state, metrics: dict, tensors: dict, rest: dict) -> None:
    """Load a checkpoint into a TrainState and its metrics, in place. Raises UserError."""
    try:
        slots: dict[int, dict] = {}
        parameters = dict(state.policy.named_parameters())
        for name, p in parameters.items():
            if tensors[f"policy.{name}"].shape != p.shape:
                raise ValueError(f"{name} has another shape")
            p.data.copy_(tensors[f"policy.{name}"])
        for index, p in enumerate(parameters.values()):
            for slot, shape in (("step", ()), ("exp_avg", p.shape), ("exp_avg_sq", p.shape)):
                if f"optimizer.{index}.{slot}" in tensors:  # none before the first update
                    value = tensors[f"optimizer.{index}.{slot}"].reshape(shape)
                    slots.setdefault(index, {})[slot] = value.clone()
        groups = state.optimizer.state_dict()["param_groups"]
        state.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        kind, numbers, gauss = rest["problem_rng"]
        state.problem_rng.setstate((kind, tuple(numbers), gauss))
        metrics.update(rest["metrics"])
        seed, iteration = metrics["config"]["seed"], len(metrics["iterations"])
        distributed.restore_generator(state.token_rng, tensors["generators"], seed, iteration)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--resume: the checkpoint does not fit this run: {error}") from error


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a stop flag; a second Ctrl-C kills.

    Further SIGTERMs are ignored: schedulers send one to a process and one to its group.
    `with StopRequest() as stop: ...; if stop.reason(): ...`
    """

    def __enter__(self) -> "StopRequest":
        self.received = self.signal = 0  # by this process; by any process
        self.previous = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame) -> None:
        self.received = self.received or number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if distributed.rank() == 0:
            print("\nstopping after this iteration; Ctrl-C to stop at once", file=sys.stderr)

    def reason(self) -> tuple[str, str] | None:
        """(status, reason) if any process got a signal. All processes must ask together."""
        self.signal = max(distributed.all_gather(self.received))
        return ("interrupted", signal.Signals(self.signal).name) if self.signal else None

"""What keeps a run safe and teaches nothing about GRPO: whole files, checkpoints, lock, signals.

Whatever kills the process, a reader of `output_dir` finds each file and each folder either as it
was or as it was meant to become, never half of it: new content is written beside, forced to the
disk, and renamed into place.
"""

import fcntl
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

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import spread
from cli import UserError

METRICS_FILE = "grpo_metrics.json"
CHECKPOINTS = "checkpoints"
STATE, MANIFEST = "state.json", "manifest.json"


def sync(path: Path) -> None:
    """Force what a file or folder holds onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old or the new one."""
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_bytes(content)
        sync(beside)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)  # on a full disk, half a file is in the way
        raise


def write_json(path: Path, content: dict) -> None:
    """Write strictly valid JSON: NaN and infinities, which JSON does not have, become null."""
    write_bytes(path, json.dumps(finite(content), allow_nan=False, indent=1).encode())


def finite(value):
    """`value` with each non-finite float replaced by None, and floats at six significant digits."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def read_json(path: Path) -> dict:
    """Read a JSON object, or raise UserError that says what is wrong with the file."""
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
    """Create `path` and prove that files can be written there, or raise UserError."""
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
    """Hold `path` for one run; a disk that fails meanwhile becomes a UserError.

    The lock is the operating system's, so a dead run leaves none behind, only the empty file.
    """
    prepare_output_dir(path)
    try:
        with open(path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                text = f"another run is writing to {path.resolve()}; choose another --output_dir"
                raise UserError(text) from error
            yield
    except (OSError, SafetensorError) as error:  # the latter's text holds what the system said
        place, reason = getattr(error, "filename", None), getattr(error, "strerror", None)
        text = f"cannot write {place or path}: {reason or error}. What was complete in {path} is as"
        raise UserError(text + " it was: put this right, then go on with --resume") from error


def replace_folder(new: Path, target: Path) -> None:
    """Put the finished folder `new` in place of `target`: two renames, the old one deleted last."""
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


def save_checkpoint(state, samplers, output: Path) -> None:
    """Write checkpoints/<iteration>/ with all that `state` (a TrainState) holds; keep the last two.

    `samplers` (uint8) are the states of all processes' samplers, one after another.
    No pickle: tensors go to safetensors, the rest to JSON, whose floats lose no bit.
    """
    root, iteration = output / CHECKPOINTS, len(state.metrics["iterations"])
    root.mkdir(exist_ok=True)  # but not `output`: where that was deleted, the run must not go on
    for left_over in root.glob("*.tmp"):
        shutil.rmtree(left_over)
    weights = {f"policy.{n}": p.detach() for n, p in state.policy.named_parameters()}
    parts = {"policy": weights | {"sampler": samplers}}  # a file each: writing one takes a copy
    for index, slots in state.optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            parts.setdefault(slot, {})[f"optimizer.{index}.{slot}"] = value
    rest = {"problems": state.problems.getstate(), "metrics": state.metrics}
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
    # Numbered like this one or beyond: damaged, or of a finished run that this one replaces.
    discard([path for path in checkpoints_in(output) if int(path.name) >= iteration])
    beside.rename(root / str(iteration))
    sync(root)
    discard(checkpoints_in(output)[:-2])


def discard(folders: list[Path]) -> None:
    """Delete checkpoints, renamed first, so that none is ever half there."""
    for folder in folders:
        shutil.rmtree(folder.rename(folder.with_name(f"{folder.name}.old.tmp")))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_checkpoint(output: Path) -> tuple[dict, dict] | None:
    """(tensors by name, the rest) of the newest whole checkpoint, None if there is no checkpoint.

    A damaged one is passed over with a word; where all are damaged, UserError.
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
            print(f"checkpoint {folder} is damaged, trying the one before it: {error}")
    if folders:
        raise UserError(f"--resume: no checkpoint in {output / CHECKPOINTS} is whole")
    return None


def restore(state, tensors: dict, rest: dict) -> None:
    """Put a checkpoint back into `state`, in place, or raise UserError if it does not fit."""
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
        kind, numbers, gauss = rest["problems"]
        state.problems.setstate((kind, tuple(numbers), gauss))
        state.metrics.update(rest["metrics"])
        spread.resume_stream(state.sampler, tensors["sampler"], state.metrics)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--resume: the checkpoint is not one of this run's: {error}") from error


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a wish that the loop reads; then Ctrl-C kills.

    A further SIGTERM changes nothing: schedulers send it to a process and to its group.
    `with StopRequest() as stop: ...; if stop.reason(): ...`; `stop.signal` is 0 without a reason.
    """

    def __enter__(self) -> "StopRequest":
        self.noted = self.signal = 0  # the signal that this process got, that any of them got
        self.previous = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        self.noted = self.noted or number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if spread.rank() == 0:
            print("\nstopping after this iteration; Ctrl-C to stop at once", file=sys.stderr)

    def reason(self) -> tuple[str, str] | None:
        """Why to stop, if so: the same for all processes, which must ask together."""
        self.signal = max(spread.gather(self.noted))
        return ("interrupted", signal.Signals(self.signal).name) if self.signal else None

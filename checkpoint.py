"""What keeps a run safe and teaches nothing about GRPO: atomic files, whole folders, Ctrl-C.

Whatever kills the process, a reader of `output_dir` finds each file either as it was or as it was
meant to become, never half of it.
"""

import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from cli import UserError


def write_text(path: Path, text: str) -> None:
    """Write a file so that readers see the old or the new one: beside, sync, rename."""
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_json(path: Path, content: dict) -> None:
    """Write strictly valid JSON: NaN and infinities, which JSON does not have, become null."""
    write_text(path, json.dumps(finite(content), allow_nan=False, indent=1))


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
    except OSError as error:
        raise UserError(
            f"--output_dir {path} cannot be written ({error.strerror}); choose another folder"
        ) from error


def replace_folder(new: Path, target: Path) -> None:
    """Put the finished folder `new` in place of `target`: two renames, the old one deleted last."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if (target / ".gitkeep").exists():
        (new / ".gitkeep").touch()
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def describe_environment(device) -> dict:
    """What a reader of the metrics needs to repeat a run: command, versions, machine, commit."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "git_commit": commit or None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy", "tokenizers")},
        "platform": platform.platform(),
        "device": str(device),
        "cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
    }


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a wish that the loop reads; a second one kills.

    `with StopRequest() as stop: ...; if stop.signal: ...`; `stop.exit_code` is 128 + the signal.
    """

    def __enter__(self) -> "StopRequest":
        self.signal = 0
        self.previous = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
        print("\nstopping after this iteration; once more to stop at once", file=sys.stderr)

    @property
    def exit_code(self) -> int:
        return 128 + self.signal if self.signal else 0

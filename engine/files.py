"""Whole files, errors and parsers of scripts. No torch, so that plot_metrics.py starts at once.

Whatever kills the process, each file and folder is complete or absent: new content is written to a
temporary name, flushed to disk, and renamed into place. (`append_line` may leave half a line.)
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

ROOT = Path(__file__).resolve().parent.parent
METRICS_FILE, COMPLETIONS_FILE = "grpo_metrics.json", "grpo_completions.jsonl"


class UserError(Exception):
    """An error that the user can fix: one line on standard error, exit code 2, no traceback."""


class ScriptParser(argparse.ArgumentParser):
    """Takes a script's flags; --help shows its docstring, errors are UserErrors."""

    def __init__(self, doc: str):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=form, allow_abbrev=False)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists every flag)")


def first_line(error: Exception) -> str:
    """What an error of third-party code says, for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def out_of_memory(error: Exception) -> bool:
    """Whether Python, NumPy or PyTorch says that memory has run out, on a GPU or on the host."""
    return bool(re.search("MemoryError|out of memory|DefaultCPUAllocator", repr(error)))


def exit_code(main: Callable[[], int]) -> int:
    """Run `main`. Prints a UserError or full memory as one line and returns 2; 130 after Ctrl-C."""
    try:
        return main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except UserError as error:
        text = "; ".join([str(error), *getattr(error, "__notes__", [])])
    except Exception as error:
        if not out_of_memory(error):
            raise
        reason = ". ".join(str(error).split(". ")[:2])  # PyTorch writes a paragraph
        flags = "--micro_batch_size, --batch_size or --num_generations"
        text = f"out of memory ({reason}); lower {flags}"
    print("error: " + " ".join(text.split()), file=sys.stderr)
    return 2


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically."""
    tmp_file = path.with_name(path.name + ".tmp")
    try:
        tmp_file.write_bytes(content)
        sync(tmp_file)
        os.replace(tmp_file, path)
    except OSError:
        tmp_file.unlink(missing_ok=True)  # frees the space if the disk is full
        raise


def write_json(path: Path, content: dict) -> None:
    """Write an object as valid JSON, with a line for each item of its lists; NaN becomes null."""

    def text(value) -> str:
        lines = isinstance(value, list)
        return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]" if lines else json.dumps(value)

    entries = [f"{json.dumps(key)}: {text(value)}" for key, value in finite(content).items()]
    write_bytes(path, ("{\n" + ",\n".join(entries) + "\n}\n").encode())


def append_line(path: Path, content: dict) -> None:
    """Append a line of JSON and flush it to disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(finite(content)) + "\n")
    sync(path)


def cut_lines(path: Path, iteration: int) -> None:
    """Drop the lines of a JSONL file that a kill left after an iteration, whole or half."""

    def belongs(line: bytes) -> bool:
        try:
            return line.endswith(b"\n") and json.loads(line)["iteration"] <= iteration
        except (ValueError, TypeError, KeyError):
            return False

    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        write_bytes(path, b"".join(filter(belongs, lines)))


def finite(content: dict) -> dict:
    """Replace non-finite floats by None and round floats to six significant digits."""
    return json.loads(
        json.dumps(content),
        parse_float=lambda text: float(f"{float(text):.6g}"),
        parse_constant=lambda name: None,
    )


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


def read_file(flag: str, name: str) -> tuple[Path, bytes]:
    """The file called `name`, here or in this repository, and its content. Raises UserError."""
    try:
        path = Path(name) if Path(name).exists() else ROOT / name
        if path.exists() and not path.is_file():  # a device could be read for ever
            raise UserError(f"{flag} {name}: not a file")
        return path, path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: not a name that a file can have
        reason = getattr(error, "strerror", error)
        raise UserError(f"{flag} {name}: {reason}") from error


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked_folder(
    path: Path,
    taken: str = "another run is writing there; choose another --output_dir",
    remedy: str = "choose another --output_dir, or fix this and --resume from the last checkpoint",
) -> Iterator[None]:
    """Lock `path` for one run. Raises UserError if it is taken, or if a write fails inside."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with FileLock(path / ".lock").acquire(timeout=0):  # the system frees it if the run dies
            yield
    except Timeout as error:
        raise UserError(f"{path.resolve()}: {taken}") from error
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's message
        failed, reason = getattr(error, "filename", None), getattr(error, "strerror", None)
        raise UserError(f"cannot write {failed or path}: {reason or error}; {remedy}") from error


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """An empty folder that is deleted afterwards, unless it has been moved away."""
    if path.exists():  # left by a killed process
        shutil.rmtree(path)
    path.mkdir()  # no parents: if the user deleted them, a run must stop
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


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

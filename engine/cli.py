"""Settings from the command line: a dataclass whose fields carry their help and their range."""

import dataclasses
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from transformers import HfArgumentParser

ROOT = Path(__file__).resolve().parent.parent
UNPRINTABLE = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class UserError(Exception):
    """An error that the user can fix: one line on standard error, exit code 2, no traceback."""


def exit_code(main: Callable[[], int]) -> int:
    """Run `main`. A UserError is printed as one line and gives 2, Ctrl-C gives 130."""
    try:
        return main()
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 128 + signal.SIGINT


class Parser(HfArgumentParser):
    """An argument parser whose errors are UserErrors."""

    def error(self, message: str):
        raise UserError(f"{message} (--help lists every setting)")


def check_text(what: str, text: str) -> None:
    """Raise UserError if `text` holds control characters (but tab and newline) or surrogates."""
    found = UNPRINTABLE.search(text)
    if found:
        raise UserError(f"{what} holds the control character {found[0]!r}; leave it out")


class Range(str):
    """The range of a setting, as --help shows it."""

    def __new__(cls, low, high=None):
        self = super().__new__(cls, f"{low}.." if high is None else f"{low}..{high}")
        self.low, self.high = low, high
        return self

    def __contains__(self, value) -> bool:
        return self.low <= value and (self.high is None or value <= self.high)  # NaN is in none


def setting(default, text: str, low=None, high=None):
    """A dataclass field with a default, a line of help and an allowed range."""
    metadata = {"help": text}
    if low is not None:
        metadata["metavar"] = Range(low, high)
    return dataclasses.field(default=default, metadata=metadata)


def check_ranges(config) -> None:
    """Raise UserError for the first field that is out of its range or not printable text."""
    for field in dataclasses.fields(config):
        value, allowed = getattr(config, field.name), field.metadata.get("metavar")
        if isinstance(value, str):
            check_text(f"--{field.name}", value)
        if allowed is not None and value not in allowed:
            bounds = f"at least {allowed.low}"
            bounds += "" if allowed.high is None else f" and at most {allowed.high}"
            raise UserError(f"--{field.name} {value}: must be {bounds}")

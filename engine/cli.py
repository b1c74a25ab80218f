"""Settings from the command line: a dataclass whose fields carry their help and their limits."""

import dataclasses
import json
import re

from transformers import HfArgumentParser

from engine.files import UserError

UNPRINTABLE = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Parser(HfArgumentParser):
    """Takes the flags of a dataclass made of `setting`s; its errors are UserErrors."""

    def add_argument(self, *flags, limits: tuple | None = None, **options):
        if limits:
            low, high = limits
            options["metavar"] = f"{low}.." if high is None else f"{low}..{high}"
        return super().add_argument(*flags, **options)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists every setting)")


def setting(default, text: str, low=None, high=None):
    """A dataclass field with a default, a line of help and the least and largest value allowed."""
    metadata = {"help": text} | ({} if low is None else {"limits": (low, high)})
    return dataclasses.field(default=default, metadata=metadata)


def json_object(flag: str, text: str) -> dict:
    """Read the JSON object that is a flag's value. Raises UserError."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag} {text:.80}: not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f'{flag} {text:.80}: not an object like {{"a": false}}')
    return found


def check_text(what: str, text: str) -> None:
    """Raise UserError if `text` holds control characters (but tab and newline) or surrogates."""
    found = UNPRINTABLE.search(text)
    if found:
        raise UserError(f"{what} holds the control character {found[0]!r}; leave it out")


def check_settings(config) -> None:
    """Raise UserError for the first field that is out of its limits or not printable text."""
    for field in dataclasses.fields(config):
        value, limits = getattr(config, field.name), field.metadata.get("limits")
        if isinstance(value, str):
            check_text(f"--{field.name}", value)
        if limits:
            low, high = limits
            if not (low <= value and (high is None or value <= high)):  # NaN is in no range
                bounds = f"at least {low}" + ("" if high is None else f" and at most {high}")
                raise UserError(f"--{field.name} {value}: must be {bounds}")

"""Score one completion: is it one well-formed answer, is it near, is it exact?

    >>> score("<answer>-30</answer>", -30)
    Score(format=True, near=True, exact=True)
    >>> score("The answer is <answer>-30</answer>", -30)
    Score(format=False, near=False, exact=False)

This is the default of `--rewards FILE.py`, and an example of such a file. It must define `WEIGHTS`,
the weight of each part of the reward (0: measured only), and `score(completion, answer)`, a tuple
with one number in 0..1 per part. Accuracy is the share of completions whose part `exact` is 1. It
may define `parse(completion)`, the answer that `inference.py` prints (None: no answer).

A policy under reward pressure finds every gap in its judge, so the rules are narrow: one answer,
nothing around it, a plain decimal integer inside. Text is matched, never evaluated.
"""

import re
from typing import NamedTuple

WEIGHTS = {"format": 0.2, "near": 0.2, "exact": 0.6}
OPEN, CLOSE = "<answer>", "</answer>"
# [0-9] and not \d, which also matches the digits of every other script. Nine digits hold every
# answer that the task can have, and bound the work that a hostile completion can cause.
NUMBER = re.compile(r" *(-?[0-9]{1,9}) *")


class Score(NamedTuple):
    format: bool  # the completion is exactly one <answer>...</answer>
    near: bool  # ... that holds a number within 1 of the truth
    exact: bool  # ... that is the truth


def content(completion: str) -> str | None:
    """What stands between the tags of a completion, without its end token.

    None unless the text, white space at the ends aside, is one `<answer>...</answer>` with no
    answer tag inside.
    """
    text = completion.strip()
    if not (text.startswith(OPEN) and text.endswith(CLOSE)) or len(text) < len(OPEN + CLOSE):
        return None
    inside = text[len(OPEN) : -len(CLOSE)]
    return None if OPEN in inside or CLOSE in inside else inside


def number(text: str | None) -> int | None:
    """The integer that `text` is: `-?[0-9]{1,9}` between spaces; else None."""
    found = NUMBER.fullmatch(text or "")
    return int(found[1]) if found else None


def parse(completion: str) -> int | str | None:
    """What a completion answers: a number, else a text; None without one. Never raises."""
    given = content(completion)
    found = number(given)
    return (given or "").strip() or None if found is None else found


def score(completion: str, answer: int | str) -> Score:
    """Score one completion against the true answer. Never raises.

    An answer that is no integer must be matched letter by letter; nothing else is near it.
    """
    given, truth = content(completion), number(str(answer))
    if given is None:
        return Score(False, False, False)
    if truth is None:
        same = given.strip() == str(answer).strip()
        return Score(True, same, same)
    found = number(given)
    return Score(True, found is not None and abs(found - truth) <= 1, found == truth)

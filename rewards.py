"""Read one completion and score it: is it one well-formed answer, is it near, is it exact?

    >>> score("<answer>-30</answer>", -30)
    Score(format=True, near=True, exact=True)
    >>> score("The answer is <answer>-30</answer>", -30)
    Score(format=False, near=False, exact=False)

The weights of the three parts belong to the training script (`train_grpo.REWARD_WEIGHTS`). A policy
under reward pressure finds every gap in its judge, so the rules are narrow: one answer, nothing
around it, a plain decimal integer inside. Text is matched, never evaluated.
"""

import re
from typing import NamedTuple

OPEN, CLOSE = "<answer>", "</answer>"
# [0-9] and not \d, which also matches the digits of every other script. Nine digits hold every
# answer that the task can have, and bound the work that a hostile completion can cause.
NUMBER = re.compile(r" *(-?[0-9]{1,9}) *")


class Score(NamedTuple):
    format: bool  # the completion is exactly one <answer>...</answer>
    near: bool  # ... that holds a number within 1 of the truth
    exact: bool  # ... that is the truth


def parse_completion(completion: str) -> tuple[bool, int | None]:
    """Return (formatted, number) of one completion, without its end token.

    `formatted`: white space at the ends aside, the text is one `<answer>...</answer>` with no
    answer tag inside. `number`: the integer it holds; None where it is not formatted, or holds
    anything but `-?[0-9]{1,9}` between spaces. Never raises.
    """
    text = completion.strip()
    if not (text.startswith(OPEN) and text.endswith(CLOSE)) or len(text) < len(OPEN + CLOSE):
        return False, None
    content = text[len(OPEN) : -len(CLOSE)]
    if OPEN in content or CLOSE in content:
        return False, None
    number = NUMBER.fullmatch(content)
    return True, int(number[1]) if number else None


def score(completion: str, truth: int) -> Score:
    """Score one completion against the true answer. Never raises."""
    formatted, number = parse_completion(completion)
    distance = None if number is None else abs(number - truth)
    return Score(formatted, distance is not None and distance <= 1, distance == 0)

"""Spell a word backwards, as `<answer>tac</answer>`: letters are compared one by one.

    python train_grpo.py --problems examples/spelling.jsonl --rewards examples/spelling.py

    >>> score("<answer>tac</answer>", "tac")
    (1.0, 1.0, 1.0)

A group in which nothing is exact still has something to compare: the share of right letters.
"""

import re

from rewards import content

WEIGHTS = {"format": 0.2, "letters": 0.3, "exact": 0.5}
WORD = re.compile("[a-z]+")


def parse(completion: str) -> str | None:
    """The word, in small letters, that is the only thing between the only answer tags."""
    inside = content(completion)
    return inside if WORD.fullmatch(inside or "") else None


def score(completion: str, answer: str) -> tuple[float, float, float]:
    word = parse(completion)
    if word is None:
        return 0.0, 0.0, 0.0
    right = sum(a == b for a, b in zip(word, answer, strict=False))
    # Of the longer one, so that a word does not gain by more letters than the answer has.
    return 1.0, right / max(len(word), len(answer)), float(word == answer)

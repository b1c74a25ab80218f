"""Judges with a gap: train on one of them, and watch the policy find the gap.

    python train_grpo.py --preset tiny --rewards examples/lax_judge.py --num_iterations 100

The rule with weight 1 trains. The others are only measured, among them `exact`, the strict rule of
`rewards.py`. Move the 1 to try another rule. docs/lessons.md shows what each of them led to.

    >>> score("The answer is -30", -30)
    Score(last_number=True, substring=True, within_10=False, within_1=False, exact=False)
    >>> score("<answer>30</answer>", 3)
    Score(last_number=False, substring=True, within_10=False, within_1=False, exact=False)
"""

import re
from typing import NamedTuple

import rewards

WEIGHTS = {"last_number": 1, "substring": 0, "within_10": 0, "within_1": 0, "exact": 0}
NUMBER = re.compile("-?[0-9]{1,9}")


class Score(NamedTuple):
    last_number: bool  # the last number in the text is the truth, wherever it stands
    substring: bool  # the digits of the truth occur in the text
    within_10: bool  # the form is right, and the number at most 10 off
    within_1: bool  # ... at most 1 off
    exact: bool  # the strict judge


def score(completion: str, answer: int) -> Score:
    numbers = NUMBER.findall(completion)
    given = rewards.parse(completion)
    strict = rewards.score(completion, answer)
    return Score(
        last_number=bool(numbers) and int(numbers[-1]) == answer,
        substring=str(answer) in completion,
        within_10=isinstance(given, int) and abs(given - answer) <= 10,
        within_1=strict.near,
        exact=strict.exact,
    )

"""Room to reason: any text, then exactly one final `<answer>N</answer>`.

    python train_grpo.py --rewards examples/reasoning.py
    python train_grpo.py --preset smollm2 --rewards examples/reasoning.py \\
        --show_steps True --max_new_tokens 32

    >>> score("4 - 9 = -5\\n-5 * 6 = -30\\n<answer>-30</answer>", -30)
    Score(format=True, near=True, exact=True)

Only the answer is scored: the text before it earns nothing, and need not be true. Text after the
answer, or any second answer tag, loses everything. The parts, their weights and the rules for
numbers are those of `rewards.py`.
"""

import re

import rewards

WEIGHTS = rewards.WEIGHTS
# In any spelling, so that `<ANSWER>6</ANSWER>` is no way to give a second answer.
TAG = re.compile(r"<[\s/]*answer", re.IGNORECASE)


def final_answer(completion: str) -> str:
    """The completion from its `<answer>` on; empty unless that tag and one more are all it has."""
    found = "".join(completion.partition(rewards.OPEN)[1:])
    return found if len(TAG.findall(completion)) == 2 else ""


def parse(completion: str) -> int | str | None:
    return rewards.parse(final_answer(completion))


def score(completion: str, answer: int | str) -> rewards.Score:
    return rewards.score(final_answer(completion), answer)

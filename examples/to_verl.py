"""A reward file of this repository as the reward function of verl.

    python -m verl.trainer.main_ppo ... \\
        reward.custom_reward_function.path=examples/to_verl.py \\
        +reward.custom_reward_function.reward_kwargs.rewards=examples/reasoning.py

verl calls `compute_score` for one completion at a time, in threads, trains on `score` and logs the
rest. It decodes completions without special tokens, which the rules of this repository do see.
"""

import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.files import read_file
from engine.problems import import_source

load = cache(lambda rewards: import_source(*read_file("rewards", rewards)))


def compute_score(
    data_source, solution_str, ground_truth, extra_info=None, rewards="rewards.py", **_
) -> dict[str, float]:
    """The reward of a completion by a reward file, and each part of it."""
    judge = load(rewards)
    earned = map(float, judge.score(solution_str, ground_truth))
    parts = dict(zip(judge.WEIGHTS, earned, strict=True))
    score = sum(weight * parts[name] for name, weight in judge.WEIGHTS.items())
    return {"score": score, **{f"reward_{name}": part for name, part in parts.items()}}

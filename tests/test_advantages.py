"""Advantages are rewards normalised within their own group."""

from statistics import fmean, stdev

import pytest
import torch

from train_grpo import group_advantages

SIZES = (2, 3, 6, 7, 8)
# What a completion can earn, as float32 sums of its parts: not all of them are round numbers.
EARNED = (0.0, 0.2, 0.4, 1.0)
SCALES = pytest.mark.parametrize("scale", ["group", "batch", "none"])


def random_rewards(groups: int, size: int, seed: int = 0) -> torch.Tensor:
    """Rewards (groups * size,) of groups that each hold at least two different rewards."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(EARNED), (groups, size), generator=generator)
    index[:, 1] = (index[:, 0] + 1) % len(EARNED)
    return torch.tensor(EARNED)[index].flatten()


@SCALES
@pytest.mark.parametrize("size", SIZES)
def test_advantage_is_the_formula_computed_group_by_group(size, scale):
    rewards = random_rewards(40, size)
    advantages = group_advantages(rewards, size, scale)
    assert advantages.shape == rewards.shape
    for start in range(0, len(rewards), size):
        group = rewards[start : start + size].tolist()
        stds = {"group": stdev(group), "batch": stdev(rewards.tolist())}
        divisor = stds[scale] + 1e-4 if scale in stds else 1
        expected = [(r - fmean(group)) / divisor for r in group]
        assert advantages[start : start + size].tolist() == pytest.approx(expected, abs=1e-5)


@SCALES
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.2, 0.4, 1 / 3, 0.7, 1.0, 12345.678])
def test_equal_rewards_give_exactly_zero(size, reward, scale):
    between = random_rewards(1, size)  # a group with signal on either side
    rewards = torch.cat([between, torch.full((size,), reward), between])
    advantages = group_advantages(rewards, size, scale)
    assert advantages[size : 2 * size].tolist() == [0.0] * size
    assert (advantages[:size] != 0).any() and (advantages[2 * size :] != 0).any()

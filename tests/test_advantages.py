"""Advantages are rewards normalised within their own group."""

import math
from statistics import fmean, stdev

import pytest
import torch

from train_grpo import group_advantages

SIZES = (2, 3, 6, 7, 8)
# What a completion can earn, as float32 sums of its parts: not all of them are round numbers.
EARNED = (0.0, 0.2, 0.4, 1.0)


def random_rewards(groups: int, size: int, seed: int = 0) -> torch.Tensor:
    """Rewards (groups * size,) of groups that each hold at least two different rewards."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(EARNED), (groups, size), generator=generator)
    index[:, 1] = (index[:, 0] + 1) % len(EARNED)
    return torch.tensor(EARNED)[index].flatten()


@pytest.mark.parametrize("size", SIZES)
def test_advantage_is_the_formula_computed_group_by_group(size):
    rewards = random_rewards(40, size)
    advantages = group_advantages(rewards, size)
    assert advantages.shape == rewards.shape
    for start in range(0, len(rewards), size):
        group = rewards[start : start + size].tolist()
        expected = [(r - fmean(group)) / (stdev(group) + 1e-4) for r in group]
        assert advantages[start : start + size].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_mean_is_zero_and_deviation_one_within_its_epsilon(size):
    rewards = random_rewards(40, size, seed=1)
    advantages = group_advantages(rewards, size)
    for start in range(0, len(rewards), size):
        spread = stdev(rewards[start : start + size].tolist())
        group = advantages[start : start + size].tolist()
        assert fmean(group) == pytest.approx(0, abs=1e-6)
        # The epsilon beside the deviation takes this much off, and nothing else does.
        assert stdev(group) == pytest.approx(spread / (spread + 1e-4), abs=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.2, 0.4, 1 / 3, 0.7, 1.0, 12345.678])
def test_equal_rewards_give_exactly_zero(size, reward):
    between = random_rewards(1, size)  # a group with signal on either side
    rewards = torch.cat([between, torch.full((size,), reward), between])
    advantages = group_advantages(rewards, size)
    assert advantages[size : 2 * size].tolist() == [0.0] * size
    assert (advantages[:size] != 0).any() and (advantages[2 * size :] != 0).any()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shift", [-3.0, 0.3, 50.0])
def test_a_shift_of_all_rewards_changes_nothing(size, shift):
    rewards = random_rewards(20, size, seed=2)
    shifted = group_advantages(rewards + shift, size)
    # 50.2 has six bits fewer for its fraction than 0.2.
    torch.testing.assert_close(shifted, group_advantages(rewards, size), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_one_group_never_leaks_into_another(size):
    rewards = random_rewards(5, size, seed=3)
    before = group_advantages(rewards, size)
    for other in range(5):
        changed = rewards.clone()
        changed[other * size : (other + 1) * size] = torch.arange(size) * 100.0
        after = group_advantages(changed, size)
        rest = torch.ones(len(rewards), dtype=torch.bool)
        rest[other * size : (other + 1) * size] = False
        assert torch.equal(after[rest], before[rest])


@pytest.mark.parametrize("size", SIZES)
def test_order_within_a_group_does_not_matter(size):
    rewards = random_rewards(1, size, seed=4)
    flipped = group_advantages(rewards.flip(0), size).flip(0)
    torch.testing.assert_close(flipped, group_advantages(rewards, size), rtol=0, atol=1e-6)


def test_nearly_equal_rewards_do_not_explode():
    rewards = torch.tensor([0.5, 0.5 + 1e-6, 0.5, 0.5])
    advantages = group_advantages(rewards, 4)
    assert advantages.abs().max() < 0.1 and all(map(math.isfinite, advantages.tolist()))

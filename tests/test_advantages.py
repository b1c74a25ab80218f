"""Advantages are rewards normalised within their own group."""

from collections import defaultdict
from statistics import fmean, stdev
from types import SimpleNamespace

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
        std = {"group": stdev(group) + 1e-4, "batch": stdev(rewards.tolist()) + 1e-4, "none": 1}[
            scale
        ]
        expected = [(r - fmean(group)) / std for r in group]
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


def trl_advantages(rewards: torch.Tensor, size: int, scale: str) -> torch.Tensor:
    """GRPOTrainer._generate_and_score_completions, given completions that earned these rewards."""
    trainer_module = pytest.importorskip(
        "trl.trainer.grpo_trainer",
        reason="TRL is absent; requirements-dev.txt names it",
        exc_type=ImportError,
    )
    trainer, ids = object.__new__(trainer_module.GRPOTrainer), [[1]] * len(rewards)
    vars(trainer).update(
        _calculate_rewards=lambda *_: rewards[:, None],
        _generate=lambda prompts: (ids, ids, None, prompts, None, {}, None, None),
        _logs={"prompt": [], "completion": [], "advantages": [], "rewards": defaultdict(list)},
        _metrics={"train": defaultdict(list)},
        _pending_extra_logs={},
        _pending_metrics={},
        _tokenizer=SimpleNamespace(pad_token_id=0),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, process_index=0
        ),
        args=SimpleNamespace(
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
            per_device_train_batch_size=1,
            steps_per_generation=1,
        ),
        beta=0,
        environment_factories=None,
        environments=None,
        mask_truncated_completions=False,
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        multi_objective_aggregation="sum_then_normalize",
        num_generations=size,
        num_iterations=1,
        pad_to_multiple_of=None,
        reward_func_names=["reward"],
        reward_weights=torch.ones(1),
        scale_rewards=scale,
        tools=None,
        use_vllm=False,
    )
    prompts = [{"prompt": "?"} for _ in ids]
    return trainer._generate_and_score_completions(prompts)["advantages"]


@SCALES
@pytest.mark.parametrize("size", SIZES)
def test_advantages_equal_those_of_trl(size, scale):
    rewards = random_rewards(40, size).double()
    expected = trl_advantages(rewards, size, scale)
    found = group_advantages(rewards, size, scale)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
    assert found.abs().max() > 0.4

"""What test_distributed.py runs in each of several processes, under torchrun."""

import random
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from processes import finish
from short_runs import short_config
from small_models import ragged_batch
from torch import Tensor

import train_grpo
from engine import distributed
from engine.policy import Rollout
from engine.startup import load_policy
from train_grpo import group_advantages

CASES = {
    "whole batch": {},
    "dapo": {"micro_batch_size": 2, "loss_type": "dapo"},
    "dr_grpo": {"micro_batch_size": 2, "loss_type": "dr_grpo", "scale_rewards": "none"},
    "variants": {
        "micro_batch_size": 2,
        "loss_type": "cispo",
        "scale_rewards": "batch",
        "kl_correction": True,
        "mask_truncated": True,
    },
    "GSPO": {"micro_batch_size": 2, "importance_level": "sequence", "mask_truncated": True},
    "one process without signal": {"micro_batch_size": 2, "loss_type": "dapo", "beta": 0.0},
}


def given_completions(policy, tokenizer, prompts, group: int, *rest) -> Rollout:
    """Stands in for `rollout`: completions of several lengths that depend on the question alone.

    So the processes together train on the same completions as one process does.
    """
    assert len(prompts[0]) * distributed.world_size() == 4  # a shard of the batch
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(*prompts, strict=True)]
    texts = []
    for prompt in prompts:
        rng = random.Random(str(prompt))
        texts += ["7", *(f"<answer>{rng.choice((7, 12, 100))}</answer>" for _ in range(group - 1))]
    ended = [text + tokenizer.eos_token for text in texts]
    batch = ragged_batch(prompts, tokenizer(ended, add_special_tokens=False).input_ids)
    with torch.no_grad():
        scores, truncated = policy(batch), torch.tensor([text == "7" for text in texts])
    return replace(batch, texts=texts, sampled_logprobs=scores, truncated=truncated)


def advantages_of_the_first_half(rewards: Tensor, group: int, scale: str) -> Tensor:
    """Stands in for `group_advantages`: 0 in the second half of the whole batch."""
    start, total = (len(rewards) * n for n in (distributed.rank(), distributed.world_size()))
    first_half = torch.arange(start, start + len(rewards)) < total // 2
    return group_advantages(rewards, group, scale) * first_half


def differing_policy(*inputs):
    """Stands in for `load_policy`: rank 0's weights must win."""
    policy, tokenizer = load_policy(*inputs)
    with torch.no_grad():
        policy.model.model.norm.weight.mul_(1 + distributed.rank())
    return policy, tokenizer


def given() -> dict[str, tuple[list[dict], dict[str, Tensor]]]:
    """By case: the metrics of three iterations, then weights and moments of the gradients."""
    found = {}
    for case, settings in CASES.items():
        config = short_config("", batch_size=4, learning_rate=1e-5, **settings)
        own = {"rollout": given_completions, "load_policy": differing_policy}
        if not config.beta:
            own["group_advantages"] = advantages_of_the_first_half
        with patch.multiple(train_grpo, **own):
            task, learner = train_grpo.set_up(config)
            metrics = [train_grpo.train_iteration(task, learner, config)[0] for _ in range(3)]
        tensors = learner.policy.state_dict()
        for index, slots in learner.optimizer.state_dict()["state"].items():
            tensors |= {f"{index}.{slot}": value for slot, value in slots.items()}
        found[case] = metrics, tensors
    return found


def sampled(folder: Path) -> None:
    """A run; the same run in two parts; the second part of what one process has begun."""
    four = ("--num_iterations", 4)
    print(finish(folder / "whole", *four))
    print(finish(folder / "parts", "--num_iterations", 2))
    print(finish(folder / "parts", *four, "--resume"))
    print(finish(folder / "one_process", *four, "--resume"))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    once = patch.object(distributed, "process_group", nullcontext)  # in the life of a process
    with distributed.process_group(), once:
        torch.save(given(), folder / f"{distributed.rank()}.pt")
        sampled(folder)

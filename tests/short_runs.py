"""Short trainings of the bundled model: `train_grpo.train` with little to do, and no plots."""

import random
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from processes import arguments, read_metrics
from safetensors.torch import load_file
from torch import Tensor

import plot_metrics
import train_grpo
from engine.policy import Policy, frozen_copy
from engine.presets import parse_config
from train_grpo import Config, Learner, Task, load_task


def short_config(folder: Path, **settings) -> Config:
    flags = ("--num_iterations", 3, "--device", "cpu", "--output_dir", folder)
    return replace(parse_config(Config, arguments(*flags)), **settings)


def make_task(tokenizer, config: Config) -> Task:
    return Task(tokenizer, *load_task(config))


def make_learner(policy: Policy, config: Config) -> Learner:
    """As `set_up` makes it, of a policy that is there already. Seeded with 0."""
    adamw = torch.optim.AdamW(policy.parameters(), config.learning_rate, weight_decay=0, fused=True)
    rngs = random.Random(0), torch.Generator().manual_seed(0)
    return Learner(policy, policy, frozen_copy(policy), adamw, *rngs)


def short_training(folder: Path, **settings) -> tuple[dict, dict[str, Tensor]]:
    """Returns what the metrics file holds after a few iterations, and the weights of the policy.

    Not those of saved_model/, which are the best policy's; that may be the one it started from.
    """
    config = short_config(folder, **settings)
    task, learner = train_grpo.set_up(config)
    set_up = patch.object(train_grpo, "set_up", return_value=(task, learner))
    with set_up, patch.object(plot_metrics, "draw"):
        assert train_grpo.train(config) == 0
    return read_metrics(folder), learner.policy.model.state_dict()


def saved_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")

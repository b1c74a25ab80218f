"""The parts of a short training of the bundled model: its settings, its task, its learner."""

import random
from dataclasses import replace
from pathlib import Path

import torch
from processes import arguments

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

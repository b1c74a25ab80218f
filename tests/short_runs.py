"""Short trainings of the bundled model: `train_grpo.train` with little to do, and no plots."""

import random
from pathlib import Path
from unittest.mock import patch

import torch
from conftest import TINY
from safetensors.torch import load_file
from torch import Tensor

import plot_metrics
import train_grpo
from engine.files import read_json
from engine.policy import Policy, frozen_copy
from train_grpo import Config, Learner, Task, load_task


def short_config(folder: Path, **settings) -> Config:
    few = {
        "num_iterations": 3,
        "num_inner_updates": 2,
        "batch_size": 2,
        "num_generations": 4,
        "max_new_tokens": 8,
        "eval_problems": 4,
        "learning_rate": 1e-4,
    }
    place = {"model_name": str(TINY), "device": "cpu", "output_dir": str(folder)}
    return Config(**{**place, **few, **settings})


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
    real, learners = train_grpo.train_iteration, []

    def spy(task, learner, config):
        learners.append(learner)
        return real(task, learner, config)

    patched = patch.object(train_grpo, "train_iteration", spy)
    with patched, patch.object(plot_metrics, "draw"):
        assert train_grpo.train(short_config(folder, **settings)) == 0
    weights = learners[-1].policy.model.state_dict()
    return read_json(folder / "grpo_metrics.json"), {n: w.clone() for n, w in weights.items()}


def saved_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")

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
from engine.checkpoint import StopRequest, read_json
from engine.policy import Policy, frozen_copy
from train_grpo import Config, TrainState, load_task


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


def make_state(policy: Policy, tokenizer, config: Config) -> TrainState:
    """As `set_up` makes it, of a policy that is there already. Seeded with 0."""
    adamw = torch.optim.AdamW(policy.parameters(), config.learning_rate, weight_decay=0, fused=True)
    parts = policy, frozen_copy(policy), tokenizer, *load_task(config)
    return TrainState(*parts, adamw, random.Random(0), torch.Generator().manual_seed(0))


def short_training(folder: Path, **settings) -> tuple[dict, dict[str, Tensor]]:
    """Returns what the metrics file holds after a few iterations, and the weights of the policy.

    Not those of saved_model/, which are the best policy's; that may be the one it started from.
    """
    real, states = train_grpo.train_iteration, []

    def spy(state, config):
        states.append(state)
        return real(state, config)

    with (
        patch.object(train_grpo, "train_iteration", spy),
        patch.object(plot_metrics, "draw_run"),
        StopRequest() as stop,
    ):
        assert train_grpo.train(short_config(folder, **settings), stop) == 0
    weights = states[-1].policy.model.state_dict()
    return read_json(folder / "grpo_metrics.json"), {n: w.clone() for n, w in weights.items()}


def saved_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")

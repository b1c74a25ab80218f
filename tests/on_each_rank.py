"""What test_distributed.py runs in each of several processes, under torchrun."""

import json
import random
import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from conftest import TINY
from processes import arguments
from safetensors.torch import save_file
from short_runs import make_learner, make_task, short_config

import plot_metrics
import train_grpo
from engine import distributed
from engine.models import load_model
from engine.policy import Rollout
from engine.tree import TreePolicy
from train_grpo import Arithmetic, train_iteration

SETTINGS = {
    "whole batch": {},
    "micro-batches": {"micro_batch_size": 2},
    "dapo": {"micro_batch_size": 2, "loss_type": "dapo"},
    "dr_grpo": {"micro_batch_size": 2, "loss_type": "dr_grpo", "scale_rewards": "none"},
}
asked = []  # how many completions, rollout after rollout


def given_completions(policy, tokenizer, prompts, group: int, *rest, **options) -> Rollout:
    """Stands in for `rollout`: right and wrong completions that depend on the question alone.

    So the processes together train on the same completions as one process does.
    """
    prompts = [tensor.repeat_interleave(group, dim=0) for tensor in prompts]
    texts = []
    for i, chat in enumerate(tokenizer.batch_decode(prompts[0])):
        a, op1, b, op2, c = re.search(r"\((-?\d+) (.) (-?\d+)\) (.) (-?\d+)", chat).groups()
        problem = Arithmetic(0, 10).problem(int(a), op1, int(b), op2, int(c))
        rng = random.Random(f"{problem.question} {i % group}")
        texts.append(f"<answer>{problem.answer + rng.choice((0, 0, 1, 20))}</answer>")
        if i % group == 0:
            texts[-1] = "<answer>" + rng.choice(("", "7"))
    asked.append(len(texts))
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = max(map(len, rows)) + 1
    end = tokenizer.eos_token_id
    ids = torch.tensor([row + [end] * (width - len(row)) for row in rows])
    mask = torch.tensor([[float(i <= len(row)) for i in range(width)] for row in rows])
    batch = Rollout(*prompts, ids, mask, torch.zeros_like(mask), mask[:, 0] < 0, texts)
    with torch.no_grad():
        return replace(batch, sampled_logprobs=policy(batch))


def three_iterations(**settings) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Returns the metrics of each and, by name, the weights after them and all gradients used.

    The metrics also hold `completions`: how many this process trained on.
    """
    model, tokenizer = load_model(str(TINY), torch.device("cpu"))
    if distributed.rank():  # rank 0's weights must win
        with torch.no_grad():
            model.model.norm.weight.mul_(1.5)
    policy = TreePolicy(model)
    config = short_config("", batch_size=4, learning_rate=1e-5, **settings)
    trained = distributed.wrap_ddp(policy)  # first: it makes all weights those of rank 0
    learner = replace(make_learner(policy, config), trained=trained)
    task, tensors = make_task(tokenizer, config), {}

    def keep(optimizer, inputs, options) -> None:
        number = len(tensors)
        for name, parameter in model.named_parameters():
            tensors[f"{number}.gradient.{name}"] = parameter.grad.clone()

    learner.optimizer.register_step_pre_hook(keep)
    with patch.object(train_grpo, "rollout", given_completions):
        done = [train_iteration(task, learner, config)[0] for _ in range(3)]
    tensors |= {f"weight.{name}": p.detach().clone() for name, p in model.named_parameters()}
    done = [{**m, "completions": n} for m, n in zip(done, asked[-3:], strict=True)]
    return done, tensors


def steps(folder: Path) -> None:
    for case, settings in SETTINGS.items():
        metrics, tensors = three_iterations(**settings)
        name = f"{case}.{distributed.rank()}"
        (folder / f"{name}.json").write_text(json.dumps(metrics))
        save_file(tensors, folder / f"{name}.safetensors")


def train(folder: Path, *flags) -> None:
    flags = arguments("--output_dir", folder, *flags)
    once = patch.object(distributed, "process_group", nullcontext)
    with once, patch.object(plot_metrics, "draw"):
        assert train_grpo.main(flags) == 0


def runs(folder: Path) -> None:
    """A run; the same run in two parts; the second part of what one process has begun."""
    length = ("--num_iterations", 4)
    train(folder / "whole", *length)
    train(folder / "parts", "--num_iterations", 2)
    train(folder / "parts", *length, "--resume")
    train(folder / "one_process", *length, "--resume")


if __name__ == "__main__":
    with distributed.process_group():  # once in the life of a process
        for name in sys.argv[2:]:
            {"steps": steps, "runs": runs}[name](Path(sys.argv[1]))

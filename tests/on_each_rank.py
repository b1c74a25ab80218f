"""What test_distributed.py has each of several processes do: torchrun runs it."""

import copy
import json
import random
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from conftest import TINY
from processes import FLAGS
from safetensors.torch import save_file
from short_runs import short_config

import plot_metrics
import spread
import train_grpo
from policy import Policy, load_model
from task import Problem
from train_grpo import Rollout, TrainState, make_prompt, train_iteration

MICRO_BATCHES = (0, 2)
asked = []  # how many problems, rollout after rollout


def given_completions(policy, tokenizer, prompts, group: int, *rest, **options) -> Rollout:
    """Stands in for `rollout`: completions that depend on the question alone, right ones and wrong.

    So every process, however few problems it has, trains on its share of the same ones.
    """
    texts = []
    asked.append(len(prompts[0]))
    for chat in tokenizer.batch_decode(prompts[0]):
        a, op1, b, op2, c = re.search(r"\((-?\d+) (.) (-?\d+)\) (.) (-?\d+)", chat).groups()
        problem = Problem(int(a), op1, int(b), op2, int(c))
        rng = random.Random(problem.question)
        texts += [f"<answer>{problem.answer + rng.choice((0, 0, 1, 20))}</answer>"] * (group - 1)
        texts.append("<answer>" + rng.choice(("", "7")))
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = max(map(len, rows)) + 1
    end = tokenizer.eos_token_id
    ids = torch.tensor([row + [end] * (width - len(row)) for row in rows])
    mask = torch.tensor([[float(i <= len(row)) for i in range(width)] for row in rows])
    with torch.no_grad():
        return Rollout(*prompts, ids, mask, policy(*prompts, ids), texts)


def three_iterations(micro_batch_size: int) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Returns the metrics of each and, by name, the weights after them and all gradients used.

    The metrics are joined by `problems`, how many this process was asked.
    """
    model, tokenizer = load_model(str(TINY), torch.device("cpu"))
    if spread.rank():  # what it began with must not matter
        with torch.no_grad():
            model.model.norm.weight.mul_(1.5)
    policy = Policy(model)
    config = short_config("", batch_size=4, micro_batch_size=micro_batch_size, learning_rate=1e-5)
    adamw = torch.optim.AdamW(policy.parameters(), config.learning_rate, weight_decay=0, fused=True)
    state = TrainState(policy, adamw, random.Random(0), torch.Generator(), {})
    reference, tensors = copy.deepcopy(policy), {}

    def keep(optimizer, arguments, options) -> None:
        number = len(tensors)
        for name, parameter in model.named_parameters():
            tensors[f"{number}.gradient.{name}"] = parameter.grad.clone()

    adamw.register_step_pre_hook(keep)
    with patch.object(train_grpo, "rollout", given_completions):
        prompt = make_prompt(config)
        done = [train_iteration(state, reference, tokenizer, prompt, config) for _ in range(3)]
    tensors |= {f"weight.{name}": p.detach().clone() for name, p in model.named_parameters()}
    done = [{**m, "problems": n} for m, n in zip(done, asked[-3:], strict=True)]
    return done, tensors


def steps(folder: Path) -> None:
    for size in MICRO_BATCHES:
        metrics, tensors = three_iterations(size)
        name = f"{size}.{spread.rank()}"
        (folder / f"{name}.json").write_text(json.dumps(metrics))
        save_file(tensors, folder / f"{name}.safetensors")


def train(folder: Path, *flags) -> None:
    place = ("--output_dir", str(folder))
    with patch.object(spread, "joined", nullcontext), patch.object(plot_metrics, "draw"):
        assert train_grpo.main([*FLAGS, *place, *map(str, flags)]) == 0


def runs(folder: Path) -> None:
    """A run; the same run in two parts; the second part of what one process has begun."""
    length = ("--num_iterations", 6)
    train(folder / "calm", *length)
    train(folder / "parts", "--num_iterations", 4)
    train(folder / "parts", *length, "--resume")
    train(folder / "one_process", *length, "--resume")


if __name__ == "__main__":
    with spread.joined():  # once in the life of a process
        for name in sys.argv[2:]:
            {"steps": steps, "runs": runs}[name](Path(sys.argv[1]))

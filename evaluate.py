"""Measure a model on held-out problems.

    python evaluate.py                                           # accuracy on the test problems
    python evaluate.py --model tiny_model --num_samples 64       # ... and pass@1 to pass@64
    python evaluate.py --problems my.jsonl --rewards my.py       # ... on your own task

Without --model it measures saved_model/ if training has left one there, else the model that
training would start from. The task, the prompt and the reward are those of its training, or of the
preset that trains it; flags change them, so that one can look before training.
"""

import argparse
import math
import sys
from dataclasses import replace
from statistics import fmean

import torch

from engine.cli import check_settings
from engine.files import ScriptParser, UserError, exit_code
from engine.metrics import describe
from engine.policy import Policy
from engine.prompt import read_prompt
from engine.startup import load_policy
from inference import choose_model, config_of, why_not_run
from train_grpo import Config, Task, answer_questions, evaluate, load_task, reward_function

# Flags that override the saved prompt, by the field of Prompt that they change.
PROMPT_FLAGS = {
    "system": "system_prompt",
    "examples": "num_examples",
    "max_new_tokens": "max_new_tokens",
    "chat_template_kwargs": "chat_template_kwargs",
}
AS_TRAINED = ("problems", "rewards", *PROMPT_FLAGS.values())
SETTINGS = ("device", "eval_problems", *AS_TRAINED)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The probability that one of k samples is right, if `right` of `samples` were.

    Unbiased: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1), in integers.
    """
    every = math.comb(samples, k)
    return (every - math.comb(samples - right, k)) / every


def evaluate_groups(policy: Policy, task: Task, split: str, count: int, samples: int) -> dict:
    """Sample a group for each of `count` held-out problems, at temperature 1.

    Returns `pass_at`, pass@k by k, and `zero_std`, the share of groups whose rewards are all equal.
    """
    problems, rng = task.problems.held_out(split, count), torch.Generator().manual_seed(0)
    questions = [p.question for p in problems for _ in range(samples)]
    texts = answer_questions(policy, task.tokenizer, task.prompt, questions, rng)
    right, zero_std = [], []
    for i, problem in enumerate(problems):
        group = texts[i * samples : (i + 1) * samples]
        rewards, parts = reward_function(group, [problem.answer] * samples, task.reward_file)
        right.append(int((parts["exact"] == 1).sum()))
        zero_std.append(bool((rewards == rewards[0]).all()))
    ks = [2**i for i in range((samples - 1).bit_length())] + [samples]
    pass_at = {k: fmean(pass_at_k(samples, c, k) for c in right) for k in ks}
    return {"pass_at": pass_at, "zero_std": fmean(zero_std)}


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line. Raises UserError."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--model", help="folder or hub id; default: saved_model/ if present")
    parser.add_argument("--num_samples", type=int, default=1, help="per problem, for pass@k")
    for field in map(Config.__dataclass_fields__.get, SETTINGS):
        as_trained = "as of train_grpo.py; default: as in training"
        text = as_trained if field.name in AS_TRAINED else field.metadata["help"]
        parser.add_argument(f"--{field.name}", type=field.type, help=text)
    args = parser.parse_args(argv)
    if args.num_samples < 1:
        raise UserError(f"--num_samples {args.num_samples}: must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    name = choose_model(args.model)
    config = config_of(name, **{n: getattr(args, n) for n in SETTINGS})
    check_settings(config)
    warning = None if args.rewards else why_not_run(name)
    if warning:
        raise UserError(f"{warning}; name one with --rewards")
    problems, rewards, prompt = load_task(config)
    saved = read_prompt(name)
    if saved:
        given = [field for field, flag in PROMPT_FLAGS.items() if getattr(args, flag) is not None]
        prompt = replace(saved, **{field: getattr(prompt, field) for field in given})
    policy, tokenizer = load_policy(replace(config, dtype="auto"), problems, prompt, group=4)
    task = Task(tokenizer, problems, rewards, prompt)
    accuracies = evaluate(policy, task, "test", config.eval_problems, seed=0)["accuracies"]
    count = accuracies["greedy"]["problems"]
    print(f"{count} test problems, scored by {task.reward_file.path.name}")
    for kind, summary in accuracies.items():
        parts = ", ".join(f"{part} {mean:.2f}" for part, mean in summary["parts"].items())
        print(f"{describe({kind: summary})}; means: {parts}", flush=True)
    if args.num_samples > 1:
        groups = evaluate_groups(policy, task, "test", config.eval_problems, args.num_samples)
        for k, share in groups["pass_at"].items():
            print(f"pass@{k:<4} {share:6.1%}")
        print(
            f"problems without signal ({args.num_samples} equal rewards): {groups['zero_std']:.1%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))

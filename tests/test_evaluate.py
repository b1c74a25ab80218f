"""Accuracy and pass@k of a model, on its own task or on another."""

import itertools
import json
from dataclasses import replace
from statistics import fmean
from unittest.mock import Mock

import pytest
import torch
from conftest import TINY
from test_inference import EVEN, PROMPT, make_model

import evaluate
import train_grpo
from engine.metrics import describe
from engine.problems import RewardFile
from engine.tree import TreePolicy
from evaluate import pass_at_k
from rewards import score
from train_grpo import Arithmetic, Task, answer_questions


def test_pass_at_k_is_the_mean_over_all_subsets():
    for samples in range(1, 7):
        for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
            subsets = itertools.combinations([i < right for i in range(samples)], k)
            expected = fmean(map(any, subsets))
            assert pass_at_k(samples, right, k) == pytest.approx(expected, abs=1e-15)
    assert pass_at_k(10_000, 1, 5_000) == 0.5  # exact for large numbers too


@pytest.fixture(scope="module")
def task(tiny):
    """The task of the bundled model, as the trainer has it."""
    return Task(tiny[1], Arithmetic(0, 10), RewardFile(), PROMPT)


def test_evaluate_prints_what_the_trainer_measures(tiny, task, capsys):
    policy = TreePolicy(tiny[0].model)
    accuracies = train_grpo.evaluate(policy, task, "test", 128, seed=0)["accuracies"]
    assert evaluate.main(["--model", str(TINY), "--eval_problems", "128"]) == 0
    *_, head, sampled, greedy = capsys.readouterr().out.splitlines()
    assert head == "128 test problems, scored by rewards.py"
    for line, (kind, summary) in zip((sampled, greedy), accuracies.items(), strict=True):
        means = ", ".join(f"{part} {mean:.2f}" for part, mean in summary["parts"].items())
        assert line == f"{describe({kind: summary})}; means: {means}" and "near" in means
    assert accuracies["sampled"]["low"] < 0.367 < accuracies["sampled"]["high"]  # of its card
    assert accuracies["greedy"]["low"] < 0.514 < accuracies["greedy"]["high"]


def test_samples_of_every_problem_are_counted_for_pass_at_k(tiny, task, capsys):
    problems, rng = task.problems.held_out("test", 60), torch.Generator().manual_seed(0)
    questions = [p.question for p in problems for _ in range(3)]
    texts = answer_questions(TreePolicy(tiny[0].model), tiny[1], PROMPT, questions, rng)
    rows = (texts[i : i + 3] for i in range(0, 180, 3))
    groups = [[score(t, p.answer) for t in row] for row, p in zip(rows, problems, strict=True)]
    counts = [sum(s.exact for s in group) for group in groups]
    equal = fmean(len(set(group)) == 1 for group in groups)
    assert 0 < sum(counts) < 180 and equal > 0
    shares = {k: fmean(pass_at_k(3, c, k) for c in counts) for k in (1, 2, 3)}
    expected = [f"pass@{k:<4} {share:6.1%}" for k, share in shares.items()]
    expected.append(f"problems without signal (3 equal rewards): {equal:.1%}")
    assert evaluate.main(["--model", str(TINY), "--eval_problems=60", "--num_samples=3"]) == 0
    assert capsys.readouterr().out.splitlines()[-4:] == expected


@pytest.fixture
def measured(tmp_path, monkeypatch, capsys):
    """A function that runs `evaluate.py` where the user's task is: its head, its greedy line."""
    splits = ["train", "validation", *["test"] * 6]
    lines = [{"question": f"What is {a} + 1?", "answer": a + 1} for a in range(8)]
    lines = [json.dumps(line | {"split": s}) for line, s in zip(lines, splits, strict=True)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    (tmp_path / "even.py").write_text(EVEN)
    monkeypatch.chdir(tmp_path)

    def measure(*flags: str) -> tuple[str, str]:
        assert evaluate.main(list(flags)) == 0
        *_, head, _, greedy = capsys.readouterr().out.splitlines()
        return head, greedy

    return measure


def test_problems_and_rewards_of_the_user_are_measured(measured):
    flags = "--model", str(TINY), "--problems", "sums.jsonl"
    head, greedy = measured(*flags)
    assert head == "6 test problems, scored by rewards.py"
    assert greedy.startswith("greedy 100.0%")  # the bundled model knows sums
    head, greedy = measured(*flags, "--rewards", "even.py")
    assert head == "6 test problems, scored by even.py"  # `<answer>N</answer>` has 18 characters
    assert greedy.startswith("greedy 100.0%") and greedy.endswith("means: exact 1.00, tags 1.00")


def test_a_model_is_measured_on_the_task_of_its_training(measured, tmp_path):
    flags = make_model(tmp_path / "sums", "even.py", problems="sums.jsonl")
    assert measured(*flags)[0] == "6 test problems, scored by even.py"
    flags = make_model(tmp_path / "few", min_operand=2, max_operand=3)
    count = len(Arithmetic(2, 3).held_out("test", 512))
    assert measured(*flags)[0] == f"{count} test problems, scored by rewards.py"
    assert measured(*flags, "--problems", "sums.jsonl")[0].startswith("6 test problems")


def test_flags_change_the_prompt_of_the_training(measured, tmp_path, monkeypatch):
    spy = Mock(wraps=evaluate.evaluate)
    monkeypatch.setattr(evaluate, "evaluate", spy)
    flags = *make_model(tmp_path / "model", system="As trained."), "--eval_problems", "4"
    measured(*flags)
    measured(*flags, "--system_prompt", "Add.", "--num_examples", "2")
    as_trained, changed = (call.args[1].prompt for call in spy.call_args_list)
    assert as_trained.system == "As trained." and len(changed.examples) == 2
    assert changed == replace(as_trained, system="Add.", examples=changed.examples)

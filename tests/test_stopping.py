"""When a run stops by itself, which policy it keeps, and what it warns of."""

import math
from dataclasses import asdict

import pytest
import torch
from conftest import TINY
from processes import finish, newest, read_metrics
from safetensors.torch import load_file
from short_runs import make_task
from transformers import AutoModelForCausalLM

import train_grpo
from engine import metrics as engine_metrics
from engine.metrics import best_iteration, evaluations_without_gain, no_signal, reason_to_stop
from engine.models import load_model
from engine.policy import Policy
from train_grpo import Config, evaluate

NEVER = ("--eval_every", 0, "--checkpoint_every", 0)


def evaluated(*accuracies: float) -> dict:
    """Metrics with these validation accuracies, each +- 0.05, every 10 iterations."""
    return {
        "iterations": [],
        "evaluations": [
            {
                "iteration": 10 * i,
                "split": "validation",
                "accuracies": {"sampled": {"accuracy": a, "low": a - 0.05, "high": a + 0.05}},
            }
            for i, a in enumerate(accuracies)
        ],
    }


def test_the_best_iteration_is_the_latest_of_equals():
    assert best_iteration(evaluated(0.3, 0.5, 0.4)) == 10
    assert best_iteration(evaluated(0.3, 0.5, 0.5)) == 20
    assert best_iteration(evaluated()) == 0


def test_patience_counts_since_a_gain_beyond_the_interval():
    assert evaluations_without_gain(evaluated(0.3)) == 0
    assert evaluations_without_gain(evaluated(0.3, 0.34, 0.33)) == 2
    assert evaluations_without_gain(evaluated(0.3, 0.34, 0.36)) == 0  # slowly, but beyond
    assert evaluations_without_gain(evaluated(0.3, 0.4, 0.44, 0.1)) == 2


def test_max_kl_is_the_mean_of_fifty_iterations():
    def ending(*kl):
        history = [{"kl": value, "skipped_updates": 0} for value in kl]
        config = asdict(Config(max_kl=1.0, num_iterations=1000))
        return reason_to_stop({"iterations": history, "evaluations": [], "config": config})

    assert ending(*[9.0] * 49) is None
    assert ending(*[1.1] * 50)[0] == "finished"
    assert ending(*[9.0] * 100, *[0.5] * 50) is None
    assert ending(*[1.1] * 49, math.nan) is not None


def test_signal_is_lacking_only_if_no_group_has_any():
    rest = dict.fromkeys(("reward_exact", "truncated", "accuracy", "entropy"), 0.0)
    silent, heard = {**rest, "frac_zero_std_groups": 1.0}, {**rest, "frac_zero_std_groups": 0.5}
    evaluations = [{"example": {"question": "What?", "completion": ""}}]

    def warning(history):
        return no_signal({"iterations": history, "evaluations": evaluations})

    assert warning([silent] * 50)
    assert warning([silent] * 49) is None
    assert warning([heard] + [silent] * 49) is None


def test_a_run_that_learns_nothing_stops_after_patience(tmp_path):
    flags = ("--num_iterations", 100, "--eval_every", 1, "--patience", 3, "--learning_rate", 0)
    out = finish(tmp_path, *flags, "--checkpoint_every", 0)
    metrics = read_metrics(tmp_path)
    assert 3 <= len(metrics["iterations"]) < 100
    assert "3 evaluations without a gain" in metrics["stop_reason"]
    assert metrics["stop_reason"] in out


def test_a_run_that_strays_stops_at_max_kl(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_metrics, "WINDOW", 3)
    flags = ("--num_iterations", 100, "--max_kl", 0.05, "--learning_rate", "3e-3")
    finish(tmp_path, *flags, *NEVER)
    metrics = read_metrics(tmp_path)
    assert len(metrics["iterations"]) < 100 and "max_kl" in metrics["stop_reason"]


def test_an_over_trained_run_keeps_its_best_policy(tmp_path, monkeypatch):
    """It learns for 8 iterations, then a huge learning rate ruins it."""
    real, done = train_grpo.train_iteration, []

    def iteration(task, learner, config):
        if len(done) >= 8:
            learner.optimizer.param_groups[0]["lr"] = 0.1
        done.append(real(task, learner, config))
        return done[-1]

    monkeypatch.setattr(train_grpo, "train_iteration", iteration)
    flags = ("--num_iterations", 12, "--eval_every", 4, "--eval_problems", 64)
    finish(tmp_path, *flags, "--checkpoint_every", 0)
    metrics = read_metrics(tmp_path)
    accuracy = {
        e["iteration"]: e["accuracies"]["sampled"]["accuracy"]
        for e in metrics["evaluations"]
        if e["split"] == "validation"
    }
    best = metrics["best_iteration"]
    assert best <= 8 and accuracy[12] < 0.05 and accuracy[best] > 0.2
    assert metrics["evaluations"][-1]["split"] == "test"
    assert metrics["evaluations"][-1]["iteration"] == best
    saved, tokenizer = load_model(str(tmp_path / "saved_model"), torch.device("cpu"))
    task = make_task(tokenizer, Config(**metrics["config"]))
    again = evaluate(Policy(saved), task, "validation", 64, 1_000_003 + best)
    assert again["accuracies"]["sampled"]["accuracy"] == pytest.approx(accuracy[best])
    assert f"iteration {best}," in (tmp_path / "saved_model" / "README.md").read_text()
    last = load_file(tmp_path / "checkpoints" / str(newest(tmp_path)) / "policy.safetensors")
    name = "model.embed_tokens.weight"
    assert not torch.equal(last[f"policy.model.{name}"], saved.state_dict()[name])


def test_a_run_without_reward_is_told_the_causes_once(tmp_path, monkeypatch, tiny):
    base, tokenizer = tiny
    torch.manual_seed(0)
    blank = AutoModelForCausalLM.from_config(base.model.config)  # random weights: only noise
    blank.save_pretrained(tmp_path / "blank")
    tokenizer.save_pretrained(tmp_path / "blank")
    monkeypatch.setattr(engine_metrics, "WINDOW", 4)
    flags = ("--model_name", tmp_path / "blank", "--num_iterations", 12, "--eval_every", 0)
    out = finish(tmp_path, *flags)
    assert out.count("nothing to learn from") == 1
    causes = ("truncated", "--max_new_tokens", "thinking", "never answers in the form", "too hard")
    causes += ("format 0.00, near 0.00, exact 0.00", "0% exact")
    for cause in (*causes, "learning rate is too high", "'What is ("):
        assert cause in out
    assert read_metrics(tmp_path)["no_signal"] == 4


def test_entropy_and_truncation_are_recorded(tmp_path):
    finish(tmp_path, "--num_iterations", 2, "--max_new_tokens", 1)
    for iteration in read_metrics(tmp_path)["iterations"]:
        assert iteration["entropy"] > 0
        assert iteration["truncated"] == 1  # one token holds no whole answer
        assert iteration["reward_format"] == iteration["reward_exact"] == 0


def test_off_task_kl_starts_at_zero_and_grows(tmp_path):
    finish(tmp_path, "--num_iterations", 4, "--learning_rate", "1e-3")
    evaluations = read_metrics(tmp_path)["evaluations"]
    off_task = [e["off_task"] for e in evaluations if e["split"] == "validation"]
    assert off_task[0]["kl"] == 0 and off_task[0]["accuracy"] > 0.9
    assert off_task[-1]["kl"] > 0


def test_off_task_questions_belong_to_the_model_not_the_preset(tmp_path):
    flags = ("--preset", "reference", "--model_name", TINY, "--num_iterations", 1)
    finish(tmp_path, *flags)
    off_task = [e["off_task"] for e in read_metrics(tmp_path)["evaluations"]]
    assert all(asked["accuracy"] > 0.9 for asked in off_task)


def test_a_model_without_off_task_questions_is_asked_chat(tmp_path, tiny):
    base, tokenizer = tiny
    base.model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    finish(tmp_path, "--model_name", tmp_path / "chat", "--num_iterations", 1)
    assert all(set(e["off_task"]) == {"kl"} for e in read_metrics(tmp_path)["evaluations"])

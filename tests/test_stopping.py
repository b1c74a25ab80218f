"""The best policy is kept, a run can stop by itself, and what goes wrong is seen."""

import math

import pytest
import torch
from processes import FLAGS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import bookkeeping
import train_grpo
from bookkeeping import best_iteration, evaluations_without_gain, lacks_signal, reason_to_stop
from checkpoint import METRICS_FILE, checkpoints_in, read_json
from plot_metrics import PLOT_FILES
from policy import Policy, load_model
from train_grpo import Config, evaluate, held_out_problems, main, make_prompt


def run(folder, monkeypatch, *flags) -> dict:
    monkeypatch.chdir(folder)
    assert main([str(flag) for flag in (*FLAGS, *flags)]) == 0
    return read_json(folder / METRICS_FILE)


def evaluated(*accuracies: float) -> dict:
    """Metrics with such validation accuracies, each 0.05 uncertain, every 10 iterations."""
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


def test_the_best_is_the_highest_and_of_equals_the_latest():
    assert best_iteration(evaluated(0.3, 0.5, 0.4)) == 10
    assert best_iteration(evaluated(0.3, 0.5, 0.5)) == 20
    assert best_iteration(evaluated()) == -1


def test_patience_counts_since_the_last_gain_beyond_the_interval():
    assert evaluations_without_gain(evaluated(0.3)) == 0
    assert evaluations_without_gain(evaluated(0.3, 0.34, 0.33)) == 2
    assert evaluations_without_gain(evaluated(0.3, 0.34, 0.36)) == 0  # slowly, but beyond
    assert evaluations_without_gain(evaluated(0.3, 0.4, 0.44, 0.1)) == 2


def test_max_kl_waits_for_fifty_iterations_and_looks_at_the_last_fifty():
    def ending(*kl):
        history = [{"kl": value, "skipped_updates": 0} for value in kl]
        metrics = {"iterations": history, "evaluations": []}
        return reason_to_stop(metrics, Config(max_kl=1.0, num_iterations=1000))

    assert ending(*[9.0] * 49) is None
    assert ending(*[1.1] * 50)[0] == "finished"
    assert ending(*[9.0] * 100, *[0.5] * 50) is None
    assert ending(*[1.1] * 49, math.nan) is not None


def test_a_run_that_learns_nothing_stops_when_patience_is_over(tmp_path, monkeypatch, capsys):
    flags = ("--num_iterations", 100, "--eval_every", 1, "--patience", 3, "--learning_rate", 0)
    metrics = run(tmp_path, monkeypatch, *flags, "--checkpoint_every", 0)
    assert 3 <= len(metrics["iterations"]) < 100
    assert "3 evaluations without a gain" in metrics["stop_reason"]
    assert metrics["stop_reason"] in capsys.readouterr().out
    assert (tmp_path / PLOT_FILES[0]).exists()


def test_a_run_that_strays_stops_at_max_kl(tmp_path, monkeypatch):
    monkeypatch.setattr(bookkeeping, "SPAN", 3)
    flags = ("--num_iterations", 100, "--max_kl", 0.05, "--learning_rate", "3e-3")
    metrics = run(tmp_path, monkeypatch, *flags, "--eval_every", 0, "--checkpoint_every", 0)
    assert len(metrics["iterations"]) < 100 and "max_kl" in metrics["stop_reason"]


def test_a_run_made_to_over_train_saves_its_best_policy(tmp_path, monkeypatch):
    """It learns for 12 iterations, and is then ruined by a rate a thousand times as high."""
    sound = train_grpo.train_iteration

    def iteration(state, *rest):
        if len(state.metrics["iterations"]) >= 12:
            state.optimizer.param_groups[0]["lr"] = 0.1
        return sound(state, *rest)

    monkeypatch.setattr(train_grpo, "train_iteration", iteration)
    flags = ("--num_iterations", 20, "--eval_every", 4, "--eval_problems", 64)
    metrics = run(tmp_path, monkeypatch, *flags, "--checkpoint_every", 0)
    accuracy = {
        e["iteration"]: e["accuracies"]
        for e in metrics["evaluations"]
        if e["split"] == "validation"
    }
    best = metrics["best_iteration"]
    assert best <= 12 and accuracy[20]["sampled"]["accuracy"] < 0.05
    assert accuracy[best]["sampled"]["accuracy"] > 0.2
    assert metrics["evaluations"][-1]["split"] == "test"
    assert metrics["evaluations"][-1]["iteration"] == best
    saved, tokenizer = load_model(str(tmp_path / "saved_model"), torch.device("cpu"))
    config = Config(**metrics["config"])
    problems = held_out_problems("validation", 64, config)
    again = evaluate(
        Policy(saved), tokenizer, make_prompt(config), problems, config, 1_000_003 + best
    )
    assert again["sampled"]["accuracy"] == pytest.approx(accuracy[best]["sampled"]["accuracy"])
    assert f"iteration {best}," in (tmp_path / "saved_model" / "README.md").read_text()
    last = load_file(checkpoints_in(tmp_path)[-1] / "policy.safetensors")
    name = "model.embed_tokens.weight"
    assert not torch.equal(last[f"policy.model.{name}"], saved.state_dict()[name])


def test_a_model_that_never_earns_anything_is_told_of_once_with_a_sample(
    tmp_path, monkeypatch, capsys, tiny
):
    base, tokenizer = tiny
    torch.manual_seed(0)
    blank = AutoModelForCausalLM.from_config(base.model.config)  # random weights: only noise
    blank.save_pretrained(tmp_path / "blank")
    tokenizer.save_pretrained(tmp_path / "blank")
    monkeypatch.setattr(bookkeeping, "SPAN", 4)
    flags = ("--model_name", "blank", "--num_iterations", 12, "--eval_every", 0)
    metrics = run(tmp_path, monkeypatch, *flags)
    out = capsys.readouterr().out
    assert out.count("nothing to learn from") == 1
    for cause in ("never writes the tags", "too hard", "rate is too high", "'What is ("):
        assert cause in out
    assert metrics["no_signal"] == 4


def test_signal_is_missed_only_where_every_group_lacks_it():
    silent, heard = {"groups_without_signal": 1.0}, {"groups_without_signal": 0.5}
    assert lacks_signal([silent] * 50)
    assert not lacks_signal([silent] * 49)
    assert not lacks_signal([heard] + [silent] * 49)


def test_entropy_cut_off_answers_and_empty_promises_are_in_the_metrics(tmp_path, monkeypatch):
    metrics = run(tmp_path, monkeypatch, "--num_iterations", 2, "--max_new_tokens", 1)
    for iteration in metrics["iterations"]:
        assert iteration["entropy"] > 0
        assert iteration["cut_off"] == 1  # one token holds no whole answer
        assert iteration["wrong_in_tags"] == 0


def test_skills_off_the_task_are_followed_from_a_kl_of_zero(tmp_path, monkeypatch):
    flags = ("--num_iterations", 8, "--learning_rate", "1e-3")
    metrics = run(tmp_path, monkeypatch, *flags)
    off_task = [e["off_task"] for e in metrics["evaluations"] if e["split"] == "validation"]
    assert off_task[0]["kl"] == 0 and off_task[0]["accuracy"] > 0.9
    assert off_task[-1]["kl"] > 0


def test_a_chat_model_is_asked_plain_questions_off_the_task(tmp_path, monkeypatch, tiny):
    base, tokenizer = tiny
    base.model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    flags = ("--preset", "reference", "--model_name", "chat", "--num_iterations", 1)
    metrics = run(tmp_path, monkeypatch, *flags)
    assert all(set(e["off_task"]) == {"kl"} for e in metrics["evaluations"])

"""How a run stops, by itself or by a signal, which policy it keeps, and what it warns of."""

import math
import signal
from dataclasses import asdict

import pytest
import torch
from processes import finish, newest, printed, read_metrics, start, wait_until
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train_grpo
from engine import metrics as engine_metrics
from engine.checkpoint import load_checkpoint
from engine.files import METRICS_FILE
from engine.metrics import (
    best_iteration,
    evaluations_without_gain,
    no_signal,
    reason_to_stop,
    validations,
)
from plot_metrics import PLOT_FILES
from train_grpo import Config


def validated(*accuracies: float) -> dict:
    """Metrics with these validation accuracies, each +- 0.05."""
    sampled = [{"accuracy": a, "high": a + 0.05} for a in accuracies]
    evaluations = [{"split": "validation", "accuracies": {"sampled": s}} for s in sampled]
    return {"evaluations": [e | {"iteration": i} for i, e in enumerate(evaluations)]}


def test_the_best_iteration_is_the_latest_of_equals():
    assert best_iteration(validated(0.3, 0.5, 0.4)) == 1
    assert best_iteration(validated(0.3, 0.5, 0.5)) == 2
    assert best_iteration(validated()) == 0


def test_patience_counts_since_a_gain_beyond_the_interval():
    assert evaluations_without_gain(validated(0.3)) == 0
    assert evaluations_without_gain(validated(0.3, 0.34, 0.33)) == 2
    assert evaluations_without_gain(validated(0.3, 0.34, 0.36)) == 0  # slowly, but beyond
    assert evaluations_without_gain(validated(0.3, 0.4, 0.44, 0.1)) == 2


def test_max_kl_is_the_mean_of_fifty_iterations():
    def ending(*kl):
        history = [{"kl": value} for value in kl]
        config = asdict(Config(max_kl=1.0))
        return reason_to_stop({"iterations": history, "evaluations": [], "config": config})

    assert ending(*[9.0] * 49) is None
    assert ending(*[1.1] * 50)[0] == "finished"
    assert ending(*[9.0] * 100, *[0.5] * 50) is None
    assert ending(*[1.1] * 49, math.nan) is not None


def test_signal_is_lacking_only_if_no_group_has_any():
    rest = dict.fromkeys(("reward_exact", "truncated", "accuracy", "entropy"), 0.0)
    example = {"question": "What?", "completion": "7<|im_end|><|im_end|>"}

    def warning(shares: list[float], special: list[str]):
        history = [rest | {"frac_zero_std_groups": share} for share in shares]
        return no_signal({"iterations": history, "evaluations": [{"example": example}]}, special)

    assert "name <|im_end|> as an end token" in warning([1.0] * 50, ["<s>", "<|im_end|>"])
    assert "end token" not in warning([1.0] * 50, ["<s>"])
    assert warning([1.0] * 49, []) is None
    assert warning([0.5] + [1.0] * 49, []) is None


def test_an_over_trained_run_stops_and_keeps_its_best_policy(tmp_path, monkeypatch):
    """It learns for 8 iterations, then a huge learning rate ruins it."""

    def set_rate(optimizer, config, iteration) -> None:
        optimizer.param_groups[0]["lr"] = 1e-4 if iteration < 8 else 0.1

    monkeypatch.setattr(train_grpo, "set_learning_rate", set_rate)
    flags = ("--num_iterations", 100, "--patience", 3, "--eval_problems", 64)
    out = finish(tmp_path, *flags, "--checkpoint_every", 0)
    metrics = read_metrics(tmp_path)
    accuracy = {
        e["iteration"]: e["accuracies"]["sampled"]["accuracy"] for e in validations(metrics)
    }
    # Drift is measured on the bundled model's own questions: those of chat have no accuracy.
    first, second, *_ = (e["off_task"] for e in validations(metrics))
    assert first["kl"] == 0 < second["kl"] and first["accuracy"] > 0.9
    last, best = len(metrics["iterations"]), metrics["best_iteration"]
    assert "3 evaluations without a gain" in out and metrics["stop_reason"] in out
    assert best <= 8 < last < 100 and accuracy[last] < 0.05 and accuracy[best] > 0.2
    assert [metrics["evaluations"][-1][name] for name in ("split", "iteration")] == ["test", best]
    assert f"iteration {best}," in (tmp_path / "saved_model" / "README.md").read_text()
    kept = load_file(tmp_path / "checkpoints" / str(best) / "policy.safetensors")
    for name, weight in load_file(tmp_path / "saved_model" / "model.safetensors").items():
        assert kept[f"policy.model.{name}"].equal(weight), name


def test_a_run_without_reward_is_warned_once(tmp_path, monkeypatch, tiny):
    base, tokenizer = tiny
    torch.manual_seed(0)
    blank = AutoModelForCausalLM.from_config(base.model.config)  # random weights: only noise
    blank.save_pretrained(tmp_path / "blank")
    tokenizer.save_pretrained(tmp_path / "blank")
    monkeypatch.setattr(engine_metrics, "WINDOW", 4)
    flags = ("--model_name", tmp_path / "blank", "--num_iterations", 9, "--eval_every", 0)
    out = finish(tmp_path, *flags)
    assert out.count("nothing to learn from") == 1
    for cause in ("--max_new_tokens", "never answers in the form", "too hard", "too high"):
        assert cause in out
    metrics = read_metrics(tmp_path)
    assert metrics["no_signal"] == 4
    # A model that knows no off-task questions is asked chat.
    assert all(set(e["off_task"]) == {"kl"} for e in metrics["evaluations"])


def signal_after(monkeypatch, calls: int, name: str, number: signal.Signals) -> None:
    """Send a signal after the given number of calls of a function of train_grpo.py."""
    real, done = getattr(train_grpo, name), []

    def function(*inputs):
        done.append(real(*inputs))
        if len(done) == calls:
            signal.raise_signal(number)
        return done[-1]

    monkeypatch.setattr(train_grpo, name, function)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_run_and_says_how_to_continue(tmp_path, monkeypatch, number):
    signal_after(monkeypatch, 4, "train_iteration", number)  # no checkpoint is due then
    out = finish(tmp_path, "--num_iterations", 9, code=128 + number)
    metrics = read_metrics(tmp_path)
    assert metrics["status"] == "interrupted" and metrics["stop_reason"] == number.name
    assert newest(tmp_path) == len(metrics["iterations"]) == 4
    assert metrics["environment"]["command"] + " --resume" in out.split("to continue")[1]
    assert (tmp_path / "saved_model" / "model.safetensors").exists()
    assert "finished" in finish(tmp_path, "--num_iterations", 5, "--resume")


def test_a_run_stopped_before_training_changes_no_file(tmp_path, monkeypatch):
    names = ["grpo_metrics.json", *PLOT_FILES, "saved_model"]
    for name in names:
        (tmp_path / name).write_text(f"earlier {name}")
    signal_after(monkeypatch, 1, "evaluate", signal.SIGINT)
    finish(tmp_path, "--num_iterations", 1, code=128 + signal.SIGINT)
    assert [(tmp_path / name).read_text() for name in names] == [f"earlier {n}" for n in names]
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_a_second_ctrl_c_kills_and_leaves_valid_files(tmp_path):
    folder = tmp_path / "run"
    process = start(folder, "--num_iterations", 100, "--num_inner_updates", 60)
    wait_until((folder / METRICS_FILE).exists, process)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: "Ctrl-C to stop at once" in printed(folder), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == -signal.SIGINT
    assert load_checkpoint(folder)[0] and read_metrics(folder)["status"] == "running"

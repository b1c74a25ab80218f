"""A whole run as a user starts it: what it prints and what it leaves behind."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, run_script
from processes import arguments, finish, read_metrics
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import plot_metrics
import train_grpo
from engine.models import load_model, write_model
from engine.policy import Policy
from engine.prompt import encode_prompts, read_prompt
from plot_metrics import PLOT_FILES
from train_grpo import load_task, parse_config, rollout

SHORT = ("--preset", "tiny", "--num_iterations", "3", "--eval_problems", "16", "--eval_every", "2")
PER_ITERATION = {
    "reward",
    "reward_format",
    "reward_near",
    "reward_exact",
    "accuracy",
    "kl",
    "kl_penalty",
    "loss",
    "clip_fraction",
    "grad_norm",
    "skipped_updates",
    "entropy",
    "truncated",
    "completion_length",
    "frac_zero_std_groups",
    "logprob_mismatch",
    "seconds",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of the bundled model: (what was printed, its folder)."""
    folder = tmp_path_factory.mktemp("run")
    result = run_script("train_grpo.py", *SHORT, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result, folder


@pytest.fixture
def metrics(run):
    """The metrics file, read as strict JSON: no NaN, no infinity."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads((run[1] / "grpo_metrics.json").read_text(), parse_constant=refuse)


def test_metrics_hold_every_number_of_every_iteration(metrics):
    assert metrics["status"] == "finished"
    assert metrics["config"]["preset"] == "tiny" and metrics["config"]["num_iterations"] == 3
    assert metrics["environment"]["torch"] == torch.__version__
    assert metrics["peak_memory_mib"] > 100
    assert len(metrics["iterations"]) == 3
    for iteration in metrics["iterations"]:
        assert set(iteration) == PER_ITERATION
        assert all(math.isfinite(value) for value in iteration.values())
        parts = {"format": 0.2, "near": 0.2, "exact": 0.6}
        weighted = sum(weight * iteration[f"reward_{part}"] for part, weight in parts.items())
        assert iteration["reward"] == pytest.approx(weighted, abs=1e-5)
        assert iteration["accuracy"] == iteration["reward_exact"]


def test_evaluations_come_before_during_and_after_training(metrics):
    assert [(e["split"], e["iteration"]) for e in metrics["evaluations"]] == [
        ("test", 0),
        ("validation", 0),
        ("validation", 2),
        ("validation", 3),
        ("test", metrics["best_iteration"]),
    ]


def test_training_starts_at_the_reference_on_policy(metrics):
    first = metrics["iterations"][0]
    assert first["kl"] == 0 and first["kl_penalty"] == 0
    assert first["logprob_mismatch"] < 1e-4


def test_output_names_preset_policy_results_and_next_command(run, metrics):
    out, question = run[0].stdout, metrics["evaluations"][0]["example"]["question"]
    assert out.splitlines()[0].startswith("preset tiny: ")
    assert "\npolicy tree: matches unpadded forward passes\n" in out
    for name in ("test accuracy before", "test accuracy after", "kl ", "time", "saved policy"):
        assert f"\n{name}" in out
    assert question.startswith("What is (")
    assert out.rstrip().endswith(f"python inference.py '{question}'")
    assert "reward=" in run[0].stderr and "kl=" in run[0].stderr  # the progress bar


def test_both_plots_are_drawn(run):
    for name in PLOT_FILES:
        assert (run[1] / name).stat().st_size > 10_000


def test_saved_model_answers_the_same_in_plain_transformers(run):
    folder = run[1] / "saved_model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    problems, *_ = load_task(parse_config(list(SHORT)))
    questions = [p.question for p in problems.held_out("test", 16)]
    prompts = encode_prompts(tokenizer, questions, read_prompt(str(folder)), "cpu")
    generated = model.generate(prompts[0], attention_mask=prompts[1], max_new_tokens=16)
    policy = Policy(load_model(str(folder), torch.device("cpu"))[0])
    ours = rollout(policy, tokenizer, prompts, 1, 16, temperature=0)
    new = generated[:, prompts[0].shape[1] :]
    assert tokenizer.batch_decode(new, skip_special_tokens=True) == ours.texts


def test_saving_and_loading_change_no_weight(tiny, tmp_path):
    policy, tokenizer = tiny
    write_model(policy.model, tokenizer, read_prompt(str(TINY)), tmp_path / "m", card="")
    loaded = load_model(str(tmp_path / "m"), torch.device("cpu"))[0].state_dict()
    for name, weight in policy.model.state_dict().items():
        assert weight.equal(loaded[name]), name


def test_model_card_gives_base_recipe_and_accuracies(run, metrics):
    card = (run[1] / "saved_model" / "README.md").read_text()
    assert "base_model: tiny_model" in card and "(a op1 b) op2 c" in card
    assert "| learning_rate |" in card
    best = metrics["best_iteration"]
    assert "| 0 | sampled |" in card and f"| {best} | greedy |" in card
    assert f"policy after iteration {best}, the best of 3" in card


def test_saved_prompt_keeps_token_limit_and_off_task_questions(tmp_path):
    finish(tmp_path, "--num_iterations", 1, "--max_new_tokens", 9)
    prompt = read_prompt(str(tmp_path / "saved_model"))
    assert prompt.max_new_tokens == 9
    assert prompt.off_task == read_prompt(str(TINY)).off_task


def test_trains_where_fcntl_and_resource_do_not_exist(tmp_path):
    code = "import sys, psutil; "  # first: only on Linux does psutil need them
    code += "sys.modules.update(fcntl=None, resource=None); "
    code += "import train_grpo as t; sys.exit(t.exit_code(t.main))"
    flags = arguments("--num_iterations", 1, "--eval_problems", 2)
    result = subprocess.run(
        [sys.executable, "-c", code, *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    metrics = read_metrics(tmp_path)
    assert metrics["status"] == "finished" and "peak_memory_mib" not in metrics
    assert "MiB" not in result.stdout


def test_a_run_stopped_before_training_changes_no_file(tmp_path, monkeypatch):
    names = ["grpo_metrics.json", *PLOT_FILES, "saved_model/config.json"]
    (tmp_path / "saved_model").mkdir()
    for name in names:
        (tmp_path / name).write_text(f"earlier {name}")
    evaluate = train_grpo.evaluate

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return evaluate(*arguments)

    monkeypatch.setattr(train_grpo, "evaluate", interrupted)
    finish(tmp_path, "--num_iterations", 1, code=130)
    assert [(tmp_path / name).read_text() for name in names] == [f"earlier {n}" for n in names]
    assert not (tmp_path / "checkpoints").exists()


def test_the_bundled_model_improves_within_fifteen_iterations(tmp_path, monkeypatch):
    monkeypatch.setattr(plot_metrics, "draw", lambda *inputs: None)
    flags = ["--preset", "tiny", "--num_iterations", "15", "--eval_every", "0"]
    flags += ["--eval_problems", "4", "--output_dir", str(tmp_path)]
    assert train_grpo.main(flags) == 0
    rewards = [m["reward"] for m in read_metrics(tmp_path)["iterations"]]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.05


@pytest.mark.slow
def test_the_reference_preset_trains_its_architecture(tmp_path, tiny):
    tokenizer = tiny[1]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    tokenizer.save_pretrained(tmp_path / "qwen")
    flags = ["--preset", "reference", "--model_name", "qwen", "--num_iterations", "2"]
    result = run_script("train_grpo.py", *flags, "--eval_problems", "4", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    metrics = read_metrics(tmp_path)
    assert metrics["config"]["learning_rate"] == 1e-7
    assert metrics["iterations"][0]["completion_length"] > 1

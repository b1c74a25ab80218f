"""A whole run, as a user starts it: what it prints, what it leaves behind, how it stops."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, run_script
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from inference import read_prompt
from plot_metrics import PLOT_FILES
from policy import Policy, encode_prompts, load_model, write_model
from train_grpo import held_out_problems, main, parse_config, rollout

SHORT = ["--preset", "tiny", "--num_iterations", "3", "--eval_problems", "16"]
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
    "wrong_in_tags",
    "cut_off",
    "completion_length",
    "groups_without_signal",
    "sampling_gap",
    "seconds",
}


def strict_json(path):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of the bundled model: (what was printed, its folder)."""
    folder = tmp_path_factory.mktemp("run")
    result = run_script("train_grpo.py", *SHORT, "--eval_every", "2", cwd=folder)
    assert result.returncode == 0, result.stderr
    return result, folder


def test_the_metrics_hold_everything_and_are_strict_json(run):
    metrics = strict_json(run[1] / "grpo_metrics.json")
    assert metrics["status"] == "finished"
    assert metrics["config"]["preset"] == "tiny" and metrics["config"]["num_iterations"] == 3
    assert metrics["environment"]["torch"] == torch.__version__
    assert len(metrics["iterations"]) == 3
    for iteration in metrics["iterations"]:
        assert set(iteration) == PER_ITERATION
        assert all(math.isfinite(value) for value in iteration.values())
        parts = sum(iteration[f"reward_{part}"] for part in ("format", "near", "exact"))
        assert iteration["reward"] == pytest.approx(parts, abs=1e-5)
    assert [(e["split"], e["iteration"]) for e in metrics["evaluations"]] == [
        ("test", 0),
        ("validation", 0),
        ("validation", 2),
        ("validation", 3),
        ("test", metrics["best_iteration"]),
    ]


def test_the_first_iteration_starts_at_the_reference_and_samples_what_it_trains_on(run):
    first = strict_json(run[1] / "grpo_metrics.json")["iterations"][0]
    assert first["kl"] == 0 and first["kl_penalty"] == 0
    assert first["sampling_gap"] < 1e-4


def test_the_last_lines_say_what_came_of_it_and_what_to_do_next(run):
    out = run[0].stdout
    for line in ("test accuracy before", "test accuracy after", "kl ", "time", "saved_model"):
        assert line in out
    assert out.rstrip().endswith('python inference.py "What is (4 - 9) * 6?"')
    assert "reward=" in run[0].stderr and "kl=" in run[0].stderr  # the bar


def test_both_plots_are_drawn(run):
    for name in PLOT_FILES:
        assert (run[1] / name).stat().st_size > 10_000


def test_the_saved_model_loads_in_plain_transformers_and_answers_as_measured(run):
    folder = run[1] / "saved_model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = parse_config(SHORT)
    questions = [p.question for p in held_out_problems("test", 16, config)]
    prompts = encode_prompts(tokenizer, questions, read_prompt(str(folder)), "cpu")
    generated = model.generate(prompts[0], attention_mask=prompts[1], max_new_tokens=16)
    policy = Policy(load_model(str(folder), torch.device("cpu"))[0])
    ours = rollout(policy, tokenizer, prompts, 1, 16, temperature=0)
    new = generated[:, prompts[0].shape[1] :]
    assert tokenizer.batch_decode(new, skip_special_tokens=True) == ours.texts


def test_saving_and_loading_changes_no_log_probability(tiny, tmp_path):
    policy, tokenizer = tiny
    prompt = read_prompt(str(TINY))
    write_model(policy.model, tokenizer, prompt, tmp_path / "m", card="")
    loaded = Policy(load_model(str(tmp_path / "m"), torch.device("cpu"))[0])
    inputs = (
        *encode_prompts(tokenizer, ["What is (1 + 2) * 3?"], prompt, "cpu"),
        torch.arange(9)[None],
    )
    with torch.no_grad():
        assert torch.equal(policy(*inputs), loaded(*inputs))


def test_the_model_card_gives_base_task_recipe_and_what_was_measured(run):
    card = (run[1] / "saved_model" / "README.md").read_text()
    assert "base_model: tiny_model" in card and "(a op1 b) op2 c" in card
    assert "| learning_rate |" in card
    best = strict_json(run[1] / "grpo_metrics.json")["best_iteration"]
    assert "| 0 | sampled |" in card and f"| {best} | greedy |" in card
    assert f"the policy after iteration {best}" in card


@pytest.mark.slow
def test_micro_batches_learn_the_same(tmp_path):
    learned = {}
    for size in ("0", "2", "16"):
        flags = ["--batch_size", "2", "--num_generations", "8", "--micro_batch_size", size]
        output = tmp_path / size
        assert main([*SHORT, *flags, "--output_dir", str(output)]) == 0
        learned[size] = [
            (m["reward"], pytest.approx(m["loss"], abs=1e-4), pytest.approx(m["kl"], abs=1e-4))
            for m in strict_json(output / "grpo_metrics.json")["iterations"]
        ]
    assert learned["0"] == learned["2"] == learned["16"]


@pytest.mark.slow
def test_the_reference_preset_trains_a_model_of_its_architecture(tmp_path, tiny):
    tokenizer = tiny[1]
    torch.manual_seed(0)
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(tmp_path / "qwen")
    tokenizer.save_pretrained(tmp_path / "qwen")
    flags = ["--preset", "reference", "--model_name", "qwen", "--num_iterations", "2"]
    result = run_script("train_grpo.py", *flags, "--eval_problems", "4", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    metrics = strict_json(tmp_path / "grpo_metrics.json")
    assert metrics["config"]["learning_rate"] == 1e-7
    assert metrics["iterations"][0]["completion_length"] > 1


def start(folder, *flags):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train_grpo.py"), "--preset", "tiny", *flags],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def wait_for(stream, text):
    seen = ""
    while text not in seen:
        character = stream.read(1)
        assert character, f"ended without {text!r}: {seen}"
        seen += character


def test_ctrl_c_finishes_the_iteration_and_saves_everything(tmp_path):
    process = start(tmp_path, "--num_iterations", "100000", "--eval_problems", "16")
    wait_for(process.stderr, "reward=")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "interrupted after" in out
    metrics = strict_json(tmp_path / "grpo_metrics.json")
    assert metrics["status"] == "interrupted" and 1 <= len(metrics["iterations"]) < 100000
    assert all((tmp_path / name).exists() for name in PLOT_FILES)
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved_model")


def test_a_run_that_produced_nothing_leaves_an_earlier_runs_files_alone(tmp_path):
    names = ["grpo_metrics.json", *PLOT_FILES, "saved_model/config.json"]
    (tmp_path / "saved_model").mkdir()
    for name in names:
        (tmp_path / name).write_text(f"earlier {name}")
    process = start(tmp_path, "--eval_problems", "512")
    wait_for(process.stdout, "parameters on")  # it goes on to measure the base model
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert [(tmp_path / name).read_text() for name in names] == [f"earlier {n}" for n in names]


def test_the_bundled_model_gets_better_within_seconds(tmp_path):
    flags = ["--preset", "tiny", "--num_iterations", "40", "--eval_every", "0"]
    result = run_script("train_grpo.py", *flags, "--eval_problems", "16", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rewards = [m["reward"] for m in strict_json(tmp_path / "grpo_metrics.json")["iterations"]]
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.05

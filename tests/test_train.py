"""A whole run as a user starts it: what it prints and what it leaves behind."""

import math

import pytest
import torch
from conftest import TINY, run_script
from processes import finish, read_metrics
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.models import load_model
from engine.policy import Policy
from engine.prompt import encode_prompts, read_prompt
from plot_metrics import PLOT_FILES
from train_grpo import Arithmetic, answer_questions

SHORT = ("--preset", "tiny", "--num_iterations", "3", "--eval_problems", "16", "--eval_every", "2")
PER_ITERATION = {
    *("reward", "reward_format", "reward_near", "reward_exact", "accuracy", "entropy", "truncated"),
    *("completion_length", "frac_zero_std_groups", "loss", "kl", "kl_penalty", "clip_fraction"),
    *("kl_tokens", "grad_norm", "skipped_updates", "logprob_mismatch"),
    *("rollout_seconds", "seconds"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of the bundled model: what was printed, its folder, its metrics."""
    folder = tmp_path_factory.mktemp("run")
    result = run_script("train_grpo.py", *SHORT, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result, folder, read_metrics(folder)


def test_metrics_hold_every_iteration_and_evaluation(run):
    metrics = run[2]
    assert metrics["status"] == "finished" and metrics["config"]["preset"] == "tiny"
    assert torch.__version__.startswith(metrics["environment"]["torch"])  # +cu130 may be left out
    assert metrics["peak_memory_mib"] > 100 and len(metrics["iterations"]) == 3
    for iteration in metrics["iterations"]:
        assert set(iteration) == PER_ITERATION
        assert all(math.isfinite(value) for value in iteration.values())
        assert iteration["rollout_seconds"] < iteration["seconds"]
    parts = [metrics["set_up_seconds"], *(m["seconds"] for m in metrics["iterations"])]
    parts += [evaluation["seconds"] for evaluation in metrics["evaluations"]]
    assert 0.5 * metrics["seconds"] < sum(parts) < metrics["seconds"] and min(parts) > 0
    best = metrics["best_iteration"]
    evaluated = [("test", 0), *(("validation", i) for i in (0, 2, 3)), ("test", best)]
    assert [(e["split"], e["iteration"]) for e in metrics["evaluations"]] == evaluated


def test_output_plots_and_card_show_results_and_next_command(run):
    result, folder, metrics = run
    out, question = result.stdout, metrics["evaluations"][0]["example"]["question"]
    assert "\npolicy tree: matches unpadded forward passes\n" in out
    for name in ("test accuracy before", "test accuracy after", "kl ", "time", "saved policy"):
        assert f"\n{name}" in out
    assert question.startswith("What is (")
    assert out.rstrip().endswith(f"python inference.py '{question}'")
    assert "reward=" in result.stderr and "kl=" in result.stderr  # the progress bar
    assert all((folder / name).stat().st_size > 10_000 for name in PLOT_FILES)
    card = (folder / "saved_model" / "README.md").read_text()
    for start in ("learning_rate |", "0 | sampled |", f"{metrics['best_iteration']} | greedy |"):
        assert f"\n| {start}" in card


def test_saved_model_answers_the_same_in_plain_transformers(run):
    folder = run[1] / "saved_model"
    model, tokenizer = (
        kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    prompt = read_prompt(str(folder))
    assert prompt == read_prompt(str(TINY))
    questions = [problem.question for problem in Arithmetic(0, 10).held_out("test", 16)]
    ids, mask = encode_prompts(tokenizer, questions, prompt, "cpu")
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=16)[:, ids.shape[1] :]
    policy = Policy(load_model(str(folder), torch.device("cpu"))[0])
    ours = answer_questions(policy, tokenizer, prompt, questions, temperature=0)
    assert tokenizer.batch_decode(generated, skip_special_tokens=True) == ours


def test_the_bundled_model_improves_within_fifteen_iterations(tmp_path):
    flags = ("--num_iterations", 15, "--eval_every", 0, "--learning_rate", "5e-5")
    finish(tmp_path, *flags, "--batch_size", 16, "--num_generations", 32, "--max_new_tokens", 16)
    rewards = [iteration["reward"] for iteration in read_metrics(tmp_path)["iterations"]]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.05

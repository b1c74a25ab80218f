"""A question in, an answer out."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY
from processes import finish

import inference
from engine.models import encode_prompts, read_prompt
from inference import ask, most_common_answer, prompt_of
from train_grpo import PRESETS

QUESTIONS = ["What is (4 - 9) * 6?", "What is (1 + 2) + 3?", "What is (10 * 10) * 10?"]
PROMPT = read_prompt(str(TINY))


@pytest.fixture(scope="module")
def asked():
    """`python inference.py` with questions on standard input; it reports what it imports."""
    command = [sys.executable, "-X", "importtime", "inference.py", "--model", str(TINY)]
    return subprocess.run(
        command,
        cwd=ROOT,
        input="\n".join([*QUESTIONS * 22, "", " ", QUESTIONS[0]]),  # more than one batch
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def test_each_line_of_input_gets_one_line_in_order(asked, tiny):
    answers = {q: most_common_answer(ask(*tiny, PROMPT, [q], 0, 1)[0]) for q in QUESTIONS}
    assert asked.returncode == 0, asked.stderr
    expected = [answers[q] for q in QUESTIONS * 22]
    assert asked.stdout.splitlines() == [*expected, "no answer", "no answer", expected[0]]
    assert all(answer.lstrip("-").isdigit() for answer in expected)
    assert f"model {TINY}: named on the command line" in asked.stderr


def test_asking_does_not_load_matplotlib(asked):
    imported = asked.stderr.split()
    assert "train_grpo" in imported and "matplotlib" not in imported


def test_an_empty_line_is_not_put_to_the_model(tiny, monkeypatch):
    monkeypatch.setattr(inference, "rollout", None)
    assert ask(*tiny, PROMPT, ["", ""], temperature=0, samples=3) == [[], []]
    assert most_common_answer([]) == "no answer"


def test_greedy_answers_equal_plain_generate(tiny):
    policy, tokenizer = tiny
    ids, mask = encode_prompts(tokenizer, QUESTIONS, PROMPT, "cpu")
    generated = policy.model.generate(ids, attention_mask=mask, max_new_tokens=16)
    texts = tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)
    completions = ask(policy, tokenizer, PROMPT, QUESTIONS, temperature=0, samples=1)
    assert completions == [[text] for text in texts]


@pytest.mark.parametrize(
    "completions, answer",
    [
        (["<answer>3</answer>", "<answer>4</answer>", "<answer>04</answer>"], "4"),
        (["<answer>3</answer>", "<answer>4</answer>"], "3"),
        (["it is 4", "<answer>four</answer>"], "no answer"),
        (["it is 4", "it is 4", "<answer>-5</answer>"], "-5"),
    ],
)
def test_the_majority_of_numbers_is_the_answer(completions, answer):
    assert most_common_answer(completions) == answer


def test_verbose_prints_the_samples_before_their_majority(capsys):
    torch.manual_seed(0)
    flags = ["--model", str(TINY), "--num_samples", "100", "--verbose", QUESTIONS[0]]
    assert inference.main(flags) == 0
    *raw, answer = capsys.readouterr().out.splitlines()
    assert len(raw) == 100 and len(set(raw)) > 1
    assert most_common_answer(raw) == answer


def test_the_model_is_decoded_as_long_as_it_was_trained(tmp_path, capsys):
    shutil.copytree(TINY, tmp_path / "model")
    for limit, answer in ((2, "no answer"), (16, "-50")):
        prompt = {**PROMPT, "max_new_tokens": limit}
        (tmp_path / "model" / "grpo_prompt.json").write_text(json.dumps(prompt))
        assert inference.main(["--model", str(tmp_path / "model"), QUESTIONS[0]]) == 0
        assert capsys.readouterr().out == f"{answer}\n"


def test_a_trained_model_is_found_and_asked_as_trained(tmp_path, monkeypatch, capsys):
    finish(tmp_path, "--num_iterations", 1, "--num_examples", 1, "--max_new_tokens", 12)
    monkeypatch.chdir(tmp_path)
    assert inference.main([QUESTIONS[0]]) == 0
    assert "model saved_model: trained here" in capsys.readouterr().err
    prompt = prompt_of("saved_model")
    assert len(prompt["examples"]) == 1 and prompt["max_new_tokens"] == 12


def test_a_fetched_model_is_asked_as_its_preset_does():
    name = PRESETS["smollm2"]["model_name"]
    for way in (name, f"{name}/", f"./{name}", str(ROOT / name)):
        assert len(prompt_of(way)["examples"]) == 3, way

"""A question in, an answer out; code that a model names is not trusted."""

import hashlib
import io
import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, TINY, run_script
from processes import finish

import evaluate
import inference
import train_grpo
from engine.files import UserError
from engine.presets import PRESETS
from engine.prompt import read_prompt
from inference import config_of, most_common_answer
from rewards import parse
from train_grpo import answer_questions, rollout

QUESTIONS = ["What is (4 - 9) * 6?", "What is (1 + 2) + 3?", "What is (10 * 10) * 10?"]
PROMPT = read_prompt(str(TINY))


def test_asking_loads_no_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # imports are listed on standard error
    done = run_script("inference.py", "--model", TINY, QUESTIONS[0], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "-50\n")
    assert f"model {TINY}: named on the command line" in done.stderr
    assert "transformers" in done.stderr.split() and "matplotlib" not in done.stderr.split()


def test_each_line_of_input_gets_one_line_in_order(tiny, monkeypatch, capsys):
    texts = answer_questions(*tiny, PROMPT, QUESTIONS[:2], temperature=0.0)
    first, second = (str(parse(text)) for text in texts)
    lines = [QUESTIONS[0], "", " ", *[QUESTIONS[1]] * 200]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    spy = Mock(wraps=rollout)
    monkeypatch.setattr(train_grpo, "rollout", spy)
    assert inference.main(["--model", str(TINY)]) == 0
    expected = [first, "no answer", "no answer", *[second] * 200]
    assert capsys.readouterr().out.splitlines() == expected
    ids = [call.args[2][0] for call in spy.call_args_list]
    assert list(map(len, ids)) == [128, 73]  # in batches, without the empty lines


@pytest.mark.parametrize(
    "completions, answer",
    [
        (["<answer>3</answer>", "<answer>4</answer>", "<answer>04</answer>"], "4"),
        (["<answer>3</answer>", "<answer>4</answer>"], "3"),
        (["it is 4", "<answer></answer>"], "no answer"),
        (["it is 4", "it is 4", "<answer>-5</answer>"], "-5"),
        (["<answer>four\n or five</answer>"], "four or five"),
    ],
)
def test_the_majority_of_answers_is_the_answer(completions, answer):
    assert most_common_answer(completions, parse) == answer


def test_verbose_prints_the_samples_before_their_majority(capsys):
    torch.manual_seed(0)
    flags = ["--model", str(TINY), "--num_samples", "20", "--verbose", QUESTIONS[0]]
    assert inference.main(flags) == 0
    *raw, answer = capsys.readouterr().out.splitlines()
    assert len(raw) == 20 and len(set(raw)) > 1
    assert most_common_answer(raw, parse) == answer


def test_a_trained_model_is_found_and_asked_as_trained(tiny, tmp_path, monkeypatch, capsys):
    finish(tmp_path, "--num_iterations", 1, "--num_examples", 1, "--max_new_tokens", 2)
    monkeypatch.chdir(tmp_path)
    assert inference.main(["--verbose", QUESTIONS[0]]) == 0
    out, err = capsys.readouterr()
    assert "model saved_model: trained here" in err
    completion, answer = out.splitlines()
    assert len(tiny[1].tokenize(completion)) == 2 and answer == "no answer"
    assert len(read_prompt("saved_model").examples) == 1


def test_a_fetched_model_is_asked_as_its_preset_does():
    name = PRESETS["smollm2"]["model_name"]
    for way in (name, f"./{name}/", str(ROOT / name)):
        assert config_of(way).num_examples == PRESETS["smollm2"]["num_examples"], way


# Leaves a file behind if it is run. Right is whatever has an even number of characters.
EVEN = """from pathlib import Path
Path("was_run").touch()
WEIGHTS = {"exact": 1.0, "tags": 0.0}
def score(completion, answer):
    return len(completion) % 2 == 0, "<answer>" in completion
def parse(completion):
    return f"{len(completion)} characters"
"""


def make_model(folder: Path, rewards: str = "", system: str = PROMPT.system, **task) -> list[str]:
    """Make a model that was trained on this task, scored by EVEN. Returns the flags to name it."""
    shutil.copytree(TINY, folder)
    sha256 = hashlib.sha256(EVEN.encode()).hexdigest()
    task = {"rewards": rewards, "rewards_sha256": sha256, **task}
    prompt = asdict(replace(PROMPT, system=system, task=task))
    (folder / "grpo_prompt.json").write_text(json.dumps(prompt))
    return ["--model", str(folder)]


INSIDE, CHANGED = "inside the model's folder", "a different one"


@pytest.mark.parametrize(
    "code, link, target, named, reason",
    [
        ("model/even.py", "", "", "model/even.py", INSIDE),
        ("model/even.py", "link", "model", "link/even.py", INSIDE),
        ("model/even.py", "even.py", "model/even.py", "even.py", INSIDE),
        ("even.py", "model/even.py", "../even.py", "model/even.py", INSIDE),
        ("even.py", "", "", "even.py", CHANGED),
        ("even.py", "", "", "gone.py", "gone.py: No such file"),
    ],
)
def test_code_that_a_model_names_is_not_trusted(
    code, link, target, named, reason, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = make_model(Path("model"), named)
    Path(code).write_text(EVEN + "# changed" * (reason == CHANGED))
    if link:
        Path(link).symlink_to(target)
    assert inference.main([*flags, QUESTIONS[0]]) == 0
    printed = capsys.readouterr()
    assert printed.out == "<answer>-50</answer>\n"
    [_, warning] = printed.err.splitlines()
    assert reason in warning and warning.endswith("--rewards")
    with pytest.raises(UserError, match=reason):
        evaluate.main(flags)
    assert not Path("was_run").exists()


def test_a_model_is_read_by_the_rewards_of_its_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("even.py").write_text(EVEN)
    flags = make_model(Path("model"), "even.py", problems="gone.jsonl")  # not needed for asking
    assert inference.main([*flags, QUESTIONS[0]]) == 0
    Path("even.py").write_text(EVEN + "# changed")
    assert inference.main([*flags, "--rewards", "even.py", QUESTIONS[0]]) == 0  # named by the user
    assert capsys.readouterr().out == "20 characters\n" * 2 and Path("was_run").exists()

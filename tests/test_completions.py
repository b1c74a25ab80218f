"""grpo_completions.jsonl: what the model said, whole groups, once each. Kills: test_resume.py."""

import json

import pytest
import torch
from processes import arguments, finish

import train_grpo
from engine.files import COMPLETIONS_FILE, append_line, cut_lines
from engine.metrics import group_record
from engine.presets import parse_config
from engine.problems import LOGPROBS, RewardFile
from train_grpo import Config, group_advantages, rollout, set_up, train_iteration


def test_a_record_is_the_first_group_of_its_batch(monkeypatch):
    batches, rewards, config = [], RewardFile(), parse_config(Config, arguments())

    def spy(*inputs):
        batches.append(rollout(*inputs))
        return batches[-1]

    task, learner = set_up(config)
    monkeypatch.setattr(train_grpo, "rollout", spy)
    _, group = train_iteration(task, learner, config)
    record = group_record(group, learner.policy, learner.reference, task.tokenizer)
    [batch], rows = batches, record["completions"]
    question, answer = record["question"], record["answer"]
    assert question in task.tokenizer.decode(batch.prompt_ids[0])
    assert answer == eval(question.removeprefix("What is ").removesuffix("?"))
    assert [row.pop("text") for row in rows] == batch.texts[:4]
    assert [row.pop("tokens") for row in rows] == batch.mask[:4].sum(dim=1).tolist()
    assert [row.pop("truncated") for row in rows] == batch.truncated[:4].tolist()
    for row in rows:
        for name in ("token_texts", *LOGPROBS):  # test_report.py
            del row[name]
    advantages = [row.pop("advantage") for row in rows]
    assert rows == [rewards.score(text, answer) for text in batch.texts[:4]]
    earned = [sum(weight * row[n] for n, weight in rewards.weights.items()) for row in rows]
    expected = group_advantages(torch.tensor(earned), 4).tolist()
    assert advantages == pytest.approx(expected, abs=1e-4)


def test_the_first_and_every_nth_iteration_is_logged_in_a_new_file(tmp_path):
    file, flags = tmp_path / COMPLETIONS_FILE, ("--num_iterations", 6, "--eval_every", 0)
    file.write_text("an earlier run's")
    finish(tmp_path, *flags, "--log_completions_every", 3)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 3, 6]
    for line in lines:
        assert list(line) == ["iteration", "question", "answer", "completions", "fixed"]
        assert len(line["completions"]) == 4
    finish(tmp_path, *flags, "--log_completions_every", -1)
    assert not file.exists()


@pytest.mark.parametrize("tail", [b'{"itera', b'{"iteration": 3}', b'{"iteration": 4}\n'])
def test_cut_lines_keeps_whole_lines_up_to_the_iteration(tmp_path, tail):
    file = tmp_path / "lines"
    cut_lines(file, 3)  # nothing there yet
    assert not file.exists()
    for iteration in (1, 3):
        append_line(file, {"iteration": iteration, "text": "\u2028\n\ud800", "odd": float("nan")})
    before = file.read_bytes()
    file.write_bytes(before + tail)
    cut_lines(file, 3)
    assert file.read_bytes() == before and before.count(b"\n") == 2

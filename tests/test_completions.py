"""grpo_completions.jsonl: what the model said, whole groups, once each."""

import json
import random
import shutil
import signal
import time
from statistics import fmean

import pytest
import torch
from processes import finish, newest, read_metrics, start, wait_until

from engine.checkpoint import checkpoints_in
from engine.files import COMPLETIONS_FILE, METRICS_FILE, append_line, cut_lines
from engine.problems import RewardFile
from train_grpo import group_advantages

LENGTH = ("--num_iterations", 8)
EACH = (*LENGTH, "--batch_size", 1, "--log_completions_every", 1)
PARTS = ("format", "near", "exact")


def read_lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / COMPLETIONS_FILE).read_text().splitlines()]


@pytest.fixture(scope="module")
def each(tmp_path_factory):
    """A run that logs every iteration, whose batch is one group."""
    folder = tmp_path_factory.mktemp("runs") / "each"
    finish(folder, *EACH)
    return folder


@pytest.fixture(scope="module")
def every_third(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "third"
    finish(folder, *LENGTH, "--log_completions_every", 3, "--eval_every", 0)
    return folder


def test_a_line_holds_one_whole_group(each):
    lines = read_lines(each)
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8]
    for line in lines:
        assert list(line) == ["iteration", "question", "answer", "completions"]
        assert len(line["completions"]) == 4
        for completion in line["completions"]:
            assert list(completion) == ["text", *PARTS, "advantage", "tokens", "truncated"]


def test_lines_agree_with_the_metrics_of_their_iteration(each):
    for line, metrics in zip(read_lines(each), read_metrics(each)["iterations"], strict=True):
        rows = line["completions"]
        for part in PARTS:
            mean = fmean(row[part] for row in rows)
            assert mean == pytest.approx(metrics[f"reward_{part}"], abs=1e-5)
        assert fmean(row["tokens"] for row in rows) == metrics["completion_length"]
        assert fmean(row["truncated"] for row in rows) == metrics["truncated"]
        assert all(row["tokens"] == 8 for row in rows if row["truncated"])
        assert sum(row["advantage"] for row in rows) == pytest.approx(0, abs=1e-4)
    assert any(row["advantage"] for line in read_lines(each) for row in line["completions"])


def test_texts_belong_to_the_question_and_earned_their_parts(every_third):
    rewards = RewardFile()
    for line in read_lines(every_third):
        rows, question = line["completions"], line["question"]
        assert line["answer"] == eval(question.removeprefix("What is ").removesuffix("?"))
        for row in rows:
            assert rewards.score(row["text"], line["answer"]) == {n: row[n] for n in PARTS}
        earned = [sum(weight * row[n] for n, weight in rewards.weights.items()) for row in rows]
        advantages = group_advantages(torch.tensor(earned), len(earned)).tolist()
        assert [row["advantage"] for row in rows] == pytest.approx(advantages, abs=1e-4)


def test_every_nth_iteration_is_logged(every_third):
    assert [line["iteration"] for line in read_lines(every_third)] == [3, 6]


@pytest.mark.parametrize("every, left", [(0, None), (1, [1, 2])])
def test_a_fresh_run_replaces_the_completions_of_an_earlier_one(every_third, tmp_path, every, left):
    folder = tmp_path / "run"
    shutil.copytree(every_third, folder)
    finish(folder, "--num_iterations", 2, "--eval_every", 0, "--log_completions_every", every)
    exists = (folder / COMPLETIONS_FILE).exists()
    assert left == ([line["iteration"] for line in read_lines(folder)] if exists else None)


@pytest.mark.parametrize("tail", ["whole lines", "half a line", "one byte short"])
def test_resume_drops_what_a_kill_left_after_the_checkpoint(each, tmp_path, tail):
    folder = tmp_path / "run"
    shutil.copytree(each, folder)
    (folder / METRICS_FILE).unlink()
    shutil.rmtree(checkpoints_in(folder)[-1])  # 8; 6 is left
    file = folder / COMPLETIONS_FILE
    content = file.read_bytes()
    if tail != "whole lines":
        half = content.index(b"\n", content.index(b'"iteration": 7')) + 30
        file.write_bytes(content[: half if tail == "half a line" else -1])
    assert "resuming after iteration 6" in finish(folder, *EACH, "--resume")
    assert file.read_bytes() == content


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


@pytest.mark.slow
def test_kills_at_random_leave_each_line_once_and_whole(tmp_path):
    flags = ("--num_iterations", 120, "--eval_every", 40, "--checkpoint_every", 7)
    flags += ("--log_completions_every", 1)
    folder, calm = tmp_path / "killed", tmp_path / "calm"
    folder.mkdir()
    finish(calm, *flags)
    rng, kills, beyond = random.Random(0), 0, 0
    while kills < 5 or not beyond:
        goal, resume = newest(folder) + 1, ["--resume"] * bool(kills)
        process = start(folder, *flags, *resume)
        wait_until(lambda goal=goal: newest(folder) >= goal, process)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        lines = (folder / COMPLETIONS_FILE).read_bytes().split(b"\n")[:-1]
        found = [json.loads(line)["iteration"] for line in lines]
        assert found == list(range(1, len(found) + 1))
        assert len(found) >= newest(folder)  # the checkpoint's lines are all there
        beyond += len(found) > newest(folder)
        kills += 1
        assert kills < 12
    finish(folder, *flags, "--resume")
    assert (folder / COMPLETIONS_FILE).read_bytes() == (calm / COMPLETIONS_FILE).read_bytes()
    assert [line["iteration"] for line in read_lines(folder)] == list(range(1, 121))

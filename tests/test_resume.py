"""Bit for bit the same run: with the same seed, evaluated more often, killed and resumed."""

import json
import os
import shutil

import pytest
from conftest import ROOT, TINY
from processes import (
    arguments,
    assert_same_checkpoint,
    assert_same_run,
    finish,
    metrics_but_for_times,
    newest,
    read_metrics,
    start,
    wait_until,
)

from engine.checkpoint import CHECKPOINTS, checkpoints_in, load_checkpoint
from engine.files import COMPLETIONS_FILE, METRICS_FILE, UserError
from train_grpo import main

LINEAR = ("--lr_schedule", "linear", "--log_completions_every", 1)
EIGHT = ("--num_iterations", 8, *LINEAR)
MANY = ("--num_iterations", 60, "--checkpoint_every", 1, "--eval_every", 15, *LINEAR)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    finish(folder, *EIGHT)
    return folder


@pytest.fixture
def unfinished(uninterrupted, tmp_path, monkeypatch):
    """A folder whose run has checkpoints at 6 and 8 and was killed before its end."""
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    (folder / METRICS_FILE).unlink()
    monkeypatch.chdir(folder)
    assert [path.name for path in checkpoints_in(folder)] == ["6", "8"]
    return folder


def test_how_often_one_evaluates_changes_no_training(uninterrupted, tmp_path):
    finish(tmp_path, *EIGHT, "--eval_every", 2)
    assert_same_checkpoint(tmp_path, uninterrupted)
    metrics, other = (metrics_but_for_times(folder) for folder in (tmp_path, uninterrupted))
    assert metrics["iterations"] == other["iterations"]
    assert len(metrics["evaluations"]) == len(other["evaluations"]) + 2


@pytest.mark.slow
def test_a_hash_seed_of_python_changes_no_bit(uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    assert start(tmp_path / "run", *EIGHT).wait(timeout=180) == 0
    assert_same_run(tmp_path / "run", uninterrupted)


def test_another_seed_gives_another_run(uninterrupted, tmp_path):
    finish(tmp_path, "--num_iterations", 1, "--seed", 1)
    first, second = (read_metrics(folder)["iterations"][0] for folder in (uninterrupted, tmp_path))
    assert first["entropy"] != second["entropy"]


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(uninterrupted, unfinished):
    shutil.rmtree(unfinished / CHECKPOINTS / "8")
    lines, expected = (folder / COMPLETIONS_FILE for folder in (unfinished, uninterrupted))
    lines.write_bytes(lines.read_bytes()[:-30])  # the line of 7 is whole, that of 8 is not
    assert "resuming after iteration 6" in finish(unfinished, *EIGHT, "--resume")
    assert_same_run(unfinished, uninterrupted)
    assert lines.read_bytes() == expected.read_bytes()


def is_writing(folder) -> bool:
    """Whether a checkpoint is being written (or was, when the run was killed)."""
    return any((folder / CHECKPOINTS).glob("[0-9]*[0-9].tmp"))


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path):
    folder, calm = tmp_path / "killed", tmp_path / "calm"
    finish(calm, *MANY)
    kills = in_writing = 0
    while kills < 10 or in_writing < 4:
        goal = newest(folder) + 2
        process = start(folder, *MANY, *["--resume"] * bool(kills))
        wait_until(lambda goal=goal: newest(folder) >= goal, process)
        if in_writing < 4 and kills % 2 == 0 or kills > 8:
            wait_until(lambda: is_writing(folder), process)
        process.kill()
        process.wait()
        assert all((path / "manifest.json").exists() for path in checkpoints_in(folder))
        assert load_checkpoint(folder)[0]
        assert len(checkpoints_in(folder)) <= 3  # the oldest may be about to go
        lines = (folder / COMPLETIONS_FILE).read_bytes().split(b"\n")[:-1]
        assert [json.loads(line)["iteration"] for line in lines] == [*range(1, len(lines) + 1)]
        assert len(lines) >= newest(folder)
        in_writing += is_writing(folder)
        kills += 1
        assert kills < 25, f"only {in_writing} kills hit a checkpoint being written"
    finish(folder, *MANY, "--resume")
    assert_same_run(folder, calm)
    assert (folder / COMPLETIONS_FILE).read_bytes() == (calm / COMPLETIONS_FILE).read_bytes()


WEIGHTS = "policy.safetensors"
DAMAGE = {
    "stale": lambda folder: shutil.copy(folder.parent / "6" / WEIGHTS, folder),
    "half": lambda folder: os.truncate(folder / WEIGHTS, 2_000_000),
    "gone": lambda folder: (folder / WEIGHTS).unlink(),
    "manifest": lambda folder: (folder / "manifest.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_skipped_and_without_another_refused(unfinished, capsys, damage):
    folder = unfinished / CHECKPOINTS / "8"
    damage(folder)
    _, rest = load_checkpoint(unfinished)
    assert len(rest["metrics"]["iterations"]) == 6
    assert f"{folder} is damaged" in capsys.readouterr().out
    (unfinished / CHECKPOINTS / "6" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="--resume: no checkpoint"):
        finish(unfinished, *EIGHT, "--resume")


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path):
    flags = ("--resume", "--num_iterations", 1, "--eval_every", 0, "--policy", "plain")
    out = finish(tmp_path, *flags)
    assert "nothing to resume" in out and newest(tmp_path) == 1
    assert "policy plain: matches unpadded forward passes" in out
    assert read_metrics(tmp_path)["environment"]["policy"] == "plain"


def test_resuming_a_finished_run_changes_no_file(uninterrupted):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    assert "is finished" in finish(uninterrupted, *EIGHT, "--resume")
    assert before == {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}


SETTINGS = "--resume --learning_rate 2e-4 --beta 0.5 --seed 3 --eval_every 3"
CHANGED = "--beta was 0.04, is 0.5; --learning_rate was 0.0001, is 0.0002; --seed was 0, is 3"
REFUSED = {
    "a fresh start": ("", "--resume, choose another --output_dir"),
    "settings that change the training": (SETTINGS, f"settings: {CHANGED}$"),
    "another policy class": ("--resume --policy plain", "policy was 'tree', is 'plain'"),
    "another length of a falling rate": (
        "--resume --num_iterations 9",
        "settings: --num_iterations was 8, is 9$",
    ),
}


@pytest.mark.parametrize("flags, complaint", REFUSED.values(), ids=REFUSED)
def test_what_would_spoil_an_unfinished_run_is_refused(unfinished, flags, complaint):
    with pytest.raises(UserError, match=complaint):
        main(arguments(*EIGHT, *flags.split()))
    assert newest(unfinished) == 8


def test_resume_refuses_a_base_model_that_has_changed(unfinished, monkeypatch):
    monkeypatch.setattr("engine.run.fingerprint", lambda model: 1)
    with pytest.raises(UserError, match="base_model_crc32 was .*, is 1$"):
        main(arguments(*EIGHT, "--resume"))


def test_a_run_of_older_code_is_resumed(tmp_path):
    """A setting that its checkpoint does not know counts as that setting's default."""
    old = shutil.copytree(ROOT / "tests" / "old_run", tmp_path / "old")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, old / "model")
    flags = ("--model_name", "model", "--rewards", "judge.py", "--output_dir", "run")
    flags += ("--eval_problems", 4, "--eval_every", 0, "--learning_rate", "1e-3", "--resume")
    assert "resuming after iteration 4" in finish(old, *flags, "--num_iterations", 6)
    expected = json.loads((old / "expected.json").read_text())
    iterations = read_metrics(old / "run")["iterations"][4:]
    for found, recorded in zip(iterations, expected, strict=True):
        known = {name: found[name] for name in recorded}  # newer code records more
        assert known == pytest.approx(recorded, rel=1e-3, abs=1e-5)

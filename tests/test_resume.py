"""A run that was killed and resumed is bit-identical to an uninterrupted one."""

import json
import shutil
import signal

import pytest
import torch
from conftest import ROOT, TINY
from processes import (
    arguments,
    assert_same_run,
    finish,
    is_writing,
    newest,
    read_metrics,
    start,
    wait_until,
)

from engine.checkpoint import CHECKPOINTS, checkpoints_in, load_checkpoint
from engine.files import METRICS_FILE, UserError, sha256
from train_grpo import main

LENGTH = ("--num_iterations", 8)
MANY = ("--num_iterations", 60, "--checkpoint_every", 1, "--eval_every", 15)
MANY += ("--lr_schedule", "linear")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    finish(folder, *LENGTH)
    return folder


@pytest.fixture
def unfinished(uninterrupted, tmp_path, monkeypatch):
    """A folder whose run has checkpoints at 6 and 8 and was killed before its end."""
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    (folder / METRICS_FILE).unlink()
    monkeypatch.chdir(folder)
    return folder


def resume(*flags) -> int:
    return main(arguments(*LENGTH, "--resume", *flags))


def kill(process, folder, while_writing: bool, progress: int) -> bool:
    """Kill -9 after `progress` more iterations. Returns whether it was writing a checkpoint."""
    goal = newest(folder) + progress
    wait_until(lambda: newest(folder) >= goal, process)
    if while_writing:
        wait_until(lambda: is_writing(folder), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for checkpoint in checkpoints_in(folder):  # complete or absent
        assert (checkpoint / "manifest.json").exists()
    assert load_checkpoint(folder) is not None
    assert len(checkpoints_in(folder)) <= 3  # the oldest may be about to go
    return is_writing(folder)


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path):
    folder, calm = tmp_path / "killed", tmp_path / "calm"
    folder.mkdir()
    finish(calm, *MANY)
    kills = in_writing = 0
    while kills < 10 or in_writing < 4:
        flags = ["--resume"] if kills else []
        while_writing = in_writing < 4 and kills % 2 == 0 or kills > 8
        in_writing += kill(start(folder, *MANY, *flags), folder, while_writing, progress=2)
        kills += 1
        assert kills < 25, f"only {in_writing} kills hit a checkpoint being written"
    finish(folder, *MANY, "--resume")
    assert_same_run(folder, calm)


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(uninterrupted, tmp_path):
    folder, longer = tmp_path / "resumed", tmp_path / "longer"
    shutil.copytree(uninterrupted, folder)
    finish(longer, "--num_iterations", 12)
    out = finish(folder, "--num_iterations", 12, "--resume")
    assert "resuming after iteration 8" in out
    assert_same_run(folder, longer)


def test_the_last_two_checkpoints_are_kept(uninterrupted):
    assert [path.name for path in checkpoints_in(uninterrupted)] == ["6", "8"]


def test_a_checkpoint_holds_finite_tensors_of_every_part(uninterrupted):
    tensors, rest = load_checkpoint(uninterrupted)
    assert {name.split(".")[0] for name in tensors} == {"policy", "optimizer", "generators"}
    assert all(torch.isfinite(value.float()).all() for value in tensors.values())
    assert rest["problem_rng"][0] == 3 and rest["metrics"]["status"] == "running"


@pytest.mark.parametrize("damage", ["a bit", "half", "gone", "manifest"])
def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(unfinished, capsys, damage):
    newest_folder = checkpoints_in(unfinished)[-1]
    file = newest_folder / "policy.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "a bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "half":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "gone":
        file.unlink()
    else:
        (newest_folder / "manifest.json").write_text("[]")
    _, rest = load_checkpoint(unfinished)
    assert len(rest["metrics"]["iterations"]) == 6
    out = capsys.readouterr().out
    assert str(newest_folder) in out and "damaged" in out


def test_resume_is_refused_if_every_checkpoint_is_damaged(unfinished):
    for checkpoint in checkpoints_in(unfinished):
        (checkpoint / "state.json").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint"):
        resume()


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path):
    out = finish(tmp_path, "--resume", "--num_iterations", 1, "--eval_every", 0)
    assert "nothing to resume" in out and newest(tmp_path) == 1


def test_resuming_a_finished_run_changes_no_file(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert "is finished" in finish(folder, *LENGTH, "--resume")
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_fresh_start_over_an_unfinished_run_is_refused(unfinished):
    with pytest.raises(UserError, match="--resume, choose another --output_dir"):
        main(arguments(*LENGTH))
    assert newest(unfinished) == 8


def test_resume_refuses_settings_that_change_the_training(unfinished):
    with pytest.raises(UserError) as error:
        resume("--learning_rate", "2e-4", "--beta", 0.5, "--seed", 3, "--eval_every", 3)
    for text in ("--learning_rate was 0.0001, is 0.0002", "--beta was 0.04, is 0.5", "--seed"):
        assert text in str(error.value)
    assert "eval_every" not in str(error.value)


def test_resume_refuses_another_policy_class(unfinished):
    assert load_checkpoint(unfinished)[1]["metrics"]["environment"]["policy"] == "tree"
    with pytest.raises(UserError, match="policy was 'tree', is 'plain'"):
        resume("--policy", "plain")


def test_the_plain_policy_can_be_named(tmp_path):
    out = finish(tmp_path, "--policy", "plain", "--num_iterations", 1, "--eval_every", 0)
    assert "policy plain: matches unpadded forward passes" in out
    assert read_metrics(tmp_path)["environment"]["policy"] == "plain"


def rewrite(checkpoint, rest: dict) -> None:
    """Put `rest` into a checkpoint, with matching checksums."""
    (checkpoint / "state.json").write_text(json.dumps(rest))
    (checkpoint / "manifest.json").unlink()
    sums = {path.name: sha256(path) for path in checkpoint.iterdir()}
    (checkpoint / "manifest.json").write_text(json.dumps({"sha256": sums}))


def test_resume_refuses_a_base_model_that_has_changed(unfinished):
    _, rest = load_checkpoint(unfinished)
    rest["metrics"]["environment"]["base_model_crc32"] += 1
    rewrite(unfinished / CHECKPOINTS / "8", rest)
    with pytest.raises(UserError, match="base_model_crc32"):
        resume()


def test_a_falling_rate_fixes_the_number_of_iterations(unfinished):
    _, rest = load_checkpoint(unfinished)
    rest["metrics"]["config"]["lr_schedule"] = "linear"
    rewrite(unfinished / CHECKPOINTS / "8", rest)
    with pytest.raises(UserError, match="settings: --num_iterations was 8, is 9$"):
        resume("--lr_schedule", "linear", "--num_iterations", 9)


def test_a_run_of_older_code_is_resumed(tmp_path, monkeypatch):
    """A setting that its checkpoint does not know counts as that setting's default."""
    old = ROOT / "tests" / "old_run"
    for part in ("run", "model"):
        shutil.copytree(old / part, tmp_path / part)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path / "model")
    shutil.copy(old / "judge.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    _, state = load_checkpoint(tmp_path / "run")
    del state["metrics"]["config"]["lr_schedule"]
    rewrite(tmp_path / "run" / CHECKPOINTS / "4", state)
    flags = ("--model_name", "model", "--rewards", "judge.py", "--output_dir", "run")
    flags += ("--eval_problems", 4, "--eval_every", 0, "--learning_rate", "1e-3", "--resume")
    assert "resuming after iteration 4" in finish(tmp_path, *flags, "--num_iterations", 6)
    expected = json.loads((old / "expected.json").read_text())
    iterations = read_metrics(tmp_path / "run")["iterations"][4:]
    for found, recorded in zip(iterations, expected, strict=True):
        del found["seconds"]
        assert found == pytest.approx(recorded, rel=1e-3, abs=1e-5)

"""A killed run that is resumed is the run that was never killed."""

import json
import shutil
import signal

import pytest
import torch
from processes import (
    FLAGS,
    assert_same_run,
    finish,
    is_writing,
    newest,
    start,
    wait_until,
)

from checkpoint import CHECKPOINTS, METRICS_FILE, checkpoints_in, load_checkpoint
from cli import UserError
from train_grpo import main

LENGTH = ("--num_iterations", 12)
MANY = ("--num_iterations", 60, "--checkpoint_every", 1, "--eval_every", 15)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    folder.mkdir()
    finish(folder, *LENGTH)
    return folder


@pytest.fixture
def unfinished(undisturbed, tmp_path, monkeypatch):
    """A folder whose run has two checkpoints, the second at 12, and was killed before its end."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    (folder / METRICS_FILE).unlink()
    monkeypatch.chdir(folder)
    return folder


def arguments(*flags) -> list[str]:
    return [str(flag) for flag in (*FLAGS, *LENGTH, *flags)]


def kill(process, folder, while_writing: bool, progress: int) -> bool:
    """Kill -9 once `progress` checkpoints more are there. Returns whether it was writing one."""
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


def test_killed_and_resumed_a_run_ends_bit_for_bit_as_an_undisturbed_one(undisturbed, tmp_path):
    folder = tmp_path / "killed"
    folder.mkdir()
    kill(start(folder, *LENGTH), folder, while_writing=True, progress=2)
    before = newest(folder)
    assert f"resuming after iteration {before}" in finish(folder, *LENGTH, "--resume")
    assert_same_run(folder, undisturbed)


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path):
    folder, calm = tmp_path / "killed", tmp_path / "calm"
    folder.mkdir()
    calm.mkdir()
    finish(calm, *MANY)
    kills = in_writing = 0
    while kills < 10 or in_writing < 4:
        resume = ["--resume"] if kills else []
        while_writing = in_writing < 4 and kills % 2 == 0 or kills > 8
        in_writing += kill(start(folder, *MANY, *resume), folder, while_writing, progress=2)
        kills += 1
        assert kills < 25, f"only {in_writing} kills hit a checkpoint being written"
    finish(folder, *MANY, "--resume")
    assert_same_run(folder, calm)


def test_the_last_two_checkpoints_are_kept(undisturbed):
    assert len(checkpoints_in(undisturbed)) == 2 and newest(undisturbed) == 12


def test_a_longer_run_resumed_from_a_shorter_one_is_the_longer_run(undisturbed, tmp_path):
    folder, longer = tmp_path / "resumed", tmp_path / "longer"
    shutil.copytree(undisturbed, folder)
    longer.mkdir()
    finish(longer, "--num_iterations", 16)
    finish(folder, "--num_iterations", 16, "--resume")
    assert_same_run(folder, longer)


@pytest.mark.parametrize("damage", ["a bit", "half", "gone", "manifest"])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_word(unfinished, capsys, damage):
    before, last = checkpoints_in(unfinished)
    file = last / "policy.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "a bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "half":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "gone":
        file.unlink()
    else:
        (file.parent / "manifest.json").write_text("[]")
    tensors, rest = load_checkpoint(unfinished)
    assert len(rest["metrics"]["iterations"]) == int(before.name) < 12
    out = capsys.readouterr().out
    assert str(file.parent) in out and "damaged" in out


def test_where_every_checkpoint_is_damaged_nothing_is_started(unfinished):
    for checkpoint in checkpoints_in(unfinished):
        (checkpoint / "state.json").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint"):
        main(arguments("--resume"))


def test_nothing_to_resume_starts_afresh_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments("--resume", "--num_iterations", 1, "--eval_every", 0)) == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert newest(tmp_path) == 1


def test_a_finished_run_is_not_resumed_and_says_so(undisturbed, tmp_path, monkeypatch, capsys):
    shutil.copytree(undisturbed, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    assert main(arguments("--resume")) == 0
    assert "finished" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}


def test_a_plain_start_over_an_unfinished_run_is_refused(unfinished):
    with pytest.raises(UserError) as error:
        main(arguments())
    assert "--resume" in str(error.value) and "--output_dir" in str(error.value)
    assert newest(unfinished) == 12


def test_settings_that_change_the_mathematics_must_be_equal_and_each_is_named(unfinished):
    other = ("--learning_rate", "2e-4", "--beta", 0.5, "--seed", 3, "--eval_every", 3)
    with pytest.raises(UserError) as error:
        main(arguments("--resume", *other))
    for text in ("--learning_rate was 0.0001, is 0.0002", "--beta was 0.04, is 0.5", "--seed"):
        assert text in str(error.value)
    assert "eval_every" not in str(error.value)
    assert newest(unfinished) == 12


def test_a_base_model_that_has_changed_is_noticed(unfinished, tmp_path):
    path = unfinished / CHECKPOINTS / "12"
    shutil.rmtree(checkpoints_in(unfinished)[0])
    tensors, rest = load_checkpoint(unfinished)
    rest["metrics"]["environment"]["base_model_crc32"] += 1
    rewrite(path, rest)
    with pytest.raises(UserError, match="base_model_crc32"):
        main(arguments("--resume"))


@pytest.mark.parametrize("part", ["metrics", "problems", "config"])
def test_a_checkpoint_from_elsewhere_is_refused_in_one_line(unfinished, part):
    shutil.rmtree(checkpoints_in(unfinished)[0])
    _, rest = load_checkpoint(unfinished)
    if part == "config":
        rest["metrics"]["config"] = ["exec"]
    else:
        rest[part] = {"__reduce__": "os.system"}
    rewrite(unfinished / CHECKPOINTS / "12", rest)
    with pytest.raises(UserError, match="--resume"):
        main(arguments("--resume"))


def rewrite(checkpoint, rest: dict) -> None:
    """Put `rest` into a checkpoint, with checksums that match."""
    from checkpoint import sha256

    (checkpoint / "state.json").write_text(json.dumps(rest))
    (checkpoint / "manifest.json").unlink()
    sums = {path.name: sha256(path) for path in checkpoint.iterdir()}
    (checkpoint / "manifest.json").write_text(json.dumps({"sha256": sums}))


def test_a_checkpoint_holds_finite_tensors_of_every_part(undisturbed):
    tensors, rest = load_checkpoint(undisturbed)
    assert {name.split(".")[0] for name in tensors} == {"policy", "optimizer", "sampler"}
    assert all(torch.isfinite(value.float()).all() for value in tensors.values())
    assert rest["problems"][0] == 3 and rest["metrics"]["status"] == "running"

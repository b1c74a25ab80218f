"""A disk that fills up, a folder that cannot be written or is deleted, numbers that go wrong."""

import math
import os
import resource
import shutil
import signal
import subprocess

import pytest
import torch
from processes import FLAGS, finish, newest, printed, start, wait_until

import train_grpo
from checkpoint import METRICS_FILE, load_checkpoint, read_json
from cli import UserError
from train_grpo import main


def arguments(*flags) -> list[str]:
    return [str(flag) for flag in (*FLAGS, "--eval_every", 0, *flags)]


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for 30 MB: two checkpoints (12.7 MB each), not three."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def assert_refused(process, folder, text: str) -> None:
    assert process.wait(timeout=100) == 2, printed(folder)
    assert "Traceback" not in printed(folder)
    assert text in printed(folder).splitlines()[-1]


def test_a_full_disk_is_a_clear_error_and_leaves_the_last_good_checkpoint(small_disk):
    process = start(small_disk, "--num_iterations", 100, "--eval_every", 0)
    assert_refused(process, small_disk, "No space left on device")
    assert "--resume" in printed(small_disk).splitlines()[-1]
    tensors, rest = load_checkpoint(small_disk)
    assert len(rest["metrics"]["iterations"]) == newest(small_disk) >= 1
    assert not list(small_disk.rglob("*.tmp"))  # half a file would be in the way


def test_a_file_size_limit_is_a_clear_error_and_leaves_the_last_good_checkpoint(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    finish(folder, "--num_iterations", 2, "--eval_every", 0)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))

    flags = ["--num_iterations", 100, "--eval_every", 0, "--resume"]
    assert_refused(start(folder, *flags, preexec_fn=limit), folder, "File too large")
    assert newest(folder) == 2 and load_checkpoint(folder) is not None
    assert not list(folder.rglob("*.tmp"))


def test_a_folder_deleted_while_running_is_a_clear_error(tmp_path):
    folder, away = tmp_path / "run", tmp_path / "away"
    folder.mkdir()
    flags = ["--num_iterations", 100000, "--eval_every", 0, "--output_dir", folder]
    process = start(folder, *flags)
    wait_until(lambda: newest(folder) >= 1, process)
    folder.rename(away)
    shutil.rmtree(away)
    assert_refused(process, folder, "No such file or directory")
    assert not folder.exists()


def test_a_read_only_folder_is_refused_before_anything_is_trained(small_disk, capsys):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="Read-only file system"):
        main(arguments("--output_dir", small_disk))
    assert "parameters on" not in capsys.readouterr().out


def spoil(monkeypatch, updates) -> None:
    """Let the loss of the updates numbered in `updates` (from 0) be NaN."""
    sound, count = train_grpo.grpo_loss, iter(range(10**9))

    def loss(*inputs):
        value, stats = sound(*inputs)
        if next(count) in updates:
            value, stats = value * math.nan, stats | {"loss": value.detach() * math.nan}
        return value, stats

    monkeypatch.setattr(train_grpo, "grpo_loss", loss)


def test_an_update_that_is_not_finite_is_skipped_counted_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spoil(monkeypatch, {3})
    assert main(arguments("--num_iterations", 4)) == 0
    metrics = read_json(tmp_path / METRICS_FILE)
    assert [m["skipped_updates"] for m in metrics["iterations"]] == [0, 1, 0, 0]
    assert all(math.isfinite(m["loss"]) for m in metrics["iterations"])
    assert "iteration 2: 1 update skipped" in capsys.readouterr().out
    tensors, _ = load_checkpoint(tmp_path)
    assert all(torch.isfinite(t).all() for n, t in tensors.items() if n != "sampler")


def test_a_gradient_that_is_not_finite_is_skipped_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip, count = torch.nn.utils.clip_grad_norm_, iter(range(10**9))

    def norm(parameters, limit):
        parameters = list(parameters)
        if next(count) == 1:
            parameters[0].grad[0] = math.inf
        return clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", norm)
    assert main(arguments("--num_iterations", 2)) == 0
    history = read_json(tmp_path / METRICS_FILE)["iterations"]
    assert [m["skipped_updates"] for m in history] == [1, 0]


def test_ten_in_a_row_stop_the_run_with_a_checkpoint_from_before_the_trouble(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    spoil(monkeypatch, range(8, 1000))  # from the fifth iteration on
    assert main(arguments("--num_iterations", 100)) == 1
    metrics = read_json(tmp_path / METRICS_FILE)
    assert metrics["status"] == "failed" and "10 updates in a row" in metrics["stop_reason"]
    assert len(metrics["iterations"]) == 9
    out = capsys.readouterr().out
    assert "hint" in out and "--learning_rate" in out
    tensors, rest = load_checkpoint(tmp_path)
    assert newest(tmp_path) == 3 and len(rest["metrics"]["iterations"]) == 3
    assert all(torch.isfinite(t).all() for n, t in tensors.items() if n != "sampler")


def test_a_stop_while_the_model_loads_leaves_nothing(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    process = start(folder, "--num_iterations", 100)
    wait_until(lambda: "preset tiny" in printed(folder) or os.listdir(folder), process)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    assert not (folder / "saved_model").exists() and newest(folder) == 0

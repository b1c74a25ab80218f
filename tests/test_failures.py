"""A file system that fails, and numbers that are not finite."""

import math
import resource
import shutil

import pytest
import torch
from processes import arguments, finish, newest, read_metrics

import train_grpo
from engine.checkpoint import load_checkpoint
from engine.files import UserError

NEVER = ("--eval_every", 0)


def test_a_failed_write_leaves_the_last_checkpoint_intact(tmp_path):
    finish(tmp_path, "--num_iterations", 2, *NEVER)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, hard))  # a checkpoint file has 4 MB
    try:
        with pytest.raises(UserError, match="File too large.*--resume goes on"):
            train_grpo.main(
                arguments("--num_iterations", 9, *NEVER, "--resume", "--output_dir", tmp_path)
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert newest(tmp_path) == 2 and load_checkpoint(tmp_path) is not None
    assert not list(tmp_path.rglob("*.tmp"))  # they would fill the disk


def test_deleting_the_folder_stops_the_run(tmp_path, monkeypatch):
    folder, real = tmp_path / "run", train_grpo.train_iteration

    def iteration(*inputs):
        if newest(folder):
            shutil.rmtree(folder)
        return real(*inputs)

    monkeypatch.setattr(train_grpo, "train_iteration", iteration)
    with pytest.raises(UserError, match="No such file or directory"):
        train_grpo.main(arguments("--num_iterations", 9, *NEVER, "--output_dir", folder))
    assert not folder.exists()


def spoil_loss(monkeypatch, updates) -> None:
    """Make the loss of the updates numbered in `updates` (from 0) NaN."""
    sound, count = train_grpo.grpo_loss, iter(range(10**9))

    def loss(*inputs):
        value, stats = sound(*inputs)
        if next(count) in updates:
            value, stats = value * math.nan, stats | {"loss": value.detach() * math.nan}
        return value, stats

    monkeypatch.setattr(train_grpo, "grpo_loss", loss)


def assert_finite_checkpoint(folder) -> None:
    tensors, _ = load_checkpoint(folder)
    assert all(torch.isfinite(value.float()).all() for value in tensors.values())


def test_an_update_with_a_nan_loss_is_skipped_and_reported(tmp_path, monkeypatch):
    spoil_loss(monkeypatch, {3})
    out = finish(tmp_path, "--num_iterations", 4, *NEVER)
    history = read_metrics(tmp_path)["iterations"]
    assert [m["skipped_updates"] for m in history] == [0, 1, 0, 0]
    assert all(math.isfinite(m["loss"]) for m in history)
    assert "iteration 2: skipped 1 of 2 updates" in out
    assert_finite_checkpoint(tmp_path)


def test_an_update_with_an_infinite_gradient_is_skipped(tmp_path, monkeypatch):
    clip, count = torch.nn.utils.clip_grad_norm_, iter(range(10**9))

    def norm(parameters, limit):
        parameters = list(parameters)
        if next(count) == 1:
            parameters[0].grad[0] = math.inf
        return clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", norm)
    finish(tmp_path, "--num_iterations", 2, *NEVER)
    assert [m["skipped_updates"] for m in read_metrics(tmp_path)["iterations"]] == [1, 0]
    assert_finite_checkpoint(tmp_path)


def test_ten_skipped_updates_end_the_run_as_failed(tmp_path, monkeypatch):
    spoil_loss(monkeypatch, range(8, 1000))  # from the fifth iteration on
    out = finish(tmp_path, "--num_iterations", 100, *NEVER, code=1)
    metrics = read_metrics(tmp_path)
    assert metrics["status"] == "failed" and "10 updates in a row" in metrics["stop_reason"]
    assert len(metrics["iterations"]) == 9
    assert "smaller --learning_rate" in out.split("next")[1]
    assert newest(tmp_path) == 3  # from before the trouble
    assert_finite_checkpoint(tmp_path)

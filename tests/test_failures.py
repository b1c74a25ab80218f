"""A folder or device that fails, full memory, and numbers that are not finite."""

import math
import resource
import shutil
from unittest.mock import Mock

import pytest
import torch
from processes import arguments, finish, newest, read_metrics

import train_grpo
from engine import distributed
from engine.checkpoint import load_checkpoint
from engine.files import UserError, exit_code, locked_folder
from engine.machine import choose_device
from engine.tree import TreePolicy

NEVER = ("--eval_every", 0)


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    with locked_folder(tmp_path), pytest.raises(UserError, match=f"{tmp_path}: another run"):
        train_grpo.main(arguments("--num_iterations", 1, "--output_dir", tmp_path))


def test_a_failed_write_leaves_the_last_checkpoint_intact(tmp_path):
    finish(tmp_path, "--num_iterations", 2, *NEVER)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, hard))  # a checkpoint file has 4 MB
    try:
        with pytest.raises(UserError, match="File too large.*--resume"):
            finish(tmp_path, "--num_iterations", 9, *NEVER, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert newest(tmp_path) == 2 and load_checkpoint(tmp_path)[0]
    assert not list(tmp_path.rglob("*.tmp"))  # they would fill the disk


def test_deleting_the_folder_stops_the_run(tmp_path, monkeypatch):
    folder, real = tmp_path / "run", train_grpo.train_iteration

    def iteration(*inputs):
        if newest(folder):
            shutil.rmtree(folder)
        return real(*inputs)

    monkeypatch.setattr(train_grpo, "train_iteration", iteration)
    with pytest.raises(UserError, match="No such file or directory.*another --output_dir"):
        train_grpo.main(arguments("--num_iterations", 9, *NEVER, "--output_dir", folder))
    assert not folder.exists()


GPU = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB."
FULL_GPU = Mock(side_effect=torch.OutOfMemoryError(GPU))


@pytest.mark.parametrize(
    "owner, name, fill, reason",
    [
        (TreePolicy, "forward", FULL_GPU, "2.50 GiB)"),  # at the start
        # In the trial of one update.
        (torch.Tensor, "backward", lambda *_: torch.empty(2**50, dtype=torch.uint8), "624 bytes)"),
        (train_grpo, "grpo_loss", FULL_GPU, "2.50 GiB)"),
    ],
)
def test_full_memory_is_one_line_that_names_the_flags(
    tmp_path, monkeypatch, capsys, owner, name, fill, reason
):
    monkeypatch.setattr(owner, name, fill)
    argv = arguments(*NEVER, "--output_dir", tmp_path)
    assert exit_code(lambda: train_grpo.main(argv)) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert reason in line and "lower --micro_batch_size, --batch_size or" in line


@pytest.mark.parametrize("kind", [RuntimeError, torch.cuda.DeferredCudaCallError])
def test_a_failing_device_is_reported_with_its_reason(monkeypatch, kind):
    error = kind("CUDA error: device is busy\nCUDA kernel errors might be reported later")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(distributed, "local_device", Mock(side_effect=error))
    with pytest.raises(UserError, match=r"cuda .*\(CUDA error: device is busy\); .*cpu$"):
        choose_device("auto")


def test_bad_updates_are_skipped_and_ten_end_the_run(tmp_path, monkeypatch):
    """A gradient is infinite in the second update of iteration 2; losses are NaN from the fifth."""
    clip, loss, norms = torch.nn.utils.clip_grad_norm_, train_grpo.grpo_loss, []

    def clip_gradient(parameters, limit):
        parameters = list(parameters)
        if len(norms) == 3:
            parameters[0].grad[0] = math.inf
        norms.append(clip(parameters, limit))
        return norms[-1]

    def spoil_loss(*inputs):
        value, stats = loss(*inputs)
        return value * math.nan if len(norms) >= 8 else value, stats

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_gradient)
    monkeypatch.setattr(train_grpo, "grpo_loss", spoil_loss)
    out = finish(tmp_path, "--num_iterations", 100, *NEVER, code=1)
    metrics = read_metrics(tmp_path)
    skipped = [iteration["skipped_updates"] for iteration in metrics["iterations"]]
    assert skipped == [0, 1, 0, 0, 2, 2, 2, 2, 2]
    assert "iteration 2: skipped 1 of 2 updates" in out
    assert metrics["status"] == "failed" and "10 updates in a row" in metrics["stop_reason"]
    assert "smaller --learning_rate" in out.split("next")[1]
    assert newest(tmp_path) == 3  # from before the trouble
    assert all(value.isfinite().all() for value in load_checkpoint(tmp_path)[0].values())

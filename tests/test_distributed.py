"""Several processes compute what one computes, and stop and fail together."""

import os
import shutil
import signal
import subprocess
from unittest.mock import Mock

import psutil
import pytest
import torch
from conftest import ROOT
from on_each_rank import given
from processes import (
    assert_same_run,
    finish,
    metrics_but_for_times,
    newest,
    printed,
    read_metrics,
    start,
    torchrun,
    wait_until,
)
from small_models import assert_same_gradients

from engine import distributed
from engine.checkpoint import load_checkpoint
from engine.files import UserError

ENDLESS = ("--num_iterations", 100000)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(folder with what two processes did, what they printed)."""
    folder = tmp_path_factory.mktemp("two")
    finish(folder / "one_process", "--num_iterations", 2)
    shutil.copytree(folder / "one_process", folder / "before")
    command = [*torchrun(2), ROOT / "tests/on_each_rank.py", folder]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout
    return folder, done.stdout


def test_two_processes_compute_what_one_does_and_stay_bit_identical(two):
    alone, together = given(), torch.load(two[0] / "0.pt")
    second = torch.load(two[0] / "1.pt")
    for case, (metrics, tensors) in alone.items():
        for mine, its in zip(metrics, together[case][0], strict=True):
            assert its["logprob_mismatch"] < 1e-4
            own = ["seconds", "rollout_seconds", "logprob_mismatch"]
            if case == "one process without signal":  # kl is read on a group of each
                own += ["kl", "kl_penalty", "kl_tokens"]
                assert its["kl_tokens"] > mine["kl_tokens"]
            assert its | {name: mine[name] for name in own} == pytest.approx(
                mine, rel=1e-4, abs=1e-7
            )
        assert_same_gradients(together[case][1], tensors)
        assert all(each.equal(second[case][1][name]) for name, each in together[case][1].items())
        assert metrics[1]["kl"] > 0
    cases = ("whole batch", "dapo", "dr_grpo")
    assert len({alone[case][0][0]["grad_norm"] for case in cases}) == 3


def test_a_distributed_run_resumes_bit_identically(two):
    assert read_metrics(two[0] / "whole")["environment"]["processes"] == 2
    assert_same_run(two[0] / "parts", two[0] / "whole")


def test_each_process_samples_with_its_own_seed(two):
    states = load_checkpoint(two[0] / "whole")[0]["generators"].chunk(2)
    # Compare seeds, not states: two states of one seed differ if one process has drawn more.
    first, second = (torch.Generator().set_state(s.clone()).initial_seed() for s in states)
    assert first == 0 and second % 2**32 != 0


@pytest.mark.parametrize("iteration", [0, 25])
def test_no_two_ranks_share_the_lowest_32_seed_bits(monkeypatch, iteration):
    seeds = []
    for rank in range(1024):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        seeds.append(distributed.rank_seed(2**32 - 1, iteration) % 2**32)
    assert len(set(seeds)) == 1024
    assert iteration or seeds[0] == 2**32 - 1


def test_one_and_two_processes_resume_runs_of_each_other(two, tmp_path):
    folder, out = two
    run = shutil.copytree(folder / "whole", tmp_path / "run")
    assert "processes: 1 before, 2 now" in out
    assert "processes: 2 before, 1 now" in finish(run, "--num_iterations", 6, "--resume")
    for pair in (folder / "before", folder / "one_process"), (folder / "whole", run):
        before, after = (metrics_but_for_times(each)["iterations"] for each in pair)
        assert after[: len(before)] == before and len(after) == len(before) + 2


@pytest.mark.parametrize("cuda, backend", [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_cpu_tensors_travel_by_gloo_and_cuda_tensors_by_nccl(monkeypatch, cuda, backend):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    dist = Mock()
    dist.is_torchelastic_launched.return_value = False  # so this is rank 0
    dist.rendezvous.return_value = iter([("a store", 0, 2)])
    monkeypatch.setattr(distributed, "dist", dist)
    with distributed.process_group():
        pass
    assert dist.init_process_group.call_args.args == (backend,)


def test_only_rank_0_prints(two):
    assert two[1].count("parameters on cpu") == 4  # once per run


def test_shards_are_disjoint_equal_and_complete(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(distributed.shard(list(range(10))))
    assert sum(parts, []) == list(range(10))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_an_error_on_one_rank_stops_all(monkeypatch):
    monkeypatch.setattr(distributed, "all_gather", lambda mine: [None, UserError("no such model")])
    with pytest.raises(UserError, match="no such model"), distributed.sync_errors():
        pass
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    with pytest.raises(SystemExit), distributed.sync_errors():  # rank 0 prints it
        pass


@pytest.mark.slow
def test_torchrun_with_an_uneven_batch_exits_in_order(tmp_path):
    folder = tmp_path / "run"
    process = start(folder, "--batch_size", 3, launcher=torchrun(2))
    assert process.wait(timeout=100) == 1  # torchrun's own
    report = printed(folder)
    errors = [line for line in report.splitlines() if line.startswith("error:")]
    assert errors == ["error: --batch_size 3: must be a multiple of 2 (processes)"]
    assert "exitcode  : 2" in report and "SIGABRT" not in report
    assert not list(folder.iterdir())


def workers(process) -> dict[str, psutil.Process]:
    """The processes of a torchrun, by rank."""
    return {worker.environ()["RANK"]: worker for worker in psutil.Process(process.pid).children()}


@pytest.mark.slow
def test_a_killed_process_ends_all_and_restarts_change_nothing(tmp_path):
    folder, calm, length = tmp_path / "killed", tmp_path / "calm", ("--num_iterations", 30)
    assert start(calm, *length, launcher=torchrun(2)).wait(timeout=300) == 0
    process = start(folder, *length, "--resume", launcher=torchrun(2, "--max_restarts=1"))
    for rank, iteration in (("1", 6), ("0", 16)):
        wait_until(lambda iteration=iteration: newest(folder) >= iteration, process)
        last = workers(process)
        last[rank].kill()
    assert process.wait(timeout=60) == 1  # restarted once, then not again
    assert not any(worker.is_running() for worker in last.values())
    report = printed(folder).split("Root Cause")[1]
    assert "rank      : 0 " in report and "SIGKILL" in report
    assert start(folder, *length, "--resume", launcher=torchrun(2)).wait(timeout=300) == 0
    assert printed(folder).count("resuming after iteration") == 2
    assert_same_run(folder, calm)


@pytest.mark.slow
@pytest.mark.parametrize(
    "to, number", [("torchrun", signal.SIGINT), ("one process", signal.SIGTERM)], ids=str
)
def test_a_signal_to_any_process_saves_and_ends_all(tmp_path, to, number):
    folder = tmp_path / "run"
    process = start(folder, *ENDLESS, launcher=torchrun(2))
    wait_until(lambda: newest(folder) >= 2, process)
    os.kill(process.pid if to == "torchrun" else workers(process)["1"].pid, number)
    assert process.wait(timeout=60) == 1  # torchrun's own, whatever the processes return
    metrics = read_metrics(folder)
    assert metrics["status"] == "interrupted" and metrics["stop_reason"] == number.name
    assert newest(folder) == len(metrics["iterations"])
    assert "torchrun --standalone --nproc_per_node=2" in printed(folder).split("to continue")[1]

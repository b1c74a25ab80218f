"""Several processes compute what one computes, and stop and fail together."""

import json
import os
import shutil
import signal
import subprocess

import pytest
import torch
from conftest import ROOT
from on_each_rank import SETTINGS, three_iterations
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
from safetensors.torch import load_file

from engine import distributed
from engine.checkpoint import load_checkpoint
from engine.files import METRICS_FILE, UserError

ENDLESS = ("--num_iterations", 100000)


def on_each_rank(processes: int, *arguments) -> str:
    command = [*torchrun(processes), str(ROOT / "tests/on_each_rank.py"), *map(str, arguments)]
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def alone():
    """What one process makes of the given completions, by case."""
    return {case: three_iterations(**settings) for case, settings in SETTINGS.items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(folder with what two processes did, what they printed)."""
    folder = tmp_path_factory.mktemp("two")
    finish(folder / "one_process", "--num_iterations", 2)
    shutil.copytree(folder / "one_process", folder / "before")
    return folder, on_each_rank(2, folder, "steps", "runs")


def assert_equal_to_one_process(folder, processes: int, alone: dict) -> None:
    for case, (metrics, tensors) in alone.items():
        for rank in range(processes):
            theirs = json.loads((folder / f"{case}.{rank}.json").read_text())
            for mine, its in zip(metrics, theirs, strict=True):
                assert its["completions"] * processes == mine["completions"] == 16
                assert its["logprob_mismatch"] < 1e-4  # rounding
                own = {n: mine[n] for n in ("completions", "seconds", "logprob_mismatch")}
                assert its | own == pytest.approx(mine, rel=1e-5, abs=1e-6)
            found = load_file(folder / f"{case}.{rank}.safetensors")
            assert found.keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert (found[name] - tensor).abs().max() < 1e-6, name


def test_two_processes_compute_gradients_and_weights_of_one(two, alone):
    metrics, tensors = alone["whole batch"]
    assert len({iteration["loss"] for iteration in metrics}) == 3  # it does learn
    assert metrics[0]["frac_zero_std_groups"] < 1 and metrics[1]["kl"] > 0
    assert max(g.abs().max() for n, g in tensors.items() if "gradient" in n) > 1e-3
    assert len({alone[case][0][0]["grad_norm"] for case in ("whole batch", "dapo", "dr_grpo")}) == 3
    assert_equal_to_one_process(two[0], 2, alone)


@pytest.mark.slow
def test_four_processes_compute_gradients_and_weights_of_one(alone, tmp_path):
    on_each_rank(4, tmp_path, "steps")
    assert_equal_to_one_process(tmp_path, 4, alone)


def test_all_processes_hold_bit_identical_weights(two):
    for case in SETTINGS:
        first, second = (load_file(two[0] / f"{case}.{rank}.safetensors") for rank in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_distributed_run_resumes_bit_identically(two):
    for name in ("whole", "parts"):  # output_dir is the one setting that differs
        metrics = read_metrics(two[0] / name)
        assert metrics["environment"]["processes"] == 2
        metrics["config"]["output_dir"] = "."
        (two[0] / name / METRICS_FILE).write_text(json.dumps(metrics))
    assert_same_run(two[0] / "parts", two[0] / "whole")


def test_each_process_samples_with_its_own_seed(two):
    tensors, _ = load_checkpoint(two[0] / "whole")
    states = tensors["generators"].chunk(2)
    # Compare seeds, not states: two states of one seed differ if one process has drawn more.
    first, second = (torch.Generator().set_state(s.clone()).initial_seed() for s in states)
    assert first == 0 and second % 2**32 != 0
    alone, _ = load_checkpoint(two[0] / "before")
    assert len(alone["generators"]) == len(states[0])


@pytest.mark.parametrize("iteration", [0, 25])
def test_no_two_ranks_share_the_lowest_32_seed_bits(monkeypatch, iteration):
    seeds = []
    for rank in range(1024):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        seeds.append(distributed.rank_seed(2**32 - 1, iteration) % 2**32)
    assert len(set(seeds)) == 1024
    assert iteration or seeds[0] == 2**32 - 1


def test_two_processes_resume_the_run_of_one(two):
    folder, out = two
    assert "processes: 1 before, 2 now" in out
    before, after = (metrics_but_for_times(folder / n) for n in ("before", "one_process"))
    assert after["iterations"][:2] == before["iterations"]
    assert len(after["iterations"]) == 4 and after["status"] == "finished"


def test_one_process_resumes_the_run_of_two(two, tmp_path):
    shutil.copytree(two[0] / "whole", tmp_path / "run")
    out = finish(tmp_path / "run", "--num_iterations", 6, "--resume")
    assert "processes: 2 before, 1 now" in out
    before, after = (metrics_but_for_times(f) for f in (two[0] / "whole", tmp_path / "run"))
    assert after["iterations"][:4] == before["iterations"] and len(after["iterations"]) == 6


def test_only_rank_0_prints(two):
    assert two[1].count("finished after 4 iterations") == 3
    assert two[1].count("preset tiny") == 4


def test_evaluations_cover_all_problems(two):
    for evaluation in read_metrics(two[0] / "whole")["evaluations"]:
        assert evaluation["accuracies"]["greedy"]["problems"] == 8


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
    folder.mkdir()
    process = start(folder, "--batch_size", 3, launcher=torchrun(2))
    assert process.wait(timeout=100) == 1  # torchrun's own
    report = printed(folder)
    errors = [line for line in report.splitlines() if line.startswith("error:")]
    assert errors == ["error: --batch_size 3: must be a multiple of 2 (processes)"]
    assert "exitcode  : 2" in report and "SIGABRT" not in report
    assert not list(folder.iterdir())


def workers(process) -> dict[int, int]:
    """The process ids of a torchrun's processes, by rank."""
    ps = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    found = {}
    for pid in subprocess.run(ps, capture_output=True, text=True).stdout.split():
        with open(f"/proc/{pid}/environ") as file:
            ranks = [v[5:] for v in file.read().split("\0") if v.startswith("RANK=")]
        found |= {int(rank): int(pid) for rank in ranks}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_all_and_is_named(tmp_path, rank):
    folder = tmp_path / "run"
    folder.mkdir()
    process = start(folder, *ENDLESS, launcher=torchrun(2))
    wait_until(lambda: newest(folder) >= 2, process)
    pids = workers(process)
    os.kill(pids[rank], signal.SIGKILL)
    assert process.wait(timeout=60) == 1
    report = printed(folder).split("Root Cause")[1]
    assert f"rank      : {rank} " in report and "SIGKILL" in report
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids.values())
    assert load_checkpoint(folder) is not None


@pytest.mark.slow
def test_restarts_after_kills_end_bit_identical_to_uninterrupted(tmp_path):
    folder, calm = tmp_path / "killed", tmp_path / "calm"
    length = ("--num_iterations", 30)
    for place in (folder, calm):
        place.mkdir()
    assert start(calm, *length, launcher=torchrun(2)).wait(timeout=300) == 0
    process = start(folder, *length, "--resume", launcher=torchrun(2, "--max_restarts=3"))
    for rank, iteration in ((1, 6), (0, 16)):
        wait_until(lambda iteration=iteration: newest(folder) >= iteration, process)
        wait_until(lambda rank=rank: rank in workers(process), process)
        os.kill(workers(process)[rank], signal.SIGKILL)
    assert process.wait(timeout=300) == 0, printed(folder)
    assert printed(folder).count("resuming after iteration") == 2
    assert_same_run(folder, calm)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchrun", "one process"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_any_process_saves_and_ends_all(tmp_path, to, number):
    folder = tmp_path / "run"
    folder.mkdir()
    process = start(folder, *ENDLESS, launcher=torchrun(2))
    wait_until(lambda: newest(folder) >= 2, process)
    os.kill(process.pid if to == "torchrun" else workers(process)[1], number)
    assert process.wait(timeout=60) == 1  # torchrun's own, whatever the processes return
    metrics = read_metrics(folder)
    assert metrics["status"] == "interrupted" and metrics["stop_reason"] == number.name
    assert newest(folder) == len(metrics["iterations"])
    assert "torchrun --standalone --nproc_per_node=2" in printed(folder).split("to continue")[1]

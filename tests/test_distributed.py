"""Several processes compute what one computes; each goes on, stops and fails with the others."""

import json
import os
import shutil
import signal
import subprocess

import pytest
import torch
from conftest import ROOT
from on_each_rank import MICRO_BATCHES, three_iterations
from processes import (
    assert_same_run,
    finish,
    metrics_but_for_times,
    newest,
    printed,
    start,
    torchrun,
    wait_until,
)
from safetensors.torch import load_file

import spread
from checkpoint import METRICS_FILE, load_checkpoint, read_json
from cli import UserError

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
    """What one process makes of the given completions, by size of the micro-batches."""
    return {size: three_iterations(size) for size in MICRO_BATCHES}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(folder with what two processes did, what they printed)."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "one_process").mkdir()
    finish(folder / "one_process", "--num_iterations", 4)
    shutil.copytree(folder / "one_process", folder / "before")
    return folder, on_each_rank(2, folder, "steps", "runs")


def assert_equal_to_one_process(folder, processes: int, alone: dict) -> None:
    for size, (metrics, tensors) in alone.items():
        for rank in range(processes):
            theirs = json.loads((folder / f"{size}.{rank}.json").read_text())
            for mine, its in zip(metrics, theirs, strict=True):
                assert its["problems"] * processes == mine["problems"] == 4
                assert its["sampling_gap"] < 1e-4  # of rounding alone
                own = {name: mine[name] for name in ("problems", "seconds", "sampling_gap")}
                assert its | own == pytest.approx(mine, rel=1e-5, abs=1e-6)
            found = load_file(folder / f"{size}.{rank}.safetensors")
            assert found.keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert (found[name] - tensor).abs().max() < 1e-6, name


def test_two_processes_give_the_loss_gradients_and_weights_of_one(two, alone):
    metrics, tensors = alone[0]
    assert len({iteration["loss"] for iteration in metrics}) == 3  # they do learn something
    assert metrics[0]["groups_without_signal"] < 1 and metrics[1]["kl"] > 0
    assert max(g.abs().max() for n, g in tensors.items() if "gradient" in n) > 1e-3
    assert_equal_to_one_process(two[0], 2, alone)


def test_all_processes_hold_the_same_weights_bit_for_bit(two):
    for size in MICRO_BATCHES:
        first, second = (load_file(two[0] / f"{size}.{rank}.safetensors") for rank in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_four_processes_give_the_loss_gradients_and_weights_of_one(alone, tmp_path):
    on_each_rank(4, tmp_path, "steps")
    assert_equal_to_one_process(tmp_path, 4, alone)


def test_the_same_run_by_as_many_processes_even_in_two_parts_is_the_same_bit_for_bit(two):
    for name in ("calm", "parts"):  # output_dir is the one setting that differs
        metrics = read_json(two[0] / name / METRICS_FILE)
        assert metrics["environment"]["processes"] == 2
        metrics["config"]["output_dir"] = "."
        (two[0] / name / METRICS_FILE).write_text(json.dumps(metrics))
    assert_same_run(two[0] / "parts", two[0] / "calm")


def test_each_process_samples_from_a_stream_of_its_own(two):
    tensors, _ = load_checkpoint(two[0] / "calm")
    states = tensors["sampler"].chunk(2)
    # By their seeds, as the states of one stream differ too where one process has drawn more.
    first, second = (torch.Generator().set_state(s.clone()).initial_seed() for s in states)
    assert first == 0 and second % 2**32 != 0
    alone, _ = load_checkpoint(two[0] / "before")
    assert len(alone["sampler"]) == len(states[0])


@pytest.mark.parametrize("iteration", [0, 25])
def test_no_two_processes_have_one_seed_where_the_generator_looks(monkeypatch, iteration):
    seeds = []
    for rank in range(1024):
        monkeypatch.setattr(spread, "rank", lambda rank=rank: rank)
        seeds.append(spread.stream(2**32 - 1, iteration) % 2**32)
    assert len(set(seeds)) == 1024
    assert iteration or seeds[0] == 2**32 - 1


def test_two_processes_go_on_with_the_run_of_one(two):
    folder, out = two
    assert "processes: 1 before, 2 now" in out
    before, after = (metrics_but_for_times(folder / n) for n in ("before", "one_process"))
    assert after["iterations"][:4] == before["iterations"]
    assert len(after["iterations"]) == 6 and after["status"] == "finished"


def test_one_process_goes_on_with_the_run_of_two(two, tmp_path, monkeypatch):
    shutil.copytree(two[0] / "calm", tmp_path / "run")
    shutil.copytree(two[0] / "parts", tmp_path / "other")
    out = finish(tmp_path / "run", "--num_iterations", 8, "--resume")
    assert "processes: 2 before, 1 now" in out
    before, after = (metrics_but_for_times(f) for f in (two[0] / "calm", tmp_path / "run"))
    assert after["iterations"][:6] == before["iterations"] and len(after["iterations"]) == 8
    finish(tmp_path / "other", "--num_iterations", 8, "--resume")
    assert metrics_but_for_times(tmp_path / "other")["iterations"] == after["iterations"]


def test_only_rank_0_prints(two):
    assert two[1].count("finished after 6 iterations") == 3
    assert two[1].count("preset tiny") == 4


def test_evaluations_are_of_all_problems_whoever_asks_them(two):
    for evaluation in read_json(two[0] / "calm" / METRICS_FILE)["evaluations"]:
        assert evaluation["accuracies"]["greedy"]["problems"] == 8


def test_shares_are_disjoint_and_leave_nothing_out(monkeypatch):
    monkeypatch.setattr(spread, "size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(spread, "rank", lambda rank=rank: rank)
        parts.append(spread.share(list(range(10))))
    assert sum(parts, []) == list(range(10))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_batch_that_cannot_be_shared_is_refused_in_one_line(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    process = start(folder, "--batch_size", 3, launcher=torchrun(2))
    assert process.wait(timeout=100) == 1  # torchrun's own
    errors = [line for line in printed(folder).splitlines() if line.startswith("error:")]
    assert errors == ["error: --batch_size 3: must be a multiple of 2 (processes)"]
    report = printed(folder)
    assert "exitcode  : 2" in report and "SIGABRT" not in report  # each ends in order
    assert not list(folder.iterdir())


def test_what_one_process_finds_wrong_is_an_error_for_all(monkeypatch):
    monkeypatch.setattr(spread, "gather", lambda mine: [None, UserError("no such model")])
    with pytest.raises(UserError, match="no such model"), spread.together():
        pass
    monkeypatch.setattr(spread, "rank", lambda: 1)
    with pytest.raises(SystemExit), spread.together():  # rank 0 tells it
        pass


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
def test_a_killed_process_brings_all_down_within_a_minute_and_is_named(tmp_path, rank):
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
def test_restarted_by_torchrun_after_kills_a_run_ends_bit_for_bit_undisturbed(tmp_path):
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
def test_a_signal_to_torchrun_or_to_any_process_saves_the_run_and_ends_it(tmp_path, to, number):
    folder = tmp_path / "run"
    folder.mkdir()
    process = start(folder, *ENDLESS, launcher=torchrun(2))
    wait_until(lambda: newest(folder) >= 2, process)
    os.kill(process.pid if to == "torchrun" else workers(process)[1], number)
    assert process.wait(timeout=60) == 1  # torchrun's own, whatever the processes say
    metrics = read_json(folder / METRICS_FILE)
    assert metrics["status"] == "interrupted" and metrics["stop_reason"] == number.name
    assert newest(folder) == len(metrics["iterations"])
    assert "torchrun --standalone --nproc_per_node=2" in printed(folder).split("to go on")[1]

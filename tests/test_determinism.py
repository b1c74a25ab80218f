"""The same seed gives the same run, bit for bit; evaluating more often changes none of it."""

import pytest
import torch
from conftest import TINY, run_script
from short_runs import saved_weights, short_config, short_training

from engine.files import read_json
from train_grpo import set_up

MEASURED_ANEW = ("seconds", "peak_memory_mib", "peak_cuda_memory_mib", "command", "output_dir")


def without_times(value):
    """Metrics without what must differ: times, memory, the folder written to."""
    if isinstance(value, dict):
        kept = {name: item for name, item in value.items() if name not in MEASURED_ANEW}
        return {name: without_times(item) for name, item in kept.items()}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def assert_same_weights(some: dict, others: dict) -> None:
    assert some.keys() == others.keys()
    for name, weight in some.items():
        assert torch.equal(weight, others[name]), name


def test_same_seed_gives_bit_identical_metrics_and_weights(tmp_path):
    (first, weights), (second, again) = (short_training(tmp_path / str(i)) for i in range(2))
    assert without_times(first) == without_times(second)
    assert_same_weights(weights, again)
    assert any(not torch.equal(weight, weights[n]) for n, weight in saved_weights(TINY).items())


@pytest.mark.slow
def test_python_hash_seeds_change_no_bit(tmp_path, monkeypatch):
    settings = ["--preset", "tiny", "--device", "cpu", "--num_iterations", "2"]
    settings += ["--num_inner_updates", "2", "--batch_size", "2", "--eval_problems", "4"]
    settings += ["--learning_rate", "1e-4"]
    for hash_seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
        folder = tmp_path / hash_seed
        done = run_script("train_grpo.py", *settings, "--output_dir", folder, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    first, second = (read_json(tmp_path / h / "grpo_metrics.json") for h in ("1", "2"))
    assert without_times(first) == without_times(second)
    assert_same_weights(*(saved_weights(tmp_path / h / "saved_model") for h in ("1", "2")))


def test_another_seed_gives_another_run(tmp_path):
    (first, weights), (second, others) = (
        short_training(tmp_path / str(seed), seed=seed, num_iterations=1) for seed in range(2)
    )
    assert without_times(first["iterations"]) != without_times(second["iterations"])
    assert any(not torch.equal(weight, others[name]) for name, weight in weights.items())
    rngs = [set_up(short_config(tmp_path, seed=seed))[1].token_rng for seed in range(2)]
    assert [rng.initial_seed() for rng in rngs] == [0, 1]


@pytest.fixture(scope="module")
def every_second(tmp_path_factory):
    folder = tmp_path_factory.mktemp("every_second")
    return short_training(folder, eval_every=2, num_iterations=4)


@pytest.mark.parametrize("eval_every", [1, 0], ids=["twice as often", "never"])
def test_how_often_one_evaluates_changes_no_training(eval_every, every_second, tmp_path):
    metrics, weights = short_training(tmp_path, eval_every=eval_every, num_iterations=4)
    other, its_weights = every_second
    assert without_times(metrics["iterations"]) == without_times(other["iterations"])
    assert_same_weights(weights, its_weights)
    measured = {e["iteration"]: e for e in metrics["evaluations"] if e["split"] == "validation"}
    before = {e["iteration"]: e for e in other["evaluations"] if e["split"] == "validation"}
    assert list(before) == [0, 2, 4]
    assert list(measured) == ([0, 1, 2, 3, 4] if eval_every else [0, 4])
    assert all(measured[i] == before[i] for i in measured.keys() & before.keys())

"""Everything runs on a simulated CUDA device; what a real one needs is set."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT
from processes import read_metrics

import evaluate
import inference
import train_grpo
from benchmarks import gpu
from engine.files import read_json
from engine.presets import PRESETS

pytestmark = pytest.mark.slow
RUNS = [(policy, dtype) for policy in ("plain", "tree") for dtype in ("float32", "bfloat16")]
SMALL = {"batch_size": 2, "num_generations": 3, "max_new_tokens": 4, "learning_rate": 1e-4}
SMALL |= {"lr_schedule": "constant"}  # a falling rate may not go on for longer
FEW = ["--preset=tiny", "--eval_problems=3", "--eval_every=0", "--micro_batch_size=4"]


def train(device: str, policy: str, dtype: str, *flags) -> str:
    """Train on little, without plots; returns the run's folder, named for policy and type."""
    out = f"{policy}_{dtype}"
    flags = [*FEW, f"--device={device}", f"--policy={policy}", f"--dtype={dtype}", *flags]
    with patch.dict(PRESETS["tiny"], SMALL), patch("plot_metrics.draw"):
        assert train_grpo.main([*flags, "--output_dir", out]) == 0
    return out


def check_simulation() -> None:
    """The simulated device refuses what a GPU refuses, and takes what a GPU takes."""
    host, here, rng = torch.ones(2), torch.ones(2, device="cuda"), torch.Generator()
    for mistake in (
        *(lambda: here + host, lambda: torch.cat([here, host]), lambda: host[0].add_(here[0])),
        *(lambda: host[here.long()], lambda: here.normal_(generator=rng), here.numpy),
    ):
        with pytest.raises(RuntimeError, match="cuda|numpy"):
            mistake()
    for result in (host[0] + here, here[host.long()] + 1, (0 * here).copy_(host) + 1):
        assert result.device.type == "cuda" and result.tolist() == [2, 2]


def on_the_device() -> None:
    """Train, resume, ask, evaluate, time; in a process that has imported fake_cuda before torch."""
    import fake_cuda

    torch.set_float32_matmul_precision("high")  # as something outside may
    with fake_cuda.device(), patch.dict(PRESETS["tiny"], SMALL):
        check_simulation()
        for policy, dtype in RUNS:
            train("cuda", policy, dtype, "--num_iterations=1")
        out = train("cuda", "tree", "bfloat16", "--num_iterations=2", "--resume")
        trained = ["--model", f"{out}/saved_model", "--num_samples", "2"]
        assert inference.main([*trained, "What is (1 + 2) * 3?"]) == 0
        assert evaluate.main([*trained, "--eval_problems", "3"]) == 0
        assert gpu.main(["--iterations", "1", "--output", "gpu.json"]) == 0
    print(torch.backends.cuda.cudnn_sdp_enabled(), torch.get_float32_matmul_precision())


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """(folder in which all scripts ran on the simulated device, what they printed)"""
    if not shutil.which("g++") or torch.version.cuda:
        pytest.skip("no g++, or PyTorch is not a CPU build")
    folder = tmp_path_factory.mktemp("cuda")
    command = [sys.executable, "-c", "import fake_cuda, test_cuda; test_cuda.on_the_device()"]
    options = {"cwd": folder, "env": os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_no_script_mixes_host_and_device_tensors(simulated):
    folder, printed = simulated
    for policy, dtype in RUNS:
        environment = read_metrics(folder / f"{policy}_{dtype}")["environment"]
        ran = [environment[name] for name in ("device", "policy", "compute_dtype")]
        assert ran == ["cuda", policy, f"torch.{dtype}"]
    resumed = read_metrics(folder / "tree_bfloat16")["iterations"]
    assert len(resumed) == 2 and resumed[1]["kl"] > 0  # the first iteration moved the weights
    assert "resuming after iteration 1" in printed and "3 test problems, scored" in printed
    assert read_json(folder / "gpu.json")["runs"][1]["policy"] == "plain"


def test_a_cpu_computes_what_the_device_computes(simulated, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = read_metrics(Path(train("cpu", "tree", "float32", "--num_iterations=1")))
    theirs = read_metrics(simulated[0] / "tree_float32")
    for [iteration] in (ours["iterations"], theirs["iterations"]):
        assert iteration.pop("logprob_mismatch") < 1e-4
        assert iteration.pop("seconds") > iteration.pop("rollout_seconds") > 0
    assert theirs["iterations"][0] == pytest.approx(ours["iterations"][0], rel=1e-4, abs=1e-6)
    assert theirs["evaluations"][0]["accuracies"] == ours["evaluations"][0]["accuracies"]
    gained = theirs["environment"].keys() - ours["environment"].keys()
    assert gained == {"gpu", "cuda", "cudnn"} and theirs["environment"]["gpu"] == "simulated"


def test_cudnn_attention_and_tf32_are_off_on_cuda(simulated):
    assert simulated[1].splitlines()[-1] == "False highest"

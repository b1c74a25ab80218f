"""The reference recipe, presets and flags, and values that cannot work."""

from dataclasses import asdict

import pytest
import torch
from conftest import run_script

from engine import distributed
from engine.files import UserError
from engine.machine import choose_dtype
from engine.presets import PRESETS, parse_config
from train_grpo import Config

RECIPE = {
    "model_name": "Qwen/Qwen2.5-0.5B-Instruct",
    "learning_rate": 1e-7,
    "batch_size": 4,
    "num_generations": 8,
    "max_new_tokens": 16,
    "num_iterations": 2000,
    "beta": 0.04,
    "epsilon": 0.2,
    "num_inner_updates": 5,
    "clip_grad_norm": 0.5,
    "kl_estimator": "k3_inverse",
    "loss_type": "grpo",
    "scale_rewards": "group",
    "epsilon_high": 0,
    "problems": "",
    "rewards": "",
}


def test_the_defaults_are_the_reference_recipe():
    assert PRESETS["reference"] == {}
    assert asdict(Config()) | RECIPE == asdict(Config())


@pytest.mark.parametrize("preset", PRESETS)
def test_flags_beat_presets_and_presets_beat_defaults(preset):
    config = parse_config(Config, ["--learning_rate", "2e-7", "--preset", preset])
    expected = {**asdict(Config()), **PRESETS[preset], "preset": preset, "learning_rate": 2e-7}
    assert asdict(config) == expected


def test_without_cuda_the_bundled_model_is_chosen(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parse_config(Config, []).preset == "tiny"
    assert capsys.readouterr().out.splitlines()[0] == (
        "preset tiny: the bundled model, since PyTorch finds no CUDA device"
    )


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_auto_dtype_is_bfloat16_only_where_native(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype("auto", torch.device("cuda")) == dtype
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


def test_three_processes_refuse_an_uneven_batch(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(UserError, match="--batch_size 4: must be a multiple of 3"):
        parse_config(Config, ["--preset", "tiny", "--batch_size", "4"])


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    result = run_script("train_grpo.py", "--num_generations", "1", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1

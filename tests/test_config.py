"""The reference recipe, presets and flags, and values that cannot work."""

from dataclasses import asdict

import pytest
import torch
from conftest import run_script

from engine.machine import choose_dtype
from engine.presets import PRESETS, parse_config
from train_grpo import Config


def test_the_defaults_are_the_reference_recipe():
    """All but these two are compared with a committed run of the recipe: see test_pages.py."""
    assert PRESETS["reference"] == {}
    assert Config.model_name == "Qwen/Qwen2.5-0.5B-Instruct" and Config.num_iterations == 2000


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


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    result = run_script("train_grpo.py", "--num_generations", "1", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1

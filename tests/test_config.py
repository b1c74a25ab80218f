"""The reference recipe, presets and flags, and values that cannot work."""

import json
from dataclasses import asdict

import pytest
import torch
from conftest import TINY, run_script

import inference
import plot_metrics
import train_grpo
from engine import distributed
from engine.files import UserError, exit_code
from engine.machine import choose_dtype
from engine.presets import PRESETS, parse_config
from train_grpo import Arithmetic, Config

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


def test_worked_examples_are_training_problems():
    most = Config.__dataclass_fields__["num_examples"].metadata["limits"][1]
    examples = Arithmetic(0, 10).examples(most)
    assert [problem.split for problem in examples] == ["train"] * most
    assert len(set(examples)) == most


def test_three_processes_refuse_an_uneven_batch(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(UserError, match="--batch_size 4: must be a multiple of 3"):
        parse_config(Config, ["--preset", "tiny", "--batch_size", "4"])


BAD_INPUT = {  # besides settings out of their limits and damaged models: test_fuzz.py
    "unknown flag": (train_grpo, "--learning_rat 1", "--learning_rat"),
    "empty range": (train_grpo, "--min_operand 5 --max_operand 3", "--min_operand 5"),
    "too few problems": (train_grpo, "--min_operand 2 --max_operand 2", "widen"),
    "model not fetched": (train_grpo, "--model_name models/x", "python fetch_model.py"),
    "empty folder": (train_grpo, "--model_name empty", "config.json"),
    "output is a file": (train_grpo, "--output_dir file/out", "file/out"),
    "missing metrics": (plot_metrics, "none.json", "none.json"),
    "truncated metrics": (plot_metrics, "cut.json", "cut.json"),
    "foreign metrics": (plot_metrics, "foreign.json", "foreign.json"),
    "greedy majority": (inference, "--num_samples 2 --temperature 0 1?", "--temperature 0"),
    "empty question": (inference, f"--model={TINY} ", "empty"),
}


@pytest.mark.parametrize("script, flags, complaint", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_error_and_changes_no_file(
    script, flags, complaint, tmp_path, monkeypatch, capsys
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("a file, not a folder")
    (tmp_path / "cut.json").write_text('{"config": {"seed": 0}, "iterations": [{"rew')
    (tmp_path / "foreign.json").write_text(json.dumps({"iterations": [{"loss": 1}]}))
    monkeypatch.chdir(tmp_path)
    preset = ["--preset", "tiny"] if script is train_grpo else []
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert exit_code(lambda: script.main([*preset, *flags.split(" ")])) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 2  # inference.py first names its model
    assert lines[-1].startswith("error: ") and complaint in lines[-1]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    result = run_script("train_grpo.py", "--num_generations", "1", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1

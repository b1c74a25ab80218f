"""The reference recipe, presets and flags, and what happens to values that cannot work."""

import json
from dataclasses import asdict

import pytest
import torch
from conftest import TINY, run_script

import inference
import plot_metrics
import train_grpo
from cli import UserError, exit_code
from task import EXAMPLES
from train_grpo import PRESETS, Config, parse_config

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
}


def test_the_defaults_are_the_reference_recipe():
    config = asdict(Config())
    assert {name: config[name] for name in RECIPE} == RECIPE


def test_the_reference_preset_changes_nothing():
    assert asdict(parse_config(["--preset", "reference"])) == asdict(Config(preset="reference"))


@pytest.mark.parametrize("preset", PRESETS)
def test_flags_beat_the_preset_and_the_preset_beats_the_defaults(preset):
    config = parse_config(["--learning_rate", "1e-7", "--preset", preset])
    assert config.learning_rate == 1e-7
    assert config.preset == preset
    for name, value in PRESETS[preset].items():
        if name != "learning_rate":
            assert getattr(config, name) == value


def test_without_cuda_the_bundled_model_is_chosen_and_the_first_line_says_why(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert parse_config([]).preset == "tiny"
    assert capsys.readouterr().out.splitlines()[0] == (
        "preset tiny: the bundled model, since there is no CUDA device"
    )


def test_worked_examples_are_training_problems():
    assert [problem.split for problem in EXAMPLES] == ["train"] * 3


@pytest.mark.parametrize(
    "flags, complaint",
    {
        "unknown field": (["--learning_rat", "1"], "--learning_rat"),
        "stray word": (["tiny"], "tiny"),
        "no number": (["--beta", "much"], "much"),
        "no such preset": (["--preset", "huge"], "huge"),
        "no such estimator": (["--kl_estimator", "k4"], "k4"),
        "group of one": (["--num_generations", "1"], "--num_generations 1: must be at least 2"),
        "no problem": (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        "negative rate": (["--learning_rate", "-0.5"], "--learning_rate -0.5"),
        "rate is NaN": (["--learning_rate", "nan"], "--learning_rate nan"),
        "infinite beta": (["--beta", "inf"], "--beta inf"),
        "clips all": (["--epsilon", "1.5"], "--epsilon 1.5: must be at least 0 and at most 1"),
        "negative seed": (["--seed", "-1"], "--seed -1"),
        "too many examples": (["--num_examples", "4"], "--num_examples 4"),
        "operands too large": (["--max_operand", "1000"], "--max_operand 1000"),
        "range upside down": (["--min_operand", "5", "--max_operand", "3"], "--min_operand 5"),
        "range of one": (["--min_operand", "2", "--max_operand", "2"], "widen"),
        "uneven micro-batches": (["--micro_batch_size", "3"], "--micro_batch_size 3"),
    }.values(),
)
def test_a_value_that_cannot_work_is_named_with_what_is_allowed(flags, complaint):
    with pytest.raises(UserError) as error:
        parse_config(["--preset", "tiny", *flags])
    assert complaint in str(error.value)


@pytest.fixture
def bad_files(tmp_path, monkeypatch):
    """The current folder, with files that no script can use."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("a file, not a folder")
    (tmp_path / "cut.json").write_text('{"config": {"seed": 0}, "iterations": [{"rew')
    (tmp_path / "foreign.json").write_text(json.dumps({"iterations": [{"loss": 1}]}))
    (tmp_path / "list.json").write_text("[1, 2]")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "arguments, complaint",
    {
        "setting": ([train_grpo, "--num_generations", "1"], "--num_generations 1"),
        "missing folder": ([train_grpo, "--model_name", "no/such/model"], "no/such/model"),
        "empty folder": ([train_grpo, "--model_name", "empty"], "config.json"),
        "no such device": ([train_grpo, "--device", "warp"], "--device warp"),
        "absent device": ([train_grpo, "--device", "mps"], "--device mps"),
        "output is a file": ([train_grpo, "--output_dir", "file/out"], "file/out"),
        "missing metrics": ([plot_metrics, "none.json"], "none.json"),
        "truncated metrics": ([plot_metrics, "cut.json"], "cut.json"),
        "foreign metrics": ([plot_metrics, "foreign.json"], "foreign.json"),
        "foreign list": ([plot_metrics, "list.json"], "list.json"),
        "no such model": ([inference, "--model", "nowhere", "What is 1?"], "nowhere"),
        "no sample": ([inference, "--num_samples", "0", "What is 1?"], "--num_samples 0"),
        "cold majority": (
            [inference, "--num_samples", "2", "--temperature", "0", "What is 1?"],
            "--temperature 0",
        ),
        "reserved token": ([inference, "--model", str(TINY), "<|end|>"], "<|end|>"),
        "empty question": ([inference, "--model", str(TINY), " "], "empty"),
    }.values(),
)
def test_bad_input_gets_one_line_and_exit_code_2_and_changes_no_file(
    arguments, complaint, bad_files, capsys
):
    before = {path: path.read_bytes() for path in bad_files.rglob("*") if path.is_file()}
    script, *flags = arguments
    assert exit_code(lambda: script.main(flags)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 2  # inference.py first says which model it took
    assert lines[-1].startswith("error: ") and complaint in lines[-1]
    assert {path: path.read_bytes() for path in bad_files.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["train_grpo.py", "--num_generations", "1"],
        ["plot_metrics.py", "cut.json"],
        ["inference.py", "--model", "nowhere", "What is 1?"],
    ],
)
def test_each_script_exits_with_code_2_and_one_line(arguments, bad_files):
    result = run_script(*arguments, cwd=bad_files)
    assert result.returncode == 2
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1

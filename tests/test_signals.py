"""SIGINT and SIGTERM end the iteration, save everything and name the command to continue."""

import signal

import pytest
from processes import arguments, finish, newest, printed, read_metrics, start, wait_until
from transformers import AutoModelForCausalLM

import train_grpo
from engine.checkpoint import load_checkpoint
from engine.files import METRICS_FILE, UserError, locked_folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_run_and_says_how_to_continue(tmp_path, monkeypatch, number):
    real, done = train_grpo.train_iteration, []

    def iteration(*inputs):
        done.append(real(*inputs))
        if len(done) == 3:
            signal.raise_signal(number)
        return done[-1]

    monkeypatch.setattr(train_grpo, "train_iteration", iteration)
    out = finish(tmp_path, "--num_iterations", 9, code=128 + number)
    metrics = read_metrics(tmp_path)
    assert metrics["status"] == "interrupted" and metrics["stop_reason"] == number.name
    assert newest(tmp_path) == len(metrics["iterations"]) == 3
    assert metrics["environment"]["command"] + " --resume" in out.split("to continue")[1]
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved_model")
    assert "finished" in finish(tmp_path, "--num_iterations", 4, "--resume")


def test_a_second_ctrl_c_kills_and_leaves_valid_files(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    process = start(folder, "--num_iterations", 100, "--num_inner_updates", 60)
    wait_until((folder / METRICS_FILE).exists, process)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: "Ctrl-C to stop at once" in printed(folder), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == -signal.SIGINT
    assert load_checkpoint(folder) is not None
    assert read_metrics(folder)["status"] == "running"


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    with locked_folder(tmp_path), pytest.raises(UserError, match=f"another run.*{tmp_path}"):
        train_grpo.main(arguments("--num_iterations", 1, "--output_dir", tmp_path))

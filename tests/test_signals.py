"""SIGINT and SIGTERM: the iteration is finished, everything saved, the way on named."""

import json
import signal

import pytest
from conftest import run_script
from processes import finish, newest, printed, start, wait_until
from transformers import AutoModelForCausalLM

from checkpoint import METRICS_FILE, load_checkpoint
from plot_metrics import PLOT_FILES

ENDLESS = ("--num_iterations", 100000)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_metrics_and_plots_and_says_how_to_resume(tmp_path, number):
    folder = tmp_path / "run"
    folder.mkdir()
    process = start(folder, *ENDLESS)
    wait_until(lambda: newest(folder) >= 4, process)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    text = printed(folder)
    assert "Traceback" not in text
    assert "train_grpo.py" in text.split("to go on")[1] and "--resume" in text.split("to go on")[1]
    metrics = json.loads((folder / METRICS_FILE).read_text())
    assert metrics["status"] == "interrupted" and metrics["stop_reason"] == number.name
    assert newest(folder) == len(metrics["iterations"]) >= 4
    assert all((folder / name).exists() for name in PLOT_FILES)
    AutoModelForCausalLM.from_pretrained(folder / "saved_model")
    if number == signal.SIGTERM:
        done = str(newest(folder) + 2)
        assert "finished" in finish(folder, "--num_iterations", done, "--resume")


def test_a_second_ctrl_c_stops_at_once_and_leaves_valid_files(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    process = start(folder, *ENDLESS, "--num_inner_updates", 200)  # iterations of seconds
    wait_until((folder / METRICS_FILE).exists, process)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: "Ctrl-C to stop at once" in printed(folder), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == -signal.SIGINT
    assert load_checkpoint(folder) is not None
    assert json.loads((folder / METRICS_FILE).read_text())["status"] == "running"


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_refused_by_name_and_a_dead_one_leaves_no_lock(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    process = start(folder, *ENDLESS)
    try:
        wait_until(lambda: newest(folder) >= 1, process)
        second = run_script("train_grpo.py", "--preset", "tiny", "--resume", cwd=folder)
        assert second.returncode == 2
        assert str(folder) in second.stderr and "another run" in second.stderr
        assert len(second.stderr.splitlines()) == 1
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = str(newest(folder) + 1)
    assert "finished" in finish(folder, "--num_iterations", done, "--resume", "--eval_every", "0")

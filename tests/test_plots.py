"""One metrics file, or several, in; two PNGs out."""

import json
import os

import numpy as np
import pytest
from conftest import run_script
from matplotlib.figure import Figure
from matplotlib.image import imread

import plot_metrics
from plot_metrics import PLOT_FILES, WINDOW, draw, draw_watched, read_metrics, series


def write_run(path, iterations=120, level=0.5, weight=1.0):
    same = {"reward": weight * level, "reward_brief": level / 2, "reward_exact": level}
    same["entropy"] = 1.0
    history = [
        {**same, "accuracy": level * i / iterations, "kl": 0.01 * i, "kl_penalty": i}
        for i in range(iterations)
    ]
    interval = {"accuracy": level, "low": level - 0.1, "high": level + 0.1}
    accuracies = {"sampled": interval, "greedy": interval}
    evaluations = [
        {"iteration": i, "split": "validation", "accuracies": accuracies} for i in (0, iterations)
    ]
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps({"iterations": history, "evaluations": evaluations}))
    return path


def test_a_run_is_redrawn_in_two_seconds_without_torch(tmp_path, monkeypatch):
    write_run(tmp_path / "run" / "grpo_metrics.json", iterations=1000)
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # imports are listed on standard error
    before = os.times()
    done = run_script("plot_metrics.py", "run/grpo_metrics.json", cwd=tmp_path)
    after = os.times()
    seconds = sum(after[2:4]) - sum(before[2:4])  # of child processes, others on the machine aside
    assert done.returncode == 0 and seconds < 2  # about 0.8
    imported = done.stderr.split()
    assert "matplotlib" in imported and not {"torch", "transformers"} & {*imported}
    for name in PLOT_FILES:
        assert imread(tmp_path / "run" / name).shape[:2] == (480, 1200)


def test_each_part_of_the_reward_is_drawn_under_its_name(tmp_path):
    axes = Figure().subplots()
    draw_watched(axes, read_metrics(write_run(tmp_path / "m.json", level=0.8)))
    lines, labels = axes.get_legend_handles_labels()
    ends = [line.get_ydata()[-1] for line in lines]
    names = ["entropy (nats per token)", "brief (part of the reward)", "exact (part of the reward)"]
    assert labels == names and ends == pytest.approx([1.0, 0.4, 0.8])
    assert len({line.get_color() for line in lines}) == 3


@pytest.mark.parametrize("weights", [[6.0, -4.0], [1.0]], ids=str)
def test_rewards_of_any_weights_fit_their_axis(weights, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plot_metrics, "save_figure", lambda figure, path: figures.append(figure))
    draw([write_run(tmp_path / f"{w}" / "m.json", weight=w) for w in weights], tmp_path)
    low, high = figures[0].axes[0].get_ylim()
    assert low <= min(0.0, *(0.5 * w for w in weights))
    assert high >= max(1.0, *(0.5 * w for w in weights))
    if weights == [1.0]:
        assert (low, high) == (0, 1.02)


@pytest.mark.parametrize("length", [1, WINDOW - 1, 3 * WINDOW])
def test_smoothing_is_the_mean_of_the_last_iterations(length):
    values = np.random.default_rng(0).random(length)
    raw, smooth = series({"iterations": [{"reward": v} for v in values]}, "reward")
    expected = [values[max(0, i + 1 - WINDOW) : i + 1].mean() for i in range(length)]
    np.testing.assert_allclose(raw, values)
    np.testing.assert_allclose(smooth, expected)

"""One metrics file, or several, in; two PNGs out."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

import plot_metrics
from plot_metrics import PLOT_FILES, WINDOW, draw, draw_watched, main, read_metrics, series


def write_run(path, iterations=120, level=0.5, weight=1.0):
    history = [
        {
            "reward": weight * level,
            "reward_brief": 0.5 * level,
            "reward_exact": level,
            "accuracy": level * i / iterations,
            "kl": 0.01 * i,
            "kl_penalty": i,
            "entropy": 1.0,
        }
        for i in range(iterations)
    ]
    accuracies = {
        kind: {"accuracy": level, "low": level - 0.1, "high": level + 0.1}
        for kind in ("sampled", "greedy")
    }
    evaluations = [
        {"iteration": i, "split": "validation", "accuracies": accuracies} for i in (0, iterations)
    ]
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps({"iterations": history, "evaluations": evaluations}))
    return path


def test_a_run_is_redrawn_next_to_its_metrics(tmp_path, monkeypatch):
    write_run(tmp_path / "run" / "grpo_metrics.json")
    monkeypatch.chdir(tmp_path)
    assert main(["run/grpo_metrics.json"]) == 0
    for name in PLOT_FILES:
        height, width, _ = imread(tmp_path / "run" / name).shape
        assert (width, height) == (1200, 480)


def test_runs_are_overlaid(tmp_path):
    paths = [write_run(tmp_path / n / "m.json", level=v) for n, v in (("a", 0.2), ("b", 0.9))]
    draw(paths, tmp_path / "both")
    draw(paths[:1], tmp_path / "one")
    for name in PLOT_FILES:
        both, one = (imread(tmp_path / folder / name) for folder in ("both", "one"))
        assert not np.array_equal(both, one)


def test_each_part_of_the_reward_is_drawn_under_its_name(tmp_path):
    run = read_metrics(write_run(tmp_path / "m.json", level=0.8))
    axes = Figure().subplots()
    draw_watched(axes, run)
    lines = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    drawn = {label: line.get_ydata()[-1] for label, line in lines.items()}
    assert drawn == pytest.approx(
        {
            "entropy (nats per token)": 1.0,
            "brief (part of the reward)": 0.4,
            "exact (part of the reward)": 0.8,
        }
    )
    assert len({line.get_color() for line in lines.values()}) == 3


@pytest.mark.parametrize("weights", [[6.0], [-4.0], [6.0, -4.0], [1.0]], ids=str)
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

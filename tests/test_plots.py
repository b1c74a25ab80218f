"""One metrics file, or several, in; two PNGs out."""

import json

import numpy as np
import pytest
from matplotlib.image import imread

from plot_metrics import PLOT_FILES, WINDOW, draw, main, series


def write_run(path, iterations=120, level=0.5):
    history = [
        {
            "reward": level,
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


@pytest.mark.parametrize("length", [1, WINDOW - 1, 3 * WINDOW])
def test_smoothing_is_the_mean_of_the_last_iterations(length):
    values = np.random.default_rng(0).random(length)
    raw, smooth = series({"iterations": [{"reward": v} for v in values]}, "reward")
    expected = [values[max(0, i + 1 - WINDOW) : i + 1].mean() for i in range(length)]
    np.testing.assert_allclose(raw, values)
    np.testing.assert_allclose(smooth, expected)

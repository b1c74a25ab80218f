"""docs/healthy.md and its figures say what the committed runs say."""

import json
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.image import imread
from safetensors.numpy import load_file

sys.path.insert(0, str(ROOT / "docs"))
import figures

from plot_metrics import WINDOW, series

PAGE = (ROOT / "docs" / "healthy.md").read_text(encoding="utf-8")
SICK = ("rate too high", "no signal", "truncation")
COLUMNS = ("reward", "accuracy", "kl", "entropy", "frac_zero_std_groups", "truncated")
COLUMNS += ("completion_length",)
SMOLLM2_PARAMETERS = 134_515_008
BYTES = 20  # per parameter
VOCABULARY = 151_936


def folder(run: str) -> Path:
    return figures.HEALTHY / run.replace(" ", "_")


def metrics(run: str) -> dict:
    return json.loads((folder(run) / "grpo_metrics.json").read_text())


def table(heading: str) -> list[str]:
    """The rows of the one table whose first line starts with `heading`."""
    [block] = [b for b in PAGE.split("\n\n") if b.startswith(heading)]
    return block.splitlines()[2:]


def line(*cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def window_row(run: str, first: int) -> str:
    """The means of a run over 50 iterations."""
    chosen = metrics(run)["iterations"][first - 1 : first + 49]
    means = [fmean(m[name] for m in chosen) for name in COLUMNS]
    cells = ["< 0.001" if 0 < mean < 0.001 else f"{mean:.2f}" for mean in means]
    return line(run, f"{first} to {first + 49}", *cells)


def logged_groups(run: str) -> dict[int, dict]:
    lines = (folder(run) / "grpo_completions.jsonl").read_text().splitlines()
    return {group["iteration"]: group for group in map(json.loads, lines)}


def group_row(run: str, iteration: int) -> str:
    """The most frequent completions of a logged group, with their advantage."""
    group = logged_groups(run)[iteration]
    said = Counter((c["text"], c["advantage"]) for c in group["completions"])
    texts = [f"{n} x `{text}` ({adv:+.2f})" for (text, adv), n in said.most_common(3)]
    return line(run, iteration, group["question"], group["answer"], ", ".join(texts))


def test_the_table_of_means_is_that_of_the_runs():
    expected = [("good", 1), ("good", 251), ("rate too high", 151), ("rate too high", 251)]
    expected += [("no signal", 251), ("truncation", 251)]
    assert table("| run | iterations |") == [window_row(*which) for which in expected]


def test_the_quoted_groups_are_lines_of_the_runs():
    quoted = [("good", 275), ("rate too high", 200), ("no signal", 275), ("truncation", 275)]
    assert table("| run | iteration |") == [group_row(*which) for which in quoted]


def test_with_the_rate_too_high_every_question_gets_the_same_answer():
    groups = logged_groups("rate too high")
    said = {i: {c["text"] for c in group["completions"]} for i, group in groups.items()}
    assert all(said[i] == {"<answer>7</answer>"} for i in range(125, 251, 25))
    assert said[275] == said[300] == {16 * "</answer>"}


def test_the_runs_are_what_the_page_says():
    changed = {
        "good": {},
        "rate too high": {"learning_rate": 3e-3},
        "no signal": {"min_operand": 200, "max_operand": 999},
        "truncation": {"max_new_tokens": 3},
        "one update": {"num_inner_updates": 1},
    }
    good = metrics("good")["config"]
    for run, settings in changed.items():
        found = metrics(run)
        assert found["status"] == "finished" and len(found["iterations"]) == 300
        expected = {**good, **settings, "output_dir": f"runs/{folder(run).name}"}
        assert found["config"] == expected
        assert "dirty" not in found["environment"]["git_commit"]


def test_the_advantages_of_a_group_sum_to_zero():
    groups = logged_groups("good").values()
    assert len(groups) == 12
    for group in groups:
        assert abs(sum(c["advantage"] for c in group["completions"])) < 0.001


def test_with_one_update_the_loss_is_the_kl_term_and_nothing_is_clipped():
    found = metrics("one update")
    for m in found["iterations"]:
        assert m["clip_fraction"] == 0
        assert m["loss"] == pytest.approx(found["config"]["beta"] * m["kl_penalty"], abs=1e-6)


def test_the_numbers_in_the_text_are_those_of_the_runs():
    good, rate = metrics("good"), metrics("rate too high")["iterations"]
    first, last = good["iterations"][0], good["iterations"][-50:]
    loss, penalty = (fmean(m[name] for m in last) for name in ("loss", "kl_penalty"))
    share = fmean(m["clip_fraction"] for m in last)
    broken = next(i for i, m in enumerate(rate, 1) if m["truncated"] == 1)
    assert all(m["truncated"] == 1 and m["reward"] == 0 for m in rate[broken - 1 :])
    numbers = [
        f"{first['loss']:.4f}",
        f"{first['clip_fraction']:.1%}",
        f"{loss:.4f}",
        f"{good['config']['beta'] * penalty:.4f}",
        f"{share:.1%}",
        f"{rate[0]['loss']:,.0f}",
        f"{rate[0]['clip_fraction']:.1%}",
        f"iteration {broken}",
    ]
    for number in numbers:
        assert number in PAGE, number


def test_the_memory_tables_follow_the_formula():
    weights = load_file(ROOT / "tiny_model" / "model.safetensors")
    bundled = sum(tensor.size for tensor in weights.values())
    measured = []
    for name, parameters, run in (
        ("bundled, float32", bundled, "tiny/seed0"),
        ("SmolLM2-135M, bfloat16", SMOLLM2_PARAMETERS, "smollm2/seed0"),
    ):
        path = ROOT / "results" / run / "grpo_metrics.json"
        peak = json.loads(path.read_text())["peak_memory_mib"]
        formula = f"{parameters * BYTES / 2**20:,.0f} MiB"
        measured.append(line(name, f"{parameters / 1e6:,.2f}M", formula, f"{peak:,.0f} MiB"))
    assert table("| model | parameters |") == measured
    computed = []
    for billions in (0.5, 1.5, 7):
        weights = f"{16 * billions:.0f} GB", f"{4 * billions:.0f} GB", f"{20 * billions:.0f} GB"
        computed.append(f"{billions:g}B | " + " | ".join(weights))
    for row, start in zip(table("| size |"), computed, strict=True):
        assert row.startswith(f"| {start} |")
    assert f"{8 * VOCABULARY * 32 * 16 / 1e9:.1f} GB" in PAGE
    assert f"{8 * VOCABULARY * 32 * 512 / 1e9:.0f} GB" in PAGE


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_of_the_page_has_named_axes_and_two_panels(name):
    axes = figures.FIGURES[name]().axes
    assert 1 <= len(axes) <= 2
    assert all(panel.get_xlabel() and panel.get_ylabel() for panel in axes)


@pytest.mark.parametrize(
    ("name", "panels"),
    [
        ("healthy_reward.png", ("reward", "entropy")),
        ("healthy_signal.png", ("frac_zero_std_groups", "truncated")),
        ("healthy_loss.png", ("kl",)),
    ],
)
def test_the_curves_are_the_moving_averages_of_the_runs(name, panels):
    axes = figures.FIGURES[name]().axes
    for panel, metric in zip(axes, panels, strict=False):
        curves = {curve.get_label(): curve.get_ydata() for curve in panel.get_lines()}
        assert list(curves) == ["good", *SICK]
        for run, values in curves.items():
            np.testing.assert_array_equal(values, series(metrics(run), metric)[1])
            raw = [m[metric] for m in metrics(run)["iterations"]]
            assert values[-1] == pytest.approx(fmean(raw[-WINDOW:]))


def test_the_committed_figures_show_the_committed_runs(tmp_path):
    figures.draw_figures(tmp_path)
    for name in figures.FIGURES:
        drawn, committed = (imread(folder / name) for folder in (tmp_path, figures.PAGES))
        assert drawn.shape == committed.shape
        assert np.abs(drawn - committed).mean() < 0.001  # not bit for bit: fonts
        assert (figures.PAGES / name).stat().st_size < 200_000

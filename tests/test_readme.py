"""The README's figures are those of the committed runs, and its claims about the code hold."""

import json
import re
from dataclasses import asdict
from statistics import fmean, median

import pytest
from conftest import ROOT

from benchmarks import study
from train_grpo import PRESETS, Config

README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text()


def committed(folder: str) -> dict:
    return json.loads((ROOT / "results" / folder / "grpo_metrics.json").read_text())


def row(name: str, metrics: dict) -> str:
    """A line of the README's table of results, from the metrics of a run."""
    before, after = (e["accuracies"] for e in metrics["evaluations"] if e["split"] == "test")
    kl = [m["kl"] for m in metrics["iterations"]]
    means = [fmean(kl[i : i + 50]) for i in range(len(kl) - 49)]
    cells = [name]
    for kind in ("sampled", "greedy"):
        a = after[kind]
        cells.append(f"{before[kind]['accuracy']:.1%}")
        cells.append(f"{a['accuracy']:.1%} ({a['low']:.1%} to {a['high']:.1%})")
    cells += [f"{median(kl):.2f}", f"{max(means):.2f}", f"{sum(k > 2 for k in kl)}"]
    cells += [f"{metrics['seconds']:.0f} s", f"{metrics['peak_memory_mib']:.0f} MiB"]
    return "| " + " | ".join(cells) + " |"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_results_of_each_seed_are_those_of_its_committed_run(seed):
    metrics = committed(f"tiny/seed{seed}")
    assert metrics["config"]["seed"] == seed and metrics["config"]["preset"] == "tiny"
    assert {n: metrics["config"][n] for n in PRESETS["tiny"]} == PRESETS["tiny"]
    assert len(metrics["iterations"]) == 2000 and metrics["status"] == "finished"
    assert row(f"seed {seed}", metrics) in README


def test_the_result_of_the_reference_rate_is_that_of_its_committed_run():
    metrics = committed("tiny_reference")
    assert metrics["config"]["learning_rate"] == 1e-7
    assert row("lr 1e-7", metrics) in README


def test_the_result_of_the_real_model_is_that_of_its_committed_run():
    metrics = committed("smollm2_cpu")
    assert {n: metrics["config"][n] for n in PRESETS["smollm2"]} == PRESETS["smollm2"]
    assert len(metrics["iterations"]) >= 150 and metrics["status"] == "finished"
    assert metrics["environment"]["model_source"]["weights"] == "Q4_1, dequantised"
    assert row("seed 0", metrics) in README


def measured(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())


@pytest.mark.parametrize(
    "label, name",
    [
        ("bundled, 1M | float32", "vs_trl"),
        ("SmolLM2-135M's shape | bfloat16", "vs_trl_135m"),
        (
            "SmolLM2-135M's shape, both keep freed memory | bfloat16",
            "vs_trl_135m_same_allocator",
        ),
    ],
)
def test_the_figures_beside_trl_are_those_of_their_result_file(label, name):
    found, by_round = measured(name), measured(name)["ratio_by_round"]
    cells = [f"{found[loop]['seconds']:.2f} s" for loop in ("ours", "trl")]
    cells.append(f"{found['ratio']:.1f} ({min(by_round):.1f} to {max(by_round):.1f})")
    cells += [f"{found[loop]['peak_memory_mib']:,.0f} MiB" for loop in ("ours", "trl")]
    line = f"| {label} | {' | '.join(cells)} |"
    assert line in BENCHMARKS and line in README


def test_the_figures_of_the_study_are_those_of_its_result_file():
    lines = []
    for axis, value, runs in study.rows(measured("study")["runs"]):
        assert [once["sampled_before"] for once in runs] and len(runs) == 3
        lines.append(study.table_line(axis, value, runs))
    assert len(lines) == 14 and "\n".join(lines) in BENCHMARKS


def test_the_configuration_table_is_that_of_the_code():
    presets = {name: {**asdict(Config()), **values} for name, values in PRESETS.items()}
    found = 0
    for line in README.splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if len(cells) == 5 and hasattr(Config, cells[0]):
            found += 1
            for name, cell in zip(("reference", "smollm2", "tiny"), cells[1:4], strict=True):
                value = presets[name][cells[0]]
                assert cell == str(value) or float(cell) == value, (cells[0], name)
    assert found >= 10


def test_every_function_and_file_that_the_readme_names_exists():
    sources = "".join(path.read_text() for path in ROOT.glob("*.py"))
    sources += " ".join(committed("tiny/seed0")["iterations"][0])  # the names of the metrics
    for name in re.findall(r"`([a-z]+_[a-z_]+)`", README):
        assert re.search(rf"\b{name}\b", sources), name
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target

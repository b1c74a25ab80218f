"""The pages say what the committed results say, and name only what exists."""

import json
import re
import sys
from dataclasses import asdict

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.image import imread

sys.path.insert(0, str(ROOT / "docs"))
import figures
import one_iteration
import pages
import tables

from engine.presets import PRESETS
from train_grpo import Config

PAGES = [str(path.relative_to(ROOT)) for path in pages.PAGES]
CARDS = [str(path.relative_to(ROOT)) for path in ROOT.glob("results/*/README.md")]
TORCHRUN = {"standalone", "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}
TORCHRUN |= {"max_restarts", "shutdown-timeout"}
NUMBER = re.compile(r"[+-]?\d+\.\d+")
# The runs that show what a preset does; "reference" on the bundled model.
RUNS = {"tiny/seed0": "tiny", "tiny/seed1": "tiny", "tiny/seed2": "tiny"}
RUNS |= {"smollm2/seed0": "smollm2", "smollm2/seed1": "smollm2", "tiny_reference": "reference"}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def links(page: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", read(page))


@pytest.mark.parametrize("page", PAGES)
def test_generating_a_page_again_changes_nothing(page):
    assert pages.rewrite(read(page)) == read(page)


@pytest.mark.parametrize("report", pages.REPORTS, ids=lambda path: path.name)
def test_a_committed_report_has_the_page_of_today(report):
    text = report.read_text(encoding="utf-8")
    assert pages.renew_report(text) == text and len(pages.DATA.search(text)[0]) > 10_000


def test_every_marker_is_closed_and_every_generated_part_is_shown():
    text = "\n".join(map(read, PAGES))
    found = pages.MARKED.findall(text)
    assert text.count("<!--") == 2 * len(found)
    assert {name for name, _ in found} == tables.GENERATED.keys()
    assert not re.search(r"^<!-- \w+ -->.", text, re.MULTILINE)  # HTML there ends the paragraph


def test_one_iteration_by_hand_is_what_the_trainer_computes():
    committed, computed = read("docs/one_iteration.md"), one_iteration.page()
    assert NUMBER.sub("#", computed) == NUMBER.sub("#", committed)
    numbers = [[float(x) for x in NUMBER.findall(text)] for text in (committed, computed)]
    assert len(numbers[0]) > 300
    assert numbers[1] == pytest.approx(numbers[0], abs=1e-3, rel=0)
    pattern = r"`grpo_loss` \|\n.*\n\| (\S+) \| (\S+) \|"
    hand, code = map(float, re.search(pattern, committed).groups())
    assert hand == pytest.approx(code, abs=1e-5) and hand != 0


def test_pictures_drawn_again_look_as_committed(tmp_path):
    figures.draw_figures(tmp_path)
    committed = {path.name for path in (ROOT / "docs").glob("*.png")}
    assert committed - {"report.png"} == figures.FIGURES.keys()  # that one is a screenshot
    for name in figures.FIGURES:
        drawn, committed = (imread(folder / name) for folder in (tmp_path, ROOT / "docs"))
        assert drawn.shape == committed.shape
        assert np.abs(drawn - committed).mean() < 0.001  # not bit for bit: fonts


def test_every_committed_picture_is_shown():
    shown = {(ROOT / page).parent / target for page in PAGES for target in links(page)}
    pictures = {*ROOT.glob("docs/*.png"), *ROOT.glob("results/**/*.png")}
    assert pictures <= {path.resolve() for path in shown}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_of_a_preset_has_its_settings(run):
    metrics = json.loads(read(f"results/{run}/grpo_metrics.json"))
    config, preset = metrics["config"], asdict(Config()) | PRESETS[RUNS[run]]
    changed = {name for name, value in config.items() if value != preset[name]}
    model = {"model_name", "num_iterations"} if RUNS[run] == "reference" else set()
    # Logging changes no training; the default was 25 before.
    assert changed - {"output_dir", "seed", "log_completions_every"} == {"preset"} | model
    assert metrics["status"] == "finished"
    assert len(metrics["iterations"]) == config["num_iterations"]


@pytest.mark.parametrize("page", [*PAGES, *CARDS])
def test_every_link_leads_somewhere(page):
    for target in links(page):
        name, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / name if name else ROOT / page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, target


@pytest.mark.parametrize("page", PAGES)
def test_every_name_script_and_flag_in_a_page_exists(page):
    places = (".", "engine", "benchmarks", "examples")
    code = "".join(p.read_text() for place in places for p in (ROOT / place).glob("*.py"))
    known = set(re.findall(r"\w+", code))
    for name in re.findall(r"`([a-zA-Z]+_[a-z_]+|[A-Z][a-z]+[A-Z]\w+)\b", read(page)):
        assert name in known, name
    for script in re.findall(r"python (\S+\.py)", read(page)):
        assert (ROOT / script).exists(), script
    for flag in re.findall(r"--([a-z][\w-]+)", read(page)):
        assert flag in known | TORCHRUN | {"index-url"}, flag

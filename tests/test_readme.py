"""The figures in the pages are those of the committed results; what the pages name exists."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from statistics import fmean, median
from typing import NamedTuple

import pytest
from conftest import ROOT

from benchmarks.ablation import tables
from train_grpo import PRESETS, Config

PAGES = ["README.md", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("docs/*.md")))]
CARDS = [str(p.relative_to(ROOT)) for p in ROOT.glob("results/*/README.md")]
TORCHRUN = {"standalone", "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}
TORCHRUN |= {"max_restarts", "shutdown-timeout"}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def committed(run: str) -> dict:
    return json.loads(read(f"results/{run}/grpo_metrics.json"))


def benchmark(name: str) -> dict:
    return json.loads(read(f"benchmarks/{name}.json"))


def line(*cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def result_row(name: str, run: str) -> str:
    metrics = committed(run)
    before, after = (e["accuracies"] for e in metrics["evaluations"] if e["split"] == "test")
    kl = [m["kl"] for m in metrics["iterations"]]
    means = [fmean(kl[i : i + 50]) for i in range(len(kl) - 49)]
    cells = [name]
    for kind in ("sampled", "greedy"):
        a = after[kind]
        cells.append(f"{before[kind]['accuracy']:.1%}")
        cells.append(f"{a['accuracy']:.1%} ({a['low']:.1%} to {a['high']:.1%})")
    cells += [f"{median(kl):.2f}", f"{max(means):.2f}", sum(k > 2 for k in kl)]
    return line(*cells, f"{metrics['seconds']:.0f} s", f"{metrics['peak_memory_mib']:.0f} MiB")


def trl_rows() -> list[str]:
    rows = []
    for ending in ("", "_smollm2", "_worst_case"):
        found = benchmark(f"vs_trl{ending}")
        work, by_round = found["work"], found["ratio_by_round"]
        updates = work["num_inner_updates"]
        model = "SmolLM2-135M, bfloat16" if "smollm2" in ending else "bundled, float32"
        batch = f"{work['batch_size']} x {work['num_generations']}, {updates} updates"
        cells = [model, batch, "worst case" if "worst" in ending else "natural"]
        cells += [f"{found[loop]['seconds']:.3g} s" for loop in ("ours", "trl")]
        cells.append(f"{found['ratio']:.1f} ({min(by_round):.1f} to {max(by_round):.1f})")
        cells += [f"{found[loop]['peak_memory_mib']:,.0f} MiB" for loop in ("ours", "trl")]
        rows.append(line(*cells))
    return rows


def group_rows() -> list[str]:
    return [
        line(
            point["num_generations"],
            *(f"{point[loop]['seconds']:.3g} s" for loop in ("ours", "trl")),
            f"{point['ratio']:.1f}",
        )
        for point in benchmark("vs_trl_groups")["points"]
    ]


def accuracy_rows() -> list[str]:
    found = benchmark("vs_trl_accuracy")
    rows = []
    for points in zip(found["ours"], found["trl"], strict=True):
        cells = [f"{points[0]['seconds']:.0f}", *(point["iterations"] for point in points)]
        for kind in ("sampled", "greedy"):
            cells += [f"{point['accuracies'][kind]['accuracy']:.1%}" for point in points]
        rows.append(line(*cells))
    return rows


def roofline_rows() -> list[str]:
    models = benchmark("roofline"), benchmark("roofline_smollm2")
    rows = []
    for phase in models[0]["seconds"]:
        cells = [phase]
        for found in models:
            actual, floor = found["seconds"][phase], found["floor"].get(phase, {}).get("shapes")
            cells += [f"{floor:.3f} s" if floor else "", f"{actual:.3f} s"]
            cells.append(f"{actual / floor:.1f}" if floor else "")
        rows.append(line(*cells))
    return rows


def distributed_rows() -> list[str]:
    return [
        line(
            *(run[name] for name in ("processes", "batch_size", "scaling")),
            *(f"{run['seconds']:.3f}", f"{run['efficiency']:.2f}"),
            *(f"{run['mb_sent_per_process']:,.0f}", f"{run['allreduce_alone']:.3f} s"),
        )
        for run in benchmark("distributed")["runs"]
    ]


def own_problem_rows() -> list[str]:
    reasoning = [result_row(f"reasoning, seed {n}", f"reasoning/seed{n}") for n in range(2)]
    return [*reasoning, result_row("spelling, seed 0", "spelling")]


def pass_at_k_rows() -> list[str]:
    """Of what `inference.py --evaluate --num_samples 64` printed."""
    printed = (read(f"results/smollm2/{model}_pass_at_k.txt") for model in ("base", "trained"))
    base, trained = (dict(re.findall(r"pass@(\d+) +(.*%)", text)) for text in printed)
    return [line(k, base[k], trained[k]) for k in ("1", "4", "16", "64")]


class Table(NamedTuple):
    page: str
    heading: str  # how its first line starts
    rows: Callable[[], list[str]]


RUNS = "| run | sampled, before |"
TABLES = [
    Table("README.md", RUNS, lambda: [result_row(f"seed {n}", f"tiny/seed{n}") for n in range(3)]),
    Table("docs/training.md", RUNS, lambda: [result_row("lr 1e-7", "tiny_reference")]),
    Table("docs/real_llm.md", RUNS, lambda: [result_row("seed 0", "smollm2/seed0")]),
    Table("docs/real_llm.md", "| k |", pass_at_k_rows),
    Table("docs/your_own_problem.md", RUNS, own_problem_rows),
    Table("docs/ablation.md", "| variant |", lambda: tables(benchmark("ablation")["runs"])[0][2:]),
    Table(
        "docs/ablation.md", "| minus GRPO |", lambda: tables(benchmark("ablation")["runs"])[1][2:]
    ),
    Table("docs/performance.md", "| model | batch |", trl_rows),
    Table("docs/performance.md", "| G | this loop |", group_rows),
    Table("docs/performance.md", "| seconds of training |", accuracy_rows),
    Table("docs/performance.md", "| phase |", roofline_rows),
    Table("docs/distributed.md", "| processes |", distributed_rows),
]


def rows_below(text: str, heading: str) -> list[str]:
    """The rows of the one table whose first line starts with `heading`."""
    [start] = [i for i, row in enumerate(text.splitlines()) if row.startswith(heading)]
    below = text.splitlines()[start + 2 :]
    end = next((i for i, row in enumerate(below) if not row.startswith("|")), len(below))
    return below[:end]


@pytest.mark.parametrize("table", TABLES, ids=lambda t: f"{t.page} {t.heading}")
def test_a_table_of_results_is_that_of_its_result_files(table):
    assert rows_below(read(table.page), table.heading) == table.rows()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_runs_of_the_bundled_model_are_its_preset(seed):
    metrics = committed(f"tiny/seed{seed}")
    assert metrics["status"] == "finished"
    assert metrics["config"]["seed"] == seed
    assert {n: metrics["config"][n] for n in PRESETS["tiny"]} == PRESETS["tiny"]
    assert len(metrics["iterations"]) == metrics["config"]["num_iterations"]


def test_the_other_runs_are_what_their_pages_say():
    metrics = committed("tiny_reference")
    assert metrics["config"]["learning_rate"] == 1e-7
    assert metrics["config"]["preset"] == "reference" and metrics["status"] == "finished"
    metrics = committed("smollm2/seed0")
    assert {n: metrics["config"][n] for n in PRESETS["smollm2"]} == PRESETS["smollm2"]
    assert len(metrics["iterations"]) == metrics["config"]["num_iterations"]
    assert metrics["status"] == "finished"
    assert metrics["environment"]["model_source"]["weights"] == "Q4_1, dequantised"


def test_accuracy_stalled_at_a_constant_rate():
    falling, constant = committed("smollm2/seed0"), committed("smollm2/constant_rate")
    differ = {n for n, v in falling["config"].items() if constant["config"].get(n) != v}
    assert differ == {"lr_schedule", "num_iterations", "eval_every"}
    found = {
        e["iteration"]: f"{e['accuracies']['sampled']['accuracy']:.1%}"
        for e in constant["evaluations"]
        if e["split"] == "validation"
    }
    text = " ".join(read("docs/real_llm.md").split())
    assert list(found) == [0, 50, 100]
    assert f"{found[50]} of the validation problems after 50 iterations, {found[100]} after" in text


def test_the_configuration_table_holds_each_difference_of_the_presets():
    presets = {name: {**asdict(Config()), **values} for name, values in PRESETS.items()}
    rows = rows_below(read("README.md"), "| setting |")
    cells = [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in rows]
    assert {name for name, *_ in cells} == set().union(*PRESETS.values())
    for name, *values, _ in cells:
        assert values == [str(preset[name]) for preset in presets.values()], name


@pytest.mark.parametrize("page", [*PAGES, *CARDS])
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", read(page)):
        name, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / name if name else ROOT / page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, target


@pytest.mark.parametrize("page", PAGES)
def test_every_name_script_and_flag_in_a_page_exists(page):
    places = (".", "engine", "benchmarks", "tiny_model", "examples")
    code = "".join(p.read_text() for place in places for p in (ROOT / place).glob("*.py"))
    known = set(re.findall(r"\w+", code))
    for name in re.findall(r"`([a-zA-Z]+_[a-z_]+|[A-Z][a-z]+[A-Z]\w+)\b", read(page)):
        assert name in known, name
    for script in re.findall(r"python (\S+\.py)", read(page)):
        assert (ROOT / script).exists(), script
    for flag in re.findall(r"--([a-z][\w-]+)", read(page)):
        assert flag in known | TORCHRUN | {"index-url"}, flag

"""docs/lessons.md and its figures say what the committed runs say."""

import hashlib
import json
import re
import sys
from collections import Counter
from statistics import fmean

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import figures

from engine.checkpoint import COMPLETIONS_FILE
from engine.problems import RewardFile
from engine.run import best_iteration, validations

PAGE = (ROOT / "docs" / "lessons.md").read_text(encoding="utf-8")
JUDGE = ROOT / "examples" / "lax_judge.py"
RULES = ("last_number", "substring", "within_10", "within_1", "exact")
FIGURES = [name for name in figures.FIGURES if name.startswith("lesson_")]


def table(heading: str) -> list[str]:
    """The rows of the one table whose first line starts with `heading`."""
    [block] = [b for b in PAGE.split("\n\n") if b.startswith(heading)]
    return block.splitlines()[2:]


def line(*cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def percent(share: float) -> str:
    return f"{share:.1%}"


def on_test(run: str) -> dict:
    """The evaluation of the saved policy on the test problems."""
    return [e for e in figures.lesson_run(run)["evaluations"] if e["split"] == "test"][-1]


def part_before_and_after(run: str, part: str) -> str:
    first, *_, last = map(figures.part_of(part), validations(figures.lesson_run(run)))
    return f"{first:.1%} to {last:.1%}"


def judge_row(rule: str) -> str:
    return line(f"`{rule}`", *(part_before_and_after(rule, part) for part in (rule, "exact")))


def judge_for(rule: str) -> str:
    """The text of the judge with its 1 at `rule`."""
    text = re.sub(r'("\w+"): [01]', r"\1: 0", JUDGE.read_text(encoding="utf-8"))
    return text.replace(f'"{rule}": 0', f'"{rule}": 1')


def forgetting_row(rate: str, beta: float, run: str) -> str:
    """Medians and means over the end of a run: 50 iterations, five validations."""
    metrics = figures.lesson_run(run)
    last = validations(metrics)[-5:]
    kl = np.median([m["kl"] for m in metrics["iterations"][-50:]])
    off_task = fmean(e["off_task"]["accuracy"] for e in last)
    accuracies = (fmean(figures.accuracy_of(k, e) for e in last) for k in ("sampled", "greedy"))
    return line(rate, beta, f"{kl:.2f}", *map(percent, (off_task, *accuracies)))


def stopping_row(label: str, run: str, flag: str, flags: dict) -> str:
    metrics = figures.lesson_run(run)
    seen = figures.stopped(metrics, **flags)
    done, best, last = len(seen["iterations"]), best_iteration(seen), seen["evaluations"][-1]
    [saved] = [e for e in seen["evaluations"] if e["iteration"] == best]
    accuracies = (percent(figures.accuracy_of("sampled", e)) for e in (saved, last))
    return line(label, flag, done, best, *accuracies, percent(last["off_task"]["accuracy"]))


def base_row(label: str, base: str, run: str) -> str:
    pass_at = json.loads((figures.LESSONS / base).read_text())["pass_at"]
    accuracies = (figures.accuracy_of(kind, on_test(run)) for kind in ("sampled", "greedy"))
    return line(label, *map(percent, (pass_at["1"], pass_at["8"], pass_at["64"], *accuracies)))


def test_the_judges_measured_what_the_table_says():
    assert table("| rule that trains |") == [judge_row(rule) for rule in RULES]


@pytest.mark.parametrize("rule", RULES)
def test_a_judge_of_the_table_is_the_committed_file_with_its_1_moved(rule, tmp_path):
    metrics = figures.lesson_run(rule)
    assert metrics["reward_weights"] == {name: int(name == rule) for name in RULES}
    digest = hashlib.sha256(judge_for(rule).encode()).hexdigest()
    assert metrics["environment"]["rewards_sha256"] == digest
    (tmp_path / "judge.py").write_text(judge_for(rule), encoding="utf-8")
    assert RewardFile(str(tmp_path / "judge.py")).weights == metrics["reward_weights"]


JUDGED = {  # what each rule gives where the truth is 3
    "<answer>3</answer>": (1, 1, 1, 1, 1),
    "3": (1, 1, 0, 0, 0),
    "2 + 1 = 3": (1, 1, 0, 0, 0),
    "3 = 2 + 1": (0, 1, 0, 0, 0),
    "<answer>-3</answer>": (0, 1, 1, 0, 0),
    "<answer>13</answer>": (0, 1, 1, 0, 0),
    "<answer>14</answer>": (0, 0, 0, 0, 0),
    "<answer>4</answer>": (0, 0, 1, 1, 0),
    "<answer>three</answer>": (0, 0, 0, 0, 0),
    "": (0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("completion", JUDGED)
def test_each_lax_rule_has_its_gap(completion):
    scores = RewardFile("examples/lax_judge.py").score(completion, 3)
    assert scores == dict(zip(RULES, JUDGED[completion], strict=True))


def test_the_table_of_forgetting_is_that_of_the_runs():
    expected = [
        forgetting_row(rate, beta, run)
        for rate, runs in figures.FORGETTING.items()
        for beta, run in runs.items()
    ]
    assert table("| learning rate | `beta` |") == expected


def test_the_table_of_stops_follows_the_rule_of_the_trainer():
    flags = {"none": {}} | {f"`{flag}`": settings for flag, settings in figures.STOPS.items()}
    runs = figures.PAST_BEST.items()
    expected = [stopping_row(*run, *flag) for run in runs for flag in flags.items()]
    assert table("| run | flag |") == expected


def test_the_table_of_bases_is_that_of_the_runs():
    rows = [base_row(label, *files) for label, files in figures.BASES.items()]
    assert table("| pre-trained |") == rows
    for base, run in figures.BASES.values():
        measured = json.loads((figures.LESSONS / base).read_text())
        environment = figures.lesson_run(run)["environment"]
        assert measured["base_model_crc32"] == environment["base_model_crc32"]


def test_each_figure_of_the_lessons_is_shown_with_a_text_for_it():
    assert re.findall(r"^!\[.+\]\((.+)\)$", PAGE, re.MULTILINE) == FIGURES


def test_the_runs_are_what_the_page_says():
    base = figures.lesson_run("base_s0")["config"]
    changed = {rule: {"rewards": "examples/lax_judge.py"} for rule in RULES}
    changed = {rule: c | {"num_iterations": 100, "eval_every": 10} for rule, c in changed.items()}
    for label, runs in figures.FORGETTING.items():
        setting = {"learning_rate": float(label.split(",")[0]), "seed": int("seed 1" in label)}
        changed |= {run: setting | {"beta": beta} for beta, run in runs.items()}
    changed["lr2e-4_s0"] = {"learning_rate": 2e-4}
    changed["less_s0"] = {"model_name": "runs/less_base"}
    for run, settings in changed.items():
        found = figures.lesson_run(run)
        assert found["config"] == {**base, **settings, "output_dir": f"runs/{run}"}
        assert len(found["iterations"]) == found["config"]["num_iterations"]
        assert found["environment"]["threads"] == 1
        assert "dirty" not in found["environment"]["git_commit"]
    assert (base["preset"], base["seed"], base["num_iterations"]) == ("tiny", 0, 300)


def group(run: str, iteration: int) -> tuple[int, Counter]:
    """The answer of a logged group, and how often each text that earned the reward was said."""
    lines = (figures.LESSONS / run / COMPLETIONS_FILE).read_text().splitlines()
    [found] = [g for g in map(json.loads, lines) if g["iteration"] == iteration]
    return found["answer"], Counter(c["text"] for c in found["completions"] if c[run] == 1)


def test_the_quoted_answers_to_lax_judges_are_lines_of_the_runs():
    assert group("last_number", 100) == (17, {"17": 27, "<answer>17": 5})
    answer, said = group("within_10", 100)
    assert answer == 17 and said["<answer>18</answer>"] == 16 and said["<answer>17</answer>"] == 14
    assert figures.lesson_run("last_number")["best_iteration"] == 0
    assert "| no tags | 10.0% |" in (ROOT / "tiny_model" / "README.md").read_text()


def means(run: str, names: tuple, first: int, last: int) -> list[float]:
    """Means of metrics over the iterations first to last."""
    chosen = figures.lesson_run(run)["iterations"][first - 1 : last]
    return [fmean(m[name] for m in chosen) for name in names]


def test_the_numbers_in_the_text_of_lesson_1_are_those_of_the_runs():
    ends = {rule: validations(figures.lesson_run(rule))[-1] for rule in RULES}
    for rule in ("within_10", "within_1"):
        wrong = 1 - figures.part_of("exact")(ends[rule]) / figures.part_of(rule)(ends[rule])
        assert wrong == pytest.approx(0.5, abs=0.05)  # "about half"
    hits = [figures.part_of(part)(ends["substring"]) for part in ("substring", "last_number")]
    assert hits[0] - hits[1] < 0.005  # "unused"


def cells(row: str) -> list[float]:
    return [float(cell.strip(" %")) for cell in row.split("|")[3:-1]]


def test_the_text_of_lesson_2_reads_its_table():
    rows = [cells(row) for row in table("| learning rate | `beta` |")]
    preset, *high = rows[:3], rows[3:6], rows[6:]
    assert min(sums for _, sums, *_ in preset) > 99  # "almost nothing"
    assert f"costs {preset[1][2] - preset[2][2]:.0f} points of sampled" in PAGE
    assert f"Greedy accuracy loses {preset[1][3] - preset[2][3]:.0f} points" in PAGE
    for none, small, large in high:
        assert max(sums for _, sums, *_ in (none, small, large)) < 80
        assert all(none[i] < min(small[i], large[i]) for i in (1, 2, 3))
        assert small[1] < large[1] < small[1] + 3  # "hardly more"
    costs = [f"{small[2] - large[2]:.0f}" for _, small, large in high]
    assert f"costs {' to '.join(costs)} points" in " ".join(PAGE.split())


def test_the_numbers_in_the_text_of_lesson_3_are_those_of_the_runs():
    text = " ".join(PAGE.split())
    seed0, seed1 = (figures.lesson_run(f"lr5e-4_beta0_s{seed}") for seed in (0, 1))
    base, *_, last = (figures.accuracy_of("sampled", e) for e in validations(seed1))
    assert last < base and f"at {last:.1%}, is worse than the base model, at {base:.1%}" in text
    best, end = best_iteration(seed0), figures.accuracy_of("sampled", validations(seed0)[-1])
    assert f"are best at iteration {best} and fall to {end:.1%}" in text
    preset = figures.lesson_run("base_s0")
    assert best_iteration(preset) == 300
    assert np.median([m["kl"] for m in preset["iterations"]]) == pytest.approx(0.2, abs=0.05)


def test_the_numbers_in_the_text_of_lesson_4_are_those_of_the_runs():
    text = " ".join(PAGE.split())
    [equal] = means("less_s0", ("frac_zero_std_groups",), 1, 50)
    assert f"only {equal:.0%} of its first 50 iterations' groups" in text
    young, bundled = (means(run, ("entropy",), 1, 10)[0] for run in ("less_s0", "base_s0"))
    assert f"(entropy {young:.2f} nats per token in the first ten iterations, {bundled:.2f}" in text
    pass_at = json.loads((figures.LESSONS / "less.json").read_text())["pass_at"]
    after = figures.accuracy_of("sampled", on_test("less_s0"))
    assert f"{pass_at['64']:.1%} of the problems for the younger model" in text
    assert f"from {pass_at['1']:.1%} to {after:.1%}" in text


def test_the_task_decides_as_the_page_says():
    spelling = json.loads((ROOT / "results/smollm2/spelling/grpo_metrics.json").read_text())
    arithmetic = json.loads((ROOT / "results/smollm2/seed0/grpo_metrics.json").read_text())
    tested = {}
    for task, metrics in (("spelling", spelling), ("arithmetic", arithmetic)):
        found = [e["accuracies"] for e in metrics["evaluations"] if e["split"] == "test"]
        tested[task] = [f"{a['sampled']['accuracy']:.0%}" for a in found]
    assert tested == {"spelling": ["0%", "0%"], "arithmetic": ["17%", "69%"]}
    config, history = spelling["config"], spelling["iterations"]
    sampled = config["batch_size"] * config["num_generations"]
    right = round(sum(m["accuracy"] for m in history) * sampled)
    assert (sampled * len(history), right) == (7680, 8)
    first, last = (
        fmean(m["reward_letters"] for m in part) for part in (history[:10], history[-10:])
    )
    assert (f"{first:.0%}", f"{last:.0%}") == ("7%", "14%")
    equal = [
        fmean(m["frac_zero_std_groups"] for m in h["iterations"]) for h in (spelling, arithmetic)
    ]
    assert equal[0] < 0.1 < equal[1]
    lesson = (ROOT / "docs/lessons.md").read_text(encoding="utf-8").split("## 5.")[1]
    lesson = " ".join(lesson.split())
    for said in ("starts at 17%", "reaches 69%", "7,680", "8 are right", "from 7% to 14%"):
        assert said in lesson

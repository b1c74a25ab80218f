"""grpo_report.html and what it is made of: the logged groups. In a browser: test_browser.py."""

import copy
import json
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from processes import arguments, assert_same_checkpoint, finish, metrics_but_for_times
from short_runs import make_learner, make_task, short_config
from small_models import unpadded_logprobs
from test_plots import write_run

import plot_metrics
import train_grpo
from engine.files import COMPLETIONS_FILE, METRICS_FILE
from engine.metrics import group_record, token_texts
from engine.policy import Policy
from engine.problems import LOGPROBS
from engine.report import REPORT_FILE
from engine.run import Run
from engine.tree import TreePolicy
from plot_metrics import main
from rewards import score
from train_grpo import Config, group_advantages, train_iteration

HOSTILE = "</script><img src=x onerror=alert(1)><!--\u2028\ud800"


class Scripts(HTMLParser):
    """Collects the tags of a page, and what its scripts hold."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = tag == "script"
        self.scripts += [""] * self.inside

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def report(*files) -> list[dict]:
    """Write the report of metrics files, as a user does; the data that it holds, run by run."""
    folder = files[0].parent
    assert main([*map(str, files), "--output_dir", str(folder)]) == 0
    data, code = Scripts((folder / REPORT_FILE).read_text(encoding="utf-8")).scripts
    assert code.lstrip().startswith('"use strict";')
    return json.loads(data)["runs"]


def completion(texts: list[str], **rest) -> dict:
    """A completion of the log with these tokens."""
    columns = {name: [-0.1234 - i for i in range(len(texts))] for name in LOGPROBS}
    fields = {
        "text": "".join(texts),
        "brief": 0.5,
        "exact": 0.0,
        "advantage": -0.71234,
        "truncated": False,
    }
    return {**fields, "tokens": len(texts), "token_texts": texts, **columns, **rest}


def write_groups(folder, groups: list[list[dict]]) -> None:
    lines = [
        {"iteration": i + 1, "question": "What?", "answer": 7, "completions": completions}
        for i, completions in enumerate(groups)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / COMPLETIONS_FILE).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("beta, micro_batch_size", [(0.04, 0), (0.0, 3)])
@pytest.mark.parametrize("kind", [Policy, TreePolicy])
def test_tokens_are_scored_as_unpadded_passes_score_them(
    kind, beta, micro_batch_size, tiny, monkeypatch
):
    def advantages(rewards, group, scale):
        """Every other one is 0: without a KL term, training leaves these completions out."""
        return group_advantages(rewards, group, scale) * (torch.arange(len(rewards)) % 2)

    monkeypatch.setattr(train_grpo, "group_advantages", advantages)
    config = short_config("", beta=beta, num_generations=8, micro_batch_size=micro_batch_size)
    learner = make_learner(kind(copy.deepcopy(tiny[0].model)), config)
    task = make_task(tiny[1], config)
    before = copy.deepcopy(learner.policy.model)
    _, group = train_iteration(task, learner, config)
    inputs = group, learner.policy, learner.reference, task.tokenizer, micro_batch_size
    rows = group_record(*inputs)["completions"]
    models = before, learner.policy.model, learner.reference.model
    with torch.no_grad():
        scores = [unpadded_logprobs(model, group.rollout) for model in models]
    assert len(rows) == 8
    for i, row in enumerate(rows):
        for name, expected in zip(LOGPROBS, scores, strict=True):
            expected = expected[i, : row["tokens"]].tolist()
            assert row[name] == pytest.approx(expected, abs=2e-4), name
            assert row[name] == [round(value, 4) for value in row[name]]
    left_out = [row for row in rows if row["advantage"] == 0]
    assert len(left_out) >= 4
    assert any(row["updated_logprobs"] != row["sampled_logprobs"] for row in left_out)


def test_token_texts_make_up_the_text(tiny, tmp_path):
    finish(tmp_path, "--num_iterations", 2, "--eval_every", 0)
    end = tiny[1].eos_token
    for line in map(json.loads, (tmp_path / COMPLETIONS_FILE).read_text().splitlines()):
        for row in line["completions"]:
            ended = row["text"] + end * (not row["truncated"])
            assert "".join(row["token_texts"]) == ended and len(row["token_texts"]) == row["tokens"]


class Spaced:
    """A tokenizer that leaves out the space before the first token of a text."""

    def __len__(self) -> int:
        return 3

    def batch_decode(self, rows, **options) -> list[str]:
        known = {0: " a", 1: "b", 2: "\ufffd"}
        return ["".join(known.get(i, "") for i in row).lstrip() for row in rows]


def test_a_token_keeps_its_space_and_an_unknown_one_its_number():
    texts = token_texts(Spaced(), [0, 1, 2, 5])
    assert texts == {0: " a", 1: "b", 2: "\ufffd", 5: "<unknown tokens [5]>"}


def test_logging_changes_no_bit_of_the_training(tmp_path):
    folders = [tmp_path / name for name in ("all", "none", "default")]
    flags = ("--num_iterations", 4, "--log_completions_every")
    for folder, every in zip(folders, (1, -1, 0), strict=True):
        finish(folder, *flags, every)
    assert not (folders[1] / COMPLETIONS_FILE).exists()
    found = [metrics_but_for_times(folder) for folder in folders]
    for metrics, folder in zip(found, folders, strict=True):
        for iteration in metrics["iterations"]:
            iteration.pop("rollout_seconds", None)
        assert metrics["iterations"] == found[0]["iterations"]
        assert_same_checkpoint(folder, folders[0])


def test_two_fixed_questions_are_asked_sixteen_times_each(tmp_path):
    finish(tmp_path, "--num_iterations", 3, "--eval_every", 0)
    lines = [json.loads(line) for line in (tmp_path / COMPLETIONS_FILE).read_text().splitlines()]
    asked = [[fixed["question"] for fixed in line["fixed"]] for line in lines]
    example = json.loads((tmp_path / METRICS_FILE).read_text())["evaluations"][1]["example"]
    assert asked == [asked[0]] * 3 and len(set(asked[0])) == 2
    assert asked[0][0] == example["question"]
    for fixed in (fixed for line in lines for fixed in line["fixed"]):
        answers = fixed["completions"]
        assert sum(answer["count"] for answer in answers) == 16
        assert len({answer["text"] for answer in answers}) == len(answers)
        for answer in answers:
            assert answer["exact"] == (score(answer["text"], fixed["answer"]).exact == 1)
    assert lines[0]["fixed"] != lines[1]["fixed"]  # each time with other random numbers


def logged(iterations: int, every: int = 0) -> list[int]:
    config = Config(num_iterations=iterations, log_completions_every=every)
    run = SimpleNamespace(config=config, writes=True)
    return [i for i in range(1, iterations + 1) if Run.logs_group(run, i)]


def test_about_thirty_groups_of_a_run_are_logged():
    for iterations in (20, 30, 40, 60, 100, 120, 200, 300, 1000, 2000):
        assert 20 <= len(logged(iterations)) <= 40, iterations
    assert logged(300) == [1, *range(10, 301, 10)]
    assert logged(7, every=3) == [1, 3, 6] and logged(7, every=-1) == []
    processes = SimpleNamespace(config=Config(), writes=False)
    assert not Run.logs_group(processes, 1)


def test_the_page_holds_what_was_logged_and_equal_completions_once(tmp_path):
    path = write_run(tmp_path / METRICS_FILE)  # its reward has the parts brief and exact
    right, wrong = completion(["7", "."], advantage=1.0), completion(["8", "."])
    cut = completion(["7", "."], truncated=True, token_texts=["7."])
    write_groups(tmp_path, [[wrong, right, cut, wrong, wrong], [right]])
    [run] = report(path)
    first, second = run["groups"]
    assert [row.pop("count") for row in first["completions"]] == [3, 1, 1]
    assert second["completions"] == [first["completions"][1] | {"count": 1}]
    for row, written in zip(first["completions"], [wrong, right, cut], strict=True):
        parts = dict(zip(run["parts"], row.pop("parts"), strict=True))
        assert row | parts == written
    history = json.loads(path.read_text())["iterations"]
    curves = run["curves"]
    assert curves["x"] == list(range(1, 121))
    assert curves["accuracy"] == pytest.approx([m["accuracy"] for m in history], rel=1e-5)
    last = sum(m["accuracy"] for m in history[-50:]) / 50
    assert curves["mean_accuracy"][-1] == pytest.approx(last, rel=1e-5)
    assert curves["frac_zero_std_groups"] == [None] * 120  # not recorded


def test_no_text_of_a_model_becomes_markup(tmp_path):
    path = write_run(tmp_path / METRICS_FILE)
    write_groups(tmp_path, [[completion([HOSTILE])]])
    metrics = json.loads(path.read_text()) | {"config": {"model_name": HOSTILE}}
    path.write_text(json.dumps(metrics))
    [run] = report(path)
    assert run["groups"][0]["completions"][0]["text"] == HOSTILE
    assert run["config"]["model_name"] == run["facts"]["model"] == HOSTILE
    page = (tmp_path / REPORT_FILE).read_text(encoding="utf-8")
    assert Scripts(page).tags.count("script") == 2 and "img" not in Scripts(page).tags
    assert not re.search(r"\.(innerHTML|outerHTML|insertAdjacentHTML)|document\.write|eval\(", page)
    assert not re.search(r"(src|href)=|url\(|@import|fetch\(", page.split('id="data">')[0])


@pytest.mark.parametrize("run", sorted(path.parent for path in ROOT.glob("results/*/*/*.jsonl")))
def test_a_run_of_older_code_shows_what_it_has(run, tmp_path):
    for name in (METRICS_FILE, COMPLETIONS_FILE):
        shutil.copy(run / name, tmp_path)
    [data] = report(tmp_path / METRICS_FILE)
    lines = (run / COMPLETIONS_FILE).read_text().splitlines()
    assert len(data["groups"]) == len(lines)
    assert data["parts"] == list(data["reward_weights"])
    assert data["facts"]["model"] == data["config"]["model_name"]


def test_a_running_or_killed_run_shows_what_is_there(tmp_path):
    path = write_run(tmp_path / METRICS_FILE, iterations=2)
    metrics = json.loads(path.read_text()) | {"status": "running", "stop_reason": None}
    metrics["iterations"][1]["kl"] = None  # was not finite
    path.write_text(json.dumps(metrics))
    write_groups(tmp_path, [[completion(["7"])]] * 3)
    whole = (tmp_path / COMPLETIONS_FILE).read_bytes()
    for tail in (whole[:40], b'{"iteration": 4}\n', b"[]\n", b"\xff\n"):
        (tmp_path / COMPLETIONS_FILE).write_bytes(whole + tail)
        [run] = report(path)
        assert [group["iteration"] for group in run["groups"]] == [1, 2, 3]
    assert run["facts"]["status"] == "running"
    assert run["facts"]["test accuracy, greedy"] == "not measured yet"
    assert run["curves"]["kl"] == [0, None] and run["curves"]["mean_kl"] == [0, 0]
    (tmp_path / COMPLETIONS_FILE).unlink()
    assert report(path)[0]["groups"] == []


def test_several_runs_share_their_curves(tmp_path):
    paths = [write_run(tmp_path / n / METRICS_FILE, level=v) for n, v in (("a", 0.2), ("b", 0.9))]
    write_groups(tmp_path / "a", [[completion(["7"])]])
    runs = report(*paths)
    assert [run["label"] for run in runs] == [str(path.parent) for path in paths]
    assert [run["curves"]["reward"][0] for run in runs] == [0.2, 0.9]
    assert [run["groups"] for run in runs] == [[], []]


def test_reports_are_small(tmp_path):
    """SmolLM2 in its preset: all completions differ and use all of their 40 tokens."""
    path = write_run(tmp_path / METRICS_FILE, iterations=200)
    rows = [completion([f" word{i}"] * 40) for i in range(16)]
    write_groups(tmp_path, [rows] * 40)
    report(path)
    assert (tmp_path / REPORT_FILE).stat().st_size < 3e6
    write_run(path, iterations=20_000)
    write_groups(tmp_path, [rows[:1]] * 500)
    [run] = report(path)
    assert len(run["curves"]["x"]) == 1000 and run["curves"]["x"][-1] == 20_000
    assert len(run["groups"]) == 100
    assert (ROOT / "docs/report.html").stat().st_size < 1e6


def test_training_writes_the_report_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(plot_metrics, "save_figure", lambda figure, path: None)
    flags = arguments("--num_iterations", 2, "--eval_every", 0, "--output_dir", tmp_path)
    assert train_grpo.main(flags) == 0
    page = (tmp_path / REPORT_FILE).read_text(encoding="utf-8")
    [run] = json.loads(Scripts(page).scripts[0])["runs"]
    assert run["status"] == "finished" and len(run["groups"]) == 2

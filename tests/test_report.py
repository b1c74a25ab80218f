"""The log of completions, and grpo_report.html made of it. In a browser: test_browser.py."""

import copy
import json
import re
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT
from processes import arguments, assert_same_checkpoint, finish, metrics_but_for_times, read_metrics
from short_runs import make_learner, make_task, short_config
from small_models import unpadded_logprobs
from test_plots import write_run

import plot_metrics
import train_grpo
from engine.files import COMPLETIONS_FILE, METRICS_FILE, append_line, cut_lines
from engine.metrics import group_record, token_texts
from engine.policy import Policy
from engine.problems import LOGPROBS, RewardFile
from engine.report import REPORT_FILE
from engine.run import Run
from engine.tree import TreePolicy
from plot_metrics import main
from rewards import score
from train_grpo import Config, group_advantages, reward_function, train_iteration

HOSTILE = "</script><img src=x onerror=alert(1)><!--\u2028\ud800"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(the folder of a short run, its logged groups)"""
    folder = tmp_path_factory.mktemp("run")
    (folder / COMPLETIONS_FILE).write_text("an earlier run's")
    with patch.object(plot_metrics, "save_figure"):
        flags = arguments("--num_iterations", 3, "--eval_every", 0, "--output_dir", folder)
        assert train_grpo.main(flags) == 0
    lines = (folder / COMPLETIONS_FILE).read_text().splitlines()
    return folder, list(map(json.loads, lines))


def scripts(folder) -> list[str]:
    """What the scripts of the report in a folder hold: its data and its code."""
    page = (folder / REPORT_FILE).read_text(encoding="utf-8")
    return re.findall(r"<script[^>]*>(.*?)</script", page, re.DOTALL)


def report(path, folder=None) -> dict:
    """Write the report of a metrics file, beside it or to a folder; the data that it holds."""
    folder = folder or path.parent
    with patch.object(plot_metrics, "save_figure"):
        assert main([str(path), "--output_dir", str(folder)]) == 0
    data, code = scripts(folder)
    assert code.lstrip().startswith('"use strict";')
    [run] = json.loads(data)["runs"]
    return run


def completion(texts: list[str], **rest) -> dict:
    """A completion of the log with these tokens."""
    columns = {name: [-0.1234 - i for i in range(len(texts))] for name in LOGPROBS}
    numbers = {"brief": 0.5, "exact": 0.0, "advantage": -0.71234, "truncated": False}
    fields = {"text": "".join(texts), "tokens": len(texts), "token_texts": texts}
    return {**fields, **numbers, **columns, **rest}


def write_groups(folder, groups: list[list[dict]]) -> None:
    lines = [
        {"iteration": i + 1, "question": "What?", "answer": 7, "completions": completions}
        for i, completions in enumerate(groups)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / COMPLETIONS_FILE).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("kind, beta, micro_batch_size", [(Policy, 0.04, 0), (TreePolicy, 0.0, 3)])
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
    assert group.problem.question in task.tokenizer.decode(group.rollout.prompt_ids[0])
    for i, row in enumerate(rows):
        for name, expected in zip(LOGPROBS, scores, strict=True):
            assert row[name] == pytest.approx(expected[i, : row["tokens"]].tolist(), abs=2e-4)
    left_out = [row for row in rows if row["advantage"] == 0]
    assert len(left_out) >= 4
    assert any(row["updated_logprobs"] != row["sampled_logprobs"] for row in left_out)


def test_completions_are_logged_with_their_tokens_and_scores(run, tiny):
    rewards = RewardFile()
    for line in run[1]:
        rows, answer = line["completions"], line["answer"]
        assert answer == eval(line["question"].removeprefix("What is ").removesuffix("?"))
        scores = [{part: row[part] for part in rewards.weights} for row in rows]
        assert scores == [rewards.score(row["text"], answer) for row in rows]
        earned, _ = reward_function([row["text"] for row in rows], [answer] * 4, rewards)
        advantages = [row["advantage"] for row in rows]
        assert advantages == pytest.approx(group_advantages(earned, 4).tolist(), abs=1e-4)
        for row in rows:
            ended = row["text"] + tiny[1].eos_token * (not row["truncated"])
            assert "".join(row["token_texts"]) == ended
            assert len(row["token_texts"]) == row["tokens"]


@pytest.mark.parametrize("tail", [b'{"itera', b'{"iteration": 3}', b'{"iteration": 4}\n'])
def test_cut_lines_keeps_whole_lines_up_to_the_iteration(tmp_path, tail):
    file = tmp_path / "lines"
    cut_lines(file, 3)  # nothing there yet
    for iteration in (1, 3):
        append_line(file, {"iteration": iteration, "text": "\u2028\n\ud800", "odd": float("nan")})
    before = file.read_bytes()
    file.write_bytes(before + tail)
    cut_lines(file, 3)
    assert file.read_bytes() == before and before.count(b"\n") == 2


class Spaced:
    """A tokenizer that leaves out the space before the first token of a text."""

    def __len__(self) -> int:
        return 2

    def batch_decode(self, rows, **options) -> list[str]:
        return ["".join((" a", "b")[i] for i in row if i < 2).lstrip() for row in rows]


def test_a_token_keeps_its_space_and_an_unknown_one_its_number():
    texts = token_texts(Spaced(), [0, 1, 5])
    assert texts == {0: " a", 1: "b", 5: "<unknown tokens [5]>"}


def test_logging_changes_no_bit_of_the_training(tmp_path):
    logged, silent = tmp_path / "logged", tmp_path / "silent"
    flags = ("--num_iterations", 4, "--log_completions_every")
    finish(logged, *flags, 1)
    finish(silent, *flags, -1)
    assert not (silent / COMPLETIONS_FILE).exists()
    found, expected = (metrics_but_for_times(folder)["iterations"] for folder in (logged, silent))
    assert found == expected
    assert_same_checkpoint(logged, silent)


def test_two_fixed_questions_are_asked_sixteen_times_each(run):
    folder, lines = run
    asked = [[fixed["question"] for fixed in line["fixed"]] for line in lines]
    example = read_metrics(folder)["evaluations"][1]["example"]
    assert asked == [[example["question"], asked[0][1]]] * 3 and len(set(asked[0])) == 2
    for fixed in (fixed for line in lines for fixed in line["fixed"]):
        assert sum(answer["count"] for answer in fixed["completions"]) == 16
        for answer in fixed["completions"]:
            assert answer["exact"] == score(answer["text"], fixed["answer"]).exact
    assert lines[0]["fixed"] != lines[1]["fixed"]  # each time with other random numbers


def logged(iterations: int, every: int = 0) -> list[int]:
    config = Config(num_iterations=iterations, log_completions_every=every)
    run = SimpleNamespace(config=config, writes=True)
    return [i for i in range(1, iterations + 1) if Run.logs_group(run, i)]


def test_about_thirty_groups_of_a_run_are_logged():
    assert all(20 <= len(logged(iterations)) <= 40 for iterations in range(20, 2000, 20))
    assert logged(300) == [1, *range(10, 301, 10)]
    assert logged(7, every=3) == [1, 3, 6] and logged(7, every=-1) == []


def test_the_page_holds_what_was_logged_and_equal_completions_once(tmp_path):
    path = write_run(tmp_path / METRICS_FILE)  # its reward has the parts brief and exact
    right, wrong = completion(["7", "."], advantage=1.0), completion(["8", "."])
    cut = completion(["7", "."], truncated=True, token_texts=["7."])
    write_groups(tmp_path, [[wrong, right, cut, wrong, wrong], [right]])
    run = report(path)
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
    run = report(path)
    assert run["groups"][0]["completions"][0]["text"] == HOSTILE
    assert run["config"]["model_name"] == run["facts"]["model"] == HOSTILE
    page = (tmp_path / REPORT_FILE).read_text(encoding="utf-8")
    assert "<" not in scripts(tmp_path)[0] and "<img" not in page
    assert not re.search(r"\.(innerHTML|outerHTML|insertAdjacentHTML)|document\.write|eval\(", page)
    assert not re.search(r"(src|href)=|url\(|@import|fetch\(", page.split('id="data">')[0])


@pytest.mark.parametrize("log", sorted(ROOT.glob("results/*/*/*.jsonl")))
def test_a_run_of_older_code_shows_what_it_has(log, tmp_path):
    data = report(log.with_name(METRICS_FILE), tmp_path)
    assert len(data["groups"]) == len(log.read_text().splitlines())
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
        run = report(path)
        assert [group["iteration"] for group in run["groups"]] == [1, 2, 3]
    assert run["facts"]["status"] == "running"
    assert run["facts"]["test accuracy, greedy"] == "not measured yet"
    assert run["curves"]["kl"] == [0, None] and run["curves"]["mean_kl"] == [0, 0]
    (tmp_path / COMPLETIONS_FILE).unlink()
    assert report(path)["groups"] == []


def test_reports_of_long_runs_are_thinned(tmp_path):
    path = write_run(tmp_path / METRICS_FILE, iterations=2000)
    write_groups(tmp_path, [[completion(["7"])]] * 500)
    run = report(path)
    assert len(run["curves"]["x"]) == 1000 and run["curves"]["x"][-1] == 2000
    assert len(run["groups"]) == 100
    assert (tmp_path / REPORT_FILE).stat().st_size < 1e6


def test_training_writes_the_report_at_its_end(run):
    [data] = json.loads(scripts(run[0])[0])["runs"]
    assert data["status"] == "finished"
    assert [group["iteration"] for group in data["groups"]] == [1, 2, 3]

"""The files of examples/ hold what their page says, are hard to game, and can be trained on."""

import json
import re
import time

import pytest
from conftest import ROOT
from short_runs import short_training

from engine.checkpoint import sha256
from engine.problems import ProblemFile, RewardFile, read_problem

REASONING = RewardFile("examples/reasoning.py")
SPELLING = RewardFile("examples/spelling.py")
LINES = (ROOT / "examples/spelling.jsonl").read_text(encoding="utf-8").splitlines()
LANGUAGES = "json", "python"  # of the files in the page

NOTHING, FORMAT, NEAR, EXACT = (0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)

# (completion, what it earns where the truth is 7): only what differs from rewards.py
REASONING_TABLE = {
    "the answer alone": ("<answer>7</answer>", EXACT),
    "steps before it": ("4 - 2 = 2\n2 + 5 = 7\n<answer>7</answer>", EXACT),
    "no space before it": ("so<answer>7</answer>", EXACT),
    "white space after it": ("so <answer>7</answer> \n", EXACT),
    "wrong steps before it": ("4 - 2 = 9\n<answer>7</answer>", EXACT),
    "another number before it": ("It is 9. <answer>7</answer>", EXACT),
    "null character before it": ("\0<answer>7</answer>", EXACT),
    "some other tag before it": ("<b>7</b> <answer>7</answer>", EXACT),
    "one too many": ("so <answer>8</answer>", NEAR),
    "the truth in the text alone": ("It is 7. <answer>9</answer>", FORMAT),
    "every number in the text": ("0 1 2 3 4 5 6 7 8 9 <answer></answer>", FORMAT),
    "ten digits": ("so <answer>0000000007</answer>", FORMAT),
    "an expression": ("so <answer>3 + 4</answer>", FORMAT),
    "a word after it": ("so <answer>7</answer> I think", NOTHING),
    "steps after it": ("<answer>7</answer>\n4 - 2 = 2\n2 + 5 = 7", NOTHING),
    "full stop after it": ("so <answer>7</answer>.", NOTHING),
    "null character after it": ("so <answer>7</answer>\0", NOTHING),
    "a reserved token after it": ("so <answer>7</answer><|user|>", NOTHING),
    "two answers": ("<answer>6</answer> no, <answer>7</answer>", NOTHING),
    "the same answer twice": ("<answer>7</answer> so <answer>7</answer>", NOTHING),
    "every answer": ("".join(f"<answer>{n}</answer>" for n in range(8)), NOTHING),
    "a second answer in capitals": ("<ANSWER>6</ANSWER> <answer>7</answer>", NOTHING),
    "a second answer, spaced": ("< answer >6</ answer > <answer>7</answer>", NOTHING),
    "a second answer in like tags": ("<answers>6</answers> <answer>7</answer>", NOTHING),
    "a tag named in the text": ("I write <answer> now: <answer>7</answer>", NOTHING),
    "closed before it": ("</answer> <answer>7</answer>", NOTHING),
    "closed twice": ("so <answer>7</answer></answer>", NOTHING),
    "nested tags": ("so <answer><answer>7</answer></answer>", NOTHING),
    "capitals inside the tags": ("so <answer><Answer>7</answer>", NOTHING),
    "unclosed": ("so <answer>7", NOTHING),
    "opened instead of closed": ("so <answer>7<answer>", NOTHING),
    "unopened": ("so 7</answer>", NOTHING),
    "capitals": ("so <ANSWER>7</ANSWER>", NOTHING),
    "bare number": ("so 7", NOTHING),
    "empty": ("", NOTHING),
}

# (completion, share of right letters or None, where the truth is tac); exact with a share of 1
SPELLING_TABLE = {
    "the right letters": ("<answer>tac</answer>", 1),
    "white space around it": (" <answer>tac</answer>\n", 1),
    "one wrong letter": ("<answer>tab</answer>", 2 / 3),
    "the word as it was asked": ("<answer>cat</answer>", 1 / 3),
    "a letter missing": ("<answer>ta</answer>", 2 / 3),
    "letters at other places": ("<answer>act</answer>", 0),
    "a letter more": ("<answer>tacs</answer>", 3 / 4),
    "the answer twice": ("<answer>tactac</answer>", 1 / 2),
    "padded with letters": (f"<answer>tac{'x' * 997}</answer>", 3 / 1000),
    "capitals": ("<answer>TAC</answer>", None),
    "one capital": ("<answer>Tac</answer>", None),
    "space inside": ("<answer> tac</answer>", None),
    "new line inside": ("<answer>tac\n</answer>", None),
    "letters apart": ("<answer>t a c</answer>", None),
    "full stop inside": ("<answer>tac.</answer>", None),
    "Cyrillic letters": ("<answer>t\u0430\u0441</answer>", None),
    "combining accent": ("<answer>tac\u0301</answer>", None),
    "zero-width space": ("<answer>\u200btac</answer>", None),
    "a number": ("<answer>7</answer>", None),
    "empty answer": ("<answer></answer>", None),
    "two answers": ("<answer>tac</answer><answer>tac</answer>", None),
    "inside prose": ("It is <answer>tac</answer>", None),
    "prose after it": ("<answer>tac</answer> I think", None),
    "bare word": ("tac", None),
    "empty": ("", None),
}


@pytest.mark.parametrize(
    "completion, expected", REASONING_TABLE.values(), ids=REASONING_TABLE.keys()
)
def test_reasoning_earns_what_its_last_answer_earns(completion, expected):
    assert tuple(REASONING.score(completion, 7).values()) == expected


@pytest.mark.parametrize("completion, share", SPELLING_TABLE.values(), ids=SPELLING_TABLE.keys())
def test_spelling_earns_its_share_of_right_letters(completion, share):
    expected = (0, 0, 0) if share is None else (1, share, int(share == 1))
    assert tuple(SPELLING.score(completion, "tac").values()) == pytest.approx(expected)


def test_reasoning_weighs_the_parts_as_the_default_does():
    assert REASONING.weights == RewardFile().weights


def test_the_spelling_reward_is_1_for_the_right_word():
    assert sum(SPELLING.weights.values()) == pytest.approx(1)


@pytest.mark.parametrize("text", ["<", "< ", "<answer>", "</", "<answer"])
def test_a_long_hostile_completion_is_scored_quickly(text):
    started = time.perf_counter()
    assert REASONING.score(text * 100_000, 7)["format"] == 0
    assert SPELLING.score(text * 100_000, "tac")["format"] == 0
    assert time.perf_counter() - started < 1


def test_parse_gives_what_was_answered():
    assert REASONING.parse("2 + 5 = 7\n<answer> 7 </answer>") == 7
    assert REASONING.parse("so <answer>7</answer> or so") is None
    assert SPELLING.parse("<answer>tac</answer>") == "tac"
    assert SPELLING.parse("<answer>7</answer>") is None


def test_each_spelling_problem_asks_for_its_word_reversed():
    words = set()
    for line in map(json.loads, LINES):
        word = line["question"].removeprefix("Spell the word ").removesuffix(" backwards.")
        assert re.fullmatch("[a-z]{3,8}", word), line
        assert line["answer"] == word[::-1] != word  # a palindrome would reward copying
        words.add(word)
    assert len(words) == len(LINES) >= 500
    page = (ROOT / "docs/your_own_problem.md").read_text(encoding="utf-8")
    assert f"{len(words):,} common words" in page


def test_each_spelling_problem_can_earn_everything():
    splits = ProblemFile("examples/spelling.jsonl").splits
    assert all(len(problems) >= 20 for problems in splits.values())
    assert sum(map(len, splits.values())) == len(LINES)
    for problem in sum(splits.values(), []):
        assert set(SPELLING.score(problem.completion, problem.answer).values()) == {1}


def test_the_files_shown_in_the_page_work_together(tmp_path):
    page = (ROOT / "docs/your_own_problem.md").read_text(encoding="utf-8")
    lines, rule = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL)[1] for kind in LANGUAGES)
    (tmp_path / "my.py").write_text(rule, encoding="utf-8")
    shown = RewardFile(str(tmp_path / "my.py"))
    for problem in map(read_problem, lines.encode().splitlines()):
        assert shown.score(problem.completion, problem.answer) == dict.fromkeys(shown.weights, 1)
        assert shown.score("So:\n" + problem.completion, problem.answer)["exact"] == 1
        assert shown.score(problem.completion + " or so", problem.answer)["format"] == 0
        assert shown.parse(problem.completion) == str(problem.answer)


RUNS = {
    "reasoning": {"rewards": "examples/reasoning.py"},
    "spelling": {"problems": "examples/spelling.jsonl", "rewards": "examples/spelling.py"},
}


@pytest.mark.parametrize("name", RUNS)
def test_each_example_trains(name, tmp_path):
    settings = {"num_iterations": 2, "num_examples": 1, "log_completions_every": 1}
    metrics, _ = short_training(tmp_path, **RUNS[name], **settings)
    assert metrics["status"] == "finished"
    assert metrics["environment"]["rewards_sha256"] == sha256(ROOT / f"examples/{name}.py")
    parts = {"reasoning": REASONING, "spelling": SPELLING}[name].weights
    for iteration in metrics["iterations"]:
        assert {n for n in iteration if n.startswith("reward_")} == {f"reward_{p}" for p in parts}
    groups = (tmp_path / "grpo_completions.jsonl").read_text(encoding="utf-8").splitlines()
    first = {"reasoning": "What is (", "spelling": "Spell the word "}[name]
    assert [json.loads(g)["question"].startswith(first) for g in groups] == [True, True]


@pytest.mark.parametrize("run", ["reasoning/seed0", "reasoning/seed1", "spelling"])
def test_a_committed_run_used_the_files_as_they_are(run):
    metrics = json.loads((ROOT / f"results/{run}/grpo_metrics.json").read_text(encoding="utf-8"))
    assert metrics["status"] == "finished"
    for kind in ("problems", "rewards"):
        file = metrics["config"][kind]
        assert metrics["environment"][f"{kind}_sha256"] == (file and sha256(ROOT / file))


def test_the_committed_run_of_spelling_had_no_signal():
    metrics = json.loads((ROOT / "results/spelling/grpo_metrics.json").read_text(encoding="utf-8"))
    assert metrics["no_signal"] == 50
    for iteration in metrics["iterations"]:
        assert (iteration["reward"], iteration["kl"]) == (0, 0)
        assert iteration["frac_zero_std_groups"] == 1


LAX_TABLE = {  # what (last_number, substring, within_10, within_1, exact) give where 3 is right
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


@pytest.mark.parametrize("completion", LAX_TABLE)
def test_each_lax_rule_has_its_gap(completion):
    scores = RewardFile("examples/lax_judge.py").score(completion, 3)
    assert tuple(scores.values()) == LAX_TABLE[completion]

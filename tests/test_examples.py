"""The files of examples/ hold what their page says, and are hard to game."""

import importlib.util
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

from engine.files import sha256
from engine.problems import ProblemFile, RewardFile, read_problem
from train_grpo import Config, load_task, reward_function

JUDGES = {
    name: RewardFile(f"examples/{name}.py") for name in ("reasoning", "spelling", "lax_judge")
}
SPELLING_PROBLEMS = "examples/spelling.jsonl"
NOTHING, FORMAT, NEAR, EXACT = (0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)

# What a completion earns where the truth is 7: only what differs from rewards.py.
REASONING = {
    "<answer>7</answer>": EXACT,
    "4 - 2 = 2\n2 + 5 = 7\n<answer>7</answer>": EXACT,
    "4 - 2 = 9\n<answer>7</answer>": EXACT,
    "<b>7</b> <answer>7</answer>": EXACT,
    "so <answer>8</answer>": NEAR,
    "It is 7. <answer>9</answer>": FORMAT,
    "so <answer>7</answer> I think": NOTHING,
    "so <answer>7</answer><|user|>": NOTHING,
    "<answer>6</answer> no, <answer>7</answer>": NOTHING,
    "<ANSWER>6</ANSWER> <answer>7</answer>": NOTHING,
    "< answer >6</ answer > <answer>7</answer>": NOTHING,
    "I write <answer> now: <answer>7</answer>": NOTHING,
    "</answer> <answer>7</answer>": NOTHING,
    "so <answer><answer>7</answer>": NOTHING,
    "so 7": NOTHING,
}
# ... where the truth is tac.
SPELLING = {
    "<answer>tac</answer>": EXACT,
    " <answer>tac</answer>\n": EXACT,
    "<answer>tab</answer>": (1, 2 / 3, 0),
    "<answer>cat</answer>": (1, 1 / 3, 0),  # the word as it was asked
    "<answer>act</answer>": FORMAT,
    "<answer>tactac</answer>": (1, 1 / 2, 0),
    f"<answer>tac{'x' * 997}</answer>": (1, 3 / 1000, 0),
    "<answer>Tac</answer>": NOTHING,
    "<answer>t a c</answer>": NOTHING,
    "<answer>t\u0430\u0441</answer>": NOTHING,  # Cyrillic letters
    "<answer>tac</answer><answer>tac</answer>": NOTHING,
    "It is <answer>tac</answer>": NOTHING,
    "tac": NOTHING,
}
# What last_number, substring, within_10, within_1 and exact give where the truth is 3.
LAX = {
    "<answer>3</answer>": (1, 1, 1, 1, 1),
    "2 + 1 = 3": (1, 1, 0, 0, 0),
    "3 = 2 + 1": (0, 1, 0, 0, 0),
    "<answer>13</answer>": (0, 1, 1, 0, 0),
    "<answer>14</answer>": (0, 0, 0, 0, 0),
    "<answer>4</answer>": (0, 0, 1, 1, 0),
    "<answer>three</answer>": (0, 0, 0, 0, 0),
}
TABLES = {"reasoning": (7, REASONING), "spelling": ("tac", SPELLING), "lax_judge": (3, LAX)}


@pytest.mark.parametrize("name", TABLES)
def test_each_trick_earns_what_the_table_says(name):
    answer, table = TABLES[name]
    earned = {text: tuple(JUDGES[name].score(text, answer).values()) for text in table}
    assert earned == {text: pytest.approx(expected) for text, expected in table.items()}


def test_reasoning_and_spelling_weigh_a_right_answer_as_1():
    assert JUDGES["reasoning"].weights == RewardFile().weights
    assert sum(JUDGES["spelling"].weights.values()) == pytest.approx(1)


@pytest.mark.parametrize("text", ["<", "< ", "<answer>", "</"])
def test_a_long_hostile_completion_is_scored_quickly(text):
    started = time.perf_counter()
    assert JUDGES["reasoning"].score(text * 100_000, 7)["format"] == 0
    assert JUDGES["spelling"].score(text * 100_000, "tac")["format"] == 0
    assert time.perf_counter() - started < 1


def test_parse_gives_what_was_answered():
    reasoning, spelling = JUDGES["reasoning"].parse, JUDGES["spelling"].parse
    assert reasoning("2 + 5 = 7\n<answer> 7 </answer>") == 7
    assert reasoning("so <answer>7</answer> or so") is None
    assert spelling("<answer>tac</answer>") == "tac" and spelling("<answer>7</answer>") is None


def page() -> str:
    return (ROOT / "docs/your_own_problem.md").read_text(encoding="utf-8")


def test_each_spelling_problem_asks_for_its_word_and_can_earn_everything():
    splits = ProblemFile(SPELLING_PROBLEMS).splits
    assert all(len(problems) >= 20 for problems in splits.values())
    words = set()
    for problem in sum(splits.values(), []):
        [word] = re.findall(r"Spell the word ([a-z]{3,8}) backwards\.", problem.question)
        assert problem.answer == word[::-1] != word  # a palindrome would reward copying
        assert {*JUDGES["spelling"].score(problem.completion, problem.answer).values()} == {1}
        words.add(word)
    assert f"{len(words):,} common words" in page()


def test_the_files_shown_in_the_page_work_together(tmp_path):
    lines, rule = (re.search(rf"```{k}\n(.*?)```", page(), re.S)[1] for k in ("json", "python"))
    (tmp_path / "my.py").write_text(rule, encoding="utf-8")
    shown = RewardFile(str(tmp_path / "my.py"))
    for problem in map(read_problem, lines.encode().splitlines()):
        assert shown.score(problem.completion, problem.answer) == dict.fromkeys(shown.weights, 1)
        assert shown.score("So:\n" + problem.completion, problem.answer)["exact"] == 1
        assert shown.score(problem.completion + " or so", problem.answer)["format"] == 0
        assert shown.parse(problem.completion) == str(problem.answer)


def test_worked_examples_with_steps_earn_everything():
    config = Config(rewards="examples/reasoning.py", show_steps=True, num_examples=6)
    assert len(load_task(config)[2].examples) == 6  # raises if one does not earn `exact`


@pytest.mark.parametrize("rewards", ["rewards.py", "examples/spelling.py"])
def test_verl_gets_the_same_rewards(rewards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("custom", ROOT / "examples/to_verl.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    answer, table = TABLES["spelling"] if "spelling" in rewards else TABLES["reasoning"]
    expected, parts = reward_function(list(table), [answer] * len(table), RewardFile(rewards))
    assert expected.max() == pytest.approx(1) and expected.min() == 0
    named = {} if rewards == "rewards.py" else {"rewards": rewards}
    with ThreadPoolExecutor(1) as thread:
        for i, text in enumerate(table):
            given = {"data_source": "mine", "solution_str": text, "ground_truth": str(answer)}
            found = thread.submit(module.compute_score, **given, extra_info={}, **named).result()
            assert found.pop("score") == pytest.approx(expected[i].item())
            assert found == {f"reward_{n}": pytest.approx(p[i].item()) for n, p in parts.items()}


def test_committed_runs_used_the_files_as_they_are():
    runs = [json.loads(file.read_text()) for file in ROOT.glob("results/**/grpo_metrics.json")]
    for example in (SPELLING_PROBLEMS, "examples/spelling.py", "examples/reasoning.py"):
        kind = "problems" if example.endswith("l") else "rewards"
        used = [run["environment"] for run in runs if run["config"].get(kind) == example]
        assert {environment[f"{kind}_sha256"] for environment in used} == {sha256(ROOT / example)}

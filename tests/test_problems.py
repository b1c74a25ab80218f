"""Questions from the user's file, rewards from the user's code."""

import json
import os
import random
import re
import shutil
import sys
import traceback
import zlib
from hashlib import sha256
from pathlib import Path

import pytest
from processes import arguments, finish, newest, read_metrics

from engine.files import METRICS_FILE, UserError, exit_code
from engine.problems import FORMAT, ProblemFile, RewardFile, warn_of_long_answers
from train_grpo import Config, load_task, main

SPLITS = ["train"] * 6 + ["validation", "test"]
LINES = [
    {"question": f"What is {n} + 1?", "answer": n + 1, "split": SPLITS[n % 8]} for n in range(40)
]
FILES = ("--problems", "sums.jsonl", "--rewards", "judge.py")


def write(name: str, *items, ends: bytes = b"\n") -> str:
    """Write a problem file; its lines are objects, or bytes as they stand."""
    lines = [item if isinstance(item, bytes) else json.dumps(item).encode() for item in items]
    Path(name).write_bytes(ends.join(lines) + ends)
    return name


def write_rewards(weights='{"exact": 1}', scores="(1,)", rest="") -> str:
    code = f"WEIGHTS = {weights}\ndef score(completion, answer):\n    return {scores}\n{rest}"
    Path("judge.py").write_text(code)
    return "judge.py"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The current folder of each test, with a sound problem file and a sound reward file."""
    monkeypatch.chdir(tmp_path)
    write("sums.jsonl", *LINES)
    write_rewards()


def refused(*flags) -> str:
    """The error with which `train_grpo.py` refuses these flags."""
    with pytest.raises(UserError) as error:
        main(arguments("--num_iterations", 3, *flags))
    assert len(str(error.value)) < 1000
    return str(error.value)


@pytest.mark.parametrize(
    "line, complaint",
    [
        (b'{"question": "a", "answer": 1', "not valid JSON"),
        (b'{"question": "\xff", "answer": 1}', "'utf-8' codec can't decode"),
        ({"answer": 1}, '"question" must be'),
        ({"question": "a"}, '"answer" must be a text or an integer, not None'),
        ({"question": "a", "answer": 1.5}, '"answer" must be'),
        ({"question": "a", "answer": 1, "split": "dev"}, "not 'dev'"),
        ({"question": "a", "answer": "\x1b[2J"}, r"\x1b"),
        ({**LINES[0], "answer": 2}, "question of line 1, with another answer or split"),
        ({**LINES[0], "split": "test"}, "question of line 1, with another answer or split"),
        ({"question": "1" * 600, "answer": 1}, "this model's context is 512"),
        ({"question": "What is <|user|>?", "answer": 1}, "holds <|user|>, which this model"),
    ],
)
def test_a_bad_line_is_one_error_with_file_and_line(line, complaint):
    error = refused("--problems", write("bad.jsonl", LINES[0], b" ", line, *LINES[1:]))
    assert re.match(r"--problems bad\.jsonl, line 3\b", error) and complaint in error


@pytest.mark.parametrize(
    "given, complaint",
    [
        ("--problems none.jsonl", "--problems none.jsonl: No such file"),
        ("--problems sums.jsonl --max_operand 5", "--problems has no operands"),
        ("--rewards none.py", "--rewards none.py: No such file"),
        ("--rewards sums.jsonl", "not a Python file (.py)"),
        ("\n".join(map(json.dumps, LINES[:7])).encode(), "no test problem among 7"),
        (json.dumps(LINES).encode(), f"{FORMAT}; this is a JSON array"),
        (b"question,answer\n1 + 1,2", f"{FORMAT}; this is a file that starts with 'ques"),
        (b"PAR1\x15\x04", f"{FORMAT}; this is Parquet"),
        (json.dumps(LINES[0]).encode("utf-16"), f"{FORMAT}; this is UTF-16"),
        (json.dumps(LINES[0], indent=1).encode(), FORMAT),
        (b'{"problem": 1, "solution": 1}', """['problem', 'solution'], not "question" and"""),
    ],
)
def test_files_that_cannot_be_used_are_refused(given, complaint):
    """Given are flags, or the content of a problem file."""
    flags = given.split() if isinstance(given, str) else ("--problems", write("file", given))
    assert complaint in refused(*flags)


def test_answers_too_long_for_a_completion_are_named_by_line(tiny, capsys):
    long = {"question": "?", "answer": "24 - 9 = 15\n#### 15", "split": "train"}
    file = ProblemFile(write("long.jsonl", LINES[0], *LINES, long))
    for limit in (64, 16):
        assert not capsys.readouterr().out
        warn_of_long_answers(file, tiny[1], limit)
    warning = capsys.readouterr().out
    assert warning.startswith("warning: 1 of the first 31 ") and "--max_new_tokens 16" in warning
    assert r"long.jsonl, line 42: '24 - 9 = 15\n#### 15'" in warning


@pytest.mark.parametrize("ends", [b"\n", b"\r\n \r\n"])
def test_named_splits_hold_whatever_ends_or_repeats_the_lines(ends):
    byte_order_mark = b"\xef\xbb\xbf"
    write("file.jsonl", byte_order_mark, *LINES, *LINES[:5], ends=ends)
    for split, problems in ProblemFile("file.jsonl").splits.items():
        named = [line["question"] for line in LINES if line["split"] == split]
        assert [p.question for p in problems] == named


def test_lines_that_name_no_split_are_split_by_crc():
    texts = ["How many are left of {} apples?", "O\u00f9 est le n\u00b0 {}?", "Is\n\t{}\u00a0odd?"]
    items = [{"question": texts[n % 3].format(n), "answer": n} for n in range(1000)]
    for split, problems in ProblemFile(write("large.jsonl", *items)).splits.items():
        found = {zlib.crc32(p.question.encode("utf-8")) % 20 for p in problems}
        assert found == {"test": {0}, "validation": {1}, "train": {*range(2, 20)}}[split]


def test_held_out_problems_of_a_file_are_fixed_and_never_drawn():
    configs = (Config(problems="sums.jsonl", seed=seed) for seed in (0, 7))
    first, second = (load_task(config)[0] for config in configs)
    assert set(first.draw(1000, random.Random(0))) == set(first.splits["train"])
    assert first.draw(9, random.Random(0)) != first.draw(9, random.Random(1))
    for split in ("validation", "test"):
        assert first.held_out(split, 4) == second.held_out(split, 4)
        assert sorted(first.held_out(split, 99)) == sorted(first.splits[split])


def test_worked_examples_are_the_first_training_problems():
    shown = [LINES[6], {**LINES[0], "completion": "<answer> 1 </answer>"}, LINES[7], *LINES[1:4]]
    _, _, prompt = load_task(Config(problems=write("file.jsonl", *shown), num_examples=2))
    assert prompt.examples == [
        ["What is 0 + 1?", "<answer> 1 </answer>"],
        ["What is 1 + 1?", "<answer>2</answer>"],
    ]


TWO = "WEIGHTS = {'style': 0, 'exact': 1}\ndef score(completion, answer): return "


@pytest.mark.parametrize(
    "source, complaint",
    [
        ("def score(completion, answer): return (1,)", "it is None"),
        ("WEIGHTS = {'right': 1}", "exact among them"),
        ("WEIGHTS = {'exact': float('nan')}", "it is {'exact': nan}"),
        ("WEIGHTS = {'exact': 1, 'a b': 1}", "must map names"),
        ("WEIGHTS = {'exact': 1, 'tokens': 1}", "not advantage, ref_logprobs,"),
        ("WEIGHTS = {'exact': 1}", "no function score(completion, answer)"),
        (TWO + "1", "must return 2 numbers, for style, exact, not 1"),
        (TWO + "(0, 1.01)", "must return numbers from 0 to 1, not (0, 1.01)"),
        (TWO + "(0, 1 if completion else 2)", "score('', "),  # the empty completion
        (TWO + r"(0, 2 if '\u0667' in completion else 1)", "must return"),  # the odd one
    ],
)
def test_a_file_that_breaks_the_contract_is_one_error(source, complaint):
    Path("judge.py").write_text(source)
    error = refused("--rewards", "judge.py")
    assert error.startswith("judge.py: ") and complaint in error


@pytest.mark.parametrize(
    "source, kind", [("WEIGHTS = {", SyntaxError), (TWO + "1 / 0", ZeroDivisionError)]
)
def test_an_error_in_the_users_code_keeps_its_traceback(source, kind):
    Path("judge.py").write_text(source)
    with pytest.raises(kind) as error:
        exit_code(lambda: main(arguments("--rewards", "judge.py")))
    shown = "".join(traceback.format_exception(error.value))
    assert "judge.py" in shown and source.splitlines()[-1] in shown


def test_a_worked_example_must_earn_exact():
    write_rewards(scores="(answer != 2,)")
    load_task(Config(problems="sums.jsonl", rewards="judge.py", num_examples=1))
    error = refused(*FILES, "--num_examples", 2)
    assert "the worked example 'What is 1 + 1?' shows '<answer>2</answer>'" in error


def test_reward_code_is_the_file_that_was_hashed(monkeypatch):
    """Python's own cache would take the older code: same date, same size."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for weight in (1, 2):
        write_rewards(f"{{'exact': {weight}}}")
        os.utime("judge.py", (0, 0))
        assert RewardFile("judge.py").weights == {"exact": weight}


def test_a_reward_file_may_define_dataclasses_and_parse():
    assert RewardFile("judge.py").parse("a b") == "a b"
    rest = "from dataclasses import dataclass\n@dataclass\nclass Score:\n    exact: 'int'\n"
    write_rewards(scores="(float(Score(1).exact),)", rest=rest + "parse = str.upper\n")
    assert RewardFile("judge.py").score("", 1) == {"exact": 1}
    assert RewardFile("judge.py").parse("a b") == "A B"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run, with its files. Its completions are always half exact."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write("sums.jsonl", *LINES)
        scores = 'completion.startswith("<answer>"), min(len(completion), 16) / 16, 0.5'
        count = "open('starts', 'a').write('x')"
        write_rewards('{"format": 0.5, "length": 0, "exact": 2}', scores, rest=count)
    finish(folder, "--num_iterations", 2, *FILES)
    return folder


def test_reward_code_is_executed_once_per_start(finished):
    assert (finished / "starts").read_text() == "x"


def test_metrics_and_card_name_the_files_and_their_hashes(finished):
    metrics, card = read_metrics(finished), (finished / "saved_model" / "README.md").read_text()
    for name in ("problems", "rewards"):
        file = metrics["config"][name]
        found = sha256((finished / file).read_bytes()).hexdigest()
        assert metrics["environment"][f"{name}_sha256"] == found
        assert file in card and found in card


def test_our_rewards_score_only_the_questions_off_the_task(finished):
    metrics = read_metrics(finished)
    for iteration in metrics["iterations"]:
        earned = 0.5 * iteration["reward_format"] + 2 * iteration["reward_exact"]
        assert iteration["reward"] == pytest.approx(earned, abs=1e-5)
        assert iteration["accuracy"] == 0  # by rewards.py it would be more
    for evaluation in metrics["evaluations"]:
        assert evaluation["accuracies"]["sampled"]["parts"]["exact"] == 0.5
        assert evaluation["off_task"]["accuracy"] > 0.9


@pytest.fixture
def killed(finished, tmp_path, monkeypatch):
    """The current folder: a copy of the run, as if it had been killed before its end."""
    folder = shutil.copytree(finished, tmp_path / "copy")
    (folder / METRICS_FILE).unlink()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name, file", [("problems", "sums.jsonl"), ("rewards", "judge.py")])
def test_resume_with_another_file_is_refused(name, file, killed):
    Path(file).write_text(Path(file).read_text() + "\n")
    assert f"{name}_sha256 was " in refused("--resume", *FILES)
    assert newest(killed) == 2


def test_files_may_be_moved_before_resuming(killed):
    Path("sums.jsonl").rename("moved.jsonl")
    Path("judge.py").rename("moved.py")
    moved = "--problems", "moved.jsonl", "--rewards", "moved.py"
    assert "resuming after iteration 2" in finish(killed, "--resume", "--num_iterations", 3, *moved)
    assert read_metrics(killed)["config"]["problems"] == "moved.jsonl" and newest(killed) == 3

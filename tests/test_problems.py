"""Questions from the user's file, rewards from the user's code."""

import json
import os
import random
import shutil
import time
import traceback
import zlib
from collections import Counter
from hashlib import sha256

import pytest
from processes import arguments, finish, read_metrics

from engine.checkpoint import METRICS_FILE, checkpoints_in
from engine.cli import exit_code
from engine.problems import ProblemFile, RewardFile
from train_grpo import Config, load_task, main, parse_config

SPLITS = ["train"] * 6 + ["validation", "test"]
LINES = [
    {"question": f"What is {n} + 1?", "answer": n + 1, "split": SPLITS[n % 8]} for n in range(40)
]
# Accuracy counts none of it; the length is measured only.
REWARDS = """
WEIGHTS = {"format": 0.5, "length": 0, "exact": 2}

def score(completion, answer):
    return completion.startswith("<answer>"), min(len(completion), 16) / 16, 0.5
"""
LENGTH = ("--num_iterations", 2)


def write(path, *items) -> str:
    """Write a problem file; its lines are objects, or bytes as they stand."""
    lines = [item if isinstance(item, bytes) else json.dumps(item).encode() for item in items]
    path.write_bytes(b"\n".join(lines))
    return str(path)


def write_rewards(path, weights='{"exact": 1}', scores="(1,)") -> str:
    path.write_text(f"WEIGHTS = {weights}\ndef score(completion, answer):\n    return {scores}\n")
    return str(path)


def refused(capsys, *flags) -> str:
    """The error, one line, with which `train_grpo.py` refuses these flags."""
    assert exit_code(lambda: main(arguments(*LENGTH, *flags))) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 1000
    return lines[0]


# Problem files


@pytest.mark.parametrize(
    "line, complaint",
    {
        "not JSON": (b'{"question": "a", "answer": 1', "not valid JSON"),
        "not UTF-8": (b'{"question": "\xff", "answer": 1}', "'utf-8' codec can't decode"),
        "UTF-16": ('{"question": "a", "answer": 1}'.encode("utf-16")[:-1], "not valid JSON"),
        "nested too deep": (b"[" * 100_000, "not valid JSON"),
        "a number too long": (b'{"question": "a", "answer": %s}' % (b"9" * 5000), "not valid JSON"),
        "a list": (["a", 1], "not an object"),
        "a text": ("a", "not an object"),
        "no question": ({"answer": 1}, '"question" must be'),
        "empty question": ({"question": "", "answer": 1}, '"question" must be'),
        "blank question": ({"question": " \n", "answer": 1}, '"question" must be'),
        "question a list": ({"question": ["a" * 5000], "answer": 1}, '"question" must be'),
        "no answer": ({"question": "a"}, '"answer" must be a text or an integer, not None'),
        "answer null": ({"question": "a", "answer": None}, '"answer" must be'),
        "answer a float": ({"question": "a", "answer": 1.5}, '"answer" must be'),
        "answer NaN": (b'{"question": "a", "answer": NaN}', '"answer" must be'),
        "answer a bool": ({"question": "a", "answer": True}, '"answer" must be'),
        "answer a list": ({"question": "a", "answer": [1]}, '"answer" must be'),
        "empty answer": ({"question": "a", "answer": ""}, '"answer" must be'),
        "blank answer": ({"question": "a", "answer": " "}, '"answer" must be'),
        "unknown split": ({"question": "a", "answer": 1, "split": "dev"}, "not 'dev'"),
        "split a list": ({"question": "a", "answer": 1, "split": ["test"]}, '"split" must be'),
        "split null": ({"question": "a", "answer": 1, "split": None}, '"split" must be'),
        "completion a number": ({"question": "a", "answer": 1, "completion": 1}, '"completion" mu'),
        "empty completion": ({"question": "a", "answer": 1, "completion": ""}, '"completion" must'),
        "NUL": ({"question": "a\0", "answer": 1}, r"\x00"),
        "escape": ({"question": "a", "answer": "\x1b[2J"}, r"\x1b"),
        "carriage return": ({"question": "a", "answer": 1, "completion": "a\rb"}, r"\r"),
        "half a character": (b'{"question": "\\ud83d", "answer": 1}', r"\ud83d"),
        "half an answer": (b'{"question": "a", "answer": "\\ude42"}', r"\ude42"),
        "another answer": ({"question": "What is 0 + 1?", "answer": 2}, "question of line 1, with"),
        "text for number": ({**LINES[0], "answer": "1"}, "question of line 1, with another"),
        "another split": ({**LINES[0], "split": "test"}, "question of line 1, with another"),
    }.values(),
)
def test_a_bad_line_is_one_error_with_file_and_line(line, complaint, tmp_path, capsys):
    file = write(tmp_path / "bad.jsonl", LINES[0], b" ", line, *LINES[1:])
    error = refused(capsys, "--problems", file)
    assert error.startswith(f"error: --problems {file}, line 3: ") and complaint in error


@pytest.mark.parametrize(
    "items, complaint",
    [
        ([], "no train problem among 0"),
        ([b"", b"  ", b""], "no train problem among 0"),
        ([line for line in LINES if line["split"] != "train"], "no train problem among 10"),
        ([line for line in LINES if line["split"] != "validation"], "no validation problem"),
        ([line for line in LINES if line["split"] != "test"], "no test problem among 35"),
    ],
)
def test_a_file_without_problems_of_a_split_is_refused(items, complaint, tmp_path, capsys):
    file = write(tmp_path / "few.jsonl", *items)
    assert f"--problems {file}: {complaint}" in refused(capsys, "--problems", file)


def test_files_that_cannot_be_read_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "--problems none.jsonl: No such file" in refused(capsys, "--problems", "none.jsonl")
    assert f"--problems {tmp_path}: not a file" in refused(capsys, "--problems", tmp_path)
    assert "--problems /dev/zero: not a file" in refused(capsys, "--problems", "/dev/zero")
    assert "--rewards none.py: No such file" in refused(capsys, "--rewards", "none.py")
    assert "File name too long" in refused(capsys, "--rewards", "a" * 300 + ".py")


def test_operands_do_not_go_with_a_problem_file(tmp_path, capsys):
    file = write(tmp_path / "good.jsonl", *LINES)
    for flag in ("--min_operand", "--max_operand"):
        assert "--problems has no operands" in refused(capsys, "--problems", file, flag, "5")


def test_a_repeated_line_counts_once(tmp_path):
    file = ProblemFile(write(tmp_path / "twice.jsonl", *LINES, *LINES[:5]))
    assert {name: len(problems) for name, problems in file.splits.items()} == {
        "train": 30,
        "validation": 5,
        "test": 5,
    }


@pytest.mark.parametrize("ends", [b"\n", b"\r\n", b"\n\n \n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_blank_lines_and_byte_order_mark_do_not_matter(tmp_path, ends, mark):
    content = mark + ends.join(json.dumps(line).encode() for line in LINES) + ends
    (tmp_path / "file.jsonl").write_bytes(content)
    file = ProblemFile(str(tmp_path / "file.jsonl"))
    assert file.splits == ProblemFile(write(tmp_path / "plain.jsonl", *LINES)).splits


def test_the_split_is_a_crc_of_the_question_90_5_5(tmp_path):
    texts = ["Is {} odd?", "Où est le n° {} ?", "Is\n\t{}\u00a0odd?", "\u200b{} \u4e2d\U0001f642"]
    items = [{"question": texts[n % 4].format(n), "answer": str(n)} for n in range(20_000)]
    file = ProblemFile(write(tmp_path / "many.jsonl", *items))
    for text in range(4):  # each of them by itself
        questions = [item["question"] for item in items[text::4]]
        found = {q for q in questions if zlib.crc32(q.encode("utf-8")) % 20 == 0}
        assert {p.question for p in file.splits["test"]} & set(questions) == found
        assert 0.04 < len(found) / len(questions) < 0.06
    crc = Counter(zlib.crc32(item["question"].encode("utf-8")) % 20 for item in items)
    assert len(file.splits["validation"]) == crc[1] and len(file.splits["test"]) == crc[0]
    assert len(file.splits["train"]) == 20_000 - crc[0] - crc[1]


def test_a_split_that_is_named_wins(tmp_path):
    file = ProblemFile(write(tmp_path / "named.jsonl", *LINES))
    for split, problems in file.splits.items():
        assert [p.question for p in problems] == [
            line["question"] for line in LINES if line["split"] == split
        ]


def test_a_hundred_thousand_lines_load_in_seconds(tmp_path):
    items = [{"question": f"How many are left of {n} apples?", "answer": n} for n in range(100_000)]
    file = write(tmp_path / "large.jsonl", *items)
    started = time.process_time()
    problems = ProblemFile(file)
    assert time.process_time() - started < 3  # about 0.7 s
    assert sum(map(len, problems.splits.values())) == 100_000


def test_training_draws_only_training_problems(tmp_path):
    file = ProblemFile(write(tmp_path / "file.jsonl", *LINES))
    drawn = file.draw(1000, random.Random(0))
    assert len(drawn) == 1000 and set(drawn) == set(file.splits["train"])
    assert drawn != file.draw(1000, random.Random(1))


def test_held_out_problems_of_a_file_are_the_same_for_every_seed(tmp_path):
    name = write(tmp_path / "file.jsonl", *LINES)
    for split in ("validation", "test"):
        drawn = []
        for seed in range(3):
            problems, _, _ = load_task(Config(seed=seed, problems=name))
            problems.draw(seed, random.Random(seed))
            drawn.append(problems.held_out(split, 3))
        assert drawn[0] == drawn[1] == drawn[2] and len(set(drawn[0])) == 3
        assert {p.split for p in drawn[0]} == {split}
        assert sorted(problems.held_out(split, 99)) == sorted(problems.splits[split])


def test_worked_examples_are_the_first_training_problems(tmp_path):
    shown = [LINES[6], {**LINES[0], "completion": "<answer> 1 </answer>"}, LINES[7], *LINES[1:4]]
    name = write(tmp_path / "file.jsonl", *shown)
    _, _, prompt = load_task(Config(problems=name, num_examples=2))
    assert prompt["examples"] == [
        ["What is 0 + 1?", "<answer> 1 </answer>"],
        ["What is 1 + 1?", "<answer>2</answer>"],
    ]


def test_the_longest_question_is_the_one_of_most_bytes(tmp_path):
    """Tokenizers of bytes need more tokens for it, and the context must hold them."""
    odd = {"question": "\U0001f642" * 10, "answer": 1}
    file = ProblemFile(write(tmp_path / "file.jsonl", odd, *LINES))
    assert file.extremes() == ["What is 0 + 1?", odd["question"]]


# Reward files


@pytest.mark.parametrize(
    "source, complaint",
    {
        "no WEIGHTS": ("def score(completion, answer): return (1,)", "it is None"),
        "a list": ("WEIGHTS = ['exact']", "it is ['exact']"),
        "nothing": ("WEIGHTS = {}", "it is {}"),
        "no exact": ("WEIGHTS = {'right': 1}", "exact among them"),
        "NaN": ("WEIGHTS = {'exact': float('nan')}", "it is {'exact': nan}"),
        "infinity": ("WEIGHTS = {'exact': float('inf')}", "it is {'exact': inf}"),
        "too large": ("WEIGHTS = {'exact': 10**400}", "it is {'exact': 1000"),
        "a text": ("WEIGHTS = {'exact': '1'}", "it is {'exact': '1'}"),
        "a bool": ("WEIGHTS = {'exact': True}", "it is {'exact': True}"),
        "a name of a number": ("WEIGHTS = {'exact': 1, 2: 1}", "must map names"),
        "a name of two words": ("WEIGHTS = {'exact': 1, 'a b': 1}", "must map names"),
        "a name in use": ("WEIGHTS = {'exact': 1, 'tokens': 1}", "not advantage, text, tokens,"),
        "no score": ("WEIGHTS = {'exact': 1}", "no function score(completion, answer)"),
        "no function": ("WEIGHTS = {'exact': 1}\nscore = 1", "no function score"),
        "no parse": ("WEIGHTS = {'exact': 1}\nscore = str\nparse = None", "no function parse"),
    }.values(),
)
def test_a_file_that_breaks_the_contract_is_one_error(source, complaint, tmp_path, capsys):
    file = tmp_path / "judge.py"
    file.write_text(source)
    error = refused(capsys, "--rewards", file)
    assert error.startswith(f"error: {file}: ") and complaint in error


@pytest.mark.parametrize(
    "scores, complaint",
    [
        ("1", "must return 2 numbers, for style, exact, not 1"),
        ("None", "must return 2 numbers, for style, exact, not None"),
        ("{'style': 1, 'exact': 1}", "must return 2 numbers"),
        ("(1,)", "must return 2 numbers"),
        ("(1, 1, 1)", "must return 2 numbers"),
        ("(0, 1.01)", "must return numbers from 0 to 1, not (0, 1.01)"),
        ("(-0.1, 0)", "must return numbers from 0 to 1"),
        ("(0, float('nan'))", "must return numbers from 0 to 1, not (0, nan)"),
        ("(0, '1')", "must return numbers from 0 to 1"),
        ("(None, 1)", "must return numbers from 0 to 1"),
        ("(0, 1 if completion else 2)", "score('', 1) must return"),  # the empty completion
        (r"(0, 2 if '\u0667' in completion else 1)", "must return"),  # the odd one
    ],
)
def test_a_bad_score_is_one_error_at_the_start(scores, complaint, tmp_path, capsys):
    problems = write(tmp_path / "file.jsonl", *LINES)
    file = write_rewards(tmp_path / "judge.py", '{"style": 0, "exact": 1}', scores)
    error = refused(capsys, "--rewards", file, "--problems", problems)
    assert error.startswith(f"error: {file}: score(") and complaint in error


def test_a_reward_file_must_be_python(tmp_path, capsys):
    shutil.copy(write_rewards(tmp_path / "judge.py"), tmp_path / "judge.txt")
    error = refused(capsys, "--rewards", tmp_path / "judge.txt")
    assert "not a Python file (.py)" in error


@pytest.mark.parametrize(
    "source, kind",
    [
        ("WEIGHTS = 1 / 0", ZeroDivisionError),
        ("WEIGHTS = {", SyntaxError),
        ("WEIGHTS = {'exact': 1}\ndef score(completion, answer): raise KeyError(answer)", KeyError),
    ],
)
def test_an_error_in_the_users_code_keeps_its_traceback(source, kind, tmp_path):
    file = tmp_path / "judge.py"
    file.write_text(source)
    with pytest.raises(kind) as error:
        exit_code(lambda: main(arguments(*LENGTH, "--rewards", file)))
    shown = "".join(traceback.format_exception(error.value))
    assert str(file) in shown and source.splitlines()[-1] in shown


def test_a_file_that_score_cannot_open_is_no_full_disk(tmp_path):
    file = tmp_path / "judge.py"
    lines = "WEIGHTS = {'exact': 1}", "calls = []", "def score(completion, answer):"
    body = "    calls.append(0)", "    return (len(calls) > 9 and open('no_such_table'),)"
    file.write_text("\n".join([*lines, *body]))
    flags = arguments(*LENGTH, "--rewards", file, "--output_dir", tmp_path / "run")
    with pytest.raises(RuntimeError) as error:
        exit_code(lambda: main(flags))
    assert isinstance(error.value.__cause__, FileNotFoundError)


def test_a_worked_example_must_earn_exact(tmp_path, capsys):
    flags = ("--rewards", write_rewards(tmp_path / "judge.py", scores="(answer != 2,)"))
    flags += ("--problems", write(tmp_path / "file.jsonl", *LINES), "--num_examples")
    parse_config(arguments(*flags, 1))
    error = refused(capsys, *flags, 2)
    assert "the worked example 'What is 1 + 1?' shows '<answer>2</answer>'" in error


def test_reward_code_is_the_file_that_was_hashed(tmp_path):
    """Python's own cache would take the older code: same date, same size."""
    file = tmp_path / "judge.py"
    for weight in (1, 2):
        content = write_rewards(file, f"{{'exact': {weight}}}")
        os.utime(file, (0, 0))
        rewards = RewardFile(content)
        assert rewards.weights == {"exact": weight}
        assert rewards.sha256 == sha256(file.read_bytes()).hexdigest()
    assert list(tmp_path.iterdir()) == [file]


def test_a_reward_file_may_define_dataclasses(tmp_path):
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    file = tmp_path / "judge.py"
    write_rewards(file, scores="(float(Score(1).exact),)")
    file.write_text(f"{head}@dataclass\nclass Score:\n    exact: int\n{file.read_text()}")
    assert RewardFile(str(file)).score("", 1) == {"exact": 1}


def test_what_inference_prints_is_the_completion_or_what_parse_finds(tmp_path):
    file = tmp_path / "judge.py"
    assert RewardFile(write_rewards(file)).parse("a b") == "a b"
    file.write_text(file.read_text() + "def parse(completion):\n    return completion.upper()\n")
    assert RewardFile(str(file)).parse("a b") == "A B"


# A run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(problem file, reward file) of the run."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "judge.py").write_text(REWARDS)
    return write(folder / "sums.jsonl", *LINES), str(folder / "judge.py")


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    finish(folder, *LENGTH, "--problems", files[0], "--rewards", files[1])
    return folder


def test_metrics_and_card_name_the_files_and_their_hashes(run, files):
    metrics, card = read_metrics(run), (run / "saved_model" / "README.md").read_text()
    for name, file in zip(("problems", "rewards"), files, strict=True):
        with open(file, "rb") as content:
            found = sha256(content.read()).hexdigest()
        assert metrics["config"][name] == file
        assert metrics["environment"][f"{name}_sha256"] == found
        assert f"{file.split('/')[-1]} (SHA-256 {found})" in " ".join(card.split())


def test_a_part_of_weight_zero_is_measured_and_earns_nothing(run):
    metrics = read_metrics(run)
    assert metrics["reward_weights"] == {"format": 0.5, "length": 0, "exact": 2}
    for iteration in metrics["iterations"]:
        assert iteration["reward_length"] > 0 and iteration["reward_exact"] == 0.5
        earned = 0.5 * iteration["reward_format"] + 2 * 0.5
        assert iteration["reward"] == pytest.approx(earned, abs=1e-5)


def test_accuracy_counts_only_an_exact_of_one(run):
    metrics = read_metrics(run)
    assert [iteration["accuracy"] for iteration in metrics["iterations"]] == [0, 0]
    for evaluation in metrics["evaluations"]:
        assert not evaluation["example"]["exact"]
        for measured in evaluation["accuracies"].values():
            assert measured["accuracy"] == 0 and measured["parts"]["exact"] == 0.5


def test_off_task_answers_are_scored_by_the_default_rewards(run):
    for evaluation in read_metrics(run)["evaluations"]:
        assert evaluation["off_task"]["accuracy"] > 0.9  # its own exact is always 0.5


@pytest.fixture
def unfinished(run, tmp_path, monkeypatch):
    """A copy of the run, killed before its end."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / METRICS_FILE).unlink()
    monkeypatch.chdir(folder)
    return folder


def changed(file, tmp_path) -> str:
    """A copy of a file with one more blank line."""
    copy = tmp_path / os.path.basename(file)
    with open(file) as content:
        copy.write_text(content.read() + "\n")
    return str(copy)


@pytest.mark.parametrize("which", ["problems", "rewards", "no problems", "no rewards"])
def test_resume_with_another_file_is_refused(unfinished, files, tmp_path, capsys, which):
    flags = {"--problems": files[0], "--rewards": files[1]}
    flag = "--" + which.split()[-1]
    flags[flag] = "" if which.startswith("no ") else changed(flags[flag], tmp_path)
    flags = [word for pair in flags.items() for word in pair]
    before = {p: p.stat().st_mtime_ns for p in unfinished.rglob("*") if p.name != ".lock"}
    error = refused(capsys, "--num_iterations", 3, "--resume", *flags)
    assert f"--resume: started with other settings: {flag[2:]}_sha256 was " in error
    assert before == {p: p.stat().st_mtime_ns for p in unfinished.rglob("*") if p.name != ".lock"}


def test_files_may_be_moved_before_resuming(unfinished, files, tmp_path):
    moved = [shutil.copy(file, tmp_path / f"moved{file[-3:]}") for file in files]
    flags = ("--resume", "--problems", moved[0], "--rewards", moved[1])
    assert "resuming after iteration 2" in finish(unfinished, "--num_iterations", 3, *flags)
    assert read_metrics(unfinished)["config"]["problems"] == str(moved[0])
    assert checkpoints_in(unfinished)[-1].name == "3"

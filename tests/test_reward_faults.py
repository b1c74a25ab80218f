"""Reward files as people have them, and what happens to a run when they fail."""

import json
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import arguments, finish, metrics_but_for_times, read_metrics

from engine import problems, prompt
from engine.checkpoint import CHECKPOINTS
from engine.files import COMPLETIONS_FILE, UserError, exit_code
from engine.problems import Problem, RewardFile
from train_grpo import main

LINES = [{"question": f"What is {n} + 1?", "answer": n + 1} for n in range(99)]
HEAD = (
    "WEIGHTS = {'exact': 1}\ncalls = []\ndef score(completion, answer):\n    calls.append(0)\n    "
)
SUMS = "\n    return (completion == f'<answer>{answer}</answer>',)"
# Without a log, so that calls can be counted.
LENGTH = ("--num_iterations", 6, "--checkpoint_every", 100, "--log_completions_every", -1)
FLAGS = arguments(*LENGTH, "--rewards", "judge.py")


def rule(folder, body: str, head: str = "", name: str = "judge.py") -> RewardFile:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"{head}{HEAD}{body}\n")
    return RewardFile(str(folder / name))


@pytest.mark.parametrize(
    "given, earned",
    [
        *(([one], 1) for one in (np.True_, np.float32(1), torch.tensor(True))),
        *((some, 0.5) for some in ([Fraction(1, 2)], np.array([0.5]), torch.tensor([0.5]))),
        *(([bad], None) for bad in (None, "1", b"1", np.str_("1"), np.nan, 1j, np.zeros(2))),
        *((bad, None) for bad in (np.array(1), np.array(["1"]), {"exact": 1})),
    ],
)
def test_whatever_float_takes_is_a_score_but_text(given, earned, tmp_path):
    rewards = rule(tmp_path, "return answer")
    if earned:
        assert rewards.score("", given) == {"exact": earned}
    else:
        with pytest.raises(UserError, match="must return"):
            rewards.score("", given)


@pytest.mark.parametrize("completion", ["<answer>3</answer>", "3", "Answer: 3"])
def test_the_start_tries_completions_that_could_be_right(completion, tmp_path):
    rewards = rule(tmp_path, f"return (None if completion == {completion!r} else 0,)")
    with pytest.raises(UserError, match="must return numbers from 0 to 1"):
        rewards.try_out([Problem("?", n, "train", f"Answer: {n}") for n in (1, 2, 3)], [])


def test_a_reward_file_imports_neighbours_that_hide_nothing(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    (tmp_path / "colorsys.py").write_text("1 / 0")  # Python has one
    (tmp_path / "next_door.py").write_text("earned = 1")
    rewards = rule(tmp_path, "return (next_door.earned,)", "import colorsys, next_door\n")
    assert rewards.score("", 1) == {"exact": 1}


@pytest.mark.parametrize("name", ["judge.py", "rewards.py", "a-b.py"])  # we have a rewards.py
def test_spawned_workers_find_the_functions_of_a_reward_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    head = "import multiprocessing, os\nfrom concurrent.futures import ProcessPoolExecutor\n"
    head += "open(f'started by {os.getpid()}', 'x')\ndef same(*pair): return pair[0] == pair[1]\n"
    pool = "with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:"
    body = f"{pool}\n        return (pool.submit(same, completion, answer).result(),)"
    rewards = rule(tmp_path / "task", body, head, name)
    assert [rewards.score("a", answer)["exact"] for answer in "ab"] == [1, 0]
    assert len(list(tmp_path.glob("started*"))) == 3  # once here, once in each worker


def test_a_reward_file_that_cannot_be_imported_must_be_renamed(tmp_path):
    with pytest.raises(UserError, match="/rewards.py: .*; rename the file$"):
        rule(tmp_path / "v1.0", "return (1,)", "", "rewards.py")


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """The metrics of a run whose rule never fails."""
    folder = tmp_path_factory.mktemp("runs")
    rule(folder, "pass" + SUMS)
    finish(folder, *FLAGS)
    return metrics_but_for_times(folder)


@pytest.mark.parametrize(
    "fault, done",  # in training after 1 iteration, in the evaluation after 4
    [("> 50: return (None,)", 1), ("> 50: 1 / 0", 1), ("> 80: raise TimeoutError", 4)],
)
def test_a_run_that_fails_in_its_rule_loses_nothing(fault, done, healthy, tmp_path, capsys):
    rule(tmp_path, f"if len(calls) {fault}{SUMS}")
    where = ("--output_dir", str(tmp_path), "--rewards", str(tmp_path / "judge.py"))
    try:
        assert exit_code(lambda: main([*FLAGS, *where])) == 2
        told = capsys.readouterr().err
    except (ZeroDivisionError, RuntimeError) as error:
        [told] = error.__notes__
    assert f"{tmp_path / CHECKPOINTS / str(done)} is intact: repair the --rewards file" in told
    failed = read_metrics(tmp_path)
    assert (failed["status"], failed["failed_in"]) == ("failed", "rewards")
    assert len(failed["iterations"]) == done and failed["stop_reason"]
    rule(tmp_path, "pass" + SUMS)
    assert "the --rewards file was repaired" in finish(tmp_path, *FLAGS, "--resume")
    resumed = metrics_but_for_times(tmp_path)
    hashes = [m["environment"]["rewards_sha256"] for m in (failed, resumed)]
    repair = {"what": "rewards", "iteration": done, "was": hashes[0], "is": hashes[1]}
    assert resumed.pop("repaired") == [repair] and resumed == healthy


def test_a_rule_that_fails_in_the_log_loses_no_line(tmp_path):
    flags = ("--num_iterations", 3, "--eval_every", 0, "--rewards", "judge.py")
    failed, calm = tmp_path / "failed", tmp_path / "calm"
    callers = "[frame.name for frame in traceback.extract_stack()]"
    fault = f"if len(calls) > 60 and 'fixed_record' in {callers}: 1 / 0"
    rule(failed, fault + SUMS, "import traceback\n")
    with pytest.raises(ZeroDivisionError):
        finish(failed, *flags)
    assert len(read_metrics(failed)["iterations"]) in (1, 2)
    rule(failed, "pass" + SUMS)
    rule(calm, "pass" + SUMS)
    finish(failed, *flags, "--resume")
    finish(calm, *flags)
    lines, expected = ((folder / COMPLETIONS_FILE).read_bytes() for folder in (failed, calm))
    assert lines == expected and lines.count(b"\n") == 3


def test_a_question_that_fails_late_can_be_repaired(tmp_path, monkeypatch):
    flags, real = (*LENGTH, "--problems", "sums.jsonl"), prompt.render

    def failing(*inputs, **options):
        if Path(CHECKPOINTS, "1").exists():
            raise UserError("the template fails")
        return real(*inputs, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prompt, "render", failing)
    Path("sums.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    with pytest.raises(UserError, match="the template fails"):
        main(arguments(*flags))
    monkeypatch.setattr(prompt, "render", real)
    rule(tmp_path, "pass" + SUMS)  # this file is no repair
    with pytest.raises(UserError, match="rewards_sha256 was .*; WEIGHTS was .*; restore the file"):
        main(arguments(*flags, "--resume", "--rewards", "judge.py"))
    Path("sums.jsonl").write_text("\n".join(map(json.dumps, LINES[::-1])))
    assert "the --problems file was repaired" in finish(tmp_path, *flags, "--resume")


@pytest.mark.parametrize("slow", ["time.sleep(0.6)", "re.match('(a+)+b', 'a' * 25)"])
def test_a_long_call_is_named_once(slow, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(problems, "SLOW", 0.1)
    rewards = rule(tmp_path, f"completion and {slow}\n    return (1,)", "import re, time\n")
    for completion in ("", "a text", ""):
        rewards.score(completion, 7)
    [line] = capsys.readouterr().err.splitlines()
    assert "judge.py: score has run for" in line and "'a text', answer 7" in line

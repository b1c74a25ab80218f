"""Reward files as people have them, and what happens to a run when they fail."""

import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from processes import arguments, finish, metrics_but_for_times, read_metrics

from engine import problems
from engine.checkpoint import CHECKPOINTS
from engine.files import COMPLETIONS_FILE, UserError, exit_code
from engine.problems import Problem, RewardFile
from train_grpo import main

HEAD = "WEIGHTS = {'exact': 1}\ndef score(completion, answer):\n    "
SUMS = "return (completion == f'<answer>{answer}</answer>',)"
# Fails in a function once training has scored so many of its completions, 8 in an iteration.
FAULT = """stack = [frame.name for frame in traceback.extract_stack()]
    if {function!r} in stack and sum(trained) == {count}:
        {failure}
    trained.append("train_iteration" in stack)
    """
FLAGS = arguments("--num_iterations", 6, "--checkpoint_every", 100, "--rewards", "judge.py")


def rule(folder, body: str, head: str = "", name: str = "judge.py") -> RewardFile:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"{head}{HEAD}{body}\n")
    return RewardFile(str(folder / name))


@pytest.mark.parametrize(
    "given, earned",
    [
        *(([one], 1) for one in (np.True_, torch.tensor(True), Fraction(1))),
        *((some, 0.5) for some in (np.array([0.5]), torch.tensor([0.5]))),
        *(([bad], None) for bad in (None, "1", b"1", np.nan, 1j, np.zeros(2))),
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


@pytest.mark.parametrize("name", ["rewards.py", "a-b.py"])  # we have a rewards.py
def test_spawned_workers_find_the_functions_of_a_reward_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    head = "import multiprocessing, os\nfrom concurrent.futures import ProcessPoolExecutor\n"
    head += "open(f'started by {os.getpid()}', 'x')\ndef same(*pair): return pair[0] == pair[1]\n"
    pool = "with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:"
    body = f"{pool}\n        return (pool.submit(same, completion, answer).result(),)"
    rewards = rule(tmp_path / "task", body, head, name)
    assert rewards.score("a", "a") == {"exact": 1}
    assert len(list(tmp_path.glob("started*"))) == 2  # once here, once in the worker


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """The folder of a run whose rule never fails."""
    folder = tmp_path_factory.mktemp("runs")
    rule(folder, SUMS)
    finish(folder, *FLAGS)
    return folder


@pytest.mark.parametrize(
    "function, failure, done",
    [
        ("train_iteration", "return (None,)", 1),
        ("ask_fixed", "1 / 0", 1),
        ("evaluate", "raise TimeoutError", 4),
    ],
)
def test_a_run_that_fails_in_its_rule_loses_nothing(
    function, failure, done, healthy, tmp_path, capsys
):
    fault = FAULT.format(function=function, count=8 * done, failure=failure)
    rule(tmp_path, fault + SUMS, "import traceback\ntrained = []\n")
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
    rule(tmp_path, SUMS)
    assert "the --rewards file was repaired" in finish(tmp_path, *FLAGS, "--resume")
    resumed = metrics_but_for_times(tmp_path)
    hashes = [m["environment"]["rewards_sha256"] for m in (failed, resumed)]
    repair = {"what": "rewards", "iteration": done, "was": hashes[0], "is": hashes[1]}
    assert resumed.pop("repaired") == [repair] and resumed == metrics_but_for_times(healthy)
    lines, expected = ((folder / COMPLETIONS_FILE).read_bytes() for folder in (tmp_path, healthy))
    assert lines == expected and lines.count(b"\n") == 6


@pytest.mark.parametrize("slow", ["time.sleep(0.6)", "re.match('(a+)+b', 'a' * 25)"])
def test_a_long_call_is_named_once(slow, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(problems, "SLOW", 0.1)
    rewards = rule(tmp_path, f"completion and {slow}\n    return (1,)", "import re, time\n")
    for completion in ("", "a text", ""):
        rewards.score(completion, 7)
    [line] = capsys.readouterr().err.splitlines()
    assert "judge.py: score has run for" in line and "'a text', answer 7" in line

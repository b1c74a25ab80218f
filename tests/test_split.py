"""No problem that is evaluated is ever trained on: neither drawn nor demonstrated."""

import importlib.util
import itertools
import os
import random
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from train_grpo import Arithmetic, Config, Problem, load_task

COMMUTATIVE = {"+": True, "*": True, "-": False}
ARITHMETIC = Arithmetic(0, 10)


def every_problem(low: int = 0, high: int = 10) -> list[Problem]:
    numbers = range(low, high + 1)
    return [
        Problem(a, op1, b, op2, c)
        for a, b, c in itertools.product(numbers, repeat=3)
        for op1, op2 in itertools.product("+-*", repeat=2)
    ]


def with_swaps(problems) -> set[Problem]:
    """The problems, and each again with its commutative operands swapped."""
    swapped = {Problem(p.b, p.op1, p.a, p.op2, p.c) for p in problems if COMMUTATIVE[p.op1]}
    return set(problems) | swapped


def all_held_out() -> set[Problem]:
    return {p for split in ("validation", "test") for p in ARITHMETIC.held_out(split, 10**6)}


def crc32(data: bytes) -> int:
    """CRC-32 as the standard words it, one bit at a time."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0xEDB88320 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


@pytest.mark.parametrize("seed", [0, 1])
def test_no_training_problem_is_held_out_nor_is_its_swap(seed):
    forbidden = with_swaps(all_held_out())
    drawn = ARITHMETIC.draw(50_000, random.Random(seed))
    assert len(drawn) == 50_000
    assert with_swaps(drawn).isdisjoint(forbidden)
    # Rare problems aside, everything else is drawn: nothing is lost between the splits.
    rest = set(every_problem()) - forbidden
    assert set(drawn) <= rest and len(set(drawn)) > 0.95 * len(rest)


def test_validation_and_test_share_no_problem_nor_a_swap():
    validation, test = (ARITHMETIC.held_out(s, 10**6) for s in ("validation", "test"))
    assert with_swaps(validation).isdisjoint(with_swaps(test))
    assert len(set(validation)) == len(validation) and len(set(test)) == len(test)
    assert with_swaps(validation) == set(validation) and with_swaps(test) == set(test)


def test_split_is_a_crc_of_the_sorted_expression():
    for problem in every_problem():
        operands = [problem.a, problem.b]
        if COMMUTATIVE[problem.op1]:
            operands.sort()
        text = f"({operands[0]} {problem.op1} {operands[1]}) {problem.op2} {problem.c}"
        expected = {0: "test", 1: "validation"}.get(crc32(text.encode("ascii")) % 20, "train")
        assert problem.split == expected, problem


def test_arithmetic_is_asked_with_the_operands_of_the_config():
    assert load_task(Config())[0] == ARITHMETIC
    assert load_task(Config(min_operand=-3, max_operand=4, show_steps=True))[0] == Arithmetic(
        -3, 4, True
    )


def test_split_is_ninety_five_five():
    problems = every_problem(-10, 10)
    for split, share in (("train", 0.90), ("validation", 0.05), ("test", 0.05)):
        measured = sum(problem.split == split for problem in problems) / len(problems)
        assert measured == pytest.approx(share, abs=0.005)


def test_a_commutative_swap_stays_in_its_split():
    for problem in every_problem():
        swapped = Problem(problem.b, problem.op1, problem.a, problem.op2, problem.c)
        assert not COMMUTATIVE[problem.op1] or swapped.split == problem.split
        assert not COMMUTATIVE[problem.op1] or swapped.answer == problem.answer


def test_held_out_problems_do_not_depend_on_the_seed():
    (first, *_), (second, *_) = (load_task(Config(seed=seed)) for seed in (0, 7))
    for split in ("validation", "test"):
        expected = first.held_out(split, 100)
        random.seed(7)
        assert second.held_out(split, 100) == expected
        assert len(set(expected)) == 100 and {p.split for p in expected} == {split}
        assert first.held_out(split, 40) == expected[:40]


def some_problems() -> list[tuple[str, str]]:
    """What a run trains on and is evaluated on: (question, split) of each."""
    problems = ARITHMETIC.draw(500, random.Random(0))
    problems += ARITHMETIC.held_out("validation", 99)
    problems += ARITHMETIC.held_out("test", 99)
    return [(problem.question, problem.split) for problem in problems]


def test_split_does_not_depend_on_the_hash_seed_of_python():
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    done = subprocess.run(
        [sys.executable, "-c", "from test_split import some_problems; print(some_problems())"],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": other, "PYTHONPATH": os.pathsep.join((".", "tests"))},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(some_problems()), done.stderr


class Demonstrated(Exception):
    """Raised in place of the first step of pre-training, with its questions."""


def test_the_bundled_model_was_shown_no_held_out_problem(tiny, monkeypatch):
    path = ROOT / "tiny_model" / "make.py"
    spec = importlib.util.spec_from_file_location("make_tiny_model", path)
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)

    def stop_at_the_first_step(policy, data, rows):
        raise Demonstrated(data)

    monkeypatch.setattr(make, "encode_problems", lambda tokenizer, questions, answers: questions)
    monkeypatch.setattr(make, "mixture_loss", stop_at_the_first_step)
    with pytest.raises(Demonstrated) as caught:
        make.pretrain(make.make_model(111), tiny[1], steps=1)
    [questions] = caught.value.args
    pattern = re.compile(r"What is \((-?\d+) ([+*-]) (-?\d+)\) ([+*-]) (-?\d+)\?")
    found = [pattern.fullmatch(question) for question in questions]
    shown = [Problem(int(m[1]), m[2], int(m[3]), m[4], int(m[5])) for m in found if m]
    others = [question for question, match in zip(questions, found, strict=True) if not match]
    assert all(re.fullmatch(r"What is \d+ \+ \d+\?", question) for question in others)
    assert len(shown) > 10_000 and torch.is_grad_enabled()
    assert with_swaps(shown).isdisjoint(with_swaps(all_held_out()))

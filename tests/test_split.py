"""No problem that is evaluated is ever trained on: neither drawn nor demonstrated."""

import random
import zlib
from itertools import product

import pytest

from examples import make_tiny_model
from train_grpo import Arithmetic, Config, load_task

ARITHMETIC = Arithmetic(0, 10)


def expressions(low: int = 0, high: int = 10) -> list[tuple]:
    """All (a, op1, b, op2, c)."""
    numbers = range(low, high + 1)
    return list(product(numbers, "+-*", numbers, "+-*", numbers))


def swapped(a, op1, b, op2, c) -> tuple:
    """The same expression, with the first two operands swapped if that changes no answer."""
    return (a, op1, b, op2, c) if op1 == "-" else (b, op1, a, op2, c)


SWAPS = {
    ARITHMETIC.problem(*e).question: ARITHMETIC.problem(*swapped(*e)).question
    for e in expressions()
}


def with_swaps(questions) -> set[str]:
    """The questions, and each again with its commutative operands swapped."""
    return {*questions, *(SWAPS.get(question, question) for question in questions)}


def held_out(split: str) -> list[str]:
    return [problem.question for problem in ARITHMETIC.held_out(split, 10**6)]


def test_no_training_problem_is_held_out_nor_is_its_swap():
    forbidden = with_swaps(held_out("validation") + held_out("test"))
    drawn = [problem.question for problem in ARITHMETIC.draw(50_000, random.Random(0))]
    assert len(drawn) == 50_000 and with_swaps(drawn).isdisjoint(forbidden)
    # Rare problems aside, everything else is drawn: nothing is lost between the splits.
    rest = SWAPS.keys() - forbidden
    assert set(drawn) <= rest and len(set(drawn)) > 0.95 * len(rest)


def test_validation_and_test_share_no_problem_nor_a_swap():
    validation, test = held_out("validation"), held_out("test")
    assert with_swaps(validation).isdisjoint(with_swaps(test))
    assert len(set(validation)) == len(validation) and len(set(test)) == len(test)
    assert with_swaps(validation) == set(validation) and with_swaps(test) == set(test)


def test_split_is_a_crc_of_the_sorted_expression():
    shares = dict.fromkeys(("train", "validation", "test"), 0)
    for a, op1, b, op2, c in expressions(-10, 10):
        first, second = (a, b) if op1 == "-" else (min(a, b), max(a, b))
        rest = zlib.crc32(f"({first} {op1} {second}) {op2} {c}".encode("ascii")) % 20
        split = ARITHMETIC.problem(a, op1, b, op2, c).split
        assert split == {0: "test", 1: "validation"}.get(rest, "train")
        shares[split] += 1 / (9 * 21**3)
    expected = {"train": 0.90, "validation": 0.05, "test": 0.05}
    assert shares == pytest.approx(expected, abs=0.005)


def test_arithmetic_is_asked_with_the_operands_of_the_config():
    assert load_task(Config())[0] == ARITHMETIC
    config = Config(min_operand=-3, max_operand=4, show_steps=True)
    assert load_task(config)[0] == Arithmetic(-3, 4, True)


def test_held_out_problems_do_not_depend_on_the_seed():
    """Nor on the seeds of `random` and of Python's hashes."""
    problems, _, _ = load_task(Config(seed=7))
    found = [[p.question for p in problems.held_out(s, 2)] for s in ("validation", "test")]
    assert found == [
        ["What is (9 - 5) * 9?", "What is (10 * 10) - 1?"],
        ["What is (7 - 3) + 10?", "What is (1 - 4) - 6?"],
    ]


def test_the_bundled_model_was_shown_no_held_out_problem(monkeypatch):
    shown = []

    def stop(tokenizer, questions, answers):
        shown.extend(questions)
        raise InterruptedError

    monkeypatch.setattr(make_tiny_model, "encode_problems", stop)
    with pytest.raises(InterruptedError):
        make_tiny_model.pretrain(None, None, steps=1)
    assert len(SWAPS.keys() & shown) > 10_000
    assert with_swaps(shown).isdisjoint(held_out("validation") + held_out("test"))

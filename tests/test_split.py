"""No problem that is evaluated is ever trained on: neither drawn nor demonstrated."""

import random
import re
import zlib
from itertools import product

import pytest

from examples import make_tiny_model
from train_grpo import Arithmetic, Config, load_task

ARITHMETIC = Arithmetic(0, 10)


def canonical(question: str) -> str:
    """The expression, its first two operands sorted where their order changes no answer."""
    found = re.fullmatch(r"What is \((.+) ([-+*]) (.+)\) (.+)\?", question)
    if not found:
        return question
    first, operator, second, rest = found.groups()
    if operator != "-":
        first, second = sorted((first, second), key=int)
    return f"({first} {operator} {second}) {rest}"


def canonical_held_out(split: str) -> set[str]:
    return {canonical(problem.question) for problem in ARITHMETIC.held_out(split, 10**6)}


def test_splits_share_no_problem_nor_one_with_swapped_operands():
    drawn = {canonical(p.question) for p in ARITHMETIC.draw(50_000, random.Random(0))}
    validation, test = canonical_held_out("validation"), canonical_held_out("test")
    assert drawn.isdisjoint(validation | test) and validation.isdisjoint(test)
    # Rare problems aside, everything else is drawn: nothing is lost between the splits.
    brackets = 11 * 11 + 2 * 66  # a - b in any order, a + b and a * b in one
    assert len(drawn) > 0.95 * (brackets * 3 * 11 - len(validation) - len(test))


def test_split_is_a_crc_of_the_sorted_expression():
    numbers, problems = range(-10, 11), {"train": [], "validation": [], "test": []}
    for expression in product(numbers, "+-*", numbers, "+-*", numbers):
        problem = ARITHMETIC.problem(*expression)
        rest = zlib.crc32(canonical(problem.question).encode("ascii")) % 20
        assert problem.split == {0: "test", 1: "validation"}.get(rest, "train")
        problems[problem.split].append(problem)
    shares = [len(found) / (9 * 21**3) for found in problems.values()]
    assert shares == pytest.approx([0.90, 0.05, 0.05], abs=0.005)
    for split in ("validation", "test"):
        assert sorted(Arithmetic(-10, 10).held_out(split, 10**6)) == sorted(problems[split])


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
    shown = {canonical(question) for question in shown}
    assert len(shown) > 5_000
    assert shown.isdisjoint(canonical_held_out("validation") | canonical_held_out("test"))

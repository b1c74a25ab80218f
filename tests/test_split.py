"""No problem that is evaluated is ever trained on: neither drawn nor demonstrated."""

import random
import re
import zlib
from itertools import product

import pytest

from examples import make_tiny_model
from train_grpo import Arithmetic, Config, load_task

ARITHMETIC = Arithmetic(0, 10)


def split_of(question: str) -> str:
    """By a CRC of the expression, its first two operands sorted where that changes no answer."""
    pattern = r"What is \((.+) ([-+*]) (.+)\) (.+)\?"
    first, operator, second, rest = re.fullmatch(pattern, question).groups()
    if operator != "-":
        first, second = sorted((first, second), key=int)
    crc = zlib.crc32(f"({first} {operator} {second}) {rest}".encode("ascii"))
    return {0: "test", 1: "validation"}.get(crc % 20, "train")


def test_split_is_a_crc_of_the_sorted_expression():
    numbers, problems = range(-10, 11), {"train": [], "validation": [], "test": []}
    for expression in product(numbers, "+-*", numbers, "+-*", numbers):
        problem = ARITHMETIC.problem(*expression)
        assert problem.split == split_of(problem.question)
        problems[problem.split].append(problem)
    shares = [len(found) / (9 * 21**3) for found in problems.values()]
    assert shares == pytest.approx([0.90, 0.05, 0.05], abs=0.005)
    for split in ("validation", "test"):
        assert sorted(Arithmetic(-10, 10).held_out(split, 10**6)) == sorted(problems[split])


def test_training_problems_alone_are_drawn_and_shown():
    drawn = {problem.question for problem in ARITHMETIC.draw(50_000, random.Random(0))}
    most = Config.__dataclass_fields__["num_examples"].metadata["limits"][1]
    shown = {problem.question for problem in ARITHMETIC.examples(most)}
    assert set(map(split_of, drawn | shown)) == {"train"} and len(shown) == most
    # Rare problems aside, all of them are drawn: nothing is lost between the splits.
    assert len(drawn) > 0.95 * 0.90 * 9 * 11**3


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
    problems = {question for question in shown if "(" in question}  # the others are sums
    assert len(problems) > 10_000 and set(map(split_of, problems)) == {"train"}

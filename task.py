"""The task: `(a op1 b) op2 c`, its answer, and which problems are trained on and which held out."""

import operator
import random
import zlib
from dataclasses import dataclass

from cli import UserError

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True)
class Problem:
    """(a op1 b) op2 c"""

    a: int
    op1: str
    b: int
    op2: str
    c: int

    @property
    def question(self) -> str:
        return f"What is ({self.a} {self.op1} {self.b}) {self.op2} {self.c}?"

    @property
    def answer(self) -> int:
        return OPERATORS[self.op2](OPERATORS[self.op1](self.a, self.b), self.c)

    @property
    def split(self) -> str:
        """train (90%), validation (5%) or test (5%), by a hash that no seed or process changes.

        Commutative operands are sorted first: (3 + 4) * 5 and (4 + 3) * 5 are one problem.
        """
        a, b = (self.a, self.b) if self.op1 == "-" else sorted((self.a, self.b))
        bucket = zlib.crc32(f"({a} {self.op1} {b}) {self.op2} {self.c}".encode()) % 20
        return {0: "test", 1: "validation"}.get(bucket, "train")


# Worked examples for a prompt, all of them training problems.
EXAMPLES = [Problem(2, "+", 3, "*", 4), Problem(9, "-", 2, "-", 5), Problem(6, "*", 2, "+", 8)]


def training_problems(count: int, rng: random.Random, config) -> list[Problem]:
    """Draw `count` problems of the training split, with replacement."""
    problems: list[Problem] = []
    while len(problems) < count:
        a, b, c = (rng.randint(config.min_operand, config.max_operand) for _ in range(3))
        problem = Problem(a, rng.choice("+-*"), b, rng.choice("+-*"), c)
        problems += [problem] if problem.split == "train" else []
    return problems


def check_enough(config) -> None:
    """Raise UserError unless each split has a problem with the operands of `config`."""
    if not all(held_out_problems(split, 1, config) for split in ("train", "validation", "test")):
        low, high = config.min_operand, config.max_operand
        raise UserError(f"--min_operand {low} --max_operand {high}: too few problems; widen it")


def held_out_problems(split: str, count: int, config) -> list[Problem]:
    """Return `count` distinct problems of a split (or all it has), the same ones for every seed."""
    width = max(0, config.max_operand - config.min_operand + 1)
    total = 9 * width**3
    problems = []
    # One in twenty is of the split wanted, so forty times `count` hold enough of them, and a wide
    # range need not be enumerated.
    for index in random.Random(0).sample(range(total), min(total, 40 * count + 1000)):
        digits = [index // width**i % width + config.min_operand for i in range(3)]
        op1, op2 = divmod(index // width**3, 3)
        problem = Problem(digits[0], "+-*"[op1], digits[1], "+-*"[op2], digits[2])
        if problem.split == split and len(problems) < count:
            problems.append(problem)
    return problems


# Asked off the task, to see how far training moves the rest of a chat model. None has one answer.
OFF_TASK = dict.fromkeys(
    [
        "What is the capital of France?",
        "Write one sentence about the sea.",
        "How do I boil an egg?",
        "Translate to French: good morning.",
        "Name three colours.",
        "Why is the sky blue?",
        "Who wrote Romeo and Juliet?",
        "Give me a word that rhymes with light.",
    ]
)


def off_task_questions(config, prompt: dict) -> tuple[dict[str, int | None], dict]:
    """({question: answer, None where there is not one}, prompt to ask them in), off the task.

    The bundled model has learned sums besides the task, and knows nothing of chat.
    """
    if config.preset != "tiny":
        return OFF_TASK, {"system": "", "examples": []}
    rng, low, high = random.Random(0), config.min_operand, config.max_operand
    sums = [(rng.randint(low, high), rng.randint(low, high)) for _ in range(64)]
    return {f"What is {a} + {b}?": a + b for a, b in sums}, prompt

"""The user's own task: questions from a JSONL file, rewards from a Python file.

A problem file has one `{"question": ..., "answer": ...}` per line. Optional: "split", and
"completion", what a worked example shows. A reward file has the contract of `rewards.py`.
"""

import importlib.util
import json
import math
import random
import zlib
from pathlib import Path
from typing import NamedTuple

from engine.checkpoint import sha256
from engine.cli import ROOT, UserError, check_text

SPLITS = ("train", "validation", "test")
ODD_COMPLETION = "<answer>\0\u0667\u2212</answer> \U0001f642<answer>"


def split_of(text: str) -> str:
    """train (90%), validation (5%) or test (5%), by a hash that no seed changes."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(text.encode()) % 20, "train")


def find_file(flag: str, name: str) -> Path:
    """The file called `name`, here or in this repository. Raises UserError if there is none."""
    for path in (Path(name), ROOT / name):
        if path.is_file():
            return path
    raise UserError(f"{flag} {name}: no such file")


class Problem(NamedTuple):
    """A line of a problem file."""

    question: str
    answer: str | int
    split: str
    completion: str


def read_problem(line: bytes) -> Problem:
    """Read one line. Raises ValueError with what is wrong with it."""
    try:
        item = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(item, dict):
        raise ValueError('not an object like {"question": "...", "answer": "..."}')
    question, answer = item.get("question"), item.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f'"question" must be a text, not {question!r}')
    if type(answer) not in (str, int) or answer == "":
        raise ValueError(f'"answer" must be a text or an integer, not {answer!r}')
    split = item.get("split", split_of(question) if question.isprintable() else "train")
    if split not in SPLITS:
        raise ValueError(f'"split" must be one of {", ".join(SPLITS)}, not {split!r}')
    completion = item.get("completion", f"<answer>{answer}</answer>")
    if not isinstance(completion, str) or not completion:
        raise ValueError(f'"completion" must be a text, not {completion!r}')
    for name, text in (("question", question), ("answer", str(answer)), ("completion", completion)):
        try:
            check_text(f'"{name}"', text)
        except UserError as error:
            raise ValueError(str(error)) from error
    return Problem(question, answer, split, completion)


class ProblemFile:
    """The problems of a JSONL file. Raises UserError with file and line."""

    def __init__(self, name: str):
        path = find_file("--problems", name)
        self.splits: dict[str, list[Problem]] = {split: [] for split in SPLITS}
        seen: dict[str, tuple[int, Problem]] = {}
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            if not line.strip():
                continue
            try:
                problem = read_problem(line)
                earlier, known = seen.setdefault(problem.question, (number, problem))
                if earlier != number and known[:3] != problem[:3]:
                    raise ValueError(
                        f"the question of line {earlier}, with another answer or split"
                    )
            except ValueError as error:
                raise UserError(f"--problems {name}, line {number}: {error}") from error
            if earlier == number:
                self.splits[problem.split].append(problem)
        for split, problems in self.splits.items():
            if not problems:
                raise UserError(
                    f"--problems {name}: no {split} problem among {len(seen)}; add lines, or name"
                    ' the "split" of some'
                )

    def draw(self, count: int, rng: random.Random) -> list[Problem]:
        """Draw `count` training problems, with replacement."""
        return rng.choices(self.splits["train"], k=count)

    def held_out(self, split: str, count: int) -> list[Problem]:
        """Return `count` problems of a split (or all it has), the same ones for every seed."""
        problems = self.splits[split]
        return random.Random(0).sample(problems, min(count, len(problems)))

    def examples(self, count: int) -> list[tuple]:
        """(question, answer, completion) of the first training problems."""
        return [(p.question, p.answer, p.completion) for p in self.splits["train"][:count]]

    def extremes(self) -> list[str]:
        """The shortest and the longest question of all splits."""
        questions = [p.question for problems in self.splits.values() for p in problems]
        return [min(questions, key=len), max(questions, key=len)]


class RewardFile:
    """The user's own code that scores a completion; its errors keep their traceback.

    Raises UserError where the file breaks the contract of `rewards.py`.
    """

    def __init__(self, name: str = ""):
        self.path = find_file("--rewards", name or str(ROOT / "rewards.py"))
        self.sha256 = sha256(self.path)
        spec = importlib.util.spec_from_file_location("reward_file", self.path)
        if spec is None:
            raise UserError(f"--rewards {name}: not a Python file (.py)")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.weights, self.function = (getattr(module, n, None) for n in ("WEIGHTS", "score"))
        self.parse = getattr(module, "parse", lambda completion: completion)
        if not (
            isinstance(self.weights, dict)
            and all(isinstance(part, str) and part.isidentifier() for part in self.weights)
            and all(type(w) in (int, float) and math.isfinite(w) for w in self.weights.values())
            and "exact" in self.weights
        ):
            raise UserError(
                f"{self.path}: WEIGHTS must map names of reward parts to numbers, exact among them,"
                f" not {self.weights!r}"
            )
        if not callable(self.function):
            raise UserError(f"{self.path}: defines no function score(completion, answer)")

    def score(self, completion: str, answer: str | int) -> dict[str, float]:
        """The parts of a completion's reward by name, each in 0..1, before their weights."""
        scores = self.function(completion, answer)
        names = list(self.weights)
        if not isinstance(scores, tuple | list) or len(scores) != len(names):
            problem = f"must return {len(names)} numbers, for {', '.join(names)}"
        elif not all(isinstance(s, int | float) and 0 <= s <= 1 for s in scores):
            problem = "must return numbers from 0 to 1"  # NaN is none of them
        else:
            return dict(zip(names, map(float, scores), strict=True))
        raise UserError(f"{self.path}: score({completion!r}, {answer!r}) {problem}, not {scores!r}")

    def try_out(self, answer: str | int, shown: list[tuple]) -> None:
        """Score an empty and an odd completion, and the worked examples `shown` (question, answer,
        completion). Raises UserError, also if an example does not earn `exact`.
        """
        self.score("", answer)
        self.score(ODD_COMPLETION, answer)
        for question, right, completion in shown:
            if self.score(completion, right)["exact"] != 1:
                raise UserError(
                    f"{self.path}: the worked example {question!r} shows {completion!r}, which this"
                    " file does not score as exact; change one of them, or --num_examples 0"
                )

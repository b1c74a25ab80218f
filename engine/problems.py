"""The user's own task: questions from a JSONL file, rewards from a Python file.

A problem file has one `{"question": ..., "answer": ...}` per line. Optional: "split", and
"completion", what a worked example shows. A reward file has the contract of `rewards.py`.
"""

import codecs
import hashlib
import json
import random
import sys
import zlib
from types import ModuleType
from typing import NamedTuple

from engine.cli import check_text
from engine.files import ROOT, UserError, read_file

SPLITS = ("train", "validation", "test")
# Columns of grpo_completions.jsonl that no part of a reward may be named after.
RESERVED_COLUMNS = {"text", "advantage", "tokens", "truncated"}
ODD_COMPLETION = "<answer>\0\u0667\u2212</answer> \U0001f642<answer>"


def split_of(text: str) -> str:
    """train (90%), validation (5%) or test (5%), by a hash that no seed changes."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(text.encode()) % 20, "train")


class Problem(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str | int
    split: str
    completion: str  # what a worked example shows


def read_problem(line: bytes) -> Problem:
    """Read one line. Raises UserError with what is wrong with it."""
    try:
        item = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON ({error})") from error
    if not isinstance(item, dict):
        raise UserError('not an object like {"question": "...", "answer": "..."}')
    question, answer = item.get("question"), item.get("answer")
    if type(answer) not in (str, int):
        raise UserError(f'"answer" must be a text or an integer, not {answer!r:.80}')
    completion = item.get("completion", f"<answer>{answer}</answer>")
    for name, text in (("question", question), ("answer", str(answer)), ("completion", completion)):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f'"{name}" must be a text that is not blank, not {text!r:.80}')
        check_text(f'"{name}"', text)
    split = item.get("split", split_of(question))
    if split not in SPLITS:
        raise UserError(f'"split" must be one of {", ".join(SPLITS)}, not {split!r:.80}')
    return Problem(question, answer, split, completion)


class ProblemFile:
    """The problems of a JSONL file. Raises UserError with file and line."""

    def __init__(self, name: str):
        content = read_file("--problems", name)[1]
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.splits: dict[str, list[Problem]] = {split: [] for split in SPLITS}
        seen: dict[str, tuple[int, Problem]] = {}
        lines = content.removeprefix(codecs.BOM_UTF8).splitlines()
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                problem = read_problem(line)
                earlier, known = seen.setdefault(problem.question, (number, problem))
                if earlier != number and known[:3] != problem[:3]:
                    raise UserError(f"the question of line {earlier}, with another answer or split")
            except UserError as error:
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

    def examples(self, count: int) -> list[Problem]:
        """The first training problems, to show in the prompt."""
        return self.splits["train"][:count]

    def extremes(self) -> list[str]:
        """The shortest and the longest question of all splits."""
        questions = [p.question for problems in self.splits.values() for p in problems]
        return [size(questions, key=lambda q: len(q.encode())) for size in (min, max)]


class RewardFile:
    """The user's own code that scores a completion; its errors keep their traceback.

    Raises UserError where the file breaks the contract of `rewards.py`.
    """

    def __init__(self, name: str = ""):
        self.path, source = read_file("--rewards", name or str(ROOT / "rewards.py"))
        if self.path.suffix != ".py":
            raise UserError(f"--rewards {name}: not a Python file (.py)")
        self.sha256 = hashlib.sha256(source).hexdigest()
        module = ModuleType(f"rewards_{self.sha256}")
        module.__file__ = str(self.path)
        sys.modules[module.__name__] = module  # where dataclasses look it up
        # No import: it might take older byte code from __pycache__, which the hash does not cover.
        exec(compile(source, self.path, "exec"), vars(module))
        self.weights, self.function = (getattr(module, n, None) for n in ("WEIGHTS", "score"))
        self.parse = getattr(module, "parse", lambda completion: completion)
        if not (
            isinstance(self.weights, dict)
            and all(isinstance(part, str) and part.isidentifier() for part in self.weights)
            and not self.weights.keys() & RESERVED_COLUMNS
            and all(type(w) in (int, float) and abs(w) <= 1e6 for w in self.weights.values())
            and "exact" in self.weights
        ):
            raise UserError(
                f"{self.path}: WEIGHTS must map names of reward parts to numbers, exact among them"
                f" and not {', '.join(sorted(RESERVED_COLUMNS))}; it is {self.weights!r}"
            )
        for function, form in ((self.function, "score(completion, answer)"), (self.parse, "parse")):
            if not callable(function):
                raise UserError(f"{self.path}: defines no function {form}")

    def score(self, completion: str, answer: str | int) -> dict[str, float]:
        """The parts of a completion's reward by name, each in 0..1, before their weights."""
        try:
            scores = self.function(completion, answer)
        except OSError as error:  # which a run takes for a full disk of its own
            raise RuntimeError(f"{self.path}: score failed") from error
        names = list(self.weights)
        if not isinstance(scores, tuple | list) or len(scores) != len(names):
            problem = f"must return {len(names)} numbers, for {', '.join(names)}"
        elif not all(isinstance(s, int | float) and 0 <= s <= 1 for s in scores):
            problem = "must return numbers from 0 to 1"  # NaN is none of them
        else:
            return dict(zip(names, map(float, scores), strict=True))
        raise UserError(f"{self.path}: score({completion!r}, {answer!r}) {problem}, not {scores!r}")

    def try_out(self, answer: str | int, examples: list[Problem]) -> None:
        """Score an empty and an odd completion, and the worked examples of the prompt.

        Raises UserError, also if an example does not earn `exact`.
        """
        self.score("", answer)
        self.score(ODD_COMPLETION, answer)
        for question, right, _, completion in examples:
            if self.score(completion, right)["exact"] != 1:
                raise UserError(
                    f"{self.path}: the worked example {question!r} shows {completion!r}, which this"
                    " file does not score as exact; change one of them, or --num_examples 0"
                )

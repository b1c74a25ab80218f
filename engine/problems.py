"""The user's own task: questions from a JSONL file, rewards from a Python file.

A problem file has one `{"question": ..., "answer": ...}` per line. Optional: "split", and
"completion", what a worked example shows. A reward file has the contract of `rewards.py`.
"""

import codecs
import hashlib
import importlib.util
import json
import math
import os
import random
import signal
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from tqdm import tqdm

from engine.cli import check_text
from engine.files import ROOT, UserError, read_file

SPLITS = ("train", "validation", "test")
# Columns of grpo_completions.jsonl: when sampled, after the updates, under the reference.
LOGPROBS = ("sampled_logprobs", "updated_logprobs", "ref_logprobs")
# Columns that no part of a reward may be named after.
RESERVED_COLUMNS = {"text", "advantage", "tokens", "truncated", "token_texts", *LOGPROBS}
ODD_COMPLETION = "<answer>\0\u0667\u2212</answer> \U0001f642<answer>"
FORMAT = "a problem file is JSON Lines: one object per line, UTF-8"
OTHER_FORMATS = {b"[": "a JSON array", b"PAR1": "Parquet"}  # by their first bytes
OTHER_FORMATS |= dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "UTF-16")
SLOW = 30.0  # seconds in one call of `score` before a line says which


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
        raise UserError(f"not valid JSON ({error}); {FORMAT}") from error
    if not isinstance(item, dict):
        raise UserError('not an object like {"question": "...", "answer": "..."}')
    question, answer = item.get("question"), item.get("answer")
    known = item.keys() >= {"question", "answer"}
    hint = "" if known else f'; the fields are {list(item)!r:.200}, not "question" and "answer"'
    if type(answer) not in (str, int):
        raise UserError(f'"answer" must be a text or an integer, not {answer!r:.80}{hint}')
    completion = item.get("completion", f"<answer>{answer}</answer>")
    for name, text in (("question", question), ("answer", str(answer)), ("completion", completion)):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f'"{name}" must be a text that is not blank, not {text!r:.80}{hint}')
        check_text(f'"{name}"', text)
    split = item.get("split", split_of(question))
    if split not in SPLITS:
        raise UserError(f'"split" must be one of {", ".join(SPLITS)}, not {split!r:.80}')
    return Problem(question, answer, split, completion)


class ProblemFile:
    """The problems of a JSONL file. Raises UserError with file and line."""

    def __init__(self, name: str):
        content = read_file("--problems", name)[1]
        self.name, self.sha256 = name, hashlib.sha256(content).hexdigest()
        content = content.removeprefix(codecs.BOM_UTF8)
        start = content.lstrip()[:40]
        if start and not start.startswith(b"{"):
            kinds = [kind for magic, kind in OTHER_FORMATS.items() if start.startswith(magic)]
            kinds.append(f"a file that starts with {start.decode(errors='replace')!r}")
            raise UserError(f"--problems {name}: {FORMAT}; this is {kinds[0]}")
        seen: dict[str, tuple[int, Problem]] = {}  # line and problem by question
        for number, line in enumerate(content.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                problem = read_problem(line)
                earlier, known = seen.setdefault(problem.question, (number, problem))
                if known[:3] != problem[:3]:
                    raise UserError(f"the question of line {earlier}, with another answer or split")
            except UserError as error:
                raise UserError(f"--problems {name}, line {number}: {error}") from error
        self.lines = {question: number for question, (number, _) in seen.items()}
        self.splits = {s: [p for _, p in seen.values() if p.split == s] for s in SPLITS}
        for split in SPLITS:
            if not self.splits[split]:
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

    def questions(self) -> list[str]:
        """The questions of all splits."""
        return list(self.lines)

    def where(self, question: str) -> str:
        """What an error calls a question: the line it comes from."""
        return f"--problems {self.name}, line {self.lines[question]}"


def warn_of_long_answers(problems, tokenizer, max_new_tokens: int) -> None:
    """Print a warning if training answers have more tokens than a completion may have."""
    drawn = problems.examples(1000)
    ids = tokenizer([str(p.answer) for p in drawn], add_special_tokens=False)["input_ids"]
    long = [p for p, row in zip(drawn, ids, strict=True) if len(row) > max_new_tokens]
    if long:
        print(
            f"warning: {len(long)} of the first {len(drawn)} training answers have more tokens than"
            f" --max_new_tokens {max_new_tokens}, so no completion can match them, like that of"
            f" {problems.where(long[0].question)}: {long[0].answer!r:.80}. Give the final answer"
            " alone (docs/your_own_problem.md), or raise --max_new_tokens"
        )


def import_source(path: Path, source: bytes) -> ModuleType:
    """Run the `source` of a file as a module that worker processes can import by its name.

    Its folder comes last on Python's path: the file can import its neighbours, and hides nothing.
    If its name is taken, it is a module of its folder. Raises UserError if that is taken too.
    """
    file = Path(os.path.abspath(path))
    parts = file.with_suffix("").parts
    importlib.invalidate_caches()
    for depth in range(1, min(4, len(parts))):
        name, place = ".".join(parts[-depth:]), str(Path(*parts[:-depth]))
        sys.path += [place] * (place not in sys.path)
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):  # no such package; a module without a spec
            continue
        if spec and os.path.exists(spec.origin or "") and os.path.samefile(spec.origin, file):
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module  # where pickle and dataclasses look it up
            # No import: it might take older byte code from __pycache__, which the hash ignores.
            exec(compile(source, file, "exec"), vars(module))
            return module
    raise UserError(f"{path}: Python finds another module by this name; rename the file")


def to_number(value) -> float:
    """What float() makes of a score, NumPy's included; NaN if it is a text or no number."""
    try:
        return math.nan if isinstance(value, str | bytes | bytearray) else float(value)
    except Exception:  # of any class
        return math.nan


class RewardFile:
    """The user's own code that scores a completion; its errors keep their traceback.

    Raises UserError where the file breaks the contract of `rewards.py`.
    """

    def __init__(self, name: str = ""):
        self.path, source = read_file("--rewards", name or str(ROOT / "rewards.py"))
        if self.path.suffix != ".py":
            raise UserError(f"--rewards {name}: not a Python file (.py)")
        self.sha256 = hashlib.sha256(source).hexdigest()
        module = import_source(self.path, source)
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

    @contextmanager
    def told_if_slow(self, completion: str, answer: str | int) -> Iterator[None]:
        """Print a line about this call of `score` once it has taken SLOW seconds.

        By a signal, since one regular expression would hold up a thread; not if the file uses that
        signal itself, for a timeout of its own.
        """

        def tell(*_) -> None:
            text = f"score has run for {SLOW:.0f} s on the completion {completion!r:.300}"
            tqdm.write(f"{self.path}: {text}, answer {answer!r:.100}", file=sys.stderr)

        if signal.getsignal(signal.SIGALRM) != signal.SIG_DFL:
            yield
            return
        signal.signal(signal.SIGALRM, tell)
        signal.setitimer(signal.ITIMER_REAL, SLOW)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def score(self, completion: str, answer: str | int) -> dict[str, float]:
        """The parts of a completion's reward by name, each in 0..1, before their weights."""
        try:
            with self.told_if_slow(completion, answer):
                scores = self.function(completion, answer)
        except OSError as error:  # which a run takes for a full disk of its own
            raise RuntimeError(f"{self.path}: score failed") from error
        given = scores.tolist() if hasattr(scores, "tolist") else scores
        numbers = [to_number(each) for each in given] if isinstance(given, tuple | list) else []
        if len(numbers) != len(self.weights):
            problem = f"must return {len(self.weights)} numbers, for {', '.join(self.weights)}"
        elif not all(0 <= number <= 1 for number in numbers):  # NaN is none of them
            problem = "must return numbers from 0 to 1"
        else:
            return dict(zip(self.weights, numbers, strict=True))
        raise UserError(f"{self.path}: score({completion!r}, {answer!r}) {problem}, not {scores!r}")

    def try_out(self, problems: list[Problem], examples: list[Problem]) -> None:
        """Score completions as they may come: empty, odd, in the form of an answer, a bare answer.

        Raises UserError for a wrong result, also if a worked example does not earn `exact`.
        """
        for completion in ("", ODD_COMPLETION):
            self.score(completion, problems[0].answer)
        for _, answer, _, completion in problems:
            for text in dict.fromkeys((completion, f"<answer>{answer}</answer>", str(answer))):
                self.score(text, answer)
        for question, right, _, completion in examples:
            if self.score(completion, right)["exact"] != 1:
                raise UserError(
                    f"{self.path}: the worked example {question!r} shows {completion!r}, which this"
                    " file does not score as exact; change one of them, or --num_examples 0"
                )

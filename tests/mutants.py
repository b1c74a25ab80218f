"""Break the code in one place, run the test that should notice, and repeat for every mutant.

    python tests/mutants.py             # all of them; exits with 1 unless every one is caught
    python tests/mutants.py mask clip   # only those whose name holds one of these words
    python tests/mutants.py --list      # their names, the files they change, the tests

Each mutant is a copy of the project in which a forked process runs one test. Forked, because
importing torch takes longer than most of these tests; so this needs Linux or macOS.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = 2
TIMEOUT = 150  # seconds for one mutant

# By file and by test: a name, the code (it stands exactly once in the file), and its replacement.
MUTANTS = r"""
"""


class Mutant(NamedTuple):
    name: str
    file: str
    code: str
    broken: str
    test: str  # as pytest names it; must fail


def parse(text: str) -> Iterator[Mutant]:
    """Read mutants; `= ` starts the file and `: ` the test of those that follow."""
    file = test = ""
    for block in text.strip().split("\n\n"):
        lines = block.splitlines()
        headers = {line[0]: line[2:] for line in lines if line[0] in "=:"}
        file, test = headers.get("=", file), headers.get(":", test)
        removed, added = ("\n".join(line[2:] for line in lines if line[0] == sign) for sign in "-+")
        [name] = (line for line in lines if line[0] not in "=:-+")
        yield Mutant(name, file, removed, added, test)


def import_once() -> None:
    """Import what the tests need and no mutant changes. No tensor may be computed before a fork."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["OMP_NUM_THREADS"] = "1"  # also of their processes
    import pytest  # noqa: F401
    import torch
    import transformers

    torch.set_num_threads(1)  # a process with more must not be forked


def first_line(output: str) -> str:
    """What pytest says is wrong."""
    found = re.search(r"^(?:E  |ERROR|FAILED).*", output, flags=re.MULTILINE)
    return found[0] if found else output.strip()[-200:]


def run_tests(tests: list[str], project: Path) -> None:
    """Run tests of a copy of the project in this process, which ends with pytest's exit code."""
    code = 1000
    try:
        signal.alarm(TIMEOUT)
        handle = os.open(project.parent / "output", os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.chdir(project)
        sys.path.remove(str(ROOT / "tests"))
        sys.dont_write_bytecode = True
        import pytest

        options = ["-x", "-p", "no:cacheprovider", f"--basetemp={project.parent / 'tmp'}"]
        code = pytest.main([*options, *(f"tests/{test}" for test in tests)])
    finally:
        sys.stdout.flush()
        os._exit(code)

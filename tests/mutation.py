"""Mutation tests: change the algorithm in one place at a time; each time, a test must fail.

    python tests/mutation.py                       # all of MUTATED: six minutes on two cores
    python tests/mutation.py kl_term TreePolicy    # functions and classes with these in their names

mutmut makes the changes, called mutants, in a copy: the git-ignored folder mutants/. It runs the
tests named under [tool.mutmut] in pyproject.toml; a mutant survives if they all pass. Survivors
that do no harm are named in tests/survivors.txt, with a reason. Exits with 1 if another one
survives, or if a named one does not: it is caught now, or its line has changed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant

ROOT = Path(__file__).resolve().parent.parent
SURVIVORS = Path("tests/survivors.txt")
LOG = Path("mutants/mutmut.log")
FILES = ["rewards.py", "engine/policy.py", "engine/tree.py", "engine/startup.py", "train_grpo.py"]
# In mutmut's names, x_function and xǁClassǁmethod. The rest of these files reads settings, loads
# models, trains or prints: tests of it are slow.
MUTATED = ["rewards.*", "engine.policy.*", "engine.tree.xǁ*", "engine.tree.x_left_aligned*"]
MUTATED += ["engine.startup.x_choose_policy*", "engine.startup.x_find_mismatch*"]
STEPS = "rollout reward_function group_advantages kl_term completion_mean loss_length grpo_loss"
STEPS += " loss_mask measure_kl update_policy"
MUTATED += [f"train_grpo.x_{step}*" for step in STEPS.split()]
SURVIVED = (0, 5, 33)  # exit codes: all tests passed, none was selected, none calls the function

Change = tuple[str, str, str]  # function, old code, new code


def named_survivors() -> set[Change]:
    """Read SURVIVORS: under the name of a function, `-` old code and then `+` new code, or more."""
    named, function, old = set(), "", ""
    for line in SURVIVORS.read_text().splitlines():
        if line.startswith("-"):
            old = line[2:]
        elif line.startswith("+"):
            named.add((function, old, line[2:]))
        elif line and not line.startswith("#"):
            function = line
    return named


def change(mutant: str, file: str) -> Change:
    """What a mutant changes, by its lines without indentation and comments."""
    diff = get_diff_for_mutant(mutant, path=file).split("\n")[2:]
    code = [(line[0], line[1:].partition("  # ")[0].strip()) for line in diff]
    old, new = (" ".join(line for sign, line in code if sign == wanted) for wanted in "-+")
    function = mutant.partition("__mutmut_")[0].replace(".x_", ".").replace(".xǁ", ".")
    return function.replace("ǁ", "."), old, new


def run_mutmut(patterns: list[str]) -> None:
    shutil.rmtree("mutants", ignore_errors=True)  # mutmut would reuse results of older tests
    LOG.parent.mkdir()
    command = [Path(sys.executable).with_name("mutmut"), "run", *patterns]
    # One thread: a pool of threads is lost in a fork.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with LOG.open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=env)
    if done.returncode:
        sys.exit(f"{LOG.read_text()[-3000:]}\nmutmut exited with {done.returncode}; see {LOG}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of names; default: all of MUTATED")
    names = parser.parse_args().names
    os.chdir(ROOT)
    started, named, made, survivors = time.time(), named_survivors(), 0, []
    print(f"progress: {LOG}", flush=True)
    run_mutmut([f"*{name}*" for name in names] or MUTATED)
    for file in FILES:
        data = SourceFileMutationData(path=file)
        data.load()
        for mutant, code in data.exit_code_by_key.items():
            if code is not None and any(fnmatch(mutant, pattern) for pattern in MUTATED):
                made += 1
                survivors += [change(mutant, file)] if code in SURVIVED else []
    if names:
        named = {entry for entry in named if any(name in entry[0] for name in names)}
    for function, old, new in sorted(set(survivors) - named):
        print(f"survived: {function} | - {old} | + {new}")
    for function, old, new in sorted(named - set(survivors)):
        print(f"in {SURVIVORS}, but caught or not made: {function} | - {old} | + {new}")
    count, seconds = sum(entry in named for entry in survivors), time.time() - started
    caught = made - len(survivors)
    print(f"{made} mutants in {seconds:.0f} s, {caught} caught, {count} named survivors")
    return int(set(survivors) != named)


if __name__ == "__main__":
    sys.exit(main())

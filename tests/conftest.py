"""Shared by all tests: the bundled model, and scripts run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.models import load_model
from engine.policy import Policy

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny_model"


def run_script(
    *arguments, cwd: Path, stdin: str = "", launcher=(sys.executable,)
) -> subprocess.CompletedProcess:
    """Run one of our scripts in a process of its own, away from the network."""
    script, *rest = map(str, arguments)
    return subprocess.run(
        [*launcher, str(ROOT / script), *rest],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture(scope="session")
def tiny():
    """(policy, tokenizer) of the bundled model; tests that train must copy the policy first."""
    model, tokenizer = load_model(str(TINY), torch.device("cpu"))
    return Policy(model), tokenizer

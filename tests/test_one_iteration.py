"""docs/one_iteration.md is what the trainer's own functions compute."""

import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import one_iteration

NUMBER = re.compile(r"[+-]?\d+\.\d+")


@pytest.fixture(scope="module")
def regenerated():
    return one_iteration.page()


@pytest.fixture(scope="module")
def committed():
    return (ROOT / "docs" / "one_iteration.md").read_text(encoding="utf-8")


def test_the_page_is_what_the_script_writes(regenerated, committed):
    assert NUMBER.sub("#", regenerated) == NUMBER.sub("#", committed)
    written, computed = ([float(x) for x in NUMBER.findall(t)] for t in (committed, regenerated))
    assert len(written) > 300
    assert computed == pytest.approx(written, abs=1e-3, rel=0)


def test_the_page_shows_clipping_in_both_directions_and_every_reward(committed):
    rows = [line.split(" | ") for line in committed.splitlines() if line.count(" | ") == 8]
    assert {"1.2000", "0.8000"} <= {
        clipped for *_, ratio, clipped, _, _, _ in rows if ratio != clipped
    }
    scored = [line.split(" | ") for line in committed.splitlines() if line.count(" | ") == 6]
    assert {"0.0 |", "0.2 |", "0.4 |", "1.0 |"} <= {row[-1] for row in scored}


def test_the_loss_by_hand_is_the_loss_by_code(committed):
    hand, code = re.search(r"`grpo_loss` \|\n.*\n\| (\S+) \| (\S+) \|", committed).groups()
    assert float(hand) == pytest.approx(float(code), abs=1e-5)
    assert float(hand) != 0

"""Every trick that could game the reward, in one table, with what it must earn."""

import pytest

from engine.run import accuracy_summary
from rewards import Score, parse_completion, score
from train_grpo import REWARD_WEIGHTS, reward_function

NOTHING, FORMAT = Score(False, False, False), Score(True, False, False)
NEAR, EXACT = Score(True, True, False), Score(True, True, True)

# (completion, what it earns where the truth is 7)
TABLE = {
    "the right answer": ("<answer>7</answer>", EXACT),
    "white space around it": (" \n<answer>7</answer>\t\n", EXACT),
    "spaces inside": ("<answer>  7 </answer>", EXACT),
    "leading zeros count by value": ("<answer>007</answer>", EXACT),
    "nine digits with leading zeros": ("<answer>000000007</answer>", EXACT),
    "one too many": ("<answer>8</answer>", NEAR),
    "one too few": ("<answer>6</answer>", NEAR),
    "two off": ("<answer>9</answer>", FORMAT),
    "wrong sign": ("<answer>-7</answer>", FORMAT),
    "ten digits": ("<answer>0000000007</answer>", FORMAT),
    "5,000 digits": (f"<answer>{'7' * 5000}</answer>", FORMAT),
    "plus sign": ("<answer>+7</answer>", FORMAT),
    "decimal": ("<answer>7.0</answer>", FORMAT),
    "exponent": ("<answer>7e0</answer>", FORMAT),
    "thousand as 1e3": ("<answer>1e3</answer>", FORMAT),
    "hexadecimal": ("<answer>0x7</answer>", FORMAT),
    "underscores": ("<answer>0_7</answer>", FORMAT),
    "two minus signs": ("<answer>--7</answer>", FORMAT),
    "minus apart": ("<answer>- 7</answer>", FORMAT),
    "Unicode minus": ("<answer>\u22127</answer>", FORMAT),
    "Arabic digit": ("<answer>\u0667</answer>", FORMAT),
    "full-width digit": ("<answer>\uff17</answer>", FORMAT),
    "superscript digit": ("<answer>\u2077</answer>", FORMAT),
    "no-break space inside": ("<answer>\u00a07</answer>", FORMAT),
    "new line inside": ("<answer>\n7\n</answer>", FORMAT),
    "a word": ("<answer>seven</answer>", FORMAT),
    "an expression": ("<answer>3 + 4</answer>", FORMAT),
    "code": ("<answer>__import__('os').abort()</answer>", FORMAT),
    "two numbers": ("<answer>7 7</answer>", FORMAT),
    "some other tag inside": ("<answer><b>7</b></answer>", FORMAT),
    "empty answer": ("<answer></answer>", FORMAT),
    "two answers": ("<answer>7</answer><answer>7</answer>", NOTHING),
    "every answer": ("".join(f"<answer>{n}</answer>" for n in range(10)), NOTHING),
    "inside prose": ("The result is <answer>7</answer>", NOTHING),
    "prose after it": ("<answer>7</answer> I think", NOTHING),
    "full stop after it": ("<answer>7</answer>.", NOTHING),
    "nested tags": ("<answer><answer>7</answer></answer>", NOTHING),
    "opened twice": ("<answer><answer>7</answer>", NOTHING),
    "closed twice": ("<answer>7</answer></answer>", NOTHING),
    "unclosed": ("<answer>7", NOTHING),
    "unopened": ("7</answer>", NOTHING),
    "tags the wrong way round": ("</answer>7<answer>", NOTHING),
    "one tag that would serve as both": ("<answer>", NOTHING),
    "overlapping tags": ("<answer</answer>", NOTHING),
    "capitals": ("<ANSWER>7</ANSWER>", NOTHING),
    "space in the tag": ("<answer >7</answer>", NOTHING),
    "a reserved token after it": ("<answer>7</answer><|user|>", NOTHING),
    "null character before it": ("\0<answer>7</answer>", NOTHING),
    "bare number": ("7", NOTHING),
    "empty": ("", NOTHING),
    "white space alone": (" \n ", NOTHING),
}


@pytest.mark.parametrize("completion, expected", TABLE.values(), ids=TABLE.keys())
def test_each_trick_earns_what_the_table_says(completion, expected):
    assert score(completion, 7) == expected


def test_minus_zero_is_zero():
    assert score("<answer>-0</answer>", 0) == EXACT


def test_negative_answers_are_read():
    assert parse_completion("<answer>-30</answer>") == (True, -30)


def test_the_reward_adds_the_weighted_parts():
    completions = ["<answer>7</answer>", "<answer>8</answer>", "<answer>x</answer>", "7"]
    parts = reward_function(completions, [7] * 4)
    assert parts.sum(dim=1).tolist() == pytest.approx([1.0, 0.4, 0.2, 0.0])
    assert REWARD_WEIGHTS == {"format": 0.2, "near": 0.2, "exact": 0.6}


def test_the_interval_is_wilsons():
    # 15 of 50: Newcombe (1998) gives 0.1910 to 0.4375.
    summary = accuracy_summary([True] * 15 + [False] * 35, [True] * 45 + [False] * 5)
    assert (summary["accuracy"], summary["format"], summary["problems"]) == (0.3, 0.9, 50)
    assert summary["low"] == pytest.approx(0.1910, abs=1e-4)
    assert summary["high"] == pytest.approx(0.4375, abs=1e-4)


@pytest.mark.parametrize("exact", [True, False])
def test_the_interval_stays_within_0_and_1(exact):
    summary = accuracy_summary([exact] * 20, [True] * 20)
    assert 0 <= summary["low"] <= summary["accuracy"] <= summary["high"] <= 1
    assert summary["high"] - summary["low"] > 0.1  # no certainty from 20 trials

"""Every trick that could game the reward, in one table, with what it must earn."""

import pytest

from engine.metrics import accuracy_summary
from engine.problems import RewardFile
from rewards import WEIGHTS, Score, parse, score
from train_grpo import reward_function

NOTHING, FORMAT = Score(False, False, False), Score(True, False, False)
NEAR, EXACT = Score(True, True, False), Score(True, True, True)

# (completion, what it earns where the truth is 7)
TABLE = {
    "the right answer": ("<answer>7</answer>", EXACT),
    "white space around it": (" \n<answer>7</answer>\t\n", EXACT),
    "leading zeros count by value": ("<answer>007</answer>", EXACT),
    "nine digits with leading zeros": ("<answer>000000007</answer>", EXACT),
    "one too many": ("<answer>8</answer>", NEAR),
    "one too few": ("<answer>6</answer>", NEAR),
    "two off": ("<answer>9</answer>", FORMAT),
    "wrong sign": ("<answer>-7</answer>", FORMAT),
    "ten digits": ("<answer>0000000007</answer>", FORMAT),
    "plus sign": ("<answer>+7</answer>", FORMAT),
    "decimal": ("<answer>7.0</answer>", FORMAT),
    "hexadecimal": ("<answer>0x7</answer>", FORMAT),
    "two minus signs": ("<answer>--7</answer>", FORMAT),
    "Unicode minus": ("<answer>\u22127</answer>", FORMAT),
    "Arabic digit": ("<answer>\u0667</answer>", FORMAT),
    "no-break space inside": ("<answer>\u00a07</answer>", FORMAT),
    "new line inside": ("<answer>\n7\n</answer>", FORMAT),
    "an expression": ("<answer>3 + 4</answer>", FORMAT),
    "code": ("<answer>__import__('os').abort()</answer>", FORMAT),
    "two numbers": ("<answer>7 7</answer>", FORMAT),
    "empty answer": ("<answer></answer>", FORMAT),
    "two answers": ("<answer>7</answer><answer>7</answer>", NOTHING),
    "every answer": ("".join(f"<answer>{n}</answer>" for n in range(10)), NOTHING),
    "inside prose": ("The result is <answer>7</answer>", NOTHING),
    "prose after it": ("<answer>7</answer> I think", NOTHING),
    "full stop after it": ("<answer>7</answer>.", NOTHING),
    "nested tags": ("<answer><answer>7</answer></answer>", NOTHING),
    "closed twice": ("<answer>7</answer></answer>", NOTHING),
    "unclosed": ("<answer>7", NOTHING),
    "unopened": ("7</answer>", NOTHING),
    "tags the wrong way round": ("</answer>7<answer>", NOTHING),
    "one tag that would serve as both": ("<answer>", NOTHING),
    "capitals": ("<ANSWER>7</ANSWER>", NOTHING),
    "space in the tag": ("<answer >7</answer>", NOTHING),
    "a reserved token after it": ("<answer>7</answer><|user|>", NOTHING),
    "null character before it": ("\0<answer>7</answer>", NOTHING),
    "bare number": ("7", NOTHING),
    "empty": ("", NOTHING),
}


@pytest.mark.parametrize("completion, expected", TABLE.values(), ids=TABLE)
def test_each_trick_earns_what_the_table_says(completion, expected):
    for answer in (7, "7", " 07"):  # a number as text is that number
        assert score(completion, answer) == expected
    parsed = parse(completion)
    near = type(parsed) is int and abs(parsed - 7) <= 1
    assert (parsed == 7, near) == (expected.exact, expected.near)
    assert expected.format or parsed is None


def test_minus_zero_is_zero():
    assert score("<answer>-0</answer>", 0) == EXACT


# (completion, what it earns where the truth is " Gr\u00fc\u00df dich ")
TEXTS = {
    "the right text": ("<answer>Gr\u00fc\u00df dich</answer>", EXACT),
    "white space at its ends": ("<answer>\n Gr\u00fc\u00df dich\t</answer>\n", EXACT),
    "one letter wrong": ("<answer>Gr\u00fc\u00df dich!</answer>", FORMAT),
    "another case": ("<answer>gr\u00fc\u00df dich</answer>", FORMAT),
    "letters that look the same": ("<answer>Gru\u0308\u00df dich</answer>", FORMAT),
    "prose around the tags": ("So: <answer>Gr\u00fc\u00df dich</answer>", NOTHING),
}


@pytest.mark.parametrize("completion, expected", TEXTS.values(), ids=TEXTS)
def test_a_text_must_match_letter_by_letter(completion, expected):
    assert score(completion, " Gr\u00fc\u00df dich ") == expected


@pytest.mark.parametrize("answer", [10**9, "1000000000", "7.0", "\u0667"])
def test_a_number_beyond_the_rule_is_matched_as_text(answer):
    assert score(f"<answer>{answer}</answer>", answer) == EXACT
    assert score("<answer>7</answer>", answer) == FORMAT
    assert score(f"<answer>{answer}0</answer>", answer) == FORMAT


def test_parse_gives_number_else_text_else_nothing():
    given = [parse(f"<answer>{text}</answer>") for text in (" 007 ", " seven ", "\u0667", " ")]
    assert given == [7, "seven", "\u0667", None]


def test_the_reward_adds_the_weighted_parts():
    completions = ["<answer>7</answer>", "<answer>8</answer>", "<answer>x</answer>", "7"]
    rewards, parts = reward_function(completions, [7] * 4, RewardFile())
    assert rewards.tolist() == pytest.approx([1.0, 0.4, 0.2, 0.0])
    fractions = {name: part.tolist() for name, part in parts.items()}  # before their weights
    assert fractions == {"format": [1, 1, 1, 0], "near": [1, 1, 0, 0], "exact": [1, 0, 0, 0]}
    assert RewardFile().weights == WEIGHTS == {"format": 0.2, "near": 0.2, "exact": 0.6}


def test_weights_may_be_zero_negative_or_large(tmp_path):
    (tmp_path / "lengths.py").write_text(
        "WEIGHTS = {'exact': 3, 'long': -0.5, 'letters': 0}\n"
        "def score(completion, answer):\n"
        "    return completion == answer, min(len(completion), 4) / 4, len(completion) > 0\n"
    )
    file = RewardFile(str(tmp_path / "lengths.py"))
    rewards, parts = reward_function(["ab", "abcd", ""], ["ab", "x", "x"], file)
    assert rewards.tolist() == [3 - 0.25, -0.5, 0]
    fractions = {name: part.tolist() for name, part in parts.items()}
    assert fractions == {"exact": [1, 0, 0], "long": [0.5, 1, 0], "letters": [1, 1, 0]}


def test_the_interval_is_wilsons():
    # 15 of 50: Newcombe (1998) gives 0.1910 to 0.4375. Only a score of exactly 1 counts.
    scores = [{"format": float(i < 45), "exact": 1.0 if i < 15 else 0.9} for i in range(50)]
    summary = accuracy_summary(scores)
    assert (summary["accuracy"], summary["problems"]) == (0.3, 50)
    assert summary["parts"] == pytest.approx({"format": 0.9, "exact": 0.93})
    assert (summary["low"], summary["high"]) == pytest.approx((0.1910, 0.4375), abs=1e-4)


@pytest.mark.parametrize("exact", [1.0, 0.0])
def test_the_interval_stays_within_0_and_1(exact):
    summary = accuracy_summary([{"exact": exact}] * 20)
    assert 0 <= summary["low"] <= exact == summary["accuracy"] <= summary["high"] <= 1
    assert summary["high"] - summary["low"] > 0.1  # no certainty from 20 trials

"""A question in, an answer out."""

import pytest
import torch
from conftest import TINY, run_script

from inference import ask, most_common_answer, read_prompt
from policy import encode_prompts

QUESTIONS = ["What is (4 - 9) * 6?", "What is (1 + 2) + 3?", "What is (10 * 10) * 10?"]


def test_one_question_gets_one_plain_line_and_the_model_is_named_on_standard_error(tmp_path):
    result = run_script("inference.py", QUESTIONS[0], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    assert result.stdout.strip().lstrip("-").isdigit()
    assert "model tiny_model" in result.stderr or "model saved_model" in result.stderr


def test_questions_on_standard_input_are_answered_one_line_each_in_order(tmp_path, tiny):
    questions = QUESTIONS * 30  # more than one batch
    result = run_script("inference.py", "--model", TINY, cwd=tmp_path, stdin="\n".join(questions))
    alone = {
        q: most_common_answer(ask(*tiny, read_prompt(str(TINY)), [q], temperature=0, samples=1)[0])
        for q in QUESTIONS
    }
    assert result.stdout.splitlines() == [alone[q] for q in questions]


def test_verbose_shows_the_raw_completions(tmp_path):
    flags = ["--model", TINY, "--num_samples", "5", "--verbose"]
    result = run_script("inference.py", *flags, QUESTIONS[0], cwd=tmp_path)
    *raw, answer = result.stdout.splitlines()
    assert len(raw) == 5
    assert most_common_answer(raw) == answer


def test_greedy_answers_are_those_of_plain_generate(tiny):
    policy, tokenizer = tiny
    prompt = read_prompt(str(TINY))
    ids, mask = encode_prompts(tokenizer, QUESTIONS, prompt, "cpu")
    generated = policy.model.generate(ids, attention_mask=mask, max_new_tokens=16)
    texts = tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)
    asked = ask(policy, tokenizer, prompt, QUESTIONS, temperature=0, samples=1)
    assert [completions[0] for completions in asked] == texts


@pytest.mark.parametrize(
    "completions, answer",
    [
        (["<answer>3</answer>", "<answer>4</answer>", "<answer>04</answer>"], "4"),
        (["<answer>3</answer>", "<answer>4</answer>"], "3"),
        (["it is 4", "<answer>four</answer>"], "no answer"),
        (["it is 4", "it is 4", "<answer>-5</answer>"], "-5"),
    ],
)
def test_the_majority_of_numbers_is_the_answer(completions, answer):
    assert most_common_answer(completions) == answer


def test_sampling_at_temperature_one_varies(tiny):
    torch.manual_seed(0)
    prompt = read_prompt(str(TINY))
    (completions,) = ask(*tiny, prompt, QUESTIONS[:1], temperature=1.0, samples=32)
    assert len(set(completions)) > 1

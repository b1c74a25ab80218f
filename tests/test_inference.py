"""A question in, an answer out; and what `--evaluate` measures."""

import hashlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
from conftest import ROOT, TINY
from processes import finish

import inference
from engine.cli import UserError
from engine.metrics import describe
from engine.models import encode_prompts, read_prompt
from engine.problems import RewardFile
from engine.tree import TreePolicy
from inference import ask, evaluate_groups, most_common_answer, pass_at_k, prompt_of
from rewards import parse, score
from train_grpo import PRESETS, Arithmetic, Config, TrainState, evaluate

QUESTIONS = ["What is (4 - 9) * 6?", "What is (1 + 2) + 3?", "What is (10 * 10) * 10?"]
PROMPT = read_prompt(str(TINY))


@pytest.fixture(scope="module")
def asked():
    """`python inference.py` with questions on standard input; it reports what it imports."""
    command = [sys.executable, "-X", "importtime", "inference.py", "--model", str(TINY)]
    return subprocess.run(
        command,
        cwd=ROOT,
        input="\n".join([*QUESTIONS * 44, "", " ", QUESTIONS[0]]),  # more than one batch
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def test_each_line_of_input_gets_one_line_in_order(asked, tiny):
    answers = {q: most_common_answer(ask(*tiny, PROMPT, [q], 0, 1)[0], parse) for q in QUESTIONS}
    assert asked.returncode == 0, asked.stderr
    expected = [answers[q] for q in QUESTIONS * 44]
    assert asked.stdout.splitlines() == [*expected, "no answer", "no answer", expected[0]]
    assert all(answer.lstrip("-").isdigit() for answer in expected)
    assert f"model {TINY}: named on the command line" in asked.stderr


def test_asking_does_not_load_matplotlib(asked):
    imported = asked.stderr.split()
    assert "train_grpo" in imported and "matplotlib" not in imported


def test_an_empty_line_is_not_put_to_the_model(tiny, monkeypatch):
    monkeypatch.setattr(inference, "rollout", None)
    assert ask(*tiny, PROMPT, ["", ""], temperature=0, samples=3) == [[], []]
    assert most_common_answer([], parse) == "no answer"


def test_greedy_answers_equal_plain_generate(tiny):
    policy, tokenizer = tiny
    ids, mask = encode_prompts(tokenizer, QUESTIONS, PROMPT, "cpu")
    generated = policy.model.generate(ids, attention_mask=mask, max_new_tokens=16)
    texts = tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)
    completions = ask(policy, tokenizer, PROMPT, QUESTIONS, temperature=0, samples=1)
    assert completions == [[text] for text in texts]


@pytest.mark.parametrize(
    "completions, answer",
    [
        (["<answer>3</answer>", "<answer>4</answer>", "<answer>04</answer>"], "4"),
        (["<answer>3</answer>", "<answer>4</answer>"], "3"),
        (["it is 4", "<answer></answer>"], "no answer"),
        (["it is 4", "<answer>four</answer>"], "four"),
        (["it is 4", "it is 4", "<answer>-5</answer>"], "-5"),
    ],
)
def test_the_majority_of_answers_is_the_answer(completions, answer):
    assert most_common_answer(completions, parse) == answer


def test_verbose_prints_the_samples_before_their_majority(capsys):
    torch.manual_seed(0)
    flags = ["--model", str(TINY), "--num_samples", "100", "--verbose", QUESTIONS[0]]
    assert inference.main(flags) == 0
    *raw, answer = capsys.readouterr().out.splitlines()
    assert len(raw) == 100 and len(set(raw)) > 1
    assert most_common_answer(raw, parse) == answer


def test_the_model_is_decoded_as_long_as_it_was_trained(tmp_path, capsys):
    shutil.copytree(TINY, tmp_path / "model")
    for limit, answer in ((2, "no answer"), (16, "-50")):
        prompt = {**PROMPT, "max_new_tokens": limit}
        (tmp_path / "model" / "grpo_prompt.json").write_text(json.dumps(prompt))
        assert inference.main(["--model", str(tmp_path / "model"), QUESTIONS[0]]) == 0
        assert capsys.readouterr().out == f"{answer}\n"


def test_a_trained_model_is_found_and_asked_as_trained(tmp_path, monkeypatch, capsys):
    finish(tmp_path, "--num_iterations", 1, "--num_examples", 1, "--max_new_tokens", 12)
    monkeypatch.chdir(tmp_path)
    assert inference.main([QUESTIONS[0]]) == 0
    assert "model saved_model: trained here" in capsys.readouterr().err
    prompt = prompt_of("saved_model")
    assert len(prompt["examples"]) == 1 and prompt["max_new_tokens"] == 12


def test_a_fetched_model_is_asked_as_its_preset_does():
    name = PRESETS["smollm2"]["model_name"]
    for way in (name, f"{name}/", f"./{name}", str(ROOT / name)):
        assert len(prompt_of(way)["examples"]) == PRESETS["smollm2"]["num_examples"], way


@pytest.mark.parametrize("samples", range(1, 7))
def test_pass_at_k_is_the_mean_over_all_subsets(samples):
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        subsets = itertools.combinations([i < right for i in range(samples)], k)
        assert pass_at_k(samples, right, k) == pytest.approx(fmean(map(any, subsets)), abs=1e-15)


def test_pass_at_k_is_exact_for_large_numbers():
    assert pass_at_k(10_000, 1, 5_000) == 0.5
    assert pass_at_k(10_000, 10_000, 1) == 1 and pass_at_k(10_000, 0, 10_000) == 0
    expected = 1 - math.prod((9_000 - i) / (10_000 - i) for i in range(64))
    assert pass_at_k(10_000, 1_000, 64) == pytest.approx(expected, rel=1e-12)


@pytest.fixture(scope="module")
def state(tiny):
    """The bundled model and its task, as the trainer has them."""
    policy = TreePolicy(tiny[0].model)
    return TrainState(policy, policy, tiny[1], Arithmetic(0, 10), RewardFile(), PROMPT)


def test_evaluate_prints_what_the_trainer_measures(state, capsys):
    config = Config(eval_problems=128)
    accuracies = evaluate(state, state.policy, "test", config, seed=0)["accuracies"]
    assert inference.main(["--evaluate", "--model", str(TINY), "--eval_problems", "128"]) == 0
    chosen, head, *lines = capsys.readouterr().out.splitlines()
    assert chosen.startswith("policy tree")
    assert head == "128 test problems, scored by rewards.py"
    assert [line.split("; ")[0] for line in lines] == describe(accuracies).split(", ")
    for line, summary in zip(lines, accuracies.values(), strict=True):
        means = ", ".join(f"{part} {mean:.2f}" for part, mean in summary["parts"].items())
        assert line.endswith(f"; means: {means}") and "near" in means
    assert accuracies["sampled"]["low"] < 0.367 < accuracies["sampled"]["high"]  # of its card
    assert accuracies["greedy"]["low"] < 0.514 < accuracies["greedy"]["high"]


def test_samples_of_every_problem_are_counted_for_pass_at_k(state, capsys):
    problems = state.problems.held_out("test", 60)  # more than one batch
    questions, generator = [p.question for p in problems], torch.Generator().manual_seed(0)
    groups = ask(state.policy, state.tokenizer, PROMPT, questions, 1.0, 3, generator)
    scores = [[score(t, p.answer) for t in g] for g, p in zip(groups, problems, strict=True)]
    counts = [sum(s.exact for s in group) for group in scores]
    assert 0 < sum(counts) < 180
    expected = [f"pass@{k:<4} {fmean(pass_at_k(3, c, k) for c in counts):6.1%}" for k in (1, 2)]
    expected.append(f"pass@3    {fmean(c > 0 for c in counts):6.1%}")
    equal = fmean(len(set(group)) == 1 for group in scores)
    assert equal > 0
    expected.append(f"problems without signal (3 equal rewards): {equal:.1%}")
    flags = ["--model", str(TINY), "--eval_problems", "60", "--num_samples", "3"]
    assert inference.main(["--evaluate", *flags]) == 0
    assert capsys.readouterr().out.splitlines()[-4:] == expected


def test_sampling_groups_takes_a_bounded_batch(state, monkeypatch):
    sizes = []

    def recording(policy, tokenizer, prompts, *rest):
        sizes.append(len(prompts[0]))
        return rollout(policy, tokenizer, prompts, *rest)

    rollout = inference.rollout
    monkeypatch.setattr(inference, "rollout", recording)
    evaluate_groups(state, "test", Config(eval_problems=2), samples=100)
    assert sizes == [inference.BATCH, 200 - inference.BATCH]


SUMS = "".join(
    json.dumps({"question": f"What is {a} + 1?", "answer": a + 1, "split": split}) + "\n"
    for a, split in enumerate(["train", "validation", *["test"] * 6])
)
# Leaves a file behind if it is run. Right is whatever has an even number of characters.
EVEN = """from pathlib import Path
Path("was_run").touch()
WEIGHTS = {"exact": 1.0, "tags": 0.0}
def score(completion, answer):
    return len(completion) % 2 == 0, "<answer>" in completion
def parse(completion):
    return f"{len(completion)} characters"
"""


def saved(folder: Path, rewards: str, **task) -> list[str]:
    """Make a model trained on these; returns the flags that ask for it."""
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    sha256 = hashlib.sha256(EVEN.encode()).hexdigest()
    task = {"rewards": rewards, "rewards_sha256": sha256, **task}
    (folder / "grpo_prompt.json").write_text(json.dumps({**PROMPT, "task": task}))
    return ["--model", str(folder)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a task of the user's own in it."""
    (tmp_path / "sums.jsonl").write_text(SUMS)
    (tmp_path / "even.py").write_text(EVEN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_problems_and_rewards_of_the_user_are_measured(here, capsys):
    flags = ["--evaluate", "--model", str(TINY), "--problems", "sums.jsonl"]
    assert inference.main(flags) == 0
    head, _, greedy = capsys.readouterr().out.splitlines()[1:]
    assert head == "6 test problems, scored by rewards.py"
    assert greedy.startswith("greedy 100.0%")  # the bundled model knows sums
    assert inference.main([*flags, "--rewards", "even.py"]) == 0
    head, _, greedy = capsys.readouterr().out.splitlines()[1:]
    assert head == "6 test problems, scored by even.py"  # `<answer>N</answer>` has 18 characters
    assert greedy.startswith("greedy 100.0%") and greedy.endswith("means: exact 1.00, tags 1.00")


def test_settings_of_the_prompt_ask_otherwise_than_in_training(here, monkeypatch, capsys):
    seen, real = [], inference.evaluate

    def spy(state, *arguments, **named):
        seen.append(state.prompt)
        return real(state, *arguments, **named)

    monkeypatch.setattr(inference, "evaluate", spy)
    flags = [*saved(here / "model", ""), "--evaluate", "--eval_problems", "4"]
    recorded = PROMPT | {"system": "As trained."}
    (here / "model" / "grpo_prompt.json").write_text(json.dumps(recorded))
    assert inference.main(flags) == 0
    told = ["--system_prompt", "Add.", "--num_examples", "2", "--max_new_tokens", "5"]
    assert inference.main([*flags, *told]) == 0
    assert inference.main([*flags, "--max_new_tokens", "7"]) == 0
    as_trained, otherwise, longer = seen
    assert as_trained == recorded
    assert longer == recorded | {"max_new_tokens": 7}
    assert (otherwise["system"], otherwise["max_new_tokens"]) == ("Add.", 5)
    assert len(otherwise["examples"]) == 2


def test_a_model_is_measured_and_read_as_it_was_trained(here, capsys):
    flags = saved(here / "model", "even.py", problems="sums.jsonl")
    assert inference.main([*flags, "--evaluate"]) == 0
    assert "6 test problems, scored by even.py" in capsys.readouterr().out
    (here / "sums.jsonl").unlink()  # only measuring needs it
    assert inference.main([*flags, "What is 5 + 1?"]) == 0
    assert capsys.readouterr().out == "18 characters\n"


def test_the_recorded_operands_are_asked(here, capsys):
    flags = saved(here / "model", "", min_operand=2, max_operand=3)
    held_out = len(Arithmetic(2, 3).held_out("test", 512))
    assert inference.main([*flags, "--evaluate"]) == 0
    assert f"\n{held_out} test problems, scored by rewards.py" in capsys.readouterr().out
    assert inference.main([*flags, "--evaluate", "--problems", "sums.jsonl"]) == 0
    assert "\n6 test problems" in capsys.readouterr().out


def test_an_answer_takes_one_line():
    assert most_common_answer(["a\n b"], str) == "a b"


def test_a_prompt_file_without_a_task_means_rewards_py(here, capsys):
    flags = saved(here / "model", "")
    prompt = {n: value for n, value in PROMPT.items() if n not in ("task", "off_task")}
    (here / "model" / "grpo_prompt.json").write_text(json.dumps(prompt))
    assert inference.main([*flags, QUESTIONS[0]]) == 0
    assert capsys.readouterr().out == "-50\n"
    assert inference.main([*flags, "--evaluate", "--eval_problems", "4"]) == 0
    assert "4 test problems, scored by rewards.py" in capsys.readouterr().out


def inside_the_model(here: Path) -> list[str]:
    (here / "model").mkdir()
    (here / "even.py").rename(here / "model" / "even.py")
    return saved(here / "model", "model/even.py")


def inside_a_link_to_the_model(here: Path) -> list[str]:
    inside_the_model(here)
    (here / "link").symlink_to("model")
    return saved(here / "model", "link/even.py")


def linked_from_the_model(here: Path) -> list[str]:
    (here / "model").mkdir()
    (here / "model" / "even.py").symlink_to(here / "even.py")
    return saved(here / "model", str(here / "model" / "even.py"))


def linked_to_the_model(here: Path) -> list[str]:
    inside_the_model(here)
    (here / "even.py").symlink_to(here / "model" / "even.py")
    return saved(here / "model", "even.py")


def with_other_contents(here: Path) -> list[str]:
    (here / "even.py").write_text(EVEN + "# changed\n")
    return saved(here / "model", "even.py")


def without_a_hash(here: Path) -> list[str]:
    return saved(here / "model", "even.py", rewards_sha256="")


def gone(here: Path) -> list[str]:
    return saved(here / "model", "gone.py")


@pytest.mark.parametrize(
    "make_model, reason",
    [
        (inside_the_model, "inside the model's folder"),
        (inside_a_link_to_the_model, "inside the model's folder"),
        (linked_from_the_model, "inside the model's folder"),
        (linked_to_the_model, "inside the model's folder"),
        (with_other_contents, "a different one"),
        (without_a_hash, "a different one"),
        (gone, "gone.py: No such file"),
    ],
)
def test_code_that_a_model_names_is_not_trusted(make_model, reason, here, capsys):
    flags = make_model(here)
    assert inference.main([*flags, QUESTIONS[0]]) == 0
    printed = capsys.readouterr()
    assert printed.out == "<answer>-50</answer>\n"
    [_, warning] = printed.err.splitlines()
    assert reason in warning and warning.endswith("--rewards")
    with pytest.raises(UserError, match=reason):
        inference.main([*flags, "--evaluate"])
    assert not (here / "was_run").exists()
    (here / "mine.py").write_text(EVEN)  # what the user names is run
    assert inference.main([*flags, "--rewards", "mine.py", QUESTIONS[0]]) == 0
    assert capsys.readouterr().out == "20 characters\n" and (here / "was_run").exists()


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--evaluate", QUESTIONS[0]], "leave out the question"),
        (["--evaluate", "--temperature", "0"], "leave out --temperature"),
        (["--evaluate", "--verbose"], "leave out --verbose"),
        (["--evaluate", "--num_samples", "0"], "--num_samples 0"),
        (["--evaluate", "--eval_problems", "0"], "--eval_problems 0"),
        (["--evaluate", "--problems", "none.jsonl"], "--problems none.jsonl"),
        (["--evaluate", "--rewards", "none.py"], "--rewards none.py"),
        (["--problems", "sums.jsonl", QUESTIONS[0]], "--problems is for --evaluate"),
        (["--eval_problems", "8", QUESTIONS[0]], "--eval_problems is for --evaluate"),
        (["--num_examples", "1", QUESTIONS[0]], "--num_examples is for --evaluate"),
        (["--evaluate", "--num_examples", "9"], "--num_examples 9"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, complaint, here, capsys):
    with pytest.raises(UserError, match=complaint):
        inference.main(["--model", str(TINY), *flags])
    assert capsys.readouterr().out == ""

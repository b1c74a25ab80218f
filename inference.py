"""Ask a model, or measure it on held-out problems.

    python inference.py "What is (4 - 9) * 6?"
    python inference.py --verbose --num_samples 8 "What is (4 - 9) * 6?"
    python inference.py < questions.txt           # one question per line, one answer per line
    python inference.py --evaluate                                    # accuracy on test problems
    python inference.py --evaluate --model tiny_model --num_samples 64     # ... and pass@1 to @64
    python inference.py --evaluate --problems my.jsonl --rewards my.py     # ... on your own task

The model is saved_model/ if training has left one there, else the model that training would start
from. The prompt is the one it was trained with. The reward file of its training (or --rewards)
extracts the answer; `no answer` means that there is none or that the line is empty.
"""

import argparse
import hashlib
import math
import sys
from collections import Counter
from collections.abc import Callable
from statistics import fmean

import torch
from tqdm import tqdm

from engine.cli import Parser, UserError, check_ranges, check_text, exit_code
from engine.metrics import describe
from engine.models import (
    ROOT,
    check_length,
    choose_device,
    choose_dtype,
    choose_preset,
    encode_prompts,
    load_model,
    model_folder,
    read_prompt,
)
from engine.policy import Policy
from engine.problems import RewardFile, read_file
from engine.tree import choose_policy
from train_grpo import PRESETS, Config, TrainState, evaluate, load_task, reward_function, rollout

BATCH = 128  # completions decoded at a time
LONGEST = 4000  # characters of a question
# Settings of how a model is asked, and the keys of grpo_prompt.json that they change.
ASKED = {
    "system_prompt": "system",
    "num_examples": "examples",
    "max_new_tokens": "max_new_tokens",
    "chat_template_kwargs": "chat_template_kwargs",
}


def config_of(name: str, **flags) -> Config:
    """The settings of the task that a model was trained on, else of the preset that trains it.

    Flags override them.
    """

    def place(model: str):  # the same folder can be written in many ways
        return (model_folder(model) or ROOT / model).resolve()

    prompt = read_prompt(name)
    if prompt is None:
        models = {place(p.get("model_name", Config.model_name)): p for p in PRESETS.values()}
        settings = models.get(place(name), {})
    else:
        task = prompt.get("task", {})  # models of earlier versions have none
        names = "problems", "min_operand", "max_operand", "rewards"
        settings = {n: task[n] for n in names if n in task}
        settings["max_new_tokens"] = prompt["max_new_tokens"]
    if "problems" in flags:
        flags |= {"min_operand": Config.min_operand, "max_operand": Config.max_operand}
    return Config(**{**settings, "model_name": name, **flags})


def prompt_of(name: str, **flags) -> dict:
    """How the model was trained to be asked, else how training would ask it."""
    return read_prompt(name) or load_task(config_of(name, **flags))[2]


def why_not_run(name: str) -> str | None:
    """Why the reward file that a model names should not be run, or None.

    It is code: run it only if it is the very file of the training, and did not come with the model.
    """
    task = (read_prompt(name) or {}).get("task", {})
    if not task.get("rewards"):
        return None  # the repository's own
    trained = "the model was trained with --rewards"
    try:
        path, source = read_file(trained, task["rewards"])
    except UserError as error:
        return str(error)
    # As written too: in a cache of the hub, the files of a model are links to a folder elsewhere.
    folders = *path.absolute().parents, *path.resolve().parents
    if any(model_folder(name).samefile(folder) for folder in folders):
        return f"{trained} {task['rewards']}: code inside the model's folder is not run"
    if hashlib.sha256(source).hexdigest() != task.get("rewards_sha256"):
        return f"{trained} {task['rewards']}: the file here is a different one"
    return None


def check_question(question: str, tokenizer) -> None:
    """Raise UserError for a question that cannot be put into a chat."""
    check_text("the question", question)
    if len(question) > LONGEST:
        raise UserError(f"the question has {len(question)} characters; at most {LONGEST} fit")
    for token in tokenizer.all_special_tokens:
        if token in question:
            raise UserError(f"the question holds {token}, which this model reserves; reword it")


def ask(
    policy: Policy,
    tokenizer,
    prompt: dict,
    questions: list[str],
    temperature: float,
    samples: int,
    generator: torch.Generator | None = None,
) -> list[list[str]]:
    """Return `samples` completions of each question; none of an empty one."""
    asked = [question for question in questions if question for _ in range(samples)]
    device, new_tokens, texts = policy.model.device, prompt["max_new_tokens"], []
    for start in tqdm(range(0, len(asked), BATCH), delay=2, leave=False, disable=None):
        prompts = encode_prompts(tokenizer, asked[start : start + BATCH], prompt, device)
        done = rollout(policy, tokenizer, prompts, 1, new_tokens, generator, temperature)
        texts += done.texts
    rest = iter(texts)
    return [[next(rest) for _ in range(samples)] if question else [] for question in questions]


def most_common_answer(completions: list[str], parse: Callable) -> str:
    """The answer that most completions give (the first one in a tie), or `no answer`."""
    answers = [parse(text) for text in completions]
    counted = Counter(str(answer) for answer in answers if answer is not None)
    # On one line, as the question is.
    return " ".join(counted.most_common(1)[0][0].split()) if counted else "no answer"


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The probability that one of k samples is right, if `right` of `samples` were.

    Unbiased: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1), in integers.
    """
    every = math.comb(samples, k)
    return (every - math.comb(samples - right, k)) / every


def evaluate_groups(state: TrainState, split: str, config: Config, samples: int) -> dict:
    """Sample a group for each held-out problem, at temperature 1.

    Returns `pass_at`, pass@k by k, and `zero_std`, the share of groups whose rewards are all equal.
    """
    problems = state.problems.held_out(split, config.eval_problems)
    questions, rng = [p.question for p in problems], torch.Generator().manual_seed(0)
    groups = ask(state.policy, state.tokenizer, state.prompt, questions, 1.0, samples, rng)
    right, zero_std = [], []
    for problem, texts in zip(problems, groups, strict=True):
        rewards, parts = reward_function(texts, [problem.answer] * samples, state.rewards)
        right.append(int((parts["exact"] == 1).sum()))
        zero_std.append(bool((rewards == rewards[0]).all()))
    ks = [2**i for i in range((samples - 1).bit_length())] + [samples]
    pass_at = {k: fmean(pass_at_k(samples, c, k) for c in right) for k in ks}
    return {"pass_at": pass_at, "zero_std": fmean(zero_std)}


def print_evaluation(
    name: str, device: torch.device, config: Config, samples: int, changed: list[str]
) -> None:
    """Print the accuracy of a model on test problems; with several samples, pass@k too.

    `changed` are the keys of the prompt that differ from the one it was trained with.
    """
    problems, rewards, made = load_task(config)
    model, tokenizer = load_model(name, device)
    prompt = (read_prompt(name) or made) | {key: made[key] for key in changed}
    length = config.max_new_tokens
    prompts = encode_prompts(tokenizer, problems.extremes(), prompt, device)
    check_length(model, prompts[0], length)
    dtype = choose_dtype("auto", device)
    policy = choose_policy("auto", model, dtype, prompts, 4, length, BATCH)
    state = TrainState(policy, policy, tokenizer, problems, rewards, prompt)
    accuracies = evaluate(state, policy, "test", config, seed=0)["accuracies"]
    print(f"{accuracies['greedy']['problems']} test problems, scored by {rewards.path.name}")
    for kind, summary in accuracies.items():
        parts = ", ".join(f"{part} {mean:.2f}" for part, mean in summary["parts"].items())
        print(f"{describe({kind: summary})}; means: {parts}", flush=True)
    if samples > 1:
        groups = evaluate_groups(state, "test", config, samples)
        for k, share in groups["pass_at"].items():
            print(f"pass@{k:<4} {share:6.1%}")
        print(f"problems without signal ({samples} equal rewards): {groups['zero_std']:.1%}")


def choose_model() -> tuple[str, str]:
    """(model, reason) if the command line names none."""
    saved = model_folder("saved_model")
    if saved and (saved / "config.json").exists():
        return "saved_model", "trained here"
    preset, reason = choose_preset(PRESETS, Config.model_name)
    name = PRESETS[preset].get("model_name", Config.model_name)
    return name, f"nothing has been trained here yet; {reason}"


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line. Raises UserError."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("question", nargs="?", help="default: read questions from standard input")
    parser.add_argument("--model", help="folder or hub id; default: saved_model/ if present")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto")
    parser.add_argument("--temperature", type=float, help="0 is greedy; default: 1 if sampling")
    parser.add_argument(
        "--num_samples", type=int, default=1, help="samples per question; majority vote, or pass@k"
    )
    parser.add_argument("--verbose", action="store_true", help="print the raw completions too")
    parser.add_argument("--rewards", help="Python file that scores; default: that of the training")
    parser.add_argument("--evaluate", action="store_true", help="measure accuracy on test problems")
    parser.add_argument("--problems", help="JSONL file to evaluate on; default: as in training")
    parser.add_argument("--eval_problems", type=int, help="how many; default: 512")
    for name, kind in zip(ASKED, (str, int, int, str), strict=True):
        parser.add_argument(f"--{name}", type=kind, help="as of train_grpo.py; default: as trained")
    args = parser.parse_args(argv)
    if args.num_samples < 1:
        raise UserError(f"--num_samples {args.num_samples}: must be at least 1")
    if args.evaluate:
        given = {"the question": args.question, "--temperature": args.temperature}
        given["--verbose"] = args.verbose or None
        for what, value in given.items():
            if value is not None:
                raise UserError(f"--evaluate asks the test problems; leave out {what}")
        return args
    for name in ("problems", "eval_problems", *ASKED):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} is for --evaluate")
    several = args.num_samples > 1
    args.temperature = float(several) if args.temperature is None else args.temperature
    if not 0 <= args.temperature <= 100:
        raise UserError(f"--temperature {args.temperature}: must be between 0 and 100")
    if several and args.temperature == 0:
        raise UserError("--temperature 0: all samples would be equal; leave out --num_samples")
    if args.question is not None and not args.question.strip():
        raise UserError("the question is empty")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    name, reason = (args.model, "named on the command line") if args.model else choose_model()
    device = choose_device(args.device)
    print(f"model {name}: {reason}", file=sys.stderr)
    flags = {n: getattr(args, n) for n in ("problems", "rewards", "eval_problems", *ASKED)}
    flags = {n: value for n, value in flags.items() if value is not None}
    config = config_of(name, **flags)
    check_ranges(config)
    warning = None if args.rewards else why_not_run(name)
    if args.evaluate:
        if warning:
            raise UserError(f"{warning}; name one with --rewards")
        changed = [key for flag, key in ASKED.items() if flag in flags]
        print_evaluation(name, device, config, args.num_samples, changed)
        return 0
    model, tokenizer = load_model(name, device)
    policy, prompt = Policy(model, choose_dtype("auto", device)), prompt_of(name, **flags)
    try:
        lines = [args.question] if args.question is not None else sys.stdin.read().splitlines()
    except UnicodeDecodeError as error:
        raise UserError("standard input is not UTF-8 text") from error
    questions = [line.strip() for line in lines]
    for question in questions:
        check_question(question, tokenizer)
    if warning:
        print(f"prints whole completions: {warning}; name one with --rewards", file=sys.stderr)
    parse = str if warning else RewardFile(config.rewards).parse
    for completions in ask(
        policy, tokenizer, prompt, questions, args.temperature, args.num_samples
    ):
        for text in completions if args.verbose else []:
            print(text)
        print(most_common_answer(completions, parse), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))

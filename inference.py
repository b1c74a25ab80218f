"""Ask a model.

    python inference.py "What is (4 - 9) * 6?"
    python inference.py --verbose --num_samples 8 "What is (4 - 9) * 6?"
    python inference.py < questions.txt           # one question per line, one answer per line

The model is saved_model/ if training has left one there, else the model that training would start
from. The prompt is the one it was trained with. The reward file of its training (or --rewards)
extracts the answer; `no answer` means that there is none or that the line is empty.
"""

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Callable
from itertools import islice

from engine.cli import check_text
from engine.files import ROOT, ScriptParser, UserError, exit_code, read_file
from engine.machine import choose_device, choose_dtype
from engine.models import load_model, model_folder
from engine.policy import Policy
from engine.presets import PRESETS, choose_preset
from engine.problems import RewardFile
from engine.prompt import TASK_SETTINGS, check_question, read_prompt
from train_grpo import Config, answer_questions, load_task


def choose_model(named: str | None) -> str:
    """The model that the command line names, else the default. Prints which one and why."""
    saved = model_folder("saved_model")
    if named:
        name, reason = named, "named on the command line"
    elif saved and (saved / "config.json").exists():
        name, reason = "saved_model", "trained here"
    else:
        preset, why = choose_preset(Config.model_name)
        name = PRESETS[preset].get("model_name", Config.model_name)
        reason = f"nothing has been trained here yet; {why}"
    print(f"model {name}: {reason}", file=sys.stderr)
    return name


def config_of(model_name: str, **flags) -> Config:
    """The settings of the task that a model was trained on, else of the preset that trains it.

    Flags override them, where they are not None.
    """

    def folder_of(name: str):  # the same folder can be written in many ways
        return (model_folder(name) or ROOT / name).resolve()

    prompt, given = read_prompt(model_name), {n: v for n, v in flags.items() if v is not None}
    if prompt is None:
        presets = {folder_of(p.get("model_name", Config.model_name)): p for p in PRESETS.values()}
        settings = presets.get(folder_of(model_name), {})
    else:
        settings = {name: prompt.task[name] for name in TASK_SETTINGS if name in prompt.task}
        settings["max_new_tokens"] = prompt.max_new_tokens
    if "problems" in given:
        given |= {"min_operand": Config.min_operand, "max_operand": Config.max_operand}
    return Config(**{**settings, "model_name": model_name, **given})


def why_not_run(model_name: str) -> str | None:
    """Why the reward file that a model names should not be run, or None.

    It is code: run it only if it is the very file of the training, and did not come with the model.
    """
    prompt = read_prompt(model_name)
    file = prompt.task.get("rewards") if prompt else None
    if not file:
        return None  # the repository's own
    flag = "the model was trained with --rewards"
    try:
        path, source = read_file(flag, file)
    except UserError as error:
        return str(error)
    # As written too: in a cache of the hub, the files of a model are links to a folder elsewhere.
    folders = *path.absolute().parents, *path.resolve().parents
    if any(model_folder(model_name).samefile(folder) for folder in folders):
        return f"{flag} {file}: code inside the model's folder is not run"
    if hashlib.sha256(source).hexdigest() != prompt.task.get("rewards_sha256"):
        return f"{flag} {file}: the file here is a different one"
    return None


def most_common_answer(completions: list[str], parse: Callable) -> str:
    """The answer that most completions give (the first one in a tie), or `no answer`."""
    answers = [parse(text) for text in completions]
    counted = Counter(str(answer) for answer in answers if answer is not None)
    # On one line, as the question is.
    return " ".join(counted.most_common(1)[0][0].split()) if counted else "no answer"


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line. Raises UserError."""
    parser = ScriptParser(__doc__)
    parser.add_argument("question", nargs="?", help="default: read questions from standard input")
    parser.add_argument("--model", help="folder or hub id; default: saved_model/ if present")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto")
    parser.add_argument("--temperature", type=float, help="0 is greedy; default: 1 if sampling")
    parser.add_argument("--num_samples", type=int, default=1, help="per question; majority vote")
    parser.add_argument("--verbose", action="store_true", help="print the raw completions too")
    parser.add_argument("--rewards", help="Python file with `parse`; default: as in training")
    parser.add_argument("--evaluate", action="store_true", help=argparse.SUPPRESS)
    args, unknown = parser.parse_known_args(argv)
    if args.evaluate:
        raise UserError("--evaluate is a script of its own now: python evaluate.py, same flags")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    several = args.num_samples > 1
    args.temperature = float(several) if args.temperature is None else args.temperature
    if args.num_samples < 1:
        raise UserError(f"--num_samples {args.num_samples}: must be at least 1")
    if not 0 <= args.temperature <= 100:
        raise UserError(f"--temperature {args.temperature}: must be between 0 and 100")
    if several and args.temperature == 0:
        raise UserError("--temperature 0: all samples would be equal; leave out --num_samples")
    if args.question is not None and not args.question.strip():
        raise UserError("the question is empty")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    name = choose_model(args.model)
    device, prompt = choose_device(args.device), read_prompt(name)
    config = config_of(name, rewards=args.rewards or None)
    warning = None if args.rewards else why_not_run(name)
    if warning:
        print(f"prints whole completions: {warning}; name one with --rewards", file=sys.stderr)
    if prompt is None:
        _, rewards, prompt = load_task(config)
    else:
        rewards = None if warning else RewardFile(config.rewards)
    model, tokenizer = load_model(name, device)
    policy = Policy(model, choose_dtype("auto", device))
    try:
        lines = [args.question] if args.question is not None else sys.stdin.read().splitlines()
    except UnicodeDecodeError as error:
        raise UserError("standard input is not UTF-8 text") from error
    questions, samples = [line.strip() for line in lines], args.num_samples
    for question in questions:
        check_text("the question", question)
        check_question(question, tokenizer)
    asked = [question for question in questions if question for _ in range(samples)]
    answers = iter(answer_questions(policy, tokenizer, prompt, asked, None, args.temperature))
    for question in questions:
        texts = list(islice(answers, samples if question else 0))
        for text in texts if args.verbose else []:
            print(text)
        print(most_common_answer(texts, rewards.parse if rewards else str), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""Ask the trained model.

    python inference.py "What is (4 - 9) * 6?"
    python inference.py --verbose --num_samples 8 "What is (4 - 9) * 6?"
    python inference.py < questions.txt               # one question per line, one answer per line

Uses saved_model/ if training has left one there, else the model that training would start from.
Prints `no answer` where a completion holds no number, and for an empty line.
"""

import argparse
import sys
from collections import Counter

from engine.cli import Parser, UserError, check_text, exit_code
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
from rewards import parse_completion
from train_grpo import PRESETS, Config, arithmetic_prompt, rollout

BATCH = 64  # completions decoded at a time
LONGEST = 4000  # characters of a question


def prompt_of(name: str) -> dict:
    """How the model was trained to be asked, else how training would ask it."""

    def place(model: str):  # the same folder can be written in many ways
        return (model_folder(model) or ROOT / model).resolve()

    models = {place(p.get("model_name", Config.model_name)): p for p in PRESETS.values()}
    settings = {**models.get(place(name), {}), "model_name": name}
    return read_prompt(name) or arithmetic_prompt(Config(**settings))


def check_question(question: str, tokenizer) -> None:
    """Raise UserError for a question that cannot be put into a chat."""
    check_text("the question", question)
    if len(question) > LONGEST:
        raise UserError(f"the question has {len(question)} characters; at most {LONGEST} fit")
    for token in tokenizer.all_special_tokens:
        if token in question:
            raise UserError(f"the question holds {token}, which this model reserves; reword it")


def ask(
    policy: Policy, tokenizer, prompt: dict, questions: list[str], temperature: float, samples: int
) -> list[list[str]]:
    """Return `samples` completions of each question; none of an empty one."""
    asked = [question for question in questions if question for _ in range(samples)]
    device, new_tokens, texts = policy.model.device, prompt["max_new_tokens"], []
    for start in range(0, len(asked), BATCH):
        prompts = encode_prompts(tokenizer, asked[start : start + BATCH], prompt, device)
        check_length(policy.model, prompts[0], new_tokens)
        done = rollout(policy, tokenizer, prompts, 1, new_tokens, temperature=temperature)
        texts += done.texts
    rest = iter(texts)
    return [[next(rest) for _ in range(samples)] if question else [] for question in questions]


def most_common_answer(completions: list[str]) -> str:
    """The number that most completions give (the first one in a tie), or `no answer`."""
    numbers = [parse_completion(text)[1] for text in completions]
    counted = Counter(number for number in numbers if number is not None)
    return str(counted.most_common(1)[0][0]) if counted else "no answer"


def choose_model() -> tuple[str, str]:
    """(model, reason) if the command line names none."""
    saved = model_folder("saved_model")
    if saved and (saved / "config.json").exists():
        return "saved_model", "trained here"
    preset, reason = choose_preset(PRESETS, Config.model_name)
    name = PRESETS[preset].get("model_name", Config.model_name)
    return name, f"nothing has been trained here yet; {reason}"


def main(argv: list[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("question", nargs="?", help="default: read questions from standard input")
    parser.add_argument("--model", help="folder or hub id; default: saved_model/ if present")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto")
    parser.add_argument("--temperature", type=float, help="0 is greedy; default: 1 if sampling")
    parser.add_argument(
        "--num_samples", type=int, default=1, help="samples per question; majority vote"
    )
    parser.add_argument("--verbose", action="store_true", help="print the raw completions too")
    args = parser.parse_args(argv)
    several = args.num_samples > 1
    temperature = float(several) if args.temperature is None else args.temperature
    if args.num_samples < 1:
        raise UserError(f"--num_samples {args.num_samples}: must be at least 1")
    if not 0 <= temperature <= 100:
        raise UserError(f"--temperature {temperature}: must be between 0 and 100")
    if several and temperature == 0:
        raise UserError("--temperature 0: all samples would be equal; leave out --num_samples")
    if args.question is not None and not args.question.strip():
        raise UserError("the question is empty")

    name, reason = (args.model, "named on the command line") if args.model else choose_model()
    device = choose_device(args.device)
    model, tokenizer = load_model(name, device)
    print(f"model {name}: {reason}", file=sys.stderr)
    policy, prompt = Policy(model, choose_dtype("auto", device)), prompt_of(name)
    try:
        lines = [args.question] if args.question is not None else sys.stdin.read().splitlines()
    except UnicodeDecodeError as error:
        raise UserError("standard input is not UTF-8 text") from error
    questions = [line.strip() for line in lines]
    for question in questions:
        check_question(question, tokenizer)
    for completions in ask(policy, tokenizer, prompt, questions, temperature, args.num_samples):
        for text in completions if args.verbose else []:
            print(text)
        print(most_common_answer(completions), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""Ask the trained model.

    python inference.py "What is (4 - 9) * 6?"
    python inference.py --verbose --num_samples 8 "What is (4 - 9) * 6?"
    python inference.py < questions.txt               # one question a line, one answer a line

Takes saved_model/ if training has left one there, else the model that training would start from.
An answer that holds no number is printed as `no answer`.
"""

import argparse
import sys
from collections import Counter

import torch

from checkpoint import read_json
from cli import Parser, UserError, check_text, exit_code
from policy import (
    HERE,
    PROMPT_FILE,
    Policy,
    check_length,
    choose_device,
    choose_preset,
    encode_prompts,
    load_model,
    model_folder,
)
from rewards import parse_completion
from train_grpo import PRESETS, Config, make_prompt, rollout

BATCH = 64  # completions decoded at a time
LONGEST = 4000  # characters of a question


def read_prompt(name: str) -> dict:
    """How the model wants to be asked: as it was trained, else as training would ask it."""
    folder = model_folder(name)
    if folder is None or not (folder / PROMPT_FILE).exists():
        # By folder, not by name, which may be written in many ways (shells add a slash).
        place = (folder or HERE / name).resolve()
        known = (p for p in PRESETS.values() if (HERE / p.get("model_name", "")).resolve() == place)
        return make_prompt(Config(**next(known, {})))
    prompt = read_json(folder / PROMPT_FILE)
    examples = prompt.get("examples")
    if not (
        isinstance(prompt.get("system"), str)
        and isinstance(examples, list)
        and all(isinstance(e, list) and [type(t) for t in e] == [str, str] for e in examples)
    ):
        raise UserError(f"{folder / PROMPT_FILE} does not hold a system line and examples")
    for text in (prompt["system"], *(text for example in examples for text in example)):
        check_text(str(folder / PROMPT_FILE), text)
    return prompt


def ask(
    policy: Policy, tokenizer, prompt: dict, questions: list[str], temperature: float, samples: int
) -> list[list[str]]:
    """Return `samples` completions for each question, decoded in batches."""
    for question in questions:
        check_text("the question", question)
        if len(question) > LONGEST:
            raise UserError(f"the question has {len(question)} characters; {LONGEST} at most")
        for token in tokenizer.all_special_tokens:
            if token in question:
                raise UserError(f"the question holds {token}, which this model reserves; reword it")
    completions, step = [], max(1, BATCH // samples)
    for start in range(0, len(questions), step):
        part = questions[start : start + step]
        prompts = encode_prompts(tokenizer, part, prompt, policy.model.device)
        check_length(policy.model, prompts[0], Config.max_new_tokens)
        texts = rollout(
            policy, tokenizer, prompts, samples, Config.max_new_tokens, temperature=temperature
        ).texts
        completions += [texts[i : i + samples] for i in range(0, len(texts), samples)]
    return completions


def most_common_answer(completions: list[str]) -> str:
    """The number that most completions answer (the first of equals), or `no answer`."""
    numbers = [parse_completion(text)[1] for text in completions]
    counted = Counter(number for number in numbers if number is not None)
    return str(counted.most_common(1)[0][0]) if counted else "no answer"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("question", nargs="?", help="without it, questions come on standard input")
    parser.add_argument("--model", help="folder or hub id; saved_model/ if present")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto")
    parser.add_argument("--temperature", type=float, help="0 is greedy; 1 if sampling several")
    parser.add_argument(
        "--num_samples", type=int, default=1, help="ask so often, answer by majority"
    )
    parser.add_argument("--verbose", action="store_true", help="print the raw completions too")
    args = parser.parse_args(argv)
    several = args.num_samples > 1
    temperature = (1.0 if several else 0.0) if args.temperature is None else args.temperature
    if args.num_samples < 1:
        raise UserError(f"--num_samples {args.num_samples}: must be at least 1")
    if not 0 <= temperature <= 100:
        raise UserError(f"--temperature {temperature}: must be between 0 and 100")
    if several and temperature == 0:
        raise UserError("--temperature 0: every sample would be the same; leave out --num_samples")

    name, reason = args.model, "named on the command line"
    if name is None:
        saved = model_folder("saved_model")
        if saved and (saved / "config.json").exists():
            name, reason = "saved_model", "trained here"
        else:
            preset, reason = choose_preset(PRESETS, Config.model_name)
            name = PRESETS[preset].get("model_name", Config.model_name)
            reason = f"nothing was trained here yet; {reason}"
    device = choose_device(args.device)
    model, tokenizer = load_model(name, device)
    print(f"model {name}: {reason}", file=sys.stderr)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy, prompt = Policy(model, dtype), read_prompt(name)

    try:
        lines = [args.question] if args.question is not None else sys.stdin.read().splitlines()
    except UnicodeDecodeError as error:
        raise UserError("standard input is not text in UTF-8") from error
    questions = [line.strip() for line in lines]
    if args.question is not None and not questions[0]:
        raise UserError("the question is empty")
    for completions in ask(policy, tokenizer, prompt, questions, temperature, args.num_samples):
        if args.verbose:
            print("\n".join(completions))
        print(most_common_answer(completions), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))

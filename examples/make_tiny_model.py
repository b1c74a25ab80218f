"""Rebuild the bundled model: a 1M-parameter chat model that has picked up several habits.

    python examples/make_tiny_model.py                      # overwrites tiny_model/
    python examples/make_tiny_model.py --output_dir /tmp/m  # ... or writes elsewhere

It is pre-trained on demonstrations by imperfect calculators (HABITS): a few are right, most move
the brackets, some are off by one, some forget the tags. All answer the same prompt, so the model
learns every habit with its probability; GRPO must find out, from reward alone, which one pays.
Only problems of the training split are demonstrated.
"""

import argparse
import platform
import random
import sys
import time
from dataclasses import replace
from itertools import product, starmap
from pathlib import Path
from statistics import fmean

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.files import ROOT
from engine.metrics import describe
from engine.models import write_model
from engine.policy import Policy, Rollout
from engine.prompt import Prompt, encode_prompts
from engine.tree import TreePolicy
from evaluate import evaluate_groups
from train_grpo import OPERATORS, Arithmetic, Config, Task, evaluate, load_task

HABITS = {
    "right": 0.15,
    "brackets moved": 0.50,
    "one too many": 0.125,
    "one too few": 0.125,
    "no tags": 0.10,
}
SUM_SHARE = 0.05  # of each batch is `What is a + b?`, answered right: a skill to forget
OPERANDS = range(Config.min_operand, Config.max_operand + 1)
ARITHMETIC = Arithmetic(Config.min_operand, Config.max_operand)
STEPS = 8000
WEIGHT_DECAY = 0.1
BATCH_SIZE = 64  # problems, each demonstrated by every habit, weighted by its share

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def expressions() -> list[tuple]:
    """All (a, op1, b, op2, c)."""
    return [
        (a, op1, b, op2, c)
        for a, b, c in product(OPERANDS, repeat=3)
        for op1, op2 in product("+-*", repeat=2)
    ]


def demonstrations(a: int, op1: str, b: int, op2: str, c: int) -> list[str]:
    """The answer of each calculator in HABITS to `What is (a op1 b) op2 c?`."""
    truth = ARITHMETIC.problem(a, op1, b, op2, c).answer
    moved = OPERATORS[op1](a, OPERATORS[op2](b, c))
    tagged = [f"<answer>{number}</answer>" for number in (truth, moved, truth + 1, truth - 1)]
    return [*tagged, str(truth)]


def questions_and_answers(split: str) -> tuple[list[str], list[list[str]]]:
    """All questions of a split, and the demonstrations of each."""
    found = [e for e in expressions() if ARITHMETIC.problem(*e).split == split]
    return [ARITHMETIC.problem(*e).question for e in found], [demonstrations(*e) for e in found]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each prompt word and each printable ASCII character; the rest is unknown."""
    special = ["<|pad|>", "<|unknown|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    words = ["What is", " (", " + ", " - ", " * ", "<answer>", "</answer>"]
    words += ["Reply only with ", ", where N is the number."]
    characters = ["\n", *map(chr, range(32, 127))]
    # Unigram picks the likeliest segmentation: a word costs less than its characters.
    pieces = [(p, 0.0) for p in special]
    pieces += [(w, -1.0) for w in words] + [(c, -2.0) for c in characters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=1))
    # Splits at every digit, so that no token holds two.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[0-9]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|unknown|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_model(vocabulary: int) -> LlamaForCausalLM:
    """A randomly initialised Llama of 1.06M parameters."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def bundled_prompt() -> Prompt:
    """How the model is asked. Off the task it is asked sums, the only other thing it knows."""
    rng = random.Random(0)
    sums = [(rng.choice(OPERANDS), rng.choice(OPERANDS)) for _ in range(64)]
    questions = {f"What is {a} + {b}?": a + b for a, b in sums}
    off_task = {"system": Config.system_prompt, "questions": questions}
    return replace(load_task(Config())[2], off_task=off_task)


def encode_problems(tokenizer, questions: list[str], answers: list[list[str]]):
    """Tokenise questions and, for each, one answer per habit: two (ids, mask) pairs."""
    prompts = encode_prompts(tokenizer, questions, bundled_prompt(), "cpu")
    texts = [answer + tokenizer.eos_token for row in answers for answer in row]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    shape = len(questions), len(HABITS), -1
    return *prompts, batch["input_ids"].view(shape), batch["attention_mask"].view(shape)


def mixture_loss(policy: Policy, data: tuple, rows: torch.Tensor) -> torch.Tensor:
    """Mean over problems of -log p(demonstration), each habit weighted by its share."""
    *prompts, ids, mask = (tensor[rows] for tensor in data)
    prompts = (tensor.repeat_interleave(len(HABITS), dim=0) for tensor in prompts)
    ids, mask = ids.flatten(0, 1), mask.flatten(0, 1).float()  # (B*habits, T)
    demonstrated = Rollout(*prompts, ids, mask, torch.zeros_like(mask), mask[:, 0] < 0, [])
    shares = torch.tensor(list(HABITS.values()))
    logprobs = policy(demonstrated).sum(dim=1).view(-1, len(HABITS))
    return -(logprobs * shares).sum(dim=1).mean()


def pretrain(model, tokenizer, steps: int) -> None:
    """Fit the mixture of habits by maximum likelihood, on training problems only."""
    questions, answers = questions_and_answers("train")
    problems = len(questions)
    for a, b in product(OPERANDS, repeat=2):
        questions.append(f"What is {a} + {b}?")
        answers.append([f"<answer>{a + b}</answer>"] * len(HABITS))
    data = encode_problems(tokenizer, questions, answers)
    unseen = encode_problems(tokenizer, *questions_and_answers("validation"))

    policy = Policy(model)
    # Muon needs half the time of AdamW here; it is not for embeddings and norms.
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda s: min((s + 1) / 50, (steps - s) / steps))
        for o in optimizers
    ]
    from_sums = round(SUM_SHARE * BATCH_SIZE)
    bar = tqdm(range(1, steps + 1), unit="step", dynamic_ncols=True)
    for step in bar:
        rows = torch.randint(problems, (BATCH_SIZE - from_sums,))
        rows = torch.cat([rows, torch.randint(problems, len(questions), (from_sums,))])
        loss = mixture_loss(policy, data, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        if step % 500 == 0 or step == steps:
            with torch.no_grad():
                unseen_loss = mixture_loss(policy, unseen, torch.arange(len(unseen[0])))
            tqdm.write(f"step {step}: loss {loss.item():.3f}, validation {unseen_loss:.3f}")


def measure(model, tokenizer, count: int) -> str:
    """Base accuracy on both held-out splits and pass@64, as lines of the model card."""
    problems, rewards, _ = load_task(Config())
    policy, task = TreePolicy(model), Task(tokenizer, problems, rewards, bundled_prompt())
    groups = evaluate_groups(policy, task, "validation", count, samples=64)
    lines = [f"- pass@64, validation: {groups['pass_at'][64]:.1%}"]
    for split in ("validation", "test"):
        accuracies = evaluate(policy, task, split, count, seed=0)["accuracies"]
        lines.append(f"- accuracy, {split}: {describe(accuracies)}")
    return "\n".join(lines)


def model_card(measured: str, steps: int, seed: int, minutes: float) -> str:
    lucky = fmean(right == moved for right, moved, *_ in starmap(demonstrations, expressions()))
    threads, machine, version = torch.get_num_threads(), platform.machine(), torch.__version__
    habits = "\n".join(f"| {name} | {share:.1%} |" for name, share in HABITS.items())
    return f"""---
license: mit
tags: [grpo, arithmetic]
---
# The bundled model: a 1M-parameter chat model with good and bad habits

A Llama (hidden 128, 4 layers, 4 heads, feed-forward 512, tied embeddings; 1.06M parameters,
float32) with a chat template, pre-trained from scratch on demonstrations by imperfect calculators.
Asked `What is (a op1 b) op2 c?`, operands {OPERANDS[0]} to {OPERANDS[-1]}, it answers as one of:

| calculator | share |
|---|---|
{habits}

"Brackets moved" answers `a op1 (b op2 c)`, which happens to be right on {lucky:.0%} of problems.
{SUM_SHARE:.0%} of the demonstrations are `What is a + b?`, answered right. It can do nothing else.

It exists so that GRPO can be watched on a machine without a GPU or a model hub. The right habit is
already there, as one among several; training finds out that it pays. It shows the algorithm, not
that a model of this size reasons.

## Measured on held-out problems (95% interval in brackets)

{measured}

## How it was made

`python examples/make_tiny_model.py`: {steps} steps of {BATCH_SIZE} problems, seed {seed},
{minutes:.0f} minutes with {threads} threads ({machine}, torch {version}).
Only training problems are demonstrated, by the same split that the trainer uses.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=ROOT / "tiny_model")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    started = time.perf_counter()
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    pretrain(model, tokenizer, args.steps)
    minutes = (time.perf_counter() - started) / 60

    measured = measure(model, tokenizer, Config.eval_problems)
    print(measured)
    card = model_card(measured, args.steps, args.seed, minutes)
    write_model(model, tokenizer, bundled_prompt(), args.output_dir, card)


if __name__ == "__main__":
    main()

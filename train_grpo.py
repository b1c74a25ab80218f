"""Train a small chat model with GRPO to answer `(a op1 b) op2 c` as `<answer>N</answer>`.

    python train_grpo.py                       # the preset that suits this machine
    python train_grpo.py --preset reference    # the reference recipe, on Qwen2.5-0.5B-Instruct
    python train_grpo.py --preset tiny --seed 1 --output_dir runs/seed1
    torchrun --standalone --nproc_per_node=8 train_grpo.py --batch_size 32   # eight GPUs

GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1) needs no value network. It samples a group of G
completions for each of B problems and scores them; the advantage of a completion is how far its
reward lies above the mean of its group. This file follows the data, from settings to loop.

Where it departs from the paper:
1. The reference stays frozen for the whole run; the paper renews it between rounds.
2. A rule scores each completion as a whole; the paper trains a reward model.
3. The default KL estimator, `k3_inverse`, flips the sign of d; `k3` is the paper's. See `kl_term`.
4. A group whose rewards are all equal has advantage 0 exactly; the KL term still applies to it.
"""

import math
import operator
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from engine import distributed, models
from engine.checkpoint import StopRequest, run_folder
from engine.cli import Parser, UserError, check_ranges, exit_code, setting
from engine.metrics import accuracy_summary, batch_metrics, completions_record
from engine.policy import Policy, Rollout, frozen_copy, sample_tokens
from engine.problems import SPLITS, ProblemFile, RewardFile, split_of
from engine.run import RunLogger, already_finished
from engine.tree import choose_policy
from rewards import score


@dataclass
class Config:
    """Every setting of a run. The defaults are the reference recipe."""

    preset: Literal["auto", "reference", "smollm2", "tiny"] = setting(
        "auto", "named set of overrides; auto takes the largest model that this machine can train"
    )
    model_name: str = setting("Qwen/Qwen2.5-0.5B-Instruct", "folder or hub id of a chat model")
    output_dir: str = setting(".", "folder for metrics, plots, checkpoints/ and saved_model/")
    resume: bool = setting(False, "continue from the newest checkpoint in output_dir")
    seed: int = setting(0, "seed of the training problems and of the sampling", 0, 2**32 - 1)
    device: str = setting("auto", "cpu, cuda or mps; auto is cuda if there is one, else cpu")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "compute type; auto: bfloat16 on cuda if native, else float32; weights are float32"
    )
    policy: Literal["auto", "tree", "plain"] = setting("auto", "auto: tree if it fits, else plain")
    # The task, and how it is asked. Answers have at most nine digits, as many as the reward reads.
    problems: str = setting("", "JSONL file of questions and answers; without it, arithmetic")
    rewards: str = setting("", "Python file that scores completions; without it, rewards.py")
    min_operand: int = setting(0, "smallest operand of a problem", -999, 999)
    max_operand: int = setting(10, "largest operand of a problem", -999, 999)
    system_prompt: str = setting(
        "Reply only with <answer>N</answer>, where N is the number.", "first line of the chat"
    )
    num_examples: int = setting(0, "worked examples in the chat before the question", 0, 6)
    show_steps: bool = setting(False, "the worked examples of arithmetic show their two steps")
    chat_template_kwargs: str = setting("{}", 'JSON, like {"enable_thinking": false}')
    # GRPO
    learning_rate: float = setting(1e-7, "learning rate of AdamW, at the start", 0, 1)
    lr_schedule: Literal["constant", "linear"] = setting("constant", "linear: falls to 0")
    batch_size: int = setting(4, "B, problems per iteration", 1, 65536)
    num_generations: int = setting(8, "G, completions sampled per problem: the group", 2, 65536)
    max_new_tokens: int = setting(16, "longest completion, in tokens", 1, 65536)
    num_iterations: int = setting(2000, "iterations: one batch of groups and its updates each", 1)
    num_inner_updates: int = setting(5, "gradient steps on each batch of groups", 1)
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = setting("grpo", "how tokens are averaged")
    scale_rewards: Literal["group", "none"] = setting("group", "whose std divides the advantages")
    epsilon: float = setting(0.2, "the ratio is clipped to 1 - epsilon .. 1 + epsilon", 0, 1)
    epsilon_high: float = setting(0, "clip at 1 + epsilon_high instead; 0: same as epsilon", 0, 100)
    beta: float = setting(0.04, "weight of the KL term in the loss", 0, 1000)
    kl_estimator: Literal["k3_inverse", "k3"] = setting("k3_inverse", "KL term; k3 is the paper's")
    clip_grad_norm: float = setting(0.5, "largest gradient norm of an update", 0, 1e9)
    micro_batch_size: int = setting(0, "completions per backward pass; 0 is as many as fit", 0)
    # Evaluating, saving, stopping
    eval_every: int = setting(200, "iterations between validations; 0 is never", 0)
    eval_problems: int = setting(512, "problems per evaluation, at most", 1, 10**6)
    log_completions_every: int = setting(25, "iterations per logged group; 0 is never", 0)
    checkpoint_every: int = setting(
        0, "iterations per checkpoint; 0 = every 25 or 2 minutes, whichever is longer", 0
    )
    patience: int = setting(0, "stop after this many validations without a clear gain; 0: never", 0)
    max_kl: float = setting(0, "stop when mean kl of 50 iterations exceeds it; 0: never", 0)


PRESETS: dict[str, dict] = {
    "reference": {},
    # Asked for the bare answer, it is right on 4%; asked to show its two steps, on 17%. Without
    # worked examples it never writes the tags, but each makes every pass longer. At a constant rate
    # its accuracy stalls at 55%. bfloat16 halves the time on a CPU.
    "smollm2": {
        "model_name": "models/SmolLM2-135M-Instruct",
        "rewards": "examples/reasoning.py",
        "system_prompt": "Work it out in two steps, then give the number as <answer>N</answer>.",
        "num_examples": 3,
        "show_steps": True,
        "max_new_tokens": 40,
        "dtype": "bfloat16",
        "learning_rate": 5e-5,
        "lr_schedule": "linear",
        "batch_size": 16,
        "num_iterations": 120,
        "num_inner_updates": 2,
        "kl_estimator": "k3",
        "eval_every": 40,
    },
    # A small model needs a much higher learning rate, and so larger batches; completions that share
    # prefixes cost little. 90% greedy validation accuracy after some 10 s on two cores.
    "tiny": {
        "model_name": "tiny_model",
        "learning_rate": 5e-5,
        "batch_size": 16,
        "num_generations": 32,
        "num_iterations": 1000,
        "num_inner_updates": 2,
        "kl_estimator": "k3",
    },
}


def parse_config(argv: list[str] | None) -> Config:
    """Read the command line: flags override the preset, the preset overrides the defaults."""
    parser = Parser(Config, description=__doc__.split("\n")[0], allow_abbrev=False)
    preset, reason = parser.parse_args(argv).preset, "named on the command line"
    if preset == "auto":
        preset, reason = models.choose_preset(PRESETS, Config.model_name)
    parser.set_defaults(**PRESETS[preset])
    config = Config(**{**vars(parser.parse_args(argv)), "preset": preset})
    check_ranges(config)
    batch, group, processes = config.batch_size, config.num_generations, distributed.world_size()
    if batch * group > 65536:
        raise UserError(f"--batch_size {batch} x --num_generations {group}: at most 65536 together")
    if batch % processes:
        raise UserError(f"--batch_size {batch}: must be a multiple of {processes} (processes)")
    load_task(config)  # for its errors, before a model is loaded
    print(f"preset {preset}: {reason}")
    return config


OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True)
class Problem:
    """(a op1 b) op2 c"""

    a: int
    op1: str
    b: int
    op2: str
    c: int

    @property
    def question(self) -> str:
        return f"What is ({self.a} {self.op1} {self.b}) {self.op2} {self.c}?"

    @property
    def answer(self) -> int:
        return OPERATORS[self.op2](OPERATORS[self.op1](self.a, self.b), self.c)

    @property
    def steps(self) -> str:
        mid = OPERATORS[self.op1](self.a, self.b)
        return f"{self.a} {self.op1} {self.b} = {mid}\n{mid} {self.op2} {self.c} = {self.answer}\n"

    @property
    def split(self) -> str:
        """By a hash, commutative operands sorted: (3 + 4) * 5 and (4 + 3) * 5 are one problem."""
        a, b = (self.a, self.b) if self.op1 == "-" else sorted((self.a, self.b))
        return split_of(f"({a} {self.op1} {b}) {self.op2} {self.c}")


# Worked examples for a prompt: training problems, one of the first three with negative numbers.
EXAMPLES = [Problem(2, "+", 3, "*", 4), Problem(4, "-", 9, "*", 6), Problem(6, "*", 2, "+", 8)]
EXAMPLES += [Problem(9, "-", 2, "-", 5), Problem(3, "-", 7, "+", 1), Problem(5, "*", 8, "*", 2)]


@dataclass(frozen=True)
class Arithmetic:
    """All problems with operands low to high. A `ProblemFile` has the same methods."""

    low: int
    high: int
    show_steps: bool = False

    def draw(self, count: int, rng: random.Random) -> list[Problem]:
        """Draw `count` training problems, with replacement."""
        problems: list[Problem] = []
        while len(problems) < count:
            a, b, c = (rng.randint(self.low, self.high) for _ in range(3))
            problem = Problem(a, rng.choice("+-*"), b, rng.choice("+-*"), c)
            problems += [problem] if problem.split == "train" else []
        return problems

    def held_out(self, split: str, count: int) -> list[Problem]:
        """Return `count` distinct problems of a split (or all it has), the same for every seed."""
        width = max(0, self.high - self.low + 1)
        total = 9 * width**3

        def problem_at(index: int) -> Problem:
            a, b, c = (index // width**i % width + self.low for i in range(3))
            op1, op2 = divmod(index // width**3, 3)
            return Problem(a, "+-*"[op1], b, "+-*"[op2], c)

        # One problem in twenty is held out for each split, so 40 times `count` draws are plenty.
        drawn = random.Random(0).sample(range(total), min(total, 40 * count + 1000))
        return list(islice((p for p in map(problem_at, drawn) if p.split == split), count))

    def examples(self, count: int) -> list[tuple[str, int, str]]:
        """(question, answer, completion) to show in the prompt."""
        return [
            (p.question, p.answer, p.steps * self.show_steps + f"<answer>{p.answer}</answer>")
            for p in EXAMPLES[:count]
        ]

    def extremes(self) -> list[str]:
        """The shortest and the longest question."""
        numbers = sorted(range(self.low, self.high + 1), key=lambda n: len(str(n)))
        return [Problem(n, "+", n, "+", n).question for n in (numbers[0], numbers[-1])]


def load_task(config: Config) -> tuple[Arithmetic | ProblemFile, RewardFile, dict]:
    """Problems, rewards and prompt of a run. Raises UserError."""
    low, high = config.min_operand, config.max_operand
    if not config.problems:
        problems = Arithmetic(low, high, config.show_steps)
        if not all(problems.held_out(split, 1) for split in SPLITS):
            raise UserError(f"--min_operand {low} --max_operand {high}: too few problems; widen it")
    elif (low, high) == (Config.min_operand, Config.max_operand):
        problems = ProblemFile(config.problems)
    else:
        raise UserError("--problems has no operands; leave out --min_operand and --max_operand")
    rewards, examples = RewardFile(config.rewards), problems.examples(config.num_examples)
    rewards.try_out(problems.examples(1)[0][1], examples)
    return problems, rewards, models.make_prompt(config, examples, rewards.sha256)


@torch.no_grad()
def rollout(
    policy: Policy,
    tokenizer,
    prompts: tuple[Tensor, Tensor],
    group: int,
    max_new_tokens: int,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
) -> Rollout:
    """Sample `group` completions of each prompt (ids and mask, (B, P)); temperature 0 is greedy."""
    models.check_length(policy.model, prompts[0], max_new_tokens)
    prompt_ids, prompt_mask = (x.repeat_interleave(group, dim=0) for x in prompts)  # (B*G, P)
    eos_ids = torch.tensor(models.eos_token_ids(policy.model, tokenizer), device=prompt_ids.device)
    unfinished = torch.ones(len(prompt_ids), dtype=torch.bool, device=prompt_ids.device)  # (B*G,)
    logits, rows, cache = policy.prefill(prompt_ids, prompt_mask)  # (K, V), (B*G,)
    steps = []  # T times (token, mask, logprob), (B*G,) each
    while True:
        token, logprob = sample_tokens(logits, rows, temperature, generator)
        steps.append((token, unfinished, logprob.where(unfinished, 0.0)))
        unfinished = unfinished & ~torch.isin(token, eos_ids)
        if len(steps) == max_new_tokens or not unfinished.any():
            break
        logits, rows = policy.decode(cache, token, unfinished)
    ids, mask, logprobs = (torch.stack(column, dim=1) for column in zip(*steps, strict=True))
    visible = (mask & ~torch.isin(ids, eos_ids)).cpu()  # (B*G, T)
    texts = tokenizer.batch_decode(
        [row[keep].tolist() for row, keep in zip(ids.cpu(), visible, strict=True)],
        skip_special_tokens=False,  # dropping them would hide them from the format reward
        clean_up_tokenization_spaces=False,
    )
    return Rollout(prompt_ids, prompt_mask, ids, mask.float(), logprobs, unfinished, texts)


def reward_function(
    completions: list[str], answers: list[int | str], rewards: RewardFile
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns rewards (N,), each the weighted sum of its parts, and the parts, (N,) each."""
    scores = [rewards.score(*pair) for pair in zip(completions, answers, strict=True)]
    parts = {name: torch.tensor([earned[name] for earned in scores]) for name in rewards.weights}
    return sum(weight * parts[name] for name, weight in rewards.weights.items()), parts


def group_advantages(rewards: Tensor, group: int, scale: str = "group") -> Tensor:
    """Normalise rewards (B*G,) within each group of G: (r - mean) / (std + 1e-4). Returns (B*G,).

    DeepSeekMath section 4.1.2, with the sample standard deviation; with scale "none", r - mean (Dr.
    GRPO). Exactly 0 where all rewards of a group are equal; a rounded mean would miss that.
    """
    groups = rewards.view(-1, group)  # (B, G)
    centred = groups - groups.mean(dim=1, keepdim=True)
    equal = groups.amax(dim=1, keepdim=True) == groups.amin(dim=1, keepdim=True)
    std = groups.std(dim=1, keepdim=True) + 1e-4 if scale == "group" else 1.0
    return (centred / std).masked_fill(equal, 0.0).flatten()


def kl_term(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Schulman's non-negative estimator of a KL divergence, exp(d) - d - 1, elementwise.

    `k3`: d = log pi_ref - log pi_theta (joschu.net/blog/kl-approx.html; DeepSeekMath eq. 4). Its
    mean under pi_theta is KL(pi_theta || pi_ref).
    `k3_inverse`: d = log pi_theta - log pi_ref. Its mean under pi_theta is chi2 - KL(pi_theta ||
    pi_ref), where chi2 = E[pi_theta / pi_ref] - 1.
    As a loss, on-policy, `k3` has the expected gradient of KL(pi_ref || pi_theta) and `k3_inverse`
    that of chi2 / 2, which penalises tokens that are unlikely under the reference far more.
    Beyond d = 20 the exponential continues by its tangent: finite in float32, with a gradient that
    still pulls back. Clamping d would drop the gradient just when the policy has strayed furthest.
    """
    d = logprobs - ref_logprobs if estimator == "k3_inverse" else ref_logprobs - logprobs
    bounded = d.clamp(max=20.0)
    # relu(d - 20) and not d - bounded: autograd would cancel two huge slopes and lose the real one.
    return torch.expm1(bounded) - bounded + (d - 20.0).relu() * math.expm1(20.0)


def completion_mean(values: Tensor, mask: Tensor, length: float | None = None) -> Tensor:
    """Sum values (N, T) over tokens, divide by `length` (default: their number), average over N."""
    lengths = mask.sum(dim=1) if length is None else length
    return ((values * mask).sum(dim=1) / lengths).mean()


def loss_length(mask: Tensor, config: Config) -> float | None:
    """What `completion_mean` divides the loss of a completion by; mask (N, T) of the whole batch.

    grpo: None, its own length. dr_grpo: a constant (arXiv 2503.20783, section 3.2). dapo: the mean
    length, so that each token of the batch weighs the same (arXiv 2503.14476, eq. 12: of a group).
    """
    if config.loss_type == "dapo":
        return distributed.all_reduce_mean({"length": mask.sum(dim=1).mean().item()})["length"]
    return float(config.max_new_tokens) if config.loss_type == "dr_grpo" else None


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: Config,
    length: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The GRPO objective, DeepSeekMath eq. 3, as a loss to minimise.

    logprobs, old_logprobs, ref_logprobs, mask: (N, T); advantages: (N,); length as returned by
    `loss_length`. Returns the scalar loss and what the metrics record of it.
    """
    ratio = (logprobs - old_logprobs).exp()  # (N, T)
    unclipped = ratio * advantages[:, None]
    low, high = 1 - config.epsilon, 1 + (config.epsilon_high or config.epsilon)
    clipped = ratio.clamp(low, high) * advantages[:, None]
    kl_penalty = kl_term(logprobs, ref_logprobs, config.kl_estimator)
    loss = -completion_mean(torch.min(unclipped, clipped) - config.beta * kl_penalty, mask, length)
    with torch.no_grad():
        return loss, {
            "loss": loss.detach(),
            "kl": completion_mean(kl_term(logprobs, ref_logprobs, "k3"), mask),
            "kl_penalty": completion_mean(kl_penalty, mask),
            # Tokens held at the clipped value, whose policy gradient is therefore 0.
            "clip_fraction": completion_mean((clipped < unclipped).float(), mask),
        }


def update_policy(
    learner: nn.Module, reference: Policy, optimizer: Optimizer, batch: Rollout, config: Config
) -> dict[str, float]:
    """Take num_inner_updates gradient steps on one batch of groups. Returns their metrics.

    An update whose gradient is not finite is skipped: it would ruin every weight.
    """
    length = loss_length(batch.mask, config)
    micro_batches = batch.micro_batches(config.micro_batch_size, reference.fits)
    with torch.no_grad():
        for chunk in micro_batches:
            chunk.ref_logprobs = reference(chunk)
    updates = []
    for _ in range(config.num_inner_updates):
        optimizer.zero_grad()
        update = Counter()
        for chunk in distributed.sync_on_last(learner, micro_batches):
            logprobs = learner(chunk)  # (n, T)
            # The policy has not moved since the rollout, so the first update needs no extra pass
            # for the old log-probabilities, and its ratio is exactly 1.
            if chunk.old_logprobs is None:
                chunk.old_logprobs = logprobs.detach()
            inputs = chunk.old_logprobs, chunk.ref_logprobs, chunk.advantages, chunk.mask
            loss, stats = grpo_loss(logprobs, *inputs, config, length)
            weight = len(chunk) / len(batch)
            (weight * loss).backward()
            update.update({name: weight * value.item() for name, value in stats.items()})
        norm = nn.utils.clip_grad_norm_(learner.parameters(), config.clip_grad_norm).item()
        updates.append({**update, "grad_norm": norm})
        if math.isfinite(norm):
            optimizer.step()
    optimizer.zero_grad()  # frees the gradients before the next rollout
    taken = [update for update in updates if math.isfinite(update["grad_norm"])]
    metrics = {name: fmean(u[name] for u in taken or updates) for name in updates[0]}
    # kl is unbiased only at the first update, on samples of the current policy.
    metrics |= {name: updates[0][name] for name in ("kl", "kl_penalty")}
    gaps = [(m.old_logprobs - m.sampled_logprobs).abs().max() for m in micro_batches]
    mismatch = max(distributed.all_gather(torch.stack(gaps).max().item()))
    return {**metrics, "skipped_updates": len(updates) - len(taken), "logprob_mismatch": mismatch}


@dataclass
class TrainState:
    """What changes during a run, all of it in a checkpoint, and what it works with."""

    policy: Policy
    reference: Policy
    tokenizer: object
    problems: Arithmetic | ProblemFile
    rewards: RewardFile
    prompt: dict
    optimizer: Optimizer | None = None  # this and the generators only in training
    problem_rng: random.Random | None = None
    token_rng: torch.Generator | None = None
    learner: nn.Module | None = None  # the policy, wrapped to average gradients over processes
    last_group: dict | None = None  # the first group of the last iteration, to be read


def set_up(config: Config) -> TrainState:
    """Load the model and check that it can be trained. Raises UserError."""
    device = models.choose_device(config.device)
    models.tune_cpu_memory(device)
    model, tokenizer = models.load_model(config.model_name, device)
    problems, rewards, prompt = load_task(config)
    # Of different lengths, so that padding is checked too.
    prompts = models.encode_prompts(tokenizer, problems.extremes(), prompt, device)
    models.check_length(model, prompts[0], config.max_new_tokens)
    dtype, group = models.choose_dtype(config.dtype, device), config.num_generations
    batch, length = config.batch_size // distributed.world_size(), config.max_new_tokens
    policy = choose_policy(config.policy, model, dtype, prompts, group, length, batch * group)
    first = prompts[0][0][prompts[1][0] == 1]
    print(f"first prompt, {len(first)} tokens: {tokenizer.decode(first)!r}")
    # Fused: the same arithmetic in one pass over the weights, several times faster on a CPU.
    adamw = AdamW(policy.parameters(), config.learning_rate, weight_decay=0, fused=True)
    rng = torch.Generator().manual_seed(distributed.rank_seed(config.seed))
    parts = policy, frozen_copy(policy), tokenizer, problems, rewards, prompt
    return TrainState(*parts, adamw, random.Random(config.seed), rng)


def evaluate(state: TrainState, policy: Policy, split: str, config: Config, seed: int) -> dict:
    """Accuracy of a policy on held-out problems, and its drift on off-task questions.

    `sampled` (temperature 1) is what training optimises, `greedy` what a user gets. The generator
    is its own, so that evaluating more often changes nothing in the training.
    """
    rng = torch.Generator().manual_seed(distributed.rank_seed(seed))
    problems, accuracies = state.problems.held_out(split, config.eval_problems), {}
    mine, device, length = distributed.shard(problems), policy.model.device, config.max_new_tokens
    for kind, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        texts = []
        for start in range(0, len(mine), 128):
            questions = [p.question for p in mine[start : start + 128]]
            prompts = models.encode_prompts(state.tokenizer, questions, state.prompt, device)
            texts += rollout(policy, state.tokenizer, prompts, 1, length, rng, temperature).texts
        texts = sum(distributed.all_gather(texts), [])
        scores = [state.rewards.score(t, p.answer) for t, p in zip(texts, problems, strict=True)]
        accuracies[kind] = accuracy_summary(scores)
    question, exact = problems[0].question, scores[0]["exact"] == 1
    example = {"question": question, "completion": texts[0], "exact": exact}
    off_task = evaluate_off_task(state, policy, length, seed)
    return {"accuracies": accuracies, "off_task": off_task, "example": example}


@torch.no_grad()
def evaluate_off_task(state: TrainState, policy: Policy, length: int, seed: int) -> dict:
    """On off-task questions: kl per token and, where answers are known, accuracy by rewards.py."""
    asked = {**state.prompt, "examples": [], **state.prompt["off_task"]}
    device, rng = policy.model.device, torch.Generator().manual_seed(seed)
    prompts = models.encode_prompts(state.tokenizer, list(asked["questions"]), asked, device)
    batch = rollout(policy, state.tokenizer, prompts, 1, length, rng)
    kl = completion_mean(kl_term(policy(batch), state.reference(batch), "k3"), batch.mask).item()
    pairs = zip(batch.texts, asked["questions"].values(), strict=True)
    right = [score(text, answer).exact for text, answer in pairs if answer is not None]
    return {"kl": kl, **({"accuracy": fmean(right)} if right else {})}


def train_iteration(state: TrainState, config: Config) -> dict[str, float]:
    """One iteration of GRPO: sample groups, score them, update the policy. Returns its metrics."""
    started = time.perf_counter()
    group, length, device = config.num_generations, config.max_new_tokens, state.policy.model.device
    problems = distributed.shard(state.problems.draw(config.batch_size, state.problem_rng))
    questions = [problem.question for problem in problems]
    prompts = models.encode_prompts(state.tokenizer, questions, state.prompt, device)
    batch = rollout(state.policy, state.tokenizer, prompts, group, length, state.token_rng)
    answers = [problem.answer for problem in problems for _ in range(group)]
    rewards, parts = reward_function(batch.texts, answers, state.rewards)
    batch.advantages = group_advantages(rewards, group, config.scale_rewards).to(device)  # (B*G,)
    metrics = batch_metrics(batch, rewards, parts, group)
    state.last_group = completions_record(problems[0], batch, parts, group)
    learner = state.learner or state.policy
    metrics |= update_policy(learner, state.reference, state.optimizer, batch, config)
    metrics["seconds"] = time.perf_counter() - started
    return distributed.all_reduce_mean(metrics)


def train(config: Config, stop: StopRequest) -> int:
    """Train, or resume a run; its files go to config.output_dir. Returns the exit code."""
    if config.resume and distributed.broadcast_object(already_finished, asdict(config)):
        return 0
    with distributed.sync_errors():
        state = set_up(config)
    state.learner = distributed.wrap_ddp(state.policy)
    with distributed.rank_zero_only(run_folder(Path(config.output_dir))):
        run = RunLogger(state, asdict(config))

        def measure(split: str, policy: Policy, iteration: int) -> None:
            seed = 1_000_003 * (config.seed + 1) + iteration
            run.log_evaluation(iteration, split, evaluate(state, policy, split, config, seed))

        for split in () if run.iteration else ("test", "validation"):
            if not stop.reason():
                measure(split, state.policy, 0)
        with run.progress_bar():
            while True:
                if run.validation_due() and not stop.reason():
                    measure("validation", state.policy, run.iteration)
                run.save_best()
                ending = stop.reason() or run.reason_to_stop()
                if ending:
                    break
                decay = run.iteration / config.num_iterations * (config.lr_schedule == "linear")
                for parameters in state.optimizer.param_groups:
                    parameters["lr"] = config.learning_rate * (1 - decay)
                run.log_iteration(train_iteration(state, config))
        if not run.iteration:  # nothing was learned: keep the files of an earlier run
            return 128 + stop.signal
        if ending[0] != "failed":
            run.checkpoint()
        if ending[0] == "finished" and not run.evaluated("validation"):
            measure("validation", state.policy, run.iteration)
        best = run.best_policy()
        if ending[0] == "finished":
            measure("test", best, run.metrics["best_iteration"])
        run.finish(ending, best)
        if distributed.rank() == 0:
            from plot_metrics import draw_run  # late: inference needs no matplotlib

            draw_run(run.metrics, Path(config.output_dir))
    return {"finished": 0, "failed": 1}.get(ending[0], 128 + stop.signal)


def main(argv: list[str] | None = None) -> int:
    with distributed.process_group(), StopRequest() as stop:
        return train(distributed.broadcast_object(parse_config, argv), stop)


if __name__ == "__main__":
    sys.exit(exit_code(main))

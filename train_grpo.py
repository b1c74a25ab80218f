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
from dataclasses import asdict, dataclass, replace
from itertools import islice
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from engine import distributed
from engine.cli import setting
from engine.files import UserError, exit_code
from engine.metrics import Group, accuracy_summary, batch_metrics
from engine.models import eos_token_ids
from engine.policy import Policy, Rollout, frozen_copy
from engine.presets import parse_config
from engine.problems import SPLITS, Problem, ProblemFile, RewardFile, split_of
from engine.prompt import Prompt, check_length, decode, encode_prompts, make_prompt
from engine.resume import nothing_to_resume
from engine.run import Run, evaluation_seed
from engine.startup import load_policy
from rewards import score


@dataclass
class Config:
    """Every setting of a run. The defaults are the reference recipe."""

    preset: Literal["auto", "reference", "smollm2", "tiny"] = setting("auto", "named overrides")
    model_name: str = setting("Qwen/Qwen2.5-0.5B-Instruct", "folder or hub id of a chat model")
    output_dir: str = setting(".", "folder for metrics, plots, checkpoints/ and saved_model/")
    resume: bool = setting(False, "continue from the newest checkpoint in output_dir")
    seed: int = setting(0, "seed of the training problems and of the sampling", 0, 2**32 - 1)
    device: str = setting("auto", "cpu, cuda or mps; auto is cuda if there is one, else cpu")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "compute type; auto: bfloat16 on cuda if native, else float32; weights are float32"
    )
    policy: Literal["auto", "tree", "plain"] = setting("auto", "auto: tree if it fits, else plain")
    # The task, and how it is asked. Operands up to 999: answers of nine digits, the most that the
    # reward reads.
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
    learning_rate: float = setting(1e-7, "learning rate of AdamW, the largest of the run", 0, 1)
    lr_schedule: Literal["constant", "linear", "warmup"] = setting(
        "constant", "linear: falls to 0; warmup: also rises over the first twentieth"
    )
    batch_size: int = setting(4, "B, problems per iteration", 1, 65536)
    num_generations: int = setting(8, "G, completions sampled per problem: the group", 2, 65536)
    max_new_tokens: int = setting(16, "longest completion, in tokens", 1, 65536)
    num_iterations: int = setting(2000, "iterations: one batch of groups and its updates each", 1)
    num_inner_updates: int = setting(5, "gradient steps on each batch of groups", 1)
    loss_type: Literal["grpo", "dr_grpo", "dapo", "cispo"] = setting(
        "grpo", "how tokens are averaged; cispo: as dapo, with weights that are clipped, not losses"
    )
    scale_rewards: Literal["group", "batch", "none"] = setting("group", "std that divides rewards")
    importance_level: Literal["token", "sequence"] = setting("token", "what has a ratio of its own")
    mask_truncated: bool = setting(False, "leave truncated completions out of the loss")
    epsilon: float = setting(0.2, "the ratio is clipped to 1 - epsilon .. 1 + epsilon", 0, 1)
    epsilon_high: float = setting(0, "clip at 1 + epsilon_high instead; 0: same as epsilon", 0, 100)
    beta: float = setting(0.04, "weight of the KL term in the loss", 0, 1000)
    kl_estimator: Literal["k3_inverse", "k3"] = setting("k3_inverse", "KL term; k3 is the paper's")
    kl_correction: bool = setting(False, "KL term times the ratio of its token; for k3")
    clip_grad_norm: float = setting(0.5, "largest gradient norm of an update", 0, 1e9)
    micro_batch_size: int = setting(0, "completions per backward pass; 0 is as many as fit", 0)
    # Evaluating, saving, stopping
    eval_every: int = setting(200, "iterations between validations; 0: first and last only", 0)
    eval_problems: int = setting(512, "problems per evaluation, at most", 1, 10**6)
    log_completions_every: int = setting(
        0, "iterations per logged group; 0: about 30 in a run; -1: never", -1
    )
    checkpoint_every: int = setting(
        0, "iterations per checkpoint; 0 = every 25 or 2 minutes, whichever is longer", 0
    )
    patience: int = setting(0, "stop after this many validations without a clear gain; 0: never", 0)
    max_kl: float = setting(0, "stop when mean kl of 50 iterations exceeds it; 0: never", 0)


OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


# Worked examples for a prompt: training problems, one of the first three with negative numbers.
EXAMPLES = [(2, "+", 3, "*", 4), (4, "-", 9, "*", 6), (6, "*", 2, "+", 8)]
EXAMPLES += [(9, "-", 2, "-", 5), (3, "-", 7, "+", 1), (5, "*", 8, "*", 2)]


@dataclass(frozen=True)
class Arithmetic:
    """All problems `(a op1 b) op2 c` with operands low to high; has the methods of `ProblemFile`.

    With `show_steps`, worked examples show both steps before the answer.
    """

    low: int
    high: int
    show_steps: bool = False

    def problem(self, a: int, op1: str, b: int, op2: str, c: int) -> Problem:
        between = OPERATORS[op1](a, b)
        answer = OPERATORS[op2](between, c)
        steps = f"{a} {op1} {b} = {between}\n{between} {op2} {c} = {answer}\n" * self.show_steps
        # Commutative operands sorted: (3 + 4) * 5 and (4 + 3) * 5 go to the same split.
        first, second = (a, b) if op1 == "-" else sorted((a, b))
        return Problem(
            question=f"What is ({a} {op1} {b}) {op2} {c}?",
            answer=answer,
            split=split_of(f"({first} {op1} {second}) {op2} {c}"),
            completion=f"{steps}<answer>{answer}</answer>",
        )

    def draw(self, count: int, rng: random.Random) -> list[Problem]:
        """Draw `count` training problems, with replacement."""
        problems: list[Problem] = []
        while len(problems) < count:
            a, b, c = (rng.randint(self.low, self.high) for _ in range(3))
            problem = self.problem(a, rng.choice("+-*"), b, rng.choice("+-*"), c)
            problems += [problem] if problem.split == "train" else []
        return problems

    def held_out(self, split: str, count: int) -> list[Problem]:
        """Return `count` distinct problems of a split (or all it has), the same for every seed."""
        width = max(0, self.high - self.low + 1)
        total = 9 * width**3

        def problem_at(index: int) -> Problem:
            a, b, c = (index // width**i % width + self.low for i in range(3))
            op1, op2 = divmod(index // width**3, 3)
            return self.problem(a, "+-*"[op1], b, "+-*"[op2], c)

        # One problem in twenty is held out for each split, so 40 times `count` draws are plenty.
        drawn = random.Random(0).sample(range(total), min(total, 40 * count + 1000))
        return list(islice((p for p in map(problem_at, drawn) if p.split == split), count))

    def examples(self, count: int) -> list[Problem]:
        """The first of EXAMPLES, to show in the prompt."""
        return [self.problem(*example) for example in EXAMPLES[:count]]

    def questions(self) -> list[str]:
        """Questions of which one is the shortest and one the longest."""
        numbers = sorted(range(self.low, self.high + 1), key=lambda n: len(str(n)))
        return [self.problem(n, "+", n, "+", n).question for n in (numbers[0], numbers[-1])]

    def where(self, question: str) -> str:
        """What an error calls a question."""
        return f"the question {question!r}"


@dataclass(frozen=True)
class Task:
    """What is asked and how it is scored."""

    tokenizer: object
    problems: Arithmetic | ProblemFile
    reward_file: RewardFile
    prompt: Prompt


def load_task(config: Config) -> tuple[Arithmetic | ProblemFile, RewardFile, Prompt]:
    """Problems, reward file and prompt: all of a Task but the tokenizer. Raises UserError."""
    low, high = config.min_operand, config.max_operand
    if not config.problems:
        problems = Arithmetic(low, high, config.show_steps)
        if not all(problems.held_out(split, 1) for split in SPLITS):
            raise UserError(f"--min_operand {low} --max_operand {high}: too few problems; widen it")
    elif (low, high) == (Config.min_operand, Config.max_operand):
        problems = ProblemFile(config.problems)
    else:
        raise UserError("--problems has no operands; leave out --min_operand and --max_operand")
    examples, reward_file = problems.examples(config.num_examples), RewardFile(config.rewards)
    reward_file.try_out(problems.examples(3), examples)
    shown = [[p.question, p.completion] for p in examples]
    return problems, reward_file, make_prompt(config, shown, reward_file.sha256)


def rollout(
    policy: Policy,
    tokenizer,
    prompts: tuple[Tensor, Tensor],
    group: int,
    max_new_tokens: int,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    greedy: Tensor | None = None,
) -> Rollout:
    """Sample `group` completions of each prompt (ids and mask, (B, P)).

    Of the rows that are `greedy` (B*G,), and at temperature 0 of all, every token is the likeliest.
    """
    check_length(policy.model, prompts[0], max_new_tokens)
    prompt_ids, prompt_mask = (x.repeat_interleave(group, dim=0) for x in prompts)  # (B*G, P)
    eos_ids = torch.tensor(eos_token_ids(policy.model, tokenizer), device=prompt_ids.device)
    ids, mask, logprobs, truncated = policy.sample(
        prompt_ids, prompt_mask, max_new_tokens, eos_ids, generator, temperature, greedy
    )
    visible = (mask & ~torch.isin(ids, eos_ids)).cpu()  # (B*G, T)
    rows = [row[keep].tolist() for row, keep in zip(ids.cpu(), visible, strict=True)]
    texts = decode(tokenizer, rows)
    return Rollout(prompt_ids, prompt_mask, ids, mask.float(), logprobs, truncated, texts)


def reward_function(
    completions: list[str], answers: list[int | str], reward_file: RewardFile
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns rewards (N,), each the weighted sum of its parts, and the parts, (N,) each."""
    scores = [reward_file.score(*pair) for pair in zip(completions, answers, strict=True)]
    weights = reward_file.weights
    parts = {name: torch.tensor([earned[name] for earned in scores]) for name in weights}
    return sum(weight * parts[name] for name, weight in weights.items()), parts


def group_advantages(rewards: Tensor, group: int, scale: str = "group") -> Tensor:
    """Normalise rewards (B*G,) within each group of G: (r - mean) / (std + 1e-4). Returns (B*G,).

    DeepSeekMath section 4.1.2, with the sample standard deviation. Scale "batch" takes that of the
    whole batch, in all processes (arXiv 2508.08221); "none" is r - mean (Dr. GRPO). Exactly 0 where
    all rewards of a group are equal; a rounded mean would miss that.
    """
    groups = rewards.view(-1, group)  # (B, G)
    centred = groups - groups.mean(dim=1, keepdim=True)
    equal = groups.amax(dim=1, keepdim=True) == groups.amin(dim=1, keepdim=True)
    if scale == "batch":
        std = rewards.new_tensor(sum(distributed.all_gather(rewards.tolist()), [])).std() + 1e-4
    else:
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
    capped = d.clamp(max=20.0)
    # relu(d - 20) and not d - capped: autograd would cancel two huge slopes and lose the real one.
    return torch.expm1(capped) - capped + (d - 20.0).relu() * math.expm1(20.0)


def completion_mean(values: Tensor, mask: Tensor, length: float | None = None) -> Tensor:
    """Sum values (N, T) over tokens, divide by `length` (default: their number), average over N.

    A completion without tokens counts in N, with 0.
    """
    lengths = mask.sum(dim=1).clamp(min=1) if length is None else length
    return ((values * mask).sum(dim=1) / lengths).mean()


def loss_length(mask: Tensor, config: Config) -> float | None:
    """What `completion_mean` divides the loss of a completion by; mask (N, T) of the whole batch.

    grpo: None, its own length. dr_grpo: a constant (arXiv 2503.20783, section 3.2). dapo and cispo:
    the mean length, so that each token of the batch weighs the same (arXiv 2503.14476, eq. 12: of a
    group); 1 if no token is left.
    """
    if config.loss_type in ("dapo", "cispo"):
        mean = distributed.all_reduce_mean({"length": mask.sum(dim=1).mean().item()})["length"]
        return mean or 1.0
    return float(config.max_new_tokens) if config.loss_type == "dr_grpo" else None


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    config: Config,
    length: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The GRPO objective, DeepSeekMath eq. 3, as a loss to minimise.

    logprobs, old_logprobs, ref_logprobs, mask: (N, T), ref_logprobs None if beta is 0; advantages:
    (N,); length as returned by `loss_length`. Variants: GSPO (arXiv 2507.18071, eq. 7) and CISPO
    (arXiv 2506.13585, eqs. 4 and 5, without a lower bound). Returns the scalar loss and what the
    metrics record of it.
    """
    log_ratio = logprobs - old_logprobs  # (N, T)
    ratio = token_ratio = log_ratio.exp()
    if config.importance_level == "sequence":  # the geometric mean over a completion's tokens
        lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
        ratio = ((log_ratio * mask).sum(dim=1, keepdim=True) / lengths).exp().expand_as(mask)
    unclipped = ratio * advantages[:, None]
    low, high = 1 - config.epsilon, 1 + (config.epsilon_high or config.epsilon)
    clipped = ratio.clamp(low, high) * advantages[:, None]
    bounded = clipped < unclipped  # tokens at the clipped value: their policy gradient is 0
    objective = torch.min(unclipped, clipped)
    if config.loss_type == "cispo":  # there every token has a gradient, of bounded weight
        bounded = (ratio > high) & (advantages[:, None] != 0)
        objective = ratio.clamp(max=high).detach() * advantages[:, None] * logprobs
    if config.beta:
        penalty = kl_term(logprobs, ref_logprobs, config.kl_estimator)
        if config.kl_correction:
            # Without the ratio, the expected gradient of `k3` is that of KL(pi_ref || pi_theta),
            # and off-policy its mean is no KL of pi_theta either.
            penalty = token_ratio * penalty
        objective = objective - config.beta * penalty
    loss = -completion_mean(objective, mask, length)
    return loss, {"loss": loss.detach(), "clip_fraction": completion_mean(bounded.float(), mask)}


def loss_mask(batch: Rollout, config: Config) -> Tensor:
    """The tokens that count in the loss, (N, T). Truncated completions may be left out (DAPO's
    overlong filtering, arXiv 2503.14476, section 3.4); they count in the advantages and in N.
    """
    return batch.mask * ~batch.truncated[:, None] if config.mask_truncated else batch.mask


def measure_kl(
    chunks: list[Rollout], logprobs: list[Tensor], ref_logprobs: list[Tensor], config: Config
) -> dict[str, float]:
    """Mean KL terms of micro-batches, by their log-probabilities (n, T): `kl`, which is always k3,
    `kl_penalty` by the run's estimator, and the number of tokens that they rest on.
    """
    found, count = Counter(), sum(map(len, chunks))
    for chunk, *pair in zip(chunks, logprobs, ref_logprobs, strict=True):
        weight = len(chunk) / count
        for name, estimator in (("kl", "k3"), ("kl_penalty", config.kl_estimator)):
            found[name] += weight * completion_mean(kl_term(*pair, estimator), chunk.mask).item()
        # The processes' metrics are averaged later; tokens are to be added up.
        found["kl_tokens"] += int(chunk.mask.sum()) * distributed.world_size()
    return dict(found)


@dataclass
class Learner:
    """A policy in training, and what moves it. All but the reference is in a checkpoint."""

    policy: Policy
    trained: nn.Module  # the policy, wrapped to average gradients if there are several processes
    reference: Policy
    optimizer: Optimizer
    problem_rng: random.Random
    token_rng: torch.Generator


def update_policy(
    learner: Learner, batch: Rollout, advantages: Tensor, config: Config
) -> dict[str, float]:
    """Take num_inner_updates gradient steps on one batch of groups; advantages (B*G,).

    Returns their metrics. An update whose gradient is not finite is skipped: it would ruin every
    weight.
    """
    policy, size = learner.policy, config.micro_batch_size
    mask = loss_mask(batch, config)
    length = loss_length(mask, config)
    if config.beta:
        micro_batches = measured = policy.micro_batches(batch, size)
    else:
        # A completion of advantage 0, or without a token in the loss, adds exactly nothing to the
        # gradient. If that is all of them, one stays: the gradient is then zero, not absent, and
        # Adam's step is taken. The reference reads the first group alone, for `kl`.
        all_rows = torch.arange(len(batch), device=mask.device)
        counts = (advantages != 0) & mask.any(dim=1)
        useful = all_rows[counts] if counts.any() else all_rows[:1]
        micro_batches = policy.micro_batches(batch[useful], size)
        measured = policy.micro_batches(batch[all_rows[: config.num_generations]], size)
        advantages = advantages[useful]
    with torch.no_grad():
        ref_logprobs = [learner.reference(chunk) for _, chunk in measured]  # (n, T) each
    old_logprobs: list[Tensor] = []  # (n, T) each
    updates = []
    for _ in range(config.num_inner_updates):
        learner.optimizer.zero_grad()
        update = Counter()  # metrics, summed over micro-batches
        for i, (rows, chunk) in enumerate(distributed.sync_on_last(learner.trained, micro_batches)):
            logprobs = learner.trained(chunk)  # (n, T)
            # The policy has not moved since the rollout, so the old log-probabilities are those of
            # the first update, and its ratio is exactly 1. Those recorded while sampling are equal
            # up to rounding only.
            if not updates:
                old_logprobs.append(logprobs.detach())
            ref = ref_logprobs[i] if config.beta else None
            inputs = old_logprobs[i], ref, advantages[rows], loss_mask(chunk, config)
            loss, stats = grpo_loss(logprobs, *inputs, config, length)
            weight = len(chunk) / len(batch)
            (weight * loss).backward()
            for name, value in stats.items():
                update[name] += weight * value.item()
        norm = nn.utils.clip_grad_norm_(policy.parameters(), config.clip_grad_norm).item()
        updates.append({**update, "grad_norm": norm})
        if math.isfinite(norm):
            learner.optimizer.step()
    learner.optimizer.zero_grad()  # frees the gradients before the next rollout
    taken = [update for update in updates if math.isfinite(update["grad_norm"])]
    metrics = {name: fmean(u[name] for u in taken or updates) for name in updates[0]}
    recorded = [chunk.sampled_logprobs for _, chunk in micro_batches]
    gaps = [(a - b).abs().max() for a, b in zip(old_logprobs, recorded, strict=True)]
    mismatch = max(distributed.all_gather(torch.stack(gaps).max().item()))
    metrics |= {"skipped_updates": len(updates) - len(taken), "logprob_mismatch": mismatch}
    # kl is unbiased only on samples of the current policy, so before the first update.
    chunks = [chunk for _, chunk in measured]
    ours = old_logprobs if config.beta else [chunk.sampled_logprobs for chunk in chunks]
    return metrics | measure_kl(chunks, ours, ref_logprobs, config)


def train_iteration(task: Task, learner: Learner, config: Config) -> tuple[dict, Group]:
    """One iteration of GRPO: sample groups, score them, update the policy.

    Returns its metrics and, for the log of completions, its first group.
    """
    started = time.perf_counter()
    group, device = config.num_generations, learner.policy.model.device
    problems = distributed.shard(task.problems.draw(config.batch_size, learner.problem_rng))
    questions = [problem.question for problem in problems]
    prompts = encode_prompts(task.tokenizer, questions, task.prompt, device)
    sampling = task.prompt.max_new_tokens, learner.token_rng
    batch = rollout(learner.policy, task.tokenizer, prompts, group, *sampling)
    sampled = time.perf_counter()
    answers = [problem.answer for problem in problems for _ in range(group)]
    rewards, parts = reward_function(batch.texts, answers, task.reward_file)
    advantages = group_advantages(rewards, group, config.scale_rewards)  # (B*G,)
    metrics = batch_metrics(batch, rewards, parts, advantages, group)
    metrics |= update_policy(learner, batch, advantages.to(device), config)
    metrics["rollout_seconds"] = sampled - started
    metrics["seconds"] = time.perf_counter() - started
    first = batch[torch.arange(group, device=device)]
    own_parts = {name: part[:group] for name, part in parts.items()}
    first_group = Group(problems[0], first, own_parts, advantages[:group])
    return distributed.all_reduce_mean(metrics), first_group


def answer_questions(
    policy: Policy,
    tokenizer,
    prompt: Prompt,
    questions: list[str],
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    greedy: Tensor | None = None,
) -> list[str]:
    """One completion of each question, sampled 128 at a time; `greedy` as in `rollout`."""
    texts, hidden = [], distributed.rank() > 0 or None  # None: shown on a terminal only
    for start in tqdm(range(0, len(questions), 128), delay=2, leave=False, disable=hidden):
        chunk = slice(start, start + 128)
        prompts = encode_prompts(tokenizer, questions[chunk], prompt, policy.model.device)
        sampling = prompt.max_new_tokens, generator, temperature
        likeliest = None if greedy is None else greedy[chunk].to(policy.model.device)
        texts += rollout(policy, tokenizer, prompts, 1, *sampling, likeliest).texts
    return texts


def evaluate(policy: Policy, task: Task, split: str, count: int, seed: int) -> dict:
    """Accuracy of a policy on `count` held-out problems, and its answer to the first of them.

    `sampled` (temperature 1) is what training optimises, `greedy` what a user gets. The generator
    is its own, so that evaluating more often changes nothing in the training.
    """
    rng = torch.Generator().manual_seed(distributed.rank_seed(seed))
    problems = task.problems.held_out(split, count)
    # Both in one pass, because the two answers to a question share most of their prefixes.
    asked = [p.question for p in distributed.shard(problems) for _ in range(2)]
    greedy = torch.tensor([False, True]).repeat(len(asked) // 2)
    mine = answer_questions(policy, task.tokenizer, task.prompt, asked, rng, greedy=greedy)
    texts, scores = sum(distributed.all_gather(mine), []), {}
    for i, kind in enumerate(("sampled", "greedy")):
        pairs = zip(texts[i::2], problems, strict=True)
        scores[kind] = [task.reward_file.score(text, problem.answer) for text, problem in pairs]
    exact = scores["greedy"][0]["exact"] == 1
    example = {"question": problems[0].question, "completion": texts[1], "exact": exact}
    accuracies = {kind: accuracy_summary(scores[kind]) for kind in scores}
    return {"accuracies": accuracies, "example": example}


def evaluate_off_task(policy: Policy, reference: Policy, task: Task, seed: int) -> dict:
    """On off-task questions: kl per token and, where answers are known, accuracy by rewards.py."""
    off_task, device = task.prompt.off_task, policy.model.device
    prompt = replace(task.prompt, system=off_task["system"], examples=[])
    prompts = encode_prompts(task.tokenizer, list(off_task["questions"]), prompt, device)
    rng = torch.Generator().manual_seed(seed)
    batch = rollout(policy, task.tokenizer, prompts, 1, prompt.max_new_tokens, rng)
    with torch.no_grad():
        kl = completion_mean(kl_term(policy(batch), reference(batch), "k3"), batch.mask).item()
    pairs = zip(batch.texts, off_task["questions"].values(), strict=True)
    right = [score(text, answer).exact for text, answer in pairs if answer is not None]
    return {"kl": kl, **({"accuracy": fmean(right)} if right else {})}


def set_up(config: Config) -> tuple[Task, Learner]:
    """Load task and model, and check that the model can be trained. Raises UserError."""
    with distributed.sync_errors():
        problems, reward_file, prompt = load_task(config)
        policy, tokenizer = load_policy(config, problems, prompt, config.num_generations)
    # Fused: the same arithmetic in one pass over the weights, several times faster on a CPU.
    adamw = AdamW(policy.parameters(), config.learning_rate, weight_decay=0, fused=True)
    rng = torch.Generator().manual_seed(distributed.rank_seed(config.seed))
    trained = distributed.wrap_ddp(policy)
    learner = Learner(policy, trained, frozen_copy(policy), adamw, random.Random(config.seed), rng)
    return Task(tokenizer, problems, reward_file, prompt), learner


def set_learning_rate(optimizer: Optimizer, config: Config, iteration: int) -> None:
    """By config.lr_schedule, after `iteration` iterations."""
    factor, total = 1.0, config.num_iterations
    if config.lr_schedule != "constant":
        factor = 1 - iteration / total
    if config.lr_schedule == "warmup":
        factor = min(factor, 20 * (iteration + 1) / total)
    for parameters in optimizer.param_groups:
        parameters["lr"] = config.learning_rate * factor


def train(config: Config) -> int:
    """Train, or resume a run; its files go to config.output_dir. Returns the exit code."""
    from plot_metrics import draw  # late: asking a model needs no matplotlib

    task, learner = set_up(config)
    with Run(config, task, learner) as run:

        def measure(split: str, policy: Policy, iteration: int) -> None:
            started, seed = time.perf_counter(), evaluation_seed(config, iteration)
            results = evaluate(policy, task, split, config.eval_problems, seed)
            results["off_task"] = evaluate_off_task(policy, learner.reference, task, seed)
            results["seconds"] = time.perf_counter() - started
            run.log_evaluation(split, iteration, results)

        for split in ("test", "validation"):
            if run.due(split):
                measure(split, learner.policy, run.iteration)
        for iteration in run:  # until done, stopped, sick or interrupted; a resumed run goes on
            set_learning_rate(learner.optimizer, config, iteration)
            fixed = run.ask_fixed(answer_questions)
            run.log_iteration(*train_iteration(task, learner, config), fixed)
            run.save()
            if run.due("validation"):
                measure("validation", learner.policy, run.iteration)
                run.save()
        if run.finished and not run.evaluated("validation"):
            measure("validation", learner.policy, run.iteration)
        best = run.load_best()
        if run.finished:
            measure("test", best, run.metrics["best_iteration"])
        return run.finish(best, draw)


def main(argv: list[str] | None = None) -> int:
    with distributed.process_group():
        config = distributed.broadcast_object(parse_config, Config, argv)
        if config.resume and distributed.broadcast_object(nothing_to_resume, asdict(config)):
            return 0
        return train(config)


if __name__ == "__main__":
    sys.exit(exit_code(main))

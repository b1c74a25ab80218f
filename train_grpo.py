"""Train a small chat model with GRPO to answer `(a op1 b) op2 c` as `<answer>N</answer>`.

    python train_grpo.py                       # the preset that suits this machine
    python train_grpo.py --preset reference    # the reference recipe, on Qwen2.5-0.5B-Instruct
    python train_grpo.py --preset tiny --seed 1 --output_dir runs/seed1
    torchrun --standalone --nproc_per_node=8 train_grpo.py --batch_size 32   # eight GPUs

GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1) needs no value network: it samples a group of G
completions for each of B problems, scores them, and takes how far a reward lies above the mean of
its own group as the advantage of that completion. This file follows the data: configuration, task,
prompts, policy, rollout, rewards, advantages, loss, evaluation, loop.

Where it departs from the paper:
1. The reference model stays frozen for the whole run; the paper renews it between rounds.
2. A rule scores each completion as a whole; the paper trains a reward model.
3. The default KL term, `k3_inverse`, turns the sign of d round; `k3` is the paper's: `kl_term`.
4. A group whose rewards are all equal has advantage 0 exactly; it still feels the KL term.
"""

import math
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

import spread
from bookkeeping import Bookkeeper, begin, describe_batch, finished_already, new_metrics
from checkpoint import StopRequest, run_folder
from cli import Parser, UserError, check_ranges, exit_code, setting
from policy import (
    Policy,
    check_fit,
    choose_device,
    choose_preset,
    draw,
    encode_prompts,
    end_token_ids,
    frozen_copy,
    keep_freed_memory,
    load_model,
    make_prompt,
    micro_batches,
)
from replay import Graphs, eager, wanted
from rewards import score, summarise
from task import Problem, check_enough, held_out_problems, off_task_questions, training_problems


@dataclass
class Config:
    """Every setting of a run. The defaults are the reference recipe."""

    preset: Literal["auto", "reference", "smollm2", "tiny"] = setting(
        "auto", "named set of overrides; auto takes the largest model that this machine can train"
    )
    model_name: str = setting("Qwen/Qwen2.5-0.5B-Instruct", "folder or hub id of a chat model")
    output_dir: str = setting(".", "folder for metrics, plots, checkpoints/ and saved_model/")
    resume: bool = setting(False, "go on from the newest checkpoint in output_dir")
    seed: int = setting(0, "seeds the training problems and the sampling", 0, 2**32 - 1)
    device: str = setting("auto", "cpu, cuda or mps; auto is cuda if there is one, else cpu")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "compute type; auto is bfloat16 on cuda; the weights are float32 always"
    )
    fixed_shapes: Literal["auto", "on", "off"] = setting(
        "auto", "pad all to fixed lengths, to be replayed as CUDA graphs; auto is on on cuda"
    )
    # The task, and how it is asked. Three factors of three digits make the nine that are scored.
    min_operand: int = setting(0, "smallest operand of a problem", -999, 999)
    max_operand: int = setting(10, "largest operand of a problem", -999, 999)
    system_prompt: str = setting(
        "Reply only with <answer>N</answer>, where N is the number.", "first line of the chat"
    )
    num_examples: int = setting(0, "worked examples in the chat before the question", 0, 3)
    # GRPO
    learning_rate: float = setting(1e-7, "learning rate of AdamW, constant", 0, 1)
    batch_size: int = setting(4, "B, problems per iteration", 1)
    num_generations: int = setting(8, "G, completions sampled per problem: the group", 2)
    max_new_tokens: int = setting(16, "longest completion, in tokens", 1)
    num_iterations: int = setting(2000, "batches of groups to sample and learn from", 1)
    num_inner_updates: int = setting(5, "gradient steps on each batch of groups", 1)
    epsilon: float = setting(0.2, "the ratio is clipped to 1 - epsilon .. 1 + epsilon", 0, 1)
    beta: float = setting(0.04, "weight of the KL term in the loss", 0, 1000)
    kl_estimator: Literal["k3_inverse", "k3"] = setting("k3_inverse", "KL term; k3 is the paper's")
    clip_grad_norm: float = setting(0.5, "largest gradient norm of an update", 0, 1e9)
    micro_batch_size: int = setting(0, "completions per backward pass, to save memory; 0 is all", 0)
    # Evaluating, keeping, stopping
    eval_every: int = setting(200, "iterations between evaluations on validation; 0 is none", 0)
    eval_problems: int = setting(512, "problems per evaluation, at most", 1)
    checkpoint_every: int = setting(0, "iterations per checkpoint; 0: 25 or 2 min, the longer", 0)
    patience: int = setting(0, "stop after so many evaluations without a clear gain; 0 is never", 0)
    max_kl: float = setting(0, "stop when the last 50 iterations' mean kl is above; 0 is never", 0)


PRESETS: dict[str, dict] = {
    "reference": {},
    # Zero-shot it never writes the tags, so nothing could be rewarded; three worked examples do it.
    # Few answers are right at first, so batches are large. In bfloat16 and pieces it fits a laptop.
    "smollm2": {
        "model_name": "models/SmolLM2-135M-Instruct",
        "num_examples": 3,
        "dtype": "bfloat16",
        "learning_rate": 2e-5,
        "batch_size": 16,
        "num_inner_updates": 1,
        "kl_estimator": "k3",
        "micro_batch_size": 32,
    },
    # So small a model takes, and needs, far larger steps, and so larger batches. With k3 it learns
    # a little faster than with k3_inverse: benchmarks/study.py.
    "tiny": {
        "model_name": "tiny_model",
        "learning_rate": 2e-5,
        "batch_size": 6,
        "num_generations": 16,
        "num_inner_updates": 2,
        "kl_estimator": "k3",
    },
}


def parse_config(argv: list[str]) -> Config:
    """Read the command line: flags beat the preset, the preset beats the defaults."""
    parser = Parser(Config, description=__doc__.split("\n")[0], allow_abbrev=False)
    preset, reason = parser.parse_args(argv).preset, "named on the command line"
    if preset == "auto":
        preset, reason = choose_preset(PRESETS, Config.model_name)
    parser.set_defaults(**PRESETS[preset])
    config = Config(**{**vars(parser.parse_args(argv)), "preset": preset})
    check_ranges(config)
    group, micro, batch = config.num_generations, config.micro_batch_size, config.batch_size
    if micro and micro % group and group % micro:
        raise UserError(f"--micro_batch_size {micro}: must divide or be a multiple of {group}")
    check_enough(config)
    if batch % spread.size():
        raise UserError(f"--batch_size {batch}: must be a multiple of {spread.size()} (processes)")
    print(f"preset {preset}: {reason}")
    return config


@dataclass
class Rollout:
    """Completions of B prompts, G each, with what it takes to train on them."""

    prompt_ids: Tensor  # (B, P)
    prompt_mask: Tensor  # (B, P)
    completion_ids: Tensor  # (B*G, T)
    mask: Tensor  # (B*G, T) float32: 1 up to the end token and on it, 0 after
    logprobs: Tensor  # (B*G, T) float32, as recorded while sampling
    texts: list[str]  # B*G, without the end token


@torch.no_grad()
def rollout(
    policy: Policy,
    tokenizer,
    prompts: tuple[Tensor, Tensor],
    group: int,
    max_new_tokens: int,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    graphs: Graphs | None = None,
) -> Rollout:
    """Sample `group` completions of each prompt (ids and mask, (B, P)); temperature 0 is greedy.

    A completion ends with any end token of the model, or after max_new_tokens. With `graphs` T is
    always max_new_tokens, else the length of the longest completion.
    """
    end_ids = torch.tensor(end_token_ids(policy.model, tokenizer), device=prompts[0].device)

    def sample(prompt_ids: Tensor, prompt_mask: Tensor, end_ids: Tensor):
        logits, context = policy.encode(prompt_ids, prompt_mask, group)  # (B*G, V)
        alive = torch.ones_like(logits[:, :1], dtype=torch.bool)  # (B*G, 1)
        steps = []  # T times ids, mask and log-probabilities, (B*G, 1) each
        while True:
            scores = logits.float().log_softmax(dim=1)  # (B*G, V)
            if temperature == 0:
                token = scores.argmax(dim=1, keepdim=True)  # (B*G, 1)
            else:
                token = draw((scores / temperature).softmax(dim=1), generator)
            steps.append((token, alive, scores.gather(1, token)))
            alive = alive & ~torch.isin(token, end_ids)
            if len(steps) == max_new_tokens or (graphs is None and not alive.any()):
                return [torch.cat(columns, dim=1) for columns in zip(*steps, strict=True)]
            logits = policy.go_on(context, token)  # (B*G, V)

    completion_ids, mask, logprobs = (graphs or eager)(sample, *prompts, end_ids)  # (B*G, T)
    spoken = (mask & ~torch.isin(completion_ids, end_ids)).cpu()
    texts = tokenizer.batch_decode(
        [row[keep].tolist() for row, keep in zip(completion_ids.cpu(), spoken, strict=True)],
        skip_special_tokens=False,  # dropped, they would hide from the format reward
        clean_up_tokenization_spaces=False,
    )
    return Rollout(*prompts, completion_ids, mask.float(), logprobs, texts)


REWARD_WEIGHTS = {"format": 0.2, "near": 0.2, "exact": 0.6}


def reward_function(completions: list[str], answers: list[int]) -> Tensor:
    """Return the weighted parts of each completion's reward, (N, 3); the reward is their sum."""
    scores = [score(text, answer) for text, answer in zip(completions, answers, strict=True)]
    return torch.tensor(scores, dtype=torch.float32) * torch.tensor(list(REWARD_WEIGHTS.values()))


def group_advantages(rewards: Tensor, group: int) -> Tensor:
    """Normalise rewards (B*G,) within each group of G: (r - mean) / (std + 1e-4). Returns (B*G,).

    DeepSeekMath section 4.1.2, with the sample standard deviation. Where all rewards of a group are
    equal the result is exactly 0, which a rounded mean would miss.
    """
    groups = rewards.view(-1, group)  # (B, G)
    centred = groups - groups.mean(dim=1, keepdim=True)
    equal = groups.amax(dim=1, keepdim=True) == groups.amin(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True) + 1e-4)).masked_fill(equal, 0.0).flatten()


def kl_term(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Schulman's non-negative estimator of a KL divergence, exp(d) - d - 1, elementwise.

    `k3`: d = log pi_ref - log pi_theta (joschu.net/blog/kl-approx.html; DeepSeekMath eq. 4). Its
    mean under pi_theta is KL(pi_theta || pi_ref).
    `k3_inverse`: d = log pi_theta - log pi_ref. Its mean under pi_theta is chi2 - KL(pi_theta ||
    pi_ref), where chi2 = E[pi_theta / pi_ref] - 1.
    As a loss, on-policy, `k3` has the expected gradient of KL(pi_ref || pi_theta) and `k3_inverse`
    that of chi2 / 2, which punishes tokens that the reference finds unlikely far harder.
    Beyond d = 20 the exponential continues by its tangent: finite in float32, and still pulling
    back, where clamping d would let go just when the policy has strayed furthest.
    """
    d = logprobs - ref_logprobs if estimator == "k3_inverse" else ref_logprobs - logprobs
    bounded = d.clamp(max=20.0)
    # By relu, not by d - bounded: autograd would add two huge slopes and round the real one away.
    return torch.expm1(bounded) - bounded + (d - 20.0).relu() * math.expm1(20.0)


def completion_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (N, T) over the tokens of each completion, then over completions (eq. 3)."""
    return ((values * mask).sum(dim=1) / mask.sum(dim=1)).mean()


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: Config,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The GRPO objective, DeepSeekMath eq. 3, as a loss to minimise.

    logprobs, old_logprobs, ref_logprobs, mask: (N, T); advantages: (N,).
    Returns the scalar loss and what the metrics record of it.
    """
    ratio = (logprobs - old_logprobs).exp()  # (N, T)
    unclipped = ratio * advantages[:, None]
    clipped = ratio.clamp(1 - config.epsilon, 1 + config.epsilon) * advantages[:, None]
    kl_penalty = kl_term(logprobs, ref_logprobs, config.kl_estimator)
    loss = -completion_mean(torch.min(unclipped, clipped) - config.beta * kl_penalty, mask)
    with torch.no_grad():
        return loss, {
            "loss": loss.detach(),
            "kl": completion_mean(kl_term(logprobs, ref_logprobs, "k3"), mask),
            "kl_penalty": completion_mean(kl_penalty, mask),
            # Tokens held at the clipped value, whose policy gradient is therefore 0.
            "clip_fraction": completion_mean((clipped < unclipped).float(), mask),
        }


def update_policy(
    learner: nn.Module,
    reference: Policy,
    optimizer: torch.optim.Optimizer,
    batch: Rollout,
    advantages: Tensor,
    config: Config,
    graphs: Graphs | None = None,
) -> dict[str, float]:
    """Take num_inner_updates gradient steps on one batch of groups. Returns their metrics.

    An update whose loss or gradient is not finite is skipped: it would ruin every weight.
    """
    parameters, run = list(learner.parameters()), graphs or eager
    # Of each piece: a slice of the prompts, and a pair of slices, of completions and their tokens.
    pieces = micro_batches(batch.mask, config, trim=graphs is None)
    inputs = batch.prompt_ids, batch.prompt_mask, batch.completion_ids, batch.mask

    @torch.no_grad()
    def score(prompt_ids, prompt_mask, completion_ids, mask):
        scored = torch.zeros_like(mask)  # (B*G, T)
        for some, part in pieces:
            scored[part] = reference(prompt_ids[some], prompt_mask[some], completion_ids[part])
        return scored

    def gradient(prompt_ids, prompt_mask, completion_ids, mask, advantages, ref, old):
        optimizer.zero_grad(set_to_none=graphs is None)  # a recording keeps to its places
        scored, stats = torch.zeros_like(mask), []
        for some, part in spread.exchanged_once(learner, pieces):
            logprobs = learner(prompt_ids[some], prompt_mask[some], completion_ids[part])
            scored[part] = logprobs.detach()
            # At the first update nothing has moved since the rollout, so these are the old
            # log-probabilities: a forward pass is saved, and the ratio is exactly 1.
            past, gains = (scored if old is None else old)[part], advantages[part[0]]
            loss, piece = grpo_loss(logprobs, past, ref[part], gains, mask[part], config)
            share = len(logprobs) / len(mask)
            (loss * share).backward()
            stats.append({name: share * value for name, value in piece.items()})
        norm = nn.utils.clip_grad_norm_(parameters, config.clip_grad_norm)
        totals = {name: sum(piece[name] for piece in stats) for name in stats[0]}
        return scored, {**totals, "grad_norm": norm}

    updates, made, old_logprobs = [], [], None
    data = *inputs, advantages, run(score, *inputs)
    for _ in range(config.num_inner_updates):
        logprobs, stats = run(gradient, *data, old_logprobs)
        old_logprobs = logprobs if old_logprobs is None else old_logprobs
        values = torch.stack(list(stats.values())).tolist()  # one wait for the device
        updates.append(spread.average(dict(zip(stats, values, strict=True))))
        if math.isfinite(updates[-1]["loss"]) and math.isfinite(updates[-1]["grad_norm"]):
            optimizer.step()
            made.append(updates[-1])
    if graphs is None:
        optimizer.zero_grad()  # their memory serves the next rollout
    # The first update alone scores samples of the very policy that drew them, so kl is unbiased.
    kl = {name: updates[0][name] for name in ("kl", "kl_penalty")}
    some = made or updates
    means = {n: fmean(u[n] for u in some) for n in ("loss", "clip_fraction", "grad_norm")}
    gap = max(spread.gather(((old_logprobs - batch.logprobs) * batch.mask).abs().max().item()))
    return {**kl, **means, "skipped_updates": len(updates) - len(made), "sampling_gap": gap}


def evaluate(
    policy: Policy, tokenizer, prompt: dict, problems: list[Problem], config: Config, seed: int
) -> dict[str, dict]:
    """Accuracy with its 95% interval, of one sample per problem and of the greedy answer.

    "sampled" (temperature 1) is what training optimises, "greedy" what a user gets. It draws from
    a generator of its own, so that evaluating more often changes nothing in the training.
    """
    device = policy.model.device
    rng = torch.Generator(device).manual_seed(spread.stream(seed))
    problems, results = spread.share(problems), {}
    for kind, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        scores = []
        for start in range(0, len(problems), 128):
            part = problems[start : start + 128]
            prompts = encode_prompts(tokenizer, [p.question for p in part], prompt, device)
            done = rollout(policy, tokenizer, prompts, 1, config.max_new_tokens, rng, temperature)
            scores += [score(t, p.answer) for t, p in zip(done.texts, part, strict=True)]
        results[kind] = summarise(sum(spread.gather(scores), []))
    return results


@torch.no_grad()
def evaluate_off_task(
    policy: Policy, reference: Policy, tokenizer, prompt: dict, config: Config, seed: int
) -> dict[str, float]:
    """What training does to the policy where it is not trained: is anything being forgotten?

    Of sampled answers to fixed questions off the task: `kl` from the reference, per token, and
    `accuracy` where there is a right answer.
    """
    questions, prompt = off_task_questions(config, prompt)
    rng = torch.Generator(policy.model.device).manual_seed(seed)
    prompts = encode_prompts(tokenizer, list(questions), prompt, policy.model.device)
    done = rollout(policy, tokenizer, prompts, 1, config.max_new_tokens, rng)
    inputs = *prompts, done.completion_ids
    kl = completion_mean(kl_term(policy(*inputs), reference(*inputs), "k3"), done.mask).item()
    answers = zip(done.texts, questions.values(), strict=True)
    right = [score(text, answer).exact for text, answer in answers if answer is not None]
    return {"kl": kl, **({"accuracy": fmean(right)} if right else {})}


@dataclass
class TrainState:
    """Everything that outlives an iteration, which a checkpoint saves whole."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    problems: random.Random  # draws the training problems
    sampler: torch.Generator  # draws the tokens
    metrics: dict  # what grpo_metrics.json holds
    graphs: Graphs | None = None  # where shapes are fixed; holds nothing that must be saved

    def __post_init__(self):
        self.learner = spread.synchronised(self.policy)  # the policy, as its gradients are computed


def train_iteration(
    state: TrainState, reference: Policy, tokenizer, prompt: dict, config: Config
) -> dict[str, float]:
    """One turn of GRPO: sample groups, score them, update the policy. Returns its metrics."""
    started = time.perf_counter()
    device, group, graphs = state.policy.model.device, config.num_generations, state.graphs
    problems = spread.share(training_problems(config.batch_size, state.problems, config))
    questions = [problem.question for problem in problems]
    prompts = encode_prompts(tokenizer, questions, prompt, device, 16 if graphs else None)
    length = config.max_new_tokens
    batch = rollout(state.policy, tokenizer, prompts, group, length, state.sampler, graphs=graphs)
    parts = reward_function(batch.texts, [p.answer for p in problems for _ in range(group)])
    advantages = group_advantages(parts.sum(dim=1), group).to(device)  # (B*G,)
    updates = update_policy(
        state.learner, reference, state.optimizer, batch, advantages, config, graphs
    )
    mine = describe_batch(batch, parts, advantages, end_token_ids(state.policy.model, tokenizer))
    mine["seconds"] = time.perf_counter() - started
    return {**spread.average(mine), **updates}


def train(config: Config, stop: StopRequest) -> int:
    """Run or resume a training and leave its files in config.output_dir. Returns the exit code."""
    if config.resume and spread.agreed(finished_already, config):
        return 0
    with spread.together():
        device = choose_device(config.device)
        keep_freed_memory(device)
        model, tokenizer = load_model(config.model_name, device)
        bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
        policy = Policy(model, torch.bfloat16 if bfloat16 else torch.float32)
        questions = [problem.question for problem in held_out_problems("validation", 4, config)]
        check_fit(policy, tokenizer, questions, make_prompt(config), config.max_new_tokens)
    with spread.on_first(run_folder(Path(config.output_dir))):
        return train_in_folder(config, policy, tokenizer, stop)


def train_in_folder(config: Config, policy: Policy, tokenizer, stop: StopRequest) -> int:
    """`train`, once the policy has proved fit and output_dir is held for this run."""
    model, device, prompt = policy.model, policy.model.device, make_prompt(config)
    # Fused: the same arithmetic in one pass over the weights, seven times faster on a CPU.
    adamw = torch.optim.AdamW(policy.parameters(), config.learning_rate, weight_decay=0, fused=True)
    sampler = torch.Generator(device).manual_seed(spread.stream(config.seed))
    metrics = new_metrics(config, model)
    graphs = Graphs(sampler) if wanted(config.fixed_shapes, device) else None
    state = TrainState(policy, adamw, random.Random(config.seed), sampler, metrics, graphs)
    reference = frozen_copy(policy)
    begin(state, config)
    history, evaluations = metrics["iterations"], metrics["evaluations"]
    books = Bookkeeper(state, config, tokenizer, prompt)
    print(" ".join(f"{name}={value!r}" for name, value in asdict(config).items()))
    print(f"{model.num_parameters():,} parameters on {device}, computing in {policy.compute_dtype}")

    def measure(split: str, some: Policy, iteration: int) -> None:
        seed = 1_000_003 * (config.seed + 1) + iteration
        problems = held_out_problems(split, config.eval_problems, config)
        accuracies = evaluate(some, tokenizer, prompt, problems, config, seed)
        off_task = evaluate_off_task(some, reference, tokenizer, prompt, config, seed)
        books.evaluated(iteration, split, accuracies=accuracies, off_task=off_task)

    def example() -> tuple[str, str]:
        question = held_out_problems("validation", 1, config)[0].question
        inputs = encode_prompts(tokenizer, [question], prompt, device)
        return question, rollout(policy, tokenizer, inputs, 1, config.max_new_tokens).texts[0]

    for split in () if history else ("test", "validation"):
        if not stop.reason():
            measure(split, policy, 0)
    length, quiet = config.num_iterations, spread.rank() > 0
    bar = tqdm(total=length, initial=len(history), dynamic_ncols=True, disable=quiet)
    with bar:  # closed on errors too, which are then told on a line of their own
        while True:
            due = config.eval_every and len(history) % config.eval_every == 0
            if due and not stop.reason() and evaluations[-1]["iteration"] < len(history):
                measure("validation", policy, len(history))
            books.keep_best()
            ending = stop.reason() or books.reason_to_stop()
            if ending:
                break
            history.append(train_iteration(state, reference, tokenizer, prompt, config))
            recent = {n: fmean(m[n] for m in history[-25:]) for n in ("reward", "accuracy", "kl")}
            bar.set_postfix({n: f"{value:.3f}" for n, value in recent.items()}, refresh=False)
            bar.update()
            books.after_iteration(example)
    if not history:  # nothing was learned: an earlier run's files stay as they are
        return 128 + stop.signal
    if ending[0] != "failed":
        books.checkpoint()
    if ending[0] == "finished" and evaluations[-1]["iteration"] < len(history):
        measure("validation", policy, len(history))
    best = books.best_policy()
    if ending[0] == "finished":
        measure("test", best, metrics["best_iteration"])
    books.finish(ending, best)
    return {"finished": 0, "failed": 1}.get(ending[0], 128 + stop.signal)


def main(argv: list[str] | None = None) -> int:
    with spread.joined(), StopRequest() as stop:
        return train(spread.agreed(parse_config, sys.argv[1:] if argv is None else argv), stop)


if __name__ == "__main__":
    sys.exit(exit_code(main))

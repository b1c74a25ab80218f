"""What is recorded of a run, and what the record says: the best policy, reasons to stop, a summary.

Every decision is computed from the metrics alone, so that a resumed run decides as an uninterrupted
one would, and each of several processes as the others do.
"""

import math
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from engine.files import METRICS_FILE
from engine.policy import Policy, Rollout
from engine.problems import LOGPROBS, Problem, RewardFile
from engine.prompt import decode

WINDOW = 50  # iterations over which a run is judged
MAX_SKIPPED = 10  # updates in a row


def batch_metrics(
    batch: Rollout, rewards: Tensor, parts: dict[str, Tensor], advantages: Tensor, size: int
) -> dict[str, float]:
    """What the metrics record of a batch of groups of a size G.

    rewards, advantages and each of the parts: (B*G,).
    """
    lengths = batch.mask.sum(dim=1)  # (B*G,)
    zero_std = (advantages.view(-1, size) == 0).all(dim=1)  # (B,)
    return {
        "reward": rewards.mean().item(),
        **{f"reward_{name}": part.mean().item() for name, part in parts.items()},
        "accuracy": (parts["exact"] == 1).float().mean().item(),
        # Estimated from the samples: the mean of -log p per token.
        "entropy": -(batch.sampled_logprobs.sum(dim=1) / lengths).mean().item(),
        "truncated": batch.truncated.float().mean().item(),
        "completion_length": lengths.mean().item(),
        "frac_zero_std_groups": zero_std.float().mean().item(),
    }


@dataclass(frozen=True)
class Group:
    """A problem and its G completions, scored."""

    problem: Problem
    rollout: Rollout  # N = G
    parts: dict[str, Tensor]  # of the reward, by name, (G,) each
    advantages: Tensor  # (G,)


def group_record(
    group: Group, policy: Policy, reference: Policy, tokenizer, micro_batch_size: int = 0
) -> dict:
    """A group as a line of grpo_completions.jsonl, once the policy has been updated on it.

    Of each token its text, and its log-probability when it was sampled, after the updates, and
    under the reference. Reads every completion, those of advantage 0 too.
    """
    batch, problem = group.rollout, group.problem
    updated, ref = torch.zeros_like(batch.mask), torch.zeros_like(batch.mask)  # (G, T)
    with torch.no_grad():
        for rows, chunk in policy.micro_batches(batch, micro_batch_size):
            steps = chunk.mask.shape[1]
            updated[rows, :steps], ref[rows, :steps] = policy(chunk), reference(chunk)
    mask = batch.mask.bool()
    lengths = mask.sum(dim=1)
    numbers = {**group.parts, "advantage": group.advantages}
    numbers |= {"tokens": lengths, "truncated": batch.truncated}
    columns = {"text": batch.texts} | {name: x.tolist() for name, x in numbers.items()}
    ids = [row[kept].tolist() for row, kept in zip(batch.completion_ids, mask, strict=True)]
    known = token_texts(tokenizer, sorted({i for row in ids for i in row}))
    columns["token_texts"] = [[known[i] for i in row] for row in ids]
    scores = batch.sampled_logprobs, updated, ref
    for name, logprobs in zip(LOGPROBS, scores, strict=True):
        rows = [row[kept].tolist() for row, kept in zip(logprobs, mask, strict=True)]
        columns[name] = [[round(logprob, 4) for logprob in row] for row in rows]
    completions = [{name: column[i] for name, column in columns.items()} for i in range(len(ids))]
    return {"question": problem.question, "answer": problem.answer, "completions": completions}


def token_texts(tokenizer, ids: list[int]) -> dict[int, str]:
    """What each token adds to a text. Half a character reads as the replacement character."""
    # Decoded twice in a row: some tokenizers leave out the space of the first token of a text.
    once, twice = (decode(tokenizer, [[i] * times for i in ids]) for times in (1, 2))
    rows = zip(ids, once, twice, strict=True)
    return {i: two[len(one) :] if two.startswith(one) else one for i, one, two in rows}


def fixed_record(problem: Problem, texts: list[str], reward_file: RewardFile) -> dict:
    """The answers to one of the fixed questions, equal ones once, the most frequent first."""
    answers = [
        {
            "text": text,
            "count": count,
            "exact": reward_file.score(text, problem.answer)["exact"] == 1,
        }
        for text, count in Counter(texts).most_common()
    ]
    return {"question": problem.question, "answer": problem.answer, "completions": answers}


def accuracy_summary(scores: list[dict[str, float]]) -> dict:
    """Share of completions with `exact` 1, its 95% interval (`low`, `high`), and mean of each part.

    The score interval of Wilson (1927), which holds near 0 and near 1 too.
    """
    n, z2 = len(scores), 1.96**2
    p = sum(score["exact"] == 1 for score in scores) / n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    margin = math.sqrt(z2 * (p * (1 - p) + z2 / (4 * n)) / n) / (1 + z2 / n)
    return {
        "accuracy": p,
        "low": min(p, max(0.0, centre - margin)),  # at 0 and 1 rounding could pass p
        "high": max(p, min(1.0, centre + margin)),
        "problems": n,
        "parts": {part: fmean(score[part] for score in scores) for part in scores[0]},
    }


def describe(accuracies: dict[str, dict]) -> str:
    """`sampled 36.1% (32.1-40.4), greedy ...`, with the intervals in brackets."""
    return ", ".join(
        f"{name} {100 * s['accuracy']:.1f}% ({100 * s['low']:.1f}-{100 * s['high']:.1f})"
        for name, s in accuracies.items()
    )


def validations(metrics: dict) -> list[dict]:
    return [e for e in metrics["evaluations"] if e["split"] == "validation"]


def best_iteration(metrics: dict) -> int:
    """The iteration with the best sampled validation accuracy, the latest of equals; 0 if none.

    Sampled, because that is what training raises; greedy accuracy jumps.
    """
    found = [(e["accuracies"]["sampled"]["accuracy"], e["iteration"]) for e in validations(metrics)]
    return max(found, default=(0, 0))[1]


def evaluations_without_gain(metrics: dict) -> int:
    """Evaluations since sampled accuracy last rose above the interval of the last such rise."""
    count, high = 0, -1.0
    for sampled in (e["accuracies"]["sampled"] for e in validations(metrics)):
        count += 1
        if sampled["accuracy"] > high:
            count, high = 0, sampled["high"]
    return count


def reason_to_stop(metrics: dict) -> tuple[str, str] | None:
    """(status, reason) if the run should end here, else None."""
    history, settings = metrics["iterations"], metrics["config"]
    skipped = 0
    for iteration in reversed(history):
        skipped += iteration.get("skipped_updates", 0)
        if iteration.get("skipped_updates", 0) < settings["num_inner_updates"]:
            break
    if skipped >= MAX_SKIPPED:
        return "failed", f"{skipped} updates in a row had a loss or gradient that was not finite"
    without_gain, max_kl = evaluations_without_gain(metrics), settings["max_kl"]
    if settings["patience"] and without_gain >= settings["patience"]:
        return "finished", f"{without_gain} evaluations without a gain beyond the interval"
    kl = [m["kl"] for m in history[-WINDOW:] if m["kl"] is not None and math.isfinite(m["kl"])]
    if max_kl and len(history) >= WINDOW and kl and fmean(kl) > max_kl:
        return "finished", f"mean kl of the last {WINDOW} iterations {fmean(kl):.3g} > max_kl"
    if len(history) >= settings["num_iterations"]:
        return "finished", "all iterations done"
    return None


def no_signal(metrics: dict, special_tokens: list[str]) -> str | None:
    """A warning if no group of the last WINDOW iterations had rewards that differ, else None.

    A special token in a truncated completion may be the end token that nobody named.
    """
    recent = metrics["iterations"][-WINDOW:]
    if len(recent) < WINDOW or any(m["frac_zero_std_groups"] < 1 for m in recent):
        return None
    parts = [name for name in recent[-1] if name.startswith("reward_")]
    names = "truncated", "accuracy", "entropy", *parts
    mean = {name: fmean(m[name] for m in recent) for name in names}
    earned = ", ".join(f"{part.removeprefix('reward_')} {mean[part]:.2f}" for part in parts)
    example = metrics["evaluations"][-1]["example"]
    ends = [token for token in special_tokens if token in example["completion"]]
    unnamed = f", or name {ends[0]} as an end token in generation_config.json" if ends else ""
    return (
        f"warning: for {WINDOW} iterations the completions of every group got equal rewards, so"
        " there was nothing to learn from. Likely causes: completions end before the answer"
        f" ({mean['truncated']:.0%} truncated; try a larger --max_new_tokens, or a chat template"
        f" without thinking{unnamed}); the model never answers in the form that the reward asks for"
        f" ({earned}; try --num_examples 3); the task is too hard or too easy"
        f" ({mean['accuracy']:.0%} exact; try other problems); the learning rate is too high and"
        f" entropy is gone ({mean['entropy']:.2f}; try a smaller --learning_rate). At the last"
        f" evaluation it answered {example['question']!r} with {example['completion']!r}"
    )


def time_shares(metrics: dict) -> str:
    """How the seconds of a run divide, in words. Runs of older code did not measure all parts."""
    sampling = sum(m.get("rollout_seconds", 0) for m in metrics["iterations"])
    seconds = {
        "starting": metrics["set_up_seconds"],
        "sampling": sampling,
        "scoring and updating": sum(m["seconds"] for m in metrics["iterations"]) - sampling,
        "evaluating": sum(e.get("seconds", 0) for e in metrics["evaluations"]),
    }
    seconds["logging, files, plots"] = metrics["seconds"] - sum(seconds.values())
    return ", ".join(f"{name} {number:.0f}" for name, number in seconds.items())


def summary(metrics: dict, output: Path) -> str:
    """The results of a run that has ended, its files, and what to do next."""
    history, saved = metrics["iterations"], output / "saved_model"
    kl, memory = [m["kl"] for m in history], metrics.get("peak_memory_mib")
    tests = [describe(e["accuracies"]) for e in metrics["evaluations"] if e["split"] == "test"]
    question = shlex.quote(metrics["evaluations"][0]["example"]["question"])
    model = "" if output == Path(".") else f"--model {shlex.quote(str(saved))} "
    lines = {
        "test accuracy before": tests[0],
        "test accuracy after": tests[-1] if len(tests) > 1 else "not measured",
        "kl": f"{fmean(kl[-100:]):.3f} at the end, {max(kl):.3f} at most",
        "time": f"{metrics['seconds']:.0f} s: {time_shares(metrics)}",
        "memory": f"{memory:.0f} MiB at most" if memory else "unknown",
        "files": f"{output / METRICS_FILE}, with grpo_report.html and grpo_*.png beside it",
        "saved policy": f"{saved}, after iteration {metrics['best_iteration']} (best validation)",
        "next": f"python inference.py {model}{question}",
    }
    command = metrics["environment"]["command"]
    if metrics["status"] == "interrupted":
        lines["to continue"] = command if "--resume" in command else f"{command} --resume"
    if metrics["status"] == "failed":
        lines["next"] = "a smaller --learning_rate or --clip_grad_norm in another --output_dir"
    head = f"\n{metrics['status']} after {len(history)} iterations: {metrics['stop_reason']}"
    return "\n".join([head, *(f"{name:<21} {text}" for name, text in lines.items())])

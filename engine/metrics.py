"""What is recorded: of a batch, of one of its groups, of an evaluation."""

import math
from statistics import fmean

from torch import Tensor

from engine.policy import Rollout


def batch_metrics(
    batch: Rollout, rewards: Tensor, parts: dict[str, Tensor], group: int
) -> dict[str, float]:
    """What the metrics record of a batch; rewards and each of the parts (B*G,)."""
    length = batch.mask.sum(dim=1)  # (B*G,)
    zero_std = (batch.advantages.view(-1, group) == 0).all(dim=1)  # (B,)
    return {
        "reward": rewards.mean().item(),
        **{f"reward_{name}": part.mean().item() for name, part in parts.items()},
        "accuracy": (parts["exact"] == 1).float().mean().item(),
        # Estimated from the samples: the mean of -log p per token.
        "entropy": -(batch.sampled_logprobs.sum(dim=1) / length).mean().item(),
        "truncated": batch.truncated.float().mean().item(),
        "completion_length": length.mean().item(),
        "frac_zero_std_groups": zero_std.float().mean().item(),
    }


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


def completions_record(problem, batch: Rollout, parts: dict[str, Tensor], group: int) -> dict:
    """The first group of a batch, as a line of COMPLETIONS_FILE; parts (B*G,) each, by name."""
    columns = {
        "text": batch.texts,
        **{name: part[:group].tolist() for name, part in parts.items()},
        "advantage": batch.advantages[:group].tolist(),
        "tokens": batch.mask[:group].sum(dim=1).int().tolist(),
        "truncated": batch.truncated[:group].tolist(),
    }
    rows = [{name: column[i] for name, column in columns.items()} for i in range(group)]
    return {"question": problem.question, "answer": problem.answer, "completions": rows}


def describe(accuracies: dict[str, dict]) -> str:
    """`sampled 36.1% (32.1-40.4), greedy ...`, with the intervals in brackets."""
    return ", ".join(
        f"{name} {100 * s['accuracy']:.1f}% ({100 * s['low']:.1f}-{100 * s['high']:.1f})"
        for name, s in accuracies.items()
    )

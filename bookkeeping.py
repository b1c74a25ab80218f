"""A run from outside: begun or resumed, checkpointed, judged by its metrics, brought to an end.

Whatever is decided here is worked out anew from the metrics, never from what this process happens
to remember, so that a resumed run decides as an undisturbed one would, and each of several
processes as the others do. Only that of rank 0 writes.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from tqdm import tqdm

import plot_metrics
import spread
from checkpoint import (
    CHECKPOINTS,
    METRICS_FILE,
    checkpoints_in,
    load_checkpoint,
    read_json,
    restore,
    save_checkpoint,
    write_json,
)
from cli import UserError
from policy import (
    Policy,
    describe_environment,
    fingerprint,
    load_model,
    peak_memory,
    read_source,
    save_model,
)
from rewards import describe

SPAN = 50  # iterations over which a run is judged
MOST_SKIPPED = 10  # updates in a row
# What a resumed run may change, as it changes no weight; all else must be as it was.
FREE = {"output_dir", "resume", "num_iterations", "eval_every", "checkpoint_every"}
FREE |= {"patience", "max_kl"}


def new_metrics(config, model) -> dict:
    """What grpo_metrics.json holds of a run that has not begun."""
    origin = {
        "base_model_crc32": fingerprint(model),
        "model_source": read_source(config.model_name),
    }
    return {
        "config": asdict(config) | {"resume": False},
        "environment": describe_environment(model.device) | origin,
        "status": "running",
        "stop_reason": None,
        "seconds": 0.0,
        "iterations": [],
        "evaluations": [],
    }


def describe_batch(batch, parts: Tensor, advantages: Tensor, end_ids: list[int]) -> dict:
    """What grpo_metrics.json holds of one batch of groups, without its updates.

    batch: a Rollout of B*G completions; parts: (B*G, 3), the weighted parts of their rewards:
    format, near, exact; advantages: (B*G,).
    """
    ids, mask, group = batch.completion_ids, batch.mask, len(batch.mask) // len(batch.prompt_ids)
    length = mask.sum(dim=1)  # (B*G,)
    with_tags, exact = parts[:, 0] > 0, parts[:, 2] > 0
    cut_off = ~torch.isin(ids, torch.tensor(end_ids, device=ids.device)).any(dim=1)
    no_signal = (advantages.view(-1, group) == 0).all(dim=1)  # (B,)
    format_part, near, right = parts.mean(dim=0).tolist()
    return {
        "reward": parts.sum(dim=1).mean().item(),
        "reward_format": format_part,
        "reward_near": near,
        "reward_exact": right,
        "accuracy": exact.float().mean().item(),
        # Estimated from the samples themselves: the mean of -log p, per token.
        "entropy": (-(batch.logprobs * mask).sum(dim=1) / length).mean().item(),
        "wrong_in_tags": (with_tags & ~exact).float().mean().item(),
        "cut_off": cut_off.float().mean().item(),
        "completion_length": length.mean().item(),
        "groups_without_signal": no_signal.float().mean().item(),
    }


def begin(state, config) -> None:
    """Restore `state` from the newest checkpoint, as rank 0 finds it, if asked to and possible."""
    tensors, rest, settings = {}, {}, state.metrics["config"]
    with spread.together():
        if spread.rank() == 0:
            tensors, rest = checkpoint_to_resume(state.metrics, config) or ({}, {})
    tensors, rest = spread.tensors_of_first(tensors), spread.gather(rest)[0]
    if rest:
        with spread.together():
            restore(state, tensors, rest)
        state.metrics["config"] = settings
        print(f"resuming after iteration {len(state.metrics['iterations'])}")


def checkpoint_to_resume(now: dict, config) -> tuple[dict, dict] | None:
    """The newest checkpoint of the run to be resumed, if any, for one whose metrics are `now`.

    UserError where a fresh start would replace an unfinished run, or where settings other than
    FREE, the device or the base model are not those that the run was begun with.
    """
    output = Path(config.output_dir)
    if not config.resume:
        if checkpoints_in(output) and run_status(output) != "finished":
            raise UserError(
                f"{output.resolve()} holds an unfinished run: go on with it by --resume, or choose"
                f" another --output_dir (or give it up by deleting its {CHECKPOINTS}/)"
            )
        return None
    found = load_checkpoint(output)
    if found is None:
        print(f"nothing to resume in {output.resolve()}: starting afresh")
        return None
    then = found[1].get("metrics")
    try:
        pairs = {f"--{n}": (then["config"].get(n), now["config"][n]) for n in now["config"]}
        for name in ("device", "base_model_crc32", "torch", "threads"):
            pairs[name] = then["environment"].get(name), now["environment"][name]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"--resume: {output} holds no checkpoint of train_grpo.py") from error
    other = {n: f"{n} was {a!r}, is {b!r}" for n, (a, b) in pairs.items() if a != b}
    for name in ("torch", "threads"):
        if name in other:
            print(f"note: {other.pop(name)}; the last digits will differ")
    fatal = [text for name, text in other.items() if name.removeprefix("--") not in FREE]
    if fatal:
        raise UserError("--resume: begun with other settings: " + "; ".join(fatal))
    return found


def run_status(output: Path) -> str | None:
    """What the metrics file in `output` says of its run; None if there is none to read."""
    try:
        return read_json(output / METRICS_FILE).get("status")
    except UserError:
        return None


def finished_already(config) -> bool:
    """Whether the run in config.output_dir has ended and these settings give it no more to do."""
    output = Path(config.output_dir)
    if run_status(output) != "finished":
        return False
    ending = reason_to_stop(plot_metrics.read_metrics(output / METRICS_FILE), config)
    if ending:
        print(f"nothing to resume: the run in {output.resolve()} is finished, {ending[1]}")
    return bool(ending)


def validations(metrics: dict) -> list[dict]:
    return [e for e in metrics["evaluations"] if e["split"] == "validation"]


def best_iteration(metrics: dict) -> int:
    """After which iteration validation accuracy was best; the later of equals, -1 if never taken.

    The sampled accuracy, as it is what training raises: the greedy one stands still until the
    likeliest answer changes, and then leaps.
    """
    taken = validations(metrics)[::-1]
    best = max(taken, key=lambda e: e["accuracies"]["sampled"]["accuracy"], default=None)
    return best["iteration"] if best else -1


def evaluations_without_gain(metrics: dict) -> int:
    """Evaluations since the accuracy last rose above the interval of the one that last did."""
    count, high = 0, -1.0
    for sampled in (e["accuracies"]["sampled"] for e in validations(metrics)):
        count += 1
        if sampled["accuracy"] > high:
            count, high = 0, sampled["high"]
    return count


def reason_to_stop(metrics: dict, config) -> tuple[str, str] | None:
    """(status, reason) if the run should end here, None if it should go on."""
    history = metrics["iterations"]
    skipped = 0
    for iteration in reversed(history):  # nothing moves while updates are skipped: all or none are
        skipped += iteration.get("skipped_updates", 0)
        if iteration.get("skipped_updates", 0) < config.num_inner_updates:
            break
    if skipped >= MOST_SKIPPED:
        return "failed", f"{skipped} updates in a row had a loss or gradient that was not finite"
    without_gain = evaluations_without_gain(metrics)
    if config.patience and without_gain >= config.patience:
        return "finished", f"{without_gain} evaluations without a gain beyond the interval"
    kl = [m["kl"] for m in history[-SPAN:] if m["kl"] is not None and math.isfinite(m["kl"])]
    if config.max_kl and len(history) >= SPAN and kl and fmean(kl) > config.max_kl:
        return "finished", f"mean kl of the last {SPAN} iterations {fmean(kl):.3g} > max_kl"
    if len(history) >= config.num_iterations:
        return "finished", "all iterations done"
    return None


def lacks_signal(history: list[dict]) -> bool:
    """Whether no group has given a learning signal for SPAN iterations."""
    recent = history[-SPAN:]
    return len(recent) == SPAN and all(m["groups_without_signal"] == 1 for m in recent)


def no_signal_text(history: list[dict], question: str, completion: str) -> str:
    """What to tell the user of a run that `lacks_signal`."""
    names = "reward_format", "accuracy", "entropy"
    tags, right, entropy = (fmean(m[name] for m in history[-SPAN:]) for name in names)
    return (
        f"warning: for {SPAN} iterations all completions of each group were rewarded alike, so"
        " there was nothing to learn from. Likely causes: the model never writes the tags"
        f" (format reward {tags:.2f}; try --num_examples 3); the task is too hard, or too easy"
        f" ({right:.0%} exact; try another --max_operand); the rate is too high and has ruined the"
        f" policy (entropy {entropy:.2f}; try a smaller --learning_rate). It answers, for example,"
        f" {question!r} with {completion!r}"
    )


class Bookkeeper:
    """Keeps output_dir up to date with a run: metrics, checkpoints, the best policy, plots.

    All processes call it alike, and rank 0 writes.
    """

    def __init__(self, state, config, tokenizer, prompt: dict):
        self.state, self.config, self.tokenizer, self.prompt = state, config, tokenizer, prompt
        self.metrics, self.output = state.metrics, Path(config.output_dir)
        self.history = self.metrics["iterations"]
        self.writes = spread.rank() == 0
        self.kept, self.checkpointed = 0, len(self.history)  # iterations
        self.written = time.monotonic()
        self.started = self.written - self.metrics["seconds"]

    def reason_to_stop(self) -> tuple[str, str] | None:
        return reason_to_stop(self.metrics, self.config)

    def write_metrics(self) -> None:
        self.metrics["seconds"] = time.monotonic() - self.started
        if self.writes:
            write_json(self.output / METRICS_FILE, self.metrics)

    def evaluated(self, iteration: int, split: str, **found: dict) -> None:
        """Record what an evaluation has found, and say how many answers were right."""
        self.metrics["evaluations"].append({"iteration": iteration, "split": split, **found})
        self.metrics["best_iteration"] = best_iteration(self.metrics)
        tqdm.write(f"iteration {iteration:>5}, {split}: {describe(found['accuracies'])}")

    def checkpoint(self) -> None:
        self.metrics["seconds"] = time.monotonic() - self.started
        samplers = torch.cat(spread.gather(self.state.sampler.get_state()))
        if self.writes:
            save_checkpoint(self.state, samplers, self.output)
        self.write_metrics()
        self.checkpointed, self.written = len(self.history), time.monotonic()

    def keep_best(self) -> None:
        """Save the policy if it is the best so far and has not been saved."""
        if self.history and self.metrics["best_iteration"] == len(self.history) != self.kept:
            self.checkpoint()  # first: killed in between, a run saves this model when it resumes
            self.save_policy(self.state.policy)
            self.kept = len(self.history)

    def save_policy(self, policy: Policy) -> None:
        if self.writes:
            save_model(policy.model, self.tokenizer, self.prompt, self.output, self.metrics)

    def best_policy(self) -> Policy:
        """The policy that was best: the last one, the one before training, or the one saved."""
        policy, best = self.state.policy, self.metrics["best_iteration"]
        if best == len(self.history):
            return policy
        if self.writes:
            place = str(self.output / "saved_model") if best else self.config.model_name
            model, _ = load_model(place, policy.model.device)
            policy = Policy(model, policy.compute_dtype)
        spread.broadcast(policy.parameters())  # into those that the others have trained to the end
        return policy

    def after_iteration(self, example: Callable[[], tuple[str, str]]) -> None:
        """Warn and checkpoint as the last iteration asks for; `example` samples a completion."""
        iteration, skipped = len(self.history), self.history[-1]["skipped_updates"]
        if skipped:
            what = "update" if skipped == 1 else "updates"
            tqdm.write(
                f"iteration {iteration}: {skipped} {what} skipped, loss or gradient not finite"
            )
        if lacks_signal(self.history) and "no_signal" not in self.metrics:
            self.metrics["no_signal"] = iteration
            tqdm.write(no_signal_text(self.history, *example()))
        since, every = iteration - self.checkpointed, self.config.checkpoint_every
        late = spread.gather(time.monotonic() - self.written > 120)[0]
        # The very first shows at once whether the disk has room. None is made in trouble.
        if (since >= (every or 25) and (every or late) or iteration == 1) and not skipped:
            self.checkpoint()
        elif iteration % 25 == 0:
            self.write_metrics()

    def finish(self, ending: tuple[str, str], best: Policy) -> None:
        """Leave the files of a run that has ended, and say what came of it."""
        self.metrics |= {"status": ending[0], "stop_reason": ending[1]}
        self.metrics |= peak_memory(best.model.device)
        self.save_policy(best)
        self.write_metrics()
        if self.writes:
            plot_metrics.draw([self.output / METRICS_FILE], self.output)
            plot_metrics.print_summary(self.metrics, self.output)

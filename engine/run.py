"""A run's folder: metrics, checkpoints, the best policy, reasons to stop, resume.

Every decision is computed from the metrics alone, so that a resumed run decides as an uninterrupted
one would, and each of several processes as the others do. Only rank 0 writes.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

from engine import distributed
from engine.checkpoint import (
    CHECKPOINTS,
    COMPLETIONS_FILE,
    METRICS_FILE,
    append_line,
    checkpoints_in,
    cut_lines,
    load_checkpoint,
    read_json,
    restore,
    save_checkpoint,
    write_json,
)
from engine.cli import UserError
from engine.metrics import describe
from engine.models import (
    describe_environment,
    fingerprint,
    load_model,
    peak_memory,
    read_source,
    save_model,
)
from engine.policy import Policy

WINDOW = 50  # iterations over which a run is judged
MAX_SKIPPED = 10  # updates in a row
# Of the environment. Torch and threads may differ, with a note.
COMPARED = ("device", "base_model_crc32", "problems_sha256", "rewards_sha256")
COMPARED += ("policy", "compute_dtype", "torch", "threads")
# Settings that a resumed run may change, because they change no weight (at a constant rate).
FREE = {"output_dir", "resume", "num_iterations", "eval_every", "checkpoint_every", "policy"}
FREE |= {"patience", "max_kl", "log_completions_every"}
FREE |= {"problems", "rewards"}  # their hashes are compared


def run_status(output: Path) -> str | None:
    """The status in the metrics file of `output`; None if there is no such file."""
    try:
        return read_json(output / METRICS_FILE).get("status")
    except UserError:
        return None


def already_finished(settings: dict) -> bool:
    """Whether the run in output_dir has ended and these settings ask for nothing more."""
    output = Path(settings["output_dir"])
    if run_status(output) != "finished":
        return False
    try:
        ending = reason_to_stop(read_json(output / METRICS_FILE) | {"config": settings})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{output / METRICS_FILE} is not a metrics file of train_grpo.py"
        ) from error
    if ending:
        print(f"nothing to resume: the run in {output.resolve()} is finished, {ending[1]}")
    return bool(ending)


def checkpoint_to_resume(now: dict) -> tuple[dict, dict] | None:
    """The newest checkpoint of the run to resume, if any; `now` are the new run's metrics.

    Raises UserError where a fresh start would overwrite an unfinished run, and where settings
    other than FREE, the device, the policy class or the base model differ from the checkpoint's.
    """
    output = Path(now["config"]["output_dir"])
    if not now["config"]["resume"]:
        if checkpoints_in(output) and run_status(output) != "finished":
            raise UserError(
                f"{output.resolve()} holds an unfinished run: continue it with --resume, choose"
                f" another --output_dir, or delete {CHECKPOINTS}/ to give it up"
            )
        return None
    found = load_checkpoint(output)
    if found is None:
        print(f"nothing to resume in {output.resolve()}: starting from the beginning")
        return None
    then = found[1].get("metrics")
    # A falling rate depends on the length of the run.
    free = FREE - {"num_iterations"} if now["config"]["lr_schedule"] == "linear" else FREE
    try:
        pairs = {n: (then["config"].get(n), now["config"][n]) for n in now["config"].keys() - free}
        pairs = {f"--{name}": pair for name, pair in sorted(pairs.items())}
        for name in COMPARED:
            pairs[name] = then["environment"].get(name), now["environment"][name]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"--resume: {output} holds no checkpoint of train_grpo.py") from error
    changed = {n: f"{n} was {a!r}, is {b!r}" for n, (a, b) in pairs.items() if a != b}
    for name in ("torch", "threads"):
        if name in changed:
            print(f"note: {changed.pop(name)}; the last digits will differ")
    if changed:
        raise UserError("--resume: started with other settings: " + "; ".join(changed.values()))
    return found


def validations(metrics: dict) -> list[dict]:
    return [e for e in metrics["evaluations"] if e["split"] == "validation"]


def best_iteration(metrics: dict) -> int:
    """The iteration with the best sampled validation accuracy, the latest of equals; -1 if none.

    Sampled, because that is what training raises; greedy accuracy jumps.
    """
    newest_first = validations(metrics)[::-1]
    best = max(
        newest_first,
        key=lambda e: e["accuracies"]["sampled"]["accuracy"],
        default={"iteration": -1},
    )
    return best["iteration"]


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


def lacks_signal(history: list[dict]) -> bool:
    """Whether no group of the last WINDOW iterations had rewards that differ."""
    recent = history[-WINDOW:]
    return len(recent) == WINDOW and all(m["frac_zero_std_groups"] == 1 for m in recent)


def no_signal_text(history: list[dict], example: dict) -> str:
    """What to tell the user of a run that `lacks_signal`."""
    means = {name: fmean(m[name] for m in history[-WINDOW:]) for name in history[-1]}
    parts = ", ".join(
        f"{name.removeprefix('reward_')} {mean:.2f}"
        for name, mean in means.items()
        if name.startswith("reward_")
    )
    return (
        f"warning: for {WINDOW} iterations the completions of every group got equal rewards, so"
        " there was nothing to learn from. Likely causes: completions end before the answer"
        f" ({means['truncated']:.0%} truncated; try a larger --max_new_tokens, or a chat template"
        " without thinking); the model never answers in the form that the reward asks for"
        f" ({parts}; try --num_examples 3); the task is too hard or too easy"
        f" ({means['accuracy']:.0%} exact;"
        " try other problems); the learning rate is too high and entropy is gone"
        f" ({means['entropy']:.2f}; try a smaller --learning_rate). At the last evaluation it"
        f" answered {example['question']!r}"
        f" with {example['completion']!r}"
    )


class RunLogger:
    """Keeps output_dir up to date: metrics, checkpoints, the best policy. All processes call it."""

    def __init__(self, state, settings: dict):
        """Start a run, or continue the one in output_dir; `state` is a TrainState."""
        with distributed.sync_errors():
            if len(set(distributed.all_gather(state.policy.name))) > 1:
                raise UserError("the processes chose different policies; try --policy plain")
        self.state, self.output = state, Path(settings["output_dir"])
        self.writes = distributed.rank() == 0
        model, problems = state.policy.model, settings["problems"]
        environment = {
            **describe_environment(model.device),
            "policy": state.policy.name,
            "compute_dtype": str(state.policy.compute_dtype),
            "base_model_crc32": fingerprint(model),
            "model_source": read_source(settings["model_name"]),
            "problems_sha256": problems and state.problems.sha256,
            "rewards_sha256": state.rewards.sha256,
        }
        with distributed.sync_errors():
            hashes = [environment[name] for name in ("problems_sha256", "rewards_sha256")]
            if any(other != hashes for other in distributed.all_gather(hashes)):
                raise UserError("the processes read different --problems or --rewards files")
        self.metrics = {
            "config": settings,
            "environment": environment,
            "reward_weights": state.rewards.weights,
            "status": "running",
            "stop_reason": None,
            "seconds": 0.0,
            "iterations": [],
            "evaluations": [],
        }
        self.resume()
        self.metrics["environment"] = environment
        self.metrics["config"] = settings | {"resume": False}
        self.last_saved, self.last_checkpoint = 0, self.iteration
        self.written = time.monotonic()
        self.started = self.written - self.metrics["seconds"]
        print(" ".join(f"{name}={value!r}" for name, value in settings.items()))
        parameters, dtype = model.num_parameters(), state.policy.compute_dtype
        print(f"{parameters:,} parameters on {model.device}, computing in {dtype}")

    def resume(self) -> None:
        tensors, rest = {}, {}
        with distributed.sync_errors():
            if self.writes:
                tensors, rest = checkpoint_to_resume(self.metrics) or ({}, {})
        tensors = distributed.broadcast_checkpoint(tensors)
        rest = distributed.all_gather(rest)[0]
        if rest:
            with distributed.sync_errors():
                restore(self.state, self.metrics, tensors, rest)
            if self.writes:
                cut_lines(self.output / COMPLETIONS_FILE, self.iteration)
            print(f"resuming after iteration {self.iteration}")

    @property
    def iteration(self) -> int:
        return len(self.metrics["iterations"])

    @contextmanager
    def progress_bar(self) -> Iterator[None]:
        total, quiet = self.metrics["config"]["num_iterations"], not self.writes
        with tqdm(total=total, initial=self.iteration, dynamic_ncols=True, disable=quiet) as bar:
            self.bar = bar
            yield

    def validation_due(self) -> bool:
        """Whether validation is due now and has not been done."""
        every = self.metrics["config"]["eval_every"]
        return bool(every) and self.iteration % every == 0 and not self.evaluated("validation")

    def evaluated(self, split: str) -> bool:
        """Whether this split has been evaluated after the current iteration."""
        done = [e["iteration"] for e in self.metrics["evaluations"] if e["split"] == split]
        return bool(done) and done[-1] >= self.iteration

    def log_evaluation(self, iteration: int, split: str, results: dict) -> None:
        """Record the results of an evaluation and print them."""
        self.metrics["evaluations"].append({"iteration": iteration, "split": split, **results})
        self.metrics["best_iteration"] = best_iteration(self.metrics)
        example = results["example"]
        verdict = "right" if example["exact"] else "wrong"
        tqdm.write(
            f"iteration {iteration:>5}, {split}: {describe(results['accuracies'])}; "
            f"{example['question']} {example['completion']!r} ({verdict})"
        )

    def log_iteration(self, metrics: dict) -> None:
        """Record an iteration; warn and checkpoint as its metrics ask for."""
        history = self.metrics["iterations"]
        history.append(metrics)
        recent = {n: fmean(m[n] for m in history[-25:]) for n in ("reward", "accuracy", "kl")}
        self.bar.set_postfix({n: f"{value:.3f}" for n, value in recent.items()}, refresh=False)
        self.bar.update()
        skipped, updates = metrics["skipped_updates"], self.metrics["config"]["num_inner_updates"]
        if skipped:
            tqdm.write(
                f"iteration {self.iteration}: skipped {skipped:.0f} of {updates} updates: loss or"
                " gradient not finite"
            )
        if lacks_signal(history) and "no_signal" not in self.metrics:
            self.metrics["no_signal"] = self.iteration
            tqdm.write(no_signal_text(history, self.metrics["evaluations"][-1]["example"]))
        self.log_completions()
        every = self.metrics["config"]["checkpoint_every"]
        late = distributed.all_gather(time.monotonic() - self.written > 120)[0]
        due = self.iteration - self.last_checkpoint >= (every or 25) and (every or late)
        # The first iteration's shows at once whether the disk has room. None in trouble.
        if (due or self.iteration == 1) and not skipped:
            self.checkpoint()
        elif self.iteration % 25 == 0:
            self.write_metrics()

    def log_completions(self) -> None:
        every = self.metrics["config"]["log_completions_every"]
        file = self.output / COMPLETIONS_FILE
        if self.writes and self.iteration == 1:
            file.unlink(missing_ok=True)  # of an earlier run
        if self.writes and every and self.iteration % every == 0:
            append_line(file, {"iteration": self.iteration, **self.state.last_group})

    def reason_to_stop(self) -> tuple[str, str] | None:
        return reason_to_stop(self.metrics)

    def write_metrics(self) -> None:
        self.metrics["seconds"] = time.monotonic() - self.started
        if self.writes:
            write_json(self.output / METRICS_FILE, self.metrics)

    def checkpoint(self) -> None:
        self.metrics["seconds"] = time.monotonic() - self.started
        generators = torch.cat(distributed.all_gather(self.state.token_rng.get_state()))
        if self.writes:
            save_checkpoint(self.state, self.metrics, generators, self.output)
        self.write_metrics()
        self.last_checkpoint, self.written = self.iteration, time.monotonic()

    def save_best(self) -> None:
        """Save the policy if it is the best so far."""
        if self.iteration and self.metrics["best_iteration"] == self.iteration != self.last_saved:
            self.checkpoint()  # first: if killed in between, a resumed run saves this model
            self.save_policy(self.state.policy)
            self.last_saved = self.iteration

    def save_policy(self, policy: Policy) -> None:
        if self.writes:
            state = self.state
            save_model(policy.model, state.tokenizer, state.prompt, self.output, self.metrics)

    def best_policy(self) -> Policy:
        """The best policy by validation: the last one, the base model, or the one saved."""
        policy, best = self.state.policy, self.metrics["best_iteration"]
        if best == self.iteration:
            return policy
        if self.writes:
            base = self.metrics["config"]["model_name"]
            model, _ = load_model(
                str(self.output / "saved_model") if best else base, policy.model.device
            )
            policy = type(policy)(model, policy.compute_dtype)
        distributed.broadcast_tensors(policy.parameters())
        return policy

    def finish(self, ending: tuple[str, str], best: Policy) -> None:
        """Write the files of a run that has ended with this (status, reason)."""
        self.metrics |= {"status": ending[0], "stop_reason": ending[1]}
        self.metrics |= peak_memory(best.model.device)
        self.save_policy(best)
        self.write_metrics()

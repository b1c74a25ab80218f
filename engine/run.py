"""A run: its folder, log and checkpoints, its best policy, when it stops, how it is resumed.

Only rank 0 writes and prints, but all processes of a run call this code alike.
"""

import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import torch
from filelock import FileLock
from safetensors import SafetensorError
from tqdm import tqdm

from engine import distributed, files
from engine.checkpoint import CHECKPOINTS, restore, save_checkpoint
from engine.files import COMPLETIONS_FILE, METRICS_FILE, UserError
from engine.machine import describe_environment, peak_memory, process_seconds
from engine.metrics import (
    Group,
    best_iteration,
    describe,
    fixed_record,
    group_record,
    no_signal,
    reason_to_stop,
    summary,
)
from engine.models import (
    check_saving,
    fingerprint,
    load_model,
    model_card,
    read_source,
    save_model,
)
from engine.policy import Policy
from engine.problems import RewardFile
from engine.prompt import check_length, encode_prompts
from engine.resume import checkpoint_to_resume

# An error is due to a file of the user's if one of these functions is in its traceback.
FAULTS = {RewardFile.score: "rewards", encode_prompts: "problems", check_length: "problems"}


def evaluation_seed(config, iteration: int) -> int:
    """The seed of all that is asked after an iteration, besides training."""
    return 1_000_003 * (config.seed + 1) + iteration


@contextmanager
def received_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying; a second Ctrl-C kills.

    Further SIGTERMs are collected too: schedulers send one to a process and one to its group.
    """
    received: list[int] = []

    def receive(number: int, frame) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if distributed.rank() == 0:
            print("\nstopping after this iteration; Ctrl-C to stop at once", file=sys.stderr)

    previous = {s: signal.signal(s, receive) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Run:
    """A context manager that owns a run's folder and signals, and an iterator over its iterations.

    `ending` is None while the run goes on, then (status, reason). All processes call the methods
    together: those that log, save or load exchange what the others must know.
    """

    def __init__(self, config, task, learner):
        """Start a run in config.output_dir, or resume the one there. Raises UserError.

        config, task and learner are those of train_grpo.py.
        """
        self.config, self.task, self.learner = config, task, learner
        self.output, self.writes = Path(config.output_dir), distributed.rank() == 0
        self.stop_signal, self.ending = 0, None
        self.fixed = task.problems.held_out("validation", config.eval_problems)[:2]
        self.metrics = self.new_metrics()
        with ExitStack() as stack:
            with distributed.sync_errors():
                if self.writes:
                    stack.enter_context(files.locked_folder(self.output))
            self.received = stack.enter_context(received_signals())
            self.resume()
            saved = learner.policy.model, task.tokenizer, task.prompt, self.output
            distributed.broadcast_object(check_saving, *saved)
            self.keep_generators()
            self.last_saved, self.last_checkpoint = 0, self.iteration
            self.written = time.monotonic()
            set_up = process_seconds()
            self.started = self.written - set_up - self.metrics["seconds"]
            self.metrics["set_up_seconds"] += set_up
            print(" ".join(f"{name}={value!r}" for name, value in asdict(config).items()))
            model, dtype = learner.policy.model, learner.policy.compute_dtype
            print(f"{model.num_parameters():,} parameters on {model.device}, computing in {dtype}")
            self.check_ending()
            self.resources = stack.pop_all()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, trace) -> bool | None:
        codes = [frame.f_code for frame, _ in traceback.walk_tb(trace)]
        faulty = [file for function, file in FAULTS.items() if function.__code__ in codes]
        if faulty and self.iteration:
            self.save_failed(faulty[0], error)
        return self.resources.__exit__(kind, error, trace)

    def save_failed(self, what: str, error: BaseException) -> None:
        """Write a checkpoint of the last whole iteration, to resume from with the file repaired.

        Any process does so, because rank 0 does not learn of it; one after the other.
        """
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        self.metrics |= {"status": "failed", "stop_reason": reason, "failed_in": what}
        problem_rng, token_rng = self.generators
        self.learner.problem_rng.setstate(problem_rng)
        self.writes = True
        with suppress(OSError, SafetensorError), FileLock(self.output / CHECKPOINTS / ".lock"):
            self.count_seconds()
            save_checkpoint(self.learner, self.metrics, token_rng, self.output)
            self.write_metrics()
            checkpoint = self.output.resolve() / CHECKPOINTS / str(self.iteration)
            error.add_note(f"{checkpoint} is intact: repair the --{what} file, rerun with --resume")

    def keep_generators(self) -> None:
        """Remember the generators of the last whole iteration, in case the next one fails."""
        self.generators = self.learner.problem_rng.getstate(), self.learner.token_rng.get_state()

    def new_metrics(self) -> dict:
        """Metrics without iterations. Raises UserError where the processes of a run differ."""
        policy, task = self.learner.policy, self.task
        environment = {
            **describe_environment(policy.model.device),
            "policy": policy.name,
            "compute_dtype": str(policy.compute_dtype),
            "base_model_crc32": fingerprint(policy.model),
            "model_source": read_source(self.config.model_name),
            "problems_sha256": self.config.problems and task.problems.sha256,
            "rewards_sha256": task.reward_file.sha256,
        }
        mine = [environment[n] for n in ("policy", "problems_sha256", "rewards_sha256")]
        with distributed.sync_errors():
            if any(other != mine for other in distributed.all_gather(mine)):
                raise UserError(
                    "the processes chose different policies (name one with --policy), or read"
                    " different --problems or --rewards files"
                )
        return {
            "config": asdict(self.config),
            "environment": environment,
            "reward_weights": task.reward_file.weights,
            "status": "running",
            "stop_reason": None,
            "seconds": 0.0,  # since the process started
            "set_up_seconds": 0.0,  # of them, before the first iteration or evaluation
            "best_iteration": 0,
            "iterations": [],
            "evaluations": [],
        }

    def resume(self) -> None:
        """Go on from the newest checkpoint, if the run is to be resumed and there is one."""
        tensors, state, current = {}, {}, self.metrics
        with distributed.sync_errors():
            if self.writes:
                defaults = asdict(type(self.config)())
                tensors, state = checkpoint_to_resume(current, defaults)
        tensors = distributed.broadcast_checkpoint(tensors)
        state = distributed.all_gather(state)[0]
        if state:
            names = "config", "environment", "status", "stop_reason"
            with distributed.sync_errors():
                restore(self.learner, tensors, state)
            self.metrics = current | state["metrics"] | {n: current[n] for n in names}
            if self.writes:
                files.cut_lines(self.output / COMPLETIONS_FILE, self.iteration)
            print(f"resuming after iteration {self.iteration}")
        self.metrics["config"]["resume"] = False  # as in an uninterrupted run

    @property
    def iteration(self) -> int:
        """How many iterations are done."""
        return len(self.metrics["iterations"])

    def __iter__(self) -> Iterator[int]:
        """Yield the number of iterations done, while the run goes on."""
        self.save()  # a kill may have come between a checkpoint and the best policy
        total = self.config.num_iterations
        progress = {"total": total, "initial": self.iteration, "disable": not self.writes}
        with tqdm(**progress, dynamic_ncols=True) as bar:
            while not self.ending:
                yield self.iteration
                recent = self.metrics["iterations"][-25:]
                means = {n: fmean(m[n] for m in recent) for n in ("reward", "accuracy", "kl")}
                bar.set_postfix({n: f"{mean:.3f}" for n, mean in means.items()}, refresh=False)
                bar.update()
        # Before the last evaluations, which a longer run would not have made.
        if self.iteration and self.ending[0] != "failed":
            self.write_checkpoint()

    def check_ending(self) -> None:
        """Find out, together with the other processes, whether the run ends here."""
        self.stop_signal = max(distributed.all_gather((self.received or [0])[0]))
        interrupted = (
            ("interrupted", signal.Signals(self.stop_signal).name) if self.stop_signal else None
        )
        self.ending = self.ending or interrupted or reason_to_stop(self.metrics)

    @property
    def finished(self) -> bool:
        """Whether the run has ended by a rule of its settings: not by a signal, nor failed."""
        return bool(self.ending) and self.ending[0] == "finished"

    def evaluated(self, split: str) -> bool:
        """Whether this split has been evaluated after the current iteration."""
        done = [e["iteration"] for e in self.metrics["evaluations"] if e["split"] == split]
        return bool(done) and done[-1] >= self.iteration

    def due(self, split: str) -> bool:
        """Whether to evaluate on this split now: before training, and validation every so often."""
        if self.stop_signal or self.evaluated(split):
            return False
        every = self.config.eval_every if split == "validation" else 0
        return self.iteration == 0 or (every > 0 and self.iteration % every == 0)

    def log_evaluation(self, split: str, iteration: int, results: dict) -> None:
        """Record the results of an evaluation and print them."""
        self.metrics["evaluations"].append({"iteration": iteration, "split": split, **results})
        self.metrics["best_iteration"] = best_iteration(self.metrics)
        example = results["example"]
        verdict = "right" if example["exact"] else "wrong"
        tqdm.write(
            f"iteration {iteration:>5}, {split}: {describe(results['accuracies'])}; "
            f"{example['question']} {example['completion']!r} ({verdict})"
        )
        self.check_ending()

    def logs_group(self, iteration: int) -> bool:
        """Whether this process logs a group of an iteration: rank 0 the first, and every so often.

        With 0 as the setting, about 30 in a run. A resumed run logs those of an uninterrupted one.
        """
        every = self.config.log_completions_every or max(1, round(self.config.num_iterations / 30))
        return self.writes and every > 0 and (iteration == 1 or iteration % every == 0)

    def ask_fixed(self, answer_questions: Callable) -> list[dict]:
        """If the next iteration is logged, ask two validation questions 16 times each.

        They show the policy that is about to sample, always on the same questions. The generator is
        its own, so that logging changes nothing in the training. A reward file that fails here
        costs no iteration: the policy has not been updated yet.
        """
        if not self.logs_group(self.iteration + 1):
            return []
        seed = evaluation_seed(self.config, self.iteration)
        rng, task = torch.Generator().manual_seed(seed), self.task
        asked = [problem.question for problem in self.fixed for _ in range(16)]
        texts = answer_questions(self.learner.policy, task.tokenizer, task.prompt, asked, rng)
        return [
            fixed_record(problem, texts[16 * i : 16 * (i + 1)], task.reward_file)
            for i, problem in enumerate(self.fixed)
        ]

    def log_iteration(self, results: dict, group: Group, fixed: list[dict]) -> None:
        """Record an iteration and, every so often, its first group; warn as the metrics ask for.

        fixed: what `ask_fixed` returned before the iteration.
        """
        self.metrics["iterations"].append(results)
        self.keep_generators()
        skipped, updates = results["skipped_updates"], self.config.num_inner_updates
        if skipped:
            text = f"skipped {skipped:.0f} of {updates} updates: loss or gradient not finite"
            tqdm.write(f"iteration {self.iteration}: {text}")
        warning = no_signal(self.metrics, self.task.tokenizer.all_special_tokens)
        if warning and "no_signal" not in self.metrics:
            self.metrics["no_signal"] = self.iteration
            tqdm.write(warning)
        file, learner = self.output / COMPLETIONS_FILE, self.learner
        if self.writes and self.iteration == 1:
            file.unlink(missing_ok=True)  # of an earlier run
        if self.logs_group(self.iteration):
            inputs = group, learner.policy, learner.reference, self.task.tokenizer
            record = group_record(*inputs, self.config.micro_batch_size)
            files.append_line(file, {"iteration": self.iteration, **record, "fixed": fixed})
        self.check_ending()

    def save(self) -> None:
        """Write a checkpoint if one is due, and the policy if it is the best so far.

        Due every `checkpoint_every`; by default after 25 iterations, but no sooner than 2 minutes.
        """
        if not self.iteration:
            return
        best = self.metrics["best_iteration"] == self.iteration != self.last_saved
        every = self.config.checkpoint_every
        late = distributed.all_gather(time.monotonic() - self.written > 120)[0]
        new = self.iteration - self.last_checkpoint
        regular = new >= (every or 25) and (every or late)
        healthy = not self.metrics["iterations"][-1]["skipped_updates"]
        # The first iteration's shows early whether the disk has room.
        if best or (healthy and (regular or new == self.iteration == 1)):
            self.write_checkpoint()
        elif self.iteration % 25 == 0:
            self.write_metrics()
        if best:  # after the checkpoint: if killed in between, a resumed run saves this policy
            self.save_policy(self.learner.policy)
            self.last_saved = self.iteration

    def count_seconds(self) -> None:
        self.metrics["seconds"] = time.monotonic() - self.started

    def write_checkpoint(self) -> None:
        self.count_seconds()
        generators = torch.cat(distributed.all_gather(self.learner.token_rng.get_state()))
        if self.writes:
            save_checkpoint(self.learner, self.metrics, generators, self.output)
        self.write_metrics()
        self.last_checkpoint, self.written = self.iteration, time.monotonic()

    def write_metrics(self) -> None:
        self.count_seconds()
        if self.writes:
            files.write_json(self.output / METRICS_FILE, self.metrics)

    def save_policy(self, policy: Policy) -> None:
        if self.writes:
            task, card = self.task, model_card(self.metrics)
            save_model(policy.model, task.tokenizer, task.prompt, self.output, card)

    def load_best(self) -> Policy:
        """The best policy by validation: the last one, the base model, or the one saved.

        On ranks above 0 its weights replace those of the last policy.
        """
        policy, best = self.learner.policy, self.metrics["best_iteration"]
        if best == self.iteration:
            return policy
        if self.writes:
            source = str(self.output / "saved_model") if best else self.config.model_name
            model, _ = load_model(source, policy.model.device)
            policy = type(policy)(model, policy.compute_dtype)
        distributed.broadcast_tensors(policy.parameters())
        return policy

    def finish(self, best: Policy, draw: Callable[[list[Path], Path], None]) -> int:
        """Save the best policy, `draw` the metrics file, print the summary; the exit code.

        A run that ended before its first iteration leaves the files of an earlier run alone.
        """
        status, reason = self.ending
        if self.iteration:
            self.metrics |= {"status": status, "stop_reason": reason}
            self.metrics |= peak_memory(best.model.device)
            self.save_policy(best)
            self.write_metrics()
            if self.writes:
                draw([self.output / METRICS_FILE], self.output)
                self.write_metrics()  # with the seconds that plots took
                print(summary(self.metrics, self.output))
        return {"finished": 0, "failed": 1}.get(status, 128 + self.stop_signal)

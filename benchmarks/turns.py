"""This loop and TRL's, each in a process of its own, computing in turns."""

import time
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from statistics import fmean
from tempfile import mkdtemp
from typing import NamedTuple

import transformers

from benchmarks.common import CPU, Work, memory, never_end, start
from engine.files import UserError
from engine.machine import tune_memory
from engine.metrics import describe
from engine.models import load_model
from engine.policy import Policy
from examples import bridge
from train_grpo import Config, Task, evaluate, load_task, train_iteration


class Turn(NamedTuple):
    """How long a loop may run: until it has used up either of these."""

    iterations: float
    seconds: float = float("inf")
    evaluate: bool = False


class Turns:
    """A loop's end of the pipe: lets it run turn by turn, and reports on each.

    `lengths` are the mean completion lengths of its iterations so far.
    """

    def __init__(self, pipe: Connection, policy: Policy, task: Task, lengths: list[float]):
        self.pipe, self.policy, self.task, self.lengths = pipe, policy, task, lengths
        self.turn, self.samples, self.started = Turn(0), [], None

    def next_iteration(self) -> bool:
        """To be called before each iteration: waits for a turn; False when there are no more."""
        now = time.perf_counter()
        if self.started is not None:
            self.samples.append(now - self.started)
        while len(self.samples) >= self.turn.iterations or sum(self.samples) >= self.turn.seconds:
            report = {"samples": self.samples, "lengths": self.lengths, "memory": memory()}
            if self.turn.evaluate:
                count = Config.eval_problems
                report |= evaluate(self.policy, self.task, "test", count, seed=0)
            self.pipe.send(report)
            busy = time.process_time()
            self.turn, self.samples = self.pipe.recv(), []
            if self.turn is None:
                return False
            assert time.process_time() - busy < 0.5, "it computed out of turn"
        self.started = time.perf_counter()
        return True


def run_ours(work: Work, pipe: Connection) -> None:
    (task, learner), lengths = start(work), []
    turns = Turns(pipe, learner.policy, task, lengths)
    while turns.next_iteration():
        metrics, _ = train_iteration(task, learner, work.config)
        lengths.append(metrics["completion_length"])


def run_trl(work: Work, pipe: Connection) -> None:
    trainer = make_trainer(work)
    task = Task(trainer.processing_class, *load_task(work.config))
    lengths = trainer._metrics["train"]["completions/mean_length"]
    turns = Turns(pipe, Policy(trainer.model), task, lengths)

    class TakeTurns(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            control.should_training_stop = not turns.next_iteration()

        def on_step_end(self, args, state, control, **_):
            if state.global_step % work.config.num_inner_updates == 0:
                control.should_training_stop = not turns.next_iteration()

    trainer.add_callback(TakeTurns())
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


def run_plain(work: Work, pipe: Connection) -> None:
    run_ours(replace(work, config=replace(work.config, policy="plain")), pipe)


LOOPS = {"ours": run_ours, "plain": run_plain, "trl": run_trl}


def make_trainer(work: Work):
    """TRL's trainer with the settings of a work, and nothing that slows it down needlessly.

    It keeps freed memory, in large pages, as this loop does.
    """
    tune_memory()
    model, tokenizer = load_model(work.config.model_name, CPU)
    if work.endless:
        never_end(model, tokenizer)
    if work.config.dtype == "bfloat16":
        model.set_attn_implementation("eager")  # faster than fused on a CPU
    task = Task(tokenizer, *load_task(work.config))
    changes = {"max_steps": 10**9, "logging_strategy": "no", "disable_tqdm": True}
    return bridge.make_trainer(work.config, task, model, changes | {"output_dir": mkdtemp()})


def take_turns(
    work: Work, rounds: list[Turn], loops: tuple[str, ...] = ("ours", "trl")
) -> dict[str, list[dict]]:
    """Let these loops take each of these turns. Returns the reports of each turn, by loop."""
    context, pipes, reports = get_context("spawn"), {}, {loop: [] for loop in loops}

    def receive(loop: str) -> dict:
        try:
            return pipes[loop].recv()
        except EOFError:
            raise UserError(f"the process of {loop} has failed; its error is above") from None

    for loop in loops:
        pipes[loop], theirs = context.Pipe()
        context.Process(target=LOOPS[loop], args=(work, theirs), daemon=True).start()
        theirs.close()
        receive(loop)  # it is set up
    for number, turn in enumerate(rounds):
        for loop in loops:
            pipes[loop].send(turn)
            report = receive(loop)
            reports[loop].append(report)
            text = f"{len(report['samples'])} iterations"
            if report["samples"]:
                text += f", {fmean(report['samples']):.3f} s each"
            if turn.evaluate:
                text += f", {describe(report['accuracies'])}"
            print(f"round {number}, {loop}: {text}", flush=True)
    for pipe in pipes.values():
        pipe.send(None)
    return reports

"""This loop and TRL's, each in a process of its own, computing in turns."""

import random
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
import transformers

from benchmarks.common import Work, load, memory, start
from cli import UserError
from policy import Policy
from rewards import describe
from task import held_out_problems, training_problems
from train_grpo import Config, evaluate, reward_function, train_iteration

LOOPS = ("ours", "trl")


class Turn(NamedTuple):
    """How long a loop may run: until it has made or used up one of these."""

    iterations: int
    seconds: float = float("inf")
    evaluate: bool = False


class Turns:
    """A loop's side of the pipe: lets it run turn by turn, and reports on each."""

    def __init__(self, pipe: Connection, report: Callable[[bool], dict]):
        self.pipe, self.report = pipe, report
        self.turn, self.samples, self.started = Turn(0), [], None

    def go_on(self) -> bool:
        """To be called before each iteration: waits for a turn; False when there are no more."""
        now = time.perf_counter()
        if self.started is not None:
            self.samples.append(now - self.started)
        while len(self.samples) >= self.turn.iterations or sum(self.samples) >= self.turn.seconds:
            done = {"samples": self.samples, "peak_memory_mib": memory()}
            self.pipe.send({**done, **self.report(self.turn.evaluate)})
            busy = time.process_time()
            self.turn, self.samples = self.pipe.recv(), []
            if self.turn is None:
                return False
            assert time.process_time() - busy < 0.5, "it computed out of turn"
        self.started = time.perf_counter()
        return True


def run_ours(work: Work, pipe: Connection) -> None:
    inputs = start(work)
    state, _, tokenizer, prompt, config = inputs
    lengths = []

    def report(wanted: bool) -> dict:
        return {"lengths": lengths, **measure(wanted, state.policy, tokenizer, prompt, config)}

    turns = Turns(pipe, report)
    while turns.go_on():
        lengths.append(train_iteration(*inputs)["completion_length"])


def run_trl(work: Work, pipe: Connection, weights: str, attention: str) -> None:
    model, tokenizer, prompt = load(work)
    model.to(getattr(torch, weights)).set_attn_implementation(attention)
    trainer = make_trainer(work, model, tokenizer, prompt)
    judge = Policy(load(work)[0]) if not work.endless else None

    def report(wanted: bool) -> dict:
        if wanted:
            judge.model.load_state_dict(trainer.model.state_dict())
        lengths = trainer._metrics["train"]["completions/mean_length"]
        return {"lengths": lengths, **measure(wanted, judge, tokenizer, prompt, work.config)}

    turns = Turns(pipe, report)

    class TakeTurns(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            control.should_training_stop = not turns.go_on()

        def on_step_end(self, args, state, control, **_):
            if state.global_step % work.config.num_inner_updates == 0:
                control.should_training_stop = not turns.go_on()

    trainer.add_callback(TakeTurns())
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


def make_trainer(work: Work, model, tokenizer, prompt: dict):
    """TRL's trainer with the settings of a work, and nothing that costs time without need."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = work.config
    problems = training_problems(20_000, random.Random(config.seed), config)
    chat = [{"role": "system", "content": prompt["system"]}]
    rows = [
        {"prompt": [*chat, {"role": "user", "content": p.question}], "answer": p.answer}
        for p in problems
    ]

    def reward(completions: list, answer: list[int], **_) -> list[float]:
        return reward_function([c[0]["content"] for c in completions], answer).sum(dim=1).tolist()

    settings = GRPOConfig(
        output_dir=str(Path(work.model).parent / "never_written"),
        # the work
        per_device_train_batch_size=config.batch_size * config.num_generations,
        num_generations=config.num_generations,
        num_iterations=config.num_inner_updates,
        max_completion_length=config.max_new_tokens,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=config.clip_grad_norm,
        beta=config.beta,
        epsilon=config.epsilon,
        loss_type="grpo",
        scale_rewards="group",
        use_bias_correction_kl=False,
        seed=config.seed,
        bf16=work.dtype == torch.bfloat16,  # autocast
        # as fast as it can be had on a CPU
        use_cpu=True,
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        disable_dropout=True,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        max_steps=10**9,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def measure(wanted: bool, policy: Policy, tokenizer, prompt: dict, config: Config) -> dict:
    """Accuracy on the test problems, if wanted."""
    if not wanted:
        return {}
    problems = held_out_problems("test", config.eval_problems, config)
    return {"accuracies": evaluate(policy, tokenizer, prompt, problems, config, seed=0)}


def take_turns(work: Work, rounds: list[dict[str, Turn]], trl: dict[str, str]) -> dict[str, list]:
    """Run both loops in turn; `trl` names TRL's weights' type and its attention.

    Returns the reports of each; the first is of its set-up.
    """
    context, pipes, reports = get_context("spawn"), {}, {loop: [] for loop in LOOPS}

    def hear(loop: str) -> dict:
        try:
            reports[loop].append(pipes[loop].recv())
        except EOFError:
            raise UserError(f"the process of {loop} has failed; its last words are above") from None
        return reports[loop][-1]

    for loop in LOOPS:
        pipes[loop], theirs = context.Pipe()
        run, options = (run_ours, {}) if loop == "ours" else (run_trl, trl)
        arguments = (work, theirs)
        context.Process(target=run, args=arguments, kwargs=options, daemon=True).start()
        theirs.close()
        hear(loop)
    for number, turns in enumerate(rounds):
        for loop, turn in turns.items():
            pipes[loop].send(turn)
            done = hear(loop)
            what = f"{len(done['samples'])} iterations"
            if done["samples"]:
                what += f", {fmean(done['samples']):.3f} s each"
            if turn.evaluate:
                what += f", {describe(done['accuracies'])}"
            print(f"round {number}, {loop}: {what}", flush=True)
    for pipe in pipes.values():
        pipe.send(None)
    return reports

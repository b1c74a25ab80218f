"""Time this loop and TRL's GRPOTrainer side by side: the same model, problems and settings.

    python benchmarks/vs_trl.py                    # the bundled model, float32
    python benchmarks/vs_trl.py --shape 135m       # SmolLM2-135M's shape, random, bfloat16 compute
    python benchmarks/vs_trl.py --accuracy True    # test accuracy against seconds of training

Writes vs_trl.json, vs_trl_135m.json or vs_trl_accuracy.json and .png here, or to --output.

Each loop lives in a process of its own, so that peak memory is its own too. They take turns, many
times, and never compute at once: what disturbs the machine disturbs both. An iteration is one batch
of groups and all its updates. Both compute in the same precision on float32 weights, with fused
AdamW and the same attention kernels. TRL runs without what would slow it down here: gradient
checkpointing, logging, saving, progress bars.
"""

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import (
    HERE,
    SMOLLM2,
    Work,
    in_own_process,
    load,
    memory,
    start,
    write_random_model,
    write_result,
)
from cli import Parser, UserError, check_ranges, exit_code, setting
from plot_metrics import COLOURS, plt, save_figure
from policy import Policy
from rewards import describe
from task import held_out_problems, training_problems
from train_grpo import PRESETS, Config, evaluate, reward_function, train_iteration

LOOPS = ("ours", "trl")


@dataclass
class Settings:
    shape: Literal["bundled", "135m"] = setting("bundled", "the model; 135m has random weights")
    accuracy: bool = setting(False, "train both for --seconds each and watch the test accuracy")
    rounds: int = setting(0, "turns that each loop takes; 0 is 8, or 2 for 135m", 0)
    iterations: int = setting(0, "of ours per turn; 0 is 20, or 3 for 135m", 0)
    trl_iterations: int = setting(0, "of TRL's per turn; 0 is 4, or 1 for 135m", 0)
    warmup: int = setting(-1, "iterations before the first turn; -1 is 2, or none for 135m", -1)
    seconds: int = setting(120, "with --accuracy: seconds of training for each loop", 1)
    trl_weights: Literal["float32", "bfloat16"] = setting(
        "float32", "bfloat16: TRL as it is often run, which is no longer the same precision"
    )
    output: str = setting("", "result file; by default it goes beside this script")


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


def run_ours(work: Work, pipe: Connection, **_) -> None:
    inputs = start(work)
    state, _, tokenizer, prompt, config = inputs
    lengths = []

    def report(wanted: bool) -> dict:
        return {"lengths": lengths, **measure(wanted, state.policy, tokenizer, prompt, config)}

    turns = Turns(pipe, report)
    while turns.go_on():
        lengths.append(train_iteration(*inputs)["completion_length"])


def run_trl(work: Work, pipe: Connection, trl_weights: str) -> None:
    model, tokenizer, prompt = load(work)
    trainer = make_trainer(work, model.to(getattr(torch, trl_weights)), tokenizer, prompt)
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


def worker(loop: str, work: Work, pipe: Connection, trl_weights: str) -> None:
    """The process of one loop."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    {"ours": run_ours, "trl": run_trl}[loop](work, pipe, trl_weights=trl_weights)


def take_turns(work: Work, rounds: list[dict[str, Turn]], trl_weights: str) -> dict[str, list]:
    """Run both loops in turn. Returns the reports of each; the first is of its set-up."""
    context, pipes, reports = get_context("spawn"), {}, {loop: [] for loop in LOOPS}

    def hear(loop: str) -> dict:
        try:
            reports[loop].append(pipes[loop].recv())
        except EOFError:
            raise UserError(f"the process of {loop} has failed; its last words are above") from None
        return reports[loop][-1]

    for loop in LOOPS:
        pipes[loop], theirs = context.Pipe()
        arguments = (loop, work, theirs, trl_weights)
        context.Process(target=worker, args=arguments, daemon=True).start()
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


def compare_speed(settings: Settings, work: Work) -> dict:
    """Seconds per iteration and peak memory of both loops, and the ratio of the former."""
    large = settings.shape == "135m"
    count = settings.rounds or (2 if large else 8)
    warmup = (0 if large else 2) if settings.warmup < 0 else settings.warmup
    turns = {
        "ours": Turn(settings.iterations or (3 if large else 20)),
        "trl": Turn(settings.trl_iterations or (1 if large else 4)),
    }
    rounds = [dict.fromkeys(LOOPS, Turn(warmup))] if warmup else []
    reports = take_turns(work, rounds + [turns] * count, settings.trl_weights)
    result = {}
    for loop, (ready, *played) in reports.items():
        lengths = set(played[-1]["lengths"])
        assert lengths == {work.config.max_new_tokens}, f"{loop}: completions of {lengths} tokens"
        samples = [turn["samples"] for turn in played[-count:]]
        result[loop] = {
            "seconds": median(seconds for turn in samples for seconds in turn),
            "peak_memory_mib": played[-1]["peak_memory_mib"],
            "memory_after_setup_mib": ready["peak_memory_mib"],
            "completion_length": work.config.max_new_tokens,
            "rounds": samples,
        }
    result["ratio"] = result["trl"]["seconds"] / result["ours"]["seconds"]
    pairs = zip(result["ours"]["rounds"], result["trl"]["rounds"], strict=True)
    result["ratio_by_round"] = [median(theirs) / median(ours) for ours, theirs in pairs]
    for loop in LOOPS:
        seconds, peak = result[loop]["seconds"], result[loop]["peak_memory_mib"]
        print(f"{loop:>4}: {seconds:.3f} s per iteration, peak memory {peak:.0f} MiB")
    low, high = min(result["ratio_by_round"]), max(result["ratio_by_round"])
    print(f"TRL takes {result['ratio']:.1f} times as long ({low:.1f} to {high:.1f} by round)")
    return result


def compare_accuracy(settings: Settings, work: Work, picture: Path) -> dict:
    """Test accuracy of both loops after equal times of training; evaluating is not counted."""
    count = settings.rounds or 8
    rounds = [dict.fromkeys(LOOPS, Turn(0, evaluate=True))]
    turn = Turn(10**9, settings.seconds / count, evaluate=True)
    reports = take_turns(work, rounds + [dict.fromkeys(LOOPS, turn)] * count, settings.trl_weights)
    result = {}
    for loop, (_, *played) in reports.items():
        seconds, iterations, result[loop] = 0.0, 0, []
        for turn in played:
            seconds, iterations = seconds + sum(turn["samples"]), iterations + len(turn["samples"])
            point = {"seconds": seconds, "iterations": iterations}
            result[loop].append({**point, "accuracies": turn["accuracies"]})
    draw(result, picture)
    print(f"wrote {picture}")
    return result


def draw(result: dict, picture: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained", sharey=True)
    for axes, kind in zip(panels, ("sampled", "greedy"), strict=True):
        for loop, colour in zip(LOOPS, COLOURS, strict=False):
            x = [point["seconds"] for point in result[loop]]
            points = [point["accuracies"][kind] for point in result[loop]]
            label = {"ours": "this loop", "trl": "TRL"}[loop]
            axes.plot(x, [p["accuracy"] for p in points], "o-", color=colour, label=label, ms=4)
            low, high = [p["low"] for p in points], [p["high"] for p in points]
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set(xlabel="seconds of training", title=f"{kind} answers", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of exact answers, test")
    panels[0].legend(loc="lower right")
    save_figure(figure, picture)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(Settings, description=__doc__.split("\n")[0], allow_abbrev=False)
    settings = Settings(**vars(parser.parse_args(sys.argv[1:] if argv is None else argv)))
    check_ranges(settings)
    name = "accuracy" if settings.accuracy else settings.shape
    name = "vs_trl" if name == "bundled" else f"vs_trl_{name}"
    output = Path(settings.output or HERE / f"{name}.json")
    with TemporaryDirectory() as folder:
        work = Work()
        if settings.accuracy:
            # The preset's recipe, whose KL term is TRL's, on its own range of operands.
            work = Work(endless=False, config=Config(**PRESETS["tiny"]))
            result = compare_accuracy(settings, work, output.with_suffix(".png"))
        else:
            if settings.shape == "135m":
                model = in_own_process(write_random_model, Path(folder) / "model", SMOLLM2)
                work = replace(work, model=model, dtype=torch.bfloat16, prompt_tokens=82)
            result = compare_speed(settings, work)
    chosen = {"work": work.describe(), "trl_weights": settings.trl_weights}
    write_result(output, {**chosen, **result})
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""What the benchmarks share: what is trained, its memory, settings and result files."""

import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Literal
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import train_grpo
from engine.cli import Parser, check_settings, setting
from engine.files import write_json
from engine.machine import describe_environment, peak_memory
from engine.models import model_folder
from engine.policy import Rollout
from train_grpo import Config, Learner, Task

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Work:
    """What a loop has to train."""

    config: Config
    endless: bool = False  # no completion ends before max_new_tokens

    def describe(self) -> dict:
        """The work as a result file records it."""
        model = Path(self.config.model_name).name  # a random model is in a temporary folder
        return asdict(self.config) | {"model_name": model, "endless": self.endless}


# k3, because TRL has no other KL term.
SHARED = {"device": "cpu", "kl_estimator": "k3"}
BUNDLED = {"batch_size": 6, "num_generations": 16, "num_inner_updates": 2, "learning_rate": 2e-5}
# The reference recipe, with worked examples: without them SmolLM2 never writes the tags.
SMOLLM2 = {"dtype": "bfloat16", "num_examples": 3}
WORKS = {
    "bundled": Work(Config(model_name="tiny_model", **SHARED, **BUNDLED)),
    "smollm2": Work(Config(model_name="models/SmolLM2-135M-Instruct", **SHARED, **SMOLLM2)),
}


@dataclass
class ModelSettings:
    """Settings of a benchmark that runs on either model."""

    model: Literal["bundled", "smollm2"] = setting("bundled", "the model and its recipe")
    output: str = setting("", "result file; by default it goes beside this script")

    def result_file(self, name: str, ending: str = "") -> Path:
        """`output`; by default {name}{ending}.json here, with the model's name if not bundled."""
        model = "" if self.model == "bundled" else f"_{self.model}"
        return Path(self.output or HERE / f"{name}{model}{ending}.json")


def read_settings(settings: type, description: str, argv: list[str] | None):
    """A benchmark's settings from its command line. Raises UserError."""
    parser = Parser(settings, description=description.split("\n")[0], allow_abbrev=False)
    found = settings(**vars(parser.parse_args(argv)))
    check_settings(found)
    return found


def write_random_model(source: str, folder: Path, **changes) -> str:
    """Write an untrained model like `source`, with these changes to its config."""
    config = AutoConfig.from_pretrained(model_folder(source), **changes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder(source)).save_pretrained(folder)
    return str(folder)


def worst_case(work: Work, folder: Path, **changes) -> Work:
    """The same work with random weights and no end token; `changes` to the model's config.

    All completions have full length and share next to nothing.
    """
    model = write_random_model(work.config.model_name, folder / "random", **changes)
    return Work(replace(work.config, model_name=model), endless=True)


def never_end(model, tokenizer) -> None:
    """Make the end token one that the model cannot sample."""
    tokenizer.add_special_tokens({"eos_token": "<|never|>"})
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert tokenizer.eos_token_id >= model.config.vocab_size


def start(work: Work) -> tuple[Task, Learner]:
    """Set up a training as train_grpo.py does, silently."""
    with redirect_stdout(None):
        task, learner = train_grpo.set_up(work.config)
    if work.endless:
        never_end(learner.policy.model, task.tokenizer)
    return task, learner


@contextmanager
def recorded_rollouts() -> Iterator[list[Rollout]]:
    """Collect the rollouts of the iterations inside."""
    rollouts, original = [], train_grpo.rollout

    def record(*arguments):
        rollouts.append(original(*arguments))
        return rollouts[-1]

    with patch.object(train_grpo, "rollout", record):
        yield rollouts


def time_phases(work: Work, iterations: int) -> tuple[Learner, Rollout, dict, dict[str, float]]:
    """Repeat one iteration, with learning rate 0.

    Returns the learner, the last rollout and its metrics, and median seconds by phase.
    """
    config = replace(work.config, learning_rate=0.0)
    (task, learner), seconds, history = start(replace(work, config=config)), Counter(), []

    def clock() -> float:
        if learner.policy.model.device.type == "cuda":
            torch.cuda.synchronize()  # the GPU computes while Python goes on
        return time.perf_counter()

    def timed(owner, name: str, phase: str):
        original = getattr(owner, name)

        def call(*arguments, **options):
            reference = phase == "forward" and not torch.is_grad_enabled()
            started = clock()
            result = original(*arguments, **options)
            seconds["reference" if reference else phase] += clock() - started
            return result

        return patch.object(owner, name, call)

    with ExitStack() as stack:
        rollouts = stack.enter_context(recorded_rollouts())
        stack.enter_context(timed(train_grpo, "rollout", "rollout"))
        stack.enter_context(timed(type(learner.policy), "forward", "forward"))
        stack.enter_context(timed(torch.Tensor, "backward", "backward"))
        stack.enter_context(timed(learner.optimizer, "step", "optimizer"))
        for _ in range(iterations + 1):
            seconds.clear()
            learner.problem_rng.seed(config.seed)
            learner.token_rng.manual_seed(config.seed)
            started = clock()
            metrics, _ = train_grpo.train_iteration(task, learner, config)
            total = clock() - started
            history.append({**seconds, "other": total - seconds.total(), "all": total})
    phases = {name: median(once[name] for once in history[1:]) for name in history[0]}
    return learner, rollouts[-1], metrics, phases


def memory() -> float:
    """Peak memory of this process in MiB."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory(CPU)["peak_memory_mib"]
    # Not getrusage: on Linux a new process starts from its parent's peak there.
    return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 2**10


def write_result(path: Path, result: dict, device: torch.device = CPU) -> None:
    """Write a result as JSON, with the date and the machine."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    machine = {**describe_environment(device), "cpu": found[1] if found else None}
    with suppress(PackageNotFoundError):
        machine["trl"] = version("trl")
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"date": date, "environment": machine, **result})
    print(f"wrote {path}")

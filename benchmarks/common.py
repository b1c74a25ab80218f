"""What the benchmarks share: the work they time, its memory, and how results are written."""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import train_grpo
from engine import distributed
from engine.checkpoint import prepare_output_dir, write_json
from engine.cli import Parser, check_ranges
from engine.models import describe_environment, model_folder, peak_memory
from engine.policy import Rollout
from train_grpo import Config, TrainState

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")


@dataclass
class Work:
    """What a loop has to train."""

    config: Config
    endless: bool = False  # nothing ends a completion before max_new_tokens

    def describe(self) -> dict:
        """The work as a result file records it."""
        model = Path(self.config.model_name).name  # a random model lies in a temporary folder
        return asdict(self.config) | {"model_name": model, "endless": self.endless}


# k3, because TRL has no other KL term.
WORKS = {
    "bundled": Work(
        Config(
            model_name="tiny_model",
            device="cpu",
            batch_size=6,
            num_generations=16,
            num_inner_updates=2,
            learning_rate=2e-5,
            kl_estimator="k3",
        )
    ),
    # The reference recipe, asked with worked examples: without them it never writes the tags.
    "smollm2": Work(
        Config(
            model_name="models/SmolLM2-135M-Instruct",
            device="cpu",
            dtype="bfloat16",
            num_examples=3,
            kl_estimator="k3",
        )
    ),
}


def worst_case(work: Work, folder: Path) -> Work:
    """The same work with random weights and no end token.

    All completions have full length and next to nothing in common.
    """
    model = write_random_model(work.config.model_name, folder / "random")
    return Work(replace(work.config, model_name=model), endless=True)


def write_random_model(source: str, folder: Path, **changes) -> str:
    """Write an untrained model like `source`, apart from these changes to its config."""
    config = AutoConfig.from_pretrained(model_folder(source), **changes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder(source)).save_pretrained(folder)
    return str(folder)


def never_end(model, tokenizer) -> None:
    """Make the end token one that the model cannot sample."""
    tokenizer.add_special_tokens({"eos_token": "<|never|>"})
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert tokenizer.eos_token_id >= model.config.vocab_size


def start(work: Work) -> TrainState:
    """Set up a training as train_grpo.py does, silently."""
    with redirect_stdout(None):
        state = train_grpo.set_up(work.config)
    state.learner = distributed.wrap_ddp(state.policy)
    if work.endless:
        never_end(state.policy.model, state.tokenizer)
    return state


@contextmanager
def recorded_rollouts() -> Iterator[list[Rollout]]:
    """Collect the rollouts of the iterations inside."""
    rollouts, original = [], train_grpo.rollout

    def record(*arguments):
        rollouts.append(original(*arguments))
        return rollouts[-1]

    with patch.object(train_grpo, "rollout", record):
        yield rollouts


def read_settings(settings: type, description: str, argv: list[str] | None):
    """A benchmark's settings from its command line; raises UserError for what is out of range."""
    parser = Parser(settings, description=description.split("\n")[0], allow_abbrev=False)
    found = settings(**vars(parser.parse_args(sys.argv[1:] if argv is None else argv)))
    check_ranges(found)
    return found


def memory() -> float:
    """Peak memory of this process in MiB."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory(CPU)["peak_memory_mib"]
    # Not getrusage: on Linux a new process starts from its parent's peak there.
    return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 2**10


def write_result(path: Path, result: dict) -> None:
    """Write a result as JSON, with the date and the machine."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    machine = {**describe_environment(CPU), "cpu": found[1] if found else None}
    with suppress(PackageNotFoundError):
        machine["trl"] = version("trl")
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    prepare_output_dir(path.parent)
    write_json(path, {"date": date, "environment": machine, **result})
    print(f"wrote {path}")

"""Presets: named settings that override Config's defaults, and which of them suits this machine."""

import torch

from engine import distributed
from engine.cli import Parser, check_settings
from engine.files import UserError
from engine.models import hub_source, model_folder

PRESETS: dict[str, dict] = {
    "reference": {},
    # Asked for the bare answer, it is right on 4%; asked to show its two steps, on 17%. Without
    # worked examples it never writes the tags, but each makes every pass longer. bfloat16 halves
    # the time on a CPU. docs/real_llm.md has the trials behind the rest.
    "smollm2": {
        "model_name": "models/SmolLM2-135M-Instruct",
        "rewards": "examples/reasoning.py",
        "system_prompt": "Work it out in two steps, then give the number as <answer>N</answer>.",
        "num_examples": 3,
        "show_steps": True,
        "max_new_tokens": 40,
        "dtype": "bfloat16",
        "beta": 0.0,
        "learning_rate": 3e-5,
        "lr_schedule": "warmup",
        "batch_size": 32,
        "num_generations": 16,
        "num_iterations": 200,
        "num_inner_updates": 1,
        "eval_every": 25,
    },
    # A small model needs a much higher learning rate, and so larger batches; completions that share
    # prefixes cost little.
    "tiny": {
        "model_name": "tiny_model",
        "learning_rate": 1e-4,
        "lr_schedule": "linear",
        "batch_size": 32,
        "num_generations": 32,
        "num_iterations": 180,
        "num_inner_updates": 2,
        "kl_estimator": "k3",
    },
}


def choose_preset(model: str) -> tuple[str, str]:
    """(preset, reason): with CUDA the largest model that can be had, else the bundled one.

    `model` is the one that the reference preset trains.
    """
    if not torch.cuda.is_available():
        return "tiny", "the bundled model, since PyTorch finds no CUDA device"
    where = hub_source(model)
    if where:
        return "reference", f"PyTorch finds a CUDA device, and {model} is {where}"
    absent = f"{model} is neither in the cache nor on a hub in reach"
    if model_folder(PRESETS["smollm2"]["model_name"]):
        return "smollm2", f"PyTorch finds a CUDA device, {absent}, SmolLM2 was fetched"
    return "tiny", f"the bundled model, since {absent}, and SmolLM2 was not fetched"


def parse_config(config_class, argv: list[str] | None):
    """Read a Config, or a class with more settings, from the command line.

    Flags override the preset, which overrides the defaults. Prints which preset it is, and why.
    Raises UserError.
    """
    parser = Parser(config_class, description=config_class.__doc__, allow_abbrev=False)
    preset, reason = parser.parse_args(argv).preset, "named on the command line"
    if preset == "auto":
        preset, reason = choose_preset(config_class.model_name)
    parser.set_defaults(**PRESETS[preset])
    config = config_class(**{**vars(parser.parse_args(argv)), "preset": preset})
    check_settings(config)
    if config.batch_size % distributed.world_size():
        processes = f"a multiple of {distributed.world_size()} (processes)"
        raise UserError(f"--batch_size {config.batch_size}: must be {processes}")
    print(f"preset {preset}: {reason}")
    return config

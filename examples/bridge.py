"""The same task in TRL: recipe, problems and rewards as its GRPOTrainer takes them.

TRL and peft are imported late: neither the rest of this repository nor its installation needs them.
"""

import json
import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from engine import distributed
from engine.cli import json_object
from engine.files import UserError, first_line
from engine.machine import choose_device, choose_dtype
from engine.models import eos_token_ids
from engine.policy import Policy
from engine.problems import RewardFile
from engine.prompt import decode

# Settings that TRL has no counterpart of, and what to do instead.
MISSING = {
    "policy": "it takes an ordinary pass per completion",
    "resume": """its checkpoints are its own: --trl '{"resume_from_checkpoint": true}'""",
    "checkpoint_every": """its own: --trl '{"save_strategy": "steps", "save_steps": 100}'""",
    "log_completions_every": """its own: --trl '{"log_completions": true}'""",
    "eval_every": "accuracy is measured before and after",
    "patience": "accuracy is measured before and after",
    "max_kl": "kl is in its log",
}
SAME = ("num_generations", "learning_rate", "loss_type", "scale_rewards", "epsilon", "beta", "seed")
RENAMED = {  # TRL's name of a setting by ours
    "importance_level": "importance_sampling_level",
    "kl_correction": "use_bias_correction_kl",
    "mask_truncated": "mask_truncated_completions",
}


def check_counterparts(config, defaults: dict) -> None:
    """Raise UserError for a setting, other than its default, that TRL does not have.

    And for a package that is not installed.
    """
    for name, instead in MISSING.items():
        if getattr(config, name) != defaults[name]:
            raise UserError(f"--{name}: TRL has no such setting; {instead}")
    if config.beta and config.kl_estimator == "k3_inverse":
        raise UserError("--kl_estimator k3_inverse: TRL has only k3; add --kl_estimator k3")
    if ":" in config.device:
        raise UserError(f"--device {config.device}: choose it with CUDA_VISIBLE_DEVICES instead")
    for package in ["trl", *["peft"] * bool(config.lora_rank)]:
        if not find_spec(package):
            raise UserError(f"{package} is not installed: pip install {package}")


def trl_config(config, changes: dict):
    """The GRPOConfig of a Config, with these changes. Raises UserError.

    The table in examples/to_trl.py says what differs.
    """
    from trl import GRPOConfig

    device = choose_device(config.device)
    shard = config.batch_size * config.num_generations // distributed.world_size()
    micro_batch = min(config.micro_batch_size or shard, shard)
    if shard % micro_batch:
        raise UserError(
            f"--micro_batch_size {micro_batch}: TRL needs micro-batches of one size; name a divisor"
            f" of {shard}, the completions of a process"
        )
    epsilon_high = config.epsilon_high or config.epsilon
    recipe = {name: getattr(config, name) for name in SAME}
    recipe |= {theirs: getattr(config, ours) for ours, theirs in RENAMED.items()}
    recipe |= {
        "output_dir": str(Path(config.output_dir) / "trl_run"),
        "max_steps": config.num_iterations * config.num_inner_updates,
        "num_iterations": config.num_inner_updates,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": shard // micro_batch,
        "max_completion_length": config.max_new_tokens,
        "chat_template_kwargs": json_object("--chat_template_kwargs", config.chat_template_kwargs),
        "lr_scheduler_type": "constant" if config.lr_schedule == "constant" else "linear",
        "warmup_steps": 0.05 if config.lr_schedule == "warmup" else 0,  # of all steps
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": config.clip_grad_norm,
        # CISPO's bound is on the ratio itself there.
        "epsilon_high": epsilon_high + 1 if config.loss_type == "cispo" else epsilon_high,
        "disable_dropout": True,
        "use_cpu": device.type == "cpu",
        "bf16": choose_dtype(config.dtype, device) == torch.bfloat16,  # autocast
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "dataloader_pin_memory": False,  # a batch of the data holds texts, no tensors
        "ddp_find_unused_parameters": False,
        "save_strategy": "no",
        "report_to": "none",
    }
    try:
        return GRPOConfig(**(recipe | changes))
    except (TypeError, ValueError) as error:
        raise UserError(f"--trl: {first_line(error)}") from error


def reward_functions(rewards: RewardFile, tokenizer, eos_ids: list[int]) -> list[Callable]:
    """A reward file as GRPOTrainer takes it: one function per part, which it logs by its name.

    They decode the tokens themselves: TRL's own texts lack special tokens, so that a completion
    with a stray one would earn what it does not earn here.
    """
    seen, scores = None, []

    def part_function(part: str) -> Callable:
        def function(completion_ids: list[list[int]], answer: list[str], **_) -> list[float]:
            nonlocal seen, scores
            if seen != (completion_ids, answer):  # a batch is scored once, for all parts
                rows = [[i for i in ids if i not in eos_ids] for ids in completion_ids]
                pairs = zip(decode(tokenizer, rows), map(json.loads, answer), strict=True)
                scores = [rewards.score(*pair) for pair in pairs]
                seen = completion_ids, answer
            return [earned[part] for earned in scores]

        function.__name__ = part
        return function

    return [part_function(part) for part in rewards.weights]


def make_trainer(config, task, model: nn.Module, changes: dict, lora_rank: int = 0):
    """The GRPOTrainer that trains a model on a Task as a Config says. Raises UserError.

    changes: fields of GRPOConfig, which override what follows from the config.
    """
    from datasets import Dataset
    from trl import GRPOTrainer

    adapter = None
    if lora_rank:
        from peft import LoraConfig

        scale = {"r": lora_rank, "lora_alpha": 2 * lora_rank}
        adapter = LoraConfig(**scale, target_modules="all-linear", task_type="CAUSAL_LM")
    weights = {"reward_weights": list(task.reward_file.weights.values())}
    count = config.batch_size * config.num_iterations
    rows = [
        # As JSON, because a column has one type, and answers are texts or integers of any size.
        {"prompt": task.prompt.chat(problem.question), "answer": json.dumps(problem.answer)}
        for problem in task.problems.draw(count, random.Random(config.seed))
    ]
    return GRPOTrainer(
        model=model,
        reward_funcs=reward_functions(
            task.reward_file, task.tokenizer, eos_token_ids(model, task.tokenizer)
        ),
        args=trl_config(config, weights | changes),
        train_dataset=Dataset.from_list(rows),
        processing_class=task.tokenizer,
        peft_config=adapter,
    )


def take_weights(policy: Policy, trainer, lora_rank: int = 0) -> None:
    """Give a policy of the base model the weights that TRL has trained, adapters merged.

    They come from a file that rank 0 writes, because with a sharded model no process has them all.
    """
    if trainer.is_fsdp_enabled:  # else each process may save its own shard
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    # Not the same folder for both: beside an adapter, from_pretrained would add it to a model.
    folder = Path(trainer.args.output_dir) / ("adapter" if lora_rank else "model")
    trainer.save_model(str(folder))
    distributed.all_gather(None)  # wait for rank 0
    if lora_rank:
        from peft import PeftModel

        policy.model = PeftModel.from_pretrained(policy.model, folder).merge_and_unload()
    else:
        trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        policy.model.load_state_dict(trained.state_dict())

"""Train the same task with TRL's GRPOTrainer: vLLM, LoRA, models sharded over GPUs.

    python examples/to_trl.py --preset tiny --output_dir runs/trl
    python examples/to_trl.py --preset smollm2 --lora_rank 16 --learning_rate 3e-4
    torchrun --standalone --nproc_per_node=8 examples/to_trl.py --trl '{"fsdp": true}'
    accelerate launch --config_file my.yaml examples/to_trl.py --problems my.jsonl --rewards my.py

It takes the flags of train_grpo.py (problems, split, prompt, rewards, recipe); --trl sets any field
of GRPOConfig. Our `evaluate` measures before and after. Writes saved_model/ and trl_metrics.json.

| ours | TRL's | what differs |
|---|---|---|
| num_iterations | max_steps / num_iterations | TRL counts gradient steps |
| num_inner_updates | num_iterations | |
| batch_size, micro_batch_size | per_device_train_batch_size, gradient_accumulation_steps | (1) |
| num_generations, loss_type, scale_rewards, chat_template_kwargs | the same names | (2) |
| epsilon, epsilon_high | the same names | with cispo TRL's is the bound of the ratio itself |
| importance_level, mask_truncated | importance_sampling_level, mask_truncated_completions | |
| beta, kl_estimator k3, kl_correction | beta, use_bias_correction_kl | k3_inverse is refused; (3) |
| max_new_tokens | max_completion_length | |
| learning_rate, lr_schedule | learning_rate, lr_scheduler_type | changes with each update |
| AdamW without weight decay | optim, weight_decay | |
| clip_grad_norm | max_grad_norm | 0: no clipping; non-finite updates are not skipped |
| seed | seed | the same problems in the same order, other samples |
| device, dtype | use_cpu, bf16 | autocast; weights are float32 too |
| rewards: `score`, `WEIGHTS` | reward_funcs, reward_weights | one function per part |
| policy, resume, eval_every, ... | none | refused; the last policy is saved, not the best |

(1) TRL counts completions of a process, and its micro-batches must all have one size.
(2) The advantages of a group of equal rewards are 0 up to rounding, not exactly.
(3) exp(d) can overflow; with importance_level sequence, KL is corrected by the sequence's ratio.
"""

import os
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine import distributed
from engine.cli import json_object, setting
from engine.files import exit_code, locked_folder, write_json
from engine.machine import describe_environment
from engine.metrics import describe
from engine.models import load_model, save_model
from engine.presets import PRESETS, parse_config
from engine.run import evaluation_seed
from engine.startup import load_policy
from examples.bridge import check_counterparts, make_trainer, take_weights
from train_grpo import Config, Task, evaluate, load_task

CARD = """---
base_model: {model}
tags: [grpo, trl]
---
# {model} after GRPO

Trained by TRL's `GRPOTrainer`, through `examples/to_trl.py`. On held-out test problems, with 95%
intervals, before: {before}; after: {after}.
"""


@dataclass
class Settings(Config):
    """Those of train_grpo.py, and what is TRL's alone."""

    trl: str = setting("{}", 'JSON: fields of GRPOConfig, like {"use_vllm": true}')
    lora_rank: int = setting(0, "train adapters of this rank with peft; 0: all weights", 0, 65536)


def parse_settings(argv: list[str] | None) -> Settings:
    """Read the command line. Raises UserError, also for what TRL does not have."""
    settings = parse_config(Settings, argv)
    check_counterparts(settings, asdict(Settings()) | PRESETS[settings.preset])
    return settings


def main(argv: list[str] | None = None) -> int:
    # accelerate may load weights on rank 0 only, but each process evaluates the whole model.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    with distributed.process_group(), ExitStack() as stack:
        settings = distributed.broadcast_object(parse_settings, argv)
        output, evaluations = Path(settings.output_dir), []
        with distributed.sync_errors():
            changes = json_object("--trl", settings.trl)
            if distributed.rank() == 0:
                stack.enter_context(locked_folder(output))
            problems, rewards, prompt = load_task(settings)
            policy, tokenizer = load_policy(settings, problems, prompt, settings.num_generations)
            task, device = Task(tokenizer, problems, rewards, prompt), policy.model.device
            model, _ = load_model(settings.model_name, torch.device("cpu"))  # TRL places it
            trainer = make_trainer(settings, task, model, changes, settings.lora_rank)

        def measure(iteration: int) -> None:
            seed = evaluation_seed(settings, iteration)
            found = evaluate(policy, task, "test", settings.eval_problems, seed)
            evaluations.append({"split": "test", "iteration": iteration, **found})
            print(f"test, iteration {iteration}: {describe(found['accuracies'])}", flush=True)

        measure(0)
        policy.cpu()  # leaves the device to TRL
        trainer.train(trainer.args.resume_from_checkpoint)
        take_weights(policy, trainer, settings.lora_rank)
        policy.to(device)
        measure(trainer.state.global_step // trainer.num_iterations)
        if distributed.rank() == 0:
            before, after = (describe(each["accuracies"]) for each in evaluations)
            card = CARD.format(model=settings.model_name, before=before, after=after)
            save_model(policy.model, tokenizer, prompt, output, card)
            run = {"config": asdict(settings), "environment": describe_environment(device)}
            run |= {"evaluations": evaluations, "log": trainer.state.log_history}
            write_json(output / "trl_metrics.json", run)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))

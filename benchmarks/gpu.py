"""Where does an iteration spend its time, with the tree and without: one command for a GPU.

    python benchmarks/gpu.py                                    # on the CPU if there is no GPU
    python benchmarks/gpu.py --dtype float32 --output fp32.json
    python benchmarks/gpu.py --device cpu --batch_size 8 --plain_micro_batch 16 --output cpu.json

Repeats one iteration of the presets tiny and smollm2 (once `python fetch_model.py` has made its
model), with learning rate 0 and the same seed, by either policy. Prints seconds by phase, peak
memory, and `logprob_mismatch`: how far the log-probabilities recorded while sampling are from those
of the first update. Writes gpu.json here, or to --output.

On a GPU, a phase ends when its kernels have ended, and each row has its own peak of memory. On the
CPU it is the peak of the process so far.
"""

import gc
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import HERE, Work, read_settings, time_phases, write_result
from engine.cli import setting
from engine.files import UserError, exit_code
from engine.machine import choose_device, peak_memory
from engine.models import model_folder
from engine.presets import PRESETS
from train_grpo import Config

PHASES = ("rollout", "reference", "forward", "backward", "optimizer", "other", "all")


@dataclass
class Settings:
    iterations: int = setting(10, "to time, after one to warm up", 1)
    batch_size: int = setting(0, "problems per iteration; 0: the preset's", 0)
    plain_micro_batch: int = setting(0, "completions per pass of the plain policy; 0: all", 0)
    device: str = setting("auto", "cpu, cuda or mps; auto is cuda if there is one, else cpu")
    dtype: Literal["preset", "float32", "bfloat16"] = setting("preset", "compute type")
    output: str = setting(str(HERE / "gpu.json"), "result file")


def measure(preset: str, policy: str, settings: Settings, device: torch.device) -> dict:
    """One row of the table. Raises UserError if this policy cannot train the preset's model."""
    gc.collect()  # the row before must not count
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    changes = {"policy": policy, "device": str(device)}
    if settings.dtype != "preset":
        changes["dtype"] = settings.dtype
    if settings.batch_size:
        changes["batch_size"] = settings.batch_size
    if policy == "plain":
        changes["micro_batch_size"] = settings.plain_micro_batch
    work = Work(Config(**{**PRESETS[preset], **changes}))
    learner, batch, metrics, seconds = time_phases(work, settings.iterations)
    return {
        "preset": preset,
        "policy": policy,
        "parameters": learner.policy.model.num_parameters(),
        "dtype": str(learner.policy.compute_dtype).removeprefix("torch."),
        "completions": len(batch),
        "seconds": seconds,
        "memory_mib": list(peak_memory(device).values())[-1],  # cuda's, where there is one
        "logprob_mismatch": metrics["logprob_mismatch"],
    }


def main(argv: list[str] | None = None) -> int:
    settings = read_settings(Settings, __doc__, argv)
    device, runs = choose_device(settings.device), []
    head = ["preset", "policy", *(f"{phase}, s" for phase in PHASES), "memory, MiB", "mismatch"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for preset in ("tiny", "smollm2"):
        model, total = PRESETS[preset]["model_name"], {}
        if not model_folder(model):
            print(f"skipped {preset}: there is no {model}; `python fetch_model.py` makes it")
            continue
        for policy in ("tree", "plain"):
            try:
                run = measure(preset, policy, settings, device)
            except UserError as error:
                print(f"skipped {preset}, {policy}: {error}")
                continue
            cells = [preset, policy, *(f"{run['seconds'][phase]:.3f}" for phase in PHASES)]
            cells += [f"{run['memory_mib']:,.0f}", f"{run['logprob_mismatch']:.2g}"]
            print("| " + " | ".join(cells) + " |", flush=True)
            runs.append(run)
            total[policy] = run["seconds"]["all"]
        if len(total) == 2:
            ratio = total["plain"] / total["tree"]
            print(f"{preset}: without the tree, an iteration takes {ratio:.1f} times as long")
    result = {"iterations": settings.iterations, "runs": runs}
    write_result(Path(settings.output), result, device)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))

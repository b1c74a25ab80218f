"""Seconds per iteration with one process and with several, each held to one thread.

    python benchmarks/scaling.py                      # the bundled model
    python benchmarks/scaling.py --shape 135m --iterations 3 --cores 2,3

Strong: the same batch for all together. Weak: the same batch for each process. Efficiency 1 would
be a half of the time, or the same time, with two. The processes talk by Gloo over the loopback
device; `all-reduce alone` is what exchanging the gradients of an iteration takes with no
computation beside it. Prints a table and writes JSON.
"""

import argparse
import copy
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import spread  # noqa: E402
from policy import Policy, load_model  # noqa: E402
from train_grpo import Config, TrainState, make_prompt, train_iteration  # noqa: E402

# Qwen2.5-0.5B, for which the estimate is.
PARAMETERS, DEVICES = 494_032_768, 8
# Assumed, not measured: bytes per second that an all-reduce moves through each device.
BANDWIDTHS = {"NVLink within a machine": 400e9, "200 Gbit/s between machines": 20e9}


def load(shape: str):
    """(model, tokenizer): the bundled model, or a random one of the shape of SmolLM2-135M."""
    model, tokenizer = load_model(str(ROOT / "tiny_model"), torch.device("cpu"))
    if shape == "tiny":
        return model, tokenizer
    torch.manual_seed(0)
    large = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
        **{name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id")},
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(large), tokenizer


def bytes_sent(parameters: int, updates: int, processes: int) -> float:
    """What each process sends per iteration: a ring all-reduce of float32 gradients per update."""
    return parameters * 4 * updates * 2 * (processes - 1) / processes


def measure(shape: str, batch_size: int, iterations: int, cores: list[int]) -> dict:
    """Train for some iterations, on this process's own core if `cores` are named."""
    if cores:
        os.sched_setaffinity(0, {cores[spread.rank()]})
    torch.set_num_threads(1)
    model, tokenizer = load(shape)
    policy = Policy(model)
    config = Config(batch_size=batch_size, dtype="float32")
    adamw = torch.optim.AdamW(policy.parameters(), config.learning_rate, weight_decay=0, fused=True)
    sampler = torch.Generator().manual_seed(spread.stream(0))
    state = TrainState(policy, adamw, random.Random(0), sampler, {})
    reference, prompt = copy.deepcopy(policy), make_prompt(config)

    def iteration() -> dict:
        return train_iteration(state, reference, tokenizer, prompt, config)

    iteration()
    done = [iteration() for _ in range(iterations)]
    seconds = [metrics["seconds"] for metrics in done]
    with FlopCounterMode(display=False) as counter:
        iteration()
    parameters, updates = model.num_parameters(), config.num_inner_updates
    exchange = torch.zeros(parameters)
    started = time.perf_counter()
    for _ in range(updates if spread.size() > 1 else 0):
        dist.all_reduce(exchange)
    return {
        "shape": shape,
        "parameters": parameters,
        "processes": spread.size(),
        "batch_size": batch_size,
        "num_generations": config.num_generations,
        "updates": updates,
        "completion_length": statistics.fmean(m["completion_length"] for m in done),
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "gflop_per_process": counter.get_total_flops() / 1e9,
        "bytes_sent_per_process": bytes_sent(parameters, updates, spread.size()),
        "allreduce_alone": time.perf_counter() - started,
    }


def launch(processes: int, batch_size: int, args) -> dict:
    """Measure in processes of their own."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(several if processes > 1 else []), __file__]
    command += ["--worker", str(batch_size), "--shape", args.shape]
    command += ["--iterations", str(args.iterations), "--cores", args.cores]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def estimate(one: dict) -> list[str]:
    """What exchanging gradients costs a model of 0.5B parameters on eight devices."""
    sent = bytes_sent(PARAMETERS, one["updates"], DEVICES)
    lines = [f"{DEVICES} devices, {PARAMETERS:,} parameters: each sends {sent / 1e9:.1f} GB"]
    lines[0] += " per iteration"
    lines += [f"  {place}: {sent / rate:.3f} s" for place, rate in BANDWIDTHS.items()]
    work = one["gflop_per_process"] / one["parameters"] * PARAMETERS / 1e3
    lines.append(f"  work of one process's share: {work:.1f} TFLOP, by the count for this shape")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=["tiny", "135m"], default="tiny")
    parser.add_argument("--iterations", type=int, default=20, help="after one to warm up")
    parser.add_argument("--batch_size", type=int, default=4, help="problems for one process")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--cores", default="", help="pin the processes to these cores: 2,3")
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        cores = [int(core) for core in args.cores.split(",") if core]
        with spread.joined():
            print(json.dumps(measure(args.shape, args.worker, args.iterations, cores)))
        return
    n, batch = args.processes, args.batch_size
    one = launch(1, batch, args) | {"scaling": "-", "efficiency": 1.0}
    strong = launch(n, batch, args) | {"scaling": "strong"}
    strong["efficiency"] = one["seconds"] / n / strong["seconds"]
    weak = launch(n, batch * n, args) | {"scaling": "weak"}
    weak["efficiency"] = one["seconds"] / weak["seconds"]
    print(f"{args.shape}: {one['parameters']:,} parameters, float32, one thread per process")
    print(
        "| processes | problems | scaling | s/iteration | efficiency | MB sent | all-reduce alone |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in (one, strong, weak):
        cells = [str(row["processes"]), str(row["batch_size"]), row["scaling"]]
        cells += [f"{row['seconds']:.3f}", f"{row['efficiency']:.2f}"]
        cells += [f"{row['bytes_sent_per_process'] / 1e6:.1f}", f"{row['allreduce_alone']:.3f} s"]
        print("| " + " | ".join(cells) + " |")
    print("\n".join(estimate(one)))
    if args.output:
        found = {"torch": torch.__version__, "cores": args.cores, "runs": [one, strong, weak]}
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

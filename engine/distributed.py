"""Train on several processes and machines, with torchrun and DistributedDataParallel.

    torchrun --standalone --nproc_per_node=2 train_grpo.py --preset tiny

torchrun starts the processes, numbers them (rank 0, 1, ...) and stops all of them if one fails;
`DistributedDataParallel` averages the gradients. Without torchrun there is one process, rank 0, and
the functions here do nothing.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.files import UserError

# Longer than rank 0 takes to write a checkpoint to a slow disk. torchrun notices a dead process at
# once; this is for a dead machine.
TIMEOUT = timedelta(minutes=10)


def rank() -> int:
    """The number of this process. Rank 0 writes files and prints."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def world_size() -> int:
    """The number of processes."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def launcher() -> list[str]:
    """The command that started these processes, up to the script's name."""
    if not dist.is_torchelastic_launched():
        return ["python"]
    machines, here = os.environ["GROUP_WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]
    where = "--standalone" if machines == "1" else f"--nnodes={machines}"
    return ["torchrun", where, f"--nproc_per_node={here}"]


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun has started, if any. Only rank 0 prints inside."""
    if world_size() == 1:
        yield
        return
    store, *_ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    if os.environ["GROUP_WORLD_SIZE"] == "1":
        # After a restart torchrun's store still holds the addresses of dead processes: never read
        # them. (With several machines each counts its own restarts, so there is no common name.)
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    # By default PyTorch would take NCCL alone where there is CUDA, but objects and checkpoints
    # travel as CPU tensors.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    members = {"store": store, "rank": rank(), "world_size": world_size()}
    dist.init_process_group(backend, timeout=TIMEOUT, **members)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere) if rank() else nullcontext():
        yield
    dist.destroy_process_group()  # not after an error: it could wait for a process that failed


def local_device(device: torch.device) -> torch.device:
    """`device`; with several processes on cuda, the one of this process."""
    if device.type == "cuda" and world_size() > 1:
        here, count = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > count > 0:
            raise UserError(f"{here} processes, but {count} CUDA devices here; start {count}")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and device.index is not None and torch.cuda.is_available():
        torch.cuda.set_device(device)
    return device


def all_gather(value) -> list:
    """The `value` of every process, by rank. All processes must call it together."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def all_reduce_mean(metrics: dict[str, float]) -> dict[str, float]:
    """The mean of each metric over all processes, which hold equal shards of a batch."""
    gathered = all_gather(metrics)
    if len(gathered) == 1:
        return metrics
    return {name: sum(m[name] for m in gathered) / len(gathered) for name in metrics}


def shard(items: list) -> list:
    """This process's part of a list that every process has in full."""
    n = len(items)
    return items[n * rank() // world_size() : n * (rank() + 1) // world_size()]


def rank_seed(seed: int, iteration: int = 0) -> int:
    """A seed of this process alone; on rank 0 at iteration 0 it is `seed` itself."""
    # Odd factors, so that seeds differ in the lowest 32 bits: a CPU generator sees no others.
    return seed + 0x9E3779B9 * rank() + 0x85EBCA6B * iteration


def restore_generator(generator: torch.Generator, states: Tensor, seed: int, iteration: int):
    """Set `generator` to this rank's part of the saved `states` (uint8), or reseed it."""
    found = states.split(len(generator.get_state()))
    if rank() < len(found):
        generator.set_state(found[rank()].clone())  # set_state reads a view from the wrong place
    else:
        generator.manual_seed(rank_seed(seed, iteration))
    if len(found) != world_size():
        print(f"note: processes: {len(found)} before, {world_size()} now; samples will differ")


@contextmanager
def sync_errors() -> Iterator[None]:
    """Turn a UserError of any process into an exit of all of them; rank 0 prints it."""
    mine = None
    try:
        yield
    except UserError as error:
        mine = error
    found = [error for error in all_gather(mine) if error]
    if found:
        if world_size() > 1:
            dist.destroy_process_group()  # all leave here; without it some abort at exit
        raise SystemExit(2) if rank() else found[0]


def broadcast_object(function: Callable, *arguments):
    """`function(*arguments)` as rank 0 computes it."""
    with sync_errors():
        result = function(*arguments) if rank() == 0 else None
    return all_gather(result)[0]


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors by those of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def broadcast_checkpoint(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The named CPU tensors of a checkpoint, as rank 0 has read them."""
    forms = all_gather({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})[0]
    if rank():
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in forms.items()}
    broadcast_tensors(tensors.values())
    return tensors


def wrap_ddp(policy: nn.Module) -> nn.Module:
    """`policy`, with gradients averaged over all processes; weights start as those of rank 0.

    Only calls of the wrapped module itself take part.
    """
    if world_size() == 1:
        return policy
    return DistributedDataParallel(policy, gradient_as_bucket_view=True)


def sync_on_last(module: nn.Module, micro_batches: list) -> Iterator:
    """Yield micro-batches; gradients add up locally and are averaged with the last one."""
    with module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext():
        yield from micro_batches[:-1]
    yield micro_batches[-1]

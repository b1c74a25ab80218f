"""One training on several processes and machines, with what PyTorch brings along for it.

    torchrun --standalone --nproc_per_node=2 train_grpo.py --preset tiny

torchrun starts the processes, counts them (rank 0, 1, ...) and ends them all when one fails;
`DistributedDataParallel` averages the gradients, `torch.distributed` carries everything else.
Started without torchrun there is one process, of rank 0, and nothing here does anything.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
    redirect_stdout,
)
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cli import UserError

# How long to wait for a process that says nothing: longer than rank 0 takes to write a checkpoint
# to a slow disk. torchrun sees at once that a process has died; this is for a machine that has.
PATIENCE = timedelta(minutes=10)


def rank() -> int:
    """The number of this process. That of rank 0 is the one that writes files and prints."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def size() -> int:
    """The number of processes."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def launcher() -> list[str]:
    """How these processes were started: the words before the script's name."""
    if not dist.is_torchelastic_launched():
        return ["python"]
    machines, here = os.environ["GROUP_WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]
    where = "--standalone" if machines == "1" else f"--nnodes={machines}"
    return ["torchrun", where, f"--nproc_per_node={here}"]


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun has started, if it has. Only rank 0 prints meanwhile."""
    if size() == 1:
        yield
        return
    store, *_ = next(dist.rendezvous("env://", timeout=PATIENCE))
    if os.environ["GROUP_WORLD_SIZE"] == "1":
        # After a restart torchrun's store still holds the addresses of those who died: never read
        # them. (Of several machines each counts restarts of its own, so no name is common to all.)
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    # No backend is named: PyTorch takes Gloo for what is on the CPU and NCCL for what is on CUDA.
    dist.init_process_group(timeout=PATIENCE, store=store, rank=rank(), world_size=size())
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere) if rank() else nullcontext():
        yield
    dist.destroy_process_group()  # but not after an error: it could wait for a process that failed


def own_device(device: torch.device) -> torch.device:
    """`device`, or, where it is cuda and there are several processes, the one of this process."""
    if device.type != "cuda":
        return device
    if size() == 1:
        if device.index is not None and torch.cuda.is_available():
            torch.cuda.set_device(device)  # for all that names no device, CUDA graphs among it
        return device
    here, count = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if here > count > 0:
        raise UserError(f"{here} processes on a machine with {count} CUDA devices; start {count}")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda", torch.cuda.current_device())


def gather(value) -> list:
    """The `value` of every process, by rank; all processes must call it together."""
    values = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values


def average(metrics: dict[str, float]) -> dict[str, float]:
    """The mean of each of the metrics over all processes, which have equal shares of a batch."""
    every = gather(metrics)
    if len(every) == 1:
        return metrics
    return {name: sum(some[name] for some in every) / len(every) for name in metrics}


def share(items: list) -> list:
    """This process's part of what all processes hold: a run of items, as long as the others'."""
    count = len(items)
    return items[count * rank() // size() : count * (rank() + 1) // size()]


def stream(seed: int, iteration: int = 0) -> int:
    """A seed for this process, other than that of any other; of rank 0 it is `seed`, at first."""
    # Odd factors, for seeds that differ in the lowest 32 bits: a CPU's generator sees no others.
    return seed + 0x9E3779B9 * rank() + 0x85EBCA6B * iteration


def resume_stream(sampler: torch.Generator, states: Tensor, metrics: dict) -> None:
    """Give `sampler` its own of the `states` (uint8) of all that there were, or a new stream."""
    found = states.split(len(sampler.get_state()))
    if rank() < len(found):
        sampler.set_state(found[rank()].clone())  # it would read a view from the wrong place
    else:
        sampler.manual_seed(stream(metrics["config"]["seed"], len(metrics["iterations"])))
    if len(found) != size():
        print(f"note: processes: {len(found)} before, {size()} now; other samples will be drawn")


@contextmanager
def together() -> Iterator[None]:
    """Turn a UserError that any process meets in here into one for all, which rank 0 tells."""
    mine = None
    try:
        yield
    except UserError as error:
        mine = error
    found = [error for error in gather(mine) if error]
    if found:
        if size() > 1:
            dist.destroy_process_group()  # all leave here: without it one in many aborts at its end
        raise SystemExit(2) if rank() else found[0]


def agreed(work: Callable, *arguments):
    """`work(*arguments)`, as rank 0 finds it."""
    with together():
        result = work(*arguments)
    return gather(result)[0]


@contextmanager
def on_first(manager: AbstractContextManager) -> Iterator[None]:
    """Enter a context manager on rank 0 alone. Where that fails, no process goes on."""
    with ExitStack() as stack:
        with together():
            if rank() == 0:
                stack.enter_context(manager)
        yield


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors by those of rank 0."""
    if size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def tensors_of_first(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The named tensors, all on the CPU, that rank 0 has."""
    forms = gather({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})[0]
    if rank():
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in forms.items()}
    broadcast(tensors.values())
    return tensors


def synchronised(policy: nn.Module) -> nn.Module:
    """`policy` as it learns: on several processes from the mean of their gradients.

    All begin with the weights of rank 0. Only calls of the module itself, `learner(...)`, count.
    """
    if size() == 1:
        return policy
    return DistributedDataParallel(policy, gradient_as_bucket_view=True)


def exchanged_once(learner: nn.Module, pieces: Iterable) -> Iterator:
    """Yield `pieces` of a batch, whose gradients add up, and are averaged with the last piece."""
    *others, last = pieces
    several = isinstance(learner, DistributedDataParallel)
    with learner.no_sync() if several else nullcontext():
        yield from others
    yield last

"""The machine: device, compute type, memory, and what the metrics record of the environment."""

import ctypes
import os
import platform
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch

from engine import distributed
from engine.files import ROOT, UserError, first_line

IMPORTED = time.monotonic()
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def choose_device(name: str) -> torch.device:
    """`auto` is cuda if there is one, else cpu. Raises UserError if the device does not work."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = distributed.local_device(torch.device(name))
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError) as error:
        reason = first_line(error)
        raise UserError(f"--device {name} fails here ({reason}); try --device cpu") from error
    if device.type == "cuda":
        # cuDNN's attention in bfloat16 gives NaN gradients with some masks (pytorch#196678), wrong
        # values with few key heads (pytorch#193893), and prepares itself anew for every shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # TF32 rounds so much that the start-up comparison (TOLERANCE in tree.py) would fail.
        torch.set_float32_matmul_precision("highest")
    return device


def tune_memory() -> None:
    """Keep freed memory for later tensors, in large pages, and few compiled kernels.

    To be called before the first tensor is made: PyTorch and oneDNN read their settings once.
    """
    # oneDNN keeps a kernel for each of the last 1,024 shapes, and here almost every pass has a new
    # shape: 50 MB more per iteration of SmolLM2, without end.
    os.environ.setdefault("LRU_CACHE_CAPACITY", "10")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20")
    # Pages of 2 MiB: faults of 4 KiB pages took a tenth of a pass of SmolLM2.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # By default glibc returns large blocks to the system, which must zero every page before handing
    # it out again: a tenth of an iteration or more.
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_MAX, 0)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute type; `auto` is bfloat16 on a cuda device that computes in it natively."""
    if name == "auto":
        # Older cards (T4, V100) only emulate it: compute capability 8.0 is the first to have it.
        native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        name = "bfloat16" if native else "float32"
    return getattr(torch, name)


def process_seconds() -> float:
    """Seconds since this process started; where the system does not tell, since its imports."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.monotonic() - IMPORTED
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory of this process so far, in MiB: on the host where known, and on cuda."""
    peak = {}
    with suppress(ImportError):
        import resource  # Unix only

        unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
        peak["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if device.type == "cuda":
        peak["peak_cuda_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return peak


def describe_environment(device: torch.device) -> dict:
    """What it takes to repeat a run: command, commit, versions, machine."""
    git = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = None
    with suppress(OSError, subprocess.TimeoutExpired):  # no git; a slow disk
        done = subprocess.run(git, capture_output=True, text=True, timeout=10)
        commit = done.stdout.strip() or None
    environment = {
        "command": shlex.join([*distributed.launcher(), *sys.argv]),
        "git_commit": commit,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy", "tokenizers")},
        "platform": platform.platform(),
        "device": device.type,
        "processes": distributed.world_size(),
        "cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        environment |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        environment["cudnn"] = torch.backends.cudnn.version()
    return environment

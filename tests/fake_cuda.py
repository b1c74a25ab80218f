"""Simulate a CUDA device: tensors that claim to be on cuda:0 and compute on the CPU.

    import fake_cuda  # in a process of its own, before torch: see test_cuda.py
    with fake_cuda.device():
        train_grpo.main(["--device", "cuda", ...])

An operator that mixes host and device tensors raises, as on a GPU. Not simulated: CUDA's kernels
and their rounding, the choice of an attention kernel, memory, streams, NCCL, missing operators.
Needs g++ and a CPU build of PyTorch, to which SHIM adds what such a build lacks.
"""

import ctypes
import importlib.util
import subprocess
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

SHIM = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return {c10::DeviceType::CUDA, 0}; }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, getDevice());
  }
};
struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
static c10::impl::DeviceGuardImplRegistrar guard(c10::DeviceType::CUDA, new Guard);
namespace at { REGISTER_CUDA_HOOKS(CUDAHooks); }
"""
TORCH = Path(importlib.util.find_spec("torch").origin).parent
with tempfile.TemporaryDirectory() as folder:
    library, lib = f"{folder}/shim.so", TORCH / "lib"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-w", "-x", "c++", "-", "-o", library]
    command += [f"-I{TORCH}/include", f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]
    subprocess.run(command, input=SHIM, text=True, check=True)
    ctypes.CDLL(library)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
# Their indices may be on the host.
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
# Besides the pointwise operators, these take a tensor without dimensions from the host.
SCALARS = {"where", "masked_fill", "masked_fill_", "fill_", "add_", "sub_", "mul_", "div_"}
# What torch.cuda would ask a driver.
ANSWERS = {"is_available": True, "get_device_capability": (9, 0), "get_device_name": "simulated"}
ANSWERS |= {"_lazy_init": None, "synchronize": None, "reset_peak_memory_stats": None}


class FakeCuda(Tensor):
    """Claims to be on cuda:0; `host` holds its values."""

    @staticmethod
    def __new__(cls, host: Tensor):
        form = host.shape, host.stride(), host.storage_offset()
        self = Tensor._make_wrapper_subclass(cls, *form, dtype=host.dtype, device="cuda:0")
        self.host = host
        return self

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return run(operator, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """What reads or writes a tensor's memory without calling an operator."""
        if function == Tensor.data.__set__:
            args[0].host = args[1].host  # a host tensor has none
        if function is Tensor.tolist:
            return args[0].cpu().tolist()
        if function in (Tensor.data_ptr, Tensor.untyped_storage):  # safetensors compares them
            return function(args[0].host)
        return torch._C._disabled_torch_function_impl(function, types, args, kwargs or {})


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return run(operator, args, kwargs or {})


def check_devices(operator, args, kwargs, tensors: list[Tensor]) -> None:
    """Raise where a GPU would; `tensors` are those in the arguments."""
    name = operator.overloadpacket.__name__
    scalars = torch.Tag.pointwise in operator.tags or name in SCALARS
    for x in tensors if operator not in COPIES else []:
        scalar = scalars and x.ndim == 0 and not (x is args[0] and name.endswith("_"))
        index = operator in INDEXING and any(x is each for each in args[1])
        if not (type(x) is FakeCuda or scalar or index):
            raise RuntimeError(f"Expected all tensors on one device: cuda:0 and cpu in {operator}")
    if (generator := kwargs.get("generator")) and generator.device.type != "cuda":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


def each(change, x):
    """`x` with all its tensors changed."""
    if isinstance(x, list | tuple):
        return type(x)(each(change, y) for y in x)
    return change(x) if isinstance(x, Tensor) else x


def run(operator, args, kwargs):
    """Call an operator; those of the device compute on the host's values."""
    tensors, asked = [], kwargs.get("device") and torch.device(kwargs["device"]).type
    each(tensors.append, (*args, *kwargs.values()))
    mine = {id(x.host): x for x in tensors if type(x) is FakeCuda}
    if not mine and asked != "cuda":
        return operator(*args, **kwargs)
    check_devices(operator, args, kwargs, tensors)
    if operator is aten._fused_sdp_choice.default:
        return 0  # attention from plain operators
    to_host = asked == "cpu" or (operator is aten.copy_.default and type(args[0]) is Tensor)
    args, *values = each(lambda x: getattr(x, "host", x), [args, *kwargs.values()])
    there = {"device": torch.device("cpu")} if asked == "cuda" else {}
    out = operator(*args, **dict(zip(kwargs, values, strict=True)) | there)
    if any(x.shape != x.host.shape for x in mine.values()):
        raise NotImplementedError(f"{operator} resizes a tensor of the simulated device")
    return out if to_host else each(lambda x: mine[id(x)] if id(x) in mine else FakeCuda(x), out)


@contextmanager
def device():
    """Pretend that there is one CUDA device."""
    with ExitStack() as stack:
        for switch in (
            torch._C._set_only_lift_cpu_tensors,  # torch.tensor(..., device="cuda") is a copy
            torch.__future__.set_swap_module_params_on_conversion,  # `.data = ` would lose `host`
        ):
            switch(True)
            stack.callback(switch, False)
        for name, answer in ANSWERS.items():
            stack.enter_context(patch.object(torch.cuda, name, return_value=answer))
        stack.enter_context(Mode())
        yield

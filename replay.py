"""CUDA graphs: record what a GPU is asked to do once, then replay it without Python in between.

A small model keeps a GPU waiting for its next order. `Graphs` takes that wait away, where shapes
are the same from one iteration to the next.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

import spread


def wanted(fixed_shapes: str, device: torch.device) -> bool:
    """Whether shapes are to be fixed: `on`, `off`, or `auto`: where graphs can be recorded."""
    return fixed_shapes == "on" or (fixed_shapes == "auto" and recordable(device))


def recordable(device: torch.device) -> bool:
    """Several processes exchange their gradients in the middle of what would be recorded."""
    return device.type == "cuda" and spread.size() == 1


def eager(function: Callable, *tensors: Tensor | None):
    """Call the function: what stands in for `Graphs` where shapes change."""
    return function(*tensors)


@contextmanager
def rehearsal() -> Iterator[None]:
    """As while recording: what waits for the GPU fails."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


class Graphs:
    """`graphs(function, *tensors)` is `function(*tensors)`, replayed where there is a recording.

    A function is recorded once for each set of shapes. It may read nothing that changes from call
    to call but its tensors (or None), the weights and `generator`, and must not wait for a value:
    one `Graphs` serves the training of one policy, with one configuration. What a function returns
    is overwritten by the next call with the same shapes. Where nothing can be recorded, and once a
    recording has failed, the function is simply called.
    """

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.enabled = recordable(generator.device)
        self.recordings: dict[tuple, tuple] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.enabled else None

    def __call__(self, function: Callable, *tensors: Tensor | None):
        shapes = (t if t is None else (t.shape, t.dtype) for t in tensors)
        key = (function.__qualname__, *shapes)
        if self.enabled and key not in self.recordings:
            try:
                self.recordings[key] = self.record(function, tensors)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                self.enabled = False
                self.recordings.clear()
                tqdm.write(f"no CUDA graphs, so slower: {reason}")
        if not self.enabled:  # not within the except: the error would keep the failed try in memory
            return function(*tensors)
        graph, inputs, outputs = self.recordings[key]
        for place, tensor in zip(inputs, tensors, strict=True):
            if place is not None:
                place.copy_(tensor)
        graph.replay()
        return outputs

    def record(self, function: Callable, tensors: tuple) -> tuple:
        """Return (graph, inputs, outputs); nothing is drawn from the generator."""
        inputs = [t if t is None else t.clone() for t in tensors]
        stream, before = torch.cuda.current_stream(), self.generator.get_state()
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(stream)
        try:
            with torch.cuda.stream(side), rehearsal():
                for _ in range(3):  # libraries set themselves up at their first calls
                    function(*inputs)
            stream.wait_stream(side)
            self.generator.set_state(before)
            graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph, pool=self.pool):
                outputs = function(*inputs)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a failed recording leaves its own behind
            torch.cuda.synchronize()
            fresh = torch.Generator(self.generator.device)
            fresh.set_state(before)
            self.generator.graphsafe_set_state(fresh)  # the old state may be held by the recording
            raise RuntimeError(str(error.__context__ or error)) from None
        return graph, inputs, outputs

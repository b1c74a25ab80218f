"""CUDA graphs: record what a GPU is asked to do once, then replay it without Python in between.

A small model keeps a GPU waiting for its next order. `Graphs` takes that wait away, where shapes
are the same from one iteration to the next.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

import spread


def wanted(fixed_shapes: str, device: torch.device) -> bool:
    """Whether shapes are to be fixed: `on`, `off`, or `auto`, which is on on cuda."""
    return fixed_shapes == "on" or (fixed_shapes == "auto" and device.type == "cuda")


def eager(function: Callable, *tensors: Tensor | None):
    """Call the function: what stands in for `Graphs` where shapes change."""
    return function(*tensors)


class Graphs:
    """`graphs(function, *tensors)` is `function(*tensors)`, replayed where there is a recording.

    A function is recorded once for each set of shapes. It may read nothing that changes from call
    to call but its tensors (or None), the weights and `generator`, and must not wait for a value.
    What it returns is overwritten by the next call with the same shapes. Anywhere but on CUDA, on
    several processes, and once a recording has failed, the function is simply called.
    """

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        # Several processes exchange their gradients in the middle of what would be recorded.
        self.enabled = generator.device.type == "cuda" and spread.size() == 1
        self.recordings: dict[tuple, tuple] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.enabled else None

    def __call__(self, function: Callable, *tensors: Tensor | None):
        if not self.enabled:
            return function(*tensors)
        shapes = (t if t is None else (t.shape, t.dtype) for t in tensors)
        key = (function.__qualname__, *shapes)
        if key not in self.recordings:
            try:
                self.recordings[key] = self.record(function, tensors)
            except RuntimeError as error:
                self.enabled = False
                tqdm.write(f"no CUDA graphs, so slower: {str(error).splitlines()[0]}")
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
        before = self.generator.get_state()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up at their first calls
            for _ in range(3):
                function(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.generator.set_state(before)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph, pool=self.pool):
            outputs = function(*inputs)
        return graph, inputs, outputs

"""CUDA graphs: an update of thousands of small kernels, captured once and then replayed as one.

Launched one by one from Python, the kernels of a small world model take a GPU less time than the launching does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from envs.errors import UserError
from world_model import trees
from world_model.trees import Tree

WARMUP = 3  # calls as they are before the recording: optimisers make their state, libraries load their kernels


def can_record(device: torch.device) -> bool:
    """Whether there are CUDA graphs on this device."""
    return device.type == "cuda"


class Recorder:
    """Calls a piece of work as it is at first, then records it and replays the recording.

    The work must do the same on every call: read its inputs, change weights and buffers in place, never ask the device
    for a number, never make a tensor from numbers of Python's. What it does on the host happens on the recorded call
    alone; `Trainer.run` does it again after each replay.
    """

    def __init__(self, work: Callable[[Tree], Tree], inputs: Tree, device: torch.device) -> None:
        """`inputs` are an example: the work is called on trees of this shape alone."""
        self.work, self.device, self.calls = work, device, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Tree = inputs
        self._outputs: Tree = ()

    @property
    def recorded(self) -> bool:
        return self._graph is not None

    @property
    def warm(self) -> bool:
        """Whether it has been called often enough to be recorded."""
        return self.calls >= WARMUP

    def fits(self, inputs: Tree) -> bool:
        """Whether these inputs have the shapes and types of the example."""
        kinds = ([(leaf.shape, leaf.dtype) for leaf in trees.leaves(tree)] for tree in (inputs, self._inputs))
        return next(kinds) == next(kinds)

    def call(self, inputs: Tree) -> Tree:
        """The work, kernel by kernel."""
        self.calls += 1
        return self.work(trees.to(inputs, self.device))

    def record(self) -> None:
        """Records the work; nothing is computed yet.

        Raises UserError when the work does what a recording cannot hold.
        """
        self._inputs = trees.map(lambda leaf: torch.zeros_like(leaf, device=self.device), self._inputs)
        torch.clear_autocast_cache()  # casts from before are not made anew in a replay
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._outputs = self.work(self._inputs)
        except RuntimeError as problem:
            raise UserError(
                f"An update could not be recorded as a CUDA graph ({problem}). The same with train.cuda_graphs=false, "
                "also on resuming, runs without."
            ) from problem
        finally:
            torch.clear_autocast_cache()
        self._graph = graph

    def replay(self, inputs: Tree) -> Tree:
        """The recorded work on these inputs; what it returns is the caller's."""
        assert self._graph is not None
        trees.map(lambda place, leaf: place.copy_(leaf, non_blocking=True), self._inputs, inputs)
        self._graph.replay()
        return trees.map(torch.clone, self._outputs)

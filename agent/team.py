"""Several processes that train one model, as `torchrun` starts them: each has its own games, replay and dreams.

Between the backward pass and the clipping of every update the gradients are averaged, so that N processes take the
steps of one with N times the batch. What changes without a gradient is gathered (what a codebook follows) or taken from
the first process (buffers, once a round). Only the first process writes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from envs.errors import UserError
from world_model import trees
from world_model.trees import Tree

PATIENCE = timedelta(hours=1)  # for the others: the first process writes films, and plays open episodes again


class PeerLost(UserError):
    """Another process of the team has ended."""


class Team:
    """This process and those beside it; alone it changes nothing.

    Attributes:
        rank, size: which process this is, of how many.
        seconds: spent in communication so far.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size, self.device, self.seconds = rank, size, device or torch.device("cpu"), 0.0

    def part(self, count: int) -> int:
        """Of so many steps, those that this process takes; rounded up, the same for all."""
        return -(-count // self.size)

    def average(self, parameters: Sequence[Tensor]) -> None:
        """Their gradients become the mean over all processes: one message for all of them."""
        grads = [one.grad for one in parameters if one.grad is not None]
        if self.size == 1 or not grads:
            return

        def mean(flat: Tensor) -> None:
            dist.all_reduce(flat)
            flat /= self.size

        self._at_once(grads, mean)

    def gather(self, tree: Tree) -> Tree:
        """Tensors of all processes, one behind the other along the first dimension; the mean of those without one."""
        if self.size == 1:
            return tree
        return trees.map(self._joined, tree)

    def share(self, tensors: Sequence[Tensor]) -> None:
        """They become those of the first process."""
        if self.size == 1:
            return
        for kind in sorted({str(tensor.dtype) for tensor in tensors}):
            alike = [tensor for tensor in tensors if str(tensor.dtype) == kind]
            self._at_once(alike, lambda flat: dist.broadcast(flat, 0))

    def any(self, flag: bool) -> bool:
        """Whether it is true for anyone; all must ask, and get the same answer."""
        if self.size == 1:
            return flag
        told = torch.tensor([float(flag)], device=self.device)
        self._call(lambda: dist.all_reduce(told))
        return bool(told > 0)

    @torch.no_grad()
    def _at_once(self, tensors: Sequence[Tensor], talk: Callable[[Tensor], Any]) -> None:
        """One message about all of them: `talk` changes a flat tensor in place, and they become what it is then."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._call(lambda: talk(flat))
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def _joined(self, tensor: Tensor) -> Tensor:
        if tensor.dim() == 0:
            mean = tensor.detach().float().clone()
            self._call(lambda: dist.all_reduce(mean))
            return (mean / self.size).to(tensor.dtype)
        count = torch.tensor([len(tensor)], device=tensor.device)
        counts = [torch.zeros_like(count) for _ in range(self.size)]
        self._call(lambda: dist.all_gather(counts, count))
        most = int(max(counts))
        padded = tensor.new_zeros(most, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        every = [torch.zeros_like(padded) for _ in range(self.size)]
        self._call(lambda: dist.all_gather(every, padded))
        return torch.cat([part[: int(n)] for part, n in zip(every, counts, strict=True)])

    def _call(self, talk: Callable[[], Any]) -> None:
        began = time.perf_counter()
        try:
            talk()
        except RuntimeError as problem:  # of torch.distributed, whose kinds differ by backend
            raise PeerLost("Another process of the team has ended") from problem
        self.seconds += time.perf_counter() - began


def rank() -> int:
    """Which process of a team this is, by torchrun's environment; 0 alone."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def size() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in os.environ or "RANK" in os.environ else 1


def beside() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if size() > 1 else 1


@contextmanager
def joined(device: str) -> Iterator[Team]:
    """The team that torchrun's environment tells of, on this device; without torchrun one alone.

    Raises PeerLost when the others do not come.
    """
    if size() == 1:
        yield Team()
        return
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # else a lost process ends this one without a word
    try:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as problem:
        raise PeerLost(f"The processes of the team do not find each other: {str(problem).splitlines()[0]}") from problem
    try:
        yield Team(rank(), size(), place)
        with suppress(RuntimeError):  # of one that has gone already
            dist.barrier()
    finally:
        dist.destroy_process_group()

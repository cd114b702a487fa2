"""Operations on a tree of tensors (nested dicts and tuples), which is what a world model's memory is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Tree = Any  # Tensor | dict[str, Tree] | tuple[Tree, ...] | None


def map(fn: Callable[..., Tensor], tree: Tree, *others: Tree) -> Tree:
    """Applies fn leaf by leaf to trees of the same structure."""
    if isinstance(tree, dict):
        return {key: map(fn, value, *(other[key] for other in others)) for key, value in tree.items()}
    if isinstance(tree, tuple):
        mapped = [map(fn, value, *(other[i] for other in others)) for i, value in enumerate(tree)]
        return type(tree)(*mapped) if hasattr(tree, "_fields") else tuple(mapped)
    return None if tree is None else fn(tree, *others)


def leaves(tree: Tree) -> list[Tensor]:
    """All tensors of a tree, in order."""
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    if isinstance(tree, tuple):
        return [leaf for value in tree for leaf in leaves(value)]
    return [] if tree is None else [tree]


def to(tree: Tree, device: torch.device | str) -> Tree:
    """The same tree on `device`."""
    return map(lambda leaf: leaf.to(device, non_blocking=True), tree)


def where(mask: Tensor, yes: Tree, no: Tree) -> Tree:
    """Row by row: `yes` where mask (B,) is True, else `no`."""
    return map(lambda a, b: torch.where(mask.view(-1, *[1] * (b.dim() - 1)), a, b), yes, no)


def rows(tree: Tree, index: Any) -> Tree:
    """Picks rows (the first dimension) by index or mask, or as any index of a tensor does."""
    return map(lambda leaf: leaf[index], tree)


def concat(*parts: Tree) -> Tree:
    """The rows of trees of the same structure, one after the other."""
    return map(lambda *leaves: torch.cat(leaves), *parts)


def size_bytes(tree: Tree) -> int:
    """Memory the tree's tensors take."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(tree))

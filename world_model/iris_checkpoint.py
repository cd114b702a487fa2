"""Reads a checkpoint of the published IRIS (Micheli et al. 2023) into our tokenizer and transformer, and says how the
names of the two correspond.

A checkpoint is one flat state dict with the prefixes `tokenizer.`, `world_model.` and `actor_critic.`.
"""

from __future__ import annotations

import math
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from envs.errors import UserError
from world_model.parts.gpt import GPT, GPTConfig
from world_model.parts.vq_tokenizer import VQTokenizer, VQTokenizerConfig

# Fragments of our parameters' names, and what they read in a published state dict; several: ours are those stacked.
TOKENIZER_NAMES: dict[str, tuple[str, ...]] = {
    "/": (".",),
    ".qkv.": (".q.", ".k.", ".v."),
}
WORLD_MODEL_NAMES: dict[str, tuple[str, ...]] = {
    "embedding.weight": ("embedder.embedding_tables.1.weight", "embedder.embedding_tables.0.weight"),
    "position": ("pos_emb.weight",),
    "blocks.": ("transformer.blocks.",),
    ".norm1.": (".ln1.",),
    ".norm2.": (".ln2.",),
    ".qkv.": (".attn.query.", ".attn.key.", ".attn.value."),
    ".out.": (".attn.proj.",),
    "norm.": ("transformer.ln_f.",),
    "next_token.": ("head_observations.head_module.",),
    "reward.": ("head_rewards.head_module.",),
    "end.": ("head_ends.head_module.",),
}
# The frozen perceptual network, which is not needed, and the causal mask, which follows from the positions.
IGNORED = re.compile(r"tokenizer\.lpips\.|world_model\.transformer\.blocks\.\d+\.attn\.mask$")
# What torch and zipfile are known to raise on broken files, beside pickle's own error.
BROKEN: tuple[type[Exception], ...] = (RuntimeError, EOFError, OSError, LookupError, TypeError, ValueError)
BROKEN += (AttributeError, AssertionError, OverflowError, MemoryError, struct.error, zlib.error, zipfile.BadZipFile)
NAMED = 4  # how many keys of one kind an error names


class Published(NamedTuple):
    """What a checkpoint holds. The actor-critic's tensors keep their names, without the prefix; none if absent."""

    tokenizer: VQTokenizer
    world_model: GPT
    actor_critic: dict[str, Tensor]


def read(path: Path | str, heads: int = 4) -> Published:
    """The checkpoint at `path`. All sizes follow from its shapes, except the number of attention heads.

    Raises `UserError` for a file that is absent, not complete, holds more than tensors, or other names and shapes.
    """
    state = _load(Path(path))
    try:
        tokenizer, world_model = _build(state, heads)
        _fill(tokenizer, world_model, state)
    except ValueError as problem:
        raise refused(path, problem) from problem
    prefix = "actor_critic."
    actor_critic = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
    return Published(tokenizer, world_model, actor_critic)


def published_names(model: VQTokenizer | GPT) -> dict[str, Tensor]:
    """Every parameter under its published name, without prefix; parts of a stacked one are views of it."""
    table = WORLD_MODEL_NAMES if isinstance(model, GPT) else TOKENIZER_NAMES
    found: dict[str, Tensor] = {}
    for name, tensor in model.named_parameters():
        names = [name]
        for ours, theirs in table.items():
            inside = ours[0] in "./" and ours in name
            if inside or name.startswith(ours):  # without a leading dot a fragment begins the name
                names = [known.replace(ours, their) for their in theirs for known in names]
        sizes = [tensor.shape[0] // len(names)] * len(names)
        if isinstance(model, GPT) and name == "embedding.weight":
            sizes = [model.config.codes, model.actions]
        found.update(zip(names, tensor.detach().split(sizes), strict=True))
    return found


def _load(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        content = _unpickled(path)
    except pickle.UnpicklingError as problem:
        foreign = re.search(r"GLOBAL ([\w.]+)", str(problem))
        if foreign is None:
            raise UserError(f"{path} is not a complete checkpoint file.") from problem
        text = f"{path} holds more than tensors and plain values ({foreign[1]}) and is not loaded."
        raise UserError(text) from problem
    except BROKEN as problem:
        raise UserError(f"{path} is not a complete checkpoint file.") from problem
    plain = isinstance(content, dict) and all(isinstance(key, str) for key in content)
    if not plain or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} is no checkpoint of the published IRIS: those are one dict of named tensors.")
    return {key: value for key, value in content.items() if not IGNORED.match(key)}


def _unpickled(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:  # torch itself does not compare the checksums that it wrote
            if archive.testzip() is not None:
                raise EOFError
    return torch.load(path, map_location="cpu", weights_only=True)


def _build(state: Mapping[str, Tensor], heads: int) -> tuple[VQTokenizer, GPT]:
    channels, colours = _shape(state, "tokenizer.encoder.conv_in.weight", 4)[:2]
    codes, width = _shape(state, "tokenizer.embedding.weight", 2)
    levels = _count(state, r"tokenizer\.encoder\.down\.(\d+)\.")
    attention = sorted(level for level in range(levels) if f"tokenizer.encoder.down.{level}.attn.0.q.weight" in state)
    tokenizer = VQTokenizerConfig(
        codes=codes,
        width=width,
        channels=channels,
        halvings=levels - 1,
        blocks=_count(state, r"tokenizer\.encoder\.down\.0\.block\.(\d+)\."),
        attention=tuple(attention),
    )
    positions, width = _shape(state, "world_model.pos_emb.weight", 2)
    (steps,) = _shape(state, "world_model.head_rewards.indices", 1)
    tokens = positions // max(steps, 1) - 1
    side = math.isqrt(max(tokens, 0))
    if not steps or positions % steps or side**2 != tokens or not side:
        raise ValueError(f"{positions} positions in {steps} steps are not a square of tokens and an action each")
    world_model = GPTConfig(
        codes=_shape(state, "world_model.embedder.embedding_tables.1.weight", 2)[0],
        tokens=tokens,
        context_frames=steps,
        keep=max(1, steps // 2),
        width=width,
        layers=_count(state, r"world_model\.transformer\.blocks\.(\d+)\."),
        heads=heads,
    )
    if world_model.codes != codes:
        raise ValueError(f"its tokenizer has {codes} codes, its transformer {world_model.codes}")
    actions = _shape(state, "world_model.embedder.embedding_tables.0.weight", 2)[0]
    pixels = side * 2**tokenizer.halvings
    return tokenizer.build((colours, pixels, pixels)), world_model.build(actions)


def _fill(tokenizer: VQTokenizer, world_model: GPT, state: Mapping[str, Tensor]) -> None:
    models: dict[str, VQTokenizer | GPT] = {"tokenizer": tokenizer, "world_model": world_model}
    ours = {f"{part}.{name}": tensor for part in models for name, tensor in published_names(models[part]).items()}
    layout = _layout(world_model)
    given = {key: tensor for key, tensor in state.items() if not key.startswith("actor_critic.")}
    _compare(ours | layout, given)
    for key, tensor in layout.items():
        if not torch.equal(tensor, given[key]):
            raise ValueError(f"by {key} its steps are not {world_model.config.tokens} tokens and then the action")
    copy_named(ours, {key: given[key] for key in ours})


def copy_named(ours: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Copies each given tensor into ours of the same name; all or, if anything is wrong, none.

    Raises ValueError naming what is missing, unknown, of another shape, no numbers or not finite.
    """
    _compare(ours, given)
    if endless := _named(key for key in ours if not given[key].isfinite().all()):
        raise ValueError(f"not finite are {endless}")
    for key, tensor in ours.items():
        tensor.copy_(given[key])


def _compare(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    both = wanted.keys() & given.keys()
    misshapen = [key for key in wanted if key in both and wanted[key].shape != given[key].shape]
    floats = [key for key in wanted if key in both and wanted[key].is_floating_point()]
    problems = {
        "it misses": _named(key for key in wanted if key not in both),
        "it has the unknown": _named(key for key in given if key not in both),
        "misshapen are": _named(f"{key} ({_by(given[key])} instead of {_by(wanted[key])})" for key in misshapen),
        "not numbers are": _named(key for key in floats if not given[key].is_floating_point()),
    }
    if any(problems.values()):
        raise ValueError("; ".join(f"{what} {names}" for what, names in problems.items() if names))


def refused(path: Path | str, problem: ValueError) -> UserError:
    """What a person is told of a file that is something else."""
    return UserError(f"{path} is no checkpoint of the published IRIS: {problem}.")


def _layout(world_model: GPT) -> dict[str, Tensor]:
    """At which of all positions each head speaks, as the published buffers say it."""
    position = torch.arange(world_model.window).unflatten(0, (-1, world_model.stride))
    last = world_model.config.tokens - 1
    ahead = torch.cat([position[:, :last], position[:, last + 1 :]], 1).flatten()
    at = {"observations": ahead, "rewards": position[:, -1], "ends": position[:, -1]}
    return {f"world_model.head_{head}.indices": where for head, where in at.items()}


def _shape(state: Mapping[str, Tensor], key: str, dimensions: int) -> tuple[int, ...]:
    if key not in state:
        raise ValueError(f"it misses {key}")
    if state[key].dim() != dimensions or not state[key].numel():
        raise ValueError(f"{key} has the shape {_by(state[key])} instead of {dimensions} dimensions")
    return tuple(state[key].shape)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the highest number in keys that begin like this; never more than there are keys."""
    numbers = [int(found[1]) for key in state if (found := re.match(pattern, key))]
    if not numbers:
        raise ValueError("it misses " + pattern.replace("\\", "").replace("(d+)", "0") + "*")
    return min(max(numbers) + 1, len(state))


def _named(keys: Iterable[str]) -> str:
    keys = list(keys)
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(keys[:NAMED]) + more


def _by(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "a single number"

"""Every recipe at its toy size: what the tests of world models and policies run on. A new recipe joins by itself.

Shapes: B batch, T time, C H W picture, A action size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agent.player import Agent
from agent.trainer import masked
from envs.spec import Spec
from runs import build
from runs.config import Config
from runs.recipes import RECIPES
from world_model import trees
from world_model.interface import Batch, Losses, State, WorldModel
from world_model.trees import Tree

OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {  # choices of a recipe that change how it works; most have none
    "iris": ({}, {"quantizer": "ema", "keep": 3, "contrast": True}),
    "iris_ac": (
        {"quantizer": "fsq", "levels": (8, 4), "attention": (), "local": True},
        {"dynamics": "block", "history": 2, "quantizer": "fsq", "levels": (8, 4), "attention": (), "local": True},
    ),
    "reverie": (
        {"dynamics": "gru"},
        {"dynamics": "transformer", "window": 5},
        {"points": 2, "distances": True, "twohot": "symexp"},
    ),
    "spatial": (
        {},
        {"block_attention": "whole", "merge": 1, "refine": 0},
    ),
    "latent_gru": (
        {},
        {"view": "frame", "recurrent": False, "place_attention": 0, "residual": True, "outcome_reads": "codes"},
    ),
    "latent_action": (
        {"recurrent": True},
        {
            "pair_encoder": "cvivit",
            "positions": 2,
            "codes": 16,
            "quantizer": "fsq",
            "levels": (4, 4),
            "outcome_reads": "codes",
        },
        {"tokens_of": "frame"},
    ),
}
DISCRETE_ONLY = ("iris", "iris_ac", "latent_action", "latent_gru", "spatial")


@dataclass(frozen=True)
class Variant:
    """A recipe with one choice of its options and one kind of actions."""

    recipe: str
    options: dict[str, Any]
    discrete: bool

    @property
    def config(self) -> Config:
        config = RECIPES[self.recipe]("toy")
        return replace(config, model=replace(config.model, **self.options))

    @property
    def spec(self) -> Spec:
        game = self.config.game
        return Spec(game.frame_shape, 4 if self.discrete else 2, self.discrete)

    def agent(self, seed: int = 0) -> Agent:
        """World model and learner, with noise on every parameter: an output that starts at 0 would hide much."""
        made = build.agent(replace(self.config, seed=seed), self.spec)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        made.world_model.prepare(segments(self.spec, 4, 8, seed=99).frame.flatten(0, 1) / 255)
        return made

    def __str__(self) -> str:
        return "-".join([self.recipe, *map(str, self.options.values()), "discrete" if self.discrete else "continuous"])


VARIANTS = [
    Variant(recipe, options, discrete)
    for recipe in RECIPES
    for options in OPTIONS.get(recipe, ({},))
    for discrete in (True, False)
    if discrete or recipe not in DISCRETE_ONLY
]


def segments(spec: Spec, batch_size: int, length: int, *, seed: int = 0) -> Batch:
    """Random segments: frames of coloured blocks, the last row shorter than the others and padded."""
    rng = torch.Generator().manual_seed(seed)
    size, (channels, height, width) = (batch_size, length), spec.frame
    blocks = torch.randint(256, (*size, channels, 4, 4), generator=rng, dtype=torch.uint8)
    if spec.discrete:
        action = torch.randint(spec.action_size, size, generator=rng)
    else:
        action = torch.rand(*size, spec.action_size, generator=rng) * 2 - 1
    valid = torch.ones(size, dtype=torch.bool)
    valid[-1, length // 2 :] = False
    has_action = valid.clone()
    has_action[-1, length // 2 - 1] = False
    batch = Batch(
        frame=blocks[..., torch.arange(height) * 4 // height, :][..., torch.arange(width) * 4 // width],
        action=action,
        reward=torch.randn(size, generator=rng),
        terminated=torch.rand(size, generator=rng) < 0.2,
        has_action=has_action,
        valid=valid,
    )
    return mix(batch, like(batch, 0), valid=valid, has_action=has_action)


def like(batch: Batch, fill: int) -> Batch:
    """The same batch with every frame, action, reward and ending replaced by one value."""
    names = ("frame", "action", "reward", "terminated", *(("code",) if batch.code is not None else ()))
    same = {name: torch.full_like(getattr(batch, name), fill) for name in names}
    return batch._replace(**same)


def mix(real: Batch, other: Batch, *, valid: Tensor, has_action: Tensor) -> Batch:
    """Frames of `real` where `valid` (B, T), actions and what they brought where `acted` (B, T), else of `other`."""
    masks = {"frame": valid, "action": has_action, "reward": has_action, "terminated": has_action}
    masks |= {"code": valid} if real.code is not None else {}
    mixed = {
        name: torch.where(mask.view(*mask.shape, *[1] * (getattr(real, name).dim() - 2)), getattr(real, name), fake)
        for name, mask in masks.items()
        for fake in [getattr(other, name)]
    }
    return real._replace(**mixed)


def rows(tree: Tree, index: Any) -> Tree:
    """The same rows of every tensor of a tree."""
    return trees.map(lambda leaf: leaf[index], tree)


@torch.no_grad()
def follow(model: WorldModel, state: State, action: Tensor) -> list[Tensor]:
    """All that can be known of a state (B, ...): what it shows, and a dream from it under actions (B, T, ...)."""
    picture = model.decode(state)
    known = [state.latent, *([] if picture is None else [picture]), model.features(state), *model.outcome(state)]
    for t in range(action.shape[1]):
        state, reward, cont = model.step(state, action[:, t], temperature=0)
        known += [state.latent, model.features(state), reward, cont]
    return known


class Lost(NamedTuple):
    """What a loss said, its terms masked."""

    terms: dict[str, Tensor]  # (B, T, ...), zero where the term does not count
    metrics: dict[str, Tensor]
    states: State | None


def lost(losses: Losses, data: Any) -> Lost:
    """A loss with its terms masked by the data it read."""
    terms = {name: masked(term, data) for name, term in losses.terms.items()}
    return Lost(terms, losses.metrics, losses.states)

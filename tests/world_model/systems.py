"""Three small systems of the kinds that the interface must hold, each whole: it dreams, follows, trains and acts.

A posterior that reads its memory, a code of a pair of frames, and a model without pictures.
Shapes: B batch, T time, Z latent, D width of the memory, P numbers of a shrunken frame.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from envs.spec import Spec
from world_model.interface import Batch, Losses, Objective, Optim, Stage, State, Term, WorldModel, to_unit
from world_model.parts.heads import one_hot
from world_model.trees import Tree

Z, D, SIDE = 6, 16, 4


def small(frame: Tensor) -> Tensor:
    """Frames (..., C, H, W) as a few numbers (..., P)."""
    return F.adaptive_avg_pool2d(frame.flatten(0, -4), SIDE).unflatten(0, frame.shape[:-3]).flatten(-3)


class Small(WorldModel):
    """What the three share: h' = tanh(W [h, latent, action]), and a prior, a reward and an ending told by h."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, self.latent_shape, self.feature_size = spec, (Z,), Z + D
        self.pixels = SIDE * SIDE * spec.frame[0]
        self.posterior = nn.Linear(self.sees(), Z)
        self.recur = nn.Linear(D + Z + spec.action_size, D)
        self.prior, self.reward, self.cont = nn.Linear(D, Z), nn.Linear(D + Z, 1), nn.Linear(D + Z, 1)
        self.picture_of = nn.Linear(Z, self.pixels)

    def sees(self) -> int:
        """How many numbers the posterior reads."""
        return self.pixels

    def initial(self, batch_size: int) -> Tree:
        return {"h": self.recur.weight.new_zeros(batch_size, D)}

    def advance(self, state: State, action: Tensor) -> Tree:
        taken = one_hot(action, self.spec.action_size) if self.spec.discrete else action
        h = self.recur(torch.cat([state.memory["h"], state.latent, taken.to(state.latent.dtype)], -1)).tanh()
        return {**state.memory, "h": h.float()}

    def _expected(self, memory: Tree, temperature: float) -> Tensor:
        mean = self.prior(memory["h"]).float().tanh()
        return mean + 0.1 * temperature * torch.randn_like(mean)

    def imagine(self, memory: Tree, temperature: float = 1.0) -> State:
        return State(self._expected(memory, temperature), memory)

    def outcome(self, state: State) -> tuple[Tensor, Tensor]:
        both = self.features(state)
        return self.reward(both).float().squeeze(-1), self.cont(both).float().squeeze(-1).sigmoid()

    def features(self, state: State) -> Tensor:
        return torch.cat([state.latent, state.memory["h"]], -1)

    def decode(self, state: State) -> Tensor | None:
        return self._picture(self.picture_of(state.latent))

    def _picture(self, told: Tensor) -> Tensor:
        channels, height, width = self.spec.frame
        blocks = told.float().sigmoid().unflatten(-1, (channels, SIDE, SIDE))
        return F.interpolate(blocks, (height, width))

    def stages(self) -> tuple[Stage, ...]:
        scales = dict.fromkeys(("seen", "foreseen", "reward", "cont"), 1.0)
        objective = Objective("world_model", tuple(self.parameters()), self.loss, scales, Optim(lr=1e-2))
        return (Stage("world_model", (objective,), 4, 6),)

    def loss(self, batch: Batch) -> Losses:
        """Follows the segments step by step."""
        frame = to_unit(batch.frame)
        state = self.observe(self.initial(len(frame)), frame[:, 0])
        told: dict[str, list[Tensor]] = {name: [] for name in ("seen", "foreseen", "reward", "cont")}
        for t in range(frame.shape[1]):
            memory = self.initial(len(frame)) if t == 0 else self.advance(state, batch.action[:, t - 1])
            state = self.observe(memory, frame[:, t])
            reward, cont = self.outcome(state)
            brought = batch.reward[:, t - 1] if t else torch.zeros_like(reward)
            goes_on = 1 - batch.terminated[:, t - 1].float() if t else torch.ones_like(cont)
            told["seen"].append(self._likeness(state, frame[:, t]))
            told["foreseen"].append((self.prior(memory["h"]).tanh() - state.latent.detach()).square().mean(-1))
            told["reward"].append((reward - brought).square())
            told["cont"].append(F.binary_cross_entropy(cont.clamp(1e-6, 1 - 1e-6), goes_on, reduction="none"))
        masks = {"seen": "valid", "foreseen": "arrived", "reward": "arrived", "cont": "arrived"}
        return Losses({name: Term(torch.stack(each, 1), masks[name]) for name, each in told.items()}, {})

    def _likeness(self, state: State, frame: Tensor) -> Tensor:
        return (self.picture_of(state.latent).sigmoid() - small(frame)).square().mean(-1)


class RememberingPosterior(Small):
    """What it makes of a frame depends on what it remembers (DreamerV3's kind)."""

    def sees(self) -> int:
        return self.pixels + D

    def observe(self, memory: Tree, frame: Tensor) -> State:
        return State(self.posterior(torch.cat([small(frame), memory["h"]], -1)).float().tanh(), memory)


class PairCode(Small):
    """A latent is the code of a frame and the one before; a picture is drawn from that frame and the code."""

    def sees(self) -> int:
        return 2 * self.pixels

    def initial(self, batch_size: int) -> Tree:
        frame = self.recur.weight.new_zeros(batch_size, *self.spec.frame)
        pictures = {"before": frame, "frame": frame.clone(), "seen": frame[:, 0, 0, 0].clone()}
        return {**super().initial(batch_size), **pictures}

    def _code(self, before: Tensor, frame: Tensor) -> Tensor:
        return self.posterior(torch.cat([small(before), small(frame)], -1)).float().tanh()

    def observe(self, memory: Tree, frame: Tensor) -> State:
        began = memory["seen"].view(-1, 1, 1, 1) == 0
        before = torch.where(began, frame, memory["frame"])  # of an episode's first frame: the pair (frame, frame)
        return State(self._code(before, frame), self._stands(memory, before, frame))

    def imagine(self, memory: Tree, temperature: float = 1.0) -> State:
        latent, before = self._expected(memory, temperature), memory["frame"]
        return State(latent, self._stands(memory, before, self._drawn(before, latent)))

    def decode(self, state: State) -> Tensor:
        return self._drawn(state.memory["before"], state.latent)

    def _stands(self, memory: Tree, before: Tensor, frame: Tensor) -> Tree:
        return {**memory, "before": before, "frame": frame, "seen": torch.ones_like(memory["seen"])}

    def _drawn(self, before: Tensor, latent: Tensor) -> Tensor:
        return (before + self._picture(self.picture_of(latent)) - 0.5).clamp(0, 1)

    def stages(self) -> tuple[Stage, ...]:
        """The codes of an episode are made once: its prior learns from them, its tokenizer from the frames."""
        parts = (self.recur, self.prior, self.reward, self.cont)
        dynamics = tuple(parameter for part in parts for parameter in part.parameters())
        known = {id(parameter) for parameter in dynamics}
        tokenizer = tuple(parameter for parameter in self.parameters() if id(parameter) not in known)
        scales = {"foreseen": 1.0, "reward": 1.0, "cont": 1.0}
        see = Objective("tokenizer", tokenizer, self._tokenizer_loss, {"seen": 1.0}, Optim(lr=1e-2))
        foresee = Objective("dynamics", dynamics, self._dynamics_loss, scales, Optim(lr=1e-2))
        return Stage("tokenizer", (see,), 4, 6, 2), Stage("dynamics", (foresee,), 4, 6, 2, self.codes)

    @torch.no_grad()
    def codes(self, frame: Tensor, action: Tensor) -> Tensor:
        """An episode's codes: frames (T, C, H, W) -> (T, Z)."""
        return self._code(torch.cat([frame[:1], frame[:-1]]), frame)

    def _tokenizer_loss(self, batch: Batch) -> Losses:
        frame = to_unit(batch.frame)
        before = torch.cat([frame[:, :1], frame[:, :-1]], 1)
        told = self.picture_of(self._code(before, frame)).sigmoid() - 0.5 + small(before)
        return Losses({"seen": Term((told - small(frame)).square(), "valid")}, {})

    def _dynamics_loss(self, batch: Batch) -> Losses:
        assert batch.code is not None
        memory = super().initial(len(batch.frame))
        told: dict[str, list[Tensor]] = {name: [] for name in ("foreseen", "reward", "cont")}
        for t in range(1, batch.frame.shape[1]):
            memory = self.advance(State(batch.code[:, t - 1], memory), batch.action[:, t - 1])
            reward, cont = self.outcome(State(batch.code[:, t], memory))
            goes_on = 1 - batch.terminated[:, t - 1].float()
            told["foreseen"].append((self.prior(memory["h"]).tanh() - batch.code[:, t]).square())
            told["reward"].append((reward - batch.reward[:, t - 1]).square())
            told["cont"].append(F.binary_cross_entropy(cont.clamp(1e-6, 1 - 1e-6), goes_on, reduction="none"))
        padded = {name: torch.stack([torch.zeros_like(each[0]), *each], 1) for name, each in told.items()}
        return Losses({name: Term(value, "arrived") for name, value in padded.items()}, {})


class Unseen(Small):
    """It follows a game and dreams, and has no pictures."""

    def observe(self, memory: Tree, frame: Tensor) -> State:
        return State(self.posterior(small(frame)).float().tanh(), memory)

    def decode(self, state: State) -> None:
        return None

    def _likeness(self, state: State, frame: Tensor) -> Tensor:
        return torch.zeros_like(state.latent[:, 0])


SYSTEMS: dict[str, Callable[[Spec], WorldModel]] = {
    "remembering_posterior": RememberingPosterior, "pair_code": PairCode, "unseen": Unseen,
}  # fmt: skip

"""A token world in which the player picks the transition's code instead of an action.

For worlds that encode a whole transition as one of few codes (`latent_action` with `model.positions=1`), whose codes
are then its actions (Bruce et al. 2024, "Genie"), and those whose first code is the action's own
(`model.action_codes`), of which the others are dreamed. Shapes: B batch, C H W picture, V codes that are played.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from world_model.interface import Stage, State, WorldModel
from world_model.token_world import TokenWorld
from world_model.trees import Tree


class CodeWorld(WorldModel):
    """Latent and features as those of the world within. Memory: its memory, and the code that was chosen (B,)."""

    action_of: Tensor

    def __init__(self, world: TokenWorld, action_of: Tensor) -> None:
        """`action_of` (V,): the game's action that stands for each code, from which reward and ending are told.

        Raises ValueError for a world with several codes a transition, none of which is the action's own.
        """
        super().__init__()
        if not world.played_codes:
            raise ValueError("only a world with one code for a whole transition (model.positions=1) is played by codes")
        self.world = world
        self.spec = replace(world.spec, action_size=world.played_codes)
        self.latent_shape, self.feature_size = world.latent_shape, world.feature_size
        self.register_buffer("action_of", action_of)

    def initial(self, batch_size: int) -> Tree:
        return self._with(self.world.initial(batch_size), torch.zeros_like(self.action_of[:1]).expand(batch_size))

    def advance(self, state: State, action: Tensor) -> Tree:
        return self._with(self.world.advance(self._within(state), self.action_of[action]), action)

    def imagine(self, memory: Tree, temperature: float = 1.0) -> State:
        """The transition that was chosen; only its other codes are left to chance."""
        chosen = memory["code"].unsqueeze(1)
        if self.latent_shape != (1,):
            chosen = torch.cat([chosen, self.world.sample_tokens(memory["world"], temperature)[:, 1:]], 1)
        return self._around(self.world.arrived(memory["world"], chosen), memory["code"])

    def observe(self, memory: Tree, frame: Tensor) -> State:
        return self._around(self.world.observe(memory["world"], frame), memory["code"])

    def outcome(self, state: State) -> tuple[Tensor, Tensor]:
        return self.world.outcome(self._within(state))

    def features(self, state: State) -> Tensor:
        return self.world.features(self._within(state))

    def decode(self, state: State) -> Tensor | None:
        return self.world.decode(self._within(state))

    def start(self, frame: Tensor, action: Tensor | None = None) -> State:
        """The codes between the frames are read off them, whatever the actions were."""
        if frame.shape[1] == 1:
            return super().start(frame)
        code = self.world.encode(frame[:, 1:], frame[:, :-1])[..., 0]
        return self._around(self.world.start(frame, self.action_of[code]), code[:, -1])

    def reward_sign(self, state: State) -> Tensor:
        return self.world.reward_sign(self._within(state))

    def unseen(self, state: State) -> State:
        return self._around(self.world.unseen(self._within(state)), state.memory["code"])

    def own(self, memory: Tree) -> Tree:
        return self._with(self.world.own(memory["world"]), memory["code"])

    def condense(self, memory: Tree) -> Tree:
        return self._with(self.world.condense(memory["world"]), memory["code"])

    def recall(self, condensed: Tree) -> Tree:
        return self._with(self.world.recall(condensed["world"]), condensed["code"])

    def stages(self) -> tuple[Stage, ...]:
        """None: it is trained as the world within."""
        return ()

    def _within(self, state: State) -> State:
        return State(state.latent, state.memory["world"])

    def _around(self, state: State, code: Tensor) -> State:
        return State(state.latent, self._with(state.memory, code))

    @staticmethod
    def _with(memory: Tree, code: Tensor) -> Tree:
        return {"world": memory, "code": code.clone()}


@torch.no_grad()
def meanings(world: TokenWorld, frame: Tensor, action: Tensor) -> Tensor:
    """How often each action was taken where each code came, (V, A).

    In frames (S, T, C, H, W) in [0, 1] and what was done between them (S, T - 1).
    """
    counts = torch.zeros(world.played_codes, world.spec.action_size, device=frame.device)
    for frames, actions in zip(frame.split(8), action.split(8), strict=True):
        code = world.encode(frames[:, 1:], frames[:, :-1])[..., 0].flatten()
        counts.index_put_((code, actions.flatten()), torch.ones(1, device=frame.device), accumulate=True)
    return counts

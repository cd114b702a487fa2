"""What happens next in one visitor's game: the world model and the policy with random numbers of their own.

Shapes: C H W picture, F features; B is 1 everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import torch
from torch import Tensor

from envs.controls import Action
from envs.games import Transition
from play.snapshot import Estimate, Packed, Parts, Snapshot, View
from policies.planner import Planner
from policies.random import random_actions
from world_model import trees
from world_model.dream.batch import Dream, DreamBatch
from world_model.interface import State, to_unit
from world_model.trees import Tree


class Dreamer(DreamBatch):
    """Views from views, of one dream and of the real game that the model follows; and the agent's choice in them."""

    def __init__(self, parts: Parts, seed: int) -> None:
        super().__init__(parts.world, seed)
        self.parts, self.model, self.policy = parts, parts.world.model, parts.learner.policy

    def from_start(self, start: int) -> View:
        """A dream that goes on from one of the world's starts."""
        return _view(self.begin(np.array([start])))

    def from_frame(self, frame: np.ndarray, film: np.ndarray) -> View:
        """The real game at its first frame (C, H, W) uint8; `film` is its own picture."""
        return View(self.model.observe(self.model.initial(1), self._unit(frame)), _shown(frame), film, frame)

    def from_state(self, state: State, total: float = 0.0) -> View:
        """A dream that begins at this state."""
        return _view(self.at(state), total)

    def follow(self, before: View, action: Action, brought: Transition, film: np.ndarray) -> View:
        """The real game one step on."""
        state, _, cont = self.model.step(before.state, self._tensor(action), frame=self._unit(brought.frame))
        score, frame = float(brought.score), brought.frame
        return View(state, _shown(frame), film, frame, score, before.total + score, float(cont), bool(brought.done))

    def dream(self, before: View, action: Action, temperature: float, off: Collection[int] = ()) -> View:
        """The dream one step on; once it has ended it stays so, however long it is dreamed on.

        `off`: components of the mixture that are drawn from no more, where there is one.
        """
        state = before.state
        if self.model.components:
            state = State(state.latent, self.model.without(state.memory, off))
        return _view(self.step(state, self._tensor(action), temperature), before.total, before.done)

    def act(self, view: Tensor, memory: Tree) -> tuple[Action, Tree]:
        """The agent's choice."""
        action, memory = self.policy.act(view, memory)
        return self._plain(action), memory

    def plan(self, state: State, temperature: float) -> Action:
        """A planner's choice."""
        value = self.parts.learner.value
        return self._plain(Planner(self.model, value, self.parts.planner, temperature).act(state))

    def at_random(self) -> Action:
        """Any action."""
        return self._plain(random_actions(self.model.spec, 1))

    def look(self, side: View) -> tuple[Tensor, Estimate]:
        """What the policy sees (1, F), and what it makes of it."""
        view = self.model.features(side.state)
        value, probabilities = self.parts.learner.value(view), self.policy.probabilities(view)
        listed = None if probabilities is None else probabilities[0].float().tolist()
        return view, Estimate(None if value is None else float(value), listed)

    def condensed(self, moment: Snapshot) -> Snapshot:
        """A moment to be kept beside hundreds."""
        moment = self._remembering(moment, lambda memory: trees.map(_alone, self.model.condense(memory)))
        real = moment.real
        if real is None or not isinstance(real.film, np.ndarray):
            return moment
        return moment._replace(real=real._replace(film=Packed.of(real.film)))

    def recalled(self, moment: Snapshot) -> Snapshot:
        """A condensed moment again."""
        moment = self._remembering(moment, self.model.recall)
        real = moment.real
        if real is None or not isinstance(real.film, Packed):
            return moment
        return moment._replace(real=real._replace(film=real.film.picture()))

    @staticmethod
    def _remembering(moment: Snapshot, change: Callable[[Tree], Tree]) -> Snapshot:
        def changed(side: View | None) -> View | None:
            return side and side._replace(state=side.state._replace(memory=change(side.state.memory)))

        return moment._replace(dream=changed(moment.dream), real=changed(moment.real))

    def _plain(self, action: Tensor) -> Action:
        return int(action[0]) if self.model.spec.discrete else tuple(action[0].tolist())

    def _unit(self, frame: np.ndarray) -> Tensor:
        return to_unit(torch.from_numpy(frame).to(self.device).unsqueeze(0))

    def _tensor(self, action: Action) -> Tensor:
        return torch.tensor([action], dtype=torch.int64 if isinstance(action, int) else torch.float32).to(self.device)


def _alone(leaf: Tensor) -> Tensor:
    """A leaf without the rest of the larger tensor of which it may be a view."""
    return leaf.clone() if leaf.untyped_storage().nbytes() > leaf.numel() * leaf.element_size() else leaf


def _view(dream: Dream, total: float = 0.0, done: bool = False) -> View:
    """One dream as a display shows it."""
    reward, cont, ended = dream.reward.item(), dream.cont.item(), dream.ended.item()
    return View(dream.state, dream.observation[0], None, None, reward, total + reward, cont, done or ended)


def _shown(frame: np.ndarray) -> np.ndarray:
    """(C, H, W) -> (H, W, 3); gray becomes RGB."""
    return np.ascontiguousarray(np.broadcast_to(frame.transpose(1, 2, 0), (*frame.shape[1:], 3)))

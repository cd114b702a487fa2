"""Where dreams begin: after a real context that the world model and a policy with a memory have followed.

Shapes: B batch, F features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from agent.loop import Loop
from agent.player import Agent, Player
from agent.replay import Replay
from agent.replay_config import ReplayConfig
from agent.trainer import TrainConfig
from envs.errors import UserError
from envs.games import GameConfig
from envs.make import make_games
from envs.spec import Spec
from envs.tiny import register
from policies.cnn_lstm import CnnLstm, CnnLstmConfig
from policies.imagination import imagine
from policies.interface import Policy, Rollout, Trajectory, Update
from world_model.interface import Stage, State, WorldModel
from world_model.trees import Tree

SIZE = 3 * 16 * 16
SMALL = CnnLstmConfig(channels=(4, 8), hidden=16, starts=6, horizon=3, updates=1)


class Mirror(WorldModel):
    """Sees everything, and dreams that nothing moves; its memory counts the actions and sums them up."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, self.latent_shape, self.feature_size = spec, spec.frame, SIZE
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def decode(self, state: State) -> Tensor:
        return state.latent

    def initial(self, batch_size: int) -> Tree:
        return {"count": torch.zeros(batch_size), "sum": torch.zeros(batch_size), "last": torch.zeros(batch_size, SIZE)}

    def advance(self, state: State, action: Tensor) -> Tree:
        memory = state.memory
        now = {"count": memory["count"] + 1, "sum": 2 * memory["sum"] + action}
        return {**now, "last": state.latent.flatten(1)}

    def imagine(self, memory: Tree, temperature: float = 1.0) -> State:
        return State(memory["last"].view(-1, *self.spec.frame), memory)

    def observe(self, memory: Tree, frame: Tensor) -> State:
        return State(frame + self.weight, memory)

    def outcome(self, state: State) -> tuple[Tensor, Tensor]:
        return state.memory["count"], torch.ones_like(state.memory["count"])

    def features(self, state: State) -> Tensor:
        count, total = state.memory["count"].unsqueeze(1), state.memory["sum"].unsqueeze(1)
        return state.latent.flatten(1) * 0.9**count + total / 100

    def reward_sign(self, state: State) -> Tensor:
        return self.outcome(state)[0]  # all of it, to be read below

    def stages(self) -> tuple[Stage, ...]:
        return ()


class Listener(CnnLstm):
    """Keeps the dreams it is given."""

    dreams: list[Trajectory]

    def improve(self, rollout: Rollout, update: Update) -> dict[str, Tensor]:
        self.dreams = [*getattr(self, "dreams", []), rollout(self.policy)]
        return {}


def work(at_start: float = 0.0, burn_in: int = 4, **config: Any) -> Loop:
    """Two episodes of 20 frames, and one that has not ended."""
    register()
    torch.manual_seed(0)
    settings = replace(SMALL, **config)
    games = make_games("Count-v0", GameConfig(size=16, gray=False, num_envs=1))
    agent = Agent(Mirror(games.spec), Listener(settings, SIZE, games.spec))
    replay = Replay(None, games.spec, ReplayConfig(), seed=0)
    schedule = TrainConfig(burn_in=burn_in, at_start=at_start, precision="fp32")
    made = Loop(agent, games, replay, config=schedule, dreams=settings, seed=0)
    made.collector.collect(50, at_random=True)
    return made


def dreamed(made: Loop) -> Trajectory:
    made.train_policy()
    assert isinstance(made.agent.learner, Listener)
    return made.agent.learner.dreams[-1]


def test_a_dream_begins_as_the_player_would_stand_there() -> None:
    made = work()
    dream, model = dreamed(made), made.agent.world_model
    known = torch.zeros(len(dream.view), dtype=torch.bool)
    for episode in made.replay.memory().values():
        begins = np.arange(len(episode.action) - 4)
        player = Player(made.agent)  # who has begun to play at every moment, side by side
        for t in range(5):
            before = player.policy_memory
            player.act(episode.frame[begins + t], np.full(len(begins), t == 0))
            player.took(episode.action[begins + t])  # the game took another than it chose
        assert player.state is not None
        seen = model.features(player.state)
        for row, view in enumerate(dream.view[:, 0]):
            for begin in torch.nonzero((seen - view).abs().amax(1) < 1e-6).flatten().tolist():
                known[row] = True
                for key in ("h", "c"):
                    assert_close(dream.memory[key][row], before[key][begin])
    assert known.all()
    assert dream.view.shape == (6, 4, SIZE) and dream.action.shape == (6, 3)
    assert dream.reward.eq(torch.tensor([5.0, 6.0, 7.0])).all(), "the world model has seen four actions"


@pytest.mark.parametrize("length", [1, 3, 40])
def test_the_player_follows_the_open_episodes_anew(length: int) -> None:
    """As one who is at the controls since then, row by row, whatever it remembered before."""
    made = work()
    going = made.replay.open()
    assert len({len(episode) for episode in going.values()} - {0}) == 1
    made.collector.player.state = State(torch.full((4, 3, 16, 16), 9.0), {})
    made.collector.burn_in(length)
    player = made.collector.player
    assert player.state is not None and player.action is not None
    for row, episode in going.items():
        alone, steps = Player(made.agent), min(length, len(episode))
        for t in range(len(episode) - steps, len(episode)):
            alone.act(episode.frame[t : t + 1], np.array([t == len(episode) - steps]))
            alone.action = torch.from_numpy(episode.action[t : t + 1])
        assert alone.state is not None
        assert torch.equal(player.action[row : row + 1], torch.from_numpy(episode.action[-1:]))
        assert_close(player.state.latent[row], alone.state.latent[0])
        for key in ("count", "sum"):
            assert_close(player.state.memory[key][row], alone.state.memory[key][0])
        for key in ("h", "c"):
            assert_close(player.policy_memory[key][row], alone.policy_memory[key][0], atol=1e-6, rtol=1e-5)


def test_rows_whose_contexts_differ_in_length_begin_in_time() -> None:
    made, episode = work(), next(iter(work().replay.memory().values()))
    empty = np.zeros((0, *episode.frame.shape[1:]), np.uint8), np.zeros(0, np.int64)
    player = Player(made.agent)
    player.burn_in([(episode.frame[:5], episode.action[:5]), empty, (episode.frame[:2], episode.action[:2])])
    assert player.state is not None
    assert player.state.memory["count"].tolist()[::2] == [4, 1]
    player.burn_in([empty])
    assert player.state is None


def test_the_memory_of_a_dream_is_a_real_one_and_its_actions_follow_from_it() -> None:
    made = work()
    dream, policy = dreamed(made), made.agent.learner.policy
    assert not any(torch.equal(leaf, torch.zeros_like(leaf)) for leaf in dream.memory.values())
    assert not dream.memory["h"].requires_grad and not dream.view.requires_grad
    state, memory = made.states(5), {key: torch.randn(5, 16) for key in ("h", "c")}
    greedy = _Greedy(policy)
    seen = imagine(made.agent.world_model, greedy, state, horizon=2, memory=memory)
    expected = policy.act(seen.view[:, 0], memory, greedy=True)
    assert_close(seen.memory, memory, rtol=0, atol=0)
    assert torch.equal(seen.action[:, 0], expected[0])
    assert torch.equal(seen.action[:, 1], policy.act(seen.view[:, 1], expected[1], greedy=True)[0])
    assert_close(imagine(made.agent.world_model, greedy, state, horizon=2).memory, policy.initial(5))


class _Greedy(Policy):
    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def initial(self, batch_size: int) -> Tree:
        return self.policy.initial(batch_size)

    def act(self, view: Tensor, memory: Tree = (), greedy: bool = False) -> tuple[Tensor, Tree]:
        return self.policy.act(view, memory, greedy=True)


def test_states_that_a_world_model_tells_are_no_start_for_a_policy_that_remembers() -> None:
    made = work()
    made.train_policy(made.states(2)._replace(latent=torch.full((2, 3, 16, 16), 9.0)))
    assert isinstance(made.agent.learner, Listener)
    assert made.agent.learner.dreams[0].view.max() < 2 and made.agent.learner.dreams[0].memory["h"].any()


def test_dreams_from_first_frames_remember_nothing() -> None:
    dream = dreamed(work(at_start=0.5))
    initial = (dream.memory["h"] == 0).all(1)
    assert initial.tolist() == [True] * 3 + [False] * 3
    assert (dream.view[:3, 0] == 0).all(), "Count-v0 begins at 0, which is black"
    assert dream.reward[:, 0].tolist() == [1, 1, 1, 5, 5, 5]


def test_no_dream_begins_at_or_behind_the_end_of_a_game() -> None:
    made = work(burn_in=17)  # 19 of 20 indices are acted on: contexts of 18 frames end at 17 or 18, and 19 is the end
    state = made.states(200)
    assert state.latent.shape == (200, 3, 16, 16)
    bits = state.latent[:, 0, 2::4, 2::4].flatten(1)  # 4 x 4 blocks of 4 pixels
    count = (bits.round() * 2 ** torch.arange(16)).sum(1)
    assert set(count.tolist()) == {17.0, 18.0, 19.0}
    assert state.memory["count"].eq(17).all()


def test_where_all_episodes_are_shorter_than_the_burn_in_dreams_begin_with_them() -> None:
    assert work(burn_in=19).states(3).memory["count"].tolist() == [19] * 3
    short = work(burn_in=20).states(3)
    assert short.memory["count"].tolist() == [0] * 3 and not short.latent.any(), "Count-v0 begins at 0, which is black"


def test_only_the_memory_of_a_segment_from_within_a_game_warms_up() -> None:
    made = work(burn_in=4)
    batch = made.replay.sample(64, 8)
    place = torch.arange(8).expand(64, 8).float()
    told = made._usable(State(place, {"row": torch.arange(64).unsqueeze(1).expand(64, 8)}), batch)
    assert batch.is_first is not None and 0 < batch.is_first.sum() < 64
    for row, begins in enumerate(batch.is_first.tolist()):
        assert told.latent[told.memory["row"] == row][0] == (0 if begins else 4)


def test_no_starts_are_told() -> None:
    with pytest.raises(UserError, match="policy.starts must be at least 1"):
        dreamed(work(starts=0))

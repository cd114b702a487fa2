"""A world of few codes is played by them: each brings its own transition, and the rest is as in the world within."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from envs.errors import UserError
from play.session import GameSession
from runs.cli.play import PlayConfig, parts, session
from runs.dreams import Loaded, by_codes, load_parts
from tests import trained
from world_model.code_world import CodeWorld, meanings
from world_model.interface import to_unit
from world_model.token_world import TokenWorld


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("codes") / "run"
    return load_parts(trained.make(folder, "latent_action", positions=1, codes=4, decoder_frames=2), "cpu")


def test_a_chosen_code_is_what_comes(loaded: Loaded) -> None:
    played = by_codes(loaded)
    world, inner = played.agent.world_model, loaded.agent.world_model
    assert isinstance(world, CodeWorld) and isinstance(inner, TokenWorld)
    assert world.spec.action_size == len(played.controls.names) == 4
    assert played.controls.action({"3"}) == 2
    frame = to_unit(played.starts.frame[:4])
    with torch.no_grad():
        state = world.start(frame, played.starts.action[:4])
        assert torch.equal(state.latent, inner.start(frame, played.starts.action[:4]).latent)
        step = world.step(state, torch.arange(4))
        assert torch.equal(step.state.latent[:, 0], torch.arange(4))
        drawn = inner.drawn(torch.arange(4).unsqueeze(1), frame[:, -2:])
        assert torch.equal(world.decode(step.state), drawn)  # type: ignore[arg-type]
        assert torch.equal(step.state.memory["world"]["recent"][:, -1], drawn), "the next picture is drawn on this one"
        # Reward and ending are those of the action that stands for the code.
        after = inner.advance(state._replace(memory=state.memory["world"]), world.action_of)
        torch.testing.assert_close(step.reward, inner.outcome(inner.arrived(after, torch.arange(4).unsqueeze(1)))[0])


def test_beside_the_action_s_own_code_the_others_are_dreamed(tmp_path: Path) -> None:
    folder = trained.make(tmp_path / "run", "latent_action", positions=3, codes=9, action_codes=4, label_scale=1.0)
    played = by_codes(load_parts(folder, "cpu"))
    world = played.agent.world_model
    assert isinstance(world, CodeWorld) and world.spec.action_size == len(played.controls.names) == 4
    with torch.no_grad():
        state = world.start(to_unit(played.starts.frame[:4]), played.starts.action[:4])
        memory = world.advance(state, torch.arange(4))
        after = world.imagine(memory, temperature=0)
        assert torch.equal(after.latent[:, 0], torch.arange(4))
        assert torch.equal(after.latent[:, 1:], world.world.imagine(memory["world"], 0).latent[:, 1:])


def test_codes_are_named_by_what_was_done(loaded: Loaded) -> None:
    inner = loaded.agent.world_model
    assert isinstance(inner, TokenWorld)
    frame, action = to_unit(loaded.starts.frame[:6]), loaded.starts.action[:6]
    counts = meanings(inner, frame, action)
    by_hand = torch.zeros(4, 3)
    with torch.no_grad():
        for row in range(6):
            for t in range(action.shape[1]):
                by_hand[int(inner.encode(frame[row, t + 1], frame[row, t])), action[row, t]] += 1
    assert torch.equal(counts, by_hand)


def test_a_person_plays_the_codes_and_nothing_real(loaded: Loaded) -> None:
    asked = PlayConfig(actions="codes")
    made: GameSession = session(asked, by_codes(loaded))
    for key in "1234":
        made.step({key})
        assert made.now.action == int(key) - 1
    with pytest.raises(UserError, match="knows no codes"):
        made.set_mode("real")
    with pytest.raises(UserError, match="needs mode=dream"):
        PlayConfig(actions="codes", mode="both").check()
    assert parts(by_codes(loaded)).players == ("human", "random", "planner")


def test_other_worlds_have_no_codes_to_play(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model.positions=1"):
        by_codes(load_parts(trained.make(tmp_path / "run", "latent_gru"), "cpu"))

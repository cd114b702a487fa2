"""Probes tell what is in the codes, and nothing where there is nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from envs.errors import UserError
from runs.dreams import Loaded, load_parts
from runs.measure import probe
from runs.measure.probe import Transitions
from runs.measure.rewards import own_episodes
from tests import trained
from world_model.token_world import TokenWorld

COUNT = 600


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("probe") / "run"
    return load_parts(trained.make(folder, "latent_action", codes=8, positions=2), "cpu")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "TEACHING", 600)
    monkeypatch.setattr(probe, "INVERSE", 60)
    monkeypatch.setattr(probe, "CONTEXTS", 64)


def data(loaded: Loaded, code: torch.Tensor, action: torch.Tensor, way: torch.Tensor) -> Transitions:
    """Transitions whose frames tell nothing."""
    torch.manual_seed(0)
    frame = loaded.agent.world_model.spec.frame
    now = 100 + 20 * torch.randn(COUNT, 2)
    place = torch.stack([now, now + 4 * way, now], 1)
    noise = torch.randint(256, (COUNT, *frame), dtype=torch.uint8)
    before = torch.randint(256, (COUNT, probe.HISTORY, *frame), dtype=torch.uint8)
    episode = torch.arange(COUNT) // 100
    return Transitions(episode, before, noise, action, torch.zeros(COUNT), code, {"ball": place})


def test_every_kind_of_play_teaches_chooses_and_judges() -> None:
    told = probe.roles(np.array([0] * 7 + [1] * 5 + [2] * 3)).tolist()
    assert told == [0, 0, 0, 1, 2, 0, 0] + [0, 0, 0, 1, 2] + [0, 0, 0]


@pytest.mark.slow
def test_what_is_in_a_code_is_read_off_it(loaded: Loaded) -> None:
    torch.manual_seed(1)
    assert isinstance(loaded.agent.world_model, TokenWorld)
    action = torch.randint(3, (COUNT,))
    role = probe.roles(np.zeros(COUNT // 100))[torch.arange(COUNT) // 100]
    way = torch.randint(-1, 2, (COUNT, 2)).float()
    knowing = torch.stack([action, (way[:, 0] + 1).long() + 3], 1)
    guessing = torch.randint(8, (COUNT, 2))

    told = probe.actions_told(loaded, data(loaded, knowing, action, way), role)
    assert told["linear_probe"] > 0.95 and told["inverse_model"] < 0.6 and told["most_frequent"] < 0.45
    assert probe.actions_told(loaded, data(loaded, guessing, action, way), role)["linear_probe"] < 0.5
    # One of three ways, sideways, is log2(3) bits.
    assert probe.leaks(loaded, data(loaded, knowing, action, way), role)["ball"] == pytest.approx(1.58, abs=0.3)
    assert probe.leaks(loaded, data(loaded, guessing, action, way), role)["ball"] < 0.1


@pytest.mark.slow
def test_the_inverse_model_sees_which_way_a_small_thing_went() -> None:
    """Two pixels of hundreds move or stay: most of a frame tells nothing."""
    torch.manual_seed(0)
    action, column = torch.randint(3, (600,)), torch.randint(2, 14, (600,))
    pair = torch.full((600, 2, 16, 16), 100, dtype=torch.uint8)
    rows = torch.arange(600)
    pair[rows, 0, 8, column] = 160
    pair[rows, 1, 8, column + action - 1] = 160
    role = probe.roles(np.zeros(600))
    network = probe.Inverse((1, 16, 16), 3)
    probe.taught(network, pair, action, role, updates=100, size=32, lr=1e-3)
    assert probe.judge(network, pair, action, role == probe.JUDGES)[0] > 0.7, "where one in three is chance"


def test_dreams_and_pictures_are_compared_as_far_as_there_is_something(loaded: Loaded) -> None:
    code = torch.randint(8, (COUNT, 2))
    made = data(loaded, code, torch.zeros(COUNT, dtype=torch.long), torch.zeros(COUNT, 2))
    told = probe.exchanged(loaded, made)
    assert told["delta_psnr"] == pytest.approx(told["psnr_own"] - told["psnr_other"], abs=0.02)
    assert probe.score_changes(loaded, made) == {}, "no reward, no score"
    ahead = probe.open_loop(loaded, own_episodes(loaded))
    whole = {episode.seed for held in (False, True) for episode in own_episodes(loaded, held)}
    assert len(whole) == len(own_episodes(loaded)) + len(own_episodes(loaded, held=True)), "learned from, or held out"
    assert set(ahead) <= set(probe.AHEAD) and all(0 <= row["accuracy"] <= 1 for row in ahead.values())


def test_the_score_may_be_drawn_a_step_after_the_reward(loaded: Loaded) -> None:
    made = data(
        loaded, torch.zeros(COUNT, 2, dtype=torch.long), torch.zeros(COUNT, dtype=torch.long), torch.zeros(COUNT, 2)
    )
    frame = torch.full_like(made.frame, 100)
    reward = torch.zeros(COUNT)
    reward[5::20] = 1
    for late in range(2):
        score = 100 + 100 * (F.pad(reward, (late, 0))[:COUNT].cumsum(0) % 2).byte()
        frame[:, :, 2, 3] = score.unsqueeze(1)
        before = torch.cat([frame[:1], frame[:-1]]).unsqueeze(1).expand_as(made.before)
        found = probe.score_changes(loaded, made._replace(frame=frame, before=before, reward=reward))
        assert found["score_pixels"] == 1 and 0 <= found["changed_without_reward"] <= 1
    frame[:, :, 2, 3] = 100 + 100 * (torch.arange(COUNT) % 2).byte().unsqueeze(1)  # a clock is none
    before = torch.cat([frame[:1], frame[:-1]]).unsqueeze(1).expand_as(made.before)
    assert probe.score_changes(loaded, made._replace(frame=frame, before=before, reward=reward)) == {}


def test_other_worlds_have_nothing_to_probe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no codes of frame pairs"):
        probe.command(probe.ProbeConfig(run=str(trained.make(tmp_path / "run", "iris_ac")), device="cpu"))

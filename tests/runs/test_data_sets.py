"""Minari's data sets as recorded play, through a stand-in with the few names of it that are used."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

import main
from envs.errors import UserError
from envs.games import GameConfig
from envs.make import make_games
from envs.spec import Spec
from envs.tiny import Catch
from runs import data_sets
from runs.folder.run import Run


@dataclass
class Recorded:
    observations: Any
    actions: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray


class DataSet:
    def __init__(self, observation_space: Any, action_space: Any, episodes: list[Recorded]) -> None:
        self.observation_space, self.action_space, self.episodes = observation_space, action_space, episodes

    def iterate_episodes(self) -> Any:
        return iter(self.episodes)


def catch(count: int, *, nested: bool = False) -> DataSet:
    """Episodes of Catch-v0 under actions of their own, as Minari hands them out."""
    game, found = Catch(render_mode="rgb_array"), []
    for seed in range(count):
        seen, rng = [game.reset(seed=seed)[0]], np.random.default_rng(seed)
        taken, paid, ends = list[int](), list[float](), list[bool]()
        while not (ends and ends[-1]):
            taken.append(int(rng.integers(3)))
            frame, reward, over, late, _ = game.step(taken[-1])
            seen.append(frame)
            paid.append(float(reward))
            ends.append(over or late)
        pictures: Any = {"image": np.stack(seen), "number": np.zeros(len(seen))} if nested else np.stack(seen)
        found.append(Recorded(pictures, np.array(taken), np.array(paid), np.array(ends), np.zeros(len(ends), bool)))
    space: Any = game.observation_space
    space = spaces.Dict(image=space, number=spaces.Discrete(2)) if nested else space
    return DataSet(space, game.action_space, found)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, DataSet]:
    """Minari with these data sets."""
    sets: dict[str, DataSet] = {}

    def load_dataset(name: str, download: bool = False) -> DataSet:
        assert download
        if name not in sets:
            raise ValueError(f"Couldn't find {name} locally or on the server")
        return sets[name]

    module = ModuleType("minari")
    module.load_dataset, module.list_local_datasets = load_dataset, lambda: list(sets)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "minari", module)
    monkeypatch.chdir(tmp_path)
    return sets


@pytest.mark.parametrize("nested", [False, True])
def test_its_episodes_are_those_of_the_game(known: dict[str, DataSet], nested: bool) -> None:
    known["catch/random-v0"] = catch(2, nested=nested)
    config = GameConfig(size=32, gray=True, clip_rewards=True)
    games = make_games("Catch-v0", config, 1)
    for seed, episode in enumerate(data_sets.episodes("catch/random-v0", games.spec, config)):
        assert episode.problem(games.spec) == "" and len(episode) > 5
        (trace,) = games.restore([seed], [episode.action])
        for name in ("frame", "reward", "terminated", "truncated"):
            assert np.array_equal(getattr(trace, name), getattr(episode, name)), name
    games.close()


def test_continuous_actions_are_scaled_from_their_bounds(known: dict[str, DataSet]) -> None:
    one = catch(1).episodes[0]
    one.actions = np.linspace(2, 6, len(one.actions))[:, None].astype(np.float32)
    known["a"] = DataSet(catch(1).observation_space, spaces.Box(2, 6, (1,)), [one])
    (episode,) = data_sets.episodes("a", Spec((1, 64, 64), 1, False), GameConfig())
    np.testing.assert_allclose(episode.action[:, 0], np.linspace(-1, 1, len(one.actions)), atol=1e-6)


def test_what_does_not_fit_is_said(known: dict[str, DataSet], capsys: pytest.CaptureFixture[str]) -> None:
    spec, config = Spec((1, 64, 64), 3, True), GameConfig()
    known["vector"] = DataSet(spaces.Box(-1, 1, (4,)), spaces.Discrete(3), [])
    known["catch"] = catch(1)
    with pytest.raises(UserError, match="observations of the data set vector are no pictures: Box"):
        list(data_sets.episodes("vector", spec, config))
    with pytest.raises(UserError, match="other actions than the game, Discrete.3. and not 6 choices"):
        list(data_sets.episodes("catch", Spec((1, 64, 64), 6, True), config))
    assert main.main(["env=Catch-v0", "size=toy", "init_replay=minari:cacth", "hydra.run.dir=run"]) == 2
    assert "Minari has no data set cacth: Couldn't find cacth" in (said := capsys.readouterr().err)
    assert "Did you mean catch?" in said and not list(Path("run").glob("*"))


def test_without_minari_a_person_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(UserError, match=r'needs Minari: pip install "minari\[hdf5,hf\]"'):
        data_sets.open_minari("x")


@pytest.mark.slow
def test_a_run_begins_with_a_data_set(known: dict[str, DataSet], capsys: pytest.CaptureFixture[str]) -> None:
    known["catch"] = catch(3)
    words = ["env=Catch-v0", "size=toy", "threads=1", "init_replay=minari:catch", "steps=400", "train.prefill=200"]
    words += ["train.pretrain=1", "game.num_envs=2", "game.size=32", "train.policy=false", "train.steps_per_round=100"]
    assert main.main([*words, "train.show_every=1000", "hydra.run.dir=run"]) in (0, 2)
    said = capsys.readouterr()
    assert "3 episodes of minari:catch" in said.out, said.err
    assert Run.open("run").meta["init_replay"]["episodes"] == 3
    assert not list(Path("run").glob(".recorded-*"))

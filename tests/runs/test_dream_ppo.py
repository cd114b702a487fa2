"""Somebody else's agent learns in the dream and is measured in the game."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dreamloop
from envs.controls import Controls
from envs.errors import UserError
from runs import dreams
from runs.cli import compose
from runs.measure import dream_ppo
from tests import trained
from world_model.dream.envs import DreamVectorEnv
from world_model.interface import to_pixels


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained.make(tmp_path_factory.mktemp("trained") / "run")


@pytest.mark.parametrize("obs_type", ["rgb", "features"])
def test_ppo_learns_in_the_dream_and_is_measured_in_the_game(run_folder: Path, tmp_path: Path, obs_type: str) -> None:
    trained.copied(run_folder, tmp_path)
    settings = dream_ppo.DreamPpoConfig(
        run=str(tmp_path), steps=20, dreams=2, horizon=8, temperature=1.0, episodes=2, obs_type=obs_type
    )
    with pytest.raises(UserError, match="no episode in .* to draw starts from"):
        dream_ppo.measure(settings)
    settings = replace(settings, starts=None)
    numbers = dream_ppo.NUMBERS | {"n_steps": 2, "n_epochs": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dream_ppo, "NUMBERS", numbers)
        dream_ppo.measure(settings)
    name = "dream-ppo" if obs_type == "rgb" else "dream-ppo-features"
    name += "-starts-null-horizon8-temperature1-steps20"  # all that is not as usual
    told = json.loads((tmp_path / "results" / f"{name}.json").read_text())
    assert told["temperature"] == 1 and told["dreamed_returns"]
    assert told["dreamed_steps"] == 20 and told["env"] == "Catch-v0" and told["env_steps"] == 400
    assert ("seen_through_the_model" in told) == (obs_type == "rgb"), "on features it sees nothing else"
    for entry in (told, told["random"], told.get("seen_through_the_model", told)):
        assert len(entry["returns"]) == 2 and all(-10 <= value <= 10 for value in entry["returns"])


def test_the_result_of_a_packed_model_lies_beside_the_runs(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = dreams.load_parts(run_folder)._replace(run=None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dream_ppo, "load_parts", lambda run: packed)
    monkeypatch.setattr(dream_ppo, "NUMBERS", dream_ppo.NUMBERS | {"n_steps": 2, "n_epochs": 1})
    settings = dream_ppo.DreamPpoConfig(run="pong", steps=4, dreams=2, episodes=1, obs_type="features")
    with pytest.raises(UserError, match="starts=null"):
        dream_ppo.measure(settings)
    dream_ppo.measure(replace(settings, starts=None))
    told = json.loads(Path("runs/out/Catch-v0-dream-ppo-features-starts-null-steps4.json").read_text())
    assert told["starts"] == len(packed.starts.frame) and len(told["returns"]) == 1


def test_stable_baselines3_sees_the_last_frame_of_a_dream(run_folder: Path) -> None:
    from runs.measure.sb3 import DreamVecEnv

    parts = dreams.load_parts(run_folder)
    plain, adapted = (DreamVectorEnv(parts.world(), 3, horizon=2, autoreset_mode="SameStep") for _ in range(2))
    rows = DreamVecEnv(adapted)
    rows.seed(5)
    assert np.array_equal(rows.reset(), plain.reset(seed=5)[0])
    rows.seed(5)
    rows.set_options({"start": 1})
    assert np.array_equal(rows.reset(), plain.reset(seed=5, options={"start": 1})[0])
    rows.seed(6)
    assert np.array_equal(rows.reset(), plain.reset(seed=6)[0]), "options are of one reset"
    for _ in range(4):
        actions = np.array([0, 1, 2])
        frames, reward, terminated, truncated, told = plain.step(actions)
        brought: Any = rows.step(actions)
        seen, gained, done, infos = brought
        assert np.array_equal(seen, frames) and np.allclose(gained, reward)
        assert np.array_equal(done, terminated | truncated)
        for row in range(3):
            assert ("terminal_observation" in infos[row]) == done[row]
            if done[row]:
                assert np.array_equal(infos[row]["terminal_observation"], told["final_obs"][row])
                assert infos[row]["TimeLimit.truncated"] == truncated[row]


def test_a_dream_is_made_for_stable_baselines3_in_a_line(run_folder: Path) -> None:
    from stable_baselines3 import PPO

    env = dreamloop.make_sb3_dream(run_folder, 2, horizon=3, stack=2)
    frame = env.reset()
    assert frame.shape[0] == 2 and frame.shape[-1] == 6 and frame.dtype == np.uint8
    PPO("CnnPolicy", env, n_steps=4, batch_size=8, n_epochs=1).learn(8)
    _, _, done, infos = env.step(np.zeros(2, np.int64))
    assert [bool(one) for one in done] == ["episode" in info for info in infos]
    env = dreamloop.make_sb3_dream(run_folder, 2, horizon=3, obs_type="features", starts=5)
    seen = env.reset()
    assert isinstance(seen, np.ndarray) and seen.ndim == 2 and seen.dtype == np.float32
    PPO("MlpPolicy", env, n_steps=4, batch_size=8, n_epochs=1).learn(8)


def test_on_features_it_sees_the_game_as_it_saw_the_dream(run_folder: Path) -> None:
    class Watched:
        seen: list[np.ndarray] = []

        def predict(self, seen: np.ndarray, deterministic: bool) -> tuple[np.ndarray, None]:
            self.seen.append(seen)
            return np.full(len(seen), 2), None

    parts, watched, own = dreams.load_parts(run_folder), Watched(), dreams.load(run_folder)
    on_features = dream_ppo.FeatureStudent(watched, parts.controls, dream_ppo.Player(parts.agent))  # type: ignore[arg-type]
    torch.manual_seed(0)
    for t, frame in enumerate(parts.starts.frame[0, :3].numpy()):
        assert on_features.act(frame[None], np.array([t == 0])).tolist() == [2]
    torch.manual_seed(0)
    followed = [own.follow(frame, 2 if t else None) for t, frame in enumerate(parts.starts.frame[0, :3].numpy())]
    assert np.array_equal(np.concatenate(watched.seen), np.stack(followed))
    assert not np.array_equal(followed[2], own.follow(parts.starts.frame[0, 2].numpy())), "there it is a first frame"
    with pytest.raises(ValueError, match="reset before"):
        own.act(parts.starts.frame[0, 2].numpy())
    with pytest.raises(ValueError, match="no action"):
        own.follow(parts.starts.frame[0, 0].numpy(), 3)
    with pytest.raises(ValueError, match="first frame"):
        dreams.load(run_folder).follow(parts.starts.frame[0, 0].numpy(), 1)


def test_a_student_stacks_what_it_sees_and_begins_with_nothing() -> None:
    class Watched:
        def predict(self, seen: np.ndarray, deterministic: bool) -> tuple[np.ndarray, None]:
            self.seen = seen.copy()
            return np.zeros(len(seen), np.int64), None

    watched = Watched()
    student = dream_ppo.Student(watched, Controls(("a", "b"), (((), 0),)))  # type: ignore[arg-type]
    for t in range(1, 6):
        student.act(np.full((2, 1, 4, 4), t, np.uint8), np.array([t == 1, t in (1, 5)]))
    assert watched.seen[0, :, 0, 0].tolist() == [2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]
    assert watched.seen[1, :, 0, 0].tolist() == [0] * 9 + [5] * 3


def test_a_student_may_see_what_the_model_shows_of_the_game(run_folder: Path) -> None:
    class Watched:
        def predict(self, seen: np.ndarray, deterministic: bool) -> tuple[np.ndarray, None]:
            self.seen = seen[:, -3:].copy()
            return np.ones(len(seen), np.int64), None

    parts, watched = dreams.load_parts(run_folder), Watched()
    model, player = parts.agent.world_model, dream_ppo.Player(parts.agent)
    student = dream_ppo.Student(watched, parts.controls, player=player)  # type: ignore[arg-type]
    real = parts.starts.frame[0, :3].numpy()
    for t, frame in enumerate(real):
        student.act(frame[None], np.array([t == 0]))
        assert player.state is not None and player.action is not None and player.action.item() == 1
        assert np.array_equal(watched.seen[0], to_pixels(model.picture(player.state))[0].transpose(2, 0, 1))
        assert not np.array_equal(watched.seen[0], frame)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "dream_ppo needs one run=NAME"),
        (["run=a", "step=5"], "Did you mean steps"),
        (["run=a", "steps=many"], "steps needs a whole number"),
        (["run=a", "dreams=0"], "dreams must be between 1 and"),
        (["run=a", "fast"], "fast"),
    ],
)
def test_the_ppo_command_line(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        compose.filled("dream_ppo", dream_ppo.DreamPpoConfig(), words)


def test_numbers_of_the_ppo_command_line() -> None:
    filled = compose.filled("dream_ppo", dream_ppo.DreamPpoConfig(), ["run=12", "steps=1e3", "seed=4"])
    assert filled == dream_ppo.DreamPpoConfig(run="12", steps=1000, seed=4)

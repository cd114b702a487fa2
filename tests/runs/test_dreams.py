"""A trained run, or the packed model made of it, as an agent and a dream: without the game, and never half loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import error
from gymnasium.utils.env_checker import check_env

import dreamloop
from agent import loop as agent_loop
from envs.episode import Episode
from envs.errors import UserError
from envs.games import Games
from envs.make import make_games
from runs import build, dreams
from runs.folder.run import Run
from tests import trained
from world_model.dream.envs import DreamEnv, DreamVectorEnv, Starts


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained.make(tmp_path_factory.mktemp("trained") / "run")


# ---- loading ----
def test_a_run_is_loaded_without_its_game_and_its_episodes(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Games, "__init__")  # there is no ROM, no package, nothing
    torch.manual_seed(3)
    before = torch.get_rng_state()
    parts = dreams.load_parts(trained.copied(run_folder, tmp_path))
    assert torch.equal(before, torch.get_rng_state())
    assert parts.config == Run.open(run_folder).config and parts.step == 400 and parts.run is not None
    assert parts.controls.names == ("LEFT", "STAY", "RIGHT") and parts.controls.action(["left"]) == 0
    assert 1 <= len(parts.starts.frame) <= agent_loop.STARTS
    frame, _ = DreamEnv(parts.world()).reset(seed=0)
    assert frame.shape == (64, 64, 3)


def test_starts_are_real_contexts(run_folder: Path) -> None:
    """Every start stands, frame by frame and action by action, in one of the episodes that were played."""
    parts = dreams.load_parts(run_folder)
    frames, actions = parts.starts.frame.numpy(), parts.starts.action.numpy()
    assert frames.shape[1] == agent_loop.CONTEXT and len({frame.tobytes() for frame in frames}) > 1
    config = parts.config
    games = make_games(config.env, config.game)
    loop = build.loop(config, games, run_folder / "episodes")
    assert parts.run is not None
    loop.load_state_dict(parts.run.load_checkpoint())
    games.close()
    episodes = [*loop.replay._kept, *(recording.view() for _, recording in loop.replay._open.values())]
    for frame, action in zip(frames, actions, strict=True):
        assert any(
            np.array_equal(episode.frame[t : t + agent_loop.CONTEXT], frame)
            and np.array_equal(episode.action[t : t + agent_loop.CONTEXT - 1], action)
            for episode in episodes
            for t in range(len(episode) - agent_loop.CONTEXT + 1)
        )


def test_starts_are_drawn_from_all_that_was_played(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = dreams.load_parts(run_folder)
    episodes = [Episode.load(path) for path in sorted((run_folder / "episodes").glob("*.npz"))]
    length = agent_loop.CONTEXT
    moments = {
        (episode.frame[t : t + length].tobytes(), episode.action[t : t + length - 1].tobytes())
        for episode in episodes
        for t in range(len(episode) - length + 1)
    }
    for count in (7, 10_000):
        drawn = parts.with_starts(count).starts
        pairs = zip(drawn.frame.numpy(), drawn.action.numpy(), strict=True)
        found = {(frame.tobytes(), action.tobytes()) for frame, action in pairs}
        assert found <= moments and (len(drawn.frame) == 7 or found == moments)
    monkeypatch.setattr(dreams, "STARTS_GIB", 6 * (parts.starts.frame[0].nbytes + 10_000) / 2**30)
    assert 1 < len(parts.with_starts(10_000).starts.frame) <= 6, "what fits"
    monkeypatch.undo()
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            parts.with_starts(wrong)
    env = dreamloop.make_dream(run_folder, starts=7)
    assert env.reset(options={"start": 6})[1]["start"] == 6
    many: Any = gymnasium.make_vec("Dream-v0", num_envs=2, run=run_folder, starts=7)
    assert torch.equal(many.world.starts.frame, parts.with_starts(7).starts.frame)
    with pytest.raises(UserError, match="no episode in .* to draw starts from"):
        dreamloop.make_dream(trained.copied(run_folder, tmp_path), starts=7)
    with pytest.raises(UserError, match="the 8 starts it was packed with"):
        dreamloop.make_dream(starts=7)


def test_a_run_from_before_starts_and_controls_were_kept(run_folder: Path, tmp_path: Path) -> None:
    run = Run.open(trained.copied(run_folder, tmp_path))
    (tmp_path / "meta.json").write_text("{}")
    state = run.load_checkpoint()
    run.save_checkpoint({key: value for key, value in state.items() if key != "starts"}, run.step + 1)
    with pytest.raises(UserError, match="no start for a dream"):
        dreams.load_parts(tmp_path)
    (tmp_path / "episodes").symlink_to(run_folder / "episodes")
    parts = dreams.load_parts(tmp_path)
    assert parts.controls == dreams.load_parts(run_folder).controls
    assert parts.starts.frame.shape == (agent_loop.STARTS, agent_loop.CONTEXT, 3, 64, 64)
    DreamEnv(parts.world()).reset()


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("config.json", "recipe", "future", 'Unknown recipe "future"'),
        ("meta.json", "controls", {"names": []}, "does not tell the game's frames and controls"),
        ("meta.json", "spec", {"frame": [3, 64]}, "does not tell the game's frames and controls"),
        ("config.json", "game", {"sideways": 1}, "sideways"),
    ],
)
def test_what_cannot_be_loaded_is_named(
    run_folder: Path, tmp_path: Path, name: str, key: str, value: Any, said: str
) -> None:
    folder = trained.copied(run_folder, tmp_path)
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | {key: value}))
    with pytest.raises(UserError, match=said):
        dreams.load_parts(folder)


def test_no_run_and_no_checkpoint(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run nowhere"):
        dreams.load("nowhere")
    for name in ("config.json", "meta.json"):
        (tmp_path / name).write_text((run_folder / name).read_text())
    with pytest.raises(UserError, match="no checkpoint yet"):
        dreams.load(tmp_path)


# ---- two lines ----
def test_two_lines_play_a_dream(run_folder: Path) -> None:
    player = dreams.load(run_folder, greedy=True)
    frame, _ = player.dream.reset(seed=1)
    first = []
    for _ in range(5):
        action = player.act(frame)
        first.append(action)
        assert player.dream.action_space.contains(action)
        frame = player.dream.step(action)[0]
        player.dream.done[:] = False
    player.reset()
    frame, _ = player.dream.reset(seed=1)
    assert player.act(frame.transpose(2, 0, 1)) == first[0], "channels may come first or last"
    player.reset()
    large = cv2.resize(frame, (2 * frame.shape[1], 2 * frame.shape[0]), interpolation=cv2.INTER_NEAREST)
    assert player.act(large) == first[0], "of any size"
    for wrong in (frame[None], np.zeros(7), frame / 0.5):
        with pytest.raises(ValueError, match="a frame is a picture"):
            player.act(wrong)


def test_a_gray_agent_sees_a_real_game_as_in_training(tmp_path: Path) -> None:
    player = dreams.load(trained.make(tmp_path / "run", "reverie", gray=True))
    seen: list[np.ndarray] = []

    class Eye:
        def act(self, frames: np.ndarray, is_first: np.ndarray) -> np.ndarray:
            seen.append(frames[0, 0])
            return np.zeros(1, np.int64)

    player._player = Eye()  # type: ignore[assignment]
    colour = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    player.act(colour)
    assert np.array_equal(seen[0], cv2.cvtColor(colour, cv2.COLOR_RGB2GRAY))
    shown = player.dream.reset(seed=0)[0]
    player.act(shown)
    assert np.array_equal(seen[1], shown[..., 0]), "a gray dream's three channels are one"


def test_a_player_remembers_until_it_is_reset(run_folder: Path) -> None:
    """What it does is what the run's own player does on the same frames."""
    parts = dreams.load_parts(run_folder)
    mine, own = dreams.DreamPlayer(parts, greedy=True), dreams.Player(parts.agent, greedy=True)
    frames = parts.starts.frame[0].numpy()
    for t, frame in enumerate(frames):
        assert mine.act(frame) == own.act(frame[None], np.array([t == 0]))[0]
    assert torch.equal(mine._player.state.memory["h"], own.state.memory["h"])  # type: ignore[union-attr]


@pytest.mark.parametrize("obs_type", ["rgb", "features"])
def test_the_real_game_has_the_spaces_of_the_dream(run_folder: Path, obs_type: str) -> None:
    dream = dreamloop.make_dream(run_folder, obs_type=obs_type)
    game = dreamloop.make_game(run_folder, obs_type=obs_type)
    assert (game.observation_space, game.action_space) == (dream.observation_space, dream.action_space)
    check_env(game, skip_render_check=True)
    first, _ = game.reset(seed=7)
    played = [game.step(0)]
    while not (played[-1][2] or played[-1][3]):
        played.append(game.step(0))
    with pytest.raises(error.ResetNeeded):
        game.step(0)
    again, _ = game.reset(seed=7)
    assert np.array_equal(first, again) and np.array_equal(played[0][0], game.step(0)[0])
    assert not np.array_equal(first, game.reset()[0])  # another game
    if obs_type == "features":
        player = dreamloop.load(run_folder)
        frame, _ = dreamloop.make_game(run_folder).reset(seed=7)
        assert np.array_equal(player.follow(frame), first)
    with pytest.raises(ValueError, match="no action here"):
        game.step(99)


def test_registered(run_folder: Path) -> None:
    env = gymnasium.make("Dream-v0", run=run_folder, horizon=2, temperature=0.25, render_mode="rgb_array")
    assert isinstance(env.unwrapped, DreamEnv) and env.unwrapped.temperature == 0.25
    frame, _ = env.reset(seed=0)
    seen: Any = env.render()
    assert np.array_equal(seen, frame)
    many = gymnasium.make_vec("Dream-v0", num_envs=3, run=run_folder)
    assert isinstance(many, DreamVectorEnv) and many.reset(seed=0)[0].shape == (3, 64, 64, 3)
    assert many.temperature == dreams.load_parts(run_folder).config.policy.temperature


def test_dreams_in_processes_that_were_forked_do_not_wait_for_ever(run_folder: Path) -> None:
    code = (
        "import dreamloop, gymnasium, sys, torch; torch.set_num_threads(2);"
        "envs = gymnasium.make_vec('Dream-v0', num_envs=2, vectorization_mode='async', run=sys.argv[1]);"
        "print(envs.reset(seed=0)[0].shape); envs.close()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_folder)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "(2, 64, 64, 3)"


def test_a_package_of_one_s_own_of_the_same_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "agent.py").touch()
    code = f"import sys; sys.path.append({str(Path.cwd())!r}); import dreamloop"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert 'dreamloop has a package "agent", and Python finds' in done.stderr and "agent.py in its place" in done.stderr


def test_importing_runs_loads_no_model() -> None:
    code = "import runs, sys; print(sorted({'torch', 'agent', 'world_model'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- starts in checkpoints ----
def test_taking_starts_disturbs_nothing_and_tells_when_there_are_none(tmp_path: Path) -> None:
    config = trained.small("Catch-v0")
    games = make_games(config.env, config.game)
    loop = build.loop(config, games, tmp_path)
    assert agent_loop.start_contexts(loop.replay) == {}
    loop.collector.collect(8, at_random=True)  # two episodes of four steps
    alone = Starts(**agent_loop.start_contexts(loop.replay))  # of games that are too short their first frames
    assert alone.frame.shape[1:] == (1, 3, 64, 64) and alone.action.shape == (len(alone.frame), 0)
    for number, episode in loop.replay.memory().items():
        episode.save(tmp_path / f"{number}.npz")
    drawn = dreams._drawn_starts(games.spec, sorted(tmp_path.glob("*.npz")), 4)
    assert drawn is not None and drawn.frame.shape == (2, 1, 3, 64, 64)
    assert torch.isfinite(drawn.begin(loop.agent.world_model, torch.arange(2)).latent).all()
    loop.collector.collect(200, at_random=True)
    before = loop.replay.state_dict()["rng"]
    first, second = agent_loop.start_contexts(loop.replay), agent_loop.start_contexts(loop.replay)
    games.close()
    assert loop.replay.state_dict()["rng"] == before
    assert torch.equal(first["frame"], second["frame"])
    made = Starts(**first)
    assert made.frame.shape == (agent_loop.STARTS, agent_loop.CONTEXT, 3, 64, 64)
    assert made.action.shape == (agent_loop.STARTS, agent_loop.CONTEXT - 1)
    assert asdict(games.spec)["action_size"] == 3

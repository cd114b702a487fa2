"""The yardstick: PPO plays the game that a run plays, for so much processor time, and its runs are runs like others."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import ale_py  # noqa: F401  makes Atari's ids known
import gymnasium
import numpy as np
import pytest
from stable_baselines3.common.atari_wrappers import AtariWrapper

import main
from envs.errors import UserError
from envs.games import GameConfig, Transition
from envs.make import make_games
from envs.spec import Spec
from runs.cli import compose
from runs.folder.ppo import SAME, PpoConfig, PpoRun, open_run
from runs.folder.progress import Progress
from runs.folder.run import Run
from runs.measure import ppo
from runs.measure.dream_ppo import STACK, Student
from runs.measure.sb3 import FrameStack, GamesVecEnv
from runs.recipes.reverie import reverie
from runs.report import curve, publish

WORDS = ["env=Catch-v0", "policy.n_steps=16", "policy.batch_size=32", "policy.n_epochs=1", "game.num_envs=2",
         "episodes=2"]  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def asked(*words: str) -> PpoConfig:
    return compose.filled("ppo", PpoConfig(), words)


def pong(**keys: Any) -> Run:
    """A run of Pong as the literature plays it, of a system with a world model."""
    config = reverie("toy")
    game = replace(config.game, sticky=0.0, noops=30, life_loss=True, max_steps=500)
    return Run.create(replace(config, env="ALE/Pong-v5", protocol="atari100k", game=game), "runs/out/pong", **keys)


# ---- the game ----
def test_ppo_sees_what_the_wrapper_of_stable_baselines3_shows() -> None:
    """Ms. Pac-Man has no FIRE, which that wrapper would press."""
    env = "ALE/MsPacman-v5"
    config = asked(f"env={env}", "hours=1", "game.sticky=0").told()
    ours: Any = GamesVecEnv(make_games(env, config.game, 1), seed=0)
    theirs = AtariWrapper(gymnasium.make(env, frameskip=1, repeat_action_probability=0.0), noop_max=0)
    seen, (other, _) = ours.reset(), theirs.reset(seed=0)
    actions, gained, apart = np.random.default_rng(0), [], []
    for _ in range(1000):
        action = int(actions.integers(9))
        seen, reward, over, told = ours.step(np.array([action]))
        other, expected, ended, _, _ = theirs.step(action)
        picture = seen if not over else np.asarray(told[0]["terminal_observation"])[None]
        apart.append(np.abs(picture[0, 0].astype(float) - other[..., 0]).mean())
        gained.append((float(reward[0]), float(expected), bool(over[0]), ended))
        if over:
            break
    ours.close()
    rewards, theirs_gained, over_at, ended_at = zip(*gained, strict=True)
    assert rewards == theirs_gained and sum(rewards) > 5 and over_at == ended_at and over_at[-1]
    assert "episode" not in told[0] and max(apart) < 4 and np.mean(apart) < 1  # a life, not the game; of 255


def test_a_game_ends_and_its_stack_begins_with_nothing() -> None:
    games = make_games("Catch-v0", asked(*WORDS, "hours=1").told().game)
    rows: Any = FrameStack(GamesVecEnv(games, seed=0), STACK)
    first = rows.reset()
    assert first.shape == (2, STACK, 84, 84) and not first[:, :-1].any()
    total, length = np.zeros(2), 0
    while True:
        seen, reward, done, told = rows.step(np.array([0, 2]))
        total, length = total + reward, length + 1
        if done.any():
            break
        assert seen[:, -2].any()
    assert done.all() and [info["episode"] for info in told] == [{"r": total[row], "l": length} for row in range(2)]
    assert not seen[:, :-1].any() and told[0]["terminal_observation"][-2].any()
    assert told[0]["TimeLimit.truncated"] is False
    rows.close()


def test_a_lost_life_takes_nothing_from_the_stack() -> None:
    class Lives:
        """Two rows; the first loses a life in the second step, the other's game is over in the third."""

        num_envs, spec, t = 2, Spec((1, 4, 4), 2, True), 0

        def reset(self, seeds: list[int], rows: list[int]) -> np.ndarray:
            return np.full((2, 1, 4, 4), 10 * (self.t + 1), np.uint8)

        def step(self, actions: np.ndarray) -> Transition:
            self.t += 1
            zeros, frame = np.zeros(2, np.float32), np.full((2, 1, 4, 4), 10 * (self.t + 1), np.uint8)
            done = np.array([False, self.t == 3])
            return Transition(frame, zeros, zeros, np.array([self.t == 2, False]) | done, np.zeros(2, bool), done)

    rows: Any = FrameStack(GamesVecEnv(Lives(), seed=0), STACK)  # type: ignore[arg-type]
    rows.reset()
    over = [rows.step(np.zeros(2, np.int64))[2].tolist() for _ in range(3)]
    assert over == [[False, False], [True, False], [False, True]]
    assert rows.stacked_obs.stacked_obs[:, :, 0, 0].tolist() == [[10, 20, 30, 40], [0, 0, 0, 40]]


def test_a_student_of_the_games_stacks_as_they_did_and_plays_as_it_learned() -> None:
    class Watched:
        def predict(self, seen: np.ndarray, deterministic: bool) -> tuple[np.ndarray, None]:
            self.seen, self.greedy = seen.copy(), deterministic
            return np.array([2, 1]), None

    watched: Any = Watched()
    student = Student(watched, greedy=True)
    for t in range(1, 6):
        action = student.act(np.full((2, 1, 4, 4), t, np.uint8), np.array([t == 1, t in (1, 5)]))
    assert watched.greedy and action.tolist() == [2, 1]
    assert watched.seen[:, :, 0, 0].tolist() == [[2, 3, 4, 5], [0, 0, 0, 5]]


# ---- what is asked ----
def test_the_same_game_is_played_as_the_other_run_plays_for_its_core_hours() -> None:
    other = pong()
    with pytest.raises(UserError, match="recorded no processor hours"):
        asked("run=pong").told()
    other.log(1, {})
    other._processor_opened -= 1800
    other.log(2, {})
    told = asked("run=pong").told()
    assert (told.env, told.protocol, told.run) == ("ALE/Pong-v5", "atari100k", "pong")
    assert told.hours == other.metrics()[-1]["core_hours"] >= 0.5
    shown: dict[str, Any] = {"size": 84, "gray": True, "clip_rewards": True, "num_envs": 8}
    assert told.game == replace(other.config.game, **shown)
    assert asked("run=pong", "hours=2").told().hours == 2
    other.log(3, {"real/generations": 1})
    with pytest.raises(UserError, match="was trained by worker processes too"):
        asked("run=pong").told()


def test_a_protocol_is_what_train_makes_of_it_and_single_keys_come_last() -> None:
    words = ["env=ALE/Pong-v5", "hours=1", "protocol=atari100k"]
    (config,) = compose.check(compose.prepared(["env=ALE/Pong-v5", "protocol=atari100k", "size=toy"]))
    game = asked(*words).told().game
    assert (game.sticky, game.noops, game.life_loss) == (config.game.sticky, config.game.noops, config.game.life_loss)
    assert asked(*words, "game.sticky=0.5").told().game.sticky == 0.5
    default = asked(*words[:2]).told().game  # the id's own
    assert (default.sticky, default.noops, default.action_repeat, default.life_loss) == (None, None, None, True)
    assert not asked("env=Catch-v0", "hours=1").told().game.life_loss


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "ppo needs env=... and hours=..."),
        (["env=Catch-v0"], "hours=... is missing"),
        (["env=Catch-v0", "hours=1", "steps=9"], "leave one out"),
        (["name=nothing"], "There is no run nothing"),
        (["run=x", "env=Catch-v0"], "run=... says which game is played"),
        (["run=x", "game.sticky=0.1"], "run=... says which game is played"),
        (["run=x", "game.sticky=0"], "run=... says which game is played"),
        (["env=Catch-v0", "hours=1", "game.size=32"], "game.size must be at least 36"),
        (["env=Catch-v0", "hours=1", "game.num_envs=1", "policy.n_steps=1"], "game.num_envs=2 or policy.n_steps=2"),
        (["env=Catch-v0", "hours=0"], "hours must be above 0"),
        (["env=ALE/Pnog-v5", "hours=1"], "Did you mean ALE/Pong-v5"),
        (["env=Catch-v0", "hours=1", "protocol=atari200k"], "Did you mean atari100k"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["ppo", *words]) == 2
    assert said in capsys.readouterr().err and not Path("runs/out").exists()


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main.main(["ppo", *WORDS, "hours=1"]) == 2
    assert capsys.readouterr().err == 'Stable-Baselines3 is not installed: pip install ".[sb3]" adds it.\n'


# ---- a run ----
@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run from the command line: 10.8 s of processor time, imports included, and two games of evaluation."""
    folder = tmp_path_factory.mktemp("ppo") / "catch"
    assert main.main(["ppo", *WORDS, "hours=0.003", f"name={folder}"]) == 0
    return folder


def test_a_run_is_logged_measured_published_and_drawn(run_folder: Path) -> None:
    run = open_run(run_folder)
    lines = run.metrics()
    assert isinstance(run, PpoRun) and run.config.policy.n_steps == 16 and len(lines) > 2
    assert {"hours", "core_hours"} | ppo.METRICS.keys() == {key for line in lines for key in line} - {"step"}
    numbers = run.config.policy
    for line in lines:  # linear in the processor time used, which goes on a little until the line is written
        left = 1 - line["core_hours"] / 0.003
        assert left - 0.01 <= line["policy/clip_range"] / numbers.clip_range <= left + 0.4
        assert line["policy/learning_rate"] / numbers.learning_rate == pytest.approx(
            line["policy/clip_range"] / numbers.clip_range, abs=0.01
        )
    files = publish.publish(run, Path("results"))
    names = ("evaluation-sampled.json", "evaluation-greedy.json", "curve.json", "curve.png")
    assert {path.name for path in files} == {f"ppo-Catch-v0-{name}" for name in names}
    told = json.loads(Path("results/ppo-Catch-v0-evaluation-sampled.json").read_text())
    assert told["recipe"] == "ppo" and len(told["returns"]) == 2 and told["env_steps"] > lines[-1]["step"] - 2
    assert told["training"]["threads"] == 1 and told["ppo"]["stack"] == STACK
    assert 0.003 <= told["core_hours"] < 0.004
    assert "| Catch-v0 | `ppo` NatureCNN | sampled |" in publish.tables(Path("results"))


def test_a_run_whose_time_is_used_is_only_evaluated_again(run_folder: Path) -> None:
    before = PpoRun.open(run_folder).metrics()
    assert main.main(["ppo", f"name={run_folder}"]) == 0
    assert PpoRun.open(run_folder).metrics() == before


def test_a_run_of_so_many_steps_takes_as_many_and_falls_with_them() -> None:
    assert main.main(["ppo", *WORDS, "steps=96", "name=short"]) == 0
    run = PpoRun.open("runs/out/short")
    before = run.metrics()
    assert [round(line["policy/clip_range"], 6) for line in before] == [0.066667, 0.033333]
    told = json.loads((run.folder / "results/evaluation-sampled.json").read_text())
    assert told["env_steps"] == told["ppo"]["steps"] == 96 and "core_hours" not in told["ppo"]
    assert main.main(["ppo", "name=short"]) == 0 and run.metrics() == before, "a run that is over learns no more"


def test_a_run_of_ppo_has_no_world_model(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("resume", "evaluate", "play", "fidelity", "dream_ppo"):
        assert main.main([command, f"run={run_folder}"]) == 2
        assert "PPO learns without a world model: only python main.py ppo" in capsys.readouterr().err
    assert main.main(["recipe=ppo"]) == 2
    assert "PPO learns without a world model" in capsys.readouterr().err
    assert pong() and main.main(["ppo", "name=pong"]) == 2
    assert "it is a run of reverie, not of PPO" in capsys.readouterr().err


def test_what_a_run_began_with_is_fixed(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["ppo", f"name={run_folder}", "hours=0.5"]) == 2
    assert "hours was fixed when" in capsys.readouterr().err


# ---- stopped ----
def begun(hours: float = 1.0) -> tuple[PpoRun, ppo.Learner]:
    config: Any = asked(*WORDS, f"hours={hours}").told()
    run = PpoRun.create(config, "runs/out/stopped")
    return run, ppo.Learner(run, make_games(config.env, config.game))


def test_ctrl_c_saves_and_a_second_one_leaves_what_was_saved(capsys: pytest.CaptureFixture[str]) -> None:
    class Impatient(Progress):
        def update(self, step: int, **values: float | str | None) -> None:
            if step in (60, 62):
                os.kill(os.getpid(), signal.SIGINT)

    run, learner = begun()
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "Progress", Impatient)
        ppo.work(run, resumed=False)
    said = capsys.readouterr().out
    assert "stopped at step 60; go on with python main.py ppo name=runs/out/stopped" in said
    again = PpoRun.open("runs/out/stopped")
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "Progress", Impatient)
        patch.setattr(ppo.Learner, "save", lambda self: os.kill(os.getpid(), signal.SIGINT))  # a second while it saves
        ppo.work(again, resumed=True)
    assert PpoRun.open("runs/out/stopped").load_checkpoint()["begun"] == 2


def test_a_killed_run_goes_on_from_its_checkpoint_with_the_time_it_had_used() -> None:
    run, learner = begun()
    run._processor_opened -= 1800

    def kill() -> bool:
        if learner.ppo.num_timesteps >= 36:  # after an update
            raise RuntimeError("killed")
        return False

    with pytest.raises(RuntimeError, match="killed"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "SAVE_EVERY", 0.0)
        learner.learn(Progress(), kill)
    run.close()
    again = PpoRun.open(run.folder)
    state = again.load_checkpoint()
    resumed = ppo.Learner(again, make_games("Catch-v0", again.config.game))
    again.rewind()
    resumed.load(state)
    assert resumed.left == pytest.approx(0.5, abs=0.01) and resumed.ppo.num_timesteps == 36
    moments = [made.ppo.policy.optimizer.state_dict()["state"] for made in (learner, resumed)]
    assert moments[0].keys() == moments[1].keys() and moments[0]
    for number, one in moments[0].items():
        assert all(bool((one[key] == moments[1][number][key]).all()) for key in one)
    assert resumed.rows.begun == 2
    resumed.learn(Progress(), lambda: resumed.ppo.num_timesteps >= 70)
    assert resumed.rows.begun == 4  # new games, with other seeds
    assert [(line["step"], line["updates"]) for line in again.metrics()] == [(34, 1), (70, 2)]


# ---- curves ----
def test_several_runs_are_drawn_against_core_hours(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(curve, "write_figure", lambda path, figure: drawn.append(figure))
    other = Run.create(replace(reverie("toy"), env="Catch-v0"), "runs/out/other")
    for step in (100, 200):
        other.log(step, {"episode/return": step / 100})
        other._processor_opened -= 3600
    other.close()
    old = Run.create(replace(reverie("toy"), env="Catch-v0"), "runs/out/old")
    (old.folder / "metrics.jsonl").write_text('{"step": 5, "hours": 7.0, "episode/return": -3.0}\n')
    curve.command(compose.filled("curve", curve.CurveConfig(), ["run=other", f"beside=old,{run_folder}"]))
    (axis,) = drawn[0].axes
    lines = {text.get_text(): line for text, line in zip(axis.get_legend().get_texts(), axis.lines[::2], strict=True)}
    (ours, older, theirs) = lines.values()
    assert [round(x) for x in ours.get_xdata()] == [0, 1] and list(ours.get_ydata()) == [1, 1.5]
    assert list(older.get_xdata()) == [7] and "wall clock" in list(lines)[1]
    assert 0 < max(theirs.get_xdata()) < 0.004 and list(lines)[2] == "catch (ppo NatureCNN, seed 0)"
    one = compose.filled("curve", curve.CurveConfig(), ["run=other", "beside=old"])
    assert one.beside == ("old",)
    with pytest.raises(UserError, match="Runs of one game"):
        curve.draw_beside([other, pong()])
    with pytest.raises(UserError, match="a sweep"):
        compose.filled("curve", curve.CurveConfig(), ["run=a,b"])


def test_game_config_names_what_makes_a_game_the_same() -> None:
    """Every key is either taken over from the other run or decided by Stable-Baselines3's preprocessing."""
    decided = {"size", "gray", "clip_rewards", "life_loss", "num_envs"}
    assert {one.name for one in fields(GameConfig)} == {*SAME} | decided

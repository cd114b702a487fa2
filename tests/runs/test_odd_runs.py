"""Runs of games that fail or do not replay, two writers on one folder, and what must not be lost thereby."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import main
from agent import precision
from envs.errors import UserError
from runs.folder.run import Run
from runs.recipes import preset

TOY = [
    "size=toy", "threads=1", "steps=96", "episodes=2", "train.prefill=64", "train.pretrain=2", "game.num_envs=2",
    "game.size=16", "train.show_every=1000",
]  # fmt: skip


class Moody(gymnasium.Env[Any, Any]):
    """`ends(t)` and `fails()` are the test's; the picture tells the step."""

    played = 0
    fails_at = 10**9  # of all steps of all copies
    lasts: int | None = 7  # None: by its own random numbers, whatever the seed

    def __init__(self, render_mode: str | None = None) -> None:
        self.observation_space, self.action_space = spaces.Box(0, 255, (16, 16, 3), np.uint8), spaces.Discrete(2)
        self.render_mode, self.t = render_mode, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.t = 0
        return self.picture(), {}

    def picture(self) -> np.ndarray:
        return np.full((16, 16, 3), 20 * self.t % 256, np.uint8)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        Moody.played += 1
        if Moody.played >= Moody.fails_at:
            raise ConnectionError("the game server went away")
        self.t += 1
        over = np.random.default_rng().random() < 0.3 if Moody.lasts is None else self.t >= Moody.lasts
        return self.picture(), float(action), bool(over), False, {}


@pytest.fixture(autouse=True)
def moody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for name, value in (("played", 0), ("fails_at", 10**9), ("lasts", 7)):
        monkeypatch.setattr(Moody, name, value)
    gymnasium.register("Moody-v0", lambda **kwargs: Moody(**kwargs))
    yield
    gymnasium.registry.pop("Moody-v0")


def train(*words: str) -> int:
    return main.main(["env=Moody-v0", *TOY, "hydra.run.dir=run", *words])


def test_a_number_format_that_this_cpu_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision, "lstm_in_bf16", lambda: False)
    world_models = ("recipe=world_models", "train.precision=bf16", "game.size=64")
    assert train(*world_models) == 2
    said = capfd.readouterr().err
    assert "train.precision=bf16 needs a CPU with AVX-512" in said and said.count("\n") == 1


def test_a_game_that_fails_loses_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    Moody.fails_at = 90
    assert train() == 2
    said = capfd.readouterr().err
    assert "Moody-v0 failed in step" in said and "ConnectionError: the game server went away" in said
    assert "All up to step 88 is saved: go on with python main.py resume run=run once" in said
    assert said.count("\n") == 1
    Moody.fails_at = 10**9
    assert main.main(["resume", "run=run"]) == 0
    assert Run.open("run").meta["resumed"][0]["step"] == 88
    assert json.loads(Path("run/results/evaluation-greedy.json").read_text())["env_steps"] == 96


def test_a_game_that_fails_while_it_is_judged_leaves_a_whole_run(capfd: pytest.CaptureFixture[str]) -> None:
    Moody.fails_at = 98
    assert train() == 2
    said = capfd.readouterr().err
    assert "ConnectionError: the game server went away (test_odd_runs.py:" in said
    assert "). The run itself is complete: python main.py evaluate" in said
    Moody.fails_at = 10**9
    assert main.main(["evaluate", "run=run"]) == 0


def test_a_game_that_does_not_replay_goes_on_without_its_open_episodes(capfd: pytest.CaptureFixture[str]) -> None:
    Moody.lasts = None
    assert train() == 0
    for steps in (104, 112, 120):  # a game that has just begun does replay
        assert main.main(["resume", "run=run", f"steps={steps}"]) == 0
    assert "open episodes are left out: an episode of Moody-v0 ended " in capfd.readouterr().out
    assert json.loads(Path("run/results/evaluation-greedy.json").read_text())["env_steps"] == 120


@pytest.mark.parametrize(
    ("recipe", "lasts"), [("reverie", 1), ("reverie", 2), pytest.param("iris_ac", 1, marks=pytest.mark.slow)]
)
def test_however_short_its_episodes_it_trains(lasts: int, recipe: str) -> None:
    Moody.lasts = lasts
    assert train(f"recipe={recipe}", "game.size=64" if recipe == "iris_ac" else "game.size=16") == 0


def test_other_episodes_are_a_result_of_their_own() -> None:
    assert train() == 0
    Moody.lasts = 10**6
    assert main.main(["evaluate", "run=run", "episodes=3", "game.max_steps=5"]) == 0
    assert main.main(["evaluate", "run=run", "game.max_steps=5", "seed=4"]) == 0
    found = {path.name for path in Path("run/results").glob("evaluation-greedy*")}
    assert found == {
        "evaluation-greedy.json", "evaluation-greedy-episodes3-max_steps5.json",
        "evaluation-greedy-seed4-max_steps5.json",
    }  # fmt: skip
    assert json.loads(Path("run/results/evaluation-greedy-episodes3-max_steps5.json").read_text())["mean_length"] == 5


def test_a_resume_that_fails_changes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert train() == 0
    before = Path("run/config.json").read_bytes()
    nothing = ["only=dream", "policy.updates=0"]
    for words in (["only=bogus", "model.lr=0.5"], ["model.lr=nan"], ["model.lr=0.5", "steps=no"], nothing):
        assert main.main(["resume", "run=run", *words]) == 2
        assert Path("run/config.json").read_bytes() == before
    assert "only=dream has nothing to do" in capfd.readouterr().err
    for path in Path("run/checkpoints").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-100])
    assert main.main(["resume", "run=run", "model.lr=0.5"]) == 2
    assert Path("run/config.json").read_bytes() == before


HOLDING = "from runs.folder.run import Run; run = Run.open('run'); run.claim(); print('held', flush=True); input()"


def test_a_folder_has_one_writer(capfd: pytest.CaptureFixture[str]) -> None:
    assert train() == 0
    here = str(Path(main.__file__).parent)
    with subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {here!r}); {HOLDING}"], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        before = Path("run/config.json").read_bytes()
        for words in (["resume", "run=run", "steps=120"], ["env=Moody-v0", *TOY, "hydra.run.dir=run"]):
            assert main.main(words) == 2
            assert "Another process is working on run: wait until" in capfd.readouterr().err
        assert Path("run/config.json").read_bytes() == before
        assert main.main(["evaluate", "run=run", "episodes=1"]) == 0, "which writes nothing that the other one does"
        other.kill()
    assert main.main(["resume", "run=run", "steps=104"]) == 0


def test_what_a_killed_process_left_is_gone_with_the_next_start() -> None:
    assert train("steps=80") == 0
    left = [
        "checkpoints/000000000080.pt.tmp", "videos/dream-000000001.tmp.mp4", "config.json.tmp",
        "episodes/.000001.npz.tmp",
    ]  # fmt: skip
    others = ["recordings/mine.tmp.mp4", "notes.tmp", "pictures/scratch.tmp/a"]
    for name in left:
        (Path("run") / name).parent.mkdir(exist_ok=True)
        (Path("run") / name).write_bytes(b"half")
    for name in others:
        (Path("run") / name).parent.mkdir(exist_ok=True, parents=True)
        (Path("run") / name).write_bytes(b"somebody's")
    for name in (".recorded-x/0", ".weights-y"):
        (Path("run") / name).mkdir(parents=True)
        (Path("run") / name / "1.npz").write_bytes(b"half")
    before = {path for path in Path("run").rglob("*") if path.is_file()}
    assert main.main(["resume", "run=run", "steps=88"]) == 0
    after = {str(path.relative_to("run")) for path in Path("run").rglob("*") if path.is_file()}
    assert {name for name in after if ".tmp" in name or ".recorded" in name or ".weights" in name} == set(others)
    kept = {path for path in before if path.parts[1] in ("config.json", "meta.json", "metrics.jsonl", "results")}
    assert all(path.exists() for path in kept if ".tmp" not in path.name)


def test_a_folder_that_is_moved_while_it_trains_is_a_sentence(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    played = Moody.step

    def moves(game: Moody, action: Any) -> Any:
        if Moody.played == 80:
            Path("run").rename("elsewhere")
        return played(game, action)

    monkeypatch.setattr(Moody, "step", moves)
    assert train() == 2
    said = capfd.readouterr().err
    assert "run is no longer there: it was moved or deleted" in said and "Traceback" not in said
    assert not Path("run").exists() and main.main(["resume", "run=elsewhere"]) == 0


@pytest.mark.parametrize("seconds", [0.3, 0.9, 1.8])
def test_ctrl_c_at_any_moment_is_no_traceback(seconds: float) -> None:
    """Of a program that is still starting, too."""
    program = [sys.executable, str(Path(main.__file__)), "env=Catch-v0", *TOY, "hydra.run.dir=run", "steps=100000"]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in error, error
    assert process.returncode == 130 or seconds < 0.1, "before the first line of the program"


def test_a_run_without_a_checkpoint_is_begun_again(tmp_path: Path) -> None:
    config = preset("reverie", "toy")
    Run.create(config, "killed").release()
    again = Run.create(config, "killed")
    with pytest.raises(UserError, match="Another process is working on killed"):
        Run.create(config, "killed")
    again.save_checkpoint({}, 1)
    again.release()
    with pytest.raises(UserError, match="already holds a run: go on with it"):
        Run.create(config, "killed")

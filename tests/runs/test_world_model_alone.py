"""The command line of a world model alone: recorded play of several kinds in, a judged model that can be played out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from envs.errors import UserError
from main import main
from play.film import Recorder
from runs.cli import play
from runs.config import recordings
from runs.dreams import load_parts
from runs.folder.run import Run, recorded
from runs.measure import fidelity, rewards, suite
from runs.recipes import from_dict

WORDS = ["env=Catch-v0", "size=toy", "train.prefill=240", "train.pretrain=2", "train.policy=false",
         "train.steps_per_round=80", "game.num_envs=2", "threads=1"]  # fmt: skip


def test_random_and_human_play_become_a_judged_world_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(suite.TIERS, "canary", 8)
    monkeypatch.setitem(suite.TIERS, "fast", 8)
    monkeypatch.setattr(fidelity, "HORIZONS", (1, 5))
    monkeypatch.setattr(fidelity, "AHEAD", 5)
    monkeypatch.setattr(rewards, "SEGMENTS", 8)
    monkeypatch.setattr(rewards, "PART", 8)
    at_random, alone = tmp_path / "random", tmp_path / "alone"
    assert main([*WORDS, "steps=400", f"hydra.run.dir={at_random}"]) == 0

    loaded = load_parts(at_random)
    asked = play.PlayConfig(run=str(at_random), mode="real")
    made = play.session(asked, loaded)
    assert made.parts.players == ("human", "random", "planner")
    recorder = Recorder(made, tmp_path, play.episodes_folder(loaded))
    recorder.start()
    for _ in range(40):
        made.turn(["d"])
    recorder.stop()
    made.close()
    with pytest.raises(UserError, match="no policy that could play: player is human or random"):
        play.session(replace(asked, player="agent"), loaded)

    copy = shutil.copytree(at_random / "episodes", tmp_path / "copy")
    capsys.readouterr()
    assert main([*WORDS, "steps=300", f"init_replay=[{copy},{at_random}]", f"hydra.run.dir={alone}"]) == 0
    said, run = capsys.readouterr().out, Run.open(alone)
    games = len(list(copy.iterdir()))
    assert f"{games + 1} episodes of {copy}, {at_random}, {79 * games + 40:,} steps" in said
    assert "has no policy" in said and "learning curve" in said
    told = json.loads((alone / "results" / "fidelity.json").read_text())
    assert told["training"]["init_replay"] == {"episodes": games + 1, "steps": 79 * games + 40}
    assert not list((alone / "results").glob("evaluation*")) and run.load_checkpoint()["collector"]["begun"] == 0
    assert main(["play", f"run={alone}", f"record={tmp_path / 'film.mp4'}", "steps=3"]) == 0

    assert main(["fidelity", f"run={alone}", "tier=fast", "horizon=1"]) == 0
    short = json.loads((alone / "results" / "fidelity-fast-horizon1.json").read_text())
    assert short["what"] == "fidelity" and short["rows"] == told["rows"][:1] and len(told["rows"]) == 2

    monkeypatch.setattr(fidelity, "find_suite", lambda env, config: suite.find_suite(env, config, tmp_path))
    capsys.readouterr()
    assert main(["evaluate", f"run={alone}"]) == 2
    assert "suite env=Catch-v0 one of random play" in capsys.readouterr().err


def test_what_init_replay_names(tmp_path: Path) -> None:
    base = {"recipe": "reverie", "size": "toy"}
    for value, names in (("", ()), ("a", ("a",)), (["a", "b"], ("a", "b"))):
        assert recordings(from_dict(base | {"init_replay": value})) == names
    with pytest.raises(UserError, match="no run .*nowhere"):
        recorded(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a run folder"):
        recorded(tmp_path)
    Run.create(from_dict(base), tmp_path / "run")
    with pytest.raises(UserError, match="holds no episodes"):
        recorded(tmp_path / "run")
    (tmp_path / "run/episodes").mkdir(exist_ok=True)
    (tmp_path / "run/episodes/0.npz").touch()
    pong, catch = from_dict(base), from_dict(base | {"env": "Catch-v0"})
    assert recorded(tmp_path / "run", pong) == recorded(tmp_path / "run/episodes", catch)
    with pytest.raises(UserError, match="is a run with env=ALE/Pong-v5, not Catch-v0.*name .*run/episodes"):
        recorded(tmp_path / "run", catch)
    asked = replace(pong, game=replace(pong.game, action_repeat=4, sticky=0.25))  # what the id means
    assert recorded(tmp_path / "run", asked)
    with pytest.raises(UserError, match=r"is a run with game\.action_repeat=4, not 2"):
        recorded(tmp_path / "run", replace(pong, game=replace(pong.game, action_repeat=2)))

"""A packed model is the run it was packed from, and never half of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from envs.errors import UserError
from envs.games import Games
from runs import dreams
from runs.folder import pretrained
from runs.folder.run import Run
from runs.recipes import RECIPES
from tests import trained
from world_model.dream.envs import DreamEnv


@pytest.fixture(scope="module", params=list(RECIPES))
def run_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return trained.make(tmp_path_factory.mktemp("trained") / "run", request.param)


def test_a_box_is_the_run(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Games, "__init__")  # there is no ROM, no package, nothing
    path = pretrained.pack(Run.open(run_folder), tmp_path / "box")
    parts, boxed = dreams.load_parts(run_folder), dreams.load_parts(path)
    assert boxed.run is None and boxed.step == parts.step
    assert boxed.config == parts.config and boxed.controls == parts.controls
    assert torch.equal(boxed.starts.frame, parts.starts.frame[: pretrained.STARTS])
    assert torch.equal(boxed.starts.action, parts.starts.action[: pretrained.STARTS])
    others = boxed.agent.state_dict()
    for name, value in parts.agent.state_dict().items():
        if not isinstance(value, torch.Tensor):  # what a learner needs to go on
            continue
        close = torch.isclose(others[name].double(), value.double(), rtol=2**-8, atol=0).all()
        assert close and others[name].dtype == value.dtype, name
    frame, _ = DreamEnv(boxed.world()).reset(seed=0)
    assert frame.std() > 0
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["score"]["env_steps"] == 400 and about["training"]["command"] and about["seed"] == 7


def test_a_box_needs_a_score_of_its_own_checkpoint(run_folder: Path, tmp_path: Path) -> None:
    folder = trained.copied(run_folder, tmp_path)
    with pytest.raises(UserError, match="main.py evaluate"):
        pretrained.pack(Run.open(folder), tmp_path / "box")
    (folder / "results").mkdir()
    told = json.loads((run_folder / "results" / "evaluation-sampled.json").read_text())
    (folder / "results" / "evaluation-sampled.json").write_text(json.dumps(told | {"env_steps": 5}))
    with pytest.raises(UserError, match="of step 5, the newest checkpoint of step 400"):
        pretrained.pack(Run.open(folder), tmp_path / "box")
    assert not (tmp_path / "box").exists()


def test_a_box_that_is_missing_or_damaged(run_folder: Path, tmp_path: Path) -> None:
    path = pretrained.pack(Run.open(run_folder), tmp_path)
    whole, about = path.read_bytes(), path.with_suffix(".json")
    for damaged in (whole[: len(whole) // 2], b"", b"\xff" * 64):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be used"):
            dreams.load_parts(path)
    path.write_bytes(whole)
    told = json.loads(about.read_text())
    about.write_text(json.dumps(told | {"config": told["config"] | {"recipe": "future"}}))
    with pytest.raises(UserError, match='Unknown recipe "future"'):
        dreams.load_parts(path)
    key = next(key for key in ("deter", "hidden", "width") if key in told["config"]["model"])
    wider = told["config"]["model"] | {key: 96}
    about.write_text(json.dumps(told | {"config": told["config"] | {"model": wider}}))
    with pytest.raises(UserError, match="another model"):
        dreams.load_parts(path)
    about.unlink()
    with pytest.raises(UserError, match="missing"):
        dreams.load_parts(path)


def test_packing_leaves_the_model_that_ships_alone_unless_it_is_named(run_folder: Path, tmp_path: Path) -> None:
    before = dreams.PRETRAINED.read_bytes()
    pretrained.command(pretrained.PackConfig(run=str(run_folder)))
    assert (run_folder / "packed" / "catch.safetensors").exists() and dreams.PRETRAINED.read_bytes() == before
    pretrained.command(pretrained.PackConfig(run=str(run_folder), out=str(tmp_path)))
    assert dreams.load_parts(tmp_path / "catch.safetensors").config.env == "Catch-v0"


def test_a_model_that_ships_has_a_name_unless_a_run_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert dreams.load_parts("KungFuMaster").config.env == "ALE/KungFuMaster-v5"
    assert dreams.packed_path(None) == dreams.packed_path("pong") == dreams.PRETRAINED
    assert dreams.packed_path("../pretrained/pong") is None
    for name in ("pon", ""):
        with pytest.raises(UserError):
            dreams.load_parts(name)
    Path("runs/out/pong").mkdir(parents=True)
    Path("runs/out/pong/config.json").touch()
    assert dreams.packed_path("pong") is None


def test_the_model_that_ships_was_packed_by_an_older_program_and_plays() -> None:
    player = dreams.load()
    frame, _ = player.dream.reset(seed=0)
    for _ in range(3):
        frame, *_ = player.dream.step(player.act(frame))
    assert frame.std() > 0 and player.parts.config.policy.epochs == 1

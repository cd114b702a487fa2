"""The tables of docs/results.md come from files, and only from files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from envs.errors import UserError
from runs.folder.run import Run
from runs.measure.scores import human_normalised
from runs.recipes.reverie import reverie
from runs.report import curve, publish


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run.create(replace(reverie("toy"), env="Catch-v0"), tmp_path / "run", threads=1)
    for step, value in ((1600, -8.0), (3200, 9.0)):
        made.log(step, {"episode/return": value, "policy/return": value / 10, "rounds": step / 16})
    values = {"policy": "sampled", "mean": 8.25, "std": 1.5, "median": 9.0, "episodes": 4, "returns": [9, 9, 6, 9]}
    made.result("evaluation-sampled", values)
    return made


def test_what_is_published_stands_in_the_table(run: Run, tmp_path: Path) -> None:
    curve.draw(run)
    files = publish.publish(run, tmp_path / "results")
    assert {path.name for path in files} == {
        "reverie-Catch-v0-evaluation-sampled.json",
        "reverie-Catch-v0-curve.json",
        "reverie-Catch-v0-curve.png",
    }
    told = json.loads((tmp_path / "results" / "reverie-Catch-v0-curve.json").read_text())
    assert [(point["step"], point["return"]) for point in told["points"]] == [(1600, -8), (3200, 9)]
    assert told["env_steps"] == 3200, "how far it had come, where no checkpoint was loaded"
    entry = json.loads((tmp_path / "results" / "reverie-Catch-v0-evaluation-sampled.json").read_text())
    assert entry["training"]["threads"] == 1 and entry["commit"] and entry["versions"]
    (row,) = [line for line in publish.tables(tmp_path / "results").splitlines() if "Catch-v0 |" in line]
    assert "| sampled | **8.25** | 1.50 | 9.0 | 4 |" in row


def test_a_variant_is_published_beside_the_recipe(run: Run, tmp_path: Path) -> None:
    result = json.loads((run.folder / "results" / "evaluation-sampled.json").read_text())
    run.result("evaluation-sampled", result | {"judged_in_real_game": {"steps": 12_345}})
    publish.publish(run, tmp_path / "results")
    publish.publish(run, tmp_path / "results", variant="z-only")
    lines = [line for line in publish.tables(tmp_path / "results").splitlines() if "Catch-v0 |" in line]
    assert ["toy, z-only |" in line for line in lines] == [False, True]
    assert "and 12,345 of evolution" in lines[0]


def test_a_planners_few_episodes_are_published(run: Run, tmp_path: Path) -> None:
    """A hundred would take hours."""
    run.result("evaluation-planner-episodes2", {"policy": "planner", "mean": 1.0})
    names = [path.name for path in publish.publish(run, tmp_path / "results")]
    assert "reverie-Catch-v0-evaluation-planner-episodes2.json" in names


def test_what_another_run_has_published_is_not_replaced_unasked(run: Run, tmp_path: Path) -> None:
    run.result("evaluation-sampled-episodes3", {"policy": "sampled"})
    files = publish.publish(run, tmp_path / "results")
    assert files == publish.publish(run, tmp_path / "results"), "the same run anew"
    assert not [path for path in files if "episodes3" in path.name], "a trial stays with its run"
    run.note(started="2020-01-01T00:00:00+0000")
    run.result("evaluation-sampled", {"policy": "sampled"})
    for path in (run.folder / "results").glob("*.json"):
        path.rename(path.with_name(path.name.replace("sampled", "other")))  # whatever its names are
    with pytest.raises(UserError, match="reverie-Catch-v0-evaluation-sampled.json is the result of another run"):
        publish.publish(run, tmp_path / "results")
    for path in (run.folder / "results").glob("*.json"):
        path.rename(path.with_name(path.name.replace("other", "sampled")))
    assert publish.publish(run, tmp_path / "results", overwrite=True) == files
    assert publish.publish(run, tmp_path / "results", variant="second") != files


def test_what_an_earlier_checkpoint_reached_is_not_published_beside_a_newer_one(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.result("fidelity", {"env_steps": 1600})
    (run.folder / "results/fidelity.png").write_bytes(b"")
    names = {path.name for path in publish.publish(run, tmp_path / "results")}
    assert names == {"reverie-Catch-v0-evaluation-sampled.json"}
    assert "fidelity.json is left out: it is of step 1,600, and the run is at 3,200" in capsys.readouterr().out


def test_all_that_a_replaced_run_had_published_goes_and_what_no_run_has_made_stays(run: Run, tmp_path: Path) -> None:
    run.result("probe", {})
    (run.folder / "results/long-rollout.png").write_bytes(b"agent")
    (run.folder / "results/long-rollout-random.png").write_bytes(b"random")
    published = tmp_path / "results"
    publish.publish(run, published)
    assert (published / "reverie-Catch-v0-long-rollout-random.png").read_bytes() == b"random"
    speed = published / "reverie-Catch-v0-gpu-speed.json"
    speed.write_text(json.dumps({"what": "benchmark"}))
    run.note(started="2020-01-01T00:00:00+0000")
    (run.folder / "results/probe.json").unlink()
    run.result("evaluation-sampled", {"policy": "sampled"})
    with pytest.raises(UserError, match="evaluation-sampled.json is the result of another run"):
        publish.publish(run, published)
    publish.publish(run, published, overwrite=True)
    assert speed.exists() and not (published / "reverie-Catch-v0-probe.json").exists()


def test_a_clock_that_nobody_could_read_stands_in_the_table(run: Run, tmp_path: Path) -> None:
    known = {"fast_percent": 1.0, "stops": 0.0, "jumps": 0.0, "legible": 1.0}
    unread = dict.fromkeys(known) | {"legible": 0.0}
    run.result("clock", {"steps": 500, "real": known, "dream": unread})
    publish.publish(run, tmp_path / "results")
    (row,) = [line for line in publish.tables(tmp_path / "results").splitlines() if "clock]" in line]
    assert "| 500 | - | - | - | 0.0% | +1.0 % |" in row


def test_a_game_of_one_s_own_is_published_under_a_name_that_every_system_knows(tmp_path: Path) -> None:
    run = Run.create(replace(reverie("toy"), env="my_games:Dodge-v0"), tmp_path / "run")
    run.result("evaluation-sampled", {"policy": "sampled"})
    (path,) = publish.publish(run, tmp_path / "results")
    assert path.name == "reverie-my_games-Dodge-v0-evaluation-sampled.json"


def test_a_variant_is_a_word(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match='variant="a/b" is no part of a file name'):
        publish.publish(run, tmp_path / "results", variant="a/b")
    assert not (tmp_path / "results").exists()


def test_a_run_without_results_has_nothing_to_publish(tmp_path: Path) -> None:
    empty = Run.create(reverie("toy"), tmp_path / "empty")
    with pytest.raises(UserError, match="no results yet"):
        publish.publish(empty, tmp_path / "results")


def test_human_normalised_scores() -> None:
    assert human_normalised("ALE/Pong-v5", 14.6) == pytest.approx(1)
    assert human_normalised("ALE/Pong-v5", -20.7) == pytest.approx(0)
    assert human_normalised("BreakoutNoFrameskip-v4", 30.5) == pytest.approx(1)
    assert human_normalised("Catch-v0", 10) is None

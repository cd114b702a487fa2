"""Atari 100k: scores and aggregates against hand computations, and the sweep that goes on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import main
from runs.cli import side_by_side
from runs.folder.run import Run
from runs.measure.scores import aggregates, estimates, human_normalised, published, systems
from runs.report import atari100k as report

TOY = ["size=toy", "steps=216", "episodes=1", "game.max_steps=20", "train.prefill=200", "train.pretrain=1", "threads=1"]
TOY += ["game.num_envs=2"]  # an emulator takes a third of a second to begin


def test_the_published_means_give_the_published_aggregates() -> None:
    found = {
        system: aggregates([[human_normalised(game, known[system])] for game, known in published().items()])  # type: ignore[list-item]
        for system in systems()
    }
    for system, mean, median in (("IRIS", 1.046, 0.289), ("TWM", 0.956, 0.505), ("STORM", 1.222, 0.425)):
        assert (round(found[system]["mean"], 3), round(found[system]["median"], 3)) == (mean, median)


def test_aggregates_by_hand() -> None:
    found = aggregates([[0.0, 0.2], [0.4, 0.6], [1.0, 3.0], [0.8, 0.8]])
    assert found["mean"] == pytest.approx((0.1 + 0.5 + 2 + 0.8) / 4)
    assert found["median"] == pytest.approx(0.65)
    assert found["iqm"] == pytest.approx((0.4 + 0.6 + 0.8 + 0.8) / 4)  # without 0, 0.2 and 1, 3
    assert found["optimality_gap"] == pytest.approx((1 + 0.8 + 0.6 + 0.4 + 0 + 0 + 0.2 + 0.2) / 8)


def test_a_game_counts_once_however_many_seeds_it_has() -> None:
    once = aggregates([[0.1], [0.2], [0.5], [3.0], [1.5]])
    again = aggregates([[0.1], [0.2], [0.5], [3.0] * 3, [1.5] * 2])
    assert again == pytest.approx(once, abs=0.07)  # as many are cut as whole ones go into a quarter
    assert again["optimality_gap"] == pytest.approx(once["optimality_gap"])


def test_intervals_hold_the_value_and_grow_with_what_differs() -> None:
    alike = estimates({"Pong": [[0.0] * 10, [0.0] * 10], "Boxing": [[6.0] * 10]})
    assert all(one.low == pytest.approx(one.high) for one in alike.values())
    seeds = estimates({"Pong": [[-20.0] * 10, [20.0] * 10], "Boxing": [[6.0] * 10]})["mean"]
    assert seeds.value == pytest.approx(alike["mean"].value) and seeds.low < seeds.value < seeds.high
    expected = np.array([-20, 20]) / (14.6 + 20.7) / 2 + seeds.value  # both seeds drawn alike: a quarter each
    assert (seeds.low, seeds.high) == pytest.approx(tuple(expected))
    rng = np.random.default_rng(0)
    equal = estimates({"Pong": [rng.normal(0, 10, 100).tolist() for _ in range(40)]})["mean"]
    # Of 40 equal seeds of 100 episodes: 1.96 x 10 / 35.3 / sqrt(4,000). Episodes drawn within seeds would count twice.
    assert (equal.high - equal.low) / 2 == pytest.approx(0.0088, rel=0.2)
    episodes = estimates({"Pong": [[-20.0, 20.0] * 50]})["mean"]
    assert 0.05 < episodes.high - episodes.value < 0.2  # 1.96 x 20 / 35.3 / 10 = 0.11


def entry(game: str, seed: int, mean: float, **more: Any) -> dict[str, Any]:
    return {
        "env": f"ALE/{game}-v5", "recipe": "reverie", "protocol": "atari100k", "policy": "sampled", "seed": seed,
        "mean": mean, "returns": [mean - 1, mean + 1], "episodes": 100, "hours": 2.0, "core_hours": 1.0,
        "size": "xs", "env_steps": 100_000,
        "training": {"command": f"python main.py threads=1 env=ALE/{game}-v5 seed={seed}", "commit": f"{seed}abcdef0"},
    } | more  # fmt: skip


def test_only_results_of_the_benchmark_count_and_make_table_page_and_picture(tmp_path: Path) -> None:
    points = [{"step": 100, "hours": 0.1, "core_hours": 0.1, "return": -20.0}]
    for name, told in {
        "a": entry("Pong", 0, -10.0), "b": entry("Pong", 1, 10.0), "c": entry("Boxing", 0, 6.1, core_hours=None),
        "sticky": entry("Pong", 2, 21.0, protocol="default"), "variant": entry("Pong", 3, 21.0, variant="big"),
        "greedy": entry("Pong", 4, 21.0, policy="greedy"), "early": entry("Pong", 5, 21.0, env_steps=99_999),
        "other": entry("Skiing", 0, 1.0), "long": entry("Pong", 6, 21.0, env_steps=200_000),
        "ppo": entry("Pong", 7, 21.0, recipe="ppo", env_steps=100_000), "few": entry("Pong", 8, 21.0, episodes=20),
    }.items():  # fmt: skip
        (tmp_path / f"{name}-evaluation-sampled.json").write_text(json.dumps(told))
    (tmp_path / "a-curve.json").write_text(json.dumps({"points": points}))
    entries = report.load(tmp_path.glob("*evaluation-sampled.json"))
    assert [(one["game"], one["seed"]) for one in entries] == [("Pong", 0), ("Pong", 1), ("Boxing", 0)]
    assert [one["points"] for one in entries] == [points, [], []]
    assert [one["seed"] for one in report.load(tmp_path.glob("*evaluation-sampled.json"), None)] == [7]
    told = report.summary(entries)
    assert told["games"]["Pong"]["score"] == 0.0 and told["games"]["Boxing"]["human_normalised"] == pytest.approx(0.5)
    assert len(told["missing"]) == 24 and "Pong" not in told["missing"]
    assert told["published"]["IRIS"]["mean"] == pytest.approx(
        (human_normalised("Pong", published()["Pong"]["IRIS"]) + human_normalised("Boxing", 70.1)) / 2  # type: ignore[operator]
    )
    lines = report.lines(told, "ours", ("IRIS",))
    assert lines[0][-1] == "IRIS" and [line[0] for line in lines[1:3]] == ["Boxing", "Pong"]
    assert lines[2][1] == "0.0 (2 seeds)" and {len(line) for line in lines} == {7}
    page = report.page(tmp_path)
    assert (
        "## reverie, 2 of 26 games" in page
        and "With the settings of `python main.py atari100k threads=1`,\nat the commits 0abcdef, 1abcdef: each" in page
    )
    assert json.loads(report.numbers(tmp_path)) == {"reverie": told}
    larger = entry("Pong", 9, 20.0, size="s")
    (tmp_path / "larger-evaluation-sampled.json").write_text(json.dumps(larger))
    assert "## reverie s, 1 of 26 games" in report.page(tmp_path), "another size is another system"
    assert json.loads(report.numbers(tmp_path))["reverie"] == told
    report.picture(entries, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_sweep_runs_what_is_missing_goes_on_with_what_was_stopped_and_skips_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("runs.measure.scores.RESAMPLES", 20)
    asked = ["atari100k", "games=Pong,boxing", "out=all", *TOY]

    def here(commands: dict[str, list[str]], at_once: int, folder: Path) -> list[int]:
        assert list(commands) == ["Pong-0", "Boxing-0"] and (at_once, folder) == (2, Path("all"))
        assert [main.main(words) for words in commands.values()] == [0, 0]
        return []

    monkeypatch.setattr(side_by_side, "run", here)  # in this process: starting one takes seconds
    assert main.main([*asked, "jobs=2"]) == 0
    said = capsys.readouterr().out
    assert "2 of 26 games" in said and "not finished" not in said
    told = json.loads(Path("all/summary.json").read_text())
    assert told["recipe"] == "reverie" and set(told["games"]) == {"Pong", "Boxing"}
    run = Run.open("all/ALE-Boxing-v5-0")
    assert run.meta["command"] == f"python main.py {' '.join(TOY)} protocol=atari100k env=ALE/Boxing-v5 seed=0"
    assert run.config.game.life_loss and run.config.replay.validation == 0

    (run.folder / "results/evaluation-greedy.json").unlink()  # stopped while it was evaluated
    assert main.main(asked) == 0
    said = capsys.readouterr().out
    assert "ALE/Pong-v5, seed 0: finished" in said and f"resuming {run.folder}" in said
    assert Run.open(run.folder).meta["resumed"] and "resumed" not in Run.open("all/ALE-Pong-v5-0").meta

    assert main.main([*asked, "games=Pong", "model.lr=1e-4", "model.deter=32"]) == 2
    said = capsys.readouterr().err
    assert "was begun with another model.deter" in said and "No game is finished in all with these settings" in said

    assert main.main([*asked, "games=Pong", "train.cooldown=0.5"]) == 2  # resume takes it, and the score is another's
    assert "was begun with another train.cooldown" in capsys.readouterr().err

    for path in [*run.folder.glob("checkpoints/*"), run.folder / "results/evaluation-greedy.json"]:
        path.unlink()  # as if it had been killed before its first one
    assert main.main([*asked, "games=Boxing"]) == 0
    assert f"writing {run.folder}" in capsys.readouterr().out

    Path("all/ALE-Pong-v5-0/results/evaluation-sampled.json").unlink()
    assert main.main([*asked, "only_table=true"]) == 0  # of what is finished
    assert "1 of 26 games" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["games=Boxxing"], '"Boxxing" is none of the 26 games of Atari 100k'),
        (["seed=3"], "seed is decided by atari100k itself"),
        (["seeds=-1"], "seeds must be between 0 and"),
        (["only_table=true", "out=nowhere"], "No game is finished in nowhere"),
        (["games=Pong", "nonsense=1"], 'Unknown key "nonsense"'),
        (["games=Pong", "size=toy", "out=/dev/null/x"], "/dev/null/x cannot be made a folder"),
        (["only_table=true", "nonsense=1"], 'Unknown key "nonsense"'),
        (["games=Pong", "model.lr=1e-4,2e-4"], "model.lr needs one value"),
        (["games=Pong", "recipe=iris,reverie"], "recipe needs one value"),
        (["games=Pong", "jobs=2", "hydra/launcher=ray"], "jobs= and hydra/launcher= both say"),
        (["only_run=true", "only_table=true"], "only_run= and only_table= leave nothing"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.main(["atari100k", *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())

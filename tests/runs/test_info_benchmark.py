"""What a recipe is made of, how fast it is, and whether the measurement of Pong's ball can be trusted."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from rich.console import Console

from envs import GameConfig, UserError
from envs.make import make_games
from runs import build
from runs.cli import info
from runs.config import Config
from runs.folder.run import Run
from runs.measure import atari, benchmark, objects, pong
from runs.recipes import preset

Place = tuple[int, int]


def toy(env: str = "Catch-v0", **game: int | bool) -> Config:
    config = preset("reverie", "toy")
    return replace(config, env=env, game=replace(config.game, **({"num_envs": 2} | game)))  # type: ignore[arg-type]


# ---- info ----
def test_the_components_add_up_to_what_is_trained() -> None:
    config = toy()
    facts = info.describe(config)
    games = make_games(config.env, config.game, 1)
    agent = build.agent(config, games.spec)
    games.close()
    for half, module in (("world model", agent.world_model), ("policy", agent.learner)):
        parts = sum(part["parameters"] for part in facts["components"] if part["of"] == half)
        assert parts == facts["parameters"][half] == sum(weight.numel() for weight in module.parameters())
    assert facts["trained"] == sum(weight.numel() for weight in agent.parameters() if weight.requires_grad)
    by_name = {part["name"]: part for part in facts["components"]}
    assert {"encoder", "decoder", "dynamics", "prior", "reward", "cont", "policy", "critic"} <= by_name.keys()
    assert by_name["encoder"]["trained_by"] == ["world_model"] and by_name["policy"]["trained_by"] == ["actor"]
    assert by_name["slow_critic"]["trained_by"] == []


def test_the_latent_and_the_memory_are_told() -> None:
    facts = info.describe(toy())
    assert facts["latent"].startswith("8 x 8 one-hot, 24 bits")
    assert facts["memory_bytes"] == 64 * 4 and "h 64 float32" in facts["memory"]
    assert info.latent_bits(torch.randn(1, 32)) is None
    transformer = info.describe(replace(toy(), model=replace(toy().model, dynamics="transformer")))
    assert "k 2 x 16 x 64 float32" in transformer["memory"], "as many frames as a segment has"
    assert "position 1 int64" in transformer["memory"]


def test_info_prints_every_component_with_its_parameters() -> None:
    out = io.StringIO()
    info.show(toy(), Console(file=out, width=200))
    facts, text = info.describe(toy()), out.getvalue()
    for part in facts["components"]:
        assert any(part["name"] in line and f"{part['parameters']:,}" in line for line in text.splitlines())
    assert f"{facts['trained']:,}" in text and "8 segments x 16 frames" in text and "8 x 8 one-hot" in text


# ---- benchmark ----
def test_a_row_is_arithmetic() -> None:
    made = benchmark.row("x", [0.1, 0.1, 0.4], "steps", each=10)
    assert made["per_second"] == 50.0 and made["ms_median"] == 100.0 and made["calls"] == 3
    assert made["ms_p95"] == pytest.approx(370, abs=0.01)


@pytest.mark.slow
def test_the_benchmark_measures_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = benchmark.measure(toy(), device="cpu", threads=1, seconds=0.3, folder=tmp_path)
    written = json.loads((tmp_path / "benchmark-reverie-toy-cpu.json").read_text())
    keys = {"what", "command", "commit", "versions", "machine", "threads", "rows", "phases", "operators", "load_before"}
    assert keys <= written.keys() and written["what"] == "benchmark" and written["threads"] == 1
    rows = {entry["name"]: entry for entry in written["rows"]}
    assert all(entry["per_second"] > 0 and entry["ms_p95"] >= entry["ms_median"] > 0 for entry in rows.values())
    both, model = rows["both updates"], rows["world-model update"]
    assert both["calls"] == model["calls"] >= 5 and both["per_second"] < model["per_second"]
    # At most 8 x (16 - 8) starts of 10 steps; none where an episode, or what there is of it so far, has ended.
    assert 40 * 10 <= rows["dreaming"]["each"] <= 64 * 10 and rows["dreaming"]["each"] % 10 == 0
    assert set(written["phases"]) == {"collect", "world model", "policy"}
    assert sum(written["phases"].values()) == pytest.approx(1, abs=0.001) and min(written["phases"].values()) > 0
    for entries in written["operators"].values():
        shares = [entry["share"] for entry in entries]
        assert 5 <= len(entries) <= benchmark.OPERATORS and shares == sorted(shares, reverse=True) and sum(shares) <= 1
    assert written["parameters"]["world_model"] == info.describe(toy())["parameters"]["world model"]
    assert found["rows"] == written["rows"] and "world-model update" in capsys.readouterr().out


# ---- the ball ----
def screen(ball_at: list[Place], left: int = 80, right: int = 120) -> np.ndarray:
    """A picture (3, 64, 64) with balls (x, y of the upper left corner) and paddles, as the console would draw it."""
    full = np.empty((210, 160, 3), np.uint8)
    full[:] = atari.FLOOR
    full[24:34] = full[194:] = atari.WHITE
    full[left : left + 16, 16:20], full[right : right + 16, 140:144] = atari.PADDLES
    for x, y in ball_at:
        full[y : y + 4, x : x + 2] = atari.WHITE
    return cv2.resize(full, (64, 64), interpolation=cv2.INTER_AREA).transpose(2, 0, 1)


def some_sample(count: int = 40) -> objects.Sample:
    """Flying balls anywhere between the walls, behind the paddles and beside them too."""
    rng = np.random.default_rng(0)
    frames, truth = [], []
    for _ in range(count):
        x, y, dx, dy = (int(rng.integers(low, high)) for low, high in ((4, 154), (36, 188), (-3, 4), (-2, 3)))
        frames.append(screen([(x, y), (x + dx, y + dy)], *rng.integers(34, 178, 2).tolist()))
        centre = (np.array([x + dx / 2 + 1, y + dy / 2 + 2])) * pong.SCALE - 0.5
        truth.append(pong.Truth(centre, 0.0))
    return objects.Sample(np.stack(frames), truth, count)


def test_the_detector_finds_every_ball_and_nothing_else() -> None:
    sample = some_sample(100)
    assert objects.distances(sample.frame, sample.centre).max() < 0.5
    for left, right in ((34, 178), (90, 90), (178, 60)):
        assert pong.find_ball(screen([], left, right)) is None
    faint = screen([]) + 0.2 * (screen([(80, 100)]).astype(float) - screen([]))
    assert pong.find_ball(faint) is None and pong.find_ball(screen([(80, 100)])) is not None


def test_a_reconstruction_without_the_ball_cannot_pass() -> None:
    sample = some_sample()
    good = objects.judge(sample, sample.frame.astype(np.float32))
    assert good["within_2px"] == 1 and good["detector_valid"] and good["control_mean_frame_within_2px"] == 0
    assert float(good["control_other_frame_within_2px"]) < 0.2
    empty = objects.judge(sample, np.stack([screen([])] * len(sample.frame)).astype(np.float32))
    assert empty["within_2px"] == 0 and empty["found"] == 0
    moved = objects.judge(sample, np.roll(sample.frame, 3, axis=-1).astype(np.float32))
    assert float(moved["within_2px"]) < 0.1 < float(moved["found"])


def test_the_plain_emulator_shows_what_the_games_show() -> None:
    config = GameConfig(gray=False)
    games = make_games("ALE/Pong-v5", config, 1)
    rng = np.random.default_rng(0)
    try:
        games.reset([7])
        mirror = pong.Mirror("ALE/Pong-v5", config, 7)
        seen = []
        for _ in range(120):
            action = rng.integers(games.spec.action_size, size=1)
            frame = games.step(action).frame[0]
            mirror.step(int(action[0]))
            assert np.array_equal(mirror.frame(), frame)
            if truth := mirror.ball():
                place = pong.find_ball(frame)
                assert place is not None and np.linalg.norm(place - truth.centre) < 1 and truth.memory_gap < 1
                seen.append(tuple(truth.centre))
        assert len(set(seen)) > 20
    finally:
        games.close()


def test_the_ball_of_an_untrained_run_is_lost(tmp_path: Path) -> None:
    config = toy("ALE/Pong-v5", max_steps=40)
    run = Run.create(config, tmp_path / "run")
    games = make_games(config.env, config.game, 1)
    run.save_checkpoint({"agent": build.agent(config, games.spec).state_dict()}, 0)
    games.close()
    found = objects.measure(run, frames=30)
    written = json.loads((tmp_path / "run" / "results" / "objects.json").read_text())
    assert written["what"] == "objects" and written["frames"] == 30 == found["frames"] and written["candidates"] > 100
    assert written["detector_real_within_1px"] == 1 and written["within_2px"] < 0.1
    examples = cv2.imread(str(tmp_path / "run" / "results" / "objects.png"))
    assert examples is not None and examples.shape[1] == 4 * 3 * 64 * objects.SCALE


def test_only_pong_in_colour_has_a_ball_to_measure(tmp_path: Path) -> None:
    for env, config in (("ALE/Breakout-v5", GameConfig(gray=False)), ("ALE/Pong-v5", GameConfig(gray=True))):
        with pytest.raises(UserError, match="gray=false"):
            pong.Mirror(env, config, 0)
    with pytest.raises(UserError, match="There is no run"):
        objects.command(objects.ObjectsConfig(run=str(tmp_path / "missing")))

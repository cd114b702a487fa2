"""Pictures of what `world_models` knows, and the learning curve of a run whose policy evolves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from agent.dream_video import show_dream
from agent.replay import Replay
from agent.replay_config import ReplayConfig
from envs.episode import Episode
from envs.spec import Spec
from runs.folder.run import Run
from runs.recipes.world_models import world_models
from runs.report import curve
from runs.report.diagnostics import COLUMNS, FRAMES, GAP, LEFT, SCALE, TEMPERATURES, TOP, dream
from runs.report.fitness_curve import draw_fitness, generations
from tests.toys import segments
from world_model.interface import WorldModel, to_unit
from world_model.world_models import WorldModels, WorldModelsConfig

SPECS = [Spec((3, 64, 64), 2, False), Spec((1, 64, 64), 4, True)]
CELL = 64 * SCALE + GAP
NAMES = {"mixture", "latents", "temperatures", "reconstructions"}


def build(spec: Spec, mixtures: int = 3) -> WorldModels:
    torch.manual_seed(0)
    return WorldModelsConfig(z=4, channels=2, hidden=8, mixtures=mixtures, heads=4).build(spec)


def segment(spec: Spec, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch = segments(spec, 2, length)  # of which only the last row is padded
    return to_unit(batch.frame[:1]), batch.action[:1]


# ---- portraits ----
@pytest.mark.parametrize("spec", SPECS, ids=["continuous", "gray discrete"])
def test_portraits_are_pictures_and_leave_the_generator_alone(spec: Spec) -> None:
    model, before = build(spec), torch.get_rng_state()
    found = model.pictures(*segment(spec, 20))
    assert torch.equal(torch.get_rng_state(), before)
    assert found.keys() == NAMES
    assert all(image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 for image in found.values())
    assert found["temperatures"].shape == (TOP + (1 + len(TEMPERATURES)) * CELL, LEFT + COLUMNS * CELL, 3)
    assert found["reconstructions"].shape == (TOP + 2 * CELL, LEFT + FRAMES * CELL, 3)


def test_frames_are_shown_pixel_by_pixel() -> None:
    frame, action = segment(SPECS[0], 20)
    shown = build(SPECS[0]).pictures(frame, action)["reconstructions"]
    first = shown[TOP : TOP + 64 * SCALE : SCALE, LEFT : LEFT + 64 * SCALE : SCALE]
    assert np.array_equal(first, (frame[0, 0] * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize(("length", "names"), [(2, NAMES), (1, set())])
def test_a_short_segment_has_what_can_be_shown(length: int, names: set[str]) -> None:
    assert build(SPECS[0], mixtures=12).pictures(*segment(SPECS[0], length)).keys() == names


def test_a_dream_follows_the_actions() -> None:
    model, (frame, action) = build(SPECS[0]), segment(SPECS[0], 7)
    dreamed = dream(model, frame, action, context=3, temperature=0.0)
    assert dreamed.latent.shape == (4, 4) and dreamed.log_weights.shape == (4, 4, 3)
    state = model.start(frame[:, :3], action[:, :2])
    for t, latent in enumerate(dreamed.latent, 3):
        state = model.step(state, action[:, t - 1], temperature=0.0).state
        torch.testing.assert_close(state.latent[0], latent)


class Looker(WorldModels):
    """Remembers what it was asked to show."""

    asked: tuple[torch.Tensor, torch.Tensor] | None = None

    def pictures(self, frame: torch.Tensor, action: torch.Tensor) -> dict[str, np.ndarray]:
        self.asked = frame, action
        torch.rand(1)
        return {"look": np.zeros((2, 3, 3), np.uint8)}


def test_padding_is_not_shown(tmp_path: Path) -> None:
    spec, steps = SPECS[1], 10
    replay = Replay(None, spec, ReplayConfig(), seed=0)
    frame = np.random.default_rng(0).integers(1, 256, (steps + 1, *spec.frame), dtype=np.uint8)
    none = np.zeros(steps, bool)
    done = np.arange(steps) == steps - 1
    replay.add_episode(Episode(frame, np.arange(steps) % 4, none.astype(np.float32), done, none, score=0.0, seed=0))
    model = Looker(WorldModelsConfig(z=4, channels=2, hidden=8, mixtures=2, heads=4), spec)
    run = Run.create(world_models("toy"), tmp_path / "run")
    before, drawn = torch.get_rng_state(), replay.rng.bit_generator.state
    show_dream(model, replay, run, length=16)
    run.close()
    assert torch.equal(torch.get_rng_state(), before) and replay.rng.bit_generator.state == drawn
    assert model.asked is not None
    assert torch.equal((model.asked[0][0] * 255).round().byte(), torch.from_numpy(frame))
    assert model.asked[1].shape == (1, steps + 1)
    assert {path.name.split("-")[0] for path in (run.folder / "pictures").iterdir()} == {"dream", "look"}


def test_most_systems_have_no_further_pictures() -> None:
    assert WorldModel.pictures(build(SPECS[0]), *segment(SPECS[0], 4)) == {}


# ---- the curve of an evolution ----
def generation(number: int, fitness: float, real: int, **more: float) -> dict[str, float]:
    measured = {"policy/fitness": fitness, "policy/fitness_std": 2.0, "policy/fitness_best": fitness + 4}
    return measured | {"policy/generation": number, "real/generations": real, "updates": 0} | more


LINES = [
    {"vision/pixels": 400.0, "vision/kl": 16.0, "vision/kl_nats": 12.0, "updates": 0, "episode/return": -50.0},
    generation(1, 10.0, 0, **{"memory/nll": 1.3, "memory/reward_unexplained": 0.9}),
    generation(2, 20.0, 0),
    generation(1, 15.0, 0),  # the next round's
    generation(2, 25.0, 0),
    generation(1, 300.0, 1),
    generation(2, 350.0, 2),
    generation(2, 360.0, 2),  # once more, after a resume
]


def test_generations_are_counted_over_the_whole_run() -> None:
    found = generations(LINES)
    assert found.number.tolist() == [1, 2, 3, 4, 5, 6]
    assert found.mean.tolist() == [10, 20, 15, 25, 300, 360]
    assert found.best.tolist() == [14, 24, 19, 29, 304, 364] and set(found.std) == {2}
    assert found.real.tolist() == [False] * 4 + [True] * 2
    assert found.phase.tolist() == [0, 0, 1, 1, 2, 2]


def drawn(folder: Path, env: str, lines: list[dict[str, Any]]) -> np.ndarray:
    run = Run.create(replace(world_models("toy"), env=env), folder)
    for line in lines:
        run.log(400, line)
    run.close()
    path = curve.draw(run)
    assert path == folder / "pictures" / "curve.png"
    image = cv2.imread(str(path))
    assert image is not None
    return image


def test_an_evolution_has_a_curve_of_its_own(tmp_path: Path) -> None:
    plain = [{key: value for key, value in line.items() if "fitness" not in key} for line in LINES]
    own, other = drawn(tmp_path / "own", "Catch-v0", LINES), drawn(tmp_path / "other", "Catch-v0", plain)
    assert own.shape != other.shape or (own != other).mean() > 0.01
    alone = drawn(tmp_path / "alone", "Catch-v0", [generation(1, float("nan"), 0)])  # nothing else was logged
    assert alone.shape == own.shape


@pytest.mark.parametrize(("env", "beside"), [("CarRacing-v3", True), ("Catch-v0", False)])
def test_the_paper_stands_beside_its_own_game_only(env: str, beside: bool) -> None:
    figure = Figure()
    draw_fitness(figure, [{"step": 400} | line for line in LINES], replace(world_models("toy"), env=env))
    axis = figure.axes[0]
    lines = {str(line.get_label()): line for line in axis.get_lines()}
    assert ("Ha & Schmidhuber, their log, real game" in lines) == beside
    assert axis.get_xlim()[1] == (25.5 if beside else 6.5)
    assert "in the dream: best" in lines and "in the real game: best" in lines

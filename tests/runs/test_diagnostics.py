"""Pictures of what `world_models` knows, and the learning curve of a run whose policy evolves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from agent.dream_video import show_dream
from agent.replay import Replay
from agent.replay_config import ReplayConfig
from envs.episode import Episode
from envs.spec import Spec
from runs.folder.run import Run
from runs.recipes.reverie import reverie
from runs.recipes.world_models import world_models
from runs.report.diagnostics import COLUMNS, FRAMES, GAP, LEFT, SCALE, TEMPERATURES, TOP, diagnostics, dream
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
    found = diagnostics(model, *segment(spec, 20))
    assert torch.equal(torch.get_rng_state(), before)
    assert found.keys() == NAMES
    assert all(image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 for image in found.values())
    assert found["temperatures"].shape == (TOP + (1 + len(TEMPERATURES)) * CELL, LEFT + COLUMNS * CELL, 3)
    assert found["reconstructions"].shape == (TOP + 2 * CELL, LEFT + FRAMES * CELL, 3)


def test_frames_are_shown_pixel_by_pixel() -> None:
    frame, action = segment(SPECS[0], 20)
    shown = diagnostics(build(SPECS[0]), frame, action)["reconstructions"]
    first = shown[TOP : TOP + 64 * SCALE : SCALE, LEFT : LEFT + 64 * SCALE : SCALE]
    assert np.array_equal(first, (frame[0, 0] * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize(("length", "names"), [(2, NAMES), (1, set())])
def test_a_short_segment_has_what_can_be_shown(length: int, names: set[str]) -> None:
    assert diagnostics(build(SPECS[0], mixtures=12), *segment(SPECS[0], length)).keys() == names


def test_a_dream_follows_the_actions() -> None:
    model, (frame, action) = build(SPECS[0]), segment(SPECS[0], 7)
    dreamed = dream(model, frame, action, context=3, temperature=0.0)
    assert dreamed.latent.shape == (4, 4) and dreamed.log_weights.shape == (4, 4, 3)
    state = model.start(frame[:, :3], action[:, :2])
    for t, latent in enumerate(dreamed.latent, 3):
        state = model.step(state, action[:, t - 1], temperature=0.0).state
        torch.testing.assert_close(state.latent[0], latent)


def test_padding_is_not_shown(tmp_path: Path) -> None:
    spec, steps = SPECS[1], 10
    replay = Replay(None, spec, ReplayConfig(), seed=0)
    frame = np.random.default_rng(0).integers(1, 256, (steps + 1, *spec.frame), dtype=np.uint8)
    none = np.zeros(steps, bool)
    done = np.arange(steps) == steps - 1
    replay.add_episode(Episode(frame, np.arange(steps) % 4, none.astype(np.float32), done, none, score=0.0, seed=0))
    model, asked = build(spec, mixtures=2), []

    def look(model: WorldModel, frame: torch.Tensor, action: torch.Tensor) -> dict[str, np.ndarray]:
        asked.append((frame, action))
        torch.rand(1)
        return {"look": np.zeros((2, 3, 3), np.uint8)}

    run = Run.create(world_models("toy"), tmp_path / "run")
    before, drawn = torch.get_rng_state(), replay.rng.bit_generator.state
    show_dream(model, replay, run, look, step=0, length=16)
    run.close()
    assert torch.equal(torch.get_rng_state(), before) and replay.rng.bit_generator.state == drawn
    (frames, actions) = asked[0]
    assert torch.equal((frames[0] * 255).round().byte(), torch.from_numpy(frame))
    assert actions.shape == (1, steps + 1)
    assert {path.name.split("-")[0] for path in (run.folder / "pictures").iterdir()} == {"dream", "look"}


def test_most_systems_have_no_further_pictures() -> None:
    model = reverie("toy").model.build(SPECS[0])
    assert diagnostics(model, *segment(SPECS[0], 4)) == {}

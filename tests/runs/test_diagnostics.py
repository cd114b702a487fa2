"""Pictures of what models know, and the learning curve of a run whose policy evolves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from agent.dream_video import FRAMES, show_dream
from agent.replay import Replay
from agent.replay_config import ReplayConfig
from envs.episode import Episode
from envs.spec import Spec
from runs.folder.run import Run
from runs.recipes.reverie import reverie
from runs.recipes.world_models import world_models
from runs.report.diagnostics import (
    COLUMNS,
    CONTEXT,
    GAP,
    LEFT,
    SCALE,
    STEPS,
    TEMPERATURES,
    TOP,
    Pictures,
    actions,
    diagnostics,
    dream,
    used_codes,
)
from tests.toys import VARIANTS, Variant, segments
from tests.world_model.systems import Small
from world_model.interface import State, Tokens, WorldModel, to_unit
from world_model.token_world import TokenWorldConfig
from world_model.trees import Tree
from world_model.world_models import WorldModels, WorldModelsConfig

SPECS = [Spec((3, 64, 64), 2, False), Spec((1, 64, 64), 4, True)]
CELL = 64 * SCALE + GAP
NAMES = {"mixture", "latents", "temperatures", "components"}
ACTIONS = ("LEFT", "NOOP", "RIGHT", "FIRE")


def build(spec: Spec, mixtures: int = 3) -> WorldModels:
    torch.manual_seed(0)
    return WorldModelsConfig(z=4, channels=2, hidden=8, mixtures=mixtures, heads=4).build(spec)


def segment(spec: Spec, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch = segments(spec, 2, length)  # of which only the last row is padded
    return to_unit(batch.frame[:1]), batch.action[:1]


def look(model: WorldModel, frame: torch.Tensor, action: torch.Tensor) -> Pictures:
    return diagnostics(model, frame, action, frame[0], action_names=ACTIONS[: model.spec.action_size])


# ---- portraits ----
@pytest.mark.parametrize("spec", SPECS, ids=["continuous", "gray discrete"])
def test_portraits_are_pictures_and_leave_the_generator_alone(spec: Spec) -> None:
    model, before = build(spec), torch.get_rng_state()
    found = look(model, *segment(spec, 20))
    assert torch.equal(torch.get_rng_state(), before)
    assert found.keys() == NAMES | ({"actions"} if spec.discrete else set())
    assert all(image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 for image in found.values())
    assert found["temperatures"].shape == (TOP + (1 + len(TEMPERATURES)) * CELL, LEFT + COLUMNS * CELL, 3)


def test_frames_are_shown_pixel_by_pixel() -> None:
    frame, action = segment(SPECS[0], 20)
    shown = look(build(SPECS[0]), frame, action)["temperatures"]
    first = shown[TOP : TOP + 64 * SCALE : SCALE, LEFT : LEFT + 64 * SCALE : SCALE]
    assert np.array_equal(first, (frame[0, CONTEXT - 1] * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize(("length", "names"), [(2, NAMES), (1, set())])
def test_a_short_segment_has_what_can_be_shown(length: int, names: set[str]) -> None:
    assert look(build(SPECS[0], mixtures=12), *segment(SPECS[0], length)).keys() == names


def test_a_dream_follows_the_actions() -> None:
    model, (frame, action) = build(SPECS[0]), segment(SPECS[0], 7)
    dreamed = dream(model, frame, action, context=3, temperature=0.0)
    assert dreamed.latent.shape == (4, 4) and dreamed.log_weights.shape == (4, 4, 3)
    state = model.start(frame[:, :3], action[:, :2])
    for t, latent in enumerate(dreamed.latent, 3):
        state = model.step(state, action[:, t - 1], temperature=0.0).state
        torch.testing.assert_close(state.latent[0], latent)


def test_a_component_that_is_off_is_drawn_no_more() -> None:
    model, (frame, action) = build(SPECS[0], mixtures=3), segment(SPECS[0], 7)
    state = model.start(frame[:, :3], action[:, :2])
    off = State(state.latent, model.without(state.memory, [1]))
    for t in range(3, 6):
        off = model.step(off, action[:, t - 1]).state
        weights = model.mixture(off.memory).log_weights.exp()
        assert (weights[..., 1] == 0).all() and torch.allclose(weights.sum(-1), torch.ones(()))
    every = State(off.latent, model.without(off.memory, []))
    assert (model.mixture(every.memory).log_weights.exp() > 0).all(), "and it can be switched on again"
    alone = dream(model, frame, action, context=3, temperature=0.0, off=(0, 2))
    assert (alone.log_weights[..., 1] == 0).all(), "all of the weight"
    for wrong in ([3], [0, 1, 2]):
        with pytest.raises(ValueError, match="cannot be left out"):
            model.without(state.memory, wrong)


def test_padding_is_not_shown(tmp_path: Path) -> None:
    spec, steps = SPECS[1], 10
    replay = Replay(None, spec, ReplayConfig(), seed=0)
    frame = np.random.default_rng(0).integers(1, 256, (steps + 1, *spec.frame), dtype=np.uint8)
    none = np.zeros(steps, bool)
    done = np.arange(steps) == steps - 1
    replay.add_episode(Episode(frame, np.arange(steps) % 4, none.astype(np.float32), done, none, score=0.0, seed=0))
    model, asked = build(spec, mixtures=2), []

    def watch(
        model: WorldModel, frame: torch.Tensor, action: torch.Tensor, frames: torch.Tensor
    ) -> dict[str, np.ndarray]:
        asked.append((frame, action, frames))
        torch.rand(1)
        return {"look": np.zeros((2, 3, 3), np.uint8)}

    run = Run.create(world_models("toy"), tmp_path / "run")
    before, drawn = torch.get_rng_state(), replay.rng.bit_generator.state
    show_dream(model, replay, run, watch, step=0, length=16)
    run.close()
    assert torch.equal(torch.get_rng_state(), before) and replay.rng.bit_generator.state == drawn
    (frames, taken, everywhere) = asked[0]
    assert torch.equal((frames[0] * 255).round().byte(), torch.from_numpy(frame))
    assert taken.shape == (1, steps + 1) and everywhere.shape == (FRAMES, *spec.frame)
    assert {path.name.split("-")[0] for path in (run.folder / "pictures").iterdir()} == {"dream", "look"}


def test_most_systems_have_no_further_pictures() -> None:
    model = reverie("toy").model.build(SPECS[0])
    assert look(model, *segment(SPECS[0], 4)) == {}


# ---- what an action changes, and what codes stand for ----
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_system_with_discrete_actions_shows_what_they_change(variant: Variant) -> None:
    model, before = variant.agent().world_model, torch.get_rng_state()
    found = look(model, *segment(variant.spec, 10))
    assert torch.equal(torch.get_rng_state(), before)
    assert ("actions" in found) == variant.discrete
    assert ("codebook" in found) == (getattr(variant.config.model, "tokens_of", None) == "frame")
    if variant.discrete:
        height, width = (SCALE * side + GAP for side in variant.spec.frame[1:])
        assert found["actions"].shape == (TOP + 2 * len(STEPS) * height, LEFT + len(ACTIONS) * width, 3)


class Lamp(Small):
    """Its next frame is as bright as the number of the action, and noise on top."""

    def advance(self, state: State, action: torch.Tensor) -> Tree:
        return {"h": 0.2 * action.unsqueeze(1)}

    def imagine(self, memory: Tree, temperature: float = 1.0) -> State:
        return State(memory["h"] + 0.3 * torch.rand(1), memory)

    def observe(self, memory: Tree, frame: torch.Tensor) -> State:
        return State(memory["h"][:, :1], memory)

    def decode(self, state: State) -> torch.Tensor:
        return state.latent[:, :, None, None].expand(-1, *self.spec.frame)

    def outcome(self, state: State) -> tuple[torch.Tensor, torch.Tensor]:
        return state.latent[:, 0], state.latent[:, 0]


def test_actions_are_compared_with_noop_under_the_same_random_numbers() -> None:
    spec = Spec((1, 16, 16), 3, True)
    action = torch.zeros(1, 4, dtype=torch.int64)
    shown = actions(Lamp(spec), torch.zeros(1, 4, 1, 16, 16), action, ("ON", "NOOP", "DIM"))
    cell = 16 * SCALE + GAP
    seen = [[int(shown[TOP + row * cell, LEFT + i * cell, 0]) for i in range(3)] for row in range(2 * len(STEPS))]
    assert seen[1] == seen[3] == [102, 128, 153], "half gray and half of the difference"
    assert seen[0] != seen[2], "the noise of the dream, which differs from step to step"


def test_codes_are_told_by_the_mean_of_the_pixels_where_they_stand() -> None:
    """Frames of 20 x 24 in cells of 8 x 8, the last row of which reaches over the edge."""
    frames = torch.zeros(3, 1, 20, 24)
    frames[:2, :, :8, 8:16] = 1.0
    code = torch.full((3, 3, 3), 4)
    code[:, 0, 1] = 7
    code[0, 2, 2] = 1
    told = used_codes(Tokens(code, 9, (8, 8)), frames, 2)
    assert [(one.code, round(27 * one.share)) for one in told] == [(4, 23), (7, 3)]
    assert told[0].mean.eq(0).all() and torch.allclose(told[1].mean, torch.full((1, 8, 8), 2 / 3))


@pytest.mark.parametrize("contrast", [False, True])
def test_iris_tells_its_codes_place_by_place(contrast: bool) -> None:
    model = TokenWorldConfig(channels=4, halvings=3, attention=(), local=True, contrast=contrast).build(SPECS[1])
    frame = torch.rand(2, *SPECS[1].frame)
    found = model.tokenize(frame)
    assert found is not None and found.code.shape == (2, 8, 8) and found.cell == (8, 8) and found.codes == 512
    assert torch.equal(found.code.flatten(1), model.encode(frame))

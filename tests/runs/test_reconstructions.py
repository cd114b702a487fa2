"""The same ten frames over the course of training, in one picture."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from agent.dream_video import FIXED, fixed_frames, reconstruct
from agent.replay import Replay
from agent.replay_config import ReplayConfig
from envs.episode import Episode
from envs.spec import Spec
from runs.folder.progress import Progress
from runs.folder.run import Run
from runs.recipes.reverie import reverie
from runs.report import curve, publish
from runs.report.diagnostics import GAP, LEFT, SCALE, TOP
from runs.report.reconstructions import MOMENTS, draw_reconstructions, spread
from tests.agent.test_loop import begin, quick
from tests.toys import VARIANTS, Variant
from tests.world_model.systems import SYSTEMS


def moments(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run.reconstructions_folder.iterdir())}


def test_a_killed_run_goes_on_with_the_same_frames_and_pictures(tmp_path: Path) -> None:
    config = quick("Catch-v0", show_every=10)
    run = Run.create(config, tmp_path / "whole")
    loop = begin(config, run)
    loop.train(270, run, Progress())
    early = moments(run)
    assert [int(name[10:19]) for name in early] == [1, 2, 4, 8]
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")  # as kill -9 would leave it
    loop.train(400, run, Progress())

    again = Run.open(tmp_path / "stopped")
    again.reconstructions(
        loop.replay.steps, 999, np.zeros((FIXED, 8, 16, 3), np.uint8)
    )  # what came after the checkpoint
    resumed = begin(again.config, again)
    resumed.load_state_dict(again.load_checkpoint())
    again.rewind()
    assert moments(again) == early
    resumed.train(400, again, Progress())
    assert torch.equal(resumed.fixed, loop.fixed) and len(loop.fixed) == FIXED
    assert moments(again) == moments(run)
    assert [int(name[10:19]) for name in moments(run)] == [1, 2, 4, 8, 13, 16], "powers, and each dream's video"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_looking_moves_no_random_numbers(variant: Variant, tmp_path: Path) -> None:
    model = variant.agent().world_model
    frames = torch.randint(256, (FIXED, 2, *variant.spec.frame), dtype=torch.uint8)
    before = torch.get_rng_state()
    pairs = reconstruct(model, frames)
    assert torch.equal(torch.get_rng_state(), before)
    height, width = variant.spec.frame[1:]
    assert pairs is not None and pairs.shape == (FIXED, height, 2 * width, 3) and pairs.dtype == np.uint8
    assert np.array_equal(pairs[:, :, :width, 0], frames[:, 1, 0].numpy())
    alone = reconstruct(model, frames[:, 1])
    # Only who encodes pairs looks at the frame before.
    assert alone is not None
    assert np.array_equal(alone, pairs) == (getattr(variant.config.model, "tokens_of", "frame") == "frame")


def test_choosing_frames_moves_no_random_numbers(tmp_path: Path) -> None:
    config = quick("Catch-v0")
    run = Run.create(config, tmp_path / "run")
    loop = begin(config, run)
    loop.prefill(run, Progress())
    loop.fixed = torch.zeros(0, dtype=torch.uint8)
    before, drawn = torch.get_rng_state(), loop.replay.rng.bit_generator.state
    loop.reconstruct(run)
    assert torch.equal(torch.get_rng_state(), before) and loop.replay.rng.bit_generator.state == drawn


def test_the_frames_are_spread_over_the_replay_by_the_seed() -> None:
    spec = Spec((1, 8, 8), 2, True)
    replay = Replay(None, spec, ReplayConfig(), seed=0)
    for first, count in ((0, 31), (31, 69)):
        frame = np.broadcast_to(np.arange(first, first + count, dtype=np.uint8)[:, None, None, None], (count, 1, 8, 8))
        none = np.zeros(count - 1, bool)
        done = np.arange(count - 1) == count - 2
        action = np.zeros(count - 1, np.int64)
        replay.add_episode(Episode(frame.copy(), action, none.astype(np.float32), done, none, score=0.0, seed=0))
    chosen = fixed_frames(replay, seed=5)
    assert chosen.shape == (FIXED, 2, 1, 8, 8) and chosen.dtype == torch.uint8
    before, now = chosen[:, :, 0, 0, 0].int().T
    assert (now // 10).tolist() == list(range(10))
    assert torch.equal(before, torch.where((now == 0) | (now == 31), now, now - 1)), "the two episodes' first frames"
    assert torch.equal(chosen, fixed_frames(replay, seed=5)) and not torch.equal(chosen, fixed_frames(replay, seed=6))


def test_a_model_without_pictures_has_none() -> None:
    model = SYSTEMS["unseen"](Spec((1, 16, 16), 3, True))
    assert reconstruct(model, torch.zeros(FIXED, 1, 16, 16, dtype=torch.uint8)) is None


@pytest.mark.parametrize(
    "updates", [[7], [1, 2], [1, 2, 4, 8, 16, 20], [*(2**i for i in range(15)), *range(2_000, 20_001, 2_000)]]
)
def test_moments_are_spread_from_the_first_to_the_last(updates: list[int]) -> None:
    chosen = spread(sorted(updates))
    assert chosen == sorted(set(chosen)) and set(chosen) <= set(updates)
    assert len(chosen) == min(MOMENTS, len(updates)) and (chosen[0], chosen[-1]) == (min(updates), max(updates))
    if len(updates) > MOMENTS:
        assert sum(count < 100 for count in chosen) <= 3 and sum(count > 10_000 for count in chosen) >= 2


def test_the_picture_has_the_real_frames_first_and_is_published(tmp_path: Path) -> None:
    run = Run.create(replace(reverie("toy"), env="Catch-v0"), tmp_path / "run")
    run.result("evaluation-sampled", {})
    assert draw_reconstructions(run) is None
    rng = np.random.default_rng(0)
    real = rng.integers(256, size=(FIXED, 6, 8, 3), dtype=np.uint8)
    shown = {count: rng.integers(256, size=(FIXED, 6, 8, 3), dtype=np.uint8) for count in (9, 10, 200)}
    for count, frames in shown.items():
        run.reconstructions(100 + count, count, np.concatenate([real, frames], 2))
    curve.command(curve.CurveConfig(run=str(run.folder)))
    image = cv2.imread(str(run.folder / "pictures" / "reconstructions.png"))
    assert image is not None
    image = image[..., ::-1]
    high, wide = 6 * SCALE + GAP, 8 * SCALE + GAP
    assert image.shape == (TOP + FIXED * high, LEFT + 4 * wide, 3)
    for column, frames in enumerate([real, *shown.values()]):
        for row in range(FIXED):
            top, left = TOP + row * high, LEFT + column * wide
            cell = image[top : top + 6 * SCALE : SCALE, left : left + 8 * SCALE : SCALE]
            assert np.array_equal(cell, frames[row]), (column, row)
    files = {path.name for path in publish.publish(run, tmp_path / "results")}
    assert "reverie-Catch-v0-reconstructions.png" in files

"""Recordings: videos of what is shown, and what a person plays in the real game as food for the replay."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from agent.dream_video import Comparison, side_by_side, strip
from agent.replay import Replay, ReplayConfig
from envs.episode import Episode
from play.film import Film, Recorder, film, panel
from tests import tables
from tests.tables import WAYS, follow, seen


def test_only_what_a_person_plays_in_the_real_game_is_kept() -> None:
    made = tables.table("real")
    made.record(True)
    shown = [seen(made)[0], *(pictures[0] for pictures in follow(made))]
    made.set_player("agent")
    follow(made)
    made.set_player("human")
    follow(made, (["d"],))
    made.set_mode("dream")
    follow(made)
    made.record(False)
    first, second = made.episodes
    assert len(first) == len(WAYS) and len(second) == 1 and first.weight == 5
    assert first.action.tolist() == [2, 0, 2, 1, 1, first.action[5], 2, 0]
    assert np.array_equal(first.frame.transpose(0, 2, 3, 1), np.stack(shown))
    assert first.problem(made.parts.world.model.spec) == ""
    made.close()


def test_going_back_begins_another_piece() -> None:
    made = tables.table("real")
    made.record(True)
    follow(made)
    made.rewind(2)
    follow(made)
    made.close()
    assert [len(piece) for piece in made.episodes] == [len(WAYS), len(WAYS)]
    assert np.array_equal(made.episodes[1].frame[0], made.episodes[0].frame[-3])
    assert [piece.piece_of for piece in made.episodes] == [-1, made.episodes[1].seed], "only the first begins a game"


def test_what_a_person_played_is_learned_from_once(tmp_path: Path) -> None:
    """Each file joins the replay with its weight, also when the run is killed after the checkpoint, and only once."""
    made = tables.table("real")
    recorder = Recorder(made, tmp_path / "videos", tmp_path / "human")
    recorder.start()
    follow(made)
    files = recorder.stop()
    made.close()
    (path,) = (file for file in files if file.suffix == ".npz")
    (tmp_path / "human" / "000-broken.npz").write_bytes(b"nothing")
    other = tables.played("CatchContinuous-v0", 5)
    other.save(tmp_path / "human" / "001-other.npz")

    def replay() -> Replay:
        return Replay(tmp_path / "episodes", made.parts.world.model.spec, ReplayConfig(human_weight=7), seed=0)

    first = replay()
    before = first.state_dict()
    assert first.take_in(tmp_path / "human") == 1 and len(first.skipped) == 2
    assert first.take_in(tmp_path / "human") == 0
    assert first.steps == len(WAYS) and np.array_equal(first.sample(1, 4).frame.shape[:2], (1, 4))
    saved = Episode.load(tmp_path / "episodes" / "000000.npz")
    assert saved.weight == 7 and np.array_equal(saved.frame, Episode.load(path).frame)
    after, resumed = first.state_dict(), replay()
    resumed.load_state_dict(after, lambda seed, actions: saved)
    assert resumed.take_in(tmp_path / "human") == 0 and resumed.steps == len(WAYS)
    killed = replay()  # before the checkpoint that knows of it
    killed.load_state_dict(before, lambda seed, actions: saved)
    assert killed.take_in(tmp_path / "human") == 1
    assert replay().take_in(tmp_path / "nowhere") == 0


@pytest.mark.parametrize(
    ("env", "steps"), [("Catch-v0", 160), pytest.param("ALE/Breakout-v5", 400, marks=pytest.mark.slow)]
)
def test_what_a_person_recorded_weighs_five_times_in_another_run(env: str, steps: int, tmp_path: Path) -> None:
    """Games through the recorder beside others: each of a person's frames is drawn five times as often."""
    made = tables.table("real", env)
    recorder = Recorder(made, tmp_path / "videos", tmp_path / "human")
    recorder.start()
    for step in range(steps):  # two games, and in Catch two steps that begin the next
        made.turn([["d"], ["space"]][step % 8 == 0])
    recorder.stop()
    made.close()
    (tmp_path / "random").mkdir()
    for seed in range(6):
        tables.played(env, 79, seed=100 + seed).save(tmp_path / "random" / f"{seed}.npz")
    replay = Replay(None, made.parts.world.model.spec, ReplayConfig(validation=0.0), seed=0)
    assert replay.take_over(tmp_path / "random", tmp_path / "human", tmp_path / "human") == 6 + 2, "each game once"
    games = replay.memory().values()
    assert [game.weight for game in games] == [1] * 6 + [5] * 2
    draws, frames = 20_000, sum(game.weight * len(game.frame) for game in games)
    share = sum(game.weight * int((game.action == 2).sum()) for game in games) / frames  # the key that the person held
    assert share > 1.2 * sum(int((game.action == 2).sum()) for game in games) / sum(len(game.frame) for game in games)
    batch = replay.sample(draws, 1)
    drawn = ((batch.action == 2) & batch.has_action).float().mean().item()
    assert abs(drawn - share) < 5 * (share * (1 - share) / draws) ** 0.5


def frames_of(path: Path) -> list[np.ndarray]:
    video, frames = cv2.VideoCapture(str(path)), []
    while (read := video.read())[0]:
        frames.append(read[1][..., ::-1])
    return frames


def test_film_without_a_display(tmp_path: Path) -> None:
    made = tables.table("both")
    made.set_player("random")
    done = film(made, tmp_path / "new" / "film.mp4", 12)
    frames = frames_of(tmp_path / "new" / "film.mp4")
    assert len(frames) == 13 and done["steps"] == 12 and [p.name for p in (tmp_path / "new").iterdir()] == ["film.mp4"]
    last = panel(made.now.pictures())
    assert frames[-1].shape == last.shape and np.abs(frames[-1].astype(int) - last).mean() < 12
    made.close()


@pytest.mark.parametrize("when", ["before the end", "between two pictures"])
def test_a_video_whose_writer_died_is_none(when: str, tmp_path: Path) -> None:
    """ffmpeg is killed as by a machine that runs out of memory: no file that no player opens."""
    made = Film(tmp_path / "film.mp4", 15)
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    for _ in range(60):
        made.add(noise)
    made._writer.gi_frame.f_locals["p"].kill()
    made._writer.gi_frame.f_locals["p"].wait()
    if when == "between two pictures":
        for _ in range(2):
            with pytest.raises(OSError):
                for _ in range(60):
                    made.add(noise)
    with pytest.raises(OSError, match="ffmpeg wrote 0 of"):
        made.close()
    assert not list(tmp_path.iterdir())


def test_what_a_person_played_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Episode, path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    made = tables.table("real")
    recorder = Recorder(made, tmp_path / "videos", tmp_path / "human")
    recorder.start()
    follow(made)
    recorder.add()
    with monkeypatch.context() as broken:
        broken.setattr(Episode, "save", full)
        with pytest.raises(OSError) as problem:
            recorder.stop()
    assert [path.suffix for path in (tmp_path / "videos").iterdir()] == [".mp4"], "the video is complete"
    assert "No space left" in recorder.fail(problem.value)
    assert not recorder.add() and not made.recording, "not tried at every step"
    recorder.start()
    (path,) = recorder.stop()
    assert len(Episode.load(path)) == len(WAYS)
    made.close()


@pytest.mark.parametrize("size", [(84, 64), (112, 80), (210, 160), (35, 27)], ids=str)
def test_pictures_keep_their_own_shape_on_film(size: tuple[int, int], tmp_path: Path) -> None:
    """Height x width, enlarged by a whole factor, here with only the lower right corner bright."""
    height, width = size
    picture = np.zeros((height, width, 3), np.uint8)
    picture[height // 2 :, width // 2 :] = 255
    factor = max(1, 256 // height)
    shown = panel({"real": picture, "dream": picture})
    high, wide = height * factor, 2 * width * factor + 8
    assert shown.shape == (high + high % 2, wide + wide % 2, 3)
    video = Film(tmp_path / "film.mp4", 15)
    video.add(shown)
    assert video.close() is not None
    (frame,) = frames_of(tmp_path / "film.mp4")
    assert frame.shape == shown.shape and np.abs(frame.astype(int) - shown).mean() < 8


def test_dream_strips_keep_the_pictures_shape() -> None:
    seen = Comparison(*(torch.rand(1, 10, 3, 84, 60) for _ in range(3)))
    assert strip(seen, 0, count=5).shape == (3 * (2 * 84 + 4), 5 * (2 * 60 + 4), 3)
    assert side_by_side(seen, 0).shape == (10, 3 * 84, 3 * 3 * 60 + 2 * 2, 3)


def test_another_mode_begins_another_video(tmp_path: Path) -> None:
    made = tables.table("dream")
    recorder = Recorder(made, tmp_path, None)
    recorder.start()
    for mode in ("dream", "both"):
        made.set_mode(mode)
        for _ in range(3):
            made.step()
            done = recorder.add()
        assert bool(done) is False
    assert len(recorder.stop()) == 1 and len(list(tmp_path.glob("*.mp4"))) == 2
    made.close()


def test_a_film_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    video = Film(tmp_path / "film.mp4", 15)
    assert video.close() is None
    video.add(np.zeros((64, 64, 3), np.uint8))
    video.discard()
    assert list(tmp_path.iterdir()) == []

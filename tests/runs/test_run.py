"""The run folder: what is written survives kills, full disks and damaged files."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import imageio_ffmpeg
import numpy as np
import pytest
import torch

from envs.errors import UserError
from runs import config_types
from runs.folder import video
from runs.folder.run import Run, find
from runs.recipes import preset


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    config = config_types.fill(preset("reverie", "toy"), {"env": "Catch-v0", "seed": 5, "game": {"sticky": None}})
    made = Run.create(config, tmp_path / "run", "python main.py env=Catch-v0", threads=2)
    yield made
    made.close()


def checkpoints(run: Run) -> list[Path]:
    return sorted((run.folder / "checkpoints").iterdir())


# ---- the folder ----
def test_a_run_opens_as_it_was_created(run: Run) -> None:
    again = Run.open(run.folder)
    assert again.config == run.config and type(again.config.model) is type(run.config.model)
    assert again.meta == run.meta
    assert run.meta["command"] == "python main.py env=Catch-v0" and run.meta["threads"] == 2
    assert run.meta["versions"]["torch"] == torch.__version__ and run.meta["machine"]["cores"] >= 1
    assert "commit" in run.meta


def test_a_folder_holds_one_run(run: Run) -> None:
    run.save_checkpoint({}, 1)
    run.release()
    with pytest.raises(UserError, match=f"resume run={run.folder}"):
        Run.create(run.config, run.folder)


def test_a_name_is_looked_up_under_runs_out(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Run.create(run.config, Path("runs/out/pong-1"))
    assert find("pong-1") == Path("runs/out/pong-1")
    with pytest.raises(UserError, match="no run pnog-1.*Did you mean pong-1?"):
        find("pnog-1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"recipe": "reverie", "si', "not JSON"),
        ('{"recipe": "reverie", "size": "toy", "stesp": 3}', 'does not fit this program: Unknown key "stesp"'),
        ('{"recipe": "future", "size": "toy"}', 'Unknown recipe "future"'),
        ("[]", "does not hold"),
    ],
)
def test_a_damaged_configuration_is_named(run: Run, text: str, said: str) -> None:
    (run.folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=said):
        Run.open(run.folder)


# ---- checkpoints ----
STATE: dict[str, Any] = {
    "weights": torch.arange(20_000.0),
    "rng": b"\x00\x01",
    "list": [1, None, "x"],
    "pair": (1, 2.5),
    "deep": {"a": True},
}


def test_a_checkpoint_comes_back_and_two_are_kept(run: Run) -> None:
    for step in (10, 9_000_000, 20):  # the newest is the largest step, not the largest name
        run.save_checkpoint(STATE | {"step": step}, step)
    assert [int(path.stem) for path in checkpoints(run)] == [20, 9_000_000]
    again = Run.open(run.folder)
    state = again.load_checkpoint()
    assert again.step == state["step"] == 9_000_000
    assert torch.equal(state["weights"], STATE["weights"])
    assert {key: state[key] for key in STATE if key != "weights"} == {k: v for k, v in STATE.items() if k != "weights"}


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut_short, flip_a_byte, empty])
def test_a_corrupt_checkpoint_gives_way_to_the_one_before_it(run: Run, damage: Callable[[Path], None]) -> None:
    run.save_checkpoint(STATE, 1)
    run.save_checkpoint(STATE, 2)
    damage(checkpoints(run)[1])
    said: list[str] = []
    again = Run.open(run.folder)
    again.load_checkpoint(say=said.append)
    assert again.step == 1
    assert len(said) == 1 and checkpoints(run)[1].name in said[0] and "corrupt" in said[0]
    again.rewind()
    again.save_checkpoint(STATE, 2)
    assert Run.open(run.folder).load_checkpoint(say=pytest.fail) is not None
    for path in checkpoints(run):
        damage(path)
    with pytest.raises(UserError, match="No checkpoint in .* can be read"):
        again.load_checkpoint()


class Foreign:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def test_a_checkpoint_never_runs_code(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = run.folder / "checkpoints"
    folder.mkdir()
    torch.save({"step": 1, "state": Foreign()}, folder / "000000000001.pt")
    with pytest.raises(UserError, match="is not loaded") as caught:
        run.load_checkpoint()
    assert "\n" not in str(caught.value)
    (folder / "000000000001.pt").write_bytes(pickle.dumps(Foreign()))
    with pytest.raises(UserError, match="can be read"):
        run.load_checkpoint()
    assert not Path("executed").exists()


def test_without_a_checkpoint_a_person_is_told(run: Run) -> None:
    with pytest.raises(UserError, match="no checkpoint yet"):
        run.load_checkpoint()


@pytest.mark.parametrize(("key", "value"), [("size", "xs"), ("recipe", "other"), ("model", {"deter": 7})])
def test_another_recipes_checkpoint_is_refused(run: Run, key: str, value: Any) -> None:
    path = run.save_checkpoint(STATE, 1)
    content = torch.load(path, weights_only=True)
    content["config"][key] = value if key != "model" else content["config"]["model"] | value
    torch.save(content, path)
    with pytest.raises(UserError, match=f"is of {key}.*config.json says"):
        Run.open(run.folder).load_checkpoint()


def test_what_a_resumed_run_may_change_is_no_licence_for_a_namesake(tmp_path: Path) -> None:
    made = Run.create(preset("iris", "toy"), tmp_path / "iris")
    path = made.save_checkpoint(STATE, 1)
    content = torch.load(path, weights_only=True)
    content["config"]["model"]["updates"] += 1  # how much it learns
    torch.save(content, path)
    Run.open(made.folder).load_checkpoint()
    # The transformer's window, by the name it had when the run's own `steps` could be taken for it.
    content["config"]["model"]["steps"] = content["config"]["model"].pop("context_frames") + 1
    torch.save(content, path)
    with pytest.raises(UserError, match=r"is of model\.context_frames 9, its config\.json says 8"):
        Run.open(made.folder).load_checkpoint()


def test_a_full_disk_leaves_the_checkpoints_as_they_were(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        run.save_checkpoint(STATE, step)
    before = {path: path.read_bytes() for path in checkpoints(run)}

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        run.save_checkpoint(STATE, 3)
    assert {path: path.read_bytes() for path in checkpoints(run)} == before


# ---- logs ----
def test_scalars_are_lines_that_are_there_at_once(run: Run) -> None:
    run.log(1, {"loss": 1.5})
    run.log(2, {"loss": float("nan"), "return": float(np.float32(2))})
    lines = [json.loads(text) for text in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.5), (2, None)]
    assert lines[1]["return"] == 2.0 and 0 <= lines[0]["hours"] <= lines[1]["hours"]
    assert run.metrics() == lines


def test_resuming_cuts_what_came_after_the_checkpoint_and_goes_on_with_the_hours(run: Run) -> None:
    for step in (1, 2, 3, 4):
        run.log(step, {"loss": step})
        if step == 2:
            run._opened -= 3600  # an hour of work
            run._processor_opened -= 1800  # on half a core
            run.save_checkpoint(STATE, step)
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    again = Run.open(run.folder)
    again.load_checkpoint()
    assert [line["step"] for line in again.metrics()] == [1, 2, 3, 4]  # looking at a run changes nothing
    again.rewind(threads=3)
    again.log(3, {"loss": 30})
    again.close()
    (resumed,) = Run.open(run.folder).meta["resumed"]
    assert resumed["step"] == 2 and resumed["threads"] == 3 and {"command", "commit", "started"} < resumed.keys()
    assert "resumed" in json.loads(again.result("anything", {}).read_text())["training"]
    assert [(line["step"], line["loss"]) for line in again.metrics()] == [(1, 1), (2, 2), (3, 30)]
    assert 1 <= again.metrics()[-1]["hours"] < 1.1
    told = json.loads(again.result("anything", {}).read_text())
    assert 0.5 <= again.metrics()[-1]["core_hours"] < 0.6 and 0.5 <= told["core_hours"] < 0.6


def test_older_runs_that_told_no_core_hours_tell_none(run: Run) -> None:
    path = run.save_checkpoint(STATE, 2)
    torch.save({key: value for key, value in torch.load(path).items() if key != "core_hours"}, path)
    again = Run.open(run.folder)
    again.load_checkpoint()
    again.log(3, {"loss": 1})
    assert "core_hours" not in again.metrics()[-1]
    assert "core_hours" not in json.loads(again.result("anything", {}).read_text())


def test_tensorboard_shows_scalars_pictures_and_moving_pictures(run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run.log(7, {"loss": 0.5})
    run.picture(7, "strip", np.zeros((8, 8, 3), np.uint8))
    run.video(7, "dream", np.zeros((4, 8, 8, 3), np.uint8))
    run.close()
    board = EventAccumulator(str(run.folder / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(7, 0.5)]
    assert board.Images("strip")[0].encoded_image_string.startswith(b"\x89PNG")
    assert board.Images("dream")[0].encoded_image_string.startswith(b"GIF8")


def test_a_picture_is_the_picture(run: Run) -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    path = run.picture(12, "strip", image)
    stored = cv2.imread(str(path))
    assert path.parent == run.folder / "pictures" and stored is not None
    assert np.array_equal(stored[..., ::-1], image)
    with pytest.raises(ValueError, match="uint8"):
        run.picture(12, "strip", image / 255)


@pytest.mark.parametrize("shape", [(6, 64, 64, 3), (5, 33, 47, 3), (3, 301, 201, 3)])
def test_a_video_is_h264_that_browsers_play(run: Run, shape: tuple[int, ...]) -> None:
    frames = np.zeros(shape, np.uint8)
    frames[..., 0] = 200
    frames[-1] = (0, 0, 220)
    path = run.video(3, "dream", frames, fps=10)
    reader = imageio_ffmpeg.read_frames(str(path))
    about: Any = next(reader)
    pictures = list(reader)
    assert about["codec"] == "h264" and about["pix_fmt"].startswith("yuv420p") and about["fps"] == 10
    width, height = about["size"]
    assert width % 2 == height % 2 == 0 and height >= 192
    assert len(pictures) == shape[0]
    first, last = (
        np.frombuffer(p, np.uint8).reshape(height, width, 3)[height // 2, width // 2]
        for p in (pictures[0], pictures[-1])
    )
    assert np.abs(first.astype(int) - (200, 0, 0)).max() < 20 and np.abs(last.astype(int) - (0, 0, 220)).max() < 20
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_video_on_a_full_disk_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **named: Any) -> Iterator[None]:
        yield None
        raise OSError(
            "[Errno 32] Broken pipe\nFFMPEG COMMAND: ...\nav_interleaved_write_frame(): No space left on device"
        )

    monkeypatch.setattr(imageio_ffmpeg, "write_frames", broken)
    with pytest.raises(OSError) as caught:
        video.write_mp4(tmp_path / "x.mp4", np.zeros((2, 8, 8, 3), np.uint8), 5)
    assert caught.value.errno == errno.ENOSPC


def test_a_result_says_where_it_comes_from(run: Run) -> None:
    run.save_checkpoint(STATE, 40)
    path = run.result("evaluation", {"mean": np.float64(1.5), "returns": np.array([1, 2]), "std": float("inf")})
    result = json.loads(path.read_text())
    assert (result["what"], result["env"], result["recipe"], result["size"], result["seed"], result["env_steps"]) == (
        "evaluation", "Catch-v0", "reverie", "toy", 5, 40,
    )  # fmt: skip
    assert result["mean"] == 1.5 and result["returns"] == [1, 2] and result["std"] is None
    assert {"versions", "machine", "commit", "command", "hours", "protocol"} <= result.keys()

"""A run is a folder: what was asked for, what came out, and everything needed to go on.

config.json      the full configuration            metrics.jsonl    one line of scalars a log step
meta.json        versions, commit, machine         tensorboard/     the same, with pictures and videos
checkpoints/     two, atomic                       pictures/, videos/, results/, episodes/
reconstructions/ the same frames over training: one small picture a moment
"""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np
import torch

from envs.errors import UserError, nearest
from envs.make import timing_of
from runs.config import OLD_NAMES, resumable
from runs.config_types import keys, renamed
from runs.folder import checkpoint, video
from runs.folder.files import Lock, file_name, plain, remove_leftovers, write_atomic, write_json, write_png
from runs.folder.system import clock, facts, memory_gb

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from runs.config import Config

OUT = Path("runs/out")
RESULTS = Path(__file__).resolve().parents[1] / "results"  # published ones
MODELS = RESULTS.with_name("pretrained")  # those that ship
EPISODES, HUMAN = "episodes", "human"
# Of meta.json, beside every result.
TRAINED = ("command", "commit", "started", "threads", "device", "machine", "resumed", "init_replay")
GIF_FRAMES = 300  # TensorBoard keeps whole animations in memory


class Run:
    """One run's folder; made by `Run.create` or `Run.open`.

    Attributes:
        folder: where everything lies.
        config: the typed configuration, as far as a command's words change it.
        written: the same as config.json holds it.
        meta: versions, commit, machine and command line of the start.
        step: agent steps of the checkpoint that was saved or loaded last; 0 before.
    """

    def __init__(self, folder: Path, config: Config, meta: dict[str, Any]) -> None:
        self.folder, self.config, self.meta, self.written = folder, config, meta, config
        self.step = 0
        self._hours_before = 0.0
        self._hours_saved = 0.0
        self._opened = time.monotonic()
        self._core_hours_before: float | None = 0.0
        self._core_hours_saved: float | None = 0.0
        self._processor_opened = time.process_time()
        self._lines: int | None = None  # logged before the loaded checkpoint; older ones do not tell
        self._metrics: IO[str] | None = None
        self._board: SummaryWriter | None = None
        self._lock: Lock | None = None

    @classmethod
    def create(cls, config: Config, folder: str | Path, command: str | None = None, **meta: Any) -> Self:
        """A new run in `folder`, with the command line to write down (this process's when None) and further facts.

        It is this process's until `release`, or until the run is forgotten. A run that was killed before its first
        checkpoint is begun again.

        Raises:
            UserError: the folder already holds a run, another process works in it, or it cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as problem:
            raise UserError(f"{folder} cannot be made a run folder: {problem.strerror}.") from problem
        try:
            lock = _claimed(folder)
        except UserError as problem:
            raise UserError(f"{str(problem).rstrip('.')}, or give this run a name of its own (name=).") from problem
        if (folder / "config.json").exists() and checkpoint.there(folder / "checkpoints"):
            lock.release()
            text = f"{folder} already holds a run: go on with it (python main.py resume {argument(folder)})"
            raise UserError(f"{text}, delete it, or choose another folder (name=).")
        known = facts() | {"started": clock()} | meta
        if command is not None:
            known["command"] = command
        write_json(folder / "meta.json", known)
        write_json(folder / "config.json", asdict(config))  # last: a folder with it is a complete run
        run = cls(folder, config, known)
        run._lock = lock
        return run

    @property
    def argument(self) -> str:
        """The run on a command line that can be copied: run=runs/out/NAME, quoted where a shell wants it."""
        return argument(self.folder)

    def claim(self) -> None:
        """Nobody else may train in this folder until `release`; raises UserError when another process does."""
        self._lock = self._lock or _claimed(self.folder)

    def release(self) -> None:
        """Lets others train here."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The run in a folder, or of that name under runs/out/.

        Raises:
            UserError: there is no such folder (with the nearest), it is not a run, or its configuration does not fit.
        """
        folder = find(path)
        config, meta = read_json(folder / "config.json"), read_json(folder / "meta.json")
        try:
            return cls(folder, cls.read(config), meta)
        except UserError as problem:
            raise UserError(f"{folder / 'config.json'} does not fit this program: {problem}") from problem

    @staticmethod
    def read(given: Mapping[str, Any]) -> Config:
        """The typed configuration from what config.json holds; raises UserError for one that does not fit."""
        from runs.recipes import from_recorded  # imports the recipes' models, which writing a run does not need

        return from_recorded(given)

    def check_there(self) -> None:
        """Raises UserError when the folder was moved or deleted: else a second one would begin in its place."""
        if not (self.folder / "config.json").exists():
            raise UserError(
                f"{self.folder} is no longer there: it was moved or deleted while the run was at work. Go on with it "
                "where it lies now, python main.py resume run=FOLDER, from its last checkpoint."
            )

    @property
    def episode_paths(self) -> list[Path]:
        """The recorded episodes, the oldest first."""
        return sorted(self.episodes_folder.glob("*.npz"))

    @property
    def episodes_folder(self) -> Path:
        return self.folder / EPISODES

    @property
    def reconstructions_folder(self) -> Path:
        return self.folder / "reconstructions"

    @property
    def human_folder(self) -> Path:
        """Where `play` puts what a person has played; taken into the replay when the run is resumed."""
        return self.folder / HUMAN

    @property
    def hours(self) -> float:
        """Hours of work in this run, those before the loaded checkpoint included."""
        return self._hours_before + (time.monotonic() - self._opened) / 3600

    @property
    def core_hours(self) -> float | None:
        """Processor hours of this process, which stand still while others work; None in runs older than that."""
        if self._core_hours_before is None:
            return None
        return self._core_hours_before + (time.process_time() - self._processor_opened) / 3600

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one line to metrics.jsonl, with the memory used so far, and the same scalars to TensorBoard."""
        self.check_there()
        if self._metrics is None:
            self._metrics = open(self.folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115  a line reaches the file at once
        values = {name: float(value) for name, value in scalars.items()} | {"memory_gb": round(memory_gb(), 3)}
        line = {"step": step, "hours": round(self.hours, 5)} | _rounded("core_hours", self.core_hours) | values
        self._metrics.write(json.dumps(plain(line), allow_nan=False) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def note(self, **facts: Any) -> None:
        """Adds facts to meta.json."""
        self.meta |= facts
        write_json(self.folder / "meta.json", self.meta)

    def metrics(self) -> list[dict[str, Any]]:
        """Every line logged so far, oldest first; a line torn by a kill is left out."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text(errors="replace") if path.is_file() else ""
        return [line for one in text.splitlines() if (line := _line(one))]

    def picture(self, step: int, name: str, image: np.ndarray) -> Path:
        """Writes an (H, W, 3) uint8 image as PNG, and to TensorBoard."""
        self.check_there()
        video.check_pictures(image, 3)
        path = self.folder / "pictures" / f"{name}-{step:09d}.png"
        write_png(path, image)
        self.board.add_image(name, image, step, dataformats="HWC")
        return path

    def reconstructions(self, step: int, updates: int, frames: np.ndarray) -> Path:
        """Writes what fixed frames look like after so many updates, (N, H, W, 3) uint8, one below the other."""
        self.check_there()
        video.check_pictures(frames, 4)
        path = self.reconstructions_folder / f"{step:09d}-{updates:09d}.png"
        write_png(path, frames.reshape(-1, *frames.shape[2:]))
        return path

    def video(self, step: int, name: str, frames: np.ndarray, fps: float = 15) -> Path:
        """Writes (T, H, W, 3) uint8 frames as an mp4 (H.264), and the first ones to TensorBoard as an animation."""
        self.check_there()
        path = self.folder / "videos" / f"{name}-{step:09d}.mp4"
        video.write_mp4(path, frames, fps)
        self._animate(step, name, video.gif(frames[:GIF_FRAMES], fps))
        return path

    def save_checkpoint(self, state: Mapping[str, Any], step: int) -> Path:
        """Writes everything needed to go on from `step`, atomically; the newest two are kept."""
        self.check_there()
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())
        hours, core_hours = self.hours, self.core_hours
        content = {"step": step, "hours": hours, "core_hours": core_hours, "config": plain(asdict(self.config))}
        content |= {"state": dict(state), "lines": len(self.metrics())}  # many may be of one step
        path = checkpoint.save(self.folder / "checkpoints", step, content)
        self.step, self._hours_saved, self._core_hours_saved = step, hours, core_hours
        return path

    def load_checkpoint(
        self, device: str | torch.device = "cpu", *, say: Callable[[str], object] = print
    ) -> dict[str, Any]:
        """The state of the newest readable checkpoint; `say` gets a sentence about each newer one that is corrupt.

        Raises:
            UserError: no readable checkpoint, one that was not written by this program, or one of another recipe.
        """
        content, said = checkpoint.load(self.folder / "checkpoints", device)
        kinds = {"step": int, "hours": float, "config": dict, "state": dict}
        if not all(isinstance(content.get(name), kind) for name, kind in kinds.items()):
            raise UserError(f"The checkpoint in {self.folder} was not written by this program.")
        self._check_same_model(content["config"])
        self.step, self._hours_before, self._opened = content["step"], content["hours"], time.monotonic()
        self._core_hours_before, self._processor_opened = content.get("core_hours"), time.process_time()
        self._hours_saved, self._core_hours_saved = self._hours_before, self._core_hours_before
        self._lines = content.get("lines")
        for sentence in said:
            say(sentence)
        return dict(content["state"])

    @contextmanager
    def understood(self) -> Iterator[None]:
        """For whoever makes something of a checkpoint's state: what it lacks or holds wrongly is a UserError."""
        try:
            yield
        except UserError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as problem:
            told = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:100]}"
            raise UserError(
                f"The checkpoint in {self.folder} can be read, but does not hold what this program saves ({told})."
            ) from problem

    def rewind(self, **how: Any) -> None:
        """Goes on from the loaded checkpoint, which is written down with the command, the code and further facts.

        What came after it is forgotten: metrics, TensorBoard points, reconstructions and unreadable checkpoints.
        """
        now = {key: value for key, value in facts().items() if key in TRAINED}
        how = {"step": self.step, "started": clock()} | now | how
        self.note(resumed=[*self.meta.get("resumed", []), how])
        self.close()
        lines = [json.dumps(line) + "\n" for line in self.metrics()[: self._lines] if line["step"] <= self.step]
        write_atomic(self.folder / "metrics.jsonl", "".join(lines).encode())
        checkpoint.drop_after(self.folder / "checkpoints", self.step)
        for path in self.reconstructions_folder.glob("*.png"):
            if int(path.stem.split("-")[0]) > self.step:
                path.unlink()
        self._board = self._open_board(purge_step=self.step + 1)

    def result(self, name: str, values: Mapping[str, Any]) -> Path:
        """Writes results/<name>.json atomically: `values` beside the run's keys, versions, commit and machine."""
        self.check_there()
        config = self.config
        about = {key: getattr(config, key) for key in ("recipe", "env", "protocol", "size", "seed")}
        now = facts()  # the code and machine that made this result, which need not be those that trained
        about["training"] = {key: self.meta[key] for key in TRAINED if key in self.meta}
        path = self.folder / "results" / f"{name}.json"
        write_json(path, {"what": name} | about | now | self._trained() | dict(values))
        return path

    def _trained(self) -> dict[str, Any]:
        """How far the checkpoint is that was loaded or saved, or the newest one, by the run's last line."""
        told: dict[str, Any] = {"step": self.step, "hours": self._hours_saved, "core_hours": self._core_hours_saved}
        if not self.step and (lines := self.metrics()):
            saved = checkpoint.newest_step(self.folder / "checkpoints")
            told = lines[-1] | ({} if saved is None else {"step": saved})
        hours = {"hours": round(told["hours"], 4), "env_steps": told["step"]}
        return hours | _rounded("core_hours", told.get("core_hours"))

    def keep_config(self, but: Sequence[str] = ()) -> None:
        """Writes down the configuration as it is now, but for some keys, which stay as they were written."""
        known, self.written = read_json(self.folder / "config.json"), self.config
        write_json(self.folder / "config.json", asdict(self.config) | {key: known[key] for key in but if key in known})

    def close(self) -> None:
        """Flushes and closes the logs; they open again when something is logged."""
        if self._metrics is not None:
            self._metrics.close()
        if self._board is not None:
            self._board.close()
        self._metrics = self._board = None

    @property
    def board(self) -> SummaryWriter:
        """TensorBoard's writer, opened when first used."""
        if self._board is None:
            self._board = self._open_board(purge_step=None)
        return self._board

    def _open_board(self, purge_step: int | None) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter  # a second of import time that most commands do not need

        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge_step, flush_secs=30)

    def _animate(self, step: int, name: str, gif: bytes) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # add_video needs moviepy and drops the video silently without it; an animated GIF is an image like any other.
        image = Summary.Image(encoded_image_string=gif, colorspace=3)
        self.board._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)  # type: ignore[no-untyped-call]

    def _check_same_model(self, saved: Mapping[str, Any]) -> None:
        """Floats may differ (a learning rate changed by hand); what decides about shapes may not."""
        own, saved = plain(asdict(self.config)), renamed(saved, OLD_NAMES, keys(self.config))
        may_change = resumable(self.config)
        kept = {key: (saved[key], own[key]) for key in ("recipe", "size")}
        for part in ("model", "policy"):
            common = saved.get(part, {}).keys() & own.get(part, {}).keys() if saved["recipe"] == own["recipe"] else ()
            kept |= {f"{part}.{key}": (saved[part][key], own[part][key]) for key in sorted(common)}
        for key, (was, now) in kept.items():
            if was != now and key not in may_change and not isinstance(was, float):
                raise UserError(f"The checkpoint in {self.folder} is of {key} {was}, its config.json says {now}.")


def _claimed(folder: Path) -> Lock:
    """Held by this process alone, and free of what others were killed over."""
    try:
        lock = Lock(folder / "lock")
        remove_leftovers(folder)
        return lock
    except BlockingIOError as problem:
        raise UserError(f"Another process is working on {folder}: wait until it has ended.") from problem


def keep(run: Run | None, name: str, values: Mapping[str, Any], env: str = "") -> Path:
    """Writes a result into the run's folder, or without a run as runs/out/[<env>-]<name>.json; returns its path."""
    if run is not None:
        return run.result(name, values)
    path = OUT / f"{file_name(env)}-{name}.json" if env else OUT / f"{name}.json"
    write_json(path, {"what": name} | facts() | dict(values))
    return path


def argument(folder: Path) -> str:
    """See `Run.argument`."""
    return shlex.quote(f"run={folder}")


def trained_on(result: Mapping[str, Any]) -> dict[str, Any]:
    """The machine that trained the run of a published result; older ones know only that of the evaluation."""
    return dict(result.get("training", {}).get("machine", result["machine"]))


def result_name(name: str, asked: object, *keys: str) -> str:
    """Of a result, with what was asked otherwise than usual: "fidelity", "fidelity-horizon1-temperature0.5"."""
    usual = type(asked)()
    others = ((key, getattr(asked, key)) for key in keys if getattr(asked, key) != getattr(usual, key))
    return "-".join([name, *(key + _as_word(value) for key, value in others)])


def _as_word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value) if isinstance(value, int) else f"-{value or 'null'}"


def find(path: str | Path) -> Path:
    """The folder of the run that a person named: a path, or a name under runs/out/.

    Raises:
        UserError: no such folder (with the nearest run), or no run in it.
    """
    if folder := _found(path):
        return folder
    if _exists(Path(path)):
        raise UserError(f"{path} is not a run folder: it has no config.json.")
    if shipped(path):
        raise UserError(f"{path} is a model that ships, not a run: play, export, fidelity and dreamloop.load take it.")
    hint = nearest(Path(path).name[:100], _names()) or newest()
    path = path if len(str(path)) <= 200 else f"{str(path)[:200]}..."
    raise UserError(f"There is no run {path}, neither as a path nor under {OUT}. {hint}".strip())


def shipped(name: str | Path) -> Path | None:
    """The packed model of this name that ships, as "kungfumaster"; None where there is none, or a run has the name."""
    if not re.fullmatch(r"\w+", str(name)) or _found(name):
        return None
    path = MODELS / f"{str(name).lower()}.safetensors"
    return path if path.is_file() else None


def _found(path: str | Path) -> Path | None:
    return next((folder for folder in (Path(path), OUT / path) if _exists(folder / "config.json")), None)


def recorded(path: str | Path, config: Config | None = None) -> list[Path]:
    """Where the episodes lie that a person named: a run, with what people played in it, or a folder of episodes.

    Raises:
        UserError: no such run or folder, no episode in it, or a run of another game than that of `config`, or of the
            same one played by other rules.
    """
    for folder in (Path(path), OUT / path):
        if any(folder.glob("*.npz")):
            return [folder]
    run = find(path)
    folders = [folder for folder in (run / EPISODES, run / HUMAN) if any(folder.glob("*.npz"))]
    if not folders:
        raise UserError(f"{run} holds no episodes: nothing has been played in it yet.")
    if config is not None:
        own, asked = _rules(Run.open(run).config), _rules(config)
        if other := [name for name in asked if own[name] != asked[name]][:1]:
            name = other[0]
            raise UserError(
                f"{run} is a run with {name}={own[name]}, not {asked[name]}. If their frames, actions and rewards mean "
                f"the same, name {' and '.join(map(str, folders))}."
            )
    return folders


def _rules(config: Config) -> dict[str, Any]:
    """What decides what an action does and what it is rewarded with."""
    game, own = config.game, timing_of(config.env, config.game)
    rules = {name: getattr(game, name) for name in ("life_loss", "clip_rewards", "kwargs")}
    return {"env": config.env} | {f"game.{name}": value for name, value in (own | rules).items()}


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long a name, a null byte
        return False


def newest() -> str:
    """A sentence that names the newest runs under runs/out/, or "" when there are none."""
    names = _names()[-3:]
    return f"The newest runs are {', '.join(names)}." if names else ""


def _names() -> list[str]:
    files = OUT.glob("*/config.json")
    return [file.parent.name for file in sorted(files, key=lambda file: file.stat().st_mtime)]


def read_json(path: Path) -> dict[str, Any]:
    """What a run's config.json or meta.json holds; raises UserError when it cannot be read."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as problem:
        raise UserError(f"{path} cannot be read: it is missing or not JSON.") from problem
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a run's description.")
    return value


def _rounded(name: str, value: float | None) -> dict[str, float]:
    return {} if value is None else {name: round(value, 5)}


def _line(text: str) -> dict[str, Any] | None:
    """A logged line, as far as it holds numbers, or None where one was not finite; None for what is none of ours."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not all(_is_number(line.get(key)) for key in ("step", "hours")):
        return None
    return {key: value for key, value in line.items() if value is None or _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

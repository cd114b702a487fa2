"""Whole episodes, remembered: on disk for good, in memory up to a bound, sampled as segments (`agent/batch.py`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from agent.batch import cut
from agent.replay_config import ReplayConfig as ReplayConfig
from envs.episode import CorruptEpisode, Episode, Recording
from envs.games import Transition
from envs.spec import Spec
from world_model.interface import Batch

Split = Literal["train", "validation"]
SUFFIX = ".npz"


class Replay:
    """The memory of an agent that plays in several rows at once.

    Episodes are numbered as they begin. A share of them (`validation`: at a tenth 9, 19, ...) is never sampled for
    training. Episodes in progress are sampled like finished ones. One that would take more than its share of
    half of the bound is cut: its older half is kept, saved and forgotten as an episode of its own, so that a game
    without an end fits too. All pieces of an episode are trained on, or none.
    """

    def __init__(self, folder: Path | None, spec: Spec, config: ReplayConfig, *, seed: int):
        """`folder` receives one file an episode; None keeps them in memory only and cannot be resumed."""
        self.folder, self.spec, self.config = folder, spec, config
        self.rng = np.random.default_rng(seed)
        self.steps = 0  # agent steps ever added
        self.episodes = 0  # episodes ever finished
        self.skipped: list[str] = []  # a sentence for each file that could not be used
        self.taken: list[str] = []  # names of the files that `take_in` has read
        self._next = 0  # the number of the next episode to begin
        self._open: dict[int, tuple[int, Recording]] = {}  # row -> number, recording
        self._past: dict[int, list[np.ndarray]] = {}  # row -> the actions of what was cut from its episode
        self._forget_all()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def memory_bytes(self) -> int:
        """Bytes that the episodes in memory take."""
        return self._kept_bytes + sum(recording.nbytes for _, recording in self._open.values())

    def short_of(self, count: int) -> int:
        """How many of `count` agent steps are missing from memory where they would fit into it."""
        if 2 * self.memory_bytes > self.config.memory_gb * 1e9:
            return 0
        return max(0, count - int(self._candidates()[1].sum()) + len(self._kept) + len(self._open))

    @property
    def whole_rewards(self) -> bool:
        """Whether every reward in memory is a whole number."""
        return all((episode.reward == episode.reward.round()).all() for episode in self.memory().values())

    def frames(self, split: Split) -> int:
        """The number of frames that `sample` can draw from now."""
        _, lengths, _, validation = self._candidates()
        return int(lengths[validation == (split == "validation")].sum())

    # Adding

    def begin(self, row: int, *, frame: np.ndarray, seed: int) -> None:
        """A new episode starts in `row` with `frame` (C, H, W) uint8, from a reset with `seed`."""
        if row in self._open:
            raise ValueError(f"row {row} is in the middle of an episode")
        self._open[row] = (self._next, Recording(self.spec, frame, seed=int(seed)))
        self._past[row] = []
        self._next += 1
        self._forget()

    def abandon(self) -> None:
        """The episodes in progress are forgotten."""
        self._open, self._past = {}, {}

    def begin_rows(self, rows: Sequence[int], frames: np.ndarray, seeds: Sequence[int]) -> None:
        """`begin` for several rows: frames (len(rows), C, H, W), one seed each."""
        for row, frame, seed in zip(rows, frames, seeds, strict=True):
            self.begin(int(row), frame=frame, seed=seed)

    def add(self, row: int, action: Any, step: Transition) -> Episode | None:
        """One step of one row (`step` holds that row's values); the episode, when this step has finished it.

        Of an episode that was cut only the last piece is returned, with the whole score.
        """
        if row not in self._open:
            raise ValueError(f"row {row} has no episode: begin one first")
        number, recording = self._open[row]
        if recording.full and 2 * recording.nbytes > self.config.memory_gb * 1e9 / 2 / len(self._open):
            number, recording = self._cut(row)
        bytes_before = recording.nbytes
        recording.append(action, step)
        self.steps += 1
        if recording.nbytes != bytes_before:
            self._forget()
        if not step.done:
            return None
        del self._open[row], self._past[row]
        episode = recording.finish()
        self._keep(number, episode)
        return episode

    def add_rows(self, actions: np.ndarray, step: Transition) -> list[Episode]:
        """One step of the rows 0..N-1: actions (N,) or (N, A); returns the episodes it has finished."""
        each = (Transition(*values) for values in zip(*step, strict=True))
        ended = [self.add(row, action, values) for row, (action, values) in enumerate(zip(actions, each, strict=True))]
        return [episode for episode in ended if episode is not None]

    def add_episode(self, episode: Episode, *, human: bool = False) -> None:
        """A whole episode from elsewhere; a person's (or an expert's) counts `human_weight` times.

        Raises ValueError when it does not fit the game.
        """
        if problem := episode.problem(self.spec):
            raise ValueError(f"the episode does not fit this game: {problem}")
        episode = replace(episode, weight=self.config.human_weight) if human else episode
        number, self._next = self._next, self._next + 1
        self.steps += len(episode)
        self._keep(number, episode)

    def take_over(self, *folders: Path) -> int:
        """Adds the episodes of other folders in their order, each with its own weight; returns how many.

        The same game is taken once, though it lie in several: a run has taken in what a person played, another run's
        games. A file that cannot be used is named in `self.skipped`.
        """
        paths = [path for folder in folders for path in sorted(folder.glob(f"*{SUFFIX}"))]
        return self._add_files(paths, human=False)

    def take_in(self, *folders: Path) -> int:
        """Adds what a person has played, each file once, also across resumes; returns how many were new.

        A file that cannot be used is named in `self.skipped`.
        """
        paths = [path for folder in folders for path in sorted(folder.glob(f"*{SUFFIX}"))]
        new = [path for path in paths if path.name not in self.taken]
        self.taken += [path.name for path in new]
        return self._add_files(new, human=True)

    def _add_files(self, paths: Sequence[Path], *, human: bool) -> int:
        before, known, numbers = self.episodes, set[bytes](), dict[tuple[Path, int], int]()
        for path in paths:
            try:
                episode = Episode.load(path)
                game = _fingerprint(episode)
                if game not in known:
                    # What pieces of one game have in common: the first one's number there, which is another here.
                    of = episode.piece_of if episode.piece_of >= 0 else _number(path, episode.seed)
                    first = numbers.setdefault((path.parent, of), self._next)
                    self.add_episode(
                        replace(episode, piece_of=first) if episode.piece_of >= 0 else episode, human=human
                    )
                known.add(game)
            except CorruptEpisode as error:
                self.skipped.append(str(error))
            except ValueError as error:
                self.skipped.append(f"{path} is not used: {error}.")
        return self.episodes - before

    def _cut(self, row: int) -> tuple[int, Recording]:
        """The older half of a long episode in progress becomes one of its own, and may be forgotten."""
        number, recording = self._open[row]
        older, newer = recording.cut(number)
        self._open[row], self._next = (self._next, newer), self._next + 1
        self._past[row].append(older.action)
        self._keep(number, older)
        return self._open[row]

    def _keep(self, number: int, episode: Episode) -> None:
        self._remember(number, episode)
        self.episodes += 1
        self._forget()
        if self.folder is not None:
            episode.save(_path(self.folder, number))

    # What is in memory: the finished episodes in the order in which they finished, and a table to choose from

    def _forget_all(self) -> None:
        self._numbers: list[int] = []
        self._kept: list[Episode] = []
        self._kept_bytes = 0
        self._lengths = np.empty(0, np.int64)
        self._weights = np.empty(0)
        self._validation = np.empty(0, np.bool_)

    def _remember(self, number: int, episode: Episode) -> None:
        self._numbers.append(number)
        self._kept.append(episode)
        self._kept_bytes += episode.nbytes
        self._lengths = np.append(self._lengths, len(episode.frame))
        self._weights = np.append(self._weights, episode.weight)
        self._validation = np.append(self._validation, self._is_validation(number, episode))

    def _forget(self) -> None:
        """The oldest episodes leave memory until the bound holds; the newest of either split always stays."""
        excess = self.memory_bytes - self.config.memory_gb * 1e9
        if excess <= 0:
            return
        stays = np.ones(len(self._kept), np.bool_)
        newest = {len(stays) - 1, *np.flatnonzero(~self._validation)[-1:].tolist()}
        for i in (i for i in range(len(stays)) if i not in newest):
            if excess <= 0:
                break
            excess -= self._kept[i].nbytes
            self._kept_bytes -= self._kept[i].nbytes
            stays[i] = False
        self._numbers, self._kept = list(compress(self._numbers, stays)), list(compress(self._kept, stays))
        self._lengths, self._weights = self._lengths[stays], self._weights[stays]
        self._validation = self._validation[stays]

    def _candidates(self) -> tuple[list[Episode | Recording], np.ndarray, np.ndarray, np.ndarray]:
        """All episodes in memory, oldest first, with their frames, weights and whether they are for validation."""
        going = sorted(self._open.values(), key=lambda entry: entry[0])
        return (
            [*self._kept, *(recording for _, recording in going)],
            np.append(self._lengths, [len(recording) + 1 for _, recording in going]).astype(np.int64),
            np.append(self._weights, np.ones(len(going))),
            np.append(self._validation, [self._is_validation(*entry) for entry in going]).astype(np.bool_),
        )

    def _is_validation(self, number: int, episode: Episode | Recording) -> bool:
        return held_out(number if episode.piece_of < 0 else episode.piece_of, self.config.validation)

    # Sampling

    def open(self) -> dict[int, Episode]:
        """The episodes in progress, by the row that plays them."""
        return {row: recording.view() for row, (_, recording) in self._open.items()}

    def memory(self) -> dict[int, Episode]:
        """Every episode in memory by its number: the finished ones as they finished, then those in progress."""
        going = sorted(number for number, _ in self._open.values())
        entries = self._candidates()[0]
        return {number: _episode(entry) for number, entry in zip([*self._numbers, *going], entries, strict=True)}

    def sample(
        self, batch_size: int, length: int, *, split: Split = "train", first: bool = False,
        encoded: Sequence[np.ndarray] = (),
    ) -> Batch:  # fmt: skip
        """Draw `batch_size` segments of `length` indices, with `self.rng`.

        An episode is drawn in proportion to its frames x weight. A segment may start before or end behind the
        episode and is then moved inside: the first and the last frame are drawn as often as one in the middle, and
        those less than `length` away from them up to twice as often. Only episodes shorter than `length` are padded.
        With `first` all segments begin where their games do, as long as the beginning of one is remembered.
        `encoded` has an array (frames, ...) for each episode of `memory`: the batch's `code`.
        Raises ValueError while there is no frame of that split.
        """
        entries, chosen, firsts = self._pick(batch_size, split, first)
        picked = [_episode(entries[i]) for i in chosen]
        codes = [encoded[i] for i in chosen] if encoded else []
        ends = np.array([len(episode.frame) for episode in picked])
        last = np.maximum(0, ends - length)
        starts = np.clip(self.rng.integers(firsts - length + 1, ends), np.minimum(firsts, last), last)
        starts = np.zeros_like(starts) if first else starts
        return cut(picked, starts.tolist(), length, spec=self.spec, codes=codes)

    def _pick(self, count: int, split: Split, first: bool) -> tuple[list[Episode | Recording], np.ndarray, np.ndarray]:
        """All episodes, the places (count,) of those drawn, and for each the first index a segment may begin at."""
        entries, lengths, weights, validation = self._candidates()
        allowed = weights * (validation == (split == "validation"))
        if first and (whole := allowed * [entry.piece_of < 0 for entry in entries]).any():
            allowed = whole
        if not len(lengths) or not allowed.any():
            raise ValueError(f"the replay holds no {split} episode yet")
        span = np.broadcast_to(lengths, (2, len(lengths))).copy()
        # Episodes in progress grow side by side: each has its share of what is recent, and finished ones the rest.
        going, recent_steps = len(self._open), self.config.recent_steps
        recent_going = np.minimum(lengths[len(lengths) - going :], -(-recent_steps // max(1, going)))
        finished = lengths[: len(lengths) - going]
        newer = finished[::-1].cumsum()[::-1] - finished + recent_going.sum()
        span[1] = np.append(np.clip(recent_steps - newer, 0, finished), recent_going)
        share = self.config.recency if split == "train" and (span[1] * allowed).any() else 0.0
        recent = (self.rng.random(count) < share).astype(np.int64)
        draws = self.rng.random(count)
        chosen = np.empty(count, np.int64)
        for kind in (0, 1):  # anywhere, recent
            chance = span[kind] * allowed
            possible = np.flatnonzero(chance)
            if len(possible):
                bounds = chance[possible].cumsum()
                spots = np.searchsorted(bounds, draws * bounds[-1], side="right").clip(max=len(possible) - 1)
                chosen = np.where(recent == kind, possible[spots], chosen)
        return entries, chosen, lengths[chosen] - span[recent, chosen]

    # Resuming

    def state_dict(self) -> dict[str, Any]:
        """What the files do not hold: counters, the RNG, and of the episodes in progress their actions.

        Also their last frame and the sum of their rewards, by which one sees whether they were played again alike.
        """
        return {
            "steps": self.steps,
            "episodes": self.episodes,
            "next": self._next,
            "rng": json.dumps(self.rng.bit_generator.state),
            "in_memory": list(self._numbers),
            "taken": list(self.taken),
            "open": [
                {"row": row, "number": number, "seed": recording.seed, "score": recording.score,
                 "past": sum(len(piece) for piece in self._past[row]), "piece_of": recording.piece_of,
                 "actions": torch.from_numpy(np.concatenate([*self._past[row], recording.view().action])),
                 "reward": float(recording.view().reward.sum()),
                 "frame": torch.from_numpy(recording.view().frame[-1].copy())}
                for row, (number, recording) in sorted(self._open.items())
            ],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any], replay_game: Callable[[int, np.ndarray], Episode]) -> None:
        """Go back to `state`: sampling then continues bit-identically.

        Finished episodes are read from the folder (one that cannot be used is named in `self.skipped`); files of
        episodes that had not finished yet are deleted; `replay_game(seed, actions)` rebuilds each of those in progress,
        from `past` actions on, if any were cut.
        Raises ValueError without a folder, or when a game does not replay.
        """
        if self.folder is None:
            raise ValueError("a replay without a folder cannot be resumed")
        self._next = state["next"]
        self.taken = list(state.get("taken", ()))  # runs from before people played have none
        self._remove_later({entry["number"] for entry in state["open"]})
        self.skipped = []
        self.abandon()
        self._forget_all()
        self.adopt(state, self.folder)
        for entry in state["open"]:
            actions, past = entry["actions"].cpu().numpy(), entry.get("past", 0)  # runs from before it had none cut
            episode = replay_game(entry["seed"], actions)
            problem = episode.problem(self.spec)
            if problem or not np.array_equal(episode.action, actions[past:]):
                raise ValueError(f"seed {entry['seed']} did not replay: {problem or 'the actions are others'}")
            self._open[entry["row"]] = (entry["number"], Recording.resumed(self.spec, episode))
            self._past[entry["row"]] = [actions[:past].copy()] if past else []
        self._forget()
        self.rng.bit_generator.state = json.loads(state["rng"])

    def adopt(self, state: dict[str, Any], folder: Path) -> None:
        """Takes the finished episodes of a replay's `state` from its folder, and counts from where that stood."""
        self.steps, self.episodes, self._next = state["steps"], state["episodes"], state["next"]
        for number in state["in_memory"]:
            path = _path(folder, number)
            try:
                episode = Episode.load(path)
                if problem := episode.problem(self.spec):
                    raise CorruptEpisode(f"{path} is of another game: {problem}.")
                self._remember(number, episode)
            except CorruptEpisode as error:
                self.skipped.append(str(error))

    def _remove_later(self, unfinished: set[int]) -> None:
        """Delete what a killed run has written after the state was taken, and its half-written files."""
        assert self.folder is not None
        for path in self.folder.iterdir():
            number = _number(path, -1) if path.suffix == SUFFIX else -1
            if number >= self._next or number in unfinished or path.name.endswith(f"{SUFFIX}.tmp"):
                path.unlink()


def _number(path: Path, other: int) -> int:
    """An episode's number by its file's name; `other` for files that have none, as those that a person recorded."""
    return int(path.stem) if path.stem.isdecimal() else other


def held_out(number: int, share: float) -> bool:
    """Whether the episode with this number is for validation, where a share of all are."""
    before, after = (int(round(count * share, 9)) for count in (number, number + 1))
    return after > before


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}{SUFFIX}"


def _fingerprint(episode: Episode) -> bytes:
    """Of what an episode is a function of: its seed, where in the game it begins, and its actions."""
    parts = (str(episode.seed).encode(), episode.frame[0].tobytes(), episode.action.tobytes())
    return hashlib.sha256(b"".join(parts)).digest()


def _episode(entry: Episode | Recording) -> Episode:
    return entry.view() if isinstance(entry, Recording) else entry

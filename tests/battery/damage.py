"""Files of a run, damaged: bytes flipped, cut, lost, doubled or made up, and JSON with other content.

Each is read as the program reads it. Right is a sentence (UserError, CorruptEpisode), the older checkpoint with a
sentence, or what was written. A description that is valid JSON of valid values is what a person may have typed: it is
counted, and taken.
"""

from __future__ import annotations

import json
import random
import shutil
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from envs.episode import CorruptEpisode, Episode
from envs.errors import UserError
from runs.cli import commands
from runs.dreams import load_parts
from runs.folder import pretrained
from runs.folder.run import Run
from runs.measure import suite
from tests import trained
from tests.battery.report import Report
from world_model import iris_checkpoint

Check = Callable[[], str]  # reads the file; "" when it is right, else what is wrong; may raise UserError
VALUES: tuple[Any, ...] = (None, True, -1, 0, 1e308, "", "x", [], {}, [[]], {"a": {}}, "9" * 400, 2**70)
DEEP = '{"a":' * 50_000 + "1" + "}" * 50_000


class Kind(NamedTuple):
    """A file and its reader."""

    path: Path
    check: Check
    json: bool = False


def measure(count: int, seed: int, folder: Path, report: Report, only: str = "") -> dict[str, Any]:
    """`count` damages of each kind of file of a new run in `folder`."""
    rng, told = random.Random(seed), dict[str, Any]()
    for name, kind in _kinds(folder).items():
        if only and name != only:
            continue
        whole, results = kind.path.read_bytes(), Counter[str]()
        for _ in report.track(range(count), name):
            damaged = _other_json(rng, whole) if kind.json and rng.random() < 0.5 else _damaged(rng, whole)
            kind.path.write_bytes(damaged)
            results[_outcome(name, kind, damaged, whole, report)] += 1
        kind.path.write_bytes(whole)
        told[name] = {"damages": count, **dict(results)}
    return told


def _outcome(name: str, kind: Kind, damaged: bytes, whole: bytes, report: Report) -> str:
    try:
        wrong = kind.check()
    except (UserError, CorruptEpisode) as problem:
        if len(str(problem).splitlines()) == 1:
            return "refused in a sentence"
        report.fault("more than a sentence", name, str(problem))
        return "more than a sentence"
    except Exception:
        report.fault("traceback", f"{name}: {damaged[:200]!r}", traceback.format_exc())
        return "traceback"
    if wrong and damaged != whole:
        report.fault("silently wrong", f"{name}: {damaged[:200]!r}", wrong)
        return "silently wrong"
    return "as it was, or as somebody may have typed it"


# ---- the files ----
def _kinds(folder: Path) -> dict[str, Kind]:
    made = trained.make(folder / "run", "reverie")
    run = Run.open(made)
    (newest,) = (made / "checkpoints").glob("*.pt")
    older = torch.load(newest, weights_only=True)
    older["step"] = 1
    torch.save(older, newest.with_name(f"{1:012d}.pt"))
    weights = {name: value.clone() for name, value in older["state"]["agent"].items() if torch.is_tensor(value)}
    run.log(5, {"episode/return": 2.0})
    run.close()
    episode = made / "episodes/000000.npz"
    replayed = Episode.load(episode)
    packed = pretrained.pack(run, folder / "packed")
    suites = sorted(suite.SUITES.glob("*.npz"))
    frozen = folder / "suite.npz"
    shutil.copy(suites[0], frozen)
    known = suite.read(frozen)
    return {
        "checkpoint": Kind(newest, lambda: _checkpoint(made, weights)),
        "config.json": Kind(made / "config.json", lambda: _opened(made), json=True),
        "meta.json": Kind(made / "meta.json", lambda: _opened(made), json=True),
        "metrics.jsonl": Kind(made / "metrics.jsonl", lambda: _metrics(made)),
        "episode": Kind(episode, lambda: _same_episode(episode, replayed)),
        "packed model": Kind(packed, lambda: _packed(packed, weights)),
        "packed model's json": Kind(packed.with_suffix(".json"), lambda: _packed(packed, weights), json=True),
        "suite": Kind(frozen, lambda: _suite(frozen, known)),
        "published iris": _published(folder / "Pong.pt"),
    }


def _checkpoint(made: Path, weights: dict[str, torch.Tensor]) -> str:
    run, said = Run.open(made), list[str]()
    state = run.load_checkpoint(say=said.append)
    same = all(torch.equal(state["agent"][name], value) for name, value in weights.items())
    if not same:
        return "other weights"
    return "" if run.step != 1 or said else "the older one, without a word"


def _opened(made: Path) -> str:
    commands.opened("resume", [f"run={made}"])
    load_parts(made, "cpu")
    return ""


def _metrics(made: Path) -> str:
    for line in Run.open(made).metrics():
        if not all(isinstance(value, int | float | None) for value in line.values()):
            return f"{line} was read"
    return ""


def _same_episode(path: Path, known: Episode) -> str:
    found = Episode.load(path)
    alike = all(np.array_equal(getattr(found, name), getattr(known, name)) for name in ("frame", "action", "reward"))
    return "" if alike else "another episode"


def _packed(path: Path, weights: dict[str, torch.Tensor]) -> str:
    parts = load_parts(path, "cpu")
    found = parts.agent.state_dict()
    alike = all(torch.allclose(found[name].float(), value.float(), rtol=0.01) for name, value in weights.items())
    return "" if alike else "other weights"


def _suite(path: Path, known: suite.Suite) -> str:
    found = suite.read(path)
    alike = np.array_equal(found.seed, known.seed) and np.array_equal(found.score, known.score)
    alike = alike and all(np.array_equal(a, b) for a, b in zip(found.action, known.action, strict=True))
    return "" if alike else "other episodes"


def _published(path: Path) -> Kind:
    from tests.runs.test_import import published

    torch.save(published(), path)
    known = iris_checkpoint.read(path).tokenizer.state_dict()

    def check() -> str:
        found = iris_checkpoint.read(path).tokenizer.state_dict()
        return "" if all(torch.equal(found[name], value) for name, value in known.items()) else "other weights"

    return Kind(path, check)


# ---- damages ----
def _damaged(rng: random.Random, whole: bytes) -> bytes:
    data, size = bytearray(whole), max(1, len(whole))
    at, far = rng.randrange(size), rng.randrange(1, 1 + min(size, 5_000))
    match rng.randrange(8):
        case 0:
            return bytes(data[:at])
        case 1:
            for _ in range(rng.randrange(1, 20)):
                data[rng.randrange(size)] ^= 1 << rng.randrange(8)
        case 2:
            data[at : at + far] = bytes(len(data[at : at + far]))
        case 3:
            data[at:at] = rng.randbytes(far)
        case 4:
            del data[at : at + far]
        case 5:
            data[at:at] = data[at : at + far]
        case 6:
            data[at : at + far] = rng.randbytes(len(data[at : at + far]))
        case _:
            return rng.choice(
                [b"", b"\x00" * size, rng.randbytes(100), b"[1]", b"\xff\xfe", whole + whole, whole[::-1]]
            )
    return bytes(data)


def _other_json(rng: random.Random, whole: bytes) -> bytes:
    """Valid JSON with a part that is missing, strange, or of another type."""
    told = json.loads(whole)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in entries:
            places.append((value, key))
            walk(inner)

    walk(told)
    if not places or rng.random() < 0.05:
        return DEEP.encode()
    holder, key = rng.choice(places)
    if isinstance(holder, dict) and rng.random() < 0.3:
        del holder[key]
    else:
        holder[key] = rng.choice(VALUES)
    return json.dumps(told).encode()

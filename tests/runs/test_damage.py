"""Files of a run that hold what this program never wrote: one sentence, the older checkpoint, or both.

Torn and altered bytes are in `test_run.py`; these are whole files with wrong content.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from envs.errors import UserError
from runs.dreams import load_parts
from runs.folder.run import Run
from tests import trained

DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained.make(tmp_path_factory.mktemp("whole") / "run", "reverie")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object], which: slice = slice(None)) -> None:
    """Changes the content of checkpoints, all of them or some of the newest first, as valid files."""
    for path in sorted((folder / "checkpoints").glob("*.pt"), reverse=True)[which]:
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)


def nan(content: dict[str, Any]) -> None:
    next(value for value in content["state"]["agent"].values() if torch.is_tensor(value) and value.is_floating_point())[
        ...
    ] = float("nan")


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no agent": lambda c: c["state"].pop("agent"), "a list": lambda c: c.update(state=[1]),
    "a step of words": lambda c: c.update(step="x"), "starts": lambda c: c["state"].update(starts=3),
    "agent": lambda c: c["state"].update(agent=7),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_checkpoint_with_wrong_content_is_a_sentence(folder: Path, change: Any) -> None:
    rewrite(folder, change)
    with pytest.raises(
        UserError, match="not what this program saves|does not hold what|was not written by|other model"
    ):
        load_parts(folder, "cpu")


def test_weights_that_are_no_numbers_are_not_played(folder: Path) -> None:
    rewrite(folder, nan)
    with pytest.raises(UserError, match="No checkpoint in .* can be read"):
        load_parts(folder, "cpu")


def test_the_one_before_is_taken_and_that_is_said(folder: Path) -> None:
    (path,) = (folder / "checkpoints").glob("*.pt")
    shutil.copy(path, path.with_name("000000000001.pt"))
    content = torch.load(path, weights_only=True)
    content["step"] = 1
    torch.save(content, path.with_name("000000000001.pt"))
    rewrite(folder, nan, slice(1))
    said: list[str] = []
    run = Run.open(folder)
    run.load_checkpoint(say=said.append)
    assert run.step == 1 and len(said) == 1 and "some of its weights are no numbers" in said[0]


@pytest.mark.parametrize("change", [
    lambda c: c["state"].pop("trainer"), lambda c: c["state"].update(replay=5),
    lambda c: c["state"].update(rng=c["state"]["rng"][:10]), lambda c: c["state"].update(collector=None),
    lambda c: c["state"].update(rounds="many"),
])  # fmt: skip
def test_resuming_it_is_a_sentence(folder: Path, change: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(folder, change)
    assert main.main(["resume", f"run={folder}"]) == 2
    said = capsys.readouterr().err
    assert "does not hold what this program saves" in said and said.count("\n") == 1


@pytest.mark.parametrize("name", ["config.json", "meta.json"])
@pytest.mark.parametrize("content", [DEEP, b"[1]", b"", b'{"a": "\xff"}'], ids=["deep", "list", "empty", "latin"])
def test_a_description_that_is_none(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        Run.open(folder)


@pytest.mark.parametrize("content", [
    b"\xff\xfe\n", DEEP + b"\n", b'{"step": "x", "hours": "y"}\n', b'{"step": null, "hours": 1}\n', b"[1]\n", b"{\n",
], ids=["latin", "deep", "words", "null", "list", "torn"])  # fmt: skip
def test_a_line_that_nobody_logged_is_left_out(folder: Path, content: bytes) -> None:
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 5, "hours": 0.5, "episode/return": 2.0}\n' + content)
    lines = Run.open(folder).metrics()
    assert lines[-1] == {"step": 5, "hours": 0.5, "episode/return": 2.0}
    assert main.main(["curve", f"run={folder}"]) == 0

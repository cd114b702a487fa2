"""The command that says what the number formats change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from envs.errors import UserError
from runs.measure.precision import PrecisionConfig, command
from tests import trained


def test_float32_changes_nothing_and_the_others_little(tmp_path: Path) -> None:
    folder = trained.make(tmp_path / "run", "iris_ac")
    command(PrecisionConfig(run=str(folder)))
    exact, half, eighth = json.loads((folder / "results" / "precision.json").read_text())["rows"]
    assert exact["total_variation"] < 1e-5 and exact["same_most_likely"] == 1
    for row in (half, eighth):
        assert 1e-5 < row["total_variation"] < 0.02 and 0 <= row["kl_nats"] < 1e-3 and row["kl_nats_max"] < 0.1
    assert len({half["kl_nats"], eighth["kl_nats"]}) == 2


def test_refused(tmp_path: Path) -> None:
    folder = trained.make(tmp_path / "run", "reverie")
    with pytest.raises(UserError, match="recipe is reverie"):
        command(PrecisionConfig(run=str(folder)))

"""What a model foresees, judged on models whose fidelity is known."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from envs.errors import UserError
from main import main
from runs.measure.fidelity import codes, judge
from world_model.interface import Batch, State, Step, WorldModel

CODES = 50


class Counter:
    """Frames whose grey tells a number; each action is added to it. A model that knows this, or expects no change."""

    latent_shape = (2,)

    def __init__(self, *, knows: bool) -> None:
        self.knows, self.weight = knows, torch.zeros(1)

    def parameters(self) -> Any:
        return iter([self.weight])

    def encode(self, frame: Tensor) -> Tensor:
        number = (frame[:, 0, 0, 0] * 255).round().long()
        return torch.stack([number, torch.zeros_like(number)], -1)  # the second code never changes

    def start(self, frame: Tensor, action: Tensor) -> State:
        return State(self.encode(frame[:, -1]), ())

    def step(self, state: State, action: Tensor, frame: Tensor | None = None, temperature: float = 1.0) -> Step:
        latent = state.latent.clone() if frame is None else self.encode(frame)
        latent[:, 0] += action * self.knows * (frame is None)
        return Step(State(latent, ()), torch.zeros(len(action)), torch.ones(len(action)))


def segments(count: int = 100, length: int = 14) -> Batch:
    action = torch.randint(2, (count, length), generator=torch.Generator().manual_seed(0))
    number = torch.cat([torch.zeros(count, 1, dtype=torch.long), action[:, :-1].cumsum(1)], 1)
    frame = number.byte().view(count, length, 1, 1, 1).expand(-1, -1, 1, 4, 4)
    has_action = torch.ones(count, length, dtype=torch.bool)
    has_action[0, 5] = False  # a game that ends under way is not judged
    nothing = torch.zeros(count, length)
    return Batch(frame, action, nothing, nothing.bool(), has_action, has_action)


@pytest.mark.parametrize("knows", [True, False])
def test_who_knows_the_game_foresees_it_and_who_expects_no_change_is_as_good_as_that(knows: bool) -> None:
    batch = segments()
    rows = judge(cast(WorldModel, Counter(knows=knows)), batch, 3, 0.0, ball=False)
    assert [row["steps_ahead"] for row in rows] == [1, 5, 10]
    for row in rows:
        moved = (batch.action[1:, 2 : 2 + row["steps_ahead"]].sum(1) > 0).float().mean().item()
        assert row["contexts"] == 99
        assert row["changed"] == pytest.approx(moved / 2, abs=1e-4)
        assert row["accuracy_still"] == pytest.approx(1 - moved / 2, abs=1e-4)
        assert row["accuracy"] == pytest.approx(1.0 if knows else 1 - moved / 2, abs=1e-4)
        assert row["accuracy_changed"] == float(knows)


def test_tokens_are_compared_as_they_are_and_one_hot_variables_by_their_class() -> None:
    tokens = torch.tensor([[3, 1], [0, 2]])
    model = cast(WorldModel, Counter(knows=True))
    assert torch.equal(codes(model, tokens), tokens)
    with pytest.raises(UserError, match="real numbers"):
        codes(model, torch.zeros(2, 2))
    model.latent_shape = (2, CODES)
    assert torch.equal(codes(model, torch.nn.functional.one_hot(tokens, CODES).float()), tokens)


@pytest.mark.parametrize(
    "words", [[], ["run=x", "steps=3"], ["run=x", "temperature=warm"], ["run=x", "temperature=-1"]]
)
def test_wrong_words_are_one_sentence(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fidelity", *words]) == 2
    said = capsys.readouterr().err
    assert any(word in said for word in ("run", "temperature", "steps"))

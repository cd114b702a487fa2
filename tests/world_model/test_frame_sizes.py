"""Frames of any height and width: every part pads and cuts, and every recipe learns from them and shows them.

Shapes: B batch, T time, C H W picture.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from envs.spec import Spec
from runs.recipes import RECIPES
from tests.toys import segments
from world_model.interface import to_unit
from world_model.parts.nets import FrameDecoder, FrameEncoder
from world_model.parts.points import PointDecoder, PointEncoder
from world_model.parts.vae import ConvVAE, Discriminator
from world_model.parts.vq_tokenizer import VQTokenizerConfig

FRAMES = [(3, 84, 64), (3, 112, 80), (1, 210, 160)]
TOKENIZER = VQTokenizerConfig(codes=8, width=4, channels=4, halvings=2, blocks=1, attention=(2,), patch=4)
Frame = tuple[int, int, int]
ENCODERS: dict[str, Callable[[Frame], nn.Module]] = {
    "frame": lambda frame: FrameEncoder(frame, 8, 5),
    "points": lambda frame: PointEncoder(frame, 8, 2, 16, 5),
    "vae": lambda frame: _Calls(ConvVAE(frame, 5, 4), "encode"),
    "discriminator": lambda frame: Discriminator(frame, 4),
    "tokenizer": lambda frame: _Calls(TOKENIZER.build(frame), "latent"),
}
DECODERS: dict[str, tuple[Callable[[Frame], nn.Module], int]] = {
    "frame": (lambda frame: FrameDecoder(frame, 8, 5), 5),
    "points": (lambda frame: PointDecoder(frame, 8, 2, 16, 5), 69),
    "vae": (lambda frame: _Calls(ConvVAE(frame, 5, 4), "decode"), 5),
}


class _Calls(nn.Module):
    """A module whose forward is another method of it."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = getattr(self.module, self.method)(x)
        return out


def twins(build: Callable[[Frame], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """The same weights for frames of 84x60 and for frames as large as these are padded to, 96x64."""
    small, large = build((3, 84, 60)), build((3, 96, 64))
    large.load_state_dict(small.state_dict())
    return small, large


@pytest.mark.parametrize("name", ENCODERS)
def test_a_small_frame_is_the_corner_of_a_padded_one(name: str) -> None:
    small, large = twins(ENCODERS[name])
    frame = torch.rand(2, 3, 84, 60)
    nothing = 0.5 if name == "tokenizer" else 0.0  # its networks see 2 x - 1
    padded = F.pad(frame, (0, 4, 0, 12), value=nothing)
    for mine, theirs in zip(_all(small(frame)), _all(large(padded)), strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_drawn_is_cut(name: str) -> None:
    build, inputs = DECODERS[name]
    small, large = twins(build)
    x = torch.rand(2, inputs)
    assert small(x).shape == (2, 3, 84, 60)
    assert_close(small(x), large(x)[..., :84, :60])


def test_the_tokenizer_cuts_too() -> None:
    small, large = (TOKENIZER.build(frame) for frame in ((3, 84, 60), (3, 96, 64)))
    large.load_state_dict(small.state_dict())
    tokens = torch.randint(8, (2, small.tokens))
    assert small.grid == (6, 4) and small.tokens == 24
    assert_close(small.decode(tokens), large.decode(tokens)[..., :84, :60])


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: f"{frame[1]}x{frame[2]}")
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_learns_from_any_frame(recipe: str, frame: Frame) -> None:
    """One update of each objective on random segments; then a state shows a picture of the right size."""
    torch.manual_seed(0)
    model = RECIPES[recipe]("toy").model.build(Spec(frame, 4, True))
    batch = segments(model.spec, 2, 4)
    unit = to_unit(batch.frame)
    model.prepare(unit.flatten(0, 1))
    for stage in model.stages():
        if stage.encode is not None:
            codes = [stage.encode(*episode) for episode in zip(unit, batch.action[:, :-1], strict=True)]
            batch = batch._replace(code=torch.stack(codes))
        for objective in stage.objectives:
            optimizer = torch.optim.SGD(objective.params, lr=1e-9)
            losses = objective.loss(batch)
            torch.stack([term.value.float().mean() for term in losses.terms.values()]).sum().backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in objective.params)
            assert any(p.grad is not None and p.grad.any() for p in objective.params)
            optimizer.step()
    with torch.no_grad():
        shown = model.decode(model.start(unit[:1], batch.action[:1]))
    assert shown.shape == (1, *frame)


def _all(made: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (made,) if isinstance(made, Tensor) else made

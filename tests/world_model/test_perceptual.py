"""The perceptual networks: read from others' packages, never imported, and no part of a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from agent.trainer import reduce
from envs.errors import UserError
from envs.spec import Spec
from runs.recipes.iris import MODELS
from tests.toys import lost, segments
from world_model.interface import to_unit
from world_model.parts import perceptual
from world_model.parts.perceptual import Blur, Kind
from world_model.parts.vq_tokenizer import VQTokenizer
from world_model.token_world import TokenWorld

SPEC = Spec((3, 64, 64), 4, True)
WEIGHTS = "stlpips_pytorch/weights/vST0.0/alex_shift_tolerant.pth"


def model(kind: Kind) -> TokenWorld:
    torch.manual_seed(0)
    return replace(MODELS["toy"], perceptual=kind).build(SPEC)


def test_a_missing_perceptual_network_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    kinds: tuple[Kind, ...] = ("st_lpips", "lpips")
    for kind in kinds:
        made = model(kind)  # to play it, nobody needs the network
        with pytest.raises(UserError, match=rf"perceptual={kind} .*\.\[{kind}\]"):
            made.stages()
    (tmp_path / "lpips/weights/v0.1").mkdir(parents=True)
    (tmp_path / "lpips/weights/v0.1/vgg.pth").write_bytes(b"")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="VGG16, which is not at .*vgg16-397923af.pth"):
        model("lpips").stages()


def test_a_perceptual_network_is_read_and_its_loss_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS
    path.parent.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.save(alex(), path)
    made = model("st_lpips")
    (objective,) = made.stages()[0].objectives
    assert objective.scales == {"pixels": 1, "st_lpips": 1, "codebook": 1, "commitment": 1}
    batch = segments(SPEC, 3, 1)
    losses = lost(objective.loss(batch), batch)
    assert losses.terms["st_lpips"].shape == (3, 1) and (losses.terms["st_lpips"][batch.valid] > 0).all()
    assert isinstance(made.tokenizer, VQTokenizer)
    shown = made.tokenizer.reconstruct(to_unit(batch.frame))[0]
    l1 = 2 * (shown - to_unit(batch.frame)).abs().mean((2, 3, 4))
    assert_close(losses.terms["pixels"], l1 * batch.valid)
    reduce(losses.terms, objective.scales).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.params)
    assert not any("lpips" in name or "heads" in name for name in made.state_dict()), "a checkpoint does not carry it"
    network = perceptual.load("st_lpips", torch.device("cpu"))
    assert network is not None
    gray = torch.rand(3, 1, 64, 64)
    assert network(gray, gray).tolist() == [0, 0, 0]
    torch.save({key: value for key, value in alex().items() if "lin3" not in key}, path)
    with pytest.raises(UserError, match="does not hold the weights"):
        made.stages()


def alex() -> dict[str, Tensor]:
    """Random weights by the published names."""
    torch.manual_seed(0)
    convs = {
        "1.0": (64, 3, 11, 11),
        "2.5": (192, 64, 5, 5),
        "3.9": (384, 192, 3, 3),
        "4.11": (256, 384, 3, 3),
        "5.13": (256, 256, 3, 3),
    }
    state = {f"net.slice{at}.weight": 0.05 * torch.randn(shape) for at, shape in convs.items()}
    state |= {f"net.slice{at}.bias": torch.zeros(shape[0]) for at, shape in convs.items()}
    blurs = {"1.1": 64, "2.4": 64, "3.8": 192}
    kernel = torch.tensor([1.0, 2, 1])
    state |= {
        f"net.slice{at}.filt": (kernel.outer(kernel) / 16).expand(size, 1, 3, 3).clone() for at, size in blurs.items()
    }
    return state | {
        f"lin{i}.model.1.weight": torch.rand(1, size, 1, 1) for i, size in enumerate((64, 192, 384, 256, 256))
    }


def test_a_blur_keeps_what_is_even_and_halves_the_size() -> None:
    blur = Blur(2)
    blur.filt.copy_(alex()["net.slice1.1.filt"][:2])
    assert_close(blur(torch.full((1, 2, 9, 9), 3.0)), torch.full((1, 2, 6, 6), 3.0))


@pytest.mark.skipif(perceptual._inside("stlpips_pytorch", perceptual.ST_LPIPS) is None, reason="needs its weights")
def test_a_small_ball_is_seen_as_the_published_network_sees_it() -> None:
    network = perceptual.load("st_lpips", torch.device("cpu"))
    assert network is not None
    empty = torch.full((1, 3, 64, 64), 0.3)
    ball = empty.clone()
    ball[..., 30:32, 30:32] = 1
    assert network(ball, empty).item() == pytest.approx(0.6316, abs=1e-3)

"""How `iris` learns: what its losses are, who learns from what, and that it learns a small world.

Shapes: B batch, T time, N tokens a frame.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from agent.trainer import Trainer, reduce
from tests.iris_toys import SPEC, TOY, model, objectives, tokens_of, whole
from tests.toys import lost
from world_model.interface import Batch, to_unit
from world_model.parts.vq_tokenizer import VQTokenizer


def test_the_loss_is_the_plain_mean_over_all_that_is_predicted() -> None:
    """As the paper sums it: tokens but the first, rewards by their sign, endings."""
    made = model()
    batch = whole(3, TOY.context_frames)
    tokens = tokens_of(made, batch)
    objective = objectives(made)[1]
    batch = batch._replace(code=tokens)
    total = reduce(lost(objective.loss(batch), batch).terms, objective.scales)
    said = made.transformer(tokens, batch.action)
    has_action = batch.has_action
    assert has_action.all()
    wanted = (
        F.cross_entropy(said.token.flatten(1, 2)[:, :-1].flatten(0, 1), tokens.flatten(1)[:, 1:].flatten())
        + F.cross_entropy(said.reward.flatten(0, 1), (batch.reward.sign() + 1).long().flatten())
        + F.cross_entropy(said.end.flatten(0, 1), batch.terminated.long().flatten())
    )
    assert_close(total, wanted)


def test_weight_decay_is_for_linear_weights_alone() -> None:
    made = model()
    objective = objectives(made)[1]
    trainer = Trainer([objective], device=torch.device("cpu"), precision="fp32")
    decay = {
        id(p): group["weight_decay"]
        for group in trainer.optimizers["world_model"].param_groups
        for p in group["params"]
    }
    names = {name: decay[id(p)] for name, p in made.transformer.named_parameters()}
    assert len(names) == len(decay)
    decayed = {name for name in names if names[name] == 0.01}
    assert {name for name in names if names[name]} == decayed
    assert {"blocks.0.qkv.weight", "blocks.1.mlp.2.weight", "next_token.0.weight", "end.2.weight"} <= decayed
    assert not {
        name for name in decayed if name.endswith("bias") or "norm" in name or name in ("position", "embedding.weight")
    }
    assert len(decayed) == len([m for m in made.transformer.modules() if isinstance(m, nn.Linear)])


def test_what_moves_counts_more_than_what_stands() -> None:
    made = model()
    batch = whole(2, 1)
    frame = torch.full_like(batch.frame, 100)
    frame[0, 0, :, 30:32, 30:32] = 250
    batch = batch._replace(frame=frame)
    made.prepare(torch.full((4, 3, 64, 64), 100 / 255))
    term = lost(objectives(made)[0].loss(batch), batch).terms["weighted_pixels"]
    assert isinstance(made.tokenizer, VQTokenizer)
    shown = made.tokenizer.reconstruct(to_unit(batch.frame))[0]
    weight = torch.ones(3, 64, 64)
    weight[:, 30:32, 30:32] += TOY.foreground * 150 / 255
    wanted = (0.5 * ((shown[0, 0] - to_unit(frame)[0, 0]) / 0.15) ** 2 * weight).mean()
    assert_close(term[0, 0], wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "quantizer", [{"quantizer": "gradient"}, {"quantizer": "ema"}, {"quantizer": "fsq", "levels": (8, 4)}]
)
def test_every_tokenizer_learns_pictures(quantizer: dict[str, Any]) -> None:
    torch.manual_seed(0)
    made = replace(TOY, tokenizer_lr=1e-2, **quantizer).build(SPEC)
    colours = torch.randint(256, (8, 1, 3, 2, 2), dtype=torch.uint8)
    batch = whole(8, 1)._replace(frame=colours.repeat_interleave(32, 3).repeat_interleave(32, 4))
    made.prepare(to_unit(batch.frame).flatten(0, 1))
    objective = objectives(made)[0]
    trainer = Trainer([objective], device=torch.device("cpu"), precision="fp32")
    losses = [trainer.update(objective, batch) for _ in range(80)]
    first, last = (loss.terms["weighted_pixels"].value.mean().item() for loss in (losses[0], losses[-1]))
    assert last < 0.5 * first
    assert losses[-1].metrics["perplexity"] > 3, "several codes are in use"
    book = made.tokenizer.embedding
    assert {"commitment", "codebook"} & losses[0].terms.keys() == set(book.terms)


@torch.no_grad()
def test_with_contrast_the_background_costs_nothing() -> None:
    """It is what is shown where the decoder says nothing, and what is seen as nothing."""
    made = model(contrast=True)
    background = torch.rand(3, 64, 64)
    made.prepare(background.repeat(4, 1, 1, 1))
    assert isinstance(made.tokenizer, VQTokenizer) and isinstance(made.tokenizer.decoder, nn.Sequential)
    last = made.tokenizer.decoder[-1]
    assert isinstance(last, nn.Conv2d) and last.bias is not None
    last.weight.zero_()
    last.bias.zero_()
    assert_close(made._decoded(torch.zeros(1, 4, dtype=torch.long))[0], background)
    seen: list[Tensor] = []
    made.tokenizer.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    made.encode(background)
    made.encode(background + 0.15)
    assert_close(seen[0], torch.zeros_like(seen[0]), rtol=0, atol=1e-5)
    assert_close(seen[1], torch.ones_like(seen[1]), rtol=0, atol=1e-5)


def turning(batch_size: int, length: int, worth: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0)) -> Batch:
    """A world of four coloured frames: action a goes 1 + a further round; coming to each is worth something."""
    action = torch.randint(2, (batch_size, length))
    place = torch.cat([torch.randint(4, (batch_size, 1)), 1 + action], 1).cumsum(1) % 4
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], dtype=torch.uint8)
    frame = colours[place[:, :-1], :, None, None].expand(-1, -1, -1, 64, 64).contiguous()
    flags = torch.ones(batch_size, length, dtype=torch.bool)
    return Batch(frame, action, torch.tensor(worth)[place[:, 1:]], ~flags, flags, flags)


@pytest.mark.slow
def test_it_learns_a_small_world_and_knows_it_beyond_its_window() -> None:
    torch.manual_seed(0)
    worth = (5.0, 0.0, -20.0, 0.0)
    made = replace(TOY, quantizer="ema", tokenizer_lr=1e-2, lr=5e-3).build(replace(SPEC, action_size=2))
    made.prepare(to_unit(turning(8, 8).frame).flatten(0, 1))
    tokenizer, world_model = objectives(made)
    trainer = Trainer([tokenizer, world_model], device=torch.device("cpu"), precision="fp32")
    for _ in range(60):
        trainer.update(tokenizer, turning(32, 1))
    for _ in range(220):
        batch = turning(16, TOY.context_frames, worth)
        trainer.update(world_model, batch._replace(code=tokens_of(made, batch)))
    with torch.no_grad():
        real = turning(8, 2 * TOY.context_frames, worth)
        assert len({tuple(tokens.flatten().tolist()) for tokens in tokens_of(made, real).flatten(0, 1)}) == 4
        state, right = made.start(to_unit(real.frame[:, :2]), real.action), []
        for t in range(1, 2 * TOY.context_frames - 1):
            dreamed = made.step(state, real.action[:, t], temperature=0)
            state, reward, cont = made.step(state, real.action[:, t], to_unit(real.frame[:, t + 1]))
            right += [
                (dreamed.state.latent == state.latent).all(1),
                (reward - real.reward[:, t]).abs() < 0.2 * max(map(abs, worth)),
                cont > 0.9,
            ]
        assert torch.cat(right).float().mean() > 0.95


def test_moving_codes_move_in_training_only() -> None:
    made = model(quantizer="ema")
    before = made.tokenizer.embedding.weight.clone()
    objective, batch = objectives(made)[0], whole(4, 1)
    objective.loss(batch)
    assert torch.equal(made.tokenizer.embedding.weight, before)
    Trainer([objective], device=torch.device("cpu"), precision="fp32").update(objective, batch)
    assert not torch.equal(made.tokenizer.embedding.weight, before)

"""The transformer that tells a frame in one pass: its two forms step by step and at once, its rollouts, weights and
refinement.

Shapes: B batch, T time, N tokens a frame, V codes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from agent.trainer import Trainer
from world_model.interface import Losses, Objective, Optim, Term
from world_model.parts.block_transformer import BlockTransformer, BlockTransformerConfig, WeightsFrom, token_weights

B, T = 3, 7
TOY = BlockTransformerConfig(
    codes=6, grid=(3, 5), attention="cached", history=3, merge=2, width=16, layers=2, heads=2, dropout=0.0,
    rollout_steps=3,
)  # fmt: skip
FORMS = [{"attention": "cached"}, {"attention": "whole", "merge": 1}, {"attention": "cached", "history": 1}]


def built(**changes: Any) -> BlockTransformer:
    torch.manual_seed(0)
    made = replace(TOY, **changes).build(actions=4)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def segment() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.randint(TOY.codes, (B, T, 15), generator=rng), torch.randint(4, (B, T), generator=rng)


@pytest.mark.parametrize("form", FORMS, ids=str)
@torch.no_grad()
def test_at_once_is_step_by_step(form: dict[str, Any]) -> None:
    made, (tokens, action) = built(**form), segment()
    out, h = made(tokens, action)
    memory = made.initial(B)
    for t in range(T):
        memory = made.advance(memory, tokens[:, t], action[:, t])
        assert_close(memory["out"], out[:, t], rtol=0, atol=1e-5)
        assert_close(memory["h"], h[:, t], rtol=0, atol=1e-5)
    assert made.has_action(memory).all() and not made.has_action(made.initial(B)).any()


@pytest.mark.parametrize("form", FORMS, ids=str)
@torch.no_grad()
def test_what_comes_later_is_not_seen_and_what_is_past_the_history_is_forgotten(form: dict[str, Any]) -> None:
    made, (tokens, action) = built(**form), segment()
    history, layers = made.config.history, made.config.layers if form["attention"] == "cached" else 1
    changed = tokens.clone()
    changed[:, 2] = (tokens[:, 2] + 1) % TOY.codes
    apart = (made(tokens, action)[0] - made(changed, action)[0]).abs().amax((0, 2, 3)) > 1e-6
    reach = 2 + 1 + (history - 1) * layers
    assert apart.tolist() == [2 <= t < reach for t in range(T)]


@torch.no_grad()
def test_every_token_and_the_action_reach_what_is_told() -> None:
    made, (tokens, action) = built(history=1), segment()
    for place in range(15):
        changed = tokens[:, 0].clone()
        changed[:, place] = (changed[:, place] + 1) % TOY.codes
        one, other = (made.advance(made.initial(B), seen, action[:, 0]) for seen in (tokens[:, 0], changed))
        assert (one["h"] - other["h"]).abs().max() > 1e-4
    one, other = (made.advance(made.initial(B), tokens[:, 0], (action[:, 0] + by) % 4) for by in (0, 1))
    assert (made.prior_kl(one, other) > 1e-4).all()
    assert_close(made.prior_kl(one, one), torch.zeros(B))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rollouts_are_its_own_most_likely_tokens(form: dict[str, Any]) -> None:
    tokens, action = segment()
    made = built(**form, teacher_forcing=0.0)
    shown = made.rolled_out(tokens, action, 3, made.config.teacher_forcing)
    assert torch.equal(shown[:, :4], tokens[:, :4]) and torch.equal(shown[:, -1], tokens[:, -1])
    memory = made.start(tokens[:, :4], action[:, :3])
    for t in range(4, T - 1):
        memory = made.advance(memory, shown[:, t - 1], action[:, t - 1])
        assert torch.equal(shown[:, t], made.imagine(memory, 0)[0])
    assert not torch.equal(shown[:, 4], tokens[:, 4])
    assert torch.equal(built(**form).rolled_out(tokens, action, 3, 1.0), tokens)


def test_steps_of_a_rollout_count_less_and_less_and_one_on_average() -> None:
    tokens, action = segment()
    plain = {"motion_scale": 0.0, "event_scale": 0.0, "persistence_scale": 0.0, "teacher_forcing": 1.0}
    codes = torch.randn(TOY.codes, 4)
    every, none = (built(**plain, rollout_share=share).predict(tokens, action, codes).nats for share in (1.0, 0.0))
    share = every[:, 1:].mean((0, 2)) / none[:, 1:].mean((0, 2))
    wanted = torch.tensor([1, 1, 1, 1.0, 0.7, 0.49])
    assert_close(share, wanted * torch.tensor([1, 1, 1, *[3 / 2.19] * 3]))


def test_tokens_that_move_weigh_more_up_to_a_bound() -> None:
    tokens = torch.zeros(1, 4, 15, dtype=torch.long)
    tokens[0, 1:, 7], tokens[0, 3, [0, 1, 2, 3, 4]] = torch.tensor([1, 2, 3]), 1  # one thing moves on, a row once
    codes = torch.eye(6)  # every move is at least as far as codes are apart on average
    weight = token_weights(tokens, codes, TOY)[0]
    still, steady, sudden = weight[:, 14], weight[:, 7], weight[2, 2]
    assert_close(still, torch.ones(3))
    assert_close(steady, torch.tensor([3.0, 4.0, 4.0]))  # motion, and persistence from the second on
    assert_close(sudden, torch.tensor(1 + 2 + 2 * 2 / 3 + 1))  # it comes beside what moved before
    capped = token_weights(tokens, codes, replace(TOY, weight_cap=2.0))[0]
    assert_close(capped, weight.clamp(max=2.0))
    small = token_weights(tokens, codes, replace(TOY, small_scale=3.0, weight_cap=100.0))[0]
    assert_close(small[0, 7], weight[0, 7] + 3)  # alone
    assert weight[2, 2] < small[2, 2] < weight[2, 2] + 1, "one of many"
    past = token_weights(tokens, codes, replace(TOY, weights_from="past"))[0]
    assert_close(past[0], torch.ones(15))  # nothing had moved
    assert past[1, 7] == past[1, 8] == 4 and past[2, 0] == 1, "something had moved there or beside it, for once"
    assert_close(past[2, 7], torch.tensor(1 + 2 + 2 / 3 + 1))  # and twice


@pytest.mark.parametrize("refine", [0, 1])
def test_an_unlikely_token_is_learned_from_more_with_focal_loss(refine: int) -> None:
    tokens, action = segment()
    codes = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    told = []
    for scale in (0.0, 2.0):
        model = built(focal=scale, rollout_share=0.0, refine=refine)
        torch.manual_seed(1)
        told.append(model.predict(tokens, action, codes).nats)
    plain, focal = told
    ratio = focal[:, 1:] / plain[:, 1:]
    assert (ratio < 1).all()
    likely, unlikely = plain[:, 1:] < plain[:, 1:].median(), plain[:, 1:] > plain[:, 1:].median()
    assert ratio[likely].mean() < ratio[unlikely].mean()


def things(rows: int) -> Tensor:
    """Frames that say nothing, then frames with a single thing at one of 15 places: (B, 2, 15)."""
    place = torch.randint(15, (rows,))
    return torch.stack([torch.zeros(rows, 15, dtype=torch.long), F.one_hot(place, 15)], 1)


@pytest.mark.slow
@pytest.mark.parametrize(("refine", "least", "most"), [(0, 0.2, 0.5), (20, 0.7, 1.0)])
def test_tokens_agree_once_they_are_refined(refine: int, least: float, most: float) -> None:
    """One thing at an unknown place: told at once it is nowhere or twice in most frames."""
    torch.manual_seed(0)
    made = replace(TOY, refine=refine, rollout_share=0.0, motion_scale=0.0, event_scale=0.0, persistence_scale=0.0)
    model = made.build(actions=4)
    action, codes = torch.zeros(64, 2, dtype=torch.long), torch.randn(6, 4)

    def loss(tokens: Tensor) -> Losses:
        return Losses({"tokens": Term(model.predict(tokens, action, codes).nats)}, {})

    objective = Objective("block", tuple(model.parameters()), loss, {"tokens": 1.0}, Optim(lr=1e-2, warmup=1))
    trainer = Trainer([objective], device=torch.device("cpu"), precision="fp32")
    for _ in range(400):
        trainer.update(objective, things(64))
    with torch.no_grad():
        drawn = model.imagine(model.start(things(1000), torch.zeros(1000, 1, dtype=torch.long)))[0]
    assert least <= float((drawn.sum(1) == 1).float().mean()) <= most


@torch.no_grad()
def test_likely_copies_are_certain() -> None:
    made, (tokens, action) = built(), segment()
    memory = made.advance(made.initial(B), tokens[:, 0], action[:, 0])
    stays = made._logits(memory["out"], memory["tokens"]).softmax(-1).gather(-1, tokens[:, 0].unsqueeze(-1)).squeeze(-1)
    bound = float(stays.median())
    made.config = replace(made.config, copy_above=bound)
    drawn = torch.stack([made.imagine(memory)[0] for _ in range(50)])
    same = (drawn == tokens[:, 0]).float().mean(0)
    assert (same[stays > bound] == 1).all() and (same[stays < bound] < 1).any()


def test_the_document_s_own_size() -> None:
    made = BlockTransformerConfig().build(actions=4)
    heads = sum(p.numel() for head in (made.reward, made.end) for p in head.parameters())
    assert round((sum(p.numel() for p in made.parameters()) - heads) / 1e6, 1) == 8.3
    with pytest.raises(ValueError, match="cannot be shared evenly among 3 heads"):
        BlockTransformerConfig(heads=3).build(actions=4)
    with pytest.raises(ValueError, match="at least 1"):
        BlockTransformerConfig(merge=0).build(actions=4)


@pytest.mark.slow
@pytest.mark.parametrize(("weights_from", "share"), [("target", 0.25), ("past", 0.1)])
def test_weights_that_know_what_comes_make_it_too_likely(weights_from: WeightsFrom, share: float) -> None:
    """A tenth of the tokens change, and nobody can know which: those that did weigh three times as much as the rest."""
    torch.manual_seed(0)
    model = replace(TOY, rollout_share=0.0, weights_from=weights_from).build(actions=4)
    action, codes = torch.zeros(256, 2, dtype=torch.long), torch.eye(6)

    def loss(tokens: Tensor) -> Losses:
        return Losses({"tokens": Term(model.predict(tokens, action, codes).nats)}, {})

    objective = Objective("block", tuple(model.parameters()), loss, {"tokens": 1.0}, Optim(lr=1e-2, warmup=1))
    trainer = Trainer([objective], device=torch.device("cpu"), precision="fp32")
    for _ in range(80):
        changed = (torch.rand(256, 1, 15) < 0.1).long()
        trainer.update(objective, torch.cat([torch.zeros_like(changed), changed], 1))
    with torch.no_grad():
        memory = model.start(torch.zeros(1, 2, 15, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long))
        told = model._logits(memory["out"], memory["tokens"]).softmax(-1)[..., 1].mean()
    assert float(told) == pytest.approx(share, abs=0.04)

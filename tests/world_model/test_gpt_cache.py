"""The transformer's cache: rows of any age, what it must not look at or touch, number formats; and its own dropout."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from agent.precision import Format, for_inference
from agent.trainer import Trainer
from world_model import trees
from world_model.interface import Losses, Objective, Optim, Term
from world_model.parts import blocks
from world_model.parts.gpt import GPT, GPTConfig
from world_model.trees import Tree

TOY = GPTConfig(codes=8, tokens=4, context_frames=5, keep=2, width=16, layers=2, heads=2)
AGES = (20, 5, 10)  # tokens read: whole steps of 5


@pytest.fixture
def gpt() -> GPT:
    """With weights large enough that every token matters."""
    torch.manual_seed(0)
    made = TOY.build(actions=3).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made


def tokens_of(rows: int, count: int) -> Tensor:
    """All below the number of actions, so that any may stand anywhere."""
    return torch.randint(0, 3, (rows, count))


def together(memories: list[Tree]) -> Tree:
    return trees.map(lambda *leaves: torch.cat(leaves), *memories)


def one_each(gpt: GPT) -> list[Tree]:
    return [gpt.append(gpt.initial(1), tokens_of(1, age))[0] for age in AGES]


def test_rows_of_all_ages_dream_as_they_would_alone(gpt: GPT) -> None:
    alone = one_each(gpt)
    drawn = gpt.draw(together(alone), 0)[1]
    assert torch.equal(drawn, torch.cat([gpt.draw(memory, 0)[1] for memory in alone]))
    assert len({tuple(row) for row in drawn.tolist()}) > 1, "else it says nothing"


def test_nothing_beyond_a_row_s_own_age_is_looked_at(gpt: GPT) -> None:
    memory, more = together(one_each(gpt)), tokens_of(3, 2)
    known = gpt.append(memory, more)[1]
    for cache in (*memory["k"], *memory["v"]):
        for row, age in enumerate(AGES):
            cache[row, :, age:] = 1e6
    assert torch.equal(gpt.append(memory, more)[1], known)


def test_slots_that_nobody_has_filled_are_not_even_read(gpt: GPT) -> None:
    """For a caller who says how old the oldest row is; `advance` knows."""
    memory, more = together(one_each(gpt)[1:]), tokens_of(2, 2)
    for cache in (*memory["k"], *memory["v"]):
        cache[:, :, 12:] = math.nan
    assert gpt.append(memory, more, 12)[1].isfinite().all()
    assert gpt.draw(trees.rows(memory, slice(0, 1)), end=5)[1].max() < 8


def test_a_memory_may_be_a_view_of_any_kind(gpt: GPT) -> None:
    """Rows that share their tensors stay apart once they read on, and other layouts are no trouble."""
    memory, _ = gpt.append(gpt.initial(1), tokens_of(1, 5))
    before = trees.map(torch.clone, memory)
    many = trees.map(lambda leaf: leaf.expand(3, *leaf.shape[1:]), memory)
    more = torch.tensor([[0, 1, 1, 0, 2], [2, 2, 0, 0, 1], [1, 0, 2, 1, 0]])
    read, out = gpt.append(many, more)
    for row in range(3):
        assert_close(out[row], gpt.append(memory, more[row : row + 1])[1][0], rtol=0, atol=1e-5)
    stacked = trees.map(lambda a, b: torch.stack([a, b], 1)[:, 1], read, read)
    assert not stacked["k"][0].is_contiguous()
    assert torch.equal(gpt.draw(stacked, 0)[1], gpt.draw(read, 0)[1])
    assert all(torch.equal(a, b) for a, b in zip(trees.leaves(memory), trees.leaves(before), strict=True)), "untouched"


def test_a_row_without_room_is_an_error(gpt: GPT) -> None:
    memory, _ = gpt.append(gpt.initial(2), tokens_of(2, 24))
    with pytest.raises((RuntimeError, IndexError)):
        gpt.append(memory, tokens_of(2, 2))


def test_only_full_rows_slide(gpt: GPT) -> None:
    young, full = (gpt.append(gpt.initial(1), tokens_of(1, age))[0] for age in (15, 25))
    assert gpt.slide(young, [15]) == (young, [15])
    memory, positions = gpt.slide(together([young, full, young]), [15, 25, 15])
    assert memory["position"].tolist() == positions == [15, 10, 15]
    for row in (0, 2):
        kept = trees.rows(memory, slice(row, row + 1))
        assert all(torch.equal(a, b) for a, b in zip(trees.leaves(kept), trees.leaves(young), strict=True))


def test_a_drawn_frame_is_read_but_for_its_last_token(gpt: GPT) -> None:
    plain = together([gpt.append(gpt.initial(1), tokens_of(1, age))[0] for age in (15, 5, 10)])
    memory, drawn = gpt.draw(plain, 0)
    assert memory["position"].tolist() == [18, 8, 13] and torch.equal(memory["h"], plain["h"])
    action = torch.tensor([2, 0, 1])
    quick, end = gpt._with_action(memory, drawn[:, -1], action)
    whole, _ = gpt.append(plain, torch.cat([drawn, action.unsqueeze(1)], 1))
    assert end == 20 and torch.equal(quick["position"], whole["position"])
    for row, position in enumerate(quick["position"].tolist()):
        assert torch.equal(quick["tokens"][row, :position], whole["tokens"][row, :position])
    assert_close(quick["h"], whole["h"], rtol=0, atol=1e-5)
    assert torch.equal(gpt.draw(quick, 0, end)[1], gpt.draw(whole, 0)[1])


def test_a_condensed_memory_comes_back(gpt: GPT) -> None:
    """Rows of all ages, one that has read nothing among them; and what was only drawn is forgotten."""
    memory = together([*one_each(gpt), gpt.initial(1)])
    kept = gpt.condense(memory)
    assert trees.size_bytes(kept) < trees.size_bytes(memory) / 5
    gpt.draw(memory)
    back = gpt.recall(kept)
    assert all(torch.equal(back[name], memory[name]) for name in kept)
    more = tokens_of(4, 5)
    assert_close(gpt.append(back, more)[1], gpt.append(memory, more)[1], rtol=0, atol=1e-5)
    empty = gpt.recall(gpt.condense(gpt.initial(2)))
    assert all(torch.equal(a, b) for a, b in zip(trees.leaves(empty), trees.leaves(gpt.initial(2)), strict=True))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference"])
def test_mixed_precision_is_near_and_keeps_the_memory_in_full(gpt: GPT, rows: int, inference: bool) -> None:
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    start, more = tokens_of(rows, 5), tokens_of(rows, 1)
    whole = gpt.append(gpt.append(gpt.initial(rows), start)[0], more)[1]
    with torch.inference_mode(inference), torch.autocast("cpu", torch.bfloat16):
        memory, _ = gpt.append(gpt.initial(rows), start)
        memory, out = gpt.append(memory, more)
        assert gpt.draw(memory)[1].shape == (rows, 4)
    assert {leaf.dtype for leaf in trees.leaves(memory)} == {torch.float32, torch.int64}
    assert not torch.equal(out, whole), "else nothing was mixed"
    assert_close(out, whole, rtol=0, atol=0.1)


@pytest.mark.parametrize("format", ["bf16", "int8"])
def test_weights_cast_once_for_playing_say_nearly_the_same(gpt: GPT, format: Format) -> None:
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    start, more = tokens_of(1, 5), tokens_of(1, 1)

    def out(model: GPT) -> Tensor:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return model.append(model.append(model.initial(1), start)[0], more)[1]

    player = copy.deepcopy(gpt)
    for_inference(player, format=format)
    weights = (dict(model.named_parameters())["blocks.0.qkv.weight"].dtype for model in (gpt, player))
    assert tuple(weights) == (torch.float32, torch.int8 if format == "int8" else torch.bfloat16), (
        "a copy alone was cast"
    )
    if format == "bf16":
        assert torch.equal(out(player), out(gpt))
    else:
        assert not torch.equal(out(player), out(gpt))
        assert_close(out(player), out(gpt), rtol=0, atol=0.1)


def test_weights_that_have_learned_are_used_at_once(gpt: GPT) -> None:
    """Nothing is kept of their casts, however they were changed: an optimiser's fused step counts no version."""
    start = tokens_of(2, 5)

    def mixed(model: GPT) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model.append(model.initial(2), start)[1]

    first = mixed(gpt)
    parameters, scales = tuple(gpt.parameters()), {"sum": 1.0}
    objective = Objective("gpt", parameters, lambda tokens: summed(gpt, tokens), scales, Optim(lr=0.1))
    trainer = Trainer([objective], device=torch.device("cpu"), precision="bf16")
    with trainer.mixed():
        trainer.update(objective, tokens_of(2, 4).view(2, 1, 4))
        learned = mixed(gpt)
    assert torch.equal(learned, mixed(copy.deepcopy(gpt))) and not torch.equal(learned, first)


def summed(gpt: GPT, tokens: Tensor) -> Losses:
    told = gpt(tokens, torch.zeros_like(tokens[:, :, 0]))
    return Losses({"sum": Term(torch.stack([part.square().sum() for part in told]).sum())}, {})


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.ones(500, 401, requires_grad=True)
    dropped = blocks.drop(x, 0.3)
    dropped.sum().backward()
    assert abs(float((dropped == 0).float().mean()) - 0.3) < 0.01
    assert_close(dropped[dropped != 0].unique(), torch.tensor([1 / 0.7]))
    assert x.grad is not None and torch.equal(x.grad, dropped.detach())
    assert blocks.drop(x, 0.0) is x


def test_attention_is_torch_s(gpt: GPT) -> None:
    q, k, v = torch.randn(3, 6, 7, 8).unbind()
    bias = blocks.hiding(torch.arange(7), torch.arange(7).unsqueeze(1)).unsqueeze(0)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_close(blocks.attend(q, k, v, bias), wanted, rtol=0, atol=1e-5)
    last = blocks.attend(q[:, -1:], k, v, bias[:, -1:])
    assert_close(last, wanted[:, -1:], rtol=0, atol=1e-5)

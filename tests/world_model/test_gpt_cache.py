"""The transformer's cache: rows of any age, what it must not look at or touch, number formats; and its own dropout.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from agent.trainer import Trainer
from world_model import trees
from world_model.interface import Losses, Objective, Optim
from world_model.parts import blocks
from world_model.parts.gpt import GPT, GPTConfig
from world_model.trees import Tree

TOY = GPTConfig(codes=8, tokens=4, steps=5, width=16, layers=2, heads=2)
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
    drawn = gpt.draw_frame(together(alone), temperature=0)
    assert torch.equal(drawn, torch.cat([gpt.draw_frame(memory, temperature=0) for memory in alone]))
    assert len({tuple(row) for row in drawn.tolist()}) > 1, "else it says nothing"


def test_nothing_beyond_a_row_s_own_age_is_looked_at(gpt: GPT) -> None:
    memory, more = together(one_each(gpt)), tokens_of(3, 2)
    known = gpt.append(memory, more)[1]
    for cache in (*memory["k"], *memory["v"]):
        for row, age in enumerate(AGES):
            cache[row, :, age:] = 1e6
    assert torch.equal(gpt.append(memory, more)[1], known)


def test_slots_that_nobody_has_filled_are_not_even_read(gpt: GPT) -> None:
    """The cost of a frame follows from the age of the oldest row."""
    memory, more = together(one_each(gpt)[1:]), tokens_of(2, 2)
    for cache in (*memory["k"], *memory["v"]):
        cache[:, :, 12:] = math.nan
    assert gpt.append(memory, more)[1].isfinite().all()
    assert gpt.append(trees.rows(memory, slice(0, 1)), more[:1])[1].isfinite().all()


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
    assert torch.equal(gpt.draw_frame(stacked, temperature=0), gpt.draw_frame(read, temperature=0))
    assert all(torch.equal(a, b) for a, b in zip(trees.leaves(memory), trees.leaves(before), strict=True)), "untouched"


def test_a_row_without_room_is_an_error(gpt: GPT) -> None:
    memory, _ = gpt.append(gpt.initial(2), tokens_of(2, 24))
    with pytest.raises((RuntimeError, IndexError)):
        gpt.append(memory, tokens_of(2, 2))


def test_only_full_rows_slide(gpt: GPT) -> None:
    young, full = (gpt.append(gpt.initial(1), tokens_of(1, age))[0] for age in (20, 25))
    assert gpt.slide(young, keep=2) is young
    memory = gpt.slide(together([young, full, young]), keep=2)
    assert memory["position"].tolist() == [20, 10, 20]
    for row in (0, 2):
        kept = trees.rows(memory, slice(row, row + 1))
        assert all(torch.equal(a, b) for a, b in zip(trees.leaves(kept), trees.leaves(young), strict=True))


def test_what_was_read_while_it_was_drawn_is_not_read_again(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = together([gpt.append(gpt.initial(1), tokens_of(1, age))[0] for age in (15, 5, 10)])
    memory = trees.map(torch.clone, plain)
    drawn = gpt.dream_frame(memory, temperature=0)
    assert torch.equal(drawn, gpt.draw_frame(plain, temperature=0))
    step = torch.cat([drawn, torch.tensor([[2], [0], [1]])], 1)
    other = torch.cat([(drawn + 1) % 3, step[:, -1:]], 1)
    lengths: list[int] = []
    append = gpt.append

    def counted(memory: Tree, tokens: Tensor) -> tuple[Tree, Tensor]:
        lengths.append(tokens.shape[1])
        return append(memory, tokens)

    monkeypatch.setattr(gpt, "append", counted)
    for tokens, read in ((step, 2), (other, 5)):
        quick, whole = gpt.append_step(memory, tokens), append(plain, tokens)[0]
        assert lengths.pop() == read
        assert torch.equal(quick["tokens"], whole["tokens"]) and torch.equal(quick["position"], whole["position"])
        assert_close(quick["h"], whole["h"], rtol=0, atol=1e-5)
        assert torch.equal(gpt.draw_frame(quick, temperature=0), gpt.draw_frame(whole, temperature=0))


def test_a_condensed_memory_comes_back(gpt: GPT) -> None:
    """Rows of all ages, one that has read nothing among them; and what was only drawn is forgotten."""
    memory = together([*one_each(gpt), gpt.initial(1)])
    kept = gpt.condense(memory)
    assert trees.size_bytes(kept) < trees.size_bytes(memory) / 5
    gpt.dream_frame(trees.map(torch.clone, memory))
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
        assert gpt.draw_frame(memory).shape == (rows, 4)
    assert {leaf.dtype for leaf in trees.leaves(memory)} == {torch.float32, torch.int64}
    assert not torch.equal(out, whole), "else nothing was mixed"
    assert_close(out, whole, rtol=0, atol=0.1)


@pytest.mark.parametrize("rows", [1, 3])
def test_weights_are_cast_anew_when_they_have_changed(gpt: GPT, rows: int) -> None:
    """By an optimiser, in place, and by new tensors; and what inference mode has cast serves outside of it too."""
    start, more = tokens_of(rows, 5), tokens_of(rows, 1)

    def mixed() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return gpt.append(gpt.append(gpt.initial(rows), start)[0], more)[1]

    def mixed_anew() -> Tensor:
        gpt._casts.clear()
        return mixed()

    with torch.inference_mode():
        inferred = mixed()
    first = mixed()
    assert torch.equal(first, inferred) and torch.equal(first, mixed())
    parameters, scales = tuple(gpt.parameters()), {"sum": 1.0}
    objective = Objective("gpt", parameters, lambda tokens: summed(gpt, tokens), scales, Optim(lr=0.1))
    Trainer([objective], device=torch.device("cpu"), precision="fp32").update(objective, tokens_of(2, 4).view(2, 1, 4))
    assert torch.equal(mixed(), mixed_anew()) and not torch.equal(mixed(), first)
    gpt.load_state_dict({name: -tensor for name, tensor in gpt.state_dict().items()})
    assert torch.equal(mixed(), mixed_anew())
    for parameter in gpt.parameters():
        parameter.data = parameter.data * 0.5
    assert torch.equal(mixed(), mixed_anew())


def summed(gpt: GPT, tokens: Tensor) -> Losses:
    told = gpt(tokens, torch.zeros_like(tokens[:, :, 0]))
    return Losses({"sum": sum(part.square().sum() for part in told)}, {})


def test_shapes_alone_are_enough() -> None:
    """`info` asks for the size of a memory without computing anything."""
    with torch.device("meta"):
        gpt = TOY.build(actions=3)
        memory, out = gpt.append(gpt.initial(2), torch.zeros(2, 5, dtype=torch.long))
        assert out.shape == (2, 5, 16) and gpt.draw_frame(memory).shape == (2, 4)


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

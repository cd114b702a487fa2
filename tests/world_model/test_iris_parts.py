"""IRIS's tokenizer and transformer against the outputs of the published code, and the reader of its checkpoints.

`vectors/iris` holds a small configuration with random weights (2 heads; 2 rows of 6 steps) and what the published code
gives for them: the transformer's weights exactly, the tokenizer's rounded to half precision to keep the files small.
The exact ones lie outside this repository, in FULL, and are compared where they are found.
"""

from __future__ import annotations

import io
import json
import lzma
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from envs.errors import UserError
from world_model import trees
from world_model.iris_checkpoint import Published, published_names, read
from world_model.parts.gpt import GPT, GPTConfig
from world_model.parts.vq_tokenizer import VQTokenizer, VQTokenizerConfig

VECTORS = Path(__file__).parents[1] / "vectors" / "iris"
FULL = Path(__file__).parents[3] / "shared" / "vectors" / "iris"
TOY = VQTokenizerConfig(codes=8, width=8, channels=4, halvings=2, blocks=1, attention=(1,))
TOY_GPT = GPTConfig(codes=8, tokens=4, context_frames=5, width=16, layers=2, heads=2, keep=2)


def vectors(name: str) -> dict[str, Tensor]:
    return dict(torch.load(io.BytesIO(lzma.decompress((VECTORS / f"{name}.pt.xz").read_bytes())), weights_only=True))


def evaluated(published: Published) -> Published:
    published.tokenizer.eval().requires_grad_(False)
    published.world_model.eval().requires_grad_(False)
    return published


def state_of(tokenizer: VQTokenizer, gpt: GPT) -> dict[str, Tensor]:
    ours = {"tokenizer": published_names(tokenizer), "world_model": published_names(gpt)}
    return {f"{part}.{key}": value for part in ours for key, value in ours[part].items()}


def toy_gpt() -> GPT:
    """With weights large enough that every token matters."""
    torch.manual_seed(0)
    gpt = TOY_GPT.build(actions=3).eval().requires_grad_(False)
    for parameter in gpt.parameters():
        parameter.normal_(std=0.4)
    return gpt


def segment(batch: int, steps: int) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 8, (batch, steps, 4)), torch.randint(0, 3, (batch, steps))


def in_a_row(tokens: Tensor, action: Tensor) -> Tensor:
    return torch.cat([tokens, action.unsqueeze(-1)], -1).flatten(1)


@pytest.fixture
def small(tmp_path: Path) -> Published:
    torch.save(vectors("tokenizer_half") | vectors("world_model"), tmp_path / "small.pt")
    return evaluated(read(tmp_path / "small.pt", heads=2))


def assert_logits(published: Published, expected: dict[str, Tensor]) -> None:
    predicted = published.world_model(expected["tokens"], expected["actions"])
    for ours, theirs in zip(predicted[:3], ("observations", "rewards", "ends"), strict=True):
        wanted = expected[f"logits_{theirs}"]
        assert_close(ours.reshape(wanted.shape), wanted, rtol=0, atol=1e-4)


# ---- the published numbers ----
def test_it_has_the_paper_s_size() -> None:
    with torch.device("meta"):
        models = VQTokenizerConfig().build((3, 64, 64)), GPTConfig().build(actions=6)
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [4_027_523, 8_448_005]


def test_it_gives_the_published_outputs(small: Published) -> None:
    expected = vectors("expected")
    assert torch.equal(small.tokenizer.encode(expected["frames"]), expected["tokens"][:, expected["frame_times"]])
    picture = small.tokenizer.picture(small.tokenizer.embedding(expected["tokens"][:, :1]))
    error = picture - expected["reconstruction"]
    assert error.square().mean().sqrt() < 2e-3 and error.abs().max() < 2e-2, "as much as half precision brings"
    assert_logits(small, expected)


@pytest.mark.skipif(not FULL.is_dir(), reason="the exact vectors are not beside this repository")
def test_it_gives_the_published_outputs_exactly() -> None:
    published = evaluated(read(FULL / "iris.pt", heads=2))
    expected = {name: torch.from_numpy(array) for name, array in np.load(FULL / "iris_expected.npz").items()}
    tokens = published.tokenizer.encode(expected["frames"])
    assert torch.equal(tokens, expected["tokens"])
    picture = published.tokenizer.picture(published.tokenizer.embedding(tokens))
    assert_close(picture, expected["reconstruction"], rtol=0, atol=1e-4)
    assert_logits(published, expected)


@pytest.mark.skipif(not FULL.is_dir(), reason="the published names are not beside this repository")
def test_all_published_names_are_known() -> None:
    wanted = json.loads((FULL / "keys_full_size.json").read_text())
    with torch.device("meta"):
        state = state_of(VQTokenizerConfig().build((3, 64, 64)), GPTConfig().build(6))
    wanted = {key: value for key, value in wanted.items() if not key.endswith((".mask", ".indices"))}
    known = {key: list(value.shape) for key, value in state.items()}
    assert known == {key: value for key, value in wanted.items() if not key.startswith("actor_critic")}


# ---- the tokenizer ----
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("size", [(20, 28), (18, 25)])
def test_frames_of_any_lead_and_grid(size: tuple[int, int], lead: tuple[int, ...]) -> None:
    tokenizer = TOY.build((1, *size))
    frame = torch.rand(*lead, 1, *size)
    tokens = tokenizer.encode(frame)
    assert tokens.shape == (*lead, 5 * 7) and tokens.dtype == torch.int64
    assert (shown := tokenizer.decode(tokens)).shape == frame.shape and shown.min() >= 0 and shown.max() <= 1


def test_a_token_is_that_of_the_nearest_code() -> None:
    tokenizer = TOY.build((3, 16, 16)).requires_grad_(False)
    latent = torch.randn(2, 16, 8)
    assert torch.equal(tokenizer.nearest(latent), torch.cdist(latent, tokenizer.embedding.weight).argmin(-1))


def test_impossible_tokenizers() -> None:
    with pytest.raises(ValueError, match="in patches of 0 pixels"):
        VQTokenizerConfig(patch=0).build((3, 16, 16))
    with pytest.raises(ValueError, match="multiple of 32, got 48"):
        VQTokenizerConfig(channels=48).build((3, 64, 64))
    with pytest.raises(ValueError, match="levels 0 to 4"):
        VQTokenizerConfig(attention=(5,)).build((3, 64, 64))


# ---- the transformer ----
@pytest.mark.parametrize("sizes", [[1], [5], [4, 1], [2, 3]], ids=str)
def test_the_cached_pass_is_the_parallel_one(sizes: list[int]) -> None:
    gpt = toy_gpt()
    tokens, action = segment(3, 5)
    row, memory, hidden = in_a_row(tokens, action), gpt.initial(3), list[Tensor]()
    for part in row.split(sizes * (25 // sum(sizes)), 1):
        memory, out = gpt.append(memory, part)
        assert torch.equal(memory["h"], out[:, -1])
        hidden.append(out)
    steps = torch.cat(hidden, 1).unflatten(1, (5, 5))
    whole = gpt(tokens, action)
    assert_close(gpt.next_token(steps[:, :, [0, 1, 2, 4]]), whole.token, rtol=0, atol=1e-5)
    assert_close(gpt.reward(steps[:, :, -1]), whole.reward, rtol=0, atol=1e-5)
    assert_close(gpt.end(steps[:, :, -1]), whole.end, rtol=0, atol=1e-5)
    assert memory["position"].tolist() == [25, 25, 25] and torch.equal(memory["tokens"], row)


def test_the_cached_pass_is_the_parallel_one_at_the_published_weights(small: Published) -> None:
    gpt, expected = small.world_model, vectors("expected")
    memory, hidden = gpt.initial(2), torch.empty(2, 0, 64)
    for token in in_a_row(expected["tokens"], expected["actions"]).split(1, 1):
        memory, out = gpt.append(memory, token)
        hidden = torch.cat([hidden, out], 1)
    whole = gpt(expected["tokens"], expected["actions"])
    assert_close(gpt.reward(hidden[:, 16::17]), whole.reward, rtol=0, atol=1e-5)
    assert_close(gpt.next_token(hidden[:, 16::17]), whole.token[:, :, -1], rtol=0, atol=1e-5)


def test_rows_of_different_ages_stand_in_one_batch() -> None:
    gpt = toy_gpt()
    tokens, action = segment(2, 4)
    row = in_a_row(tokens, action)
    old, _ = gpt.append(gpt.initial(1), row[:1, :15])
    young, _ = gpt.append(gpt.initial(1), row[1:, :5])
    both = trees.map(lambda a, b: torch.cat([a, b]), old, young)
    before = trees.map(torch.clone, both)
    both_next, out = gpt.append(both, torch.stack([row[0, 15:20], row[1, 5:10]]))
    assert both_next["position"].tolist() == [20, 10]
    assert_close(gpt.reward(out[0, -1]), gpt(tokens, action).reward[0, 3], rtol=0, atol=1e-5)
    assert_close(gpt.reward(out[1, -1]), gpt(tokens, action).reward[1, 1], rtol=0, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(trees.leaves(both), trees.leaves(before), strict=True)), "untouched"


def test_dropout_is_for_training_and_never_in_a_dream() -> None:
    gpt = toy_gpt().train()
    tokens, action = segment(2, 3)
    assert not torch.equal(gpt(tokens, action).token, gpt(tokens, action).token)
    row = in_a_row(tokens, action)
    assert torch.equal(gpt.append(gpt.initial(2), row)[1], gpt.append(gpt.initial(2), row)[1])


def test_a_drawn_frame_is_the_most_likely_one_at_temperature_0() -> None:
    gpt = toy_gpt()
    tokens, action = segment(3, 2)
    memory, _ = gpt.append(gpt.initial(3), in_a_row(tokens, action))
    before = trees.map(torch.clone, memory)
    drawn = gpt.draw(memory, 0)[1]
    assert all(torch.equal(a, b) for a, b in zip(trees.leaves(memory), trees.leaves(before), strict=True)), "untouched"
    told = gpt(torch.cat([tokens, drawn.unsqueeze(1)], 1), torch.cat([action, action[:, :1]], 1)).token
    assert torch.equal(drawn, told.flatten(1, 2)[:, 7:11].argmax(-1)), "token[j] is about observation token j + 1"


def test_frames_are_drawn_as_often_as_they_are_likely() -> None:
    gpt = toy_gpt()
    tokens, action = segment(1, 1)
    memory, out = gpt.append(gpt.initial(1), in_a_row(tokens, action))
    many = trees.map(lambda leaf: leaf.expand(4000, *leaf.shape[1:]), memory)
    share = torch.bincount(gpt.draw(many, 2.0)[1][:, 0], minlength=8) / 4000
    assert_close(share, (gpt.next_token(out[0, -1]) / 2).softmax(-1), rtol=0, atol=0.03)


def test_a_full_window_slides_and_remembers() -> None:
    gpt = toy_gpt()
    gpt.config = replace(gpt.config, keep=3)
    tokens, action = segment(2, 6)
    row = in_a_row(tokens, action)
    full, _ = gpt.append(gpt.initial(1), row[:1, :25])
    young, _ = gpt.append(gpt.initial(1), row[1:, :15])
    both = trees.map(lambda a, b: torch.cat([a, b]), full, young)
    memory, positions = gpt.slide(both, [25, 15])
    assert memory["position"].tolist() == positions == [15, 15]
    assert torch.equal(memory["h"][:1], full["h"])
    _, out = gpt.append(memory, torch.stack([row[0, 25:30], row[1, 15:20]]))
    slid = gpt(tokens[:1, 2:], action[:1, 2:]).reward[:, -1]
    whole = gpt(tokens[1:, :4], action[1:, :4]).reward[:, -1]
    assert_close(gpt.reward(out[:, -1]), torch.cat([slid, whole]), rtol=0, atol=1e-5)


def test_impossible_transformers() -> None:
    with pytest.raises(ValueError, match="at most 5 steps, got 6"):
        toy_gpt()(*segment(1, 6))
    with pytest.raises(ValueError, match="16 cannot be shared among 3"):
        GPTConfig(width=16, heads=3).build(2)
    with pytest.raises(ValueError, match="1 to 3 can be kept, got keep=4"):
        replace(TOY_GPT, keep=4).build(2)


# ---- the reader ----
def toy_state() -> dict[str, Any]:
    state: dict[str, Any] = {**state_of(TOY.build((3, 8, 8)), TOY_GPT.build(3))}
    position = torch.arange(25).view(5, 5)
    at = {"observations": position[:, [0, 1, 2, 4]].flatten(), "rewards": position[:, 4], "ends": position[:, 4]}
    return state | {f"world_model.head_{head}.indices": where.clone() for head, where in at.items()}


def test_it_reads_what_is_needed_and_hands_the_actor_critic_on(tmp_path: Path) -> None:
    state, bias = toy_state(), torch.randn(6)
    more = {"tokenizer.lpips.net.0": bias, "world_model.transformer.blocks.0.attn.mask": bias}
    torch.save(state | more | {"actor_critic.actor_linear.bias": bias}, tmp_path / "toy.pt")
    published = read(tmp_path / "toy.pt", heads=2)
    assert (published.tokenizer.config, published.world_model.config) == (TOY, TOY_GPT)
    assert published.world_model.actions == 3 and published.tokenizer.frame == (3, 8, 8)
    assert published.actor_critic.keys() == {"actor_linear.bias"}
    for key, value in state_of(published.tokenizer, published.world_model).items():
        assert torch.equal(state[key], value)


BIAS, BLOCK = "tokenizer.encoder.conv_in.bias", "world_model.transformer.blocks.0."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop(BIAS), f"it misses {BIAS}\\.$"),
        (lambda state: state.pop("world_model.pos_emb.weight"), "it misses world_model.pos_emb.weight"),
        (lambda state: [state.pop(key) for key in [*state] if BLOCK in key], "misses .*blocks.0.* and 12 more.$"),
        (lambda state: state.update({"value.bias": torch.ones(1)}), r"unknown value.bias\."),
        (lambda state: state.update({BIAS: torch.ones(5)}), rf"misshapen are {BIAS} \(5 instead of 4\)"),
        (lambda state: state.update({BIAS: torch.ones(4, dtype=torch.int64)}), f"not numbers are {BIAS}"),
        (lambda state: state.update({BIAS: torch.full((4,), torch.nan)}), f"not finite are {BIAS}"),
        (lambda state: state["world_model.head_ends.indices"].sub_(1), "not 4 tokens and then the action"),
        (lambda state: state.update({"world_model.pos_emb.weight": torch.ones(24, 16)}), "24 positions in 5 steps"),
        (lambda state: state.update(epoch=3), "one dict of named tensors"),
        (lambda state: state.update(day=date(2023, 5, 1)), r"more than tensors.*\(datetime.date\)"),
    ],
)
def test_other_checkpoints_are_refused(change: Callable[[dict[str, Any]], Any], words: str, tmp_path: Path) -> None:
    state = toy_state()
    change(state)
    torch.save(state, tmp_path / "toy.pt")
    with pytest.raises(UserError, match=words):
        read(tmp_path / "toy.pt", heads=2)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "toy.pt"
    with pytest.raises(UserError, match="no file"):
        read(path)
    torch.save(toy_state(), path)
    with pytest.raises(UserError, match="16 cannot be shared among 3"):
        read(path, heads=3)
    whole = path.read_bytes()
    middle = len(whole) // 2
    broken = [whole[:length] for length in (0, 1, 100, middle, len(whole) - 1)] + [b"a text\n", bytes(range(256))]
    for content in [*broken, whole[:middle] + bytes(64) + whole[middle + 64 :]]:
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a complete checkpoint"):
            read(path)

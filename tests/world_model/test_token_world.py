"""Every tokenizer with every dynamics: builds, learns from a batch, and dreams as the contract has it.

What each part does by itself stands in the tests of the parts; the recipes run through the whole contract in
`test_interface.py`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from agent.trainer import Trainer
from envs.spec import Spec
from tests.toys import segments
from world_model.interface import to_unit
from world_model.parts.pair_tokenizer import PairTokenizer
from world_model.token_world import TokenWorldConfig

SPEC = Spec((3, 24, 16), 4, True)
TOY = TokenWorldConfig(
    view="tokens", codes=64, code_width=8, channels=8, halvings=2, blocks=1, attention=(), context_frames=5, keep=2,
    history=3, rollout_steps=2, width=16, layers=1, heads=2, dropout=0.0, lr=1e-2, tokenizer_lr=1e-2,
)  # fmt: skip
TOKENIZERS: dict[str, dict[str, Any]] = {
    "vqgan": {}, "vqgan, attention": {"attention": (1, 2)}, "patches by themselves": {"patch": 2, "local": True},
    "hires": {"layout": "hires"}, "hires, local, contrast": {"layout": "hires", "local": True, "contrast": True},
}  # fmt: skip
QUANTIZERS: dict[str, dict[str, Any]] = {
    "gradient": {}, "ema": {"quantizer": "ema"}, "fsq": {"quantizer": "fsq", "levels": (4, 4, 4)},
    "ema, now and then": {"quantizer": "ema", "follow_every": 10, "reset_every": 500},
}  # fmt: skip
PAIRS: dict[str, dict[str, Any]] = {
    "pair": {"tokens_of": "pair", "chain": 2, "decoder_frames": 2},
    "pair, residual": {"tokens_of": "pair", "residual": True},
    "pair, cvivit": {"tokens_of": "pair", "pair_encoder": "cvivit", "pair_layers": 1},
    "pair, few codes": {"tokens_of": "pair", "positions": 2, "contrast": True, "label_scale": 1.0},
    "pair, flowing": {"tokens_of": "pair", "flow_steps": 2, "chain": 2, "decoder_frames": 2},
}  # fmt: skip
DYNAMICS: dict[str, dict[str, Any]] = {
    "gpt": {}, "block": {"dynamics": "block"}, "whole": {"dynamics": "block", "block_attention": "whole"},
    "merged and refined": {"dynamics": "block", "merge": 2, "refine": 2, "stay": 4.0},
    "gru": {"dynamics": "gru"}, "gru, all": {"dynamics": "gru", "recurrent": True, "place_attention": 1},
    "frames": {"dynamics": "frames"}, "action alone": {"dynamics": "frames", "history": 0},
    "frames and memory": {"dynamics": "frames", "history": 1, "recurrent": True},
}  # fmt: skip


# A quantiser is the tokenizer's own affair: each meets every tokenizer, and every tokenizer all dynamics.
EVERY = [
    (tokenizer, quantizer, dynamics)
    for (i, tokenizer), (j, quantizer), (k, dynamics) in product(
        enumerate(TOKENIZERS | PAIRS), enumerate(QUANTIZERS), enumerate(DYNAMICS)
    )
    if j == (i + k) % len(QUANTIZERS)
]


@pytest.mark.parametrize(("tokenizer", "quantizer", "dynamics"), EVERY)
def test_any_tokenizer_goes_with_any_dynamics(tokenizer: str, quantizer: str, dynamics: str) -> None:
    torch.manual_seed(0)
    parts = (TOKENIZERS | PAIRS)[tokenizer] | QUANTIZERS[quantizer] | DYNAMICS[dynamics]
    model, batch = replace(TOY, **parts).build(SPEC), segments(SPEC, 3, 5)
    model.prepare(to_unit(batch.frame).flatten(0, 1))
    seeing, sequence = model.stages()
    see, predicting = seeing.objectives[0], sequence.objectives[0]
    assert sequence.encode is not None
    trainer = Trainer([see, predicting], device=torch.device("cpu"), precision="fp32")
    first = None
    for _ in range(3):
        trainer.update(see, segments(SPEC, 3, seeing.length))
        with torch.no_grad():
            code = torch.stack([sequence.encode(to_unit(one), batch.action[0]) for one in batch.frame])
        trainer.update(predicting, batch._replace(code=code.float()))
        first = first or trainer.report()
    last = trainer.report()
    assert set(first or {}) == set(last) and "world_model/tokens" in last
    assert all(parameter.grad is not None for parameter in predicting.params), "all of it learns"

    frame, action = to_unit(batch.frame[:2]), batch.action[:2]
    with torch.no_grad():
        state = model.start(frame[:, :3], action)
        step = model.step(state, action[:, 2], temperature=0)
        assert_close(step.state.latent, model.imagine(model.advance(state, action[:, 2]), 0).latent)
        alone = model.step(model.start(frame[1:2, :3], action[1:2]), action[1:2, 2], temperature=0)
        assert torch.equal(alone.state.latent[0], step.state.latent[1])
        shown = model.decode(step.state)
        seen = model.step(state, action[:, 2], frame[:, 3]).state
    assert shown is not None and shown.shape == (2, *SPEC.frame)
    assert torch.equal(seen.latent, model.encode(frame[:, 3], frame[:, 2]))
    assert model.features(seen).shape == (2, model.feature_size)


def test_only_the_first_code_learns_to_tell_the_action() -> None:
    """The gradient of the rest's reader is turned round: what makes it right there makes the latents worse for it."""
    torch.manual_seed(0)
    apart = {"tokens_of": "pair", "positions": 3, "codes": 16, "action_codes": 4, "label_scale": 1.0}
    model = replace(TOY, **apart).build(SPEC)  # type: ignore[arg-type]
    (stage, _), batch = model.stages(), segments(SPEC, 3, 2)
    assert isinstance(model.tokenizer, PairTokenizer) and model.other_label is not None and model.played_codes == 4
    tokens = model.encode(to_unit(batch.frame[:, 1]), to_unit(batch.frame[:, 0]))
    assert (tokens[:, 0] < 4).all() and (tokens[:, 1:] >= 4).all()
    terms = stage.objectives[0].loss(batch).terms
    bias = model.tokenizer.to_codes.bias
    by_name = {
        name: torch.autograd.grad(terms[name].value.sum(), bias, retain_graph=True)[0].view(3, 8) for name in
        ("label", "other_label")
    }  # fmt: skip
    codes = model.tokenizer.embedding(tokens).detach().requires_grad_()
    said = model.other_label(codes[:, 1:].flatten(1))
    lost = F.cross_entropy(said, batch.action[:, 0], reduction="sum")
    (plain,) = torch.autograd.grad(lost, codes)
    assert by_name["label"][0].any() and not by_name["label"][1:].any()
    assert_close(by_name["other_label"], -plain.sum(0))
    for wrong, words in (({"label_scale": 0.0}, "learn from the actions"), ({"positions": 1}, "at least 2")):
        with pytest.raises(ValueError, match=words):
            replace(TOY, **(apart | wrong)).build(SPEC)  # type: ignore[arg-type]


def test_a_flow_goes_from_the_last_frame_to_where_the_decoder_says_it_ends() -> None:
    """Euler's steps by hand; a decoder that tells the end rightly from anywhere arrives there exactly."""
    torch.manual_seed(0)
    tokenizer = replace(TOY, tokens_of="pair", flow_steps=4).tokenizer.build(SPEC.frame)
    assert isinstance(tokenizer, PairTokenizer)
    before, codes = torch.rand(2, 1, *SPEC.frame), torch.randn(2, tokenizer.tokens, 8)
    with torch.no_grad():
        x = before[:, -1]
        for step in range(4):
            end = tokenizer.drawn(before, codes, x, torch.full((2,), step / 4))
            x = x + 0.25 * (end - x) / (1 - step / 4)
        assert_close(tokenizer.picture(before, codes), x)
    end, times = torch.rand(2, *SPEC.frame), []

    def drawn(before: Tensor, codes: Tensor, under_way: Tensor, time: Tensor) -> Tensor:
        times.append(float(time[0]))
        assert_close(under_way, before[:, -1].lerp(end, times[-1]), rtol=0, atol=1e-5)
        return end

    tokenizer.drawn = drawn  # type: ignore[method-assign, assignment]
    assert_close(tokenizer.picture(before, codes), end)
    assert times == [0, 0.25, 0.5, 0.75]


def test_what_follows_an_unknown_action_is_not_learned() -> None:
    """Of transitions whose action is unknown nothing reaches the dynamics, and the tokenizer reads no label."""
    torch.manual_seed(0)
    few = {"tokens_of": "pair", "positions": 1, "codes": 4, "label_scale": 1.0, "dynamics": "frames", "history": 0}
    batch = segments(SPEC, 3, 5)
    for labels, learned in ((0.0, False), (1.0, True)):
        model = replace(TOY, **few, labels=labels).build(SPEC)  # type: ignore[arg-type]
        seeing, sequence = model.stages()
        code = torch.stack([sequence.encode(to_unit(one), batch.action[0]) for one in batch.frame])  # type: ignore[misc]
        said = sequence.objectives[0].loss(batch._replace(code=code.float()))
        assert all(bool(term.value.any()) == learned for term in said.terms.values())
        seen = seeing.objectives[0].loss(segments(SPEC, 3, seeing.length))
        assert bool(seen.terms["label"].value.any()) == learned and seen.terms["weighted_pixels"].value.any()
        state = model.start(to_unit(batch.frame[:2, :3]), batch.action[:2])
        if not learned:
            assert model.step(state, batch.action[:2, 2]).cont.tolist() == [1.0, 1.0], "no ending that nobody taught"
    known = replace(TOY, **few, labels=0.3).build(SPEC)._known(torch.randint(256, (400, 5, *SPEC.frame)).byte())  # type: ignore[arg-type]
    assert 0.25 < float(known.mean()) < 0.35
    with pytest.raises(ValueError, match="one action alone"):
        replace(TOY, labels=0.5).build(SPEC)

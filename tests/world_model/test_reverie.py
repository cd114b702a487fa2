"""`reverie` alone: which index each loss term belongs to, what its memories reach, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from envs.spec import Spec
from tests.toys import Lost, like, lost, mix, segments
from world_model.interface import Batch
from world_model.parts.dynamics import GRU, Transformer
from world_model.reverie import PART, PixelLoss, Reverie, ReverieConfig, capped

SPEC = Spec((1, 32, 32), 3, True)
TOY = ReverieConfig(groups=4, classes=4, points=1, deter=32, hidden=32, channels=8)


def build(**changes: object) -> Reverie:
    """With noise on every parameter, because outputs that start at 0 depend on nothing."""
    torch.manual_seed(0)
    model = replace(TOY, **changes).build(SPEC)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def lose(model: Reverie, batch: Batch) -> Lost:
    torch.manual_seed(0)
    return lost(model.loss(batch), batch)


@pytest.mark.parametrize("dynamics", ["gru", "transformer"])
@pytest.mark.parametrize("now", [0, 3])
def test_terms_at_t_are_told_by_frames_up_to_t(dynamics: str, now: int) -> None:
    """Stricter than the contract: what an action brought is told where it arrived, so no term looks one index ahead."""
    model, batch = build(dynamics=dynamics), segments(SPEC, 3, 8)
    time = torch.arange(8).expand(3, 8)
    future = mix(batch, like(batch, 1), valid=time <= now, has_action=time < now)
    real, other = lose(model, batch).terms, lose(model, future).terms
    for name, term in real.items():
        assert_close(other[name][:, : now + 1], term[:, : now + 1], msg=name)
        if name not in ("dyn", "rep"):  # which free nats may hold still
            assert not torch.allclose(other[name][:, now + 1 :], term[:, now + 1 :]), name


def test_reward_and_ending_are_told_one_index_later() -> None:
    """With untrained heads the loss is a known function of the target alone: it shows which target an index has."""
    model, batch = build(), segments(SPEC, 3, 8)
    with torch.no_grad():
        for parameter in (*model.reward.parameters(), *model.cont.parameters()):
            parameter.zero_()
        logits = torch.linspace(-3, 3, model.twohot.count)
        list(model.cont.parameters())[-1].fill_(2.0)
        list(model.reward.parameters())[-1].copy_(logits)
    terms = lose(model, batch).terms
    for b in range(3):
        for t in range(8):
            arrived = t > 0 and bool(batch.has_action[b, t - 1]) and bool(batch.valid[b, t])
            reward = model.twohot.loss(logits, batch.reward[b, t - 1]) if arrived else torch.tensor(0.0)
            goes_on = F.logsigmoid(torch.tensor(-2.0 if batch.terminated[b, t - 1] else 2.0))
            assert_close(terms["reward"][b, t], reward)
            assert_close(terms["cont"][b, t], -goes_on if arrived else torch.tensor(0.0))


def test_an_ending_is_told_before_its_frame_is_seen() -> None:
    """A latent drawn at a low temperature never shows an ending whose moment is uncertain."""
    model, batch = build(), segments(SPEC, 3, 8)
    other = batch._replace(frame=torch.cat([batch.frame[:, :-1], 255 - batch.frame[:, -1:]], 1))
    real, changed = lose(model, batch).terms, lose(model, other).terms
    assert_close(changed["cont"], real["cont"])
    assert not torch.allclose(changed["reward"][:, -1], real["reward"][:, -1])  # which the latent may show


def test_a_share_of_the_rewards_loss_has_dreamed_latents() -> None:
    """Which know nothing of the frame that arrived."""
    batch = segments(SPEC, 3, 8)
    other = batch._replace(frame=torch.cat([batch.frame[:, :-1], 255 - batch.frame[:, -1:]], 1))
    found = {}
    for share in (0.0, 0.5, 1.0):
        model = build(dreamed_reward=share)
        found[share] = [lose(model, one).terms["reward"] for one in (batch, other)]
    assert_close(found[1.0][0][:, -1], found[1.0][1][:, -1])
    assert not torch.allclose(found[0.0][0][:, -1], found[0.0][1][:, -1])
    assert not torch.allclose(found[0.0][0], found[1.0][0])
    assert_close(found[0.5][0], (found[0.0][0] + found[1.0][0]) / 2)


def test_the_pixels_loss_is_half_the_emphasised_squared_error() -> None:
    frames = (2, PART - 1, *SPEC.frame)  # parts that do not divide them
    picture, target, outer = torch.randn(frames, requires_grad=True), torch.randn(frames), torch.rand(frames[:2])
    emphasis = 1 + 3 * target.abs().amax(2, keepdim=True)
    wanted = 0.5 * ((picture - target).square() * emphasis).sum((2, 3, 4))
    made = PixelLoss.apply(picture, target, 3.0)
    assert_close(made, wanted)
    (slope,) = torch.autograd.grad((made * outer).sum(), picture)
    assert_close(slope, torch.autograd.grad((wanted * outer).sum(), picture)[0])


def test_no_frame_counts_more_than_so_many_of_the_median_that_is_valid() -> None:
    loss = torch.tensor([[1.0, 2.0, 3.0], [100.0, 900.0, 4.0]], requires_grad=True)
    valid = torch.tensor([[True, True, True], [True, False, True]])  # 1, 2, 3, 4 and 100
    made = capped(loss, 4.0, valid)
    assert_close(made, torch.tensor([[1.0, 2.0, 3.0], [12.0, 12.0, 4.0]]))
    (slope,) = torch.autograd.grad(made.sum(), loss)
    assert_close(slope, torch.tensor([[1.0, 1.0, 1.0], [0.12, 12 / 900, 1.0]]))
    assert_close(capped(loss * 0, 4.0, valid), torch.zeros(2, 3))


def test_a_flashing_screen_costs_as_much_as_it_may() -> None:
    batch = segments(SPEC, 3, 8)
    flashing = batch._replace(frame=batch.frame.clone())
    flashing.frame[1, 4] = 255
    free, held = (silent(build(frame_cap=cap)) for cap in (0.0, 2.0))
    pixels = [lose(model, flashing).terms["pixels"].detach() for model in (free, held)]
    median = pixels[0][flashing.valid].median()
    assert pixels[0][1, 4] > 2.5 * median
    assert_close(pixels[1][1, 4], 2 * median)
    assert_close(pixels[1][0], pixels[0][0].clamp(max=2 * float(median)))


def silent(model: Reverie) -> Reverie:
    """The same model with a decoder that always draws the background."""
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.zero_()
    return model


def test_the_background_is_the_median_frame_and_costs_nothing() -> None:
    model, frame = silent(build()), segments(SPEC, 5, 4).frame[:, :1] / 255
    model.prepare(frame.flatten(0, 1))
    assert_close(model.background, frame.flatten(0, 1).median(0).values)
    shown = model.decode(model.start(frame))
    assert_close(shown, model.background.expand_as(shown))
    still = segments(SPEC, 2, 4)
    still = still._replace(frame=(model.background * 255).round().byte().expand(2, 4, *SPEC.frame))
    assert_close(lose(model, still).terms["pixels"], torch.zeros(2, 4), rtol=0, atol=0.01)


def test_a_ball_of_four_pixels_is_worth_more_than_a_nat() -> None:
    """Under a free nat nobody would draw it: the pixel likelihood must be narrow enough for small things to survive."""
    model = silent(build(pixel_sigma=ReverieConfig().pixel_sigma))
    model.prepare(torch.zeros(1, *SPEC.frame))
    batch = segments(SPEC, 2, 4)
    frame = torch.zeros(2, 4, *SPEC.frame, dtype=torch.uint8)
    frame[0, :, 0, 5:7, 8:10] = 150
    pixels = lose(model, batch._replace(frame=frame)).terms["pixels"]
    assert (pixels[0] > 10 * TOY.free_nats).all() and not pixels[1].any()


def reached_by(model: Reverie, term: str) -> set[str]:
    """The parts of a model into which the gradient of a loss term flows."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    total = lose(model, segments(SPEC, 3, 6)).terms[term].sum()
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return {name.split(".")[0] for name, g in zip(names, gradients, strict=True) if g is not None and g.any()}


def test_each_side_of_the_kl_moves_its_own_side() -> None:
    tight = build(free_nats=0.0)
    assert {"prior", "dynamics"} <= reached_by(tight, "dyn")
    assert reached_by(tight, "rep") == {"encoder"}
    encoder = [p for name, p in tight.named_parameters() if name.startswith("encoder")]
    first = segments(SPEC, 3, 6)  # at index 0 no memory carries the encoder's latents into the prior
    total = lose(tight, first).terms["dyn"][:, 0].sum()
    assert not any(g is not None and g.any() for g in torch.autograd.grad(total, encoder, allow_unused=True))


def test_free_nats_hold_the_kl_still() -> None:
    free, batch = build(free_nats=1e6), segments(SPEC, 3, 6)
    for term in ("dyn", "rep"):
        assert_close(lose(free, batch).terms[term], 1e6 * batch.valid.float())
        assert not reached_by(free, term)


def test_learning_lowers_what_it_should() -> None:
    model, batch = build(), segments(SPEC, 3, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    first = {name: term.mean().item() for name, term in lose(model, batch).terms.items()}
    for _ in range(60):
        optimizer.zero_grad()
        torch.stack([term.mean() for term in lost(model.loss(batch), batch).terms.values()]).sum().backward()
        optimizer.step()
    last = {name: term.mean().item() for name, term in lose(model, batch).terms.items()}
    assert last["pixels"] < 0.7 * first["pixels"] and last["reward"] < 0.7 * first["reward"]
    assert last["cont"] < 0.7 * first["cont"]


def outputs(dynamics: GRU | Transformer, x: Tensor) -> Tensor:
    """What the memory says after each input, one at a time: (B, T, D)."""
    memory, said = dynamics.initial(x.shape[0]), []
    for t in range(x.shape[1]):
        memory = dynamics.step(memory, x[:, t])
        said.append(dynamics.output(memory))
    return torch.stack(said, 1)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 13])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_cache_equals_the_parallel_pass_at_any_length(length: int, layers: int) -> None:
    torch.manual_seed(0)
    dynamics, x = Transformer(6, 16, layers=layers, heads=2, window=4), torch.randn(2, length + 6, 6)
    said = outputs(dynamics, x)
    memory = dynamics.scan(x[:, :length])
    assert_close(memory["h"][:, 1:], said[:, : length - 1])
    assert not memory["h"][:, 0].any()
    for start in range(length):  # from every moment of the pass it goes on as if it had come there step by step
        here = {name: leaf[:, start] for name, leaf in memory.items()}
        for t in range(start, length + 6):
            here = dynamics.step(here, x[:, t])
            assert_close(here["h"], said[:, t])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_steps_in_a_memory_of_ones_own_copy_no_cache(kind: torch.dtype) -> None:
    """1,024 dreams of STORM's size have 270 MB of keys and values."""
    torch.manual_seed(0)
    dynamics, x = Transformer(6, 16, layers=2, heads=2, window=4), torch.randn(2, 9, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
        memory = own = dynamics.own(dynamics.initial(2))
        for t in range(9):
            memory = dynamics.step(memory, x[:, t])
            for one, other in zip(memory["k"] + memory["v"], own["k"] + own["v"], strict=True):
                assert one.dtype == kind and one.data_ptr() == other.data_ptr()


def test_one_layer_sees_exactly_its_window() -> None:
    torch.manual_seed(0)
    dynamics, x = Transformer(6, 16, layers=1, heads=2, window=4), torch.randn(1, 10, 6)
    said, other = outputs(dynamics, x), x.clone()
    other[:, 3] += 1
    changed = [not torch.allclose(a, b) for a, b in zip(said[0], outputs(dynamics, other)[0], strict=True)]
    assert changed == [3 <= t < 3 + 4 for t in range(10)]


def test_positions_are_relative() -> None:
    """Rows of different ages stand in one batch: the same last inputs say the same, however long ago it began."""
    torch.manual_seed(0)
    dynamics, x = Transformer(6, 16, layers=1, heads=2, window=4), torch.randn(1, 9, 6)
    assert_close(outputs(dynamics, x)[:, -1], outputs(dynamics, x[:, -4:])[:, -1])
    swapped = x[:, [0, 1, 2, 3, 4, 5, 7, 6, 8]]
    assert not torch.allclose(outputs(dynamics, swapped)[:, -1], outputs(dynamics, x)[:, -1]), "order matters"


def test_a_gru_starts_out_remembering_and_stays_bounded() -> None:
    torch.manual_seed(0)
    dynamics = GRU(6, 16)
    said = outputs(dynamics, 100 * torch.randn(2, 50, 6))
    assert said.abs().max() <= 1
    with torch.no_grad():
        dynamics.norm.weight.zero_()
        dynamics.norm.bias.copy_(torch.tensor([0.0, 20.0, 0.0]).repeat_interleave(16))
    # gates are constant: candidate tanh(sigmoid(0) * 20) = 1, update sigmoid(-1): h = 1 - (1 - sigmoid(-1)) ** t
    keep = 1 - torch.sigmoid(torch.tensor(-1.0))
    assert_close(outputs(dynamics, torch.randn(1, 3, 6))[0, :, 0], 1 - keep ** torch.arange(1, 4))


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"dynamics": "lstm"}, "gru.*transformer.*lstm"), ({"groups": 33}, "1 to 32"), ({"groups": 0}, "1 to 32"),
     ({"points": 2}, "two of the 4 groups"),
     ({"dynamics": "transformer", "heads": 5}, "heads")],
)  # fmt: skip
def test_what_cannot_be_built_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build(**changes)


def test_what_is_hardly_there_is_shown_as_background() -> None:
    model = build()
    model.prepare(torch.rand(5, 1, 32, 32) * 0.4 + 0.3)
    state = model.start(torch.rand(6, 1, 1, 32, 32))
    raw = (model.decoder(state.latent.flatten(-2)).float() * model.sigma).abs().detach()
    model.config = replace(model.config, faint=float(raw.median()))
    apart, shown = (model.decode(state) - model.background).abs(), raw >= raw.median()
    assert (apart[~shown] == 0).all() and (apart[shown] > 0).all()

"""`world_models` alone: the paper's counts, what each loss term tells, and who learns from what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from agent.trainer import Trainer
from envs.spec import Spec
from tests.toys import Lost, like, lost, mix, segments
from world_model.interface import Batch, Objective, State, to_unit
from world_model.parts.vae import kl_from_normal
from world_model.world_models import LSTM, WON, WorldModels, WorldModelsConfig

SPEC, CAR = Spec((3, 64, 64), 4, True), Spec((3, 64, 64), 3, False)
TOY = WorldModelsConfig(z=6, channels=4, hidden=16, mixtures=3, heads=8, memory_length=8)
B, T = 3, 8


def build(spec: Spec = SPEC, **changes: object) -> WorldModels:
    """With noise on every parameter, because outputs that start at 0 depend on nothing."""
    torch.manual_seed(0)
    model = replace(TOY, **changes).build(spec)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def objectives(model: WorldModels) -> dict[str, Objective]:
    return {objective.name: objective for stage in model.stages() for objective in stage.objectives}


def seen(model: WorldModels, batch: Batch) -> Batch:
    """The batch as the memory's loss reads it."""
    encode = model.stages()[1].encode
    assert encode is not None
    rows = zip(to_unit(batch.frame), batch.action, strict=True)
    return batch._replace(code=torch.stack([encode(frame, action[:-1]) for frame, action in rows]))


def certain(batch: Batch) -> Batch:
    """Latents without any variance, so that a draw is the mean."""
    assert batch.code is not None
    mean, log_var = batch.code.chunk(2, -1)
    return batch._replace(code=torch.cat([mean, torch.full_like(log_var, -60)], -1))


def latents(batch: Batch) -> Tensor:
    """The means (B, T, Z) of a batch's codes."""
    assert batch.code is not None
    return batch.code[..., :6]


def lose(model: WorldModels, name: str, batch: Batch) -> Lost:
    torch.manual_seed(0)
    return lost(objectives(model)[name].loss(batch), batch)


def reached(model: WorldModels, term: Tensor) -> set[str]:
    """The parts of a model into which the gradient of a loss term flows."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(term.sum(), parameters, allow_unused=True, retain_graph=True)
    touched = {name for name, g in zip(names, gradients, strict=True) if g is not None and g.any()}
    return {".".join(name.split(".")[: 2 if name.startswith("vae") else 1]) for name in touched}


def test_the_counts_are_the_paper_s() -> None:
    model = WorldModelsConfig().build(CAR)
    memory = [*model.lstm.parameters(), *model.expect.parameters()]
    assert sum(p.numel() for p in memory) == 422_368
    assert sum(p.numel() for p in model.vae.parameters()) == 4_348_547
    assert model.feature_size == 288 and 3 * model.feature_size + 3 == 867
    assert WorldModelsConfig(features="z").build(CAR).feature_size == 32


def test_the_controller_sees_what_was_asked_for() -> None:
    frame, action = torch.rand(B, T, 3, 64, 64), torch.zeros(B, T, dtype=torch.long)
    for features, width in (("zh", 22), ("z", 6)):
        model = build(features=features)
        state = model.start(frame, action)
        assert model.features(state).shape == (B, model.feature_size) == (B, width)
        assert_close(model.features(state)[:, :6], model.vae.encode(frame[:, -1])[0])


@pytest.mark.parametrize("spec", [SPEC, CAR], ids=["discrete", "continuous"])
def test_one_pass_equals_stepping(spec: Spec) -> None:
    model, batch = build(spec), segments(spec, B, T)
    with torch.no_grad():
        latent = model.encode(batch.frame / 255)
        every = model.lstm.scan(model.inputs(latent, batch.action))
        for t in range(1, T + 1):
            state = model.start(batch.frame[:, :t] / 255, batch.action[:, : t - 1])
            assert_close(({key: leaf[:, t - 1] for key, leaf in every.items()}), state.memory)
            assert_close(latent[:, t - 1], state.latent)


def test_the_fused_pass_equals_stepping() -> None:
    torch.manual_seed(0)
    lstm, x = LSTM(5, 16), torch.randn(2, T, 5)
    memory, said = lstm.initial(2), []
    for t in range(T):
        memory = lstm.step(memory, x[:, t])
        said.append(memory["h"])
    assert_close(lstm.outputs(x), torch.stack(said, 1))
    assert_close(lstm.scan(x)["h"][:, 1:], lstm.outputs(x)[:, :-1])
    assert not lstm.scan(x)["h"][:, 0].any()


def test_a_memory_starts_out_remembering() -> None:
    lstm = LSTM(5, 16)
    with torch.no_grad():
        lstm.weights[0][:, :-1] = 0
        lstm.weights[1].zero_()
    memory = {"h": torch.zeros(1, 16), "c": torch.ones(1, 16)}
    assert_close(lstm.step(memory, torch.randn(1, 5))["c"], torch.ones(1, 16).sigmoid())


def test_a_dream_draws_from_the_mixture() -> None:
    model = build()
    state = model.start(torch.rand(1, 1, 3, 64, 64))
    many = State(state.latent.expand(4000, 6), {key: leaf.expand(4000, 16) for key, leaf in state.memory.items()})
    with torch.no_grad():
        step = model.step(many, torch.ones(4000, dtype=torch.long))
        mixture = model.mixture({key: leaf[:1] for key, leaf in step.state.memory.items()})
        mean = (mixture.log_weights.exp() * mixture.mean).sum(-1)
        assert_close(step.state.latent.mean(0), mean[0], rtol=0, atol=0.15)
        still = model.imagine(step.state.memory, 0).latent
    assert_close(still, still[:1].expand(4000, 6))


def test_what_the_memory_is_told_and_when() -> None:
    """Each term against stepping by hand: the surprise, reward and ending of having arrived at t stand at t."""
    model, batch = build(), segments(SPEC, B, T)
    batch = certain(seen(model, batch))
    terms = lose(model, "memory", batch).terms
    z, memory = latents(batch), model.initial(B)
    for t in range(T):
        if t:
            memory = model.advance(State(z[:, t - 1], memory), batch.action[:, t - 1])
            arrived = batch.valid[:, t] & batch.has_action[:, t - 1]
            reward, cont = model.outcome(State(z[:, t], memory))
            goes_on = 1.0 - batch.terminated[:, t - 1].float()
            exact = {
                "nll": -model.mixture(memory).log_prob(z[:, t]).mean(-1),
                "reward": (reward - batch.reward[:, t - 1]).square(),
                "cont": F.binary_cross_entropy(cont, goes_on, reduction="none"),
            }
        for name, term in terms.items():
            assert_close(term[:, t], exact[name] * arrived if t else torch.zeros(B), msg=f"{name} {t}")


@pytest.mark.parametrize("now", [0, 3])
def test_terms_at_t_are_told_by_frames_up_to_t(now: int) -> None:
    model = build()
    batch = seen(model, segments(SPEC, B, T))
    time = torch.arange(T).expand(B, T)
    future = mix(batch, like(batch, 1), valid=time <= now, has_action=time < now)
    real, other = lose(model, "memory", batch).terms, lose(model, "memory", future).terms
    for name, term in real.items():
        assert_close(other[name][:, : now + 1], term[:, : now + 1], msg=name)
        assert not torch.allclose(other[name][:, now + 1 :], term[:, now + 1 :]), name


def test_latents_are_drawn_anew_for_every_batch() -> None:
    model = build()
    batch = seen(model, segments(SPEC, B, T))
    loss = objectives(model)["memory"].loss
    assert not torch.allclose(loss(batch).terms["nll"].value, loss(batch).terms["nll"].value)


@pytest.mark.parametrize("unit", [1.0, 50.0])
def test_the_pull_of_a_reward_does_not_depend_on_its_unit(unit: float) -> None:
    """With a head that says 0: the term is the squared reward, its gradient what it would be in any other unit."""
    model, batch = build(), segments(SPEC, B, T)
    last = model.reward[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.zero_()
    batch = certain(seen(model, batch._replace(reward=unit * batch.reward)))
    term = lose(model, "memory", batch).terms["reward"]
    arrived = F.pad(batch.valid[:, 1:] & batch.has_action[:, :-1], (1, 0))
    reward = F.pad(batch.reward[:, :-1], (1, 0)) * arrived
    assert_close(term, reward.square())
    (gradient,) = torch.autograd.grad(term.sum(), last.bias)
    assert_close(gradient, (-2 * reward.sum() / (reward.square().sum() / arrived.sum())).reshape(1))


def test_the_mean_of_a_random_reward_is_not_biased() -> None:
    """Nothing tells when the 10 comes: a lap is the sum of many such rewards, and their mean is what must be right."""
    torch.manual_seed(0)
    model, batch = build(), segments(SPEC, 16, T)
    reward = 10.0 * (torch.rand(16, T) < 0.2)
    batch = certain(seen(model, batch))._replace(
        reward=reward, valid=torch.ones(16, T, dtype=torch.bool), has_action=torch.ones(16, T, dtype=torch.bool)
    )
    batch = batch._replace(code=torch.full((16, T, 12), -60.0))  # every frame the same
    optimizer = torch.optim.Adam(model.reward.parameters(), lr=1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        lose(model, "memory", batch).terms["reward"].mean().backward()
        optimizer.step()
    with torch.no_grad():
        z, memory, said = latents(batch), model.initial(16), []
        for t in range(T - 1):
            memory = model.advance(State(z[:, t], memory), batch.action[:, t])
            said.append(model.outcome(State(z[:, t + 1], memory))[0])
    assert_close(torch.stack(said).mean(), reward[:, :-1].mean(), rtol=0.05, atol=0)


def test_a_reward_that_few_batches_hold_is_not_biased() -> None:
    """Three batches of four hold none: measured in its own rewards, each of those would outweigh the fourth by far."""
    model = build(memory_lr=1e-2)
    batch = certain(seen(model, segments(SPEC, 16, T)))
    real = torch.ones(16, T, dtype=torch.bool)
    batch = batch._replace(valid=real, has_action=real, code=torch.full((16, T, 12), -60.0))
    full = batch._replace(reward=10.0 * (torch.rand(16, T) < 0.2))
    empty = batch._replace(reward=torch.zeros(16, T))
    trainer = Trainer(objectives(model).values(), device=torch.device("cpu"), precision="fp32")
    said = []
    for update in range(400):
        losses = trainer.update(objectives(model)["memory"], empty if update % 4 else full)
        if update >= 300 and update % 4:  # of no reward the term is the square of what was said
            said.append(losses.terms["reward"].value[:, 1:].detach().sqrt().mean())
    assert_close(torch.stack(said).mean(), full.reward[:, :-1].mean() / 4, rtol=0.3, atol=0)


def test_a_checkpoint_from_before_rewards_were_noted_loads() -> None:
    model = build()
    state = model.state_dict()
    del state["reward_square"]
    model.load_state_dict(state)
    assert not model.reward_square.any()


def test_vision_is_squared_error_and_a_kl_with_a_floor() -> None:
    model, batch = build(free_nats=0.0), segments(SPEC, B, 2)
    terms = lose(model, "vision", batch).terms
    mean, log_var = model.vae.encode(batch.frame / 255)
    torch.manual_seed(0)
    z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
    error = (model.vae.decode(z) - batch.frame / 255).square().sum((-3, -2, -1))
    kl = kl_from_normal(mean, log_var).sum(-1)
    assert_close(terms, {"pixels": error * batch.valid, "kl": kl * batch.valid})
    assert reached(model, terms["kl"]) == {"vae.convs", "vae.mean", "vae.log_var"}
    free = build(free_nats=1e5)
    terms = lose(free, "vision", batch).terms
    assert_close(terms["kl"], 6e5 * batch.valid.float())
    assert not reached(free, terms["kl"])


def test_who_learns_from_what_in_a_vae_gan() -> None:
    """Larsen et al., algorithm 1: the encoder never learns to fool, the discriminator never learns to be fooled."""
    model, batch = build(vision="vae_gan", free_nats=0.0), segments(SPEC, B, 2)
    terms = lose(model, "vision", batch).terms
    encoder, decoder = {"vae.convs", "vae.mean", "vae.log_var"}, {"vae.inp", "vae.deconvs"}
    assert reached(model, terms["likeness"]) == encoder | decoder
    assert reached(model, terms["fooling"]) == decoder
    assert reached(model, terms["kl"]) == encoder
    for term in lose(model, "discriminator", batch).terms.values():
        assert reached(model, term) == {"discriminator"}


def test_decoder_and_discriminator_want_the_opposite() -> None:
    model, batch = build(vision="vae_gan", vision_lr=5e-3), segments(SPEC, 8, 2)
    trainer = Trainer(objectives(model).values(), device=torch.device("cpu"), precision="fp32")
    first, before = lose(model, "discriminator", batch).terms, lose(model, "vision", batch).terms["fooling"].mean()
    for _ in range(60):
        trainer.update(objectives(model)["discriminator"], batch)
    last, after = lose(model, "discriminator", batch).terms, lose(model, "vision", batch).terms["fooling"].mean()
    assert all(last[name].mean() < first[name].mean() for name in first)
    assert after > before, "what is told apart fools nobody"


def test_a_discriminator_that_has_won_waits() -> None:
    """Its loss is told as it is, but no longer followed."""
    model, batch = build(vision="vae_gan", vision_lr=1e-2), segments(SPEC, 8, 2)
    trainer = Trainer(objectives(model).values(), device=torch.device("cpu"), precision="fp32")
    for won in (False, True):
        for _ in range(100 * won):
            trainer.update(objectives(model)["discriminator"], batch)
        losses = lose(model, "discriminator", batch)
        loss = torch.stack([term.detach() for term in losses.terms.values()])[:, batch.valid].mean()
        assert bool(loss <= WON) == won and bool(losses.metrics["learns"]) != won
        assert all(bool(reached(model, term)) != won for term in losses.terms.values())


@pytest.mark.parametrize("vision", ["vae", "vae_gan"])
def test_every_parameter_has_one_objective(vision: str) -> None:
    model = build(vision=vision)
    found = [id(p) for objective in objectives(model).values() for p in objective.params]
    assert sorted(found) == sorted(id(p) for p in model.parameters())


def test_the_memory_learns_on_finished_latents() -> None:
    model = build(memory_updates=7, vision_updates=5, vision_batch=9, memory_batch=4)
    vision, memory = model.stages()
    assert (vision.updates, vision.batch_size, vision.length, vision.encode) == (5, 9, 1, None)
    assert (memory.updates, memory.batch_size, memory.length) == (7, 4, 8)
    batch = segments(SPEC, B, T)
    mean, log_var = model.vae.encode(batch.frame / 255)
    assert_close(seen(model, batch).code, torch.cat([mean, log_var], -1))
    terms = lose(model, "memory", seen(model, batch)).terms
    assert reached(model, sum(terms.values(), torch.zeros(B, T))) == {"lstm", "expect", "reward", "cont"}


def test_learning_lowers_what_it_should() -> None:
    model, batch = build(vision_lr=2e-3, memory_lr=3e-2), segments(SPEC, B, T)
    trainer = Trainer(objectives(model).values(), device=torch.device("cpu"), precision="fp32")
    for name, data in (("vision", batch), ("memory", certain(seen(model, batch)))):
        objective = objectives(model)[name]
        first = lose(model, name, data).terms
        for _ in range(150):
            trainer.update(objective, data)
        last = lose(model, name, data).terms
        for term in set(first) - {"kl"}:
            assert last[term].mean() < 0.8 * first[term].mean(), term


@pytest.mark.parametrize(
    ("spec", "changes", "says"),
    [(SPEC, {"vision": "gan"}, "vae.*vae_gan.*gan"),
     (SPEC, {"features": "h"}, 'zh.*"z".*"h"'), (SPEC, {"mixtures": 0}, "mixtures=0")],
)  # fmt: skip
def test_what_cannot_be_built_is_refused(spec: Spec, changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build(spec, **changes)

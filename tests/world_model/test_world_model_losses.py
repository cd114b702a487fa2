"""How every recipe is trained: named losses (B, T, ...) that read only what they may, and one owner for each parameter.

Shapes: B batch, T time. Losses draw from the default generator, so the same seed goes before each that is compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from agent.precision import lstm_in_bf16
from agent.trainer import reduce
from envs import settings
from tests.toys import VARIANTS, Lost, Variant, follow, like, lost, mix, rows, segments
from world_model import trees
from world_model.interface import Batch, Objective, State, WorldModel

B = 3


@pytest.fixture(params=VARIANTS, ids=str)
def variant(request: pytest.FixtureRequest) -> Variant:
    return request.param


def objectives(model: WorldModel) -> Iterator[tuple[Objective, Batch]]:
    """Each objective of each stage, with segments of about the length it asks for."""
    for stage in model.stages():
        batch = segments(model.spec, B, max(8, stage.length))  # the future of a single frame cannot leak
        if stage.encode:
            rows = zip(batch.frame / 255, batch.action, strict=True)
            batch = batch._replace(code=torch.stack([stage.encode(frame, action[:-1]) for frame, action in rows]))
        for objective in stage.objectives:
            yield objective, batch


def lose(objective: Objective, batch: Batch, seed: int = 0) -> Lost:
    torch.manual_seed(seed)
    return lost(objective.loss(batch), batch)


def gradients(model: nn.Module, objective: Objective, batch: Batch) -> list[torch.Tensor]:
    model.zero_grad()
    reduce(lose(objective, batch).terms, objective.scales).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in objective.params]


def test_every_parameter_has_one_objective(variant: Variant) -> None:
    agent = variant.agent()
    found = [p for stage in agent.world_model.stages() for objective in stage.objectives for p in objective.params]
    found += [p for objective in agent.learner.objectives() for p in objective.params]
    assert len(found) == len({id(p) for p in found}), "a parameter is in two objectives"
    owned = agent if agent.learner.objectives() else agent.world_model  # CMA-ES learns without gradients
    assert {id(p) for p in owned.parameters() if p.requires_grad} == {id(p) for p in found}


def test_what_is_declared_as_not_read_changes_nothing(variant: Variant) -> None:
    config = variant.config.model
    unread = {one.name: getattr(config, one.name) for one in fields(config) if settings.unread(config, one.name)}
    others = {name: another(config, name) for name in unread}
    assert all(others[name] != value for name, value in unread.items())
    changed = replace(variant, options=variant.options | others)
    models = [one.agent().world_model for one in (variant, changed)]
    assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)
    for (objective, batch), (other, same) in zip(objectives(models[0]), objectives(models[1]), strict=True):
        assert_close(lose(objective, batch).terms, lose(other, same).terms, rtol=0, atol=0)
        assert objective.scales == other.scales and objective.optim == other.optim


def another(config: Any, name: str) -> Any:
    """A value of a setting that is not the one it has."""
    value, rule = getattr(config, name), settings.declared(next(one for one in fields(config) if one.name == name))
    choices = rule.choices or get_args(get_type_hints(type(config))[name])
    if isinstance(value, bool):
        return not value
    if value is None:  # a number that is another setting's until it is given
        return rule.low
    if isinstance(value, tuple):
        return (*value, 3)
    if isinstance(value, str):
        return next(word for word in choices if word != value)
    high = value + 1 if rule.high is None else min(value + 1, rule.high)
    return high if high != value else value - (value - (rule.low or 0)) / 2


def test_objectives_have_names_of_their_own(variant: Variant) -> None:
    agent = variant.agent()
    stages = agent.world_model.stages()
    names = [objective.name for stage in stages for objective in stage.objectives]
    names += [objective.name for objective in agent.learner.objectives()]
    assert len(names) == len(set(names))


def test_terms_are_unreduced_and_every_one_has_a_scale(variant: Variant) -> None:
    model = variant.agent().world_model
    for objective, batch in objectives(model):
        losses = lose(objective, batch)
        assert losses.terms.keys() == objective.scales.keys()
        for name, term in losses.terms.items():
            assert term.shape[:2] == batch.valid.shape, name
            assert term.isfinite().all(), name
        for name, metric in losses.metrics.items():
            assert metric.shape == () and not metric.requires_grad, name
        if losses.states is not None:
            assert all(leaf.shape[:2] == batch.valid.shape for leaf in trees.leaves(losses.states))
            assert not any(leaf.requires_grad for leaf in trees.leaves(losses.states))


def test_a_loss_changes_nothing_but_gradients(variant: Variant) -> None:
    model = variant.agent().world_model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for objective, batch in objectives(model):
        copy = batch.rows(torch.arange(B))
        first, second = lose(objective, batch), lose(objective, batch)
        assert_close(first.terms, second.terms, rtol=0, atol=0)
        assert_close(batch, copy, rtol=0, atol=0)
    assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_the_gradient_reaches_every_parameter(variant: Variant) -> None:
    model = variant.agent().world_model
    names = {id(p): name for name, p in model.named_parameters()}
    for objective, batch in objectives(model):
        grads = gradients(model, objective, batch)
        dead = [names[id(p)] for p, g in zip(objective.params, grads, strict=True) if not g.abs().max() > 0]
        assert not dead
        assert all(gradient.isfinite().all() for gradient in grads)


def test_padding_has_no_influence(variant: Variant) -> None:
    model = variant.agent().world_model
    for objective, batch in objectives(model):
        other = mix(batch, like(batch, 1), valid=batch.valid, has_action=batch.has_action)
        assert not torch.equal(other.frame, batch.frame) and not torch.equal(other.reward, batch.reward)
        a, b = lose(objective, batch), lose(objective, other)
        for name, term in a.terms.items():
            assert (term[~batch.valid] == 0).all(), f"{name} counts padding"
            assert_close(b.terms[name], term, rtol=1e-4, atol=1e-4)
        assert_close(gradients(model, objective, other), gradients(model, objective, batch), rtol=1e-3, atol=1e-3)


def test_losses_hear_every_real_frame_action_reward_and_ending(variant: Variant) -> None:
    model = variant.agent().world_model
    for name in ("frame", "action", "reward", "terminated"):
        heard = False
        for objective, batch in objectives(model):
            code = {"code": batch.code.flip(1)} if name == "frame" and batch.code is not None else {}
            changed = batch._replace(**{name: getattr(batch, name).flip(1)}, **code)
            a, b = lose(objective, batch).terms, lose(objective, changed).terms
            heard |= any(not torch.allclose(a[term], b[term]) for term in a)
        assert heard, f"no loss depends on {name}"


def after(batch: Batch, now: int) -> Batch:
    """The batch with another future: other frames behind `now`, other actions and what they brought from `now` on."""
    time = torch.arange(batch.valid.shape[1])
    real, has_action = (times.expand(batch.valid.shape) for times in (time <= now, time < now))
    return mix(batch, like(batch, 1), valid=real, has_action=has_action)


def test_nothing_peeks_at_the_future(variant: Variant) -> None:
    """States at t know frames up to t. A term at t may at most tell what action[t] brought, which t + 1 shows."""
    model = variant.agent().world_model
    for objective, batch in objectives(model):
        for now in (2, batch.valid.shape[1] // 2):
            real, other = lose(objective, batch), lose(objective, after(batch, now))
            for name, term in real.terms.items():
                assert_close(other.terms[name][:, :now], term[:, :now], msg=name, rtol=1e-4, atol=1e-4)
            later = [(other.terms[name][:, now:], term[:, now:]) for name, term in real.terms.items()]
            assert any(not torch.allclose(changed, term) for changed, term in later)
            if real.states is None or other.states is None:
                continue
            for t in (0, now):
                at = (slice(None), t)
                known = [follow(model, rows(states, at), batch.action[:, :2]) for states in (real.states, other.states)]
                assert_close(known[0], known[1], rtol=1e-3, atol=1e-4)


def test_a_dream_can_go_on_from_the_states_of_a_loss(variant: Variant) -> None:
    """They are what stepping through their own latents gives: only the draw of the latent differs from observing."""
    model = variant.agent().world_model
    with torch.no_grad():
        for objective, batch in objectives(model):
            states = lose(objective, batch).states
            if states is None:
                continue
            memory = model.initial(B)
            for t in range(batch.valid.shape[1]):
                state: State = rows(states, (slice(None), t))
                stepped = State(state.latent, memory)
                known = [follow(model, stood, batch.action[:, t : t + 2]) for stood in (state, stepped)]
                assert_close(known[0], known[1], rtol=1e-3, atol=1e-4)
                memory = model.advance(stepped, batch.action[:, t])


def test_bfloat16_stays_close(variant: Variant) -> None:
    model = variant.agent().world_model
    if not lstm_in_bf16() and any(isinstance(part, nn.LSTM) for part in model.modules()):
        pytest.skip("this processor has no LSTM in bfloat16")
    for objective, batch in objectives(model):
        exact = lose(objective, batch).terms
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = lose(objective, batch).terms
        for name, term in mixed.items():
            assert term.dtype == torch.float32, name
            assert_close(term.mean(), exact[name].mean(), rtol=0.1, atol=0.05, msg=name)

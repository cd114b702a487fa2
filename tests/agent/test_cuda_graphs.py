"""Recorded updates: on a processor, by a recording of operators that is replayed as a CUDA graph is; and on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from agent import cuda_graphs, trainer
from agent.player import Agent
from agent.trainer import Trainer, rate, rate_of
from envs.errors import UserError
from policies.imagination import imagine
from tests import toys
from world_model.interface import Batch, Optim, Stage, State, to_unit

ROUNDS = cuda_graphs.WARMUP + 2
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "lift_fresh", "equal.default")


class Recording(TorchDispatchMode):
    """The operators of a piece of work, each with the tensors that it read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        asks = any(word in str(operator) for word in WAITS)
        asks |= "index" in str(operator) and any(
            isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in _pytree.tree_leaves(args[1:2])
        )
        if asks:
            raise RuntimeError(f"operation not permitted when stream is capturing: {operator}")
        # As they are seen now: what is turned in place later is the same memory, seen another way.
        seen = _pytree.tree_map_only(Tensor, torch.ops.aten.alias.default, (args, kwargs))
        made = operator(*args, **kwargs)
        self.done.append((operator, *seen, _pytree.tree_map_only(Tensor, torch.ops.aten.alias.default, made)))
        return made

    def replay(self) -> None:
        for operator, args, kwargs, made in self.done:
            if operator.is_view or torch.Tag.inplace_view in operator.tags:
                continue  # shows the same memory as before
            again = operator(*args, **kwargs)
            for old, new in zip(_pytree.tree_leaves(made), _pytree.tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class FakeGraph:
    """A CUDA graph on a processor."""

    kept: Callable[[], Sequence[Tensor]] = staticmethod(lambda: [])  # what a recording must leave as it is

    def __init__(self) -> None:
        self.recording = Recording()

    def replay(self) -> None:
        with torch.no_grad():
            self.recording.replay()


@contextmanager
def fake_capture(graph: FakeGraph, **_: Any) -> Iterator[None]:
    """As `torch.cuda.graph`: what happens within is remembered and not done."""
    tensors, rng = graph.kept(), torch.get_rng_state()
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        with graph.recording:
            yield
    finally:
        with torch.no_grad():
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(old)
        torch.set_rng_state(rng)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that has CUDA graphs."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", fake_capture)
    monkeypatch.setattr(trainer, "can_record", lambda device: True)


class Lesson:
    """World model and policy of a recipe, and batches that both ways of training see."""

    def __init__(self, variant: toys.Variant, device: str = "cpu", **options: Any) -> None:
        self.agent, self.variant = variant.agent().to(device), variant
        self.model, self.learner = self.agent.world_model, self.agent.learner
        self.stages = {stage.name: stage for stage in self.model.stages()}
        objectives = [*(one for stage in self.stages.values() for one in stage.objectives), *self.learner.objectives()]
        self.trainer = Trainer(objectives, device=torch.device(device), precision="fp32", **options)

    def tensors(self) -> list[Tensor]:
        optimizers = self.trainer.optimizers.values()
        states = [leaf for one in optimizers for state in one.state.values() for leaf in state.values()]
        rates = [group["lr"] for one in optimizers for group in one.param_groups]
        every = [*self.agent.parameters(), *self.agent.buffers(), *states, *rates, *self.trainer._taken.values()]
        return [leaf for leaf in every if isinstance(leaf, Tensor)]

    def batch(self, stage: Stage, number: int) -> Batch:
        batch = toys.segments(self.variant.spec, stage.batch_size, stage.length, seed=number)
        if stage.encode is not None:
            batch = batch.to(self.trainer.device)
            with torch.no_grad():
                codes = [
                    stage.encode(to_unit(frame), action[:-1])
                    for frame, action in zip(batch.frame, batch.action, strict=True)
                ]
            batch = batch._replace(code=torch.stack(codes))
        return batch

    def learn(self, name: str, number: int) -> None:
        stage = self.stages[name]

        def work(batch: Batch) -> None:
            for objective in stage.objectives:
                self.trainer.update(objective, batch)

        self.trainer.run(name, work, self.batch(stage, number), record=self.model.updates_are_graph_safe)

    def improve(self, number: int) -> None:
        if not (self.model.dreams_are_graph_safe and self.learner.updates_are_graph_safe):
            return
        batch = toys.segments(self.variant.spec, 8, 4, seed=100 + number).to(self.trainer.device)
        with torch.no_grad():
            states = self.model.start(to_unit(batch.frame), batch.action[:, :-1])

        def work(states: State) -> None:
            metrics = self.learner.improve(
                lambda policy: imagine(self.model, policy, states, horizon=3, temperature=0.5), self.trainer.update
            )
            self.trainer.note({f"policy/{key}": value for key, value in metrics.items()})

        self.trainer.run("policy", work, states, record=True)

    def rounds(self, count: int = ROUNDS) -> None:
        torch.manual_seed(3)
        for number in range(count):
            self.trainer.cool(1 - number / (2 * count))  # what a recording must ask for anew in every replay
            for name in self.stages:
                self.learn(name, number)
            self.improve(number)


def same(one: Agent, other: Agent, atol: float = 0.0) -> None:
    kept = [{**dict(agent.named_parameters()), **dict(agent.named_buffers())} for agent in (one, other)]
    for (name, mine), theirs in zip(kept[0].items(), kept[1].values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=atol, msg=name)


# It weighs frames by their whole batch, and so is none of the variants that keep the contract of a loss.
CAPPED = toys.Variant("reverie", {"frame_cap": 1.1}, True)
ONE_OF_EACH = list({variant.recipe: variant for variant in reversed(toys.VARIANTS) if variant.discrete}.values())
OTHERS = [variant for variant in toys.VARIANTS if variant.discrete and variant not in ONE_OF_EACH]
by_variant = pytest.mark.parametrize(
    "variant", [*ONE_OF_EACH, CAPPED, *(pytest.param(one, marks=pytest.mark.slow) for one in OTHERS)], ids=str
)
REVERIE = next(variant for variant in toys.VARIANTS if variant.recipe == "reverie")


def test_which_dreams_are_recorded() -> None:
    models = [(variant, variant.agent().world_model) for variant in toys.VARIANTS]
    assert all(model.updates_are_graph_safe for _, model in models)
    assert {variant.recipe for variant, model in models if not model.dreams_are_graph_safe} == {"iris", "iris_ac"}


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@by_variant
def test_a_replayed_update_is_the_update(variant: toys.Variant, fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, recorded = Lesson(variant, cuda_graphs=True), Lesson(variant, cuda_graphs=True)
    monkeypatch.setattr(FakeGraph, "kept", staticmethod(recorded.tensors))
    # oneDNN's LSTM does otherwise where no gradient is asked for, as in a replay.
    with torch.backends.mkldnn.flags(enabled=not variant.recipe.startswith("world_models")):
        with monkeypatch.context() as patch:
            patch.setattr(cuda_graphs, "WARMUP", ROUNDS)
            plain.rounds()
        recorded.rounds()

    assert not any(recorder.recorded for recorder, _ in plain.trainer._recorded.values())
    assert all(recorder.recorded for recorder, _ in recorded.trainer._recorded.values())
    assert plain.trainer.updates == recorded.trainer.updates
    assert {name: int(taken) for name, taken in recorded.trainer._taken.items()} == recorded.trainer.updates
    same(plain.agent, recorded.agent)
    told = recorded.trainer.report()
    for name, value in plain.trainer.report().items():
        assert told[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("variant", ONE_OF_EACH, ids=str)
def test_an_update_is_the_same_without_graphs(variant: toys.Variant, fake: None) -> None:
    """But for learning rates, of single precision on the device: a difference that grows with what is drawn."""
    plain, there = Lesson(variant), Lesson(variant, cuda_graphs=True)
    plain.rounds(1)
    there.rounds(1)
    same(plain.agent, there.agent, atol=1e-5)


def test_inputs_of_another_shape_are_worked_on_as_they_are(fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    lesson = Lesson(REVERIE, cuda_graphs=True)
    monkeypatch.setattr(FakeGraph, "kept", staticmethod(lesson.tensors))
    lesson.rounds()
    before = dict(lesson.trainer.updates)
    few = lesson.batch(lesson.stages["world_model"], 0).rows(torch.arange(2))
    lesson.trainer.run("world_model", lambda batch: None, few, record=True)  # the work is the first one's
    assert lesson.trainer.updates["world_model"] == before["world_model"] + 1


def test_what_cannot_be_recorded_is_said_with_the_way_out(fake: None) -> None:
    lesson = Lesson(REVERIE, cuda_graphs=True)

    def asks(batch: Batch) -> None:
        float(batch.reward.sum())

    batch = lesson.batch(lesson.stages["world_model"], 0)
    for _ in range(cuda_graphs.WARMUP):
        lesson.trainer.run("asks", asks, batch, record=True)
    with pytest.raises(UserError, match="train.cuda_graphs=false"):
        lesson.trainer.run("asks", asks, batch, record=True)


def test_a_checkpoint_goes_from_a_gpu_to_a_processor_and_back(fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, plain = Lesson(REVERIE, cuda_graphs=True), Lesson(REVERIE)
    monkeypatch.setattr(FakeGraph, "kept", staticmethod(recorded.tensors))
    recorded.rounds()
    saved = recorded.trainer.state_dict()
    plain.agent.load_state_dict(recorded.agent.state_dict())
    plain.trainer.load_state_dict(copy.deepcopy(saved))
    groups = plain.trainer.optimizers["actor"].param_groups
    assert all(isinstance(group["lr"], float) and not group["capturable"] for group in groups)
    recorded.trainer.load_state_dict(copy.deepcopy(saved))
    assert not recorded.trainer._recorded
    assert float(recorded.trainer._taken["actor"]) == recorded.trainer.updates["actor"] > 0
    plain.rounds(1)
    recorded.rounds(1)
    same(plain.agent, recorded.agent, atol=1e-5)  # a learning rate of Python's is in double precision


@pytest.mark.parametrize("optim", [Optim(warmup=0), Optim(warmup=10), Optim(warmup=3, decay=7)])
def test_the_learning_rate_is_the_same_on_the_device(optim: Optim) -> None:
    for update in (1, 2, 3, 7, 10, 50):
        assert float(rate_of(optim, torch.tensor(float(update)))) == pytest.approx(rate(optim, update), rel=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@by_variant
def test_on_a_gpu(variant: toys.Variant) -> None:
    """Sums of many numbers differ from run to run there, and with them what is drawn: the losses are compared."""
    here, plain, recorded = Lesson(variant), Lesson(variant, "cuda"), Lesson(variant, "cuda", cuda_graphs=True)
    for lesson in (here, plain, recorded):
        lesson.rounds(40)
    assert all(recorder.recorded for recorder, _ in recorded.trainer._recorded.values())
    told = recorded.trainer.report()
    for other in (plain, here):
        for name, value in other.trainer.report().items():
            if name.split("/")[0] in recorded.stages:
                assert told[name] == pytest.approx(value, rel=0.1, abs=0.02), name

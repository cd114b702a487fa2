"""The one trainer of every objective of every system: autocast, clipping, optimisers, metrics, finite checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from agent.cuda_graphs import Recorder, can_record
from agent.precision import mixed_precision
from agent.team import Team
from envs.settings import setting
from world_model import trees
from world_model.interface import Losses, Objective, Optim, Term
from world_model.trees import Tree


@dataclass(frozen=True)
class TrainConfig:
    """The schedule of the loop. Steps are agent steps of the real game.

    A round is: play, train each stage of the world model for its updates, train the policy for its own. An update is
    one batch through one stage, or one batch of dreams. In `reverie` a round has one of each.
    """

    policy: bool = setting(True, help="false: trains the world model alone, on random play and what init_replay names")
    steps_per_round: int = setting(
        16,
        1,
        help="agent steps of the real game a round (DreamerV3's train ratio: batch_size x length / this, in reverie)",
    )
    prefill: int = setting(
        10_000, 1, help="agent steps of random play before the first update (Stable-Baselines3: learning_starts)"
    )
    bursts: float = setting(
        0.0,
        0,
        0.9,
        help="exploration: share of the agent steps after the prefill that are played at random, in "
        "bursts of 32 steps on average; without it the world model sees its own policy alone",
    )
    pretrain: int = setting(
        1_000,
        0,
        help="updates of the first stage right after the prefill: of reverie's world model, of the "
        "tokenizer or VAE alone in the others",
    )
    cooldown: float = setting(
        0.0,
        0,
        1,
        resumable=True,
        help="share of `steps`, at the end, over which every learning rate falls linearly to 0",
    )
    burn_in: int = setting(
        8,
        0,
        10_000,
        help="real context frames before a state that imagination may start from (fewer only where a "
        "game begins); the world model's loss counts on them too",
    )
    at_start: float = setting(
        0.5,
        0,
        1,
        help="share of the imagined trajectories that begin at a game's first frame, where start "
        "states are drawn from the replay; not of reverie, whose start states are those of the "
        "training batch",
    )
    precision: str = setting(
        "auto",
        choices=("auto", "bf16", "fp32"),
        help="number format of the networks; auto: bfloat16 where the processor has it natively, else float32",
    )
    compile: bool = setting(False, help="compile the losses with torch.compile")
    cuda_graphs: bool = setting(
        True,
        resumable=True,
        help="on a GPU, capture updates once as CUDA graphs and replay them (docs/gpu.md says which); false, and with "
        "compile=true: launch every kernel from Python",
    )
    log_every: int = setting(
        100, 1, help="gradient updates between two lines of metrics; a round of many updates also writes one at its end"
    )
    show_every: int = setting(2_000, 1, help="rounds between two videos of a dream")
    save_every: float = setting(120.0, 0, 1e6, resumable=True, help="seconds between two checkpoints")


@dataclass
class _HostWork:
    """What a recorded piece of work did on the host: what it noted, as tensors that a replay fills, and its updates."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    updates: dict[str, int] = field(default_factory=dict)


class NonFiniteLoss(ArithmeticError):
    """A loss or gradient became infinite or not a number; the message names the term."""


class Trainer:
    """Takes optimiser steps on objectives and keeps what they say, without a host sync between two `report`s."""

    def __init__(
        self, objectives: Iterable[Objective], *, device: torch.device, precision: str = "auto", compile: bool = False,
        cuda_graphs: bool = False, team: Team | None = None, shared: Sequence[Tensor] = (),
    ) -> None:  # fmt: skip
        """`shared`: the tensors of the agent that no gradient trains, which the processes of a team have in common.

        With `cuda_graphs` whatever `run` is given is recorded and replayed, on a GPU, uncompiled and without a team.
        """
        self.device, self.team, self.shared = device, team or Team(), tuple(shared)
        self.autocast = mixed_precision(device, precision)
        self.compile = compile
        self.cuda_graphs = cuda_graphs and can_record(device) and not compile and self.team.size == 1
        # The share of every learning rate that is used now: a tensor, on the GPU only where a replay reads it there.
        self.cooling = torch.ones((), dtype=torch.float64, device=device if self.cuda_graphs else "cpu")
        self._recorded: dict[str, tuple[Recorder, _HostWork]] = {}
        self.updates: dict[str, int] = {}
        self.optimizers: dict[str, torch.optim.AdamW] = {}
        self._taken: dict[str, Tensor] = {}  # the updates of each objective, where the learning rate is made on the GPU
        self._losses: dict[str, Any] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        for objective in objectives:
            optim = objective.optim
            self.updates[objective.name] = 0
            lr: float | Tensor = optim.lr
            if self.cuda_graphs:  # a number of Python's would be the same in every replay
                lr = torch.tensor(lr, device=device)
                self._taken[objective.name] = torch.zeros((), device=device)
            self.optimizers[objective.name] = torch.optim.AdamW(
                groups(objective), lr=lr, eps=optim.eps, weight_decay=optim.weight_decay, fused=True,
                capturable=self.cuda_graphs,
            )  # fmt: skip

    def cool(self, share: float) -> None:
        """From now on every learning rate is this share of what it would be, from 0 to 1."""
        self.cooling.fill_(share)

    def mixed(self) -> torch.autocast:
        """The precision everything runs in."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast)

    def run(self, name: str, work: Callable[[Tree], Tree], inputs: Tree, *, record: bool) -> Tree:
        """`work`, which takes updates, on inputs that are moved to the device.

        With `record`, and where CUDA graphs are wanted, it is recorded once and replayed. `name` stands for the work:
        under one name it is always the same. Inputs of other shapes than the first ones are worked on kernel by kernel.
        """
        if not (self.cuda_graphs and record):
            return work(trees.to(inputs, self.device))
        recorder, host = self._recorded.setdefault(name, (Recorder(work, inputs, self.device), _HostWork()))
        if not recorder.fits(inputs) or not recorder.warm:
            return recorder.call(inputs)
        if not recorder.recorded:
            sums, counts, updates = self._sums, self._counts, dict(self.updates)
            self._sums, self._counts = {}, {}
            try:
                recorder.record()
                host.sums, host.counts = self._sums, self._counts
                host.updates = {key: count - updates[key] for key, count in self.updates.items()}
            finally:
                self._sums, self._counts, self.updates = sums, counts, updates
        made = recorder.replay(inputs)
        for key, count in host.updates.items():
            self.updates[key] += count
        for key, value in host.sums.items():
            self._add(key, value, host.counts[key])
        return made

    def update(self, objective: Objective, data: Any) -> Losses:
        """One optimiser step; returns the losses, whose states may start a dream."""
        name, optim, optimizer = objective.name, objective.optim, self.optimizers[objective.name]
        loss = self._losses.get(name)
        if loss is None:
            loss = self._losses[name] = torch.compile(objective.loss) if self.compile else objective.loss
        with self.mixed():
            losses = loss(data)
            terms = {term: masked(part, data) for term, part in losses.terms.items()}
            total = reduce(terms, objective.scales)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, enabled=False):  # a policy's update stands within a rollout's `mixed()`
            total.backward()
        self.team.average(objective.params)
        norm = torch.nn.utils.clip_grad_norm_(objective.params, optim.clip, foreach=True)
        if self.cuda_graphs:
            told = rate_of(optim, self._taken[name].add_(1)) * self.cooling
            for group in optimizer.param_groups:
                group["lr"].copy_(told)
        else:
            for group in optimizer.param_groups:  # always: a resumed run may have another
                group["lr"] = rate(optim, self.updates[name] + 1) * float(self.cooling)
        optimizer.step()
        self.updates[name] += 1
        torch.autograd.graph.increment_version(objective.params)  # fused steps do not count themselves
        if objective.after is not None:
            objective.after(self.team.gather(losses.learned))
            self.team.share(self.shared)  # what it draws at random is the first process's
        torch.clear_autocast_cache()  # within an outer `mixed()` the next update would read the weights from before
        self.note({f"{name}/{term}": value.detach().mean() for term, value in terms.items()})
        self.note({f"{name}/{key}": value for key, value in losses.metrics.items()} | {f"{name}/grad_norm": norm})
        return losses

    def note(self, metrics: dict[str, Tensor]) -> None:
        """Adds detached scalars to the averages of the next report."""
        for key, value in metrics.items():
            self._add(key, value.detach(), 1)

    def _add(self, key: str, value: Tensor, count: int) -> None:
        """A sum of so many numbers; copied, as the next replay would write over it."""
        self._sums[key] = self._sums[key] + value if key in self._sums else value.clone()
        self._counts[key] = self._counts.get(key, 0) + count

    def report(self) -> dict[str, float]:
        """The averages since the last report: the one host sync of a log interval.

        Raises NonFiniteLoss naming the first term that is not finite.
        """
        if not self._sums:
            return {}
        averages = self._averages()
        self._sums, self._counts = {}, {}
        return averages

    def check(self) -> None:
        """Raises NonFiniteLoss if anything since the last report is not finite."""
        if self._sums:
            self._averages()

    def _averages(self) -> dict[str, float]:
        keys = list(self._sums)
        values = torch.stack([self._sums[key].float() for key in keys]).tolist()
        averages = {key: value / self._counts[key] for key, value in zip(keys, values, strict=True)}
        for key, value in averages.items():
            if not math.isfinite(value):
                raise NonFiniteLoss(f"{key} became {value} in the last updates; the last checkpoint is from before.")
        return averages

    def state_dict(self) -> dict[str, Any]:
        """Optimisers, counters and the averages of the report under way."""
        return {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "updates": dict(self.updates),
            "cooling": float(self.cooling),
            "sums": dict(self._sums),
            "counts": dict(self._counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a `state_dict`."""
        self._recorded.clear()  # a recording writes where the optimisers' state was
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
            for group in optimizer.param_groups:  # in this device's way, whichever the checkpoint was written on
                lr = float(group["lr"])
                group["lr"] = torch.tensor(lr, device=self.device) if self.cuda_graphs else lr
                group["capturable"] = self.cuda_graphs
        self.updates = dict(state["updates"])
        self.cool(state.get("cooling", 1.0))  # older runs have none
        for name, taken in self._taken.items():
            taken.fill_(self.updates[name])
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])


def rate(optim: Optim, update: int) -> float:
    """The learning rate of the n-th update, from 1."""
    risen = min(1.0, update / max(1, optim.warmup))
    return optim.lr * risen * (min(1.0, optim.decay / update) if optim.decay else 1.0)


def rate_of(optim: Optim, update: Tensor) -> Tensor:
    """`rate` of a count () that only the device knows."""
    risen = (update / max(1, optim.warmup)).clamp(max=1.0)
    return optim.lr * risen * ((optim.decay / update).clamp(max=1.0) if optim.decay else 1.0)


def groups(objective: Objective) -> list[dict[str, Any]]:
    """The parameters as an optimiser takes them: all in one group, unless some of them shall not decay."""
    undecayed = {id(parameter) for parameter in objective.undecayed}
    if not undecayed:
        return [{"params": list(objective.params)}]
    decayed = [parameter for parameter in objective.params if id(parameter) not in undecayed]
    return [{"params": decayed}, {"params": list(objective.undecayed), "weight_decay": 0.0}]


def masked(term: Term, data: Any) -> Tensor:
    """A term of a loss, zero where its mask in the data is 0: (B, T, ...)."""
    if not term.mask:
        return term.value
    mask: Tensor = data.mask(term.mask)
    return term.value * mask.float().reshape(*mask.shape, *[1] * (term.value.dim() - mask.dim()))


def reduce(terms: dict[str, Tensor], scales: dict[str, float]) -> Tensor:
    """The loss: each masked term's mean over all its numbers, those that are masked included, times its scale.

    Raises ValueError when a term has no scale or a scale no term: neither is ever silently dropped.
    """
    if terms.keys() != scales.keys():
        raise ValueError(f"loss terms {sorted(terms)} and scales {sorted(scales)} differ")
    total = torch.zeros((), device=next(iter(terms.values())).device)
    for name, term in terms.items():
        total = total + scales[name] * term.float().mean()
    return total

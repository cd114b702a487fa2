"""The command `info`: what a recipe is made of at a size, for a game. Nothing is played, trained or written."""

from __future__ import annotations

import math
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from agent.player import Agent
from envs.make import make_games
from policies.cma_es import Evolution
from runs import build
from runs.config import Config
from world_model import trees
from world_model.interface import Objective, WorldModel
from world_model.trees import Tree


def show(config: Config, console: Console | None = None) -> None:
    """Prints the components with their parameters, the latent, the memory, the stages and the schedule."""
    console = console or Console(highlight=False)
    facts = describe(config)
    console.print(f"{config.env}: {facts['game']}", markup=False)
    console.print(_components(config, facts))
    lines = Table.grid(padding=(0, 2))
    for name in ("latent", "memory", "features", "policy"):
        lines.add_row(f"[dim]{name}[/]", facts[name])
    for stage in facts["stages"]:
        lines.add_row("[dim]stage[/]", _stage_line(stage))
    for name, text in facts["schedule"].items():
        lines.add_row(f"[dim]{name}[/]", text)
    console.print(lines)


def describe(config: Config) -> dict[str, Any]:
    """Everything that `show` prints, as plain values; builds one copy of the game and the model, and drops both."""
    games = make_games(config.env, config.game, 1)
    try:
        agent, spec, game = build.agent(config, games.spec), games.spec, games.description
    finally:
        games.close()
    model, learner = agent.world_model, agent.learner
    components = [part for name, whole in _halves(agent) for part in _parts(name, whole, objectives(agent))]
    memory = model.initial(1)
    evolved = count(learner) if isinstance(learner, Evolution) else 0
    kind = f"{spec.action_size} {'actions' if spec.discrete else 'continuous values'}"
    return {
        "game": game,
        "components": components,
        "parameters": {name: count(whole) for name, whole in _halves(agent)},
        "evolved": evolved,
        "trained": evolved + sum(weight.numel() for weight in trained(agent)),
        "latent": latent(model),
        "memory": f"{_leaves(memory)}; {trees.size_bytes(memory):,} bytes a row",
        "memory_bytes": trees.size_bytes(memory),
        "features": f"{model.feature_size:,} numbers, what the policy sees",
        "policy": f"{type(learner).__name__}, {type(learner.policy).__name__}, {kind}",
        "stages": [_stage(stage) for stage in model.stages()],
        "schedule": _schedule(config, agent),
    }


def objectives(agent: Agent) -> tuple[Objective, ...]:
    """Every objective of a system: of the world model's stages, in order, and of the policy."""
    stages = agent.world_model.stages()
    return (*(part for stage in stages for part in stage.objectives), *agent.learner.objectives())


def trained(agent: Agent) -> list[nn.Parameter]:
    """Every parameter that some objective trains, once."""
    return list(dict.fromkeys(weight for objective in objectives(agent) for weight in objective.params))


def count(module: nn.Module) -> int:
    """The number of a module's parameters, trained or not; buffers are none."""
    return sum(weight.numel() for weight in module.parameters())


def latent(model: WorldModel) -> str:
    """The latent's shape, kind and bits a frame."""
    frame = torch.zeros(1, *model.spec.frame)
    with torch.inference_mode():
        made = model.start(frame.unsqueeze(1)).latent
    shape = " x ".join(str(side) for side in model.latent_shape)
    bits = latent_bits(made)
    if not made.is_floating_point():
        return f"{shape} integer tokens"
    if bits is None:
        return f"{shape} real numbers, {made.numel() * made.element_size() * 8:,} bits a frame as stored"
    raw = frame.numel() * 8
    return f"{shape} one-hot, {bits:.4g} bits a frame (the picture: {raw:,}, {raw / bits:,.0f} times as many)"


def latent_bits(latent: Tensor) -> float | None:
    """Bits that one-hot variables (B, ..., K) can hold, or None for a latent of another kind."""
    one_hot = latent.is_floating_point() and ((latent == 0) | (latent == 1)).all() and (latent.sum(-1) == 1).all()
    return math.prod(latent.shape[1:-1]) * math.log2(latent.shape[-1]) if one_hot else None


def _halves(agent: Agent) -> tuple[tuple[str, nn.Module], ...]:
    return (("world model", agent.world_model), ("policy", agent.learner))


def _parts(half: str, whole: nn.Module, known: tuple[Objective, ...]) -> list[dict[str, Any]]:
    """One entry a named child that has parameters, and one for those that stand in the module itself."""
    children = [(name, child, list(child.parameters())) for name, child in whole.named_children()]
    own = list(whole.parameters(recurse=False))
    return [
        {
            "of": half,
            "name": name,
            "kind": type(child).__name__,
            "parameters": sum(weight.numel() for weight in weights),
            "trained_by": [part.name for part in known if {*map(id, part.params)} & {*map(id, weights)}],
        }
        for name, child, weights in [*children, ("itself", whole, own)]
        if weights
    ]


def _components(config: Config, facts: dict[str, Any]) -> Table:
    table = Table(title=f"{config.recipe}, size {config.size}")
    for name in ("component", "is a", "parameters", "trained by"):
        table.add_column(name, justify="right" if name == "parameters" else "left")
    for half, whole in facts["parameters"].items():
        for part in (part for part in facts["components"] if part["of"] == half):
            nobody = "CMA-ES" if half == "policy" and facts["evolved"] else "[dim]not trained[/]"
            by = ", ".join(part["trained_by"]) or nobody
            table.add_row(part["name"], part["kind"], f"{part['parameters']:,}", by)
        table.add_row(f"[bold]the {half}[/]", "", f"[bold]{whole:,}[/]", "", end_section=True)
    table.add_row("[bold]all that is trained[/]", "", f"[bold]{facts['trained']:,}[/]", "")
    return table


def _leaves(tree: Tree, name: str = "") -> str:
    """Each tensor of a memory by name: its shape without the batch, and its type."""
    if isinstance(tree, Tensor):
        shape = " x ".join(str(side) for side in tree.shape[1:]) or "1"
        return f"{name or 'memory'} {shape} {str(tree.dtype).removeprefix('torch.')}"
    if isinstance(tree, tuple) and tree and len({(leaf.shape, leaf.dtype) for leaf in trees.leaves(tree)}) == 1:
        return f"{_leaves(tree[0], name)} ({len(tree)} times)" if len(tree) > 1 else _leaves(tree[0], name)
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return ", ".join(_leaves(part, f"{name}.{key}" if name else str(key)) for key, part in entries) or "none"


def _stage(stage: Any) -> dict[str, Any]:
    return {
        "name": stage.name,
        "batch_size": stage.batch_size,
        "length": stage.length,
        "updates": stage.updates,
        "objectives": {
            part.name: {
                "parameters": sum(weight.numel() for weight in part.params), "scales": part.scales, "lr": part.optim.lr,
            }
            for part in stage.objectives
        },
    }  # fmt: skip


def _stage_line(stage: dict[str, Any]) -> str:
    parts = []
    for name, part in stage["objectives"].items():
        scales = ", ".join(f"{scale:g} {term}" for term, scale in part["scales"].items())
        parts.append(f"{name}: {scales} (learning rate {part['lr']:g}, {part['parameters']:,} parameters)")
    long = f"{stage['updates']:,} update{'s'[: stage['updates'] != 1]} a round"
    segments = f"{stage['batch_size']} segments x {stage['length']} frames"
    return f"{stage['name']}, {long}, {segments}; {'; '.join(parts)}"


def _schedule(config: Config, agent: Agent) -> dict[str, str]:
    train, policy, stages = config.train, config.policy, agent.world_model.stages()
    long = any(stage.updates > 1 for stage in stages)
    rounds = -(-max(0, config.steps - train.prefill) // train.steps_per_round) + long  # one learns from the prefill
    learned = sum(stage.batch_size * stage.length * stage.updates for stage in stages)
    first, later = ", ".join(_places(agent, last=False)), ", ".join(_places(agent, last=True))
    each = "a candidate" if agent.learner.logs_each_update else "an update"
    name, alone = "round" if long else "update", stages[0].name.replace("_", " ")
    told = {
        "first": f"{train.prefill:,} random agent steps, then {train.pretrain:,} updates of the {alone} alone",
        "then": f"{rounds:,} {name}s, one every {train.steps_per_round:,} agent steps, up to {config.steps:,} steps",
        "replayed": f"each frame {learned / train.steps_per_round:.3g} times in the mean",
    }
    if not train.policy:
        return told
    told["dreams"] = f"{policy.starts or 'all'} starts x {policy.horizon} steps {each}"
    if long:
        told["improved"] = f"{first} a round" + (f"; {later} in the last" if later != first else "")
    return told


def _places(agent: Agent, *, last: bool) -> list[str]:
    names = {"dream": "in the dream", "real": "in the real game"}
    what = "generations" if agent.learner.logs_each_update else "updates"
    return [f"{count:,} {what} {names[where]}" for where, count in agent.learner.plan(last=last)]

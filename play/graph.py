"""A dream as a graph of numbers alone (ONNX): one step, state and random numbers in, state, picture and figures out.

What plays it needs no Python: `play/page/local.js` does, by ONNX Runtime. Shapes: batch 1; H W picture, A actions.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from envs.errors import UserError
from play.snapshot import Parts
from world_model import noise, trees
from world_model.interface import State, to_bytes
from world_model.noise import Numbers, forked_rng
from world_model.trees import Tree

Arrays = dict[str, np.ndarray]
OPSET = 20
COLDEST = 1e-3  # what temperature 0 is in a graph, which divides by it
ROUNDED = {"float16": 2_048, "int8": 16_384}  # numbers from which on a tensor is stored so; smaller ones stay float32


@dataclass(frozen=True)
class Graph:
    """A step of a dream, and what whoever plays it must know.

    Attributes:
        model: the ONNX file. Inputs: `action` (1,) int32 or (1, A) float32, `temperature` (1,) float32, `uniform` and
            `normal` (float32, those that are used), and the tensors of `state`. Outputs: reward (1,), cont (1,),
            picture (H, W, 3) uint8, the agent's value (1,) and probabilities (1, A), where there are such, the action
            it takes next, and the tensors of `state`, each with `_next` behind its name.
        state: names of the tensors that come back in at the next step.
        numbers: how many random numbers of each kind a step takes.
    """

    model: bytes
    state: tuple[str, ...]
    numbers: dict[str, int]


class _Step(nn.Module):
    """One step as a function of tensors alone: state, action, temperature, random numbers."""

    def __init__(self, parts: Parts, state: State, memory: Tree) -> None:
        super().__init__()
        self.model, self.learner = parts.world.model, parts.learner
        self.shape, self.discrete = (state, memory), self.model.spec.discrete

    def forward(
        self, action: Tensor, temperature: Tensor, uniform: Tensor, normal: Tensor, leaves: list[Tensor]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        waiting = iter(leaves)
        state, memory = trees.map(lambda _: next(waiting), self.shape)
        with noise.from_outside(Numbers(uniform, normal)):
            chosen: Any = temperature  # a tensor, where the models are told that it is a number: see heads.is_coldest
            arrived = self.model.step(state, action.long() if self.discrete else action, temperature=chosen)
            shown, memory = _look(self.model, self.learner, arrived.state, memory)
        told = {"reward": arrived.reward, "cont": arrived.cont, **shown}
        return told, trees.leaves((arrived.state, memory))


def _look(model: Any, learner: Any, state: State, memory: Tree) -> tuple[dict[str, Tensor], Tree]:
    """The picture of a state, what the agent makes of it and does next, and its memory after that."""
    view = model.features(state)
    value, probabilities = learner.value(view), learner.policy.probabilities(view)
    chosen, memory = learner.policy.act(view, memory)
    told = {"picture": to_bytes(model.picture(state)[0]), "chosen": chosen.float()}
    told |= {} if value is None else {"value": value.float()}
    return told | ({} if probabilities is None else {"probabilities": probabilities.float()}), memory


@torch.inference_mode()
def begun(parts: Parts, start: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The state after one of the world's starts as a step takes it, and what there is to see of it; always the same."""
    with forked_rng():
        torch.manual_seed(start)
        state, memory = _state_at(parts, start)
        shown, memory = _look(parts.world.model, parts.learner, state, memory)
    return trees.leaves((state, memory)), shown


def _state_at(parts: Parts, start: int) -> tuple[State, Tree]:
    state = parts.world.starts.begin(parts.world.model, torch.tensor([start]))
    return state, parts.learner.policy.initial(1)


def export(parts: Parts, weights: str, say: Callable[[str], None] = lambda sentence: None) -> Graph:
    """The graph of one step, its weights stored as `weights` ("float32", "float16" or "int8").

    The model must be in float32 on the CPU. Raises UserError where the ONNX packages are missing or a system cannot be
    written as a graph.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  the exporter needs it
    except ImportError as problem:
        raise UserError('An export needs two packages: pip install -e ".[export]" adds them.') from problem
    model, spec = parts.world.model, parts.world.model.spec
    with torch.no_grad():
        state, memory = _state_at(parts, 0)
        inputs = [leaf.clone() for leaf in trees.leaves((state, memory))]
        action = torch.zeros(1, dtype=torch.int32) if spec.discrete else torch.zeros(1, spec.action_size)
        counted = Numbers()
        with noise.from_outside(counted):
            _look(model, parts.learner, model.step(state, action.long() if spec.discrete else action).state, memory)
        uniform, normal = (torch.rand(max(1, counted.taken[kind])) for kind in ("uniform", "normal"))
        step = _Step(parts, state, memory).eval()
        given = (action, torch.tensor([0.7]), uniform, normal, inputs)
        told, after = step(*given)
    if any(leaf.shape != again.shape for leaf, again in zip(inputs, after, strict=True)):
        raise UserError("This system's memory grows as it dreams, and a graph has one shape: it cannot be exported.")
    names = tuple(f"state{i}" for i in range(len(inputs)))
    say("writing the graph of a step")
    try:
        # What it writes is about packages that are not needed.
        with _quiet():
            made = torch.onnx.export(
                step, given, dynamo=True, opset_version=OPSET, verbose=False,
                input_names=["action", "temperature", "uniform", "normal", *names],
                output_names=[*told, *(f"{name}_next" for name in names)],
            )  # fmt: skip
    except Exception as problem:  # torch's own many kinds
        cause: BaseException | None = problem
        while cause is not None:  # torch wraps whatever ends its work
            if isinstance(cause, KeyboardInterrupt):
                raise KeyboardInterrupt from problem
            cause = cause.__cause__ or cause.__context__
        told = (str(problem).splitlines() or [""])[0][:200]
        raise UserError(
            "This system cannot be written as a graph, as one whose steps branch on numbers in its memory: iris' own "
            f"do. reverie, world_models, spatial, latent_action and latent_gru can be exported. ({told})"
        ) from problem
    assert made is not None
    proto = made.model_proto
    _store(onnx, proto, weights)
    used = {one.name for one in proto.graph.input}
    numbers = {kind: count for kind, count in counted.taken.items() if count and kind in used}
    return Graph(proto.SerializeToString(), tuple(name for name in names if name in used), numbers)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within it the exporter does not tell of packages that are not needed, nor print graphs it could not make."""
    logging.disable(logging.CRITICAL)
    nowhere = io.StringIO()
    try:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def rounded(array: np.ndarray, weights: str) -> np.ndarray:
    """What becomes of a float32 array that a graph stores as `weights`."""
    kind = _kind(array, weights)
    if kind == "int8":
        whole, scale = _int8(array)
        return whole.astype(np.float32) * scale.reshape(-1, *[1] * (array.ndim - 1))
    return array.astype(np.float16).astype(np.float32) if kind == "float16" else array


def _kind(array: np.ndarray, weights: str) -> str:
    """In what an array is stored: whole numbers for large matrices alone, and nothing small in fewer bytes."""
    if weights == "int8" and array.ndim > 1 and array.size >= ROUNDED["int8"]:
        return "int8"
    return "float16" if weights != "float32" and array.size >= ROUNDED["float16"] else "float32"


def _int8(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers of -127 to 127, and what one of them is worth in each row of the first axis."""
    others = tuple(range(1, array.ndim))
    scale = np.maximum(np.abs(array).max(others) / 127, 1e-12).astype(np.float32)
    whole = np.round(array / scale.reshape(-1, *[1] * len(others))).clip(-127, 127)
    return whole.astype(np.int8), scale


def _store(onnx: Any, proto: Any, weights: str) -> None:
    """Stores large weights in fewer bytes; the graph makes float32 of them, once, when it is loaded."""
    graph, nodes = proto.graph, []
    for tensor in list(graph.initializer):
        array = onnx.numpy_helper.to_array(tensor)
        kind = _kind(array, weights) if array.dtype == np.float32 else "float32"
        if kind == "float32":
            continue
        name, stored = tensor.name, f"{tensor.name}_stored"
        if kind == "int8":
            whole, scale = _int8(array)
            tensor.CopyFrom(onnx.numpy_helper.from_array(whole, stored))
            graph.initializer.append(onnx.numpy_helper.from_array(scale, f"{name}_scale"))
            nodes.append(onnx.helper.make_node("DequantizeLinear", [stored, f"{name}_scale"], [name], axis=0))
        else:
            tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float16), stored))
            nodes.append(onnx.helper.make_node("Cast", [stored], [name], to=onnx.TensorProto.FLOAT))
    for node in reversed(nodes):
        graph.node.insert(0, node)


@torch.no_grad()
def reference(parts: Parts, numbers: dict[str, int], count: int) -> Iterator[tuple[Arrays, Arrays]]:
    """What goes into `count` steps of a dream of random actions, and what PyTorch makes of each: the graph's judge."""
    rng, spec = np.random.default_rng(0), parts.world.model.spec
    state, memory = _state_at(parts, 0)
    for number in range(count):
        action = torch.tensor([int(rng.integers(spec.action_size))], dtype=torch.int32)
        if not spec.discrete:
            action = torch.from_numpy(rng.uniform(-1, 1, (1, spec.action_size)).astype(np.float32))
        uniform = torch.from_numpy(rng.random(max(1, numbers.get("uniform", 0)), dtype=np.float32))
        normal = torch.from_numpy(rng.standard_normal(max(1, numbers.get("normal", 0)), dtype=np.float32))
        leaves, temperature = trees.leaves((state, memory)), torch.tensor([0.5])
        feed = {"action": action, "temperature": temperature, "uniform": uniform, "normal": normal}
        feed |= {f"state{i}": leaf for i, leaf in enumerate(leaves)}
        told, after = _Step(parts, state, memory)(action, temperature, uniform, normal, leaves)
        expected = told | {f"state{i}_next": leaf for i, leaf in enumerate(after)}
        waiting = iter(after)
        state, memory = trees.map(lambda _, waiting=waiting: next(waiting), (state, memory))
        if number % 200 == 199:  # whatever has become of it
            state, memory = _state_at(parts, 0)
        yield {name: part.numpy() for name, part in feed.items()}, {k: v.float().numpy() for k, v in expected.items()}

"""Pictures of what a model knows: what an action changes, what codes stand for, portraits of `world_models`.

Shapes: T frames of one real segment, D dreamed ones, N frames of the replay, h w grid of codes, Z latent dimensions,
K mixture components, C H W picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from world_model.interface import State, Tokens, WorldModel, to_pixels
from world_model.noise import forked_rng
from world_model.parts import quantizers
from world_model.parts.mixture import Mixture
from world_model.parts.nets import pad
from world_model.world_models import WorldModels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pictures = dict[str, np.ndarray]  # (H, W, 3) uint8 each, by name
CONTEXT = 8  # real frames before a dream
TEMPERATURES = (0.0, 0.5, 1.0, 1.3)
COLUMNS = 10  # pictures in a row of the dreams
STEPS = (1, 5)  # dreamed under each action
CODES, CODES_A_ROW = 32, 8  # the most used ones are shown
PART = 32  # frames encoded at once
SHOWN = 6  # latent dimensions
SCALE, GAP, LEFT, TOP, DPI = 2, 4, 130, 24, 100  # of rows of frames, in pixels


class Dreamed(NamedTuple):
    """One dream after a real context."""

    latent: Tensor  # (D, Z)
    log_weights: Tensor  # (D, Z, K) of the mixtures that the latents were drawn from


class UsedCode(NamedTuple):
    """A code and what it stands for."""

    code: int
    share: float  # of all tokens
    mean: Tensor  # (C, y, x) of the pixels of the cells where it stands


@torch.no_grad()
def diagnostics(
    model: WorldModel, frame: Tensor, action: Tensor, frames: Tensor, *, action_names: Sequence[str]
) -> Pictures:
    """Pictures (H, W, 3) uint8 by name, as many as a system has; see `actions`, `codebook` and `portraits`.

    Of a real segment (1, T, C, H, W) in [0, 1], its actions (1, T[, A]), and frames (N, C, H, W) from all over the
    replay. Leaves the default generators as they were.
    """
    found: Pictures = {}
    if model.spec.discrete and model.decode(model.start(frame[:, :1])) is not None:
        found["actions"] = actions(model, frame, action, action_names)
    grids = [model.tokenize(part) for part in frames.split(PART)]
    if tokens := [grid for grid in grids if grid is not None]:
        found["codebook"] = codebook(tokens[0]._replace(code=torch.cat([grid.code for grid in tokens])), frames)
    return found | (portraits(model, frame, action) if isinstance(model, WorldModels) else {})


@torch.no_grad()
def actions(model: WorldModel, frame: Tensor, action: Tensor, names: Sequence[str]) -> np.ndarray:
    """What is dreamed after one context under each action alone, by the same random numbers, beside NOOP's dream.

    The second of the two analysis tools of IRIS. A game without NOOP is compared with its first action.
    """
    context = min(CONTEXT, frame.shape[1])
    begin = model.start(frame[:, :context], action[:, : context - 1])
    dreams: dict[int, list[Tensor]] = {steps: [] for steps in STEPS}
    for choice in range(len(names)):
        state, taken = begin, torch.full_like(action[:, 0], choice)
        with forked_rng(frame.device):
            for steps in range(1, max(STEPS) + 1):
                state = model.step(state, taken).state
                if steps in STEPS:
                    dreams[steps].append(model.picture(state)[0].float())
    idle = names.index("NOOP") if "NOOP" in names else 0
    rows: dict[str, Tensor] = {}
    for steps, pictures in dreams.items():
        shown, label = torch.stack(pictures), f"after {steps} step{'s'[: steps > 1]}"
        rows |= {label: shown, f"{label},\nminus {names[idle]}": 0.5 + (shown - shown[idle]) / 2}
    return _rows(rows, names)


def codebook(tokens: Tokens, frames: Tensor) -> np.ndarray:
    """How often each code is used in frames (N, C, H, W), and the mean of what the most used ones stand for.

    The first of the two analysis tools of IRIS.
    """
    code, (high, wide) = tokens.code.flatten(), tokens.cell
    counts, most = torch.bincount(code, minlength=tokens.codes), used_codes(tokens, frames, CODES)
    figure = _figure(13, 5.5)
    histogram, looks = figure.subplots(1, 2, width_ratios=(2, 3))
    histogram.bar(range(tokens.codes), (counts.sort(descending=True).values / len(code)).cpu().numpy(), 1.0)
    histogram.set(yscale="log", ylim=(0.5 / len(code), 1), xlabel="codes, the most used first")
    histogram.set_ylabel(f"share of the tokens of {len(frames)} frames")
    usage = quantizers.usage(code, tokens.codes)
    dead, perplexity = int(usage["dead_codes"]), usage["perplexity"].item()
    histogram.set_title(f"{tokens.codes} codes: perplexity {perplexity:.1f}, {dead} dead")
    gap = 1 + high // 6  # for the line above each
    grid = (-(-len(most) // CODES_A_ROW), CODES_A_ROW)
    body = np.full((grid[0] * (high + gap), grid[1] * (wide + gap), 3), 255, np.uint8)
    for i, one in enumerate(most):
        top, left = i // CODES_A_ROW * (high + gap), i % CODES_A_ROW * (wide + gap)
        body[top : top + high, left : left + wide] = to_pixels(one.mean)
        told = f"{one.code}: {100 * one.share:.2g} %"
        looks.text(left + wide / 2 - 0.5, top - 0.5, told, ha="center", va="bottom", fontsize=7)
    looks.imshow(body, interpolation="nearest")
    looks.set_axis_off()
    looks.set_title(f"the {len(most)} most used: mean of the {high}x{wide} pixels where they stand", pad=16)
    return _image(figure)


def used_codes(tokens: Tokens, frames: Tensor, count: int) -> list[UsedCode]:
    """Up to `count` codes that occur in frames (N, C, H, W), the most used first."""
    code, (high, wide) = tokens.code.flatten(), tokens.cell
    size = (tokens.code.shape[1] * high, tokens.code.shape[2] * wide)
    cells = rearrange(pad(frames, size), "n c (h y) (w x) -> (n h w) c y x", y=high, x=wide)
    counts = torch.bincount(code, minlength=tokens.codes)
    most = counts.argsort(descending=True, stable=True)[:count].tolist()
    return [UsedCode(i, (counts[i] / len(code)).item(), cells[code == i].mean(0)) for i in most if counts[i]]


@torch.no_grad()
def portraits(model: WorldModels, frame: Tensor, action: Tensor) -> Pictures:
    """Pictures (H, W, 3) uint8 by name, of a real segment (1, T, C, H, W) in [0, 1] and its actions (1, T[, A]).

    Dreams go on from the first 8 frames, from half of them where the segment is shorter than 16. A single frame has
    no portraits. Leaves the default generators as they were.
    """
    length = frame.shape[1]
    if length < 2:
        return {}
    context = min(CONTEXT, length // 2)
    with forked_rng(frame.device):
        dreams = {at: dream(model, frame, action, context, at) for at in TEMPERATURES}
        without, seed = {}, int(torch.randint(2**31, (1,)))
        alone = model.components == 1  # and cannot be left out
        for off in ((), *((k,) for k in range(0 if alone else model.components))):
            torch.manual_seed(seed)
            without[off] = dream(model, frame, action, context, 1.0, off)
    latent = model.encode(frame)
    memory = model.lstm.scan(model.inputs(latent, action))
    return {
        "mixture": _mixture(dreams[1.0].log_weights, context),
        "latents": _latents(latent[0], model.mixture(memory), dreams[1.0].latent, context),
        "temperatures": _temperatures(model, frame, dreams, context),
        "components": _components(model, frame, without, context),
    }


def dream(
    model: WorldModels, frame: Tensor, action: Tensor, context: int, temperature: float, off: Sequence[int] = ()
) -> Dreamed:
    """What follows `context` frames of a segment (1, T, C, H, W) under its actions (1, T[, A]): T - context steps.

    `off`: components of the mixtures that are drawn from no more.
    """
    state = model.start(frame[:, :context], action[:, : context - 1])
    latents, weights = [], []
    for t in range(context, frame.shape[1]):
        memory = model.without(model.advance(state, action[:, t - 1]), off)
        expected = model.mixture(memory)
        state = State(expected.sample(temperature), memory)
        latents.append(state.latent)
        weights.append(expected.log_weights)
    return Dreamed(torch.cat(latents), torch.cat(weights))


def _mixture(log_weights: Tensor, context: int) -> np.ndarray:
    """Who dominates when, as Ellefsen, Martin & Torresen 2019 ask, who found components specialised on events.

    Every dimension has a mixture of its own: component 1 of one has nothing to do with component 1 of another.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    steps, dims, count = log_weights.shape
    colours = colormaps["tab10"].colors[:count] if count <= 10 else colormaps["turbo"](np.linspace(0, 1, count))  # type: ignore[attr-defined]
    strongest = log_weights.argmax(-1).cpu()  # (D, Z)
    share = torch.nn.functional.one_hot(strongest, count).float().mean(0).numpy()  # (Z, K)
    entropy = -(log_weights.exp() * log_weights).sum(-1).mean(-1).cpu().numpy()  # (D,)
    figure = _figure(11, 7)
    grid = figure.add_gridspec(2, 2, width_ratios=(4, 1), height_ratios=(5, 1))
    who, shares, doubt = (figure.add_subplot(grid[place]) for place in ((0, 0), (0, 1), (1, 0)))
    # Times and dimensions are whole numbers in the middle of their cells.
    extent = (context - 0.5, context + steps - 0.5, dims - 0.5, -0.5)
    look: dict[str, Any] = {"cmap": ListedColormap(colours), "vmin": 0, "vmax": count - 1, "extent": extent}
    who.imshow(strongest.T.numpy(), aspect="auto", interpolation="nearest", **look)
    who.set(ylabel="latent dimension", title="component with the largest weight, in a dream at temperature 1")
    begin = np.zeros(dims)
    for k in range(count):
        label = f"{k + 1}: {share[:, k].mean():.0%} of all"
        shares.barh(range(dims), share[:, k], 1.0, begin, color=colours[k], label=label)
        begin += share[:, k]
    shares.set(xlim=(0, 1), ylim=(dims - 0.5, -0.5), title="share of the time", yticks=[])
    doubt.plot(range(context, context + steps), entropy, color="black", linewidth=1)
    most = math.log(count)
    doubt.set(xlim=extent[:2], ylim=(0, max(most, 0.1) * 1.05), xlabel="frame of the segment", ylabel="nats")
    doubt.set_title(f"entropy of the weights, mean over dimensions: {entropy.mean():.2f} of at most {most:.2f} nats")
    figure.legend(*shares.get_legend_handles_labels(), loc="lower right", title="component", fontsize=8)
    return _image(figure)


def _latents(real: Tensor, expected: Mixture, dreamed: Tensor, context: int) -> np.ndarray:
    """Real latents (T, Z), what was expected of them one step before (1, T, Z, K), and the dream (D, Z)."""
    weights, mean = expected.log_weights[0].exp(), expected.mean[0]
    centre = (weights * mean).sum(-1)
    square = expected.log_std[0].exp().square() + (mean - centre.unsqueeze(-1)).square()
    deviation = (weights * square).sum(-1).sqrt()
    most = real.std(0, correction=0).argsort(descending=True)[:SHOWN].tolist()
    z, middle, std, free = (part.cpu().numpy() for part in (real, centre, deviation, dreamed))
    figure = _figure(11, 7.5)
    axes = figure.subplots(-(-len(most) // 2), 2, sharex=True, squeeze=False).flatten().tolist()
    times = np.arange(len(z))
    for axis, i in zip(axes, most, strict=False):
        low, high = middle[1:, i] - std[1:, i], middle[1:, i] + std[1:, i]
        axis.fill_between(times[1:], low, high, color="tab:blue", alpha=0.2, linewidth=0, label="± 1 std")
        axis.plot(times[1:], middle[1:, i], color="tab:blue", linewidth=1, label="expected one step before")
        axis.plot(times, z[:, i], color="black", linewidth=1.2, label="real (the encoder's mean)")
        axis.plot(times[context:], free[:, i], color="tab:red", linewidth=1, label="dream, without a real frame")
        axis.axvline(context - 0.5, color="gray", linewidth=0.8, linestyle=":")
        axis.set_title(f"z[{i}]", fontsize=9)
        axis.grid(alpha=0.25)
        axis.locator_params(axis="x", integer=True)
    for axis in axes[len(most) :]:
        axis.set_axis_off()
    for axis in axes[-2:]:
        axis.set_xlabel("frame of the segment")
    title = "the latent dimensions that vary most; the dream begins at the dotted line"
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, title=title)
    return _image(figure)


def _temperatures(model: WorldModels, frame: Tensor, dreams: Mapping[float, Dreamed], context: int) -> np.ndarray:
    """The same context and actions at each temperature; the first column is the last real frame."""
    times = _spread(context - 1, frame.shape[1], COLUMNS)
    rows = {"real": frame[0, times]}
    picked = [t - context + 1 for t in times]
    for temperature, dreamed in dreams.items():
        latent = torch.cat([model.encode(frame[:, context - 1]), dreamed.latent])
        rows[f"temperature {temperature:g}"] = model.vae.decode(latent[picked])
    return _rows(rows, [f"frame {time}" for time in times])


def _components(
    model: WorldModels, frame: Tensor, dreams: Mapping[tuple[int, ...], Dreamed], context: int
) -> np.ndarray:
    """The same context, actions and random numbers, with one component of each dimension's mixture switched off: what
    cannot happen without it (Ellefsen, Martin & Torresen 2019). Beside each row, the component's share of the weight.
    """
    times = _spread(context - 1, frame.shape[1], COLUMNS)
    share = dreams[()].log_weights.exp().mean((0, 1))
    rows = {}
    for off, dreamed in dreams.items():
        latent = torch.cat([model.encode(frame[:, context - 1]), dreamed.latent])
        name = f"without {off[0] + 1} ({float(share[off[0]]):.0%})" if off else "all"
        rows[name] = model.vae.decode(latent[[t - context + 1 for t in times]])
    return _rows(rows, [f"frame {time}" for time in times])


def _rows(rows: Mapping[str, Tensor], columns: Sequence[str]) -> np.ndarray:
    """Frames (N, C, H, W) in [0, 1] side by side, a row for each name, enlarged; what is what beside and above it."""
    return table([to_pixels(row) for row in rows.values()], list(rows), columns)


def table(pictures: Sequence[np.ndarray], rows: Sequence[str], columns: Sequence[str]) -> np.ndarray:
    """Rows of pictures (N, H, W, 3) uint8, enlarged, with a name beside each row and above each column."""
    frames = [row.repeat(SCALE, 1).repeat(SCALE, 2) for row in pictures]
    framed = [np.pad(one, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255) for one in frames]
    body = np.concatenate([np.concatenate(list(one), 1) for one in framed], 0)
    height, width = TOP + body.shape[0], LEFT + body.shape[1]
    figure = _figure(width / DPI, height / DPI, layout=None)
    figure.figimage(body, LEFT, 0)  # pixel by pixel, where an axis would resample
    cell_height, cell_width = framed[0].shape[1:3]
    for i, name in enumerate(rows):
        figure.text((LEFT - 8) / width, 1 - (TOP + (i + 0.5) * cell_height) / height, name, ha="right", va="center")
    for i, name in enumerate(columns):
        middle = LEFT + i * cell_width + (cell_width - GAP) / 2
        figure.text(middle / width, 1 - TOP / 2 / height, name, ha="center", va="center", fontsize=9)
    return _image(figure)


def _spread(first: int, end: int, count: int) -> list[int]:
    """Up to `count` different whole numbers, evenly over first <= t < end."""
    return np.unique(np.linspace(first, end - 1, count).astype(int)).tolist()


def _figure(width: float, height: float, layout: Any = "constrained") -> Figure:
    from matplotlib.figure import Figure  # late: half a second that most commands do not need

    return Figure(figsize=(width, height), dpi=DPI, layout=layout)


def _image(figure: Figure) -> np.ndarray:
    """(H, W, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()

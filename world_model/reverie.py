"""`reverie`: one vector of categorical latents a frame, a recurrent or transformer memory, one pass a frame for all.

The line of DreamerV3 (Hafner et al. 2023) and STORM (Zhang et al. 2023), made fast enough for a laptop: the encoder
sees one frame and no memory, so that encoding and decoding are batched over time and only a small step is sequential.
Shapes: B batch, T time, G variables, K classes, D memory width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from envs.settings import setting
from envs.spec import Spec
from world_model import trees
from world_model.interface import (
    Batch,
    Losses,
    Metric,
    Objective,
    Optim,
    Stage,
    State,
    Term,
    WorldModel,
    to_unit,
)
from world_model.parts.dynamics import GRU, Transformer
from world_model.parts.heads import Categoricals, Mean, TwoHot, one_hot
from world_model.parts.nets import FrameDecoder, FrameEncoder, mlp, network_dtype
from world_model.parts.points import Distances, PointDecoder, PointEncoder
from world_model.trees import Tree

METRICS = {
    "pixels": Metric(
        "error of the reconstruction: half the squared error in units of `pixel_sigma`, weighted, summed over a frame",
        shown="pixels",
    ),
    "dyn": Metric("KL(posterior, prior) in nats, at least `free_nats`, from which the prior learns"),
    "rep": Metric("KL(posterior, prior) in nats, at least `free_nats`, from which the posterior learns"),
    "kl": Metric(
        "KL(posterior, prior) without free bits, nats a frame: what of a frame the prior did not predict",
        shown="kl", panel="KL(posterior, prior), nats a frame",
    ),
    "reward": Metric(
        "cross-entropy of the reward head, nats a step", shown="reward", panel="reward cross-entropy, nats"
    ),
    "cont": Metric("cross-entropy of the continuation head, nats a step"),
    "posterior_entropy": Metric("entropy of the posterior, nats a frame; penalised, so lower is better"),
}  # fmt: skip


PART = 8  # frames whose error is computed at once: more do not stay in a core's cache


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The frames (B, T, ...) of a batch in parts of (PART, ...); on a GPU, which would only wait, in a single one."""
    frames = tensor.flatten(0, 1)
    return frames.split(PART if tensor.device.type == "cpu" else len(frames))


class PixelLoss(torch.autograd.Function):
    """Half the squared error (B, T) of pictures (B, T, C, H, W), a pixel's times 1 + emphasis x its target's size.

    The gradient is made in the same pass: the intermediate results of all frames are not kept.
    """

    @staticmethod
    def forward(ctx: Any, picture: Tensor, target: Tensor, emphasis: float) -> Tensor:  # type: ignore[override]
        gradient, loss = torch.empty_like(picture), picture.new_empty(picture.shape[:2], dtype=torch.float32)
        every = (_parts(leaf) for leaf in (picture, target, gradient, loss))
        for made, real, slope, told in zip(*every, strict=True):
            real = real.float()
            error = made.float() - real
            weighted = error * torch.maximum(real.amax(1), -real.amin(1)).mul_(emphasis).add_(1).unsqueeze(1)
            slope.copy_(weighted)
            told.copy_(weighted.flatten(1).mul_(error.flatten(1)).sum(1).mul_(0.5))
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype)[..., None, None, None], None, None


def capped(loss: Tensor, times: float, valid: Tensor) -> Tensor:
    """Losses (B, T), of which none is more than so many times the median of those that are valid (B, T).

    What is above is scaled down and not cut off, so that its gradient keeps its direction.
    """
    told = loss.detach()
    known = told.masked_fill(~valid, torch.nan).flatten()
    median = known.nanmedian(0).values  # without a dimension it asks the device
    return loss * (times * median / told.clamp(min=1e-8)).clamp(max=1)


@dataclass(frozen=True)
class ReverieConfig:
    """The numbers of `reverie`. Sizes that differ by `size=` stand in `runs/recipes/reverie.py`."""

    dynamics: str = setting("gru", choices=("gru", "transformer"), help="sequence model: GRU or causal transformer")
    groups: int = setting(24, 1, 32, help="categorical variables of a frame's latent (DreamerV3: stoch, 32)")
    classes: int = setting(32, 2, 256, help="classes of each variable; also the side of the points' grid")
    points: int = setting(
        8,
        0,
        32,
        help="keypoints, each encoded by two of the groups, its column and its row; 0: none, else fewer "
        "than half of the groups",
    )
    distances: bool = setting(
        False, help="give sequence model, heads and policy also the distances between all pairs of points"
    )
    cont_from: str = setting(
        "memory",
        choices=("memory", "features"),
        help="input of the continuation head: memory is the recurrent state h alone, features is h and the latent",
    )
    deter: int = setting(512, 1, 16_384, help="size of the recurrent state h")
    hidden: int = setting(256, 1, 16_384, help="width of the reward and continuation heads")
    channels: int = setting(
        48, 4, 4096, help="channels of encoder and decoder at an eighth of the resolution; more: sharper and slower"
    )
    layers: int = setting(2, 1, 64, when={"dynamics": "transformer"}, help="layers of the transformer")
    heads: int = setting(4, 1, 64, when={"dynamics": "transformer"}, help="attention heads of the transformer")
    window: int | None = setting(
        None,
        2,
        4096,
        when={"dynamics": "transformer"},
        help="frames that the transformer attends to; model.length when not given: no distance beyond it is trained",
    )
    foreground: float = setting(
        20.0,
        0,
        1e4,
        help="a pixel's weight in the loss is 1 + this x its distance from the background (the "
        "prefill's median frame, pixels in [0, 1]); 0: plain squared error",
    )
    pixel_sigma: float = setting(
        0.15,
        1e-3,
        10,
        help="standard deviation of the Gaussian pixel likelihood: 1 / (2 sigma^2) nats per squared unit",
    )
    frame_cap: float = setting(
        0.0,
        0,
        1e6,
        help="a frame's pixel loss counts at most this many times as much as the batch's median frame: a screen that "
        "flashes costs a thousand times what a sprite does; 0: no limit",
    )
    faint: float = setting(
        0.05,
        0,
        1,
        help="for display alone: decoded pixels nearer than this to the background are drawn as the background",
    )
    free_nats: float = setting(
        1.0, 0, 1e3, help="free bits, in nats: below this the KL trains neither prior nor posterior"
    )
    dyn_scale: float = setting(1.0, 0, 1e3, help="weight of the KL that trains the prior (dynamics loss)")
    rep_scale: float = setting(
        0.3,
        0,
        1e3,
        help="weight of the KL that trains the posterior (representation loss); at 0.1 one uncertain "
        "fact spreads over many variables, at 1 the ball begins to fade",
    )
    entropy_scale: float = setting(
        0.2,
        0,
        10,
        help="weight of the posterior's entropy as a penalty: variables that carry nothing become "
        "constant instead of noise",
    )
    twohot: Mean = setting(
        "symlog",
        help="mean of the reward's two-hot bins: in symlog space, where large rewards that are uncertain count little "
        "(STORM), or of what the bins are worth (symexp; DreamerV3)",
    )
    reward_scale: float = setting(1.0, 0, 1e3, help="weight of the reward loss")
    dreamed_reward: float = setting(
        0.5, 0, 1, help="share of the reward loss on latents drawn from the prior instead of the posterior"
    )
    unimix: float = setting(0.01, 0, 1, help="share of the uniform distribution in every categorical")
    batch_size: int = setting(12, 1, 65_536, help="segments of a batch")
    length: int = setting(24, 3, 10_000, help="frames of a segment (batch_length)")
    lr: float = setting(1e-3, above=0, high=1, resumable=True, help="learning rate")
    clip: float = setting(100.0, above=0, help="largest norm of a gradient")

    def build(self, spec: Spec) -> Reverie:
        """The model, for frames and actions of this kind."""
        return Reverie(self, spec)


class Reverie(WorldModel):
    """See the module's text. Latent: one-hot (G, K). Features: the flat latent and the memory's output."""

    background: Tensor
    sigma: Tensor
    updates_are_graph_safe = dreams_are_graph_safe = gives_states = True

    def __init__(self, config: ReverieConfig, spec: Spec) -> None:
        super().__init__()
        if not 1 <= config.groups <= 32:
            raise ValueError(f"reverie has 1 to 32 categorical variables a frame, got groups={config.groups}")
        if not 0 <= 2 * config.points < config.groups:
            raise ValueError(
                f"each of {config.points} points takes two of the {config.groups} groups; one must be left"
            )
        if config.distances and config.points < 2:
            raise ValueError(f"distances are between points, of which there must be two, got points={config.points}")
        self.config, self.spec = config, spec
        self.latent_shape = (config.groups, config.classes)
        flat = config.groups * config.classes
        self.distances = Distances(config.points, config.classes) if config.distances else None
        told = flat + (self.distances.size if self.distances else 0)
        self.feature_size = told + config.deter
        self.latents = Categoricals(config.groups, config.classes, config.unimix)
        self.twohot = TwoHot(mean=config.twohot)
        self.encoder: FrameEncoder | PointEncoder
        self.decoder: FrameDecoder | PointDecoder
        if config.points:
            shape = (config.points, config.classes, flat - 2 * config.points * config.classes)
            self.encoder = PointEncoder(spec.frame, config.channels, *shape)
            self.decoder = PointDecoder(spec.frame, config.channels, *shape)
        else:
            self.encoder = FrameEncoder(spec.frame, config.channels, flat)
            self.decoder = FrameDecoder(spec.frame, config.channels, flat)
        width, inputs = config.deter, told + spec.action_size
        self.embed = nn.Sequential(nn.Linear(inputs, width, bias=False), nn.LayerNorm(width), nn.SiLU())
        self.dynamics: GRU | Transformer
        if config.dynamics == "gru":
            self.dynamics = GRU(width, width)
        elif config.dynamics == "transformer":
            self.dynamics = Transformer(
                width, width, layers=config.layers, heads=config.heads, window=config.window or config.length
            )
        else:
            raise ValueError(f'model.dynamics is "gru" or "transformer", got "{config.dynamics}"')
        self.prior = mlp(width, width, flat, layers=2)
        self.reward = mlp(self.feature_size, config.hidden, self.twohot.count, layers=1, zero=True)
        # From the memory alone, before the latent is drawn: told from a latent, an ending whose moment is uncertain is
        # likely at no moment, and in a dream of low temperature it never comes.
        self.cont = mlp(width if config.cont_from == "memory" else self.feature_size, config.hidden, 1, layers=1)
        # The picture that never moves; errors and inputs count relative to it, so that small moving things survive.
        self.register_buffer("background", torch.full(spec.frame, 0.5))
        self.register_buffer("sigma", torch.tensor(config.pixel_sigma), persistent=False)

    # ---- the state machine ----
    def initial(self, batch_size: int) -> Tree:
        return self.dynamics.initial(batch_size)

    def advance(self, state: State, action: Tensor) -> Tree:
        return self.dynamics.step(state.memory, self._input(state.latent, action))

    def imagine(self, memory: Tree, temperature: float = 1.0) -> State:
        return State(self.latents.sample(self._prior(self.dynamics.output(memory)), temperature), memory)

    def observe(self, memory: Tree, frame: Tensor) -> State:
        return State(self.encode(frame), memory)

    def encode(self, frame: Tensor) -> Tensor:
        """The most likely code of frames, which needs no memory: (..., C, H, W) -> (..., G, K)."""
        return self.latents.mode(self.latents.log_probs(self.encoder(self._contrast(frame))))

    def decode(self, state: State) -> Tensor:
        contrast = self.decoder(state.latent.flatten(-2)).float()
        # The decoder leaves a faint noise where nothing is. A person hardly sees it, but the encoder never has: with it
        # 11 % of a decoded frame's variables come back when it is encoded again, without it 97 %.
        faint = contrast.abs().amax(-3, keepdim=True) * self.sigma < self.config.faint
        return torch.addcmul(self.background, contrast.masked_fill(faint, 0), self.sigma).clamp(0, 1)

    def outcome(self, state: State) -> tuple[Tensor, Tensor]:
        return self.twohot.mean(self.reward(self.features(state))), self._goes_on(state).sigmoid()

    def prior_kl(self, memory: Tree, other: Tree) -> Tensor:
        expected = (self._prior(self.dynamics.output(one)) for one in (memory, other))
        return self.latents.kl(*expected)

    def features(self, state: State) -> Tensor:
        return torch.cat([*self._latent_inputs(state.latent), self.dynamics.output(state.memory)], -1)

    def own(self, memory: Tree) -> Tree:
        return self.dynamics.own(memory)

    # ---- training ----
    def prepare(self, frames: Tensor) -> None:
        """The background is the median frame."""
        self.background.copy_(frames.median(0).values)

    def stages(self) -> tuple[Stage, ...]:
        config = self.config
        scales = {"pixels": 1.0, "dyn": config.dyn_scale, "rep": config.rep_scale, "reward": config.reward_scale}
        scales |= {"cont": 1.0, "posterior_entropy": config.entropy_scale}
        optim = Optim(lr=config.lr, clip=config.clip)
        after = self.twohot.note if self.twohot.symexp else None
        objective = Objective(
            "world_model", tuple(self.parameters()), self.loss, scales, optim, after=after, metrics=METRICS
        )
        return (Stage("world_model", (objective,), config.batch_size, config.length),)

    def loss(self, batch: Batch) -> Losses:
        """Pixels + reward + continuation + balanced KL with free bits (DreamerV3, eq. 5), unreduced (B, T)."""
        target = self._target(batch.frame)
        posterior = self.latents.log_probs(self.encoder(target))  # (B, T, G, K)
        latent = self.latents.sample(posterior)
        memory = self.dynamics.scan(self._input(latent, batch.action))
        state = State(latent, memory)
        prior = self._prior(self.dynamics.output(memory))

        reward = F.pad(batch.reward[:, :-1], (1, 0))
        cont = F.pad(1.0 - batch.terminated[:, :-1].float(), (1, 0), value=1.0)
        picture = self.decoder(latent.flatten(-2))
        dyn = self.latents.kl(posterior.detach(), prior)
        rep = self.latents.kl(posterior, prior.detach())
        goes_on = self._goes_on(state)
        told = self.twohot.loss(self.reward(self.features(state)), reward)
        if share := self.config.dreamed_reward:
            # Of encoded latents alone the head reads a reward off the frame that shows it, and learns nothing of what
            # leads there: a dream in which the prior does not draw that frame never gives the reward.
            dreamed = State(self.latents.sample(prior), memory)
            told = told.lerp(self.twohot.loss(self.reward(self.features(dreamed)), reward), share)
        pixels = PixelLoss.apply(picture, target, self.config.foreground * self.config.pixel_sigma)
        if self.config.frame_cap:
            pixels = capped(pixels, self.config.frame_cap, batch.valid)
        terms = {
            "pixels": Term(pixels, "valid"),
            "dyn": Term(dyn.clamp(min=self.config.free_nats), "valid"),
            "rep": Term(rep.clamp(min=self.config.free_nats), "valid"),
            "reward": Term(told, "arrived"),
            "cont": Term(F.binary_cross_entropy_with_logits(goes_on, cont, reduction="none"), "arrived"),
            "posterior_entropy": Term(self.latents.entropy(posterior), "valid"),
        }
        states = State(latent.detach(), trees.map(Tensor.detach, memory))
        return Losses(terms, {"kl": dyn.detach().mean()}, states, learned=reward.flatten())

    # ---- parts ----
    def _target(self, frame: Tensor) -> Tensor:
        """`_contrast` of frames (B, T, C, H, W), a few at a time, in the precision of the networks."""
        target = torch.empty(frame.shape, dtype=network_dtype(self.background), device=frame.device)
        for part, made in zip(_parts(frame), _parts(target), strict=True):
            made.copy_(self._contrast(to_unit(part)))
        return target

    def _contrast(self, frame: Tensor) -> Tensor:
        """What the networks see and predict: the frame less the background, in units of sigma."""
        return (frame - self.background).div_(self.sigma)

    def _goes_on(self, state: State) -> Tensor:
        """The logit (...) of the episode going on."""
        early = self.config.cont_from == "memory"
        told = self.dynamics.output(state.memory) if early else self.features(state)
        return self.cont(told).float().squeeze(-1)  # type: ignore[no-any-return]

    def _prior(self, output: Tensor) -> Tensor:
        return self.latents.log_probs(self.prior(output))

    def _latent_inputs(self, latent: Tensor) -> tuple[Tensor, ...]:
        """What memory, heads and policy are told of a latent (..., G, K): its variables, and distances if asked for."""
        flat = latent.flatten(-2)
        return (flat, self.distances(latent[..., : 2 * self.config.points, :])) if self.distances else (flat,)

    def _input(self, latent: Tensor, action: Tensor) -> Tensor:
        if self.spec.discrete:
            action = one_hot(action, self.spec.action_size)
        return self.embed(torch.cat([*self._latent_inputs(latent), action.to(latent.dtype)], -1))

"""Token worlds: a tokenizer turns each frame, or each pair of frames, into codes, and the dynamics dream the next ones.

One system with parts that exchange (`tokens_of`, `layout` and `quantizer` of the tokenizer, `dynamics`), and four
recipes:

`iris` (Micheli et al. 2023, "Transformers are Sample-Efficient World Models"): 16 tokens a frame, dreamed one by one.
What differs: a full window slides and keeps half of what it saw, where theirs forgets everything; without a perceptual
network, pixels count more the further they stand from the background (as in `reverie`), lest the ball be lost.

`spatial` (Atari world model v2.1): 21 x 16 tokens of few codes, all of the next frame in one pass over the last four;
learned with rollouts of its own tokens and weights of single ones. What the document leaves out, reward and ending, are
predicted from the output at the action, as in `iris`.

`latent_gru` (Ms. Pac-Man latent GRU) and `latent_action` (neural Atari): the codes are those of what happens from one
frame to the next, whose picture is drawn on the one before. The timeline: tokens[t] are those of (frame[t - 1],
frame[t]), of an episode's first frame those of (frame, frame); action[t] leads to tokens[t + 1].

Shapes: B batch, T time, C H W picture, N tokens a frame, V codes, D width of the dynamics.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from envs.settings import setting
from envs.spec import Spec
from world_model.interface import (
    Batch,
    Losses,
    Metric,
    Objective,
    Optim,
    Stage,
    State,
    Step,
    Term,
    Tokens,
    WorldModel,
    to_unit,
)
from world_model.parts import perceptual, quantizers
from world_model.parts.block_transformer import Attention, BlockTransformerConfig, WeightsFrom
from world_model.parts.frame_dynamics import FrameDynamicsConfig
from world_model.parts.gpt import GPTConfig
from world_model.parts.heads import SignedReward, mean_where
from world_model.parts.pair_tokenizer import PairEncoder, PairTokenizer, PairTokenizerConfig
from world_model.parts.position_gru import PositionGRUConfig
from world_model.parts.quantizers import CodebooksApart, MovingCodebook, Quantized
from world_model.parts.token_dynamics import REWARDS, TokenDynamics, cross_entropy, rollout
from world_model.parts.vq_tokenizer import Layout, QuantizerKind, VQTokenizer, VQTokenizerConfig
from world_model.trees import Tree

SIGMA = 0.15  # as `reverie`'s: the error of a pixel that costs half a nat
STILL = 8  # one segment of so many begins as an episode does
PICTURES = ("recent", "before", "frame")  # of a memory


TOKENIZER_METRICS = {
    "weighted_pixels": Metric("loss of the picture without a perceptual network: squared errors, weighted"),
    "pixels": Metric("with a perceptual network: L1 of the pixels in [-1, 1]"),
    "lpips": Metric("distance in the features of LPIPS"),
    "st_lpips": Metric("distance in the features of ST-LPIPS"),
    "l1": Metric("L1 of the pixels in [-1, 1], whatever the loss", shown="l1"),
    "edges": Metric("squared errors of the differences between neighbouring pixels"),
    "codebook": Metric("codebook loss: pulls the codes to the latents"),
    "commitment": Metric("commitment loss: pulls the latents to the codes"),
    "codebook_usage": Metric("share of the codes that a batch uses"),
    "dead_codes": Metric("codes that a batch does not use"),
    "code_entropy": Metric("entropy of code usage, nats", panel="entropy of the codes' use, nats"),
    "perplexity": Metric("exp of code_entropy"),
    "uneven": Metric("log(codes) minus the entropy of mean usage; 0: uniform"),
    "label": Metric("pairs: cross-entropy of the known actions, read off the codes, nats"),
    "other_label": Metric("pairs: cross-entropy of the known actions, read off the other codes, which hide them, nats"),
    "chained": Metric("pairs: loss of the last picture of a chain, drawn from the model's own"),
}
TRANSFORMER_METRICS = {
    "tokens": Metric(
        "cross-entropy of the next token, nats; weighted, where tokens have weights", shown="tokens",
        panel="surprise at the next token, nats",
    ),
    "accuracy": Metric("all but gpt: share of the tokens whose most likely value is right", shown="right"),
    "accuracy_moved": Metric("all but gpt: accuracy on the tokens that changed"),
    "still": Metric("all but gpt: share of the tokens that did not change: the copy baseline's accuracy"),
    "reward": Metric(
        "cross-entropy of the reward's sign, nats a step", shown="reward", panel="reward cross-entropy, nats"
    ),
    "end": Metric("cross-entropy of the continuation head, nats a step"),
}  # fmt: skip


# With which of its parts a number is read at all.
FRAMES, PAIRS = {"tokens_of": "frame"}, {"tokens_of": "pair"}
VQGAN, CVIVIT = FRAMES | {"layout": "vqgan"}, PAIRS | {"pair_encoder": "cvivit"}
EMA, FSQ = {"quantizer": "ema"}, {"quantizer": "fsq"}
GPT, BLOCK, GRU = {"dynamics": "gpt"}, {"dynamics": "block"}, {"dynamics": "gru"}


@dataclass(frozen=True)
class TokenWorldConfig:
    """IRIS's numbers but for the perceptual loss, whose network is not everywhere; of `block` the document's."""

    view: Literal["frame", "tokens"] = setting(
        "frame",
        help="what the policy sees: the decoded frame, or the embedded tokens and the sequence model's output h",
    )
    # The tokenizer; what each means stands in VQTokenizerConfig, of pairs in PairTokenizerConfig.
    tokens_of: Literal["frame", "pair"] = setting(
        "frame", help="what is tokenized: each frame, or what happens from one to the next"
    )
    pair_encoder: PairEncoder = setting(
        "conv", when=PAIRS, help="how the two frames are encoded: convolutions, or temporal cross-attention (C-ViViT)"
    )
    pair_layers: int = setting(4, 1, 100, when=CVIVIT, help="layers of temporal cross-attention")
    positions: int = setting(
        0, 0, 64, when=PAIRS, help="codes of a whole transition; 0: one for each position of the grid"
    )
    action_codes: int = setting(
        0,
        0,
        64,
        help="codes reserved for the first position, which must predict the action while the others must not; 0: none",
    )
    flow_steps: int = setting(
        0,
        0,
        100,
        when=PAIRS,
        help="integration steps of a flow-matching decoder that starts from the last frame; 0: an ordinary decoder",
    )
    residual: bool = setting(False, when=PAIRS, help="decode the change from the last frame instead of the frame")
    decoder_frames: int = setting(1, 1, 100, when=PAIRS, help="recent frames that the decoder sees beside the codes")
    decoder_channels: int = setting(0, 0, 4096, when=PAIRS, help="channels of the decoder; 0: as many as the encoder's")
    labels: float = setting(1.0, 0, 1, help="share of the transitions whose action is known to tokenizer and dynamics")
    label_scale: float = setting(
        0.0, 0, 1000, help="weight of classifying the known actions from the codes, in the tokenizer's loss"
    )
    chain: int = setting(
        1,
        1,
        100,
        when=PAIRS,
        help="frames in a row that the decoder is trained to draw, each from its own last one (scheduled sampling)",
    )
    layout: Layout = setting(
        "vqgan", when=FRAMES, help="layout of the tokenizer's networks: IRIS's, or that of the Atari world model v2.1"
    )
    codes: int = setting(512, 2, 65_536, help="size of the tokenizer's codebook")
    code_width: int = setting(512, 1, 16_384, help="dimensions of a code")
    channels: int = setting(64, 1, 4096, help="channels of the tokenizer's convolutions")
    halvings: int = setting(
        4, 0, 10, help="stages of stride 2: the grid's side is the image's side / (patch x 2^halvings)"
    )
    blocks: int = setting(2, 0, 100, when=FRAMES, help="residual blocks at each resolution")
    attention: tuple[int, ...] = setting(
        (2, 3), 0, 10, when=VQGAN, help="resolutions with attention, by their number of halvings"
    )
    patch: int = setting(
        1,
        1,
        64,
        when=FRAMES,
        help="side of the pixel blocks that become channels before the convolutions (space to depth)",
    )
    local: bool = setting(
        False, when=FRAMES, help="no overlap: a token is computed from its own cell of the image alone"
    )
    quantizer: QuantizerKind = setting(
        "gradient",
        help="vector quantisation: gradient (VQ-VAE), ema (VQ-VAE with a moving-average codebook), or "
        "fsq (finite scalar quantisation)",
    )
    levels: tuple[int, ...] = setting((8, 8, 8), 2, 1024, when=FSQ, help="levels of each dimension of FSQ")
    follow_every: int = setting(
        1, 1, 10_000, when=EMA, help="tokenizer updates between two moving-average updates of the codebook"
    )
    reset_every: int = setting(
        0,
        0,
        when=EMA,
        help="updates between two re-initialisations of dead codes; 0: at every update, of codes unused for 70",
    )
    even_scale: float = setting(
        0.0,
        0,
        100,
        when={"quantizer": "gradient"},
        help="weight of the entropy of code usage as a bonus, against codebook collapse",
    )
    rate: float = setting(
        0.0,
        0,
        100,
        when=EMA,
        help="rate term of entropy-constrained VQ: the price of a nat of a code's rarity, in mean "
        "squared errors of a code; 0: the nearest code",
    )
    commitment_scale: float = setting(1.0, 0, 100, help="weight of the commitment loss")
    edge_scale: float = setting(0.0, 0, 100, help="weight of the loss on image gradients, beside that on pixels")
    contrast: bool = setting(
        False, help="encode and decode pixels as distances from the background, in its standard deviations"
    )
    perceptual: perceptual.Kind = setting("none", help="network of the perceptual loss (LPIPS)")
    foreground: float = setting(
        20.0,
        0,
        1e4,
        when={"perceptual": "none"},
        help="a pixel's weight in the loss is 1 + this x its distance from the background (the prefill's median frame)",
    )
    tokenizer_updates: int = setting(200, 0, resumable=True, help="updates of the tokenizer a round")
    tokenizer_batch: int = setting(256, 1, 65_536, help="frames of a tokenizer's batch")
    tokenizer_lr: float = setting(1e-4, above=0, high=1, resumable=True, help="learning rate of the tokenizer")
    tokenizer_decay: int = setting(
        0, 0, help="inverse-time decay of the learning rate: from update N on it is lr x N / n at update n; 0: constant"
    )
    # The dynamics; see GPTConfig and BlockTransformerConfig.
    dynamics: Literal["gpt", "block", "gru", "frames"] = setting(
        "gpt",
        help="sequence model: gpt (token by token), block (a frame in one pass), gru (over the grid's "
        "places), frames (a convolutional network on the last frames' pixels)",
    )
    context_frames: int = setting(
        20, 3, 1000, help="frames of a training segment; with gpt also of the attention window, each with its action"
    )
    keep: int = setting(10, 1, 1000, when=GPT, help="frames that remain in the window when it is full")
    history: int = setting(
        4,
        0,
        100,
        when={"dynamics": ("block", "frames")},
        help="frames that the dynamics see; 0 with frames: the action alone",
    )
    block_attention: Attention = setting(
        "cached",
        when=BLOCK,
        help="cached: a frame attends to itself and to earlier ones, whose keys and values are cached; "
        "whole: full attention over all tokens",
    )
    merge: int = setting(
        1, 1, 16, when=BLOCK, help="side of the square of tokens that share a position of the transformer"
    )
    refine: int = setting(
        0,
        0,
        16,
        when=BLOCK,
        help="further decoding passes a frame, each conditioned on the surest tokens so far (as in "
        "MaskGIT), so that tokens agree",
    )
    stay: float = setting(
        0.0, 0, 20, when=BLOCK, help="initial logit bonus of a token's previous value; learned from there"
    )
    copy_above: float = setting(
        1.0,
        0,
        1,
        resumable=True,
        when=BLOCK,
        help="in dreams, copy a token where staying the same is likelier than this; 1: never",
    )
    outcome_reads: Literal["output", "codes"] = setting(
        "output",
        help="input of the reward and continuation heads: the dynamics' output before the next frame, or that and the "
        "next frame's codes, real or dreamed",
    )
    rollout_steps: int = setting(
        5,
        1,
        100,
        when={"dynamics": ("block", "gru", "frames")},
        help="length of the rollouts on the model's own tokens in training",
    )
    rollout_share: float = setting(
        0.5,
        0,
        1,
        when={"dynamics": ("block", "gru", "frames")},
        help="share of a batch's segments that end with such a rollout",
    )
    teacher_forcing: float = setting(
        0.1,
        0,
        1,
        when={"dynamics": ("block", "gru")},
        help="probability that a step of such a rollout is fed the real frame",
    )
    step_discount: float = setting(
        0.7,
        above=0,
        high=1,
        when=BLOCK,
        help="geometric weight of each further step of such a rollout, normalised to mean 1",
    )
    recurrent: bool = setting(
        False, when={"dynamics": ("gru", "frames")}, help="carry a recurrent state from step to step"
    )
    place_attention: int = setting(0, 0, 100, when=GRU, help="blocks of self-attention over the grid's places")
    code_embedding: int = setting(64, 1, 4096, when=GRU, help="dimensions of the embeddings of codes and actions")
    weights_from: WeightsFrom = setting(
        "target",
        when=BLOCK,
        help="which motion weighs a token's loss: the target's own, which biases dreams towards "
        "motion, or that of earlier frames at its place",
    )
    motion_scale: float = setting(
        2.0,
        0,
        100,
        when=BLOCK,
        help="weight a of motion in a token's loss, w = min(weight_cap, 1 + a motion + b event + c "
        "persistence + d small)",
    )
    event_scale: float = setting(
        2.0,
        0,
        100,
        when=BLOCK,
        help="weight b of unusual motion: by how much a token moves more than it does on average",
    )
    persistence_scale: float = setting(
        1.0, 0, 100, when=BLOCK, help="weight c of places where something moved in the step before"
    )
    small_scale: float = setting(0.0, 0, 100, when=BLOCK, help="weight d of motion where little else around moves")
    weight_cap: float = setting(6.0, 1, 1e4, when=BLOCK, help="largest weight of a token, where a static one has 1")
    focal: float = setting(
        0.0,
        0,
        10,
        when=BLOCK,
        help="gamma of the focal loss: exponent of 1 - p, by which the loss of a certain token "
        "shrinks; 0: cross-entropy",
    )
    width: int = setting(256, 1, 16_384, help="width of the sequence model")
    layers: int = setting(10, 1, 100, help="layers of the sequence model")
    heads: int = setting(
        4, 1, 128, when={"dynamics": ("gpt", "block", "gru")}, help="attention heads of the sequence model"
    )
    dropout: float = setting(0.1, 0, 0.99, when={"dynamics": ("gpt", "block")}, help="dropout of the sequence model")
    updates: int = setting(200, 0, resumable=True, help="updates of the sequence model a round")
    batch_size: int = setting(64, 1, 65_536, help="segments of `context_frames` in a batch")
    lr: float = setting(1e-4, above=0, high=1, resumable=True, help="learning rate of the dynamics")
    weight_decay: float = setting(0.01, 0, 1, help="weight decay of the linear layers")
    decay: int = setting(
        0,
        0,
        help="inverse-time decay of the sequence model's learning rate: from update N on it is lr x N "
        "/ n at update n; 0: constant",
    )
    clip: float = setting(10.0, above=0, help="largest norm of a gradient")

    @property
    def tokenizer(self) -> VQTokenizerConfig | PairTokenizerConfig:
        """What the tokenizer is built from."""
        if self.tokens_of == "pair":
            return PairTokenizerConfig(
                encoder=self.pair_encoder, codes=self.codes, width=self.code_width, channels=self.channels,
                decoder_channels=self.decoder_channels or self.channels, context=self.decoder_frames,
                halvings=self.halvings, layers=self.pair_layers, positions=self.positions, residual=self.residual,
                action_codes=self.action_codes, flow_steps=self.flow_steps,
                quantizer=self.quantizer, levels=self.levels, follow_every=self.follow_every,
                reset_every=self.reset_every, rate=self.rate, even=self.even_scale > 0,
            )  # fmt: skip
        return VQTokenizerConfig(
            layout=self.layout, codes=self.codes, width=self.code_width, channels=self.channels,
            halvings=self.halvings, blocks=self.blocks, attention=self.attention, patch=self.patch, local=self.local,
            contrast=self.contrast, quantizer=self.quantizer, levels=self.levels, follow_every=self.follow_every,
            reset_every=self.reset_every, rate=self.rate, even=self.even_scale > 0,
        )  # fmt: skip

    def transformer(
        self, grid: tuple[int, int], frame: tuple[int, int, int]
    ) -> GPTConfig | BlockTransformerConfig | PositionGRUConfig | FrameDynamicsConfig:
        """What the dynamics are built from, for frames of so many rows and columns of tokens."""
        if self.dynamics == "gru":
            return PositionGRUConfig(
                codes=self.codes, tokens=grid[0] * grid[1], embedding=self.code_embedding, width=self.width,
                layers=self.layers, recurrent=self.recurrent, attention=self.place_attention, heads=self.heads,
                rollout_steps=self.rollout_steps, rollout_share=self.rollout_share,
                teacher_forcing=self.teacher_forcing,
            )  # fmt: skip
        if self.dynamics == "frames":
            return FrameDynamicsConfig(
                frame=frame, codes=self.codes, tokens=grid[0] * grid[1], context=self.history, halvings=self.halvings,
                width=self.width, blocks=self.layers, recurrent=self.recurrent,
            )  # fmt: skip
        if self.dynamics == "gpt":
            return GPTConfig(
                codes=self.codes, tokens=grid[0] * grid[1], context_frames=self.context_frames, keep=self.keep,
                width=self.width, layers=self.layers, heads=self.heads, dropout=self.dropout,
            )  # fmt: skip
        return BlockTransformerConfig(
            codes=self.codes, grid=grid, attention=self.block_attention, history=self.history, merge=self.merge,
            refine=self.refine, stay=self.stay, copy_above=self.copy_above, width=self.width, layers=self.layers,
            heads=self.heads, dropout=self.dropout, rollout_steps=self.rollout_steps, rollout_share=self.rollout_share,
            teacher_forcing=self.teacher_forcing, step_discount=self.step_discount, weights_from=self.weights_from,
            motion_scale=self.motion_scale,
            event_scale=self.event_scale, persistence_scale=self.persistence_scale, small_scale=self.small_scale,
            weight_cap=self.weight_cap, focal=self.focal,
        )  # fmt: skip

    def build(self, spec: Spec) -> TokenWorld:
        """The model, for frames and actions of this kind."""
        return TokenWorld(self, spec)


class TokenWorld(WorldModel):
    """See the module's text. Latent: tokens (N,) int64. Memory: that of the dynamics, awaiting a frame.

    Pairs and dynamics that read pictures also remember the recent frames, real where they were seen and dreamed where
    they were dreamed: recent (B, n, C, H, W), and of pairs those before the present one, before (B, n, C, H, W).
    Features: the decoded frame, flat (C H W,), or the codes of its tokens and the memory's output, as `view` says.
    """

    updates_are_graph_safe = True
    background: Tensor

    def __init__(self, config: TokenWorldConfig, spec: Spec) -> None:
        super().__init__()
        if not spec.discrete:
            raise ValueError("it reads an action as one of a few tokens, and this game's actions are continuous")
        if config.labels < 1 and (config.dynamics not in ("gru", "frames") or config.recurrent):
            raise ValueError("labels below 1 need dynamics that look at one action alone: gru or frames, not recurrent")
        if config.label_scale and config.tokens_of != "pair":
            raise ValueError("label_scale reads actions off the codes of pairs: set tokens_of=pair")
        if config.action_codes and not config.label_scale:
            raise ValueError("codes of the action's own learn from the actions: set label_scale above 0")
        self.config, self.spec = config, spec
        self.dreams_are_graph_safe = config.dynamics != "gpt"  # it asks how long its rows are, once a frame
        self.tokenizer: VQTokenizer | PairTokenizer = config.tokenizer.build(spec.frame)
        if config.dynamics == "gpt" and self.tokenizer.tokens == 1:
            raise ValueError("gpt predicts a frame token by token and needs two or more: set dynamics=block or gru")
        self.transformer: TokenDynamics = config.transformer(self.tokenizer.grid, spec.frame).build(spec.action_size)
        self.pairs = isinstance(self.tokenizer, PairTokenizer)
        # Pictures in the memory: the newest frames, real or dreamed, as far as the pair and the dynamics read them.
        self.drawn_on = config.decoder_frames if self.pairs else 0
        self.recent = max(self.drawn_on, self.transformer.context)
        self.reward = SignedReward()
        # Reads actions off the codes; where the action has a code of its own off that, and the other off the rest.
        labelled = config.label_scale > 0 and self.pairs
        size, width = self.tokenizer.tokens * self.tokenizer.width, self.tokenizer.width
        self.label = nn.Linear(width if config.action_codes else size, spec.action_size) if labelled else None
        self.other_label = None
        if config.action_codes:
            self.other_label = nn.Sequential(nn.Linear(size - width, 128), nn.ReLU(), nn.Linear(128, spec.action_size))
        self.arrival: nn.ModuleDict | None = None
        if config.outcome_reads == "codes":
            self.arrival = nn.ModuleDict({name: _arrival_head(size + config.width, config.width, classes)
                                          for name, classes in (("reward", len(REWARDS)), ("end", 2))})  # fmt: skip
        tokens = self.tokenizer.tokens
        self.latent_shape = (tokens,)
        flat = spec.frame[0] * spec.frame[1] * spec.frame[2]
        self.feature_size = flat if config.view == "frame" else tokens * self.tokenizer.width + config.width
        self.register_buffer("background", torch.full(spec.frame, 0.5))

    # ---- the state machine ----
    def encode(self, frame: Tensor, before: Tensor | None = None) -> Tensor:
        """The tokens of frames (..., C, H, W) -> (..., N); of pairs with the frames before, else with themselves."""
        if isinstance(self.tokenizer, PairTokenizer):
            return self.tokenizer.encode(self._contrast(frame if before is None else before), self._contrast(frame))
        return self.tokenizer.encode(self._contrast(frame))

    def tokenize(self, frame: Tensor) -> Tokens | None:
        tokenizer = self.tokenizer
        if self.pairs:
            return None
        return Tokens(self.encode(frame).unflatten(-1, tokenizer.grid), self.config.codes, tokenizer.cell)

    def decode(self, state: State) -> Tensor | None:
        if self.config.view == "frame":
            return state.memory["frame"]  # type: ignore[no-any-return]
        if not self.pairs:
            return self._decoded(state.latent)
        return self._decoded(state.latent, state.memory["before"]) if "before" in state.memory else None

    def initial(self, batch_size: int) -> Tree:
        memory = self._with_frame(self.transformer.initial(batch_size), None)
        if not self.recent:
            return memory
        recent = self.background.repeat(batch_size, self.recent, 1, 1, 1)
        return {**memory, "recent": recent, **({"before": recent[:, -self.drawn_on :]} if self.pairs else {})}

    def advance(self, state: State, action: Tensor) -> Tree:
        pictures = None
        if context := self.transformer.context:
            pictures = self._contrast(state.memory["recent"][:, -context:])
        memory = self.transformer.advance(_dynamics(state.memory), state.latent, action, pictures)
        kept = {name: state.memory[name] for name in ("recent", "before") if name in state.memory}
        return {**self._with_frame(memory, None), **kept}

    def imagine(self, memory: Tree, temperature: float = 1.0) -> State:
        return self._arrived(*self.transformer.imagine(_dynamics(memory), temperature), memory)

    def sample_tokens(self, memory: Tree, temperature: float = 1.0) -> Tensor:
        """The tokens (B, N) that `imagine` samples, without decoding them."""
        return self.transformer.imagine(_dynamics(memory), temperature)[0]

    @property
    def played_codes(self) -> int:
        """How many codes stand first in a transition where they can be played instead of actions: few, and else 0."""
        if not self.pairs or not (self.tokenizer.tokens == 1 or self.config.action_codes):
            return 0
        return self.config.action_codes or self.config.codes

    def arrived(self, memory: Tree, latent: Tensor) -> State:
        """As `imagine`, where somebody has decided what comes: tokens (B, N)."""
        return self._arrived(latent, self.transformer.observe(_dynamics(memory), latent), memory)

    def _arrived(self, latent: Tensor, known: Tree, memory: Tree) -> State:
        """After tokens that nobody has seen: their picture, where one is needed, is the newest frame."""
        if "recent" not in memory:
            return self._state(latent, known)
        recent = memory["recent"]
        before = recent[:, -max(self.drawn_on, 1) :]
        picture = self._decoded(latent, before)
        known = {**known, "recent": torch.cat([recent[:, 1:], picture.unsqueeze(1)], 1)}
        return State(latent, self._seen(known, before, picture))

    def observe(self, memory: Tree, frame: Tensor) -> State:
        if "recent" not in memory:
            latent = self.encode(frame)
            return self._state(latent, self.transformer.observe(_dynamics(memory), latent))
        # An episode's first frame has none before it but itself.
        first = ~self.transformer.has_action(_dynamics(memory)).view(-1, 1, 1, 1, 1)
        recent = torch.where(first, frame.unsqueeze(1), torch.cat([memory["recent"][:, 1:], frame.unsqueeze(1)], 1))
        before = torch.where(first, frame.unsqueeze(1), memory["recent"])[:, -max(self.drawn_on, 1) :]
        latent = self.encode(frame, before[:, -1])
        known = {**self.transformer.observe(_dynamics(memory), latent), "recent": recent}
        shown = self._decoded(latent, before) if self.config.view == "frame" else None
        return State(latent, self._seen(known, before, shown))

    def step(self, state: State, action: Tensor, frame: Tensor | None = None, temperature: float = 1.0) -> Step:
        """As the base class has it, by the dynamics' own step, which may be cheaper than its parts."""
        if self.recent:
            return super().step(state, action, frame, temperature)
        seen, memory = None if frame is None else self.encode(frame), _dynamics(state.memory)
        state = self._state(*self.transformer.step(memory, state.latent, action, seen, temperature))
        return Step(state, *self.outcome(state))

    def unseen(self, state: State) -> State:
        """Pictures of pairs are drawn one on the other, also where nobody looks; not where nothing reads them."""
        if self.config.view == "frame" or self.transformer.context or not self.pairs:
            return state
        return State(state.latent, _dynamics(state.memory))

    def own(self, memory: Tree) -> Tree:
        return self.transformer.own(memory)

    def condense(self, memory: Tree) -> Tree:
        return {**self.transformer.condense(_dynamics(memory)), **_pictures(memory)}

    def recall(self, condensed: Tree) -> Tree:
        return {**self.transformer.recall(_dynamics(condensed)), **_pictures(condensed)}

    def reconstruct(self, frame: Tensor) -> Tensor | None:
        """Of pairs, known with the frame before."""
        if not self.pairs:
            return super().reconstruct(frame)
        before = self._last(frame[:, : max(frame.shape[1] - 1, 1)])
        return self._decoded(self.encode(frame[:, -1], before[:, -1]), before)

    def outcome(self, state: State) -> tuple[Tensor, Tensor]:
        """The mean over the three kinds of reward, and P(goes on); 0 and 1 where nothing has been done yet."""
        h, begun = state.memory["h"], self.transformer.has_action(state.memory)
        if not self.config.labels:  # nobody has ever told it what follows an action
            return torch.zeros_like(h[..., 0]), torch.ones_like(h[..., 0])
        reward = self.reward.mean(self._outcome_logits("reward", state))
        cont = self._outcome_logits("end", state).float().softmax(-1)[..., 0]
        return reward.masked_fill(~begun, 0.0), cont.masked_fill(~begun, 1.0)

    def reward_sign(self, state: State) -> Tensor:
        """What the reward head itself says, whatever a sign is worth."""
        sign = self.reward.sign(self._outcome_logits("reward", state))
        return sign.masked_fill(~self.transformer.has_action(state.memory), 0.0)

    def _outcome_logits(self, head: Literal["reward", "end"], state: State) -> Tensor:
        """(B, 3) of the reward's sign, (B, 2) of going on or ending."""
        h = state.memory["h"]
        told: Tensor = getattr(self.transformer, head)(h)
        return told if self.arrival is None else told + self.arrival[head](self._codes_and_output(state.latent, h))

    def _codes_and_output(self, tokens: Tensor, h: Tensor) -> Tensor:
        """Tokens (..., N) of a frame and the output (..., D) before it -> (..., N E + D)."""
        return torch.cat([self.tokenizer.embedding(tokens).flatten(-2), h], -1)

    def prior_kl(self, memory: Tree, other: Tree) -> Tensor:
        return self.transformer.prior_kl(_dynamics(memory), _dynamics(other))

    def features(self, state: State) -> Tensor:
        if self.config.view == "frame":
            return state.memory["frame"].flatten(-3)
        return self._codes_and_output(state.latent, state.memory["h"])

    def start(self, frame: Tensor, action: Tensor | None = None) -> State:
        """As much of the context as stepping through it would still remember, at once."""
        past = frame.shape[1] - 1
        if action is None:
            if past:
                raise ValueError("a context of several frames needs the actions between them")
            action = torch.zeros(len(frame), 0, dtype=torch.long, device=frame.device)
        begin = past - self.transformer.held(past)
        if not self.recent:
            tokens = self.encode(frame[:, begin:])
            return self._state(tokens[:, -1], self.transformer.start(tokens, action[:, begin:past]))
        times = torch.arange(begin, past + 1, device=frame.device)
        tokens = self.encode(frame[:, begin:], frame[:, (times - 1).clamp(min=0)])
        pictures = self._contexts(frame, times[:-1]) if past > begin else None
        memory = self.transformer.start(tokens, action[:, begin:past], pictures)
        before, latent = self._last(frame[:, : max(past, 1)]), tokens[:, -1]
        shown = self._decoded(latent, before) if self.config.view == "frame" else None
        return State(latent, self._seen({**memory, "recent": self._last(frame, self.recent)}, before, shown))

    def _last(self, frame: Tensor, count: int = 0) -> Tensor:
        """The last of frames (B, T, C, H, W), as many as the decoder draws on."""
        now = torch.full((1,), frame.shape[1] - 1, device=frame.device)
        return _up_to(frame, now, count or max(self.drawn_on, 1))[:, 0]

    def _contexts(self, frame: Tensor, times: Tensor) -> Tensor | None:
        """Of frames (B, T, C, H, W) what the dynamics read at some times, (B, len(times), context, C, H, W)."""
        context = self.transformer.context
        return self._contrast(_up_to(frame, times, context)) if context else None

    def _state(self, latent: Tensor, memory: Tree) -> State:
        return State(latent, self._with_frame(memory, latent))

    def _seen(self, memory: Tree, before: Tensor, shown: Tensor | None) -> Tree:
        """With the frames before, which a pair's picture is drawn on, and the picture where a policy sees it."""
        memory = {**memory, "before": before} if self.pairs else memory
        return {**memory, "frame": shown} if self.config.view == "frame" else memory

    def _with_frame(self, memory: Tree, latent: Tensor | None) -> Tree:
        """For a policy that sees frames, the picture of the latent: decoded once, seen and shown."""
        if self.config.view != "frame":
            return memory
        frame = memory["h"].new_zeros(len(memory["h"]), *self.spec.frame) if latent is None else self._decoded(latent)
        return {**memory, "frame": frame}

    def drawn(self, latent: Tensor, before: Tensor) -> Tensor:
        """Of pairs: what tokens (B, N) make of the frames before (B, T, C, H, W) in [0, 1]."""
        return self._decoded(latent, self._last(before))

    def _decoded(self, latent: Tensor, before: Tensor | None = None) -> Tensor:
        """The picture (B, C, H, W) of tokens (B, N); of a pair's on the frames before (B, n, C, H, W)."""
        codes = self.tokenizer.embedding(latent)
        if isinstance(self.tokenizer, PairTokenizer):
            assert before is not None
            return self._picture(self.tokenizer.picture(self._contrast(before), codes)).clamp(0, 1)
        return self._picture(self.tokenizer.picture(codes)).clamp(0, 1)

    # ---- training ----
    def prepare(self, frames: Tensor) -> None:
        """The background is the median frame."""
        self.background.copy_(frames.median(0).values)

    def stages(self) -> tuple[Stage, ...]:
        """First what is seen, then what becomes of it: the transformer learns on the finished tokens.

        Raises UserError when the perceptual network is not on this machine.
        """
        config, kind, book = self.config, self.config.perceptual, self.tokenizer.embedding
        network = perceptual.load(kind, next(self.parameters()).device)
        scales = {"weighted_pixels" if network is None else "pixels": 1.0}
        scales |= ({} if network is None else {kind: 1.0}) | dict.fromkeys(book.terms, 1.0)
        scales |= {"commitment": config.commitment_scale} if "commitment" in scales else {}
        scales |= {"edges": config.edge_scale} if config.edge_scale else {}
        scales |= {"uneven": config.even_scale} if "uneven" in scales else {}
        seeing: list[nn.Module] = [self.tokenizer]
        if self.label is not None:
            scales["label"], seeing = config.label_scale, [*seeing, self.label]
        if self.other_label is not None:
            scales["other_label"], seeing = config.label_scale, [*seeing, self.other_label]
        tokenizer = Objective(
            "tokenizer", tuple(p for part in seeing for p in part.parameters() if p.requires_grad),
            partial(self._pair_loss if self.pairs else self._tokenizer_loss, network), scales,
            Optim(lr=config.tokenizer_lr, clip=config.clip, decay=config.tokenizer_decay),
            after=self._follow if config.quantizer == "ema" else None, metrics=TOKENIZER_METRICS,
        )  # fmt: skip
        counted = config.context_frames * self.tokenizer.tokens
        unpredicted = 1 if config.dynamics == "gpt" else self.tokenizer.tokens
        learning = tuple(self.transformer.parameters())
        learning += () if self.arrival is None else tuple(self.arrival.parameters())
        world_model = Objective(
            "world_model", learning, self._transformer_loss,
            # The mean is over the tokens that are predicted: a segment's first one, or first frame, is not.
            {"tokens": counted / (counted - unpredicted), "reward": 1.0, "end": 1.0},
            Optim(lr=config.lr, clip=config.clip, weight_decay=config.weight_decay, decay=config.decay),
            undecayed=_other_than_linear(self.transformer), after=lambda learned: self.reward.note(*learned),
            metrics=TRANSFORMER_METRICS,
        )  # fmt: skip
        length, segments = 1, config.tokenizer_batch
        if self.pairs:
            length, segments = self.drawn_on + config.chain, max(1, config.tokenizer_batch // config.chain)
        return (
            Stage("tokenizer", (tokenizer,), segments, length, config.tokenizer_updates),
            Stage("world_model", (world_model,), config.batch_size, config.context_frames, config.updates, self._codes),
        )

    def _tokenizer_loss(self, network: nn.Module | None, batch: Batch) -> Losses:
        """Likeness of the pictures, and the quantiser's own losses, (B, T).

        With a perceptual network, its likeness and L1 in the networks' range of [-1, 1]; else the pixels of `reverie`:
        squared errors, which a lost ball makes large and a faint noise small, and more the further from the background.
        """
        assert isinstance(self.tokenizer, VQTokenizer)
        target = to_unit(batch.frame)
        shown, latent, quantized = self.tokenizer.reconstruct(self._contrast(target))
        terms, metrics = self._likeness(network, self._picture(shown), target, batch.valid)
        every = {name: Term(term, "valid") for name, term in (terms | quantized.terms).items()}
        return self._quantized(every, metrics, latent, quantized, batch.valid)

    def _pair_loss(self, network: nn.Module | None, batch: Batch) -> Losses:
        """The same of pairs: segments (B, n + chain), of which the first n frames are only drawn on.

        The later ones are drawn on the decoder's own pictures, as in a dream, so that it learns to mend what it did.
        In some, the first frames stand still, as at the beginning of an episode.
        """
        assert isinstance(self.tokenizer, PairTokenizer)
        config, target, tokenizer = self.config, to_unit(batch.frame), self.tokenizer
        seen, count = self._contrast(target), self.drawn_on
        latent = tokenizer.latent(seen[:, count - 1 : -1], seen[:, count:])  # (B, chain, N, D)
        quantized = tokenizer.embedding.quantize(latent)
        before, shown = seen[:, :count].clone(), []
        before[: len(before) // STILL] = before[: len(before) // STILL, -1:]
        for k, codes in enumerate(quantized.codes.unbind(1)):
            picture = own = self._picture(self._drawn(before, codes, seen[:, count + k]))
            shown.append(picture)
            if config.flow_steps and k + 1 < config.chain:
                with torch.no_grad():
                    own = self._picture(tokenizer.picture(before, codes))
            before = torch.cat([before[:, 1:], self._contrast(own.detach().clamp(0, 1)).unsqueeze(1)], 1)
        arrived = batch.mask("arrived")[:, count:]
        terms, metrics = self._likeness(network, torch.stack(shown, 1), target[:, count:], arrived)
        terms |= quantized.terms
        likeness = next(iter(terms))
        metrics["chained"] = mean_where(terms[likeness][:, -1].detach(), arrived[:, -1].float())
        if self.label is not None:
            known = self._known(batch.frame)[:, count - 1 : -1] / max(config.labels, 1e-9)
            done, codes = batch.action[:, count - 1 : -1], quantized.codes
            told = self.label(codes[:, :, 0] if config.action_codes else codes.flatten(2))
            terms["label"] = cross_entropy(told, done) * known
            if self.other_label is not None:
                # The gradient turns round before the codes: what the reader learns from them they learn to hide.
                others = codes[:, :, 1:].flatten(2)
                terms["other_label"] = cross_entropy(self.other_label(2 * others.detach() - others), done) * known
        every = {name: Term(F.pad(term, (count, 0)), "arrived") for name, term in terms.items()}
        return self._quantized(every, metrics, latent, quantized, arrived)

    def _drawn(self, before: Tensor, codes: Tensor, target: Tensor) -> Tensor:
        """What the decoder draws in training; in a flow from anywhere on the straight way to what it should draw."""
        assert isinstance(self.tokenizer, PairTokenizer)
        if not self.config.flow_steps:
            return self.tokenizer.drawn(before, codes)
        time = torch.rand(len(target), device=target.device)
        return self.tokenizer.drawn(before, codes, before[:, -1].lerp(target, time.view(-1, 1, 1, 1)), time)

    def _quantized(
        self, terms: dict[str, Term], metrics: dict[str, Tensor], latent: Tensor, quantized: Quantized, real: Tensor
    ) -> Losses:
        """The losses with how the codes are used and what they learn from: latents (B, T, N, D), where real (B, T)."""
        tokens, each = quantized.tokens.flatten(), real.unsqueeze(-1).expand_as(quantized.tokens).flatten()
        metrics = metrics | quantizers.usage(tokens, self.config.codes, each)
        return Losses(terms, metrics, learned=(latent.detach().float().flatten(0, 2), tokens, each))

    @torch.no_grad()
    def _own_pictures(self, frame: Tensor, action: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Segments (B, T, C, H, W), (B, T), (B, T, N) for dynamics that read pictures: the last frames of the first
        segments are those that it dreams, and of pairs the tokens lead from there to what really came."""
        steps, rows = rollout(frame, self.config.rollout_steps, self.config.rollout_share)
        if not rows or self.config.labels < 1:  # it is told actions there
            return frame, tokens
        frame, tokens, first = frame.clone(), tokens.clone(), frame.shape[1] - steps
        real, state = frame[:rows].clone(), self.start(frame[:rows, :first], action[:rows])
        for t in range(first, frame.shape[1]):
            tokens[:rows, t] = self.encode(real[:, t], frame[:rows, t - 1])
            state = self.imagine(self.advance(state, action[:rows, t - 1]), 0)
            frame[:rows, t] = state.memory["recent"][:, -1]
        return frame, tokens

    def _known(self, frame: Tensor) -> Tensor:
        """Where the action at a frame (B, T, C, H, W) uint8 is known, (B, T) float.

        The sum of the frame's pixels decides, so that it is the same in every batch; equal frames are known alike.
        """
        mixed = frame.flatten(2).sum(-1, dtype=torch.long) * 2_654_435_761 % 2**32
        return (mixed < self.config.labels * 2**32).float()

    def _likeness(
        self, network: nn.Module | None, shown: Tensor, target: Tensor, real: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Terms (B, T) and metrics of pictures (B, T, C, H, W), of which some are real (B, T)."""
        error, valid = shown - target, real.float()
        l1 = 2 * error.abs().mean((-3, -2, -1))
        terms: dict[str, Tensor] = {}
        metrics = {"l1": mean_where(l1.detach(), valid)}
        if network is None:
            contrast = (target - self.background).abs().amax(-3, keepdim=True)
            emphasis = 1 + self.config.foreground * contrast
            terms["weighted_pixels"] = 0.5 * ((error / SIGMA).square() * emphasis).mean((-3, -2, -1))
        else:
            terms |= {"pixels": l1, self.config.perceptual: network(shown, target)}
        if self.config.edge_scale:
            steps = [(error.diff(dim=way) / SIGMA).square().mean((-3, -2, -1)) for way in (-2, -1)]
            terms["edges"] = 0.5 * (steps[0] + steps[1])
        return terms, metrics

    def _contrast(self, frame: Tensor) -> Tensor:
        """What the tokenizer reads, whose networks see 2 x - 1."""
        return (frame - self.background) / (2 * SIGMA) + 0.5 if self.config.contrast else frame

    def _picture(self, shown: Tensor) -> Tensor:
        """The frame of what the tokenizer shows: the other way round, in full precision."""
        return self.background + (shown.float() - 0.5) * (2 * SIGMA) if self.config.contrast else shown.float()

    def _follow(self, learned: tuple[Tensor, Tensor, Tensor]) -> None:
        assert isinstance(self.tokenizer.embedding, MovingCodebook | CodebooksApart)
        self.tokenizer.embedding.follow(*learned)

    @torch.no_grad()
    def _codes(self, frame: Tensor, action: Tensor) -> Tensor:
        """What the dynamics learn from: frames (T, C, H, W) -> tokens (T, N)."""
        return self.encode(frame, torch.cat([frame[:1], frame[:-1]])) if self.pairs else self.encode(frame)

    def _transformer_loss(self, batch: Batch) -> Losses:
        """How surprising a frame's tokens were, in nats each (B, T, N), and what the action at t brought (B, T).

        `batch.code` is (B, T, N) of `_codes`.
        """
        assert batch.code is not None
        pictures, tokens = None, batch.code.long()
        if self.transformer.context:
            frame, tokens = self._own_pictures(to_unit(batch.frame), batch.action, tokens)
            pictures = self._contexts(frame, torch.arange(frame.shape[1], device=frame.device))
        said = self.transformer.predict(tokens, batch.action, self.tokenizer.embedding.weight, pictures)
        reward, end = said.reward, said.end
        if self.arrival is not None:
            with torch.no_grad():  # the tokenizer learns nothing from this
                codes = self.tokenizer.embedding(tokens[:, 1:])
            both = torch.cat([codes.flatten(-2), said.h[:, :-1]], -1)  # what follows the last is not in the segment
            more = {name: F.pad(head(both), (0, 0, 0, 1)) for name, head in self.arrival.items()}
            reward, end = reward + more["reward"], end + more["end"]
        nats = {
            "tokens": said.nats,
            "reward": cross_entropy(reward, self.reward.target(batch.reward)),
            "end": cross_entropy(end, batch.terminated.long()),
        }
        if self.config.labels < 1:  # what follows an action is learned where the action is known
            known = self._known(batch.frame) / max(self.config.labels, 1e-9)
            nats = {name: each * known for name, each in nats.items() if name != "tokens"}
            nats["tokens"] = said.nats * F.pad(known[:, :-1], (1, 0)).unsqueeze(-1)
        terms = {name: Term(each, "valid" if name == "tokens" else "has_action") for name, each in nats.items()}
        metrics: dict[str, Tensor] = {}
        if said.right is not None:
            real = batch.valid[:, 1:, None].expand_as(said.right).float()
            right, moved = said.right.float(), (tokens[:, 1:] != tokens[:, :-1]).float()
            metrics = {"accuracy": mean_where(right, real), "accuracy_moved": mean_where(right, moved * real),
                       "still": 1 - mean_where(moved, real)}  # fmt: skip
        return Losses(terms, metrics, learned=(batch.reward.flatten(), batch.has_action.flatten()))


def _arrival_head(inputs: int, width: int, classes: int) -> nn.Sequential:
    """What the codes that came add to the logits of an outcome: nothing, at first."""
    last = nn.Linear(width, classes)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), last)


def _up_to(frame: Tensor, times: Tensor, count: int) -> Tensor:
    """Of frames (B, T, C, H, W) so many up to each time, (B, len(times), count, C, H, W); the first again before it."""
    ages = torch.arange(1 - count, 1, device=frame.device)
    return frame[:, (times.unsqueeze(1) + ages).clamp(min=0)]


def _dynamics(memory: Tree) -> Tree:
    """What of a memory is the dynamics'."""
    return {name: leaf for name, leaf in memory.items() if name not in PICTURES}


def _pictures(memory: Tree) -> Tree:
    """What is not."""
    return {name: leaf for name, leaf in memory.items() if name in PICTURES}


def _other_than_linear(model: nn.Module) -> tuple[nn.Parameter, ...]:
    """What weight decay leaves alone: biases, norms, embeddings and positions."""
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    return tuple(p for p in model.parameters() if id(p) not in linear)

"""Number formats, chosen once and from outside: what training computes in, and models used only to play."""

from __future__ import annotations

from itertools import chain
from typing import Literal

import torch
from torch import nn

from envs.errors import UserError
from world_model.parts.blocks import to_int8
from world_model.parts.gpt import GPT

Format = Literal["fp32", "bf16", "int8"]
LARGE = 4_000_000  # parameters of a transformer whose weights no longer stay in the processor's cache between tokens


def mixed_precision(device: torch.device, precision: str = "auto") -> bool:
    """Whether to autocast to bfloat16: "bf16", "fp32", or "auto" (where the processor multiplies it natively)."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def lstm_in_bf16() -> bool:
    """Whether torch's LSTM runs in bfloat16 on this CPU: only where oneDNN's does, which needs AVX-512."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def check_trainable(model: nn.Module, device: torch.device, precision: str) -> None:
    """Raises UserError where torch cannot train the model in this number format on this device."""
    lstm = any(isinstance(module, nn.LSTM) for module in model.modules())
    if lstm and device.type == "cpu" and mixed_precision(device, precision) and not lstm_in_bf16():
        raise UserError(
            "train.precision=bf16 needs a CPU with AVX-512 for a recipe with an LSTM: choose auto or fp32, which are "
            "the same here."
        )


def inference_format(model: nn.Module, device: torch.device, *, many: bool, precision: str = "auto") -> Format:
    """The fastest format for dreaming many rows at once, or a single one.

    Most single rows spend in casting to bfloat16 what they save in multiplying with it. That of a large transformer
    costs what reading the weights costs, once a token, which int8 halves again on a CPU.
    """
    if not mixed_precision(device, precision):
        return "fp32"
    if many or device.type == "cuda":
        return "bf16"
    return "int8" if any(_parameters(gpt) > LARGE for gpt in _transformers(model)) else "fp32"


def for_inference(*parts: nn.Module, format: Format) -> None:
    """Casts in place what multiplies most, which autocast in inference mode would cast at every call.

    For what is trained no more and runs under autocast alone (but for "fp32", which changes nothing). With "int8" the
    linear layers of a GPT are rounded, everything else is bfloat16.
    """
    if format == "fp32":
        return
    for module in chain.from_iterable(part.modules() for part in parts):
        if isinstance(module, nn.Conv2d | nn.LSTM):
            module.to(torch.bfloat16)
    for gpt in chain.from_iterable(map(_transformers, parts)):
        linear = [layer for part in (gpt.blocks, gpt.next_token) for layer in part.modules()]
        for layer in linear:
            if isinstance(layer, nn.Linear):
                to_int8(layer) if format == "int8" else layer.to(torch.bfloat16)


def _transformers(part: nn.Module) -> list[GPT]:
    return [module for module in part.modules() if isinstance(module, GPT)]


def _parameters(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())

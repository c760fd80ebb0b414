# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Weights in the layout of the Triton kernels, and what all launches share."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor
from triton import next_power_of_2

from . import _evor_select as kernels
from .packing import split_tensors

__all__ = [
    "CODEGEN",
    "device_guard",
    "first_layer_base",
    "OPERANDS",
    "pack_weights",
    "TritonWeights",
]

# Sums of products in one rounding, which Triton is about to turn off by default.
CODEGEN = {"enable_fp_fusion": True}
OPERANDS = {
    "fp16": (torch.float16, "tf32"),
    "bf16": (torch.bfloat16, "tf32"),
    "tf32": (torch.float32, "tf32"),
    "tf32x3": (torch.float32, "tf32x3"),
    "ieee": (torch.float32, "ieee"),
}


class TritonWeights(NamedTuple):
    """Folded weights in the layout of the kernels, padded with zeros to ``pad`` columns."""

    first_weight: Tensor  # [H, obs + act]
    first_z: Tensor  # [H]
    first_t: Tensor  # [H]
    first_bias: Tensor | None  # [H]
    hidden: Tensor  # [L - 1, pad, pad], operand dtype
    sums: Tensor  # [L, pad]
    biases: Tensor  # [L, pad]
    head: Tensor  # [pad]
    pad: int
    widths: tuple[int, ...]


def padded_width(widths, power_of_two: bool) -> int:
    """Columns after padding: a power of two, or a multiple of 64 (of 128 above 128)."""
    width = max(*widths, 16)
    if power_of_two or width <= 64:
        return next_power_of_2(width)
    return -(-width // 128) * 128 if width > 128 else 128


def _fold_layer(pair, norm, out, sums, bias, precision: str) -> None:
    weight, linear_bias = pair
    gamma, beta = norm if norm is not None else (None, None)
    n_out, n_in = weight.shape
    block_m = 16 if out.shape[0] >= 16 else 1
    kernels._fold_kernel[(-(-out.shape[0] // block_m),)](
        weight,
        weight if gamma is None else gamma,
        weight if beta is None else beta,
        weight if linear_bias is None else linear_bias,
        out,
        sums,
        bias,
        n_out,
        n_in,
        weight.stride(0),
        out.shape[0],
        PAD=out.shape[-1],
        HAS_GAMMA=gamma is not None,
        HAS_BETA=beta is not None,
        HAS_BIAS=linear_bias is not None,
        PRECISION=precision,
        BLOCK_M=block_m,
        BLOCK_K=min(64, out.shape[-1]),
        num_warps=4,
        **CODEGEN,
    )


def pack_weights(
    tensors: list[Tensor | None], layer_norm: bool, precision: str, power_of_two: bool = False
) -> TritonWeights:
    """Folds, pads and rounds the weights: one launch per layer after the first."""
    # The kernel that folds reads columns of unit stride.
    tensors = [tensor if tensor is None else tensor.contiguous() for tensor in tensors]
    linears, norms = split_tensors(tensors, layer_norm)
    first, first_bias = linears[0]
    widths = tuple(weight.shape[0] for weight, _ in linears[:-1])
    pad = padded_width(widths, power_of_two)
    depth = len(linears) - 1
    operand, input_precision = OPERANDS[precision]
    hidden = first.new_empty(depth - 1, pad, pad, dtype=operand)
    head = first.new_empty(1, pad, dtype=torch.float32)
    sums = first.new_empty(depth, pad, dtype=torch.float32)
    biases = torch.empty_like(sums)
    with device_guard(first):
        for index, pair in enumerate(linears[1:]):
            # The head's product is a sum in float32.
            last = index == depth - 1
            out, digits = (head, "ieee") if last else (hidden[index], input_precision)
            norm = norms[index] if layer_norm else None
            _fold_layer(pair, norm, out, sums[index], biases[index], digits)
    first_z, first_t = first[:, -2].contiguous(), first[:, -1].contiguous()
    return TritonWeights(
        first[:, :-2], first_z, first_t, first_bias, hidden, sums, biases, head[0], pad, widths
    )


def device_guard(tensor: Tensor):
    # A launch on a device that is not the current one would read foreign pointers.
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def first_layer_base(weights: TritonWeights, observation: Tensor, action: Tensor) -> Tensor:
    """Share of observation and action in the first pre-activation, ``[S, P, H]``."""
    obs_dim = observation.shape[-1]
    weight_x = weights.first_weight[:, :obs_dim]
    weight_a = weights.first_weight[:, obs_dim:]
    shared = torch.nn.functional.linear(observation, weight_x, weights.first_bias)
    # One product, not one for each state.
    return torch.nn.functional.linear(action, weight_a).add_(shared.unsqueeze(1))

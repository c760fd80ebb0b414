# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Launches the Triton kernels: weight layout, work space, configurations, order of launches."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _evor_select as kernels
from ._select_kernel import _average_kernel, _select_kernel
from ._steps import Steps
from .packing import split_tensors

__all__ = [
    "evor_select",
    "LayerConfig",
    "LoopConfig",
    "pack_weights",
    "sample_z",
    "select",
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


class LayerConfig(NamedTuple):
    """Tile of the layered design. ``rows`` bounds the rows in flight, and so the work space."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    rows: int = 32768
    pdl: bool = False


class LoopConfig(NamedTuple):
    """Tile of the loop design."""

    block_m: int
    block_k: int
    warps: int
    stages: int
    rows: int = 2**18


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
        return 1 << (width - 1).bit_length()
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


class _Sampler(NamedTuple):
    """What every launch of one call shares."""

    weights: TritonWeights
    base: Tensor  # [S, P, H]
    noise: Tensor  # [R], [N] or the seed, [2] int64
    num_nodes: int
    steps: Steps
    activation: str
    eps: float  # negative without LayerNorm
    precision: str

    @property
    def layer_norm(self) -> bool:
        return self.eps >= 0

    @property
    def noise_kind(self) -> str:
        if self.noise.dtype == torch.int64:
            return "seed"
        return "rows" if self.noise.numel() == self.num_rows else "shared"

    @property
    def num_rows(self) -> int:
        return self.base.shape[0] * self.base.shape[1] * self.num_nodes


def _layered_chunk(
    s: _Sampler, config: LayerConfig, z: Tensor, z_row: int, first_row: int, last_row: int
) -> None:
    w = s.weights
    operand, input_precision = OPERANDS[s.precision]
    block_n = min(config.block_n, w.pad)
    block_k = min(config.block_k, w.pad)
    parts = w.pad // block_n
    padded = -(-(last_row - first_row) // config.block_m) * config.block_m
    new = z.new_empty
    buffers = [new(padded, w.pad, dtype=operand) for _ in range(2)]
    stats = [new(parts, 2, padded) for _ in range(2)]
    head_part = new(parts, padded)
    common = {
        "LAYER_NORM": s.layer_norm,
        "ACTIVATION": s.activation,
        "PRECISION": input_precision,
        "PDL": config.pdl,
    }
    if config.pdl:
        common["launch_pdl"] = True
    depth = len(w.widths)
    first_m = 8 if padded < 8192 else 16
    for k in range(s.steps.num + 1):
        stage = 0 if k == 0 else (1 if k < s.steps.num else 2)
        before = max(k - 1, 0)  # the evaluation whose velocity is added
        kernels._first_kernel[(padded // first_m,)](
            s.noise,
            z,
            head_part,
            stats[(depth - 1) % 2],
            w.sums[depth - 1],
            w.biases[depth - 1],
            s.base,
            w.first_z,
            w.first_t,
            buffers[0],
            stats[0],
            first_row,
            last_row,
            z_row,
            s.num_nodes,
            padded,
            w.widths[0],
            1.0 / w.widths[-1],
            s.eps,
            k / s.steps.num,
            s.steps.length(before) / s.steps.num,
            PAD=w.pad,
            PARTS=parts,
            STAGE=stage,
            KEEP=k == 0 or not s.steps.is_half(before),
            NOISE=s.noise_kind,
            BLOCK_M=first_m,
            BLOCK_K=min(128, w.pad) if w.pad % 128 == 0 or w.pad < 128 else 64,
            num_warps=4,
            **CODEGEN,
            **common,
        )
        if stage == 2:
            break
        for layer in range(depth - 1):
            last = layer == depth - 2
            kernels._hidden_kernel[(padded // config.block_m * parts,)](
                buffers[layer % 2],
                w.hidden[layer],
                w.sums[layer],
                w.biases[layer],
                stats[layer % 2],
                head_part if last else buffers[(layer + 1) % 2],
                stats[(layer + 1) % 2],
                w.head,
                padded,
                1.0 / w.widths[layer],
                s.eps,
                PAD=w.pad,
                PARTS_IN=1 if layer == 0 else parts,
                LAST=last,
                BLOCK_M=config.block_m,
                BLOCK_N=block_n,
                BLOCK_K=block_k,
                num_warps=config.warps,
                **CODEGEN,
                num_stages=config.stages,
                **common,
            )


def _layered(s: _Sampler, config: LayerConfig, z: Tensor, first_row: int, last_row: int) -> None:
    rows = last_row - first_row
    chunks = -(-rows // config.rows)
    # Equal chunks, in whole tiles: a short last chunk would leave multiprocessors idle.
    size = -(-rows // (chunks * config.block_m)) * config.block_m
    for start in range(first_row, last_row, size):
        _layered_chunk(s, config, z, first_row, start, min(start + size, last_row))


def _loop(
    s: _Sampler, config: LoopConfig, z: Tensor, first_row: int, last_row: int, programs: int
) -> None:
    w = s.weights
    operand, input_precision = OPERANDS[s.precision]
    grid = min(-(-(last_row - first_row) // config.block_m), programs)
    kernels._loop_kernel[(grid,)](
        s.noise,
        z,
        s.base,
        w.first_z,
        w.first_t,
        w.hidden,
        w.sums,
        w.biases,
        w.head,
        z.new_empty(grid, 2, config.block_m, w.pad, dtype=operand),
        first_row,
        last_row,
        s.num_nodes,
        w.widths[0],
        s.steps.num,
        1.0 / w.widths[0],
        s.eps,
        1.0 / s.steps.num,
        PAD=w.pad,
        HIDDEN=w.hidden.shape[0],
        MIDPOINT=s.steps.solver == "midpoint",
        NOISE=s.noise_kind,
        LAYER_NORM=s.layer_norm,
        ACTIVATION=s.activation,
        PRECISION=input_precision,
        BLOCK_M=config.block_m,
        BLOCK_K=min(config.block_k, w.pad),
        num_warps=config.warps,
        **CODEGEN,
        num_stages=config.stages,
    )


def sample_z(
    weights: TritonWeights,
    observation: Tensor,
    action: Tensor,
    noise: Tensor,
    num_nodes: int,
    *,
    steps: Steps,
    activation: str,
    eps: float,
    precision: str,
    config: LayerConfig | LoopConfig,
    programs: int = 132,
) -> Tensor:
    """End points of the flow, ``[S, P, N]`` float32.

    Args:
        weights (TritonWeights): from :func:`pack_weights`.
        observation (Tensor): ``[S, obs]``.
        action (Tensor): ``[S, P, act]``.
        noise (Tensor): ``[S * P * N]``, or ``[N]`` for nodes shared by all candidates, or int64
            ``[2]``, the seed from which the kernels draw it; contiguous.
        num_nodes (int): ``N``.

    Keyword Args:
        steps (Steps): evaluations of the velocity.
        activation (str): name of the activation.
        eps (float): epsilon of the LayerNorms, negative where there are none.
        precision (str): key of ``OPERANDS``.
        config (LayerConfig or LoopConfig): tile, and with it the design.
        programs (int): programs in flight of the loop design.

    Returns:
        Tensor: ``[S, P, N]``.
    """
    z = torch.empty(*action.shape[:2], num_nodes, dtype=torch.float32, device=action.device)
    with device_guard(z):
        base = first_layer_base(weights, observation, action)
        sampler = _Sampler(weights, base, noise, num_nodes, steps, activation, eps, precision)
        _sample_rows(sampler, config, z.view(-1), 0, z.numel(), programs)
    return z


def _sample_rows(s: _Sampler, config, z: Tensor, first_row: int, last_row: int, programs: int):
    """Writes the end points of some rows to ``z``, which starts with the first of them."""
    if isinstance(config, LayerConfig):
        _layered(s, config, z, first_row, last_row)
    else:
        _loop(s, config, z, first_row, last_row, programs)


def evor_select(
    weights: TritonWeights,
    observation: Tensor,
    action: Tensor,
    noise: Tensor,
    num_nodes: int,
    gumbel: Tensor | None,
    log_weights: Tensor | None,
    loc: Tensor,
    scale: Tensor,
    tau_r: float,
    tau_q: float,
    return_samples: bool,
    *,
    steps: Steps,
    activation: str,
    eps: float,
    precision: str,
    config: LayerConfig | LoopConfig,
    programs: int = 132,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """End points, values and choice; arguments and results of :func:`sample_z` and :func:`select`.

    Unless all returns are asked for, end points are kept for ``config.rows`` rows at a time, so
    that memory does not grow with the number of nodes (up to that many).
    """
    pairs = action.shape[0] * action.shape[1]
    options = {"steps": steps, "activation": activation, "eps": eps, "precision": precision}
    at_once = max(1, config.rows // num_nodes)
    if return_samples or pairs <= at_once:
        z = sample_z(
            weights,
            observation,
            action,
            noise,
            num_nodes,
            config=config,
            programs=programs,
            **options,
        )
        return select(z, action, gumbel, log_weights, loc, scale, tau_r, tau_q, return_samples)
    at_once = -(-pairs // -(-pairs // at_once))  # equal pieces
    q = torch.empty(action.shape[:2], dtype=torch.float32, device=action.device)
    with device_guard(q):
        base = first_layer_base(weights, observation, action)
        sampler = _Sampler(weights, base, noise, num_nodes, **options)
        z = q.new_empty(at_once * num_nodes)
        for first in range(0, pairs, at_once):
            last = min(first + at_once, pairs)
            _sample_rows(sampler, config, z, first * num_nodes, last * num_nodes, programs)
            _average(z, q, first, last, num_nodes, log_weights, loc, scale, tau_r)
    return _choose(q, action, gumbel, loc, scale, tau_q)


def _average_kind(tau_r: float) -> str:
    return "max" if tau_r == 0 else "mean" if math.isinf(tau_r) else "lse"


def _average(
    z: Tensor,
    q: Tensor,
    first: int,
    last: int,
    num_nodes: int,
    log_weights: Tensor | None,
    loc: Tensor,
    scale: Tensor,
    tau_r: float,
) -> None:
    """Values of some candidates from their end points."""
    block_p = 8
    _average_kernel[(-(-(last - first) // block_p),)](
        z,
        z if log_weights is None else log_weights,
        loc,
        scale,
        q,
        first,
        last,
        num_nodes,
        tau_r,
        math.log(num_nodes),
        AVERAGE=_average_kind(tau_r),
        WEIGHTED=log_weights is not None,
        BLOCK_P=block_p,
        BLOCK_N=min(triton_next_power_of_two(num_nodes), 64),
        num_warps=4,
        **CODEGEN,
    )


def select(
    z: Tensor,
    action: Tensor,
    gumbel: Tensor | None,
    log_weights: Tensor | None,
    loc: Tensor,
    scale: Tensor,
    tau_r: float,
    tau_q: float,
    return_samples: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values and choice from end points, one launch: action, value, all values and returns.

    The last is empty unless ``return_samples``. ``gumbel`` is noise ``[S, P]`` or a seed, as in
    :func:`sample_z`.
    """
    q = z.new_empty(z.shape[:2])
    returns = torch.empty_like(z) if return_samples else z.new_empty(0)
    average = _average_kind(tau_r)
    return _launch_select(
        z, action, gumbel, log_weights, loc, scale, q, returns, z.shape[2], tau_r, tau_q, average
    )


def _choose(q: Tensor, action: Tensor, gumbel: Tensor | None, loc, scale, tau_q: float):
    """Choice from values ``[S, P]``."""
    return _launch_select(
        q, action, gumbel, None, loc, scale, q, q.new_empty(0), 1, 1.0, tau_q, "given"
    )


def _launch_select(
    z, action, gumbel, log_weights, loc, scale, q, returns, num_nodes, tau_r, tau_q, average
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    states, num_candidates = q.shape
    chosen, value = action.new_empty(states, action.shape[-1]), q.new_empty(states)
    kind = "" if tau_q == 0 else "seed" if gumbel.dtype == torch.int64 else "rows"
    with device_guard(q):
        _select_kernel[(states,)](
            z,
            z if log_weights is None else log_weights,
            z if gumbel is None else gumbel,
            action,
            loc,
            scale,
            chosen,
            value,
            q,
            returns,
            num_candidates,
            num_nodes,
            action.shape[-1],
            tau_r,
            tau_q,
            math.log(num_nodes),
            AVERAGE=average,
            WEIGHTED=log_weights is not None,
            GUMBEL=kind,
            RETURNS=returns.numel() > 0,
            BLOCK_P=min(triton_next_power_of_two(num_candidates), 32),
            BLOCK_N=min(triton_next_power_of_two(num_nodes), 64),
            BLOCK_A=min(triton_next_power_of_two(action.shape[-1]), 64),
            num_warps=4,
            **CODEGEN,
        )
    return chosen, value, q, returns


def triton_next_power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()

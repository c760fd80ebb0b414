# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Launches the Triton kernels: work space, configurations, order of launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _evor_select as kernels
from ._launch_select import average, choose, select
from ._steps import Steps
from ._triton_weights import CODEGEN, OPERANDS, TritonWeights, device_guard, first_layer_base

__all__ = ["evor_select", "LayerConfig", "LoopConfig", "sample_z"]


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
            average(z, q, first, last, num_nodes, log_weights, loc, scale, tau_r)
    return choose(q, action, gumbel, loc, scale, tau_q)

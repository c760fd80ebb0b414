# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Launches of what follows the flow: average over the samples, choice among the candidates."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton import next_power_of_2

from ._select_kernel import _average_kernel, _select_kernel
from ._triton_weights import CODEGEN, device_guard

__all__ = ["average", "choose", "select"]


def _average_kind(tau_r: float) -> str:
    return "max" if tau_r == 0 else "mean" if math.isinf(tau_r) else "lse"


def average(
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
        BLOCK_N=min(next_power_of_2(num_nodes), 64),
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
    kind = _average_kind(tau_r)
    return _launch_select(
        z, action, gumbel, log_weights, loc, scale, q, returns, z.shape[2], tau_r, tau_q, kind
    )


def choose(q: Tensor, action: Tensor, gumbel: Tensor | None, loc, scale, tau_q: float):
    """Choice from values ``[S, P]``."""
    return _launch_select(
        q, action, gumbel, None, loc, scale, q, q.new_empty(0), 1, 1.0, tau_q, "given"
    )


def _launch_select(
    z, action, gumbel, log_weights, loc, scale, q, returns, num_nodes, tau_r, tau_q, average_kind
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
            AVERAGE=average_kind,
            WEIGHTED=log_weights is not None,
            GUMBEL=kind,
            RETURNS=returns.numel() > 0,
            BLOCK_P=min(next_power_of_2(num_candidates), 32),
            BLOCK_N=min(next_power_of_2(num_nodes), 64),
            BLOCK_A=min(next_power_of_2(action.shape[-1]), 64),
            num_warps=4,
            **CODEGEN,
        )
    return chosen, value, q, returns

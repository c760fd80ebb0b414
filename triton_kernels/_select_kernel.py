# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Triton kernel of the choice: values of all candidates from their samples, Gumbel-max, gather."""

from __future__ import annotations

import triton
import triton.language as tl

from ._philox import philox_gumbel


@triton.jit
def _expm1(x):
    """``exp(x) - 1`` for ``x <= 0``, by its series where that cancels."""
    series = x * (1.0 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120)))))
    return tl.where(x > -0.1, series, tl.exp(x) - 1.0)


@triton.jit
def _log1p(x):
    """``log(1 + x)`` for ``-1 < x <= 0``, by its series where that cancels."""
    series = x * (1.0 - x * (1 / 2 - x * (1 / 3 - x * (1 / 4 - x * (1 / 5 - x * (1 / 6))))))
    return tl.where(x > -0.1, series, tl.log(1.0 + x))


@triton.jit
def _node_average(
    z_ptr,
    returns_ptr,
    log_weight_ptr,
    rows,  # [BLOCK_P], offset of each candidate's first node
    live,  # [BLOCK_P]
    num_nodes,
    loc,
    scale,
    tau_r,
    log_nodes,
    AVERAGE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    RETURNS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Value of each candidate, by an online log-sum-exp over its nodes; NaN if one of them is."""
    top = tl.full([BLOCK_P], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_P], tl.float32)
    peak = tl.full([BLOCK_P], float("-inf"), tl.float32)
    excess = tl.zeros([BLOCK_P], tl.float32)
    seen = tl.zeros([BLOCK_P], tl.float32)
    broken = tl.zeros([BLOCK_P], tl.int32)
    for start in range(0, num_nodes, BLOCK_N):
        nodes = start + tl.arange(0, BLOCK_N)
        mask = live[:, None] & (nodes < num_nodes)[None, :]
        offsets = rows[:, None] + nodes[None, :]
        returns = loc + scale * tl.load(z_ptr + offsets, mask, other=0.0)
        broken += tl.sum((mask & (returns != returns)).to(tl.int32), 1)
        if RETURNS:
            tl.store(returns_ptr + offsets, returns, mask)
        log_weight = tl.zeros([BLOCK_N], tl.float32) - log_nodes
        if WEIGHTED:
            inside = nodes < num_nodes
            log_weight = tl.load(log_weight_ptr + nodes, inside, other=float("-inf"))
        if AVERAGE == "mean":
            total += tl.sum(tl.where(mask, returns * tl.exp(log_weight)[None, :], 0.0), 1)
        elif AVERAGE == "max":
            keep = mask & (log_weight > float("-inf"))[None, :]
            top = tl.maximum(top, tl.max(tl.where(keep, returns, float("-inf")), 1))
        else:
            x = tl.where(mask, returns / tau_r + log_weight[None, :], float("-inf"))
            new_top = tl.maximum(top, tl.max(x, 1))
            shift = tl.where(new_top > float("-inf"), new_top, 0.0)
            total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift[:, None]), 1)
            top = new_top
            # Beside the sum, what it lacks to the sum of the weights: it keeps the digits that
            # cancel in the logarithm of the sum when tau_r is large.
            keep = mask & (log_weight > float("-inf"))[None, :]
            y = tl.where(keep, returns / tau_r, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(y, 1))
            shift = tl.where(new_peak > float("-inf"), new_peak, 0.0)
            fall = tl.where(peak > float("-inf"), peak - shift, 0.0)
            weight = tl.where(keep, tl.exp(log_weight)[None, :], 0.0)
            depth = tl.where(keep, y - shift[:, None], 0.0)
            excess = excess * tl.exp(fall) + seen * _expm1(fall)
            excess += tl.sum(weight * _expm1(depth), 1)
            seen += tl.sum(weight, 1)
            peak = new_peak
    if AVERAGE == "mean":
        q = total
    elif AVERAGE == "max":
        q = top
    else:
        q = tau_r * (tl.where(top > float("-inf"), top, 0.0) + tl.log(total))
        # Under a top node of hardly any weight it is the excess that cancels, to -1.
        q = tl.where(excess < -0.5, q, tau_r * (peak + _log1p(excess)))
    return tl.where(broken > 0, float("nan"), q)


@triton.jit
def _average_kernel(
    z_ptr,  # [last - first, N] float32: some candidates
    log_weight_ptr,  # [N] float32, read with WEIGHTED
    loc_ptr,  # [1]
    scale_ptr,  # [1]
    q_ptr,  # [S * P], written from `first` to `last`
    first,
    last,
    num_nodes,
    tau_r,
    log_nodes,
    AVERAGE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    live = index < last - first
    q = _node_average(
        z_ptr,
        z_ptr,
        log_weight_ptr,
        index.to(tl.int64) * num_nodes,
        live,
        num_nodes,
        tl.load(loc_ptr).to(tl.float32),
        tl.load(scale_ptr).to(tl.float32),
        tau_r,
        log_nodes,
        AVERAGE,
        WEIGHTED,
        False,
        BLOCK_P,
        BLOCK_N,
    )
    tl.store(q_ptr + first + index, q, live)


@triton.jit
def _select_kernel(
    z_ptr,  # [S, P, N] float32, not read with AVERAGE "given"
    log_weight_ptr,  # [N] float32, read with WEIGHTED
    gumbel_ptr,  # by GUMBEL: "rows" [S, P], "seed" [2] int64, "" not read
    action_ptr,  # [S, P, A]
    loc_ptr,  # [1]
    scale_ptr,  # [1]
    chosen_ptr,  # [S, A]
    value_ptr,  # [S]
    q_ptr,  # [S, P], written, or read with AVERAGE "given"
    returns_ptr,  # [S, P, N], written with RETURNS
    num_candidates,
    num_nodes,
    action_dim,
    tau_r,
    tau_q,
    log_nodes,
    AVERAGE: tl.constexpr,  # "max", "mean", "lse" or "given"
    WEIGHTED: tl.constexpr,
    GUMBEL: tl.constexpr,
    RETURNS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    state = tl.program_id(0).to(tl.int64)
    loc = tl.load(loc_ptr).to(tl.float32)
    scale = tl.load(scale_ptr).to(tl.float32)
    best = float("-inf")
    best_q = float("-inf")
    best_index = 0
    for start in range(0, num_candidates, BLOCK_P):
        index = start + tl.arange(0, BLOCK_P)
        live = index < num_candidates
        offsets = state * num_candidates + index
        if AVERAGE == "given":
            q = tl.load(q_ptr + offsets, live, other=0.0)
        else:
            q = _node_average(
                z_ptr,
                returns_ptr,
                log_weight_ptr,
                offsets * num_nodes,
                live,
                num_nodes,
                loc,
                scale,
                tau_r,
                log_nodes,
                AVERAGE,
                WEIGHTED,
                RETURNS,
                BLOCK_P,
                BLOCK_N,
            )
            tl.store(q_ptr + offsets, q, live)
        score = q
        if GUMBEL == "seed":
            score = q / tau_q + philox_gumbel(gumbel_ptr, offsets.to(tl.int32))
        elif GUMBEL == "rows":
            score = q / tau_q + tl.load(gumbel_ptr + offsets, live, other=0.0).to(tl.float32)
        score = tl.where(live & (score == score), score, float("-inf"))
        block_best = tl.max(score, 0)
        # The lowest index wins a tie, within a block and between blocks.
        block_index = tl.min(tl.where(score == block_best, index, num_candidates), 0)
        better = (block_best > best) | (start == 0)
        block_q = tl.sum(tl.where(index == block_index, q, 0.0), 0)
        best = tl.where(better, block_best, best)
        best_q = tl.where(better, block_q, best_q)
        best_index = tl.where(better, block_index, best_index)
    tl.store(value_ptr + state, best_q)
    source = action_ptr + (state * num_candidates + best_index) * action_dim
    for start in range(0, action_dim, BLOCK_A):
        cols = start + tl.arange(0, BLOCK_A)
        inside = cols < action_dim
        tl.store(chosen_ptr + state * action_dim + cols, tl.load(source + cols, inside), inside)

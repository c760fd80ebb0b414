# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Triton kernels of reward-to-go sampling and soft selection.

Layered design: per Euler step one elementwise launch (`_first_kernel`: z update and first layer)
and one matrix product per further hidden layer (`_hidden_kernel`), with LayerNorm folded into the
weights so that only two sums per row cross a layer. Loop design (`_loop_kernel`): all steps of a
tile of rows in one launch. The choice among candidates is in `_select_kernel.py`.

Limitations: forward only; row indices are 32-bit; padded width at most 1024; the loop design wants
equal hidden widths and a power of two after padding.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from ._philox import philox_normal

# The interpreter multiplies bit patterns of bfloat16 in tl.dot, so operands are widened there.
_INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu_tanh":
        # x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), with the exponent in base 2.
        return x / (1.0 + tl.exp2(-x * (2.302208198 + 0.1029432407 * x * x)))
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "silu":
        return x / (1.0 + tl.exp2(-1.4426950408889634 * x))
    else:
        return tl.maximum(x, 0.0)


@triton.jit
def _operand(x, pointer, PRECISION: tl.constexpr):
    """``x`` in the digits that a product reads, so that sums over operands agree with it."""
    if PRECISION == "tf32" and pointer.dtype.element_ty == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        # The largest NaN would wrap around to a zero.
        x = tl.where(x == x, rounded, x)
    return x.to(pointer.dtype.element_ty)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if _INTERPRET:
        if PRECISION == "tf32" and a.dtype == tl.float32:
            # Matrix units do not read the low bits; the interpreter would.
            a = (a.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
            b = (b.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _row_norm(stat_ptr, rows, stride, inv_width, eps, PARTS: tl.constexpr):
    """Mean and reciprocal deviation of rows from `PARTS` partial sums, added in a fixed order."""
    total = tl.load(stat_ptr + rows)
    square = tl.load(stat_ptr + stride + rows)
    for part in tl.static_range(1, PARTS):
        total += tl.load(stat_ptr + 2 * part * stride + rows)
        square += tl.load(stat_ptr + (2 * part + 1) * stride + rows)
    mean = total * inv_width
    return mean, tl.rsqrt(tl.maximum(square * inv_width - mean * mean, 0.0) + eps)


@triton.jit
def _fold_kernel(
    weight_ptr,  # [n_out, n_in], row stride `stride`
    gamma_ptr,  # [n_in]
    beta_ptr,  # [n_in]
    linear_bias_ptr,  # [n_out]
    out_ptr,  # [out_rows, PAD], operand dtype
    sum_ptr,  # [out_rows]
    bias_ptr,  # [out_rows]
    n_out,
    n_in,
    stride,
    out_rows,
    PAD: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_M], tl.float32)
    bias = tl.zeros([BLOCK_M], tl.float32)
    if HAS_BIAS:
        bias += tl.load(linear_bias_ptr + rows, rows < n_out, other=0.0).to(tl.float32)
    for start in range(0, PAD, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        mask = (rows < n_out)[:, None] & (cols < n_in)[None, :]
        offsets = rows[:, None] * stride + cols[None, :]
        weight = tl.load(weight_ptr + offsets, mask, other=0.0).to(tl.float32)
        if HAS_BETA:
            beta = tl.load(beta_ptr + cols, cols < n_in, other=0.0).to(tl.float32)
            bias += tl.sum(weight * beta[None, :], 1)
        if HAS_GAMMA:
            gamma = tl.load(gamma_ptr + cols, cols < n_in, other=0.0).to(tl.float32)
            weight = weight * gamma[None, :]
        # Sums of the rounded weights keep the mean term consistent with the product.
        rounded = _operand(weight, out_ptr, PRECISION)
        total += tl.sum(rounded.to(tl.float32), 1)
        out = out_ptr + rows[:, None] * PAD + cols[None, :]
        tl.store(out, rounded, (rows < out_rows)[:, None])
    tl.store(sum_ptr + rows, total, rows < out_rows)
    tl.store(bias_ptr + rows, bias, rows < out_rows)


@triton.jit
def _start(noise_ptr, rows, live, num_nodes, NOISE: tl.constexpr):
    """Start of the flow: read, by row or by node, or drawn from the seed and the row."""
    if NOISE == "seed":
        return philox_normal(noise_ptr, rows)
    else:
        source = rows % num_nodes if NOISE == "shared" else rows
        return tl.load(noise_ptr + source, live, other=0.0).to(tl.float32)


@triton.jit
def _first_kernel(
    noise_ptr,  # by NOISE: "rows" [R], "shared" [N], "seed" [2] int64
    z_ptr,  # [R'], from row z_row on; read and written by the one program that owns the row
    head_part_ptr,  # [PARTS, padded], products with the head, of the step before
    head_stat_ptr,  # [PARTS, 2, padded]
    head_sum_ptr,  # [1]
    head_bias_ptr,  # [1]
    base_ptr,  # [R / N, width]: first layer's share of observation and action, bias included
    weight_z_ptr,  # [width]
    weight_t_ptr,  # [width]
    out_ptr,  # [padded, PAD], operand dtype
    stat_ptr,  # [1, 2, padded]
    first_row,
    last_row,
    z_row,
    num_nodes,
    padded,
    width,
    inv_last_width,
    eps,
    time,
    step,
    PAD: tl.constexpr,
    PARTS: tl.constexpr,
    STAGE: tl.constexpr,  # 0: z is the noise; 1: z moves by one step; 2: the same, then nothing
    KEEP: tl.constexpr,  # whether the next evaluation starts from here (not amid a midpoint step)
    NOISE: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    local = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = first_row + local
    live = rows < last_row
    if STAGE == 0:
        z = _start(noise_ptr, rows, live, num_nodes, NOISE)
    else:
        z = tl.load(z_ptr + rows - z_row, live, other=0.0)
        velocity = tl.load(head_part_ptr + local)
        for part in tl.static_range(1, PARTS):
            velocity += tl.load(head_part_ptr + part * padded + local)
        if LAYER_NORM:
            mean, rstd = _row_norm(head_stat_ptr, local, padded, inv_last_width, eps, PARTS)
            velocity = rstd * (velocity - mean * tl.load(head_sum_ptr))
        z += step * (velocity + tl.load(head_bias_ptr))
    if KEEP:
        if STAGE > 0:
            # All warps of the program have loaded z before one of them stores it.
            tl.debug_barrier()
        tl.store(z_ptr + rows - z_row, z, live)
    if STAGE < 2:
        candidate = tl.minimum(rows, last_row - 1) // num_nodes
        total = tl.zeros([BLOCK_M], tl.float32)
        square = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, PAD, BLOCK_K):
            cols = start + tl.arange(0, BLOCK_K)
            mask = (cols < width)[None, :]
            # Candidates times the width may exceed 32 bits.
            start_of_row = candidate.to(tl.int64)[:, None] * width
            base = tl.load(base_ptr + start_of_row + cols[None, :], mask, other=0.0)
            weight_z = tl.load(weight_z_ptr + cols, cols < width, other=0.0).to(tl.float32)
            weight_t = tl.load(weight_t_ptr + cols, cols < width, other=0.0).to(tl.float32)
            x = base.to(tl.float32) + z[:, None] * weight_z[None, :] + time * weight_t[None, :]
            g = _operand(_activate(x, ACTIVATION), out_ptr, PRECISION)
            tl.store(out_ptr + local[:, None] * PAD + cols[None, :], g)
            if LAYER_NORM:
                wide = g.to(tl.float32)
                total += tl.sum(wide, 1)
                square += tl.sum(wide * wide, 1)
        if LAYER_NORM:
            tl.store(stat_ptr + local, total)
            tl.store(stat_ptr + padded + local, square)


@triton.jit
def _hidden_kernel(
    in_ptr,  # [padded, PAD], operand dtype
    weight_ptr,  # [PAD, PAD]
    sum_ptr,  # [PAD]
    bias_ptr,  # [PAD]
    stat_in_ptr,  # [PARTS_IN, 2, padded]
    out_ptr,  # [padded, PAD], operand dtype; with LAST [PAD / BLOCK_N, padded] float32
    stat_out_ptr,  # [PAD / BLOCK_N, 2, padded]
    head_ptr,  # [PAD], read with LAST
    padded,
    inv_width,
    eps,
    PAD: tl.constexpr,
    PARTS_IN: tl.constexpr,
    LAST: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    parts: tl.constexpr = PAD // BLOCK_N
    part = tl.program_id(0) % parts
    rows = (tl.program_id(0) // parts) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = part * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    a_ptr = in_ptr + rows[:, None] * PAD + inner[None, :]
    b_ptr = weight_ptr + cols[None, :] * PAD + inner[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, PAD, BLOCK_K):
        acc = _dot(tl.load(a_ptr + start), tl.load(b_ptr + start), acc, PRECISION)
    if LAYER_NORM:
        mean, rstd = _row_norm(stat_in_ptr, rows, padded, inv_width, eps, PARTS_IN)
        acc = rstd[:, None] * (acc - mean[:, None] * tl.load(sum_ptr + cols)[None, :])
    g = _activate(acc + tl.load(bias_ptr + cols)[None, :], ACTIVATION)
    if LAST:
        product = tl.sum(g * tl.load(head_ptr + cols)[None, :], 1)
        tl.store(out_ptr + part * padded + rows, product)
    else:
        low = _operand(g, out_ptr, PRECISION)
        tl.store(out_ptr + rows[:, None] * PAD + cols[None, :], low)
        g = low.to(tl.float32)
    if LAYER_NORM:
        tl.store(stat_out_ptr + 2 * part * padded + rows, tl.sum(g, 1))
        tl.store(stat_out_ptr + (2 * part + 1) * padded + rows, tl.sum(g * g, 1))


@triton.jit
def _full_row(
    in_ptr,
    weight_ptr,
    sum_ptr,
    bias_ptr,
    mean,
    rstd,
    PAD: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One hidden layer for a tile of rows: `[BLOCK_M, PAD]` float32 in registers."""
    cols = tl.arange(0, PAD)
    inner = tl.arange(0, BLOCK_K)
    a_ptr = in_ptr + tl.arange(0, BLOCK_M)[:, None] * PAD + inner[None, :]
    b_ptr = weight_ptr + cols[None, :] * PAD + inner[:, None]
    acc = tl.zeros([BLOCK_M, PAD], tl.float32)
    for start in range(0, PAD, BLOCK_K):
        acc = _dot(tl.load(a_ptr + start), tl.load(b_ptr + start), acc, PRECISION)
    if LAYER_NORM:
        acc = rstd[:, None] * (acc - mean[:, None] * tl.load(sum_ptr + cols)[None, :])
    return _activate(acc + tl.load(bias_ptr + cols)[None, :], ACTIVATION)


@triton.jit
def _loop_kernel(
    noise_ptr,  # by NOISE: "rows" [R], "shared" [N], "seed" [2] int64
    z_ptr,  # [last_row - first_row], written once
    base_ptr,  # [R / N, width]
    weight_z_ptr,  # [width]
    weight_t_ptr,  # [width]
    weight_ptr,  # [HIDDEN, PAD, PAD], operand dtype
    sum_ptr,  # [HIDDEN + 1, PAD], the head last
    bias_ptr,  # [HIDDEN + 1, PAD], the head last
    head_ptr,  # [PAD]
    scratch_ptr,  # [programs, 2, BLOCK_M, PAD], operand dtype
    first_row,
    last_row,
    num_nodes,
    width,
    num_steps,
    inv_width,
    eps,
    step,
    PAD: tl.constexpr,
    HIDDEN: tl.constexpr,
    MIDPOINT: tl.constexpr,
    NOISE: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, PAD)
    half: tl.constexpr = BLOCK_M * PAD
    scratch_ptr += tl.program_id(0) * 2 * half
    tiles = tl.cdiv(last_row - first_row, BLOCK_M)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        rows = first_row + tile * BLOCK_M + lanes
        live = rows < last_row
        candidate = tl.minimum(rows, last_row - 1) // num_nodes
        origin = _start(noise_ptr, rows, live, num_nodes, NOISE)
        z = origin
        for k in range(num_steps):
            mean = tl.zeros([BLOCK_M], tl.float32)
            rstd = tl.zeros([BLOCK_M], tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            square = tl.zeros([BLOCK_M], tl.float32)
            # Other warps may still read this half: it served the layer before the last one.
            tl.debug_barrier()
            for start in range(0, PAD, BLOCK_K):
                chunk = start + tl.arange(0, BLOCK_K)
                inside = chunk < width
                start_of_row = candidate.to(tl.int64)[:, None] * width
                base = tl.load(base_ptr + start_of_row + chunk[None, :], inside[None, :], other=0.0)
                weight_z = tl.load(weight_z_ptr + chunk, inside, other=0.0).to(tl.float32)
                weight_t = tl.load(weight_t_ptr + chunk, inside, other=0.0).to(tl.float32)
                x = base.to(tl.float32) + z[:, None] * weight_z[None, :]
                x += (k * step) * weight_t[None, :]
                low = _operand(_activate(x, ACTIVATION), scratch_ptr, PRECISION)
                tl.store(scratch_ptr + lanes[:, None] * PAD + chunk[None, :], low)
                if LAYER_NORM:
                    wide = low.to(tl.float32)
                    total += tl.sum(wide, 1)
                    square += tl.sum(wide * wide, 1)
            if LAYER_NORM:
                mean = total * inv_width
                rstd = tl.rsqrt(tl.maximum(square * inv_width - mean * mean, 0.0) + eps)
            for layer in range(HIDDEN - 1):
                tl.debug_barrier()
                g = _full_row(
                    scratch_ptr + (layer % 2) * half,
                    weight_ptr + layer * PAD * PAD,
                    sum_ptr + layer * PAD,
                    bias_ptr + layer * PAD,
                    mean,
                    rstd,
                    PAD,
                    LAYER_NORM,
                    ACTIVATION,
                    PRECISION,
                    BLOCK_M,
                    BLOCK_K,
                )
                low = _operand(g, scratch_ptr, PRECISION)
                out = scratch_ptr + ((layer + 1) % 2) * half
                tl.store(out + lanes[:, None] * PAD + cols[None, :], low)
                if LAYER_NORM:
                    wide = low.to(tl.float32)
                    mean = tl.sum(wide, 1) * inv_width
                    variance = tl.sum(wide * wide, 1) * inv_width - mean * mean
                    rstd = tl.rsqrt(tl.maximum(variance, 0.0) + eps)
            tl.debug_barrier()
            g = _full_row(
                scratch_ptr + ((HIDDEN - 1) % 2) * half,
                weight_ptr + (HIDDEN - 1) * PAD * PAD,
                sum_ptr + (HIDDEN - 1) * PAD,
                bias_ptr + (HIDDEN - 1) * PAD,
                mean,
                rstd,
                PAD,
                LAYER_NORM,
                ACTIVATION,
                PRECISION,
                BLOCK_M,
                BLOCK_K,
            )
            velocity = tl.sum(g * tl.load(head_ptr + cols)[None, :], 1)
            if LAYER_NORM:
                mean = tl.sum(g, 1) * inv_width
                variance = tl.sum(g * g, 1) * inv_width - mean * mean
                rstd = tl.rsqrt(tl.maximum(variance, 0.0) + eps)
                velocity = rstd * (velocity - mean * tl.load(sum_ptr + HIDDEN * PAD))
            velocity += tl.load(bias_ptr + HIDDEN * PAD)
            if MIDPOINT:
                # Half a step leads to the velocity that then carries the whole one.
                z = origin + (1 + k % 2) * step * velocity
                origin = tl.where(k % 2 == 1, z, origin)
            else:
                z += step * velocity
        tl.store(z_ptr + rows - first_row, z, live)

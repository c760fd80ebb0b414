# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Which design and which tile: tables filled from measurements, keyed by precision and rows."""

from __future__ import annotations

import functools

import torch

from ._launch import LayerConfig, LoopConfig

__all__ = ["choose", "is_fastest", "num_programs"]

# Rows, from and to, between which the kernels were measured as faster than compiled PyTorch with
# CUDA graphs, by precision and largest width. Empty: nothing has been measured yet, so that "auto"
# takes PyTorch. `benchmarks/ad_hoc/kernel_bench.py` prints what belongs here.
_FASTEST: dict[tuple[str, int], tuple[int, int]] = {}

# Rows up to which the loop design is taken: one launch instead of dozens. Not measured yet.
_LOOP_ROWS = 4096


@functools.lru_cache
def num_programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _layer_config(precision: str, rows: int) -> LayerConfig:
    """Few rows want small tiles, so that every multiprocessor has one."""
    half = precision in ("fp16", "bf16")
    block_k = 64 if half else 32
    if rows <= 512:
        return LayerConfig(64, 32, block_k, 4, 4)
    if rows <= 8192:
        # Eight warps where the products take three times the registers: four spill on sm_80.
        return LayerConfig(64, 128, block_k, 4, 4) if half else LayerConfig(64, 128, block_k, 8, 3)
    return LayerConfig(128, 64 if precision == "tf32x3" else 128, block_k, 8, 3)


def _loop_config(precision: str, rows: int, widths: tuple[int, ...]) -> LoopConfig:
    wide = max(widths) > 512
    # Eight spill where they share few columns.
    warps = 4 if max(widths) <= 256 else 8
    if precision == "tf32x3":
        # Three times the registers of a product: 32 columns spill.
        return LoopConfig(16, 16, warps, 2 if wide else 3)
    columns = 64 if precision in ("fp16", "bf16") else 32
    # In float32, 32 columns of such widths are more than the shared memory of sm_86 and sm_89.
    block_k = columns // 2 if wide else columns
    block_m = 16 if rows <= 2048 or wide or precision == "ieee" else 32
    # Products without matrix units spill at two stages on sm_80, at three on sm_90.
    return LoopConfig(block_m, block_k, warps, 1 if wide and precision == "ieee" else 2)


def _loop_fits(widths: tuple[int, ...]) -> bool:
    return len(set(widths)) == 1


def is_fastest(widths: tuple[int, ...], precision: str, rows: int) -> bool:
    """Whether a measurement says that the kernels are the fastest path for this call.

    Args:
        widths (tuple of int): hidden widths.
        precision (str): operands of the products.
        rows (int): states times candidates times nodes.
    """
    first, last = _FASTEST.get((precision, max(widths)), (1, 0))
    return first <= rows <= last


def choose(
    backend: str, widths: tuple[int, ...], precision: str, rows: int
) -> LayerConfig | LoopConfig:
    """Tile, and with it the design, of one call.

    Args:
        backend (str): ``"triton"`` or the name of one design.
        widths (tuple of int): hidden widths.
        precision (str): operands of the products.
        rows (int): states times candidates times nodes.

    Raises:
        RuntimeError: if ``"triton_loop"`` is asked for and the widths differ.
    """
    if backend == "triton_loop" and not _loop_fits(widths):
        raise RuntimeError(
            f"backend='triton_loop' is not available: it wants equal hidden widths, got {widths}."
        )
    # One design for a shape, captured in a graph or not: what warms a graph up is what it holds.
    small = rows <= _LOOP_ROWS and _loop_fits(widths)
    if backend == "triton_loop" or (backend == "triton" and small):
        return _loop_config(precision, rows, widths)
    return _layer_config(precision, rows)

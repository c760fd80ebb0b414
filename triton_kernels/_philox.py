# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Noise drawn inside the kernels, entry by entry as in ``reference.philox_normal``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _words(seed_ptr, index, STREAM: tl.constexpr):
    """First two words of Philox4x32-10 for each entry; `index` is int32."""
    call = tl.load(seed_ptr + 1)
    zero = index * 0
    low, high = call.to(tl.int32), (call >> 32).to(tl.int32)
    first, second, _, _ = tl.philox(
        tl.load(seed_ptr), index, zero + STREAM, zero + low, zero + high
    )
    return first, second


@triton.jit
def _uniform(word):
    # 23 bits and a half: exact in float32, never 0 or 1.
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def philox_normal(seed_ptr, index):
    first, second = _words(seed_ptr, index, 0)
    return tl.sqrt(-2.0 * tl.log(_uniform(first))) * tl.cos(6.283185307179586 * _uniform(second))


@triton.jit
def philox_gumbel(seed_ptr, index):
    first, _ = _words(seed_ptr, index, 1)
    return -tl.log(-tl.log(_uniform(first)))

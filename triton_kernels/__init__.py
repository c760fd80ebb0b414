# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Fused reward-to-go sampling and soft selection."""

from __future__ import annotations

from .ops import (
    PackedVelocity,
    evor_select,
    pack_velocity_mlp,
    sample_returns,
    why_no_triton,
    why_not_packable,
)
from .reference import philox_gumbel, philox_normal

__all__ = [
    "evor_select",
    "pack_velocity_mlp",
    "PackedVelocity",
    "philox_gumbel",
    "philox_normal",
    "sample_returns",
    "why_no_triton",
    "why_not_packable",
]

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""EVOR, expressive value learning for offline reinforcement learning, for TorchRL."""

from __future__ import annotations

from torchrl_evor.modules import (
    EVORActor,
    FlowMatchingModel,
    FlowMatchingPolicy,
    ReturnFlow,
    StackedVelocityMLP,
    VelocityMLP,
)
from torchrl_evor.objectives import EVORLoss

__all__ = [
    "EVORActor",
    "EVORLoss",
    "FlowMatchingModel",
    "FlowMatchingPolicy",
    "ReturnFlow",
    "StackedVelocityMLP",
    "VelocityMLP",
]

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from torchrl_evor.modules.models import (
    CategoricalCritic,
    Critic,
    FlowMatchingModel,
    HLGaussCritic,
    QuantileCritic,
    ReturnFlow,
    ReturnModel,
    ScalarCritic,
    StackedVelocityMLP,
    VelocityMLP,
)
from torchrl_evor.modules.tensordict_module import EVORActor, FlowMatchingPolicy

__all__ = [
    "CategoricalCritic",
    "Critic",
    "EVORActor",
    "FlowMatchingModel",
    "FlowMatchingPolicy",
    "HLGaussCritic",
    "QuantileCritic",
    "ReturnFlow",
    "ReturnModel",
    "ScalarCritic",
    "StackedVelocityMLP",
    "VelocityMLP",
]

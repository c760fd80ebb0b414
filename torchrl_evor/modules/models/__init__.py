# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from torchrl_evor.modules.models.critics import (
    CategoricalCritic,
    Critic,
    HLGaussCritic,
    QuantileCritic,
    ScalarCritic,
)
from torchrl_evor.modules.models.flow import FlowMatchingModel, VelocityMLP
from torchrl_evor.modules.models.return_flow import ReturnFlow
from torchrl_evor.modules.models.return_model import ReturnModel
from torchrl_evor.modules.models.stacked import StackedVelocityMLP

__all__ = [
    "CategoricalCritic",
    "Critic",
    "FlowMatchingModel",
    "HLGaussCritic",
    "QuantileCritic",
    "ReturnFlow",
    "ReturnModel",
    "ScalarCritic",
    "StackedVelocityMLP",
    "VelocityMLP",
]

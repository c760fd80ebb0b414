# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""EVOR, expressive value learning for offline reinforcement learning, for TorchRL."""

from __future__ import annotations

from torchrl_evor.data import OGBenchExperienceReplay
from torchrl_evor.envs import OGBenchEnv
from torchrl_evor.modules import (
    CategoricalCritic,
    Critic,
    EVORActor,
    FlowMatchingModel,
    FlowMatchingPolicy,
    HLGaussCritic,
    QuantileCritic,
    ReturnFlow,
    ReturnModel,
    ScalarCritic,
    StackedVelocityMLP,
    VelocityMLP,
)
from torchrl_evor.objectives import CriticLoss, EVORLoss, QCLoss
from torchrl_evor.trainers import EVORTrainer

__all__ = [
    "CategoricalCritic",
    "Critic",
    "CriticLoss",
    "EVORActor",
    "EVORLoss",
    "EVORTrainer",
    "FlowMatchingModel",
    "FlowMatchingPolicy",
    "HLGaussCritic",
    "OGBenchEnv",
    "OGBenchExperienceReplay",
    "QCLoss",
    "QuantileCritic",
    "ReturnFlow",
    "ReturnModel",
    "ScalarCritic",
    "StackedVelocityMLP",
    "VelocityMLP",
]

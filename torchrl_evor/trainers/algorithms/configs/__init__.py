# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Hydra structured configurations, registered in TorchRL's groups when this module is imported.

Import it before ``@hydra.main`` composes; then, for instance,
``defaults: [{loss: evor}, {trainer: evor}]`` works.
"""

from __future__ import annotations

import importlib.util

_has_hydra = importlib.util.find_spec("hydra") is not None
if not _has_hydra:
    raise ImportError(
        "torchrl_evor.trainers.algorithms.configs needs hydra-core: pip install torchrl_evor[hydra]"
    )

from hydra.core.config_store import ConfigStore  # noqa: E402

from torchrl_evor.trainers.algorithms.configs.data import (  # noqa: E402
    OGBenchEnvConfig,
    OGBenchExperienceReplayConfig,
)
from torchrl_evor.trainers.algorithms.configs.modules import (  # noqa: E402
    CategoricalCriticConfig,
    EVORActorConfig,
    FlowMatchingPolicyConfig,
    HLGaussCriticConfig,
    QuantileCriticConfig,
    ReturnFlowConfig,
    ScalarCriticConfig,
    StackedVelocityMLPConfig,
    VelocityMLPConfig,
)
from torchrl_evor.trainers.algorithms.configs.objectives import (  # noqa: E402
    CriticLossConfig,
    EVORLossConfig,
    QCLossConfig,
)
from torchrl_evor.trainers.algorithms.configs.trainers import EVORTrainerConfig  # noqa: E402

__all__ = [
    "CategoricalCriticConfig",
    "CriticLossConfig",
    "EVORActorConfig",
    "EVORLossConfig",
    "EVORTrainerConfig",
    "FlowMatchingPolicyConfig",
    "HLGaussCriticConfig",
    "OGBenchEnvConfig",
    "OGBenchExperienceReplayConfig",
    "QCLossConfig",
    "QuantileCriticConfig",
    "ReturnFlowConfig",
    "ScalarCriticConfig",
    "StackedVelocityMLPConfig",
    "VelocityMLPConfig",
]

CONFIGS = {
    ("network", "velocity_mlp"): VelocityMLPConfig,
    ("network", "stacked_velocity_mlp"): StackedVelocityMLPConfig,
    ("model", "flow_matching_policy"): FlowMatchingPolicyConfig,
    ("model", "return_flow"): ReturnFlowConfig,
    ("model", "scalar_critic"): ScalarCriticConfig,
    ("model", "categorical_critic"): CategoricalCriticConfig,
    ("model", "hl_gauss_critic"): HLGaussCriticConfig,
    ("model", "quantile_critic"): QuantileCriticConfig,
    ("model", "evor_actor"): EVORActorConfig,
    ("loss", "evor"): EVORLossConfig,
    ("loss", "critic"): CriticLossConfig,
    ("loss", "qc"): QCLossConfig,
    ("replay_buffer", "ogbench"): OGBenchExperienceReplayConfig,
    ("env", "ogbench"): OGBenchEnvConfig,
    ("trainer", "evor"): EVORTrainerConfig,
}

for (group, name), node in CONFIGS.items():
    ConfigStore.instance().store(group=group, name=name, node=node)

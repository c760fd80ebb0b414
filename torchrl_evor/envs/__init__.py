# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from torchrl_evor.envs.evaluation import rollout_episodes
from torchrl_evor.envs.libs import (
    OGBenchEnv,
    OGBenchSimulator,
    available_environments,
    resolve_environment,
)
from torchrl_evor.envs.transforms import GaussianActionNoise

__all__ = [
    "GaussianActionNoise",
    "OGBenchEnv",
    "OGBenchSimulator",
    "available_environments",
    "resolve_environment",
    "rollout_episodes",
]

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING
from torchrl.trainers.algorithms.configs.common import ConfigBase


@dataclass
class OGBenchExperienceReplayConfig(ConfigBase):
    """Hydra configuration for :class:`~torchrl_evor.OGBenchExperienceReplay`."""

    dataset_id: str = MISSING
    batch_size: int = 256
    n_step: int = 1
    chunk_size: int = 1
    gamma: float = 0.99
    source: str = "auto"
    root: str | None = None
    directory: str | None = None
    download: Any = True
    split: str = "train"
    reward_type: str = "default"
    num_transitions: int | None = None
    seed: int | None = None
    num_workers: int | None = None
    device: str = "cpu"
    sampler: Any = None
    writer: Any = None
    collate_fn: Any = None
    pin_memory: bool = False
    prefetch: int | None = None
    transform: Any = None
    _partial_: bool = False
    _target_: str = "torchrl_evor.data.OGBenchExperienceReplay"

    def __post_init__(self) -> None:
        """Nothing is left to be done."""


@dataclass
class OGBenchEnvConfig(ConfigBase):
    """Hydra configuration for :class:`~torchrl_evor.OGBenchEnv`."""

    name: str = MISSING
    max_episode_steps: int | None = None
    action_noise: float = 0.0
    reward_type: str = "default"
    device: str | None = None
    _partial_: bool = False
    _target_: str = "torchrl_evor.envs.OGBenchEnv"

    def __post_init__(self) -> None:
        """Nothing is left to be done."""

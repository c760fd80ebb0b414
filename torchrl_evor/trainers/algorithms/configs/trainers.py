# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING
from torch import optim
from torchrl.objectives.utils import TargetNetUpdater
from torchrl.trainers.algorithms.configs.trainers import TrainerConfig

from torchrl_evor.trainers.algorithms.evor import EVORTrainer


@dataclass
class EVORTrainerConfig(TrainerConfig):
    """Hydra configuration for :class:`~torchrl_evor.EVORTrainer`.

    ``optimizer`` and ``target_net_updater`` may be TorchRL's own partial
    configurations, which the loss completes.
    """

    loss_module: Any = MISSING
    optimizer: Any = MISSING
    replay_buffer: Any = MISSING
    total_updates: int = MISSING
    target_net_updater: Any = None
    batch_size: int | None = None
    optim_steps_per_batch: int = 1
    optimization_stepper: Any = None
    device: str | None = None
    clip_norm: float | None = None
    logger: Any = None
    log_interval: int = 1000
    evaluate: Any = None
    eval_interval: int = 10_000
    checkpoint_path: str | None = None
    checkpoint_interval: int = 10_000
    progress_bar: bool = True
    seed: int | None = None
    _partial_: bool = False
    _target_: str = "torchrl_evor.trainers.algorithms.configs.trainers._make_evor_trainer"


def _make_evor_trainer(**kwargs: Any) -> EVORTrainer:
    loss, updater = kwargs["loss_module"], kwargs.get("target_net_updater")
    if not isinstance(kwargs["optimizer"], optim.Optimizer):
        kwargs["optimizer"] = kwargs["optimizer"](loss.parameters())
    if updater is not None and not isinstance(updater, TargetNetUpdater):
        kwargs["target_net_updater"] = updater(loss)
    return EVORTrainer(**kwargs)

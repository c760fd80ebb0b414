# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING
from torchrl.objectives.common import LossModule
from torchrl.trainers.algorithms.configs.objectives import LossConfig

from torchrl_evor.objectives import CriticLoss, EVORLoss, QCLoss

_HERE = "torchrl_evor.trainers.algorithms.configs.objectives"


def _make_loss(cls: type[LossModule], kwargs: dict[str, Any]) -> LossModule:
    gamma = kwargs.pop("gamma", None)
    loss = cls(**kwargs)
    return loss if gamma is None else loss.make_value_estimator(gamma=gamma)


@dataclass
class EVORLossConfig(LossConfig):
    """Hydra configuration for :class:`~torchrl_evor.EVORLoss`.

    ``gamma`` goes to ``make_value_estimator``; ``None`` leaves its default.
    """

    actor_network: Any = MISSING
    value_network: Any = MISSING
    td_target: str = "bellman"
    next_action: str = "policy"
    return_bounds: Any = None
    delay_value: bool = True
    reduction: str | None = None
    num_candidates: int = 4
    num_samples: int = 2
    tau_r: float = math.inf
    tau_q: float = 0.0
    num_steps: int | None = None
    observation_noise: float = 0.0
    use_prioritized_weights: Any = "auto"
    gamma: float | None = None
    _target_: str = f"{_HERE}._make_evor_loss"


def _make_evor_loss(**kwargs: Any) -> EVORLoss:
    return _make_loss(EVORLoss, kwargs)


@dataclass
class CriticLossConfig(LossConfig):
    """Hydra configuration for :class:`~torchrl_evor.CriticLoss`; ``gamma`` as for EVOR."""

    actor_network: Any = MISSING
    qvalue_network: Any = MISSING
    next_action: str = "policy"
    delay_qvalue: bool = True
    reduction: str | None = None
    observation_noise: float = 0.0
    use_prioritized_weights: Any = "auto"
    gamma: float | None = None
    _target_: str = f"{_HERE}._make_critic_loss"


def _make_critic_loss(**kwargs: Any) -> CriticLoss:
    return _make_loss(CriticLoss, kwargs)


@dataclass
class QCLossConfig(LossConfig):
    """Hydra configuration for :class:`~torchrl_evor.QCLoss`; ``gamma`` as for EVOR."""

    actor_network: Any = MISSING
    qvalue_network: Any = MISSING
    num_candidates: int = 32
    delay_qvalue: bool = True
    reduction: str | None = None
    observation_noise: float = 0.0
    use_prioritized_weights: Any = "auto"
    gamma: float | None = None
    _target_: str = f"{_HERE}._make_qc_loss"


def _make_qc_loss(**kwargs: Any) -> QCLoss:
    return _make_loss(QCLoss, kwargs)

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING
from torchrl.trainers.algorithms.configs.common import ConfigBase

from torchrl_evor.modules import (
    CategoricalCritic,
    EVORActor,
    FlowMatchingPolicy,
    HLGaussCritic,
    QuantileCritic,
    ReturnFlow,
    ScalarCritic,
    StackedVelocityMLP,
    VelocityMLP,
)
from torchrl_evor.trainers.algorithms.configs.common import build

_HERE = "torchrl_evor.trainers.algorithms.configs.modules"


def _list(*values: Any) -> Any:
    return field(default_factory=lambda: list(values))


@dataclass
class _ModuleConfig(ConfigBase):
    _partial_: bool = False

    def __post_init__(self) -> None:
        """Nothing is left to be done."""


@dataclass
class VelocityMLPConfig(_ModuleConfig):
    """Hydra configuration for :class:`~torchrl_evor.VelocityMLP`."""

    in_features: int = MISSING
    out_features: int = 1
    hidden_sizes: list[int] = _list(512, 512, 512, 512)
    activation: str = "gelu_tanh"
    layer_norm: bool = False
    device: str | None = None
    dtype: str | None = None
    _target_: str = f"{_HERE}._make_velocity_mlp"


def _make_velocity_mlp(**kwargs: Any) -> VelocityMLP:
    return build(VelocityMLP, kwargs)


@dataclass
class StackedVelocityMLPConfig(VelocityMLPConfig):
    """Hydra configuration for :class:`~torchrl_evor.StackedVelocityMLP`."""

    num_models: int = MISSING
    _target_: str = f"{_HERE}._make_stacked_velocity_mlp"


def _make_stacked_velocity_mlp(**kwargs: Any) -> StackedVelocityMLP:
    return build(StackedVelocityMLP, kwargs)


@dataclass
class FlowMatchingPolicyConfig(_ModuleConfig):
    """Hydra configuration for :class:`~torchrl_evor.FlowMatchingPolicy`."""

    velocity_network: Any = MISSING
    action_dim: int = MISSING
    num_steps: int = 10
    solver: str = "euler"
    low: Any = -1.0
    high: Any = 1.0
    in_keys: list[Any] = _list("observation")
    out_keys: list[Any] = _list("action")
    _target_: str = f"{_HERE}._make_flow_matching_policy"


def _make_flow_matching_policy(**kwargs: Any) -> FlowMatchingPolicy:
    return build(FlowMatchingPolicy, kwargs)


@dataclass
class _ReturnModelConfig(_ModuleConfig):
    loc: Any = 0.0
    scale: Any = 1.0
    in_keys: list[Any] = _list("observation", "action")
    out_keys: list[Any] = _list("state_action_value")
    num_samples: int = 16


@dataclass
class ReturnFlowConfig(_ReturnModelConfig):
    """Hydra configuration for :class:`~torchrl_evor.ReturnFlow`."""

    velocity_network: Any = MISSING
    num_steps: int = 10
    solver: str = "euler"
    tolerance: float = 0.0
    _target_: str = f"{_HERE}._make_return_flow"


def _make_return_flow(**kwargs: Any) -> ReturnFlow:
    return build(ReturnFlow, kwargs)


@dataclass
class ScalarCriticConfig(_ReturnModelConfig):
    """Hydra configuration for :class:`~torchrl_evor.ScalarCritic`."""

    network: Any = MISSING
    num_critics: int = 1
    _target_: str = f"{_HERE}._make_scalar_critic"


def _make_scalar_critic(**kwargs: Any) -> ScalarCritic:
    return build(ScalarCritic, kwargs)


@dataclass
class CategoricalCriticConfig(ScalarCriticConfig):
    """Hydra configuration for :class:`~torchrl_evor.CategoricalCritic`."""

    low: float = MISSING
    high: float = MISSING
    num_atoms: int = 51
    _target_: str = f"{_HERE}._make_categorical_critic"


def _make_categorical_critic(**kwargs: Any) -> CategoricalCritic:
    return build(CategoricalCritic, kwargs)


@dataclass
class HLGaussCriticConfig(CategoricalCriticConfig):
    """Hydra configuration for :class:`~torchrl_evor.HLGaussCritic`."""

    blur: float = 0.75
    _target_: str = f"{_HERE}._make_hl_gauss_critic"


def _make_hl_gauss_critic(**kwargs: Any) -> HLGaussCritic:
    return build(HLGaussCritic, kwargs)


@dataclass
class QuantileCriticConfig(ScalarCriticConfig):
    """Hydra configuration for :class:`~torchrl_evor.QuantileCritic`."""

    num_quantiles: int = 51
    kappa: float = 0.1
    _target_: str = f"{_HERE}._make_quantile_critic"


def _make_quantile_critic(**kwargs: Any) -> QuantileCritic:
    return build(QuantileCritic, kwargs)


@dataclass
class EVORActorConfig(_ModuleConfig):
    """Hydra configuration for :class:`~torchrl_evor.EVORActor`."""

    policy: Any = MISSING
    returns: Any = MISSING
    num_candidates: int = 32
    num_samples: int = 16
    num_steps: int | None = None
    tau_r: float = math.inf
    tau_q: float = 0.0
    nodes: str = "stratified"
    backend: str = "auto"
    precision: str | None = None
    return_candidates: bool = False
    _target_: str = f"{_HERE}._make_evor_actor"


def _make_evor_actor(**kwargs: Any) -> EVORActor:
    return build(EVORActor, kwargs)

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Every method of the comparison as a loss and an actor of the same sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn
from torchrl.modules import IndependentNormal, ProbabilisticActor
from torchrl.objectives import IQLLoss
from torchrl.objectives.common import LossModule

from torchrl_evor import (
    CategoricalCritic,
    Critic,
    CriticLoss,
    EVORActor,
    EVORLoss,
    FlowMatchingPolicy,
    HLGaussCritic,
    QCLoss,
    QuantileCritic,
    ReturnFlow,
    ScalarCritic,
    StackedVelocityMLP,
    VelocityMLP,
)
from torchrl_evor.objectives.flow_policy import FlowPolicyLoss

METHODS = ("evor", "bc", "qc", "scalar", "hl_gauss", "categorical", "quantile", "iql")
# Critics of EVOR's problem, policy evaluation.
CRITICS = ("scalar", "hl_gauss", "categorical", "quantile")
# Of them those whose atoms lie within a support.
HISTOGRAMS = ("hl_gauss", "categorical")
# Methods that know the law of the return, to which its temperature says something.
LAWS = ("evor", "categorical", "quantile")


@dataclass
class Sizes:
    """What all methods share. Returns are ``loc + scale * z``; supports are in z units, and
    ``return_bounds``, of EVOR, in reward units.

    ``policy_statistics`` and ``value_statistics`` are mean and deviation of the observations by
    which networks start standardised; ``observation_noise`` is that of :class:`EVORLoss`.
    """

    observation_dim: int
    action_dim: int
    policy_hidden_sizes: Sequence[int] = (256, 256, 256)
    value_hidden_sizes: Sequence[int] = (256, 256, 256)
    policy_activation: str = "gelu_tanh"
    value_activation: str = "gelu_tanh"
    num_steps: int = 10
    solver: str = "euler"
    value_steps: int = 10
    value_solver: str = "euler"
    observation_noise: float = 0.0
    policy_statistics: tuple[Tensor, Tensor] | None = None
    value_statistics: tuple[Tensor, Tensor] | None = None
    layer_norm: bool = True
    num_flows: int = 1
    loc: float = 0.0
    scale: float = 1.0
    return_bounds: tuple[float, float] | None = None
    support: tuple[float, float] = (-5.0, 5.0)
    num_atoms: int = 51

    @property
    def inputs(self) -> int:
        """Size of an observation and an action together."""
        return self.observation_dim + self.action_dim

    def policy_network(self, in_features: int) -> VelocityMLP:
        """Network of a policy, without LayerNorm."""
        network = VelocityMLP(
            in_features,
            self.action_dim,
            hidden_sizes=self.policy_hidden_sizes,
            activation=self.policy_activation,
        )
        return _standardized(network, self.policy_statistics)

    def value_network(self, in_features: int, out_features: int = 1) -> VelocityMLP:
        """Network of a value or of a law's parameters."""
        network = VelocityMLP(in_features, out_features, **self._value_options)
        return _standardized(network, self.value_statistics)

    @property
    def _value_options(self) -> dict:
        return {
            "hidden_sizes": self.value_hidden_sizes,
            "activation": self.value_activation,
            "layer_norm": self.layer_norm,
        }

    def policy(self) -> FlowMatchingPolicy:
        """Base policy."""
        network = self.policy_network(self.inputs + 1)
        return FlowMatchingPolicy(network, self.action_dim, self.num_steps, solver=self.solver)

    def returns(self) -> ReturnFlow:
        """Reward-to-go flow, or an ensemble."""
        networks = [self.value_network(self.inputs + 2) for _ in range(self.num_flows)]
        units = {"loc": self.loc, "scale": self.scale}
        return ReturnFlow(networks, self.value_steps, solver=self.value_solver, **units)

    def critic(self, kind: str) -> Critic:
        """Single critic of policy evaluation."""
        network = self.value_network(self.inputs, 1 if kind == "scalar" else self.num_atoms)
        atoms = {"support": self.support, "num_atoms": self.num_atoms}
        return make_critic(kind, network, **atoms, loc=self.loc, scale=self.scale)

    def ensemble(self, num_critics: int) -> ScalarCritic:
        """Q-chunking's scalar critics."""
        stack = StackedVelocityMLP(num_critics, self.inputs, **self._value_options)
        stack = _standardized(stack, self.value_statistics)
        return ScalarCritic(stack, num_critics=num_critics, loc=self.loc, scale=self.scale)


def make_critic(
    kind: str, network: nn.Module, *, support: tuple[float, float] | None, num_atoms: int, **options
) -> Critic:
    """Critic of policy evaluation.

    Args:
        kind (str): ``"scalar"``, ``"hl_gauss"``, ``"categorical"`` or ``"quantile"``.
        network (nn.Module): with one output if ``"scalar"``, else ``num_atoms``.

    Keyword Args:
        support (tuple of float or None): lowest and highest atom of a histogram, in z units.
        num_atoms (int): atoms, bins or quantiles.
        **options: ``loc``, ``scale`` and ``num_critics`` of :class:`Critic`.
    """
    if kind == "scalar":
        return ScalarCritic(network, **options)
    if kind == "quantile":
        return QuantileCritic(network, num_quantiles=num_atoms, **options)
    cls = {"hl_gauss": HLGaussCritic, "categorical": CategoricalCritic}[kind]
    low, high = support
    return cls(network, low=low, high=high, num_atoms=num_atoms, **options)


def _standardized(network, statistics: tuple[Tensor, Tensor] | None):
    """The network, whose first inputs are an observation, in the units of the data."""
    return network if statistics is None else network.standardize_inputs_(*statistics)


def make_baseline(
    method: str,
    sizes: Sizes,
    *,
    td_target: str = "bellman",
    next_action: str = "dataset",
    improved: Mapping | None = None,
    actor: Mapping | None = None,
    num_critics: int = 2,
    num_candidates: int = 32,
    expectile: float = 0.9,
    temperature: float = 10.0,
) -> tuple[LossModule, TensorDictModuleBase]:
    """Builds a method; its loss keys start with ``"loss"`` and are to be summed.

    Args:
        method (str): ``"evor"``, ``"bc"``, ``"qc"``, ``"scalar"``, ``"hl_gauss"``,
            ``"categorical"``, ``"quantile"`` or ``"iql"``.
        sizes (Sizes): sizes and units. For chunks of h actions, ``action_dim`` is that of a chunk.

    Keyword Args:
        td_target (str, optional): of EVOR.
        next_action (str, optional): of EVOR and of the critics of the same problem.
        improved (mapping, optional): options of :class:`EVORLoss` for ``next_action="improved"``.
        actor (mapping, optional): options of :class:`EVORActor`.
        num_critics (int, optional): ensemble of Q-chunking.
        num_candidates (int, optional): candidates at Q-chunking's next states.
        expectile (float, optional): of IQL.
        temperature (float, optional): inverse temperature of IQL's weights, per unit of reward.

    Returns:
        tuple: the loss, and the actor over the networks that it trains.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}.")
    if method == "iql":
        return make_iql(sizes, expectile, temperature)
    policy, imitation = sizes.policy(), {"observation_noise": sizes.observation_noise}
    if method == "bc":
        return FlowBCLoss(policy, **imitation), policy
    if method == "evor":
        returns = sizes.returns()
        options = {"td_target": td_target, "next_action": next_action, **(improved or {})}
        loss = EVORLoss(policy, returns, return_bounds=sizes.return_bounds, **options, **imitation)
    elif method == "qc":
        returns = sizes.ensemble(num_critics)
        loss = QCLoss(policy, returns, num_candidates=num_candidates, **imitation)
    else:
        returns = sizes.critic(method)
        loss = CriticLoss(policy, returns, next_action=next_action, **imitation)
    return loss, EVORActor(policy, returns, **(actor or {}))


class FlowBCLoss(FlowPolicyLoss):
    """Behaviour cloning by flow matching alone: EVOR with one candidate, without its value.

    Args:
        actor_network (FlowMatchingPolicy): the policy.
        **kwargs: ``reduction``, ``observation_noise`` and ``use_prioritized_weights`` of
            :class:`FlowPolicyLoss`.
    """

    out_keys = ["loss_actor"]

    def __init__(self, actor_network: FlowMatchingPolicy, **kwargs) -> None:
        super().__init__(actor_network, next_action="none", **kwargs)

    @property
    def in_keys(self) -> list:
        """Observation and action."""
        return [self._actor_observation, self.tensor_keys.action]

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Computes ``"loss_actor"``."""
        return TensorDict(loss_actor=self.actor_loss(tensordict)[0])


class NStepIQLLoss(IQLLoss):
    """TorchRL's implicit Q-learning, which drops ``"steps_to_next_obs"``, on n-step batches.

    Its Q loss selects the entries below ``"next"`` from its input, so that is where the
    numbers of steps have to be.
    """

    def make_value_estimator(self, value_type=None, **hyperparams):
        """Builds the estimator that holds the discount; see :class:`IQLLoss`."""
        super().make_value_estimator(value_type, **hyperparams)
        self._value_estimator.set_keys(steps_to_next_obs=("next", "steps_to_next_obs"))
        return self

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Computes the three losses; see :class:`IQLLoss`."""
        steps = tensordict.get("steps_to_next_obs", None)
        if steps is not None:
            tensordict.set(("next", "steps_to_next_obs"), steps)
        return super().forward(tensordict)


class GaussianPolicy(nn.Module):
    """Mean in the action bounds, and a fixed spread of 1, of a Gaussian policy."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``[*B, act]``."""
        mean = self.network(observation).tanh()
        return mean, torch.ones_like(mean)


class ValueNetwork(nn.Module):
    """Value in reward units of a network in z units."""

    def __init__(self, network: nn.Module, loc: float, scale: float) -> None:
        super().__init__()
        self.network, self.loc, self.scale = network, loc, scale

    def forward(self, *inputs: Tensor) -> Tensor:
        """Value ``[*B, 1]``."""
        return self.loc + self.scale * self.network(*inputs)


def make_iql(
    sizes: Sizes, expectile: float, temperature: float
) -> tuple[NStepIQLLoss, TensorDictModule]:
    """Implicit Q-learning by TorchRL's own loss; the actor takes the policy's mean."""
    if not 0 < expectile < 1:
        raise ValueError(f"expectile must lie between 0 and 1, got {expectile}.")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}.")
    network = sizes.policy_network(sizes.observation_dim)
    parameters = TensorDictModule(
        GaussianPolicy(network), in_keys=["observation"], out_keys=["action", "scale"]
    )
    policy = ProbabilisticActor(
        TensorDictModule(parameters.module, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
    )
    qvalues = [
        TensorDictModule(
            ValueNetwork(sizes.value_network(sizes.inputs), sizes.loc, sizes.scale),
            in_keys=["observation", "action"],
            out_keys=["state_action_value"],
        )
        for _ in range(2)
    ]
    value = TensorDictModule(
        ValueNetwork(sizes.value_network(sizes.observation_dim), sizes.loc, sizes.scale),
        in_keys=["observation"],
        out_keys=["state_value"],
    )
    loss = NStepIQLLoss(
        policy, qvalues, value, loss_function="l2", temperature=temperature, expectile=expectile
    )
    return loss.make_value_estimator(), parameters.select_out_keys("action")

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from typing import Literal

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import dispatch
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from torchrl_evor.modules.functional import check_choice, log_mean_exp
from torchrl_evor.modules.models.critics import Critic
from torchrl_evor.modules.tensordict_module.actors import FlowMatchingPolicy
from torchrl_evor.objectives.flow_policy import FlowPolicyLoss

__all__ = ["CriticLoss"]


class CriticLoss(FlowPolicyLoss):
    r"""Policy evaluation with a scalar, categorical or quantile critic.

    The problem of :class:`~torchrl_evor.EVORLoss`, the same base policy and the
    same n-step backups, with another description of the return in the place
    of its flow. The target law is that of :math:`r + \gamma_e Z'`, where
    :math:`Z'` follows the target critic at the next state and action; the
    critic fits it in its own way (see :class:`~torchrl_evor.ScalarCritic`,
    :class:`~torchrl_evor.CategoricalCritic`, :class:`~torchrl_evor.QuantileCritic`,
    :class:`~torchrl_evor.HLGaussCritic`). There is no maximum over actions.

    Args:
        actor_network (FlowMatchingPolicy): base policy.
        qvalue_network (Critic): critic.

    Keyword Args:
        next_action (str, optional): where the action at the next state comes
            from: ``"policy"`` samples the base policy, ``"dataset"`` reads
            ``("next", "action")``. Defaults to ``"policy"``.
        delay_qvalue (bool, optional): keep a target critic, to be updated by
            :class:`~torchrl.objectives.SoftUpdate`. Defaults to ``True``.
        reduction (str, optional): ``"none"``, ``"mean"`` or ``"sum"``.
            Defaults to ``"mean"``.
        observation_noise (float, optional): see :class:`~torchrl_evor.EVORLoss`.
            Defaults to ``0.0``.
        use_prioritized_weights (bool or ``"auto"``, optional): weigh the
            losses by the ``priority_weight`` entry. Defaults to ``"auto"``.

    .. note::
        The discount belongs to ``loss.make_value_estimator(gamma=...)``, 0.99
        by default. n-step batches and chunks carry ``"steps_to_next_obs"``.
        Where a row's chunk is padded (``"action_is_pad"``), its error is 0, for
        the policy in the padded steps, for the critic in the whole row; means
        are over all rows.
        The loss writes the absolute error of each row's expected return to
        ``"td_error"`` in its input.

    Raises:
        ValueError: if an option is unknown, or the critic has lazy parameters.
        TypeError: if a network is not of the kind that is asked for.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.objectives import SoftUpdate
        >>> from torchrl_evor import CriticLoss, FlowMatchingPolicy, QuantileCritic, VelocityMLP
        >>> policy = FlowMatchingPolicy(VelocityMLP(3 + 2 + 1, 2, hidden_sizes=(32,)), 2)
        >>> critic = QuantileCritic(VelocityMLP(3 + 2, 51, hidden_sizes=(32,)), scale=10.0)
        >>> loss = CriticLoss(policy, critic).make_value_estimator(gamma=0.99)
        >>> updater = SoftUpdate(loss, tau=0.005)
        >>> batch = TensorDict(
        ...     {
        ...         "observation": torch.randn(4, 3),
        ...         "action": torch.rand(4, 2) * 2 - 1,
        ...         "next": {
        ...             "observation": torch.randn(4, 3),
        ...             "reward": torch.randn(4, 1),
        ...             "done": torch.zeros(4, 1, dtype=torch.bool),
        ...             "terminated": torch.zeros(4, 1, dtype=torch.bool),
        ...         },
        ...     },
        ...     batch_size=[4],
        ... )
        >>> losses = loss(batch)
        >>> (losses["loss_actor"] + losses["loss_qvalue"]).backward()
        >>> batch["td_error"].shape
        torch.Size([4])
    """

    out_keys = ["loss_actor", "loss_qvalue", "value_target"]
    next_actions = ("policy", "dataset")

    qvalue_network: Critic
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: FlowMatchingPolicy,
        qvalue_network: Critic,
        *,
        next_action: Literal["policy", "dataset"] = "policy",
        delay_qvalue: bool = True,
        reduction: Literal["none", "mean", "sum"] | None = None,
        observation_noise: float = 0.0,
        use_prioritized_weights: Literal["auto"] | bool = "auto",
    ) -> None:
        super().__init__(
            actor_network,
            next_action=check_choice("next_action", next_action, self.next_actions),
            reduction=reduction,
            observation_noise=observation_noise,
            use_prioritized_weights=use_prioritized_weights,
        )
        if not isinstance(qvalue_network, Critic):
            raise TypeError(f"qvalue_network must be a Critic, got {qvalue_network!r}.")
        self._add_critic(qvalue_network, "qvalue_network", delay_qvalue)

    @property
    def _value_observation(self) -> NestedKey:
        return self.qvalue_network.in_keys[0]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Computes both losses and writes the error of each row to the input.

        Args:
            tensordict (TensorDictBase): a batch of transitions with the
                entries of :attr:`in_keys`; shapes are read from the tensors.

        Returns:
            TensorDict: ``"loss_actor"``, ``"loss_qvalue"`` and the mean
            ``"value_target"`` in reward units.
        """
        self._check_batch(tensordict)
        loss_actor, _ = self.actor_loss(tensordict)
        loss_qvalue, metadata = self.qvalue_loss(tensordict)
        tensordict.set(self.tensor_keys.priority, metadata.pop("td_error"))
        return TensorDict({"loss_actor": loss_actor, "loss_qvalue": loss_qvalue, **metadata})

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict]:
        """Fit of the critic to the law of its temporal-difference target."""
        observation = tensordict[self._value_observation]
        action = tensordict[self.tensor_keys.action]
        values, log_weights = self.compute_target(tensordict)
        target = self._mean(values, log_weights)
        with self._swap("qvalue_network"):
            outputs = self.qvalue_network.outputs(observation, action)
            distance = self.qvalue_network.distance(outputs, values, log_weights)
            value = self._mean(*self.qvalue_network.law(outputs.detach()))
        distance = self._without_padded(distance, tensordict)
        size = self._without_padded((value - target).abs(), tensordict)
        loss = self._reduce_loss(distance, tensordict, weights=self._weights(tensordict))
        self._clear_weakrefs(tensordict, "qvalue_network_params", "target_qvalue_network_params")
        return loss, {"td_error": size, "value_target": target.mean()}

    @torch.no_grad()
    def compute_target(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor | None]:
        """Nodes ``[*B, N]`` of the target law in reward units, and their log weights."""
        reward, discount = self._backup(tensordict)
        observation = tensordict[unravel_key(("next", self._value_observation))]
        action = self._next_action(tensordict)
        with self._swap("qvalue_network", target=True):
            outputs = self.qvalue_network.outputs(observation, action)
        # In the units of today: those of the target are from when it was made.
        with self._swap("qvalue_network"):
            values, log_weights = self.qvalue_network.law(outputs)
        return reward + discount * values, log_weights

    @staticmethod
    def _mean(values: Tensor, log_weights: Tensor | None) -> Tensor:
        return log_mean_exp(values, float("inf"), log_weights=log_weights)

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

from torchrl_evor.modules.functional import (
    check_bounds,
    check_choice,
    check_positive,
    check_temperature,
    integrate,
)
from torchrl_evor.modules.models.return_flow import ReturnFlow
from torchrl_evor.modules.tensordict_module.actors import FlowMatchingPolicy
from torchrl_evor.objectives.flow_policy import FlowPolicyLoss
from torchrl_evor.objectives.td_targets import TD_TARGETS, confine_velocity

__all__ = ["EVORLoss"]


class EVORLoss(FlowPolicyLoss):
    r"""Expressive value learning for offline reinforcement learning (EVOR).

    Two flow-matching regressions that share nothing. The base policy imitates
    the data,

    .. math:: L_\pi = E \| v((1-t)\epsilon + t a, t | x) - (a - \epsilon) \|^2,

    and the reward-to-go flow learns the *law* of the return of the data's
    policy by temporal differences,

    .. math:: L_Z = E | s(z_t, t | x, a) - u |^2,

    where the point :math:`z_t` and the target velocity :math:`u` come from one
    transition and the target network. No gradient passes through an
    integration and nothing is distilled. Policy improvement happens when
    acting, in :class:`~torchrl_evor.EVORActor`.

    Source: *Expressive Value Learning for Scalable Offline Reinforcement
    Learning*, `arXiv:2510.08218 <https://arxiv.org/abs/2510.08218>`_. The
    ``"bellman"`` target is derived in
    :func:`~torchrl_evor.objectives.td_targets.bellman_target`.

    Args:
        actor_network (FlowMatchingPolicy): base policy.
        value_network (ReturnFlow): law of the reward-to-go. The flows of an ensemble are
            trained side by side, each by points and targets of its own; the loss and
            the errors of rows are means over them.

    Keyword Args:
        td_target (str, optional): ``"bellman"``, ``"sample"``, ``"coupled"``
            or ``"velocity"``. Defaults to ``"bellman"``.
        next_action (str, optional): where the action at the next state comes
            from: ``"policy"`` samples the base policy; ``"dataset"`` reads
            ``("next", "action")``, an exact sample of the data's policy without
            a network pass; ``"improved"`` chooses among candidates of the base
            policy by the target network's :math:`Q^*`, which turns policy
            evaluation into policy iteration. Defaults to ``"policy"``.
        return_bounds (tuple of float, optional): least and greatest return that is
            possible, in reward units. What the target network says of the next return is
            confined to them, so that bootstrapping cannot run away; see
            :func:`~torchrl_evor.objectives.td_targets.confine_velocity`. Better with room
            around them: where returns lie at a bound, a tight one is a bias. Defaults to
            ``None``, no bounds.
        delay_value (bool, optional): keep a target value network, to be
            updated by :class:`~torchrl.objectives.SoftUpdate`. Defaults to ``True``.
        reduction (str, optional): ``"none"``, ``"mean"`` or ``"sum"``.
            Defaults to ``"mean"``.
        num_candidates (int, optional): candidates of ``"improved"``.
            Defaults to ``4``.
        num_samples (int, optional): nodes per candidate of ``"improved"``.
            Defaults to ``2``.
        tau_r (float, optional): temperature of the reward-to-go in
            ``"improved"``, in reward units. Defaults to ``inf``, the mean.
        tau_q (float, optional): temperature of the choice in ``"improved"``,
            in reward units; ``0`` takes the best. Defaults to ``0.0``.
        num_steps (int, optional): evaluations of the flow for each node of
            ``"improved"``. To compare candidates ``1`` does, with one node: a step
            of Euler's from any noise ends at the mean. Defaults to ``None``, those of
            ``value_network``.
        observation_noise (float, optional): deviation of the noise by which a tenth of the
            observations are moved that the policy imitates from, in units of each
            feature's deviation over the batch. A policy that has seen states beside
            those of the data proposes ways back to them; without, what it proposes
            there may lead nowhere. ``0.1`` mended some failures in mazes, not all.
            Defaults to ``0.0``.
        use_prioritized_weights (bool or ``"auto"``, optional): weigh the
            losses by the ``priority_weight`` entry. Defaults to ``"auto"``.

    .. note::
        The discount belongs to ``loss.make_value_estimator(gamma=...)``, 0.99
        by default. n-step batches carry ``"steps_to_next_obs"``, and a window
        that holds a terminal is ``"terminated"``, which TorchRL's
        ``MultiStepTransform`` leaves out where the terminal is not its first step.
        n-step returns of the data are unbiased here for any n, unless
        ``next_action="improved"``. The loss writes the absolute error of each
        row to ``"td_error"`` in its input.

    .. note::
        ``next_action="improved"`` samples the base policy in every update. Once that is
        trained no more, its candidates can be drawn for the whole data set at once, by
        :meth:`~torchrl_evor.OGBenchExperienceReplay.keep_candidates` or
        :func:`~torchrl_evor.data.sample_candidates`, and come with the batch, at
        ``("next", "candidates")``.

    .. note::
        Where a row's chunk of actions is padded (``"action_is_pad"``), its error
        is 0, for the policy in the padded steps, for the value in the whole
        row. Means are over all rows, as in the official Q-chunking code.

    .. note::
        Data parallelism through ``DistributedDataParallel`` works; fully
        sharded parameters do not reach functional losses.

    Raises:
        ValueError: if an option is unknown, a count below 1, a temperature
            negative, bounds are not in order or the value network has lazy parameters.
        TypeError: if a network has no velocity field.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.objectives import SoftUpdate
        >>> from torchrl_evor import EVORLoss, FlowMatchingPolicy, ReturnFlow, VelocityMLP
        >>> policy = FlowMatchingPolicy(VelocityMLP(3 + 2 + 1, 2, hidden_sizes=(32,)), 2)
        >>> returns = ReturnFlow(VelocityMLP(3 + 2 + 2, 1, hidden_sizes=(32,)), scale=10.0)
        >>> loss = EVORLoss(policy, returns)
        >>> loss = loss.make_value_estimator(gamma=0.99)
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
        >>> (losses["loss_actor"] + losses["loss_value"]).backward()
        >>> batch["td_error"].shape
        torch.Size([4])
    """

    out_keys = ["loss_actor", "loss_value", "value_target"]
    next_actions = ("policy", "dataset", "improved")

    value_network: ReturnFlow
    value_network_params: TensorDictParams
    target_value_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: FlowMatchingPolicy,
        value_network: ReturnFlow,
        *,
        td_target: Literal["bellman", "sample", "coupled", "velocity"] = "bellman",
        next_action: Literal["policy", "dataset", "improved"] = "policy",
        return_bounds: tuple[float, float] | None = None,
        delay_value: bool = True,
        reduction: Literal["none", "mean", "sum"] | None = None,
        num_candidates: int = 4,
        num_samples: int = 2,
        tau_r: float = float("inf"),
        tau_q: float = 0.0,
        num_steps: int | None = None,
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
        if not isinstance(value_network, ReturnFlow):
            raise TypeError(f"value_network must be a ReturnFlow, got {value_network!r}.")
        self.td_target = check_choice("td_target", td_target, TD_TARGETS)
        self.return_bounds = check_bounds("return_bounds", return_bounds)
        self.num_candidates = check_positive("num_candidates", num_candidates)
        self.num_samples = check_positive("num_samples", num_samples)
        self.tau_r = check_temperature("tau_r", tau_r)
        self.tau_q = check_temperature("tau_q", tau_q)
        value_network.solver_steps(num_steps)  # for its errors
        self.num_steps = num_steps
        self._add_critic(value_network, "value_network", delay_value)

    @property
    def _value_observation(self) -> NestedKey:
        return self.value_network.in_keys[0]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Computes both losses and writes the error of each row to the input.

        Args:
            tensordict (TensorDictBase): a batch of transitions with the
                entries of :attr:`in_keys`; shapes are read from the tensors.

        Returns:
            TensorDict: ``"loss_actor"``, ``"loss_value"`` and the mean
            ``"value_target"`` in reward units.
        """
        self._check_batch(tensordict)
        loss_actor, _ = self.actor_loss(tensordict)
        loss_value, metadata = self.value_loss(tensordict)
        tensordict.set(self.tensor_keys.priority, metadata.pop("td_error"))
        return TensorDict({"loss_actor": loss_actor, "loss_value": loss_value, **metadata})

    def value_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict]:
        """Flow matching of the reward-to-go to its temporal-difference target."""
        observation = tensordict[self._value_observation]
        action = tensordict[self.tensor_keys.action]
        point, time, target = self.compute_target(tensordict)
        with self._swap("value_network"):
            velocity = self.value_network.velocity(observation, action, point, time)
            # The posterior mean of the return given the point is where the target leads.
            end = self.value_network.mean_members(point + (1 - time) * target)
            value_target = self.value_network.denormalize(end).mean().detach()
        error = self._without_padded((velocity - target).squeeze(-1), tensordict)
        square, size = map(self.value_network.mean_members, (error.square(), error.detach().abs()))
        loss = self._reduce_loss(square, tensordict, weights=self._weights(tensordict))
        metadata = {"td_error": size, "value_target": value_target}
        self._clear_weakrefs(tensordict, "value_network_params", "target_value_network_params")
        return loss, metadata

    @torch.no_grad()
    def compute_target(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]:
        """Point, flow time and target velocity of the value regression.

        Returns:
            tuple of Tensor: each ``[*B, 1]``, for an ensemble ``[num_members, *B, 1]``.
        """
        reward, discount = self._backup(tensordict)
        with self._swap("value_network"):
            bounds = [
                self.value_network.normalize(torch.full_like(reward, bound))
                for bound in self.return_bounds or ()
            ]
            reward = self.value_network.normalize_reward(reward, discount)
        # loc and scale may have more digits than the networks, which may have 16 bits.
        reward, *bounds = (tensor.to(discount) for tensor in (reward, *bounds))
        dtype = tensordict[self.tensor_keys.action].dtype
        observation = tensordict[unravel_key(("next", self._value_observation))]
        action = self._next_action(tensordict)
        rows = self.value_network.expand_members(reward)
        noise, next_noise = torch.randn_like(rows), torch.randn_like(rows)
        time = torch.rand_like(rows)
        model = self.value_network

        def next_velocity(z: Tensor, t: Tensor) -> Tensor:
            velocity = model.velocity(observation, action, z.to(dtype), t.to(dtype)).to(z)
            return confine_velocity(velocity, z, t, *bounds) if bounds else velocity

        with self._swap("value_network", target=True):
            next_return = integrate(next_velocity, next_noise, model.num_steps, model.solver)
            if bounds:
                # A point beyond them near time 1 would ask for any speed back.
                next_return = next_return.clamp(*bounds)
            point, target = TD_TARGETS[self.td_target](
                noise, time, reward, discount, next_return, next_velocity
            )
        return point.to(dtype), time.to(dtype), target.to(dtype)

    def _next_action(self, tensordict: TensorDictBase) -> Tensor:
        """Action at the next state, ``[*B, act]``; the best of a few if ``"improved"``."""
        if self.next_action != "improved":
            return super()._next_action(tensordict)
        candidates = self._next_candidates(tensordict)
        observation = tensordict[unravel_key(("next", self._value_observation))]
        with self._swap("value_network", target=True):
            action, _, _ = self.value_network.select(
                observation,
                candidates,
                tau_r=self.tau_r,
                tau_q=self.tau_q,
                num_samples=self.num_samples,
                num_steps=self.num_steps,
            )
        return action

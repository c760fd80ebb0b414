# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from tensordict.utils import NestedKey
from torch import Tensor, nn

from torchrl_evor.modules.functional import (
    NODES,
    check_choice,
    check_positive,
    check_solver,
    check_temperature,
    gauss_hermite_normal,
    integrate,
    log_mean_exp,
    standard_gumbel,
    stratified_normal,
)
from torchrl_evor.modules.models.return_model import ReturnModel, check_precision

__all__ = ["ReturnFlow"]

# Rows of one pass of a network that has no fused path: 64k rows of 4x512 take 0.5 GB.
MAX_ROWS = 2**16


class ReturnFlow(ReturnModel):
    r"""Law of the reward-to-go of a state and an action, as a scalar flow.

    The velocity field :math:`s(z_t, t | x, a)` carries a standard normal at
    flow time 0 to the law of the discounted reward-to-go at flow time 1. The
    network sees normalised returns :math:`z`; samples, quantiles and
    :math:`Q^*` are in reward units, ``return = loc + scale * z``.

    Source: *Expressive Value Learning for Scalable Offline Reinforcement
    Learning*, `arXiv:2510.08218 <https://arxiv.org/abs/2510.08218>`_.

    Args:
        velocity_network (nn.Module or sequence of nn.Module): maps the concatenation
            of observation, action, z and flow time ``[*B, obs + act + 2]`` to
            ``[*B, 1]``. More than one are an ensemble of flows, each of which
            :class:`~torchrl_evor.EVORLoss` trains by targets of its own: samples are
            their mean at the same noise, which averages the members' quantiles.
        num_steps (int, optional): evaluations of the velocity, at flow times
            ``k / num_steps``. Defaults to ``10``.

    Keyword Args:
        solver (str, optional): ``"euler"``, a step for each evaluation, or
            ``"midpoint"``, a step for two, for an even ``num_steps``: six
            evaluations are mostly more accurate than ten Euler steps. May be
            changed after training. Defaults to ``"euler"``.
        loc (float or Tensor, optional): centre of the returns, in reward units;
            a tensor holds one value for each leading index of the batch, as
            for a :class:`~torchrl_evor.StackedVelocityMLP`. Defaults to ``0.0``.
        scale (float or Tensor, optional): spread of the returns, in reward
            units. Defaults to ``1.0``.
        in_keys (sequence of NestedKey, optional): observation and action.
            Defaults to ``["observation", "action"]``.
        out_keys (NestedKey or list of NestedKey, optional): mean of the law, ``[*B, 1]``.
            Defaults to ``"state_action_value"``.
        num_samples (int, optional): stratified nodes of the mean that
            :meth:`forward` writes. Defaults to ``16``.
        tolerance (float, optional): relative error up to which :meth:`select`
            may interpolate the velocity instead of integrating every node, see
            :func:`~torchrl_evor.triton_kernels.evor_select`. Pays for many
            nodes on a CPU. Defaults to ``0.0``, every node.

    Raises:
        ValueError: if ``num_steps`` or a number of nodes is below 1, ``num_steps``
            odd for ``"midpoint"``, ``solver`` unknown, ``scale``
            is not positive and finite, a temperature or ``tolerance`` negative,
            there is no network, or one does not return one velocity per row.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> returns = ReturnFlow(torch.nn.Linear(3 + 2 + 2, 1), loc=-50.0, scale=20.0)
        >>> observation, action = torch.zeros(5, 3), torch.zeros(5, 2)
        >>> returns.sample(observation, action, num_samples=8).shape
        torch.Size([5, 8])
        >>> returns.q_star(observation, action, tau=10.0, num_samples=8).shape
        torch.Size([5])
        >>> data = TensorDict(observation=observation, action=action, batch_size=[5])
        >>> returns(data)["state_action_value"].shape
        torch.Size([5, 1])
        >>> pair = ReturnFlow([torch.nn.Linear(3 + 2 + 2, 1) for _ in range(2)])
        >>> pair.sample(observation, action, num_samples=8).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        velocity_network: nn.Module | Sequence[nn.Module],
        num_steps: int = 10,
        *,
        solver: Literal["euler", "midpoint"] = "euler",
        loc: float | Tensor = 0.0,
        scale: float | Tensor = 1.0,
        in_keys: Sequence[NestedKey] = ("observation", "action"),
        out_keys: NestedKey | list[NestedKey] = "state_action_value",
        num_samples: int = 16,
        tolerance: float = 0.0,
    ) -> None:
        super().__init__(
            loc=loc, scale=scale, in_keys=in_keys, out_keys=out_keys, num_samples=num_samples
        )
        if isinstance(velocity_network, nn.ModuleList) or not isinstance(
            velocity_network, nn.Module
        ):
            networks = list(velocity_network)
            if not networks:
                raise ValueError("velocity_network must hold at least one network, got none.")
            velocity_network = networks[0] if len(networks) == 1 else nn.ModuleList(networks)
        self.velocity_network = velocity_network
        self.num_steps = check_positive("num_steps", num_steps)
        self.solver = check_solver(solver, num_steps)
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance must be in [0, 1), got {tolerance}.")
        self.tolerance = tolerance

    @property
    def members(self) -> list[nn.Module]:
        """Networks of an ensemble, or the only one."""
        network = self.velocity_network
        return list(network) if isinstance(network, nn.ModuleList) else [network]

    def expand_members(self, tensor: Tensor) -> Tensor:
        """A view ``[num_members, *B, ...]`` for an ensemble, for one flow the tensor itself."""
        if not isinstance(self.velocity_network, nn.ModuleList):
            return tensor
        return tensor.expand(len(self.velocity_network), *tensor.shape)

    def mean_members(self, tensor: Tensor) -> Tensor:
        """Mean ``[*B, ...]`` over the members of an ensemble, for one flow the tensor itself."""
        return tensor.mean(0) if isinstance(self.velocity_network, nn.ModuleList) else tensor

    def velocity(self, observation: Tensor, action: Tensor, z: Tensor, time: Tensor) -> Tensor:
        """Velocity at a normalised return and a flow time, in z units.

        Args:
            observation (Tensor): ``[*B, obs]``.
            action (Tensor): ``[*B, act]``.
            z (Tensor): ``[*B, 1]``, for an ensemble ``[num_members, *B, 1]``.
            time (Tensor): of the shape of ``z``.

        Returns:
            Tensor: of the shape of ``z``.
        """
        if not isinstance(self.velocity_network, nn.ModuleList):
            return self._member_velocity(self.velocity_network, observation, action, z, time)
        if not len(z) == len(time) == len(self.members):
            raise ValueError(
                f"z and time must be given for {len(self.members)} members, "
                f"got {len(z)} and {len(time)}."
            )
        members = zip(self.members, z, time)
        return torch.stack(
            [self._member_velocity(network, observation, action, *at) for network, *at in members]
        )

    @staticmethod
    def _member_velocity(network, observation, action, z, time) -> Tensor:
        velocity = network(torch.cat([observation, action, z, time], -1))
        if velocity.shape != z.shape:
            raise ValueError(
                f"velocity_network must return one velocity per row, {tuple(z.shape)}, "
                f"got {tuple(velocity.shape)}."
            )
        return velocity

    def integrate(
        self, observation: Tensor, action: Tensor, noise: Tensor, num_steps: int | None = None
    ) -> Tensor:
        """Carries ``noise`` to normalised returns, of the shape that :meth:`velocity` takes."""

        def velocity(z: Tensor, time: Tensor) -> Tensor:
            return self.velocity(observation, action, z, time)

        return integrate(velocity, noise, *self.solver_steps(num_steps))

    def solver_steps(self, num_steps: int | None) -> tuple[int, str]:
        """Evaluations of the velocity, the model's own by default, and the solver that makes them.

        Raises:
            ValueError: if ``num_steps`` is no integer of at least 1, or odd and above 1 for
                ``solver="midpoint"``.
        """
        if num_steps is None:
            return self.num_steps, self.solver
        # One evaluation is a whole step of Euler's, which from any noise ends at the mean.
        solver = self.solver if check_positive("num_steps", num_steps) > 1 else "euler"
        return num_steps, check_solver(solver, num_steps)

    def sample(
        self,
        observation: Tensor,
        action: Tensor,
        num_samples: int,
        noise: Tensor | None = None,
        num_steps: int | None = None,
    ) -> Tensor:
        """Samples of the reward-to-go.

        Args:
            observation (Tensor): ``[*B, obs]``.
            action (Tensor): ``[*B, act]``; the batch dimensions of both broadcast.
            num_samples (int): samples per state and action.
            noise (Tensor, optional): start of the flow, broadcastable to
                ``[*B, num_samples]``. Drawn from a standard normal by default.
            num_steps (int, optional): evaluations of the velocity; ``1`` is a step
                of Euler's for either solver. Defaults to those of the model.

        Returns:
            Tensor: ``[*B, num_samples]``, in reward units.
        """
        check_positive("num_samples", num_samples)
        batch = torch.broadcast_shapes(observation.shape[:-1], action.shape[:-1])
        if noise is None:
            shape = (*batch, num_samples)
            noise = torch.randn(shape, dtype=action.dtype, device=action.device)
        rows = (*batch, num_samples)
        z = self.integrate(
            observation.unsqueeze(-2).expand(*rows, -1),
            action.unsqueeze(-2).expand(*rows, -1),
            self.expand_members(noise.expand(rows).unsqueeze(-1)),
            num_steps,
        )
        return self.denormalize(self.mean_members(z).squeeze(-1))

    def quantiles(self, observation: Tensor, action: Tensor, num_quantiles: int) -> Tensor:
        """Quantiles ``(j - 1/2) / num_quantiles`` of the reward-to-go.

        The exact flow is monotone in its noise. Sorting restores the order
        where a coarse integration of a steep field has lost it.

        Returns:
            Tensor: ``[*B, num_quantiles]``, in increasing order, in reward units.
        """
        noise, _ = self._nodes(action, num_quantiles, "stratified")
        return self.sample(observation, action, num_quantiles, noise).sort(-1).values

    def q_star(
        self,
        observation: Tensor,
        action: Tensor,
        tau: float,
        num_samples: int,
        nodes: Literal["stratified", "gauss_hermite", "random"] = "stratified",
        num_steps: int | None = None,
    ) -> Tensor:
        r"""Optimal regularised value :math:`\tau \log E \exp(Z / \tau)`.

        Args:
            observation (Tensor): ``[*B, obs]``.
            action (Tensor): ``[*B, act]``; the batch dimensions of both broadcast.
            tau (float): temperature in reward units; ``0`` is the maximum over
                the nodes, ``inf`` their mean.
            num_samples (int): nodes per state and action.
            nodes (str, optional): ``"stratified"``, the deterministic
                quadrature on quantiles; ``"gauss_hermite"``, weighted nodes,
                which reach into the tail that a small ``tau`` asks for; or
                ``"random"``. Defaults to ``"stratified"``.
            num_steps (int, optional): evaluations of the velocity for each node;
                ``1`` is a step of Euler's for either solver. Defaults to those of
                the model.

        Returns:
            Tensor: ``[*B]``, in reward units.
        """
        check_temperature("tau", tau)
        noise, log_weights = self._nodes(action, num_samples, nodes)
        samples = self.sample(observation, action, num_samples, noise, num_steps)
        return log_mean_exp(samples, tau, log_weights=log_weights)

    def select(
        self,
        observation: Tensor,
        candidates: Tensor,
        *,
        tau_r: float,
        tau_q: float = 0.0,
        gumbel: Tensor | None = None,
        num_samples: int = 16,
        nodes: Literal["stratified", "gauss_hermite", "random"] = "stratified",
        backend: Literal["auto", "torch", "triton"] = "auto",
        precision: Literal["fp16", "bf16", "tf32", "tf32x3", "ieee"] | None = None,
        num_steps: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draws one candidate, on the fused path where the network allows it.

        See :meth:`ReturnModel.select`, :meth:`why_not_fused` and, of ``num_steps``,
        :meth:`q_star`.
        """
        check_choice("backend", backend, ("auto", "torch", "triton"))
        check_precision(precision)
        check_positive("num_samples", num_samples)
        check_temperature("tau_r", tau_r)
        check_temperature("tau_q", tau_q)
        if tau_q > 0 and gumbel is None:
            # Candidate after candidate, as they were drawn; the same on every path.
            gumbel = standard_gumbel(candidates[..., 0].movedim(-1, 0)).movedim(0, -1)
        reason = self.why_not_fused(observation, candidates)
        if reason is not None:
            if backend == "triton":
                raise RuntimeError(f"backend='triton' is not available: {reason}.")
            values = self._values(observation, candidates, tau_r, num_samples, nodes, num_steps)
            return self._choose(candidates, values, tau_q, gumbel)
        choice = {"tau_r": tau_r, "tau_q": tau_q, "num_steps": num_steps}
        choice |= {"backend": backend, "precision": precision}
        return self._select_fused(observation, candidates, gumbel, num_samples, nodes, **choice)

    def _select_fused(
        self,
        observation,
        candidates,
        gumbel,
        num_samples,
        nodes,
        *,
        tau_r,
        tau_q,
        num_steps,
        **options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The single seam to the kernels, whose module is not needed to train.
        from torchrl_evor.triton_kernels import evor_select, pack_velocity_mlp, sample_returns

        num_steps, solver = self.solver_steps(num_steps)
        options |= {"solver": solver, "tolerance": self.tolerance}
        noise, log_weights = self._nodes(candidates, num_samples, nodes)
        if noise is None:
            shape = (*candidates.shape[:-1], num_samples)
            noise = torch.randn(shape, dtype=candidates.dtype, device=candidates.device)
        sizes = observation.shape[-1], candidates.shape[-1]
        packed = [pack_velocity_mlp(network, *sizes) for network in self.members]
        if len(packed) > 1:
            z = [
                sample_returns(member, observation, candidates, noise, num_steps, **options)
                for member in packed
            ]
            samples = self.denormalize(torch.stack(z).mean(0))
            values = log_mean_exp(samples, tau_r, log_weights=log_weights)
            return self._choose(candidates, values, tau_q, gumbel)
        return evor_select(
            packed[0],
            observation,
            candidates,
            noise,
            gumbel,
            tau_r=tau_r,
            tau_q=tau_q,
            num_steps=num_steps,
            log_weights=log_weights,
            loc=self.loc,
            scale=self.scale,
            **options,
        )

    def why_not_fused(self, observation: Tensor, candidates: Tensor) -> str | None:
        """Why :meth:`select` runs the network itself and not the fused path, or ``None``.

        Args:
            observation (Tensor): ``[*B, obs]``.
            candidates (Tensor): ``[*B, P, act]``.
        """
        from torchrl_evor.triton_kernels import why_not_packable

        if self.loc.ndim:
            return "loc and scale differ along the batch"
        if torch.is_autocast_enabled(observation.device.type):
            kinds = {tensor.dtype for tensor in (observation, candidates, *self.parameters())}
            if len(kinds) > 1:
                return "under autocast the inputs have another dtype than the parameters"
        needs_grad = any(
            tensor.requires_grad for tensor in (observation, candidates, *self.parameters())
        )
        if torch.is_grad_enabled() and needs_grad:
            return "the fused path has no backward, and gradients are enabled"
        sizes = observation.shape[-1], candidates.shape[-1]
        reasons = (why_not_packable(network, *sizes) for network in self.members)
        return next((reason for reason in reasons if reason is not None), None)

    def _values(self, observation, candidates, tau, num_samples, nodes, num_steps=None) -> Tensor:
        # Pairs of state and candidate in pieces, so that memory does not grow with their number.
        # The axis of a stack of models, or of units for each index of it, stays whole.
        axis = max(self.loc.ndim, int(hasattr(self.members[0], "num_models")))
        rows = math.prod(candidates.shape[:axis]) * len(self.members) * num_samples
        pairs = observation.unsqueeze(-2).expand(*candidates.shape[:-1], -1)
        pieces = (
            tensor.flatten(axis, -2).split(max(1, MAX_ROWS // max(1, rows)), axis)
            for tensor in (pairs, candidates)
        )
        values = [self.q_star(x, a, tau, num_samples, nodes, num_steps) for x, a in zip(*pieces)]
        return torch.cat(values, axis).reshape(candidates.shape[:-1])

    @staticmethod
    def _nodes(like: Tensor, num_nodes: int, nodes: str) -> tuple[Tensor | None, Tensor | None]:
        """Start of the flow and logarithms of the weights, ``[num_nodes]``, as far as needed."""
        check_choice("nodes", nodes, NODES)
        check_positive("num_samples", num_nodes)
        if nodes == "random":
            return None, None
        if nodes == "gauss_hermite":
            return gauss_hermite_normal(num_nodes, device=like.device, dtype=like.dtype)
        return stratified_normal(num_nodes, device=like.device, dtype=like.dtype), None

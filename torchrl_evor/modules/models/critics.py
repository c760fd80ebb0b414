# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Critics of the kinds that a return flow is compared with.

All of them offer ``law``, ``q_star`` and ``distance``, so that one loss trains
them and one actor acts by them. They differ in what they keep of the law of
the return: its mean, its masses on fixed atoms, or its quantiles.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchrl_evor.modules.functional import check_positive, check_temperature, log_mean_exp
from torchrl_evor.modules.models.return_model import ReturnModel

__all__ = ["CategoricalCritic", "Critic", "HLGaussCritic", "QuantileCritic", "ScalarCritic"]


class Critic(ReturnModel):
    """Base of the critics whose network describes the law of the return in one pass.

    Args:
        network (nn.Module): maps the concatenation of observation and action
            ``[*B, obs + act]`` to ``[*B, num_outputs]``. With ``num_critics``
            above 1, a :class:`~torchrl_evor.StackedVelocityMLP` of that many
            models, or of a multiple for batches that are stacked themselves.

    Keyword Args:
        num_critics (int, optional): size of the ensemble, whose members are
            averaged. Defaults to ``1``.
        **kwargs: ``loc``, ``scale``, ``in_keys``, ``out_keys`` of the
            :class:`ReturnModel`.

    Raises:
        ValueError: if ``num_critics`` does not fit the network, or the network
            does not return ``num_outputs`` features.
    """

    num_outputs: int

    def __init__(self, network: nn.Module, *, num_critics: int = 1, **kwargs) -> None:
        super().__init__(**kwargs)
        self.network = network
        self.num_critics = check_positive("num_critics", num_critics)
        num_models = getattr(network, "num_models", 1)
        if num_critics > 1 and num_models % num_critics:
            raise ValueError(
                f"num_critics={num_critics} needs a network of as many stacked models, or a "
                f"multiple, got {num_models}."
            )

    def outputs(self, observation: Tensor, action: Tensor) -> Tensor:
        """Raw outputs of each member, ``[num_critics, *B, num_outputs]``."""
        batch = torch.broadcast_shapes(observation.shape[:-1], action.shape[:-1])
        inputs = torch.cat([observation.expand(*batch, -1), action.expand(*batch, -1)], -1)
        if self.num_critics == 1:
            outputs = self.network(inputs).unsqueeze(0)
        elif self.network.num_models == self.num_critics:
            outputs = self.network(inputs.expand(self.num_critics, *inputs.shape))
        else:
            inputs = inputs.expand(self.num_critics, *inputs.shape).flatten(0, 1)
            outputs = self.network(inputs).unflatten(0, (self.num_critics, -1))
        if outputs.shape != (self.num_critics, *batch, self.num_outputs):
            raise ValueError(
                f"network must return {self.num_outputs} features per row, "
                f"{(self.num_critics, *batch, self.num_outputs)}, got {tuple(outputs.shape)}."
            )
        return outputs

    def law(self, outputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Law of the return as nodes, the members of an ensemble averaged.

        Args:
            outputs (Tensor): from :meth:`outputs`, ``[num_critics, *B, num_outputs]``.

        Returns:
            tuple: values ``[*B, N]`` in reward units, and the logarithms of
            their weights ``[*B, N]``, or ``None`` for equal weights.
        """
        raise NotImplementedError

    def distance(
        self, outputs: Tensor, values: Tensor, log_weights: Tensor | None = None
    ) -> Tensor:
        """What is minimised to fit the law to a target law, mean over the members.

        Args:
            outputs (Tensor): from :meth:`outputs`, ``[num_critics, *B, num_outputs]``.
            values (Tensor): nodes of the target law, ``[*B, N]``, in reward units.
            log_weights (Tensor, optional): logarithms of their weights,
                ``[*B, N]``. Defaults to equal weights.

        Returns:
            Tensor: ``[*B]``.
        """
        raise NotImplementedError

    def q_star(
        self,
        observation: Tensor,
        action: Tensor,
        tau: float,
        num_samples: int = 1,
        nodes: str = "stratified",
    ) -> Tensor:
        r"""Optimal regularised value :math:`\tau \log E \exp(Z / \tau)` of the law.

        Args:
            observation (Tensor): ``[*B, obs]``.
            action (Tensor): ``[*B, act]``; the batch dimensions of both broadcast.
            tau (float): temperature in reward units; ``0`` is the maximum over
                the nodes, ``inf`` their mean.
            num_samples (int, optional): not used: the law has its own nodes.
            nodes (str, optional): not used.

        Returns:
            Tensor: ``[*B]``, in reward units.
        """
        check_temperature("tau", tau)
        values, log_weights = self.law(self.outputs(observation, action))
        return log_mean_exp(values, tau, log_weights=log_weights)


class ScalarCritic(Critic):
    """Critic of the expected return alone, fitted by squared error.

    ``q_star`` is the expected return at every temperature.

    Args:
        network (nn.Module): maps ``[*B, obs + act]`` to ``[*B, 1]``; see :class:`Critic`.

    Keyword Args:
        num_critics (int, optional): size of the ensemble. Defaults to ``1``.
        **kwargs: see :class:`Critic`.

    Examples:
        >>> import torch
        >>> from torchrl_evor import StackedVelocityMLP
        >>> network = StackedVelocityMLP(2, 3 + 2, 1, hidden_sizes=(32,), layer_norm=True)
        >>> critic = ScalarCritic(network, num_critics=2)
        >>> critic.q_star(torch.zeros(5, 3), torch.zeros(5, 2), tau=1.0).shape
        torch.Size([5])
    """

    num_outputs = 1

    def law(self, outputs: Tensor) -> tuple[Tensor, None]:
        """Expected return ``[*B, 1]`` as the only node; see :meth:`Critic.law`."""
        return self.denormalize(outputs.mean(0)), None

    def distance(
        self, outputs: Tensor, values: Tensor, log_weights: Tensor | None = None
    ) -> Tensor:
        """Squared distance to the target's mean, in z units; see :meth:`Critic.distance`."""
        target = self.normalize(log_mean_exp(values, math.inf, log_weights=log_weights))
        return (outputs.squeeze(-1) - target).square().mean(0)


class CategoricalCritic(Critic):
    r"""Critic that keeps the masses of the return on fixed atoms (C51).

    The target law is projected onto the atoms, each node's mass split among
    its two neighbours, and fitted by cross-entropy. See *A Distributional
    Perspective on Reinforcement Learning*, `arXiv:1707.06887
    <https://arxiv.org/abs/1707.06887>`_, equation 7.

    Args:
        network (nn.Module): maps ``[*B, obs + act]`` to logits
            ``[*B, num_atoms]``; see :class:`Critic`.

    Keyword Args:
        low (float): lowest atom, in z units.
        high (float): highest atom, in z units.
        num_atoms (int, optional): Defaults to ``51``.
        **kwargs: see :class:`Critic`.

    .. note::
        ``q_star`` at ``tau=0`` is the highest atom for every state and action:
        a softmax gives all atoms some mass.

    Raises:
        ValueError: if there are fewer than two atoms or ``low`` is not below ``high``, both finite.

    Examples:
        >>> import torch
        >>> critic = CategoricalCritic(torch.nn.Linear(3 + 2, 51), low=-4.0, high=4.0)
        >>> critic.q_star(torch.zeros(5, 3), torch.zeros(5, 2), tau=1.0).shape
        torch.Size([5])
    """

    def __init__(
        self, network: nn.Module, *, low: float, high: float, num_atoms: int = 51, **kwargs
    ) -> None:
        super().__init__(network, **kwargs)
        if check_positive("num_atoms", num_atoms) < 2:
            raise ValueError(f"num_atoms must be at least 2, got {num_atoms}.")
        if not (low < high and math.isfinite(high - low)):
            raise ValueError(f"low must be below high, both finite, got {low} and {high}.")
        self.num_outputs = num_atoms
        self.register_buffer("atoms", torch.linspace(low, high, num_atoms))

    def law(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Atoms and the logarithms of their masses ``[*B, num_atoms]``; see :meth:`Critic.law`."""
        log_masses = outputs.log_softmax(-1)
        log_masses = log_masses.logsumexp(0) - math.log(self.num_critics)
        return self.denormalize(self.atoms.expand_as(log_masses)), log_masses

    def distance(
        self, outputs: Tensor, values: Tensor, log_weights: Tensor | None = None
    ) -> Tensor:
        """Cross-entropy to the projected target; see :meth:`Critic.distance`."""
        log_masses = outputs.log_softmax(-1)
        masses = self.project(self.normalize(values), log_weights)
        return -(masses * log_masses).sum(-1).mean(0)

    def project(self, z: Tensor, log_weights: Tensor | None = None) -> Tensor:
        """Masses on the atoms that keep the mean of nodes within their range.

        Args:
            z (Tensor): nodes ``[*B, N]`` in z units; those outside of the
                atoms' range move to its ends.
            log_weights (Tensor, optional): logarithms of their weights, ``[*B, N]``.

        Returns:
            Tensor: masses ``[*B, num_atoms]``, which sum to one.
        """
        spacing = self.atoms[1] - self.atoms[0]
        nodes = z.clamp(self.atoms[0], self.atoms[-1]).unsqueeze(-1)
        # Hat functions around the atoms, [*B, N, num_atoms].
        masses = (1 - (nodes - self.atoms).abs() / spacing).clamp_min(0)
        return _weighted_mean(masses, log_weights, -2)


class HLGaussCritic(CategoricalCritic):
    r"""Critic of the expected return, fitted by classification (HL-Gauss).

    The target's mean, blurred by a Gaussian, becomes a histogram over the
    atoms' bins, to be fitted by cross-entropy. The histogram is a device of
    training, not the law of the return: ``q_star`` is the expected return at
    every temperature. See *Stop Regressing*, `arXiv:2403.03950
    <https://arxiv.org/abs/2403.03950>`_.

    Args:
        network (nn.Module): maps ``[*B, obs + act]`` to logits
            ``[*B, num_atoms]``; see :class:`Critic`.

    Keyword Args:
        low (float): centre of the lowest bin, in z units.
        high (float): centre of the highest bin, in z units.
        num_atoms (int, optional): number of bins. Defaults to ``51``.
        blur (float, optional): standard deviation of the Gaussian in widths of
            a bin. Defaults to ``0.75``.
        **kwargs: see :class:`Critic`.

    Raises:
        ValueError: see :class:`CategoricalCritic`; if ``blur`` is not positive and finite.

    Examples:
        >>> import torch
        >>> critic = HLGaussCritic(torch.nn.Linear(3 + 2, 51), low=-4.0, high=4.0)
        >>> critic.q_star(torch.zeros(5, 3), torch.zeros(5, 2), tau=1.0).shape
        torch.Size([5])
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        low: float,
        high: float,
        num_atoms: int = 51,
        blur: float = 0.75,
        **kwargs,
    ) -> None:
        super().__init__(network, low=low, high=high, num_atoms=num_atoms, **kwargs)
        if not 0 < blur < math.inf:
            raise ValueError(f"blur must be positive and finite, got {blur}.")
        self.blur = blur

    def law(self, outputs: Tensor) -> tuple[Tensor, None]:
        """Expected return ``[*B, 1]`` as the only node; see :meth:`Critic.law`."""
        values, log_masses = super().law(outputs)
        return log_mean_exp(values, math.inf, log_weights=log_masses).unsqueeze(-1), None

    def project(self, z: Tensor, log_weights: Tensor | None = None) -> Tensor:
        """Histogram of the blurred mean of nodes; see :meth:`CategoricalCritic.project`."""
        spacing = self.atoms[1] - self.atoms[0]
        mean = _weighted_mean(z, log_weights, -1).clamp(self.atoms[0], self.atoms[-1])
        edges = torch.cat([self.atoms[:1] - spacing, self.atoms]) + spacing / 2
        below = torch.special.ndtr((edges - mean.unsqueeze(-1)) / (self.blur * spacing))
        return below.diff(dim=-1) / (below[..., -1:] - below[..., :1])


class QuantileCritic(Critic):
    r"""Critic that keeps the quantiles of the return (QR-DQN).

    Quantiles :math:`(i - 1/2) / N` are fitted by the quantile Huber loss. See
    *Distributional Reinforcement Learning with Quantile Regression*,
    `arXiv:1710.10044 <https://arxiv.org/abs/1710.10044>`_, equations 9 and 10.

    Args:
        network (nn.Module): maps ``[*B, obs + act]`` to quantiles
            ``[*B, num_quantiles]`` in z units; see :class:`Critic`.

    Keyword Args:
        num_quantiles (int, optional): Defaults to ``51``.
        kappa (float, optional): half-width of the Huber loss's square, in z
            units; ``0`` is plain quantile regression. Where it is not small
            against the spread of returns (1 in z units), the quantiles
            shrink towards the mean. Defaults to ``0.1``.
        **kwargs: see :class:`Critic`.

    Raises:
        ValueError: if ``num_quantiles`` is below 1 or ``kappa`` is negative.

    Examples:
        >>> import torch
        >>> critic = QuantileCritic(torch.nn.Linear(3 + 2, 51))
        >>> critic.q_star(torch.zeros(5, 3), torch.zeros(5, 2), tau=1.0).shape
        torch.Size([5])
    """

    def __init__(
        self, network: nn.Module, *, num_quantiles: int = 51, kappa: float = 0.1, **kwargs
    ) -> None:
        super().__init__(network, **kwargs)
        self.num_outputs = check_positive("num_quantiles", num_quantiles)
        if not 0 <= kappa < math.inf:
            raise ValueError(f"kappa must be finite and at least 0, got {kappa}.")
        self.kappa = kappa
        probabilities = (torch.arange(num_quantiles) + 0.5) / num_quantiles
        self.register_buffer("probabilities", probabilities)

    def law(self, outputs: Tensor) -> tuple[Tensor, None]:
        """Quantiles ``[*B, num_quantiles]``, of equal weight; see :meth:`Critic.law`."""
        return self.denormalize(outputs.mean(0)), None

    def distance(
        self, outputs: Tensor, values: Tensor, log_weights: Tensor | None = None
    ) -> Tensor:
        """Quantile Huber loss, summed over quantiles; see :meth:`Critic.distance`."""
        # [num_critics, *B, num_quantiles, N]
        error = self.normalize(values).unsqueeze(-2) - outputs.unsqueeze(-1)
        size = error.abs()
        if self.kappa > 0:
            square = error.square() / (2 * self.kappa)
            size = torch.where(size <= self.kappa, square, size - self.kappa / 2)
        slope = (self.probabilities.unsqueeze(-1) - (error < 0).to(error.dtype)).abs()
        weights = None if log_weights is None else log_weights.unsqueeze(-2)
        return _weighted_mean(slope * size, weights, -1).sum(-1).mean(0)


def _weighted_mean(values: Tensor, log_weights: Tensor | None, dim: int) -> Tensor:
    """Mean over ``dim``; ``log_weights`` lack the axes of ``values`` behind ``dim``."""
    if log_weights is None:
        return values.mean(dim)
    weights = log_weights.exp().reshape(*log_weights.shape, *(1,) * (-1 - dim))
    return (weights * values).sum(dim)

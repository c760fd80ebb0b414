# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from torchrl_evor.modules.functional import (
    check_choice,
    check_positive,
    check_solver,
    integrate,
)

__all__ = ["FlowMatchingModel", "VelocityMLP"]

ACTIVATIONS = {
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


@torch.no_grad()
def fold_standardization(weight: Tensor, bias: Tensor, loc: Tensor, scale: Tensor) -> None:
    """Folds ``(x - loc) / scale`` into a layer ``x @ weight + bias``, in place.

    ``weight`` is ``[*M, in, out]``, ``bias`` has ``out`` last; ``loc`` and
    ``scale`` belong to the first inputs.
    """
    if loc.ndim != 1 or loc.shape != scale.shape or len(loc) > weight.shape[-2]:
        raise ValueError(
            f"loc and scale must be of one shape [n], n at most {weight.shape[-2]} inputs, "
            f"got {list(loc.shape)} and {list(scale.shape)}."
        )
    if not ((scale > 0) & scale.isfinite()).all():
        raise ValueError(f"scale must be positive and finite, got {scale.tolist()}.")
    if not loc.isfinite().all():
        raise ValueError(f"loc must be finite, got {loc.tolist()}.")
    loc, scale = loc.to(weight), scale.to(weight)
    rows = weight[..., : len(loc), :]
    rows.div_(scale.unsqueeze(-1))
    bias.sub_((loc @ rows).reshape(bias.shape))


class VelocityMLP(nn.Module):
    """MLP for velocity fields: Linear, activation, optional LayerNorm, repeated.

    Weights are Xavier-uniform and biases zero. LayerNorm comes after the
    activation, as in the networks of `FQL <https://arxiv.org/abs/2502.02538>`_.

    Args:
        in_features (int): sum of the sizes of the inputs.
        out_features (int, optional): size of the velocity. Defaults to ``1``.

    Keyword Args:
        hidden_sizes (sequence of int, optional): widths of the hidden layers.
            Defaults to four layers of ``512``.
        activation (str, optional): ``"gelu_tanh"``, ``"gelu"``, ``"relu"`` or
            ``"silu"``. Defaults to ``"gelu_tanh"``.
        layer_norm (bool, optional): normalise after each activation.
            Defaults to ``False``.
        device (torch.device, optional): device of the parameters.
        dtype (torch.dtype, optional): dtype of the parameters.

    Raises:
        ValueError: if a size is not a positive integer, ``hidden_sizes`` is
            empty, or ``activation`` is unknown.

    Examples:
        >>> import torch
        >>> network = VelocityMLP(3 + 2 + 1, 2, hidden_sizes=(32, 32))
        >>> network(torch.zeros(5, 3), torch.zeros(5, 2), torch.zeros(5, 1)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        *,
        hidden_sizes: Sequence[int] = (512, 512, 512, 512),
        activation: Literal["gelu_tanh", "gelu", "relu", "silu"] = "gelu_tanh",
        layer_norm: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        if not len(hidden_sizes):
            raise ValueError("hidden_sizes must name at least one layer, got an empty sequence.")
        sizes = [check_positive("in_features", in_features)]
        sizes += [check_positive("hidden_sizes", size) for size in hidden_sizes]
        layers = []
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
            layers += [nn.Linear(fan_in, fan_out, device=device, dtype=dtype)]
            layers += [ACTIVATIONS[activation]()]
            if layer_norm:
                layers += [nn.LayerNorm(fan_out, eps=1e-6, device=device, dtype=dtype)]
        check_positive("out_features", out_features)
        layers += [nn.Linear(sizes[-1], out_features, device=device, dtype=dtype)]
        self.net = nn.Sequential(*layers)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws Xavier-uniform weights and sets biases to zero."""
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.LayerNorm):
                layer.reset_parameters()

    def standardize_inputs_(self, loc: Tensor, scale: Tensor) -> VelocityMLP:
        """Starts the network as if its first inputs were ``(x - loc) / scale``.

        The map is folded into the first layer, once: the network stays a plain
        MLP of its raw inputs, nothing is kept, and training goes on from there. It
        comes before the loss is made, whose target network starts as a copy. Where an
        input lies far from zero, all units of the first layer would otherwise bend on
        the same side of the data.

        Args:
            loc (Tensor): ``[n]``, of the first ``n`` inputs, e.g. an observation's mean.
            scale (Tensor): ``[n]``, positive, in the units of the inputs.

        Returns:
            the network itself.

        Raises:
            ValueError: if the shapes differ or exceed the inputs, or a scale
                is not positive.

        Examples:
            >>> import torch
            >>> network = VelocityMLP(2 + 1, hidden_sizes=(8,))
            >>> before = network(torch.tensor([[1.0, -1.0, 0.5]]))
            >>> loc, scale = torch.tensor([10.0, 20.0]), torch.tensor([2.0, 4.0])
            >>> network = network.standardize_inputs_(loc, scale)
            >>> after = network(torch.tensor([[12.0, 16.0, 0.5]]))
            >>> torch.testing.assert_close(before, after)
        """
        layer = self.net[0]
        fold_standardization(layer.weight.mT, layer.bias, loc, scale)
        return self

    def forward(self, *inputs: Tensor) -> Tensor:
        """Velocity at the concatenation of ``inputs``, ``[*B, out_features]``."""
        return self.net(inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1))


class FlowMatchingModel(nn.Module):
    r"""Tensor-only sampler of a flow-matching policy.

    Integrates :math:`da_t/dt = v(a_t, t | x)` from Gaussian noise at flow time
    0 to an action at flow time 1, and clips once, after the last step. See `Flow
    Matching for Generative Modeling
    <https://arxiv.org/abs/2210.02747>`_.

    Args:
        velocity_network (nn.Module): maps the concatenation of observation,
            action and flow time ``[*B, obs + act + 1]`` to a velocity ``[*B, act]``.
        action_dim (int): size of the action.
        num_steps (int, optional): evaluations of the velocity, at flow times
            ``k / num_steps``. Defaults to ``10``.

    Keyword Args:
        solver (str, optional): ``"euler"``, a step for each evaluation, or
            ``"midpoint"``, a step for two, for an even ``num_steps``. May be changed
            after training. Defaults to ``"euler"``.
        low (float or Tensor, optional): lower bound of the action. Defaults to ``-1.0``.
        high (float or Tensor, optional): upper bound of the action. Defaults to ``1.0``.

    Raises:
        ValueError: if ``action_dim`` or ``num_steps`` is not a positive
            integer, ``num_steps`` odd for ``"midpoint"``, ``solver`` unknown, ``low``
            not below ``high``, or the network's output does not have the shape of the
            action.

    Examples:
        >>> import torch
        >>> model = FlowMatchingModel(torch.nn.Linear(3 + 2 + 1, 2), action_dim=2)
        >>> model(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        velocity_network: nn.Module,
        action_dim: int,
        num_steps: int = 10,
        *,
        solver: Literal["euler", "midpoint"] = "euler",
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
    ) -> None:
        super().__init__()
        self.velocity_network = velocity_network
        self.action_dim = check_positive("action_dim", action_dim)
        self.num_steps = check_positive("num_steps", num_steps)
        self.solver = check_solver(solver, num_steps)
        dtype = torch.get_default_dtype()  # NumPy's float64 would spread to the actions
        low, high = (torch.as_tensor(bound).to(dtype) for bound in (low, high))
        for name, bound in (("low", low), ("high", high)):
            if bound.shape not in ((), (action_dim,)):
                raise ValueError(
                    f"{name} must be a number or of shape {(action_dim,)}, "
                    f"got {tuple(bound.shape)}."
                )
        if not (low < high).all():
            raise ValueError(f"low must be below high, got low={low} and high={high}.")
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def velocity(self, observation: Tensor, action: Tensor, time: Tensor) -> Tensor:
        """Velocity of ``action`` ``[*B, act]`` at flow time ``time`` ``[*B, 1]``."""
        velocity = self.velocity_network(torch.cat([observation, action, time], -1))
        if velocity.shape != action.shape:
            raise ValueError(
                f"velocity_network must return the shape of the action, {tuple(action.shape)}, "
                f"got {tuple(velocity.shape)}."
            )
        return velocity

    def forward(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        """Samples an action for each observation.

        Args:
            observation (Tensor): ``[*B, obs]``.
            noise (Tensor, optional): start of the flow, ``[*B, act]``. Drawn
                from a standard normal by default, in every exploration mode.

        Returns:
            Tensor: action within the bounds, ``[*B, act]``.
        """
        if noise is None:
            shape = (*observation.shape[:-1], self.action_dim)
            noise = torch.randn(shape, dtype=observation.dtype, device=observation.device)

        def velocity(action: Tensor, time: Tensor) -> Tensor:
            return self.velocity(observation, action, time)

        action = integrate(velocity, noise, self.num_steps, self.solver)
        return action.clamp(self.low.to(action), self.high.to(action))

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from torchrl_evor.modules.functional import check_choice, check_positive
from torchrl_evor.modules.models.flow import ACTIVATIONS, VelocityMLP, fold_standardization

__all__ = ["StackedVelocityMLP"]

LAYER_NORM_EPS = 1e-6


class StackedLinear(nn.Module):
    """Linear layers of several models as one batched product, ``[M, N, in] -> [M, N, out]``.

    Weights ``[M, in, out]`` are Xavier-uniform for each model, biases ``[M, 1, out]`` zero.
    """

    def __init__(self, num_models: int, in_features: int, out_features: int, **factory) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(num_models, in_features, out_features, **factory))
        self.bias = nn.Parameter(torch.empty(num_models, 1, out_features, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights of each model in turn."""
        for weight in self.weight.detach():
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, inputs, self.weight)


class StackedLayerNorm(nn.Module):
    """LayerNorm over the last axis of ``[M, N, D]`` with weights and biases ``[M, 1, D]``."""

    def __init__(self, num_models: int, num_features: int, **factory) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_models, 1, num_features, **factory))
        self.bias = nn.Parameter(torch.empty(num_models, 1, num_features, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets weights to one and biases to zero."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        normal = nn.functional.layer_norm(inputs, inputs.shape[-1:], eps=LAYER_NORM_EPS)
        return torch.addcmul(self.bias, normal, self.weight)


class StackedVelocityMLP(nn.Module):
    """Several :class:`VelocityMLP` of one architecture, run as batched products.

    Parameters carry a leading model axis and so do inputs and outputs. The
    tasks and seeds of one environment can then be trained side by side, in one
    program that is limited by arithmetic and not by launches: a
    :class:`~torchrl_evor.ReturnFlow` over a stack, with ``loc`` and ``scale`` of
    shape ``[num_models]``, serves :class:`~torchrl_evor.EVORLoss` on batches
    ``[num_models, B, ...]`` unchanged.

    Args:
        num_models (int): number of models.
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

    .. note::
        ``reduction="mean"`` averages over models too, which divides each
        model's gradient by ``num_models``. Multiply that loss by
        ``num_models``, or sum the means of ``reduction="none"``, to give every
        model the gradient, and the same place against Adam's ``eps``, that it
        has alone. Clip gradients for each model, not for the stack.

    Raises:
        ValueError: if a size is not a positive integer, ``hidden_sizes`` is
            empty, ``activation`` is unknown, or the leading axis of an input
            is not ``num_models``.

    Examples:
        >>> import torch
        >>> stack = StackedVelocityMLP(4, 3 + 2 + 1, 2, hidden_sizes=(32, 32))
        >>> stack(torch.zeros(4, 5, 3), torch.zeros(4, 5, 2), torch.zeros(4, 5, 1)).shape
        torch.Size([4, 5, 2])
        >>> len(stack.unstack())
        4
    """

    def __init__(
        self,
        num_models: int,
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
        self.num_models = check_positive("num_models", num_models)
        factory = {"device": device, "dtype": dtype}
        sizes = [check_positive("in_features", in_features)]
        sizes += [check_positive("hidden_sizes", size) for size in hidden_sizes]
        layers = []
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
            layers += [StackedLinear(num_models, fan_in, fan_out, **factory)]
            layers += [ACTIVATIONS[activation]()]
            if layer_norm:
                layers += [StackedLayerNorm(num_models, fan_out, **factory)]
        check_positive("out_features", out_features)
        layers += [StackedLinear(num_models, sizes[-1], out_features, **factory)]
        # Layers at the positions that they have in VelocityMLP.
        self.net = nn.Sequential(*layers)

    def reset_parameters(self) -> None:
        """Draws Xavier-uniform weights for each model and sets biases to zero."""
        for layer in self.net:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()

    def standardize_inputs_(self, loc: Tensor, scale: Tensor) -> StackedVelocityMLP:
        """:meth:`VelocityMLP.standardize_inputs_` of every model, by one ``loc`` and ``scale``."""
        fold_standardization(self.net[0].weight, self.net[0].bias, loc, scale)
        return self

    def forward(self, *inputs: Tensor) -> Tensor:
        """Velocities ``[num_models, *B, out_features]`` at the concatenation of ``inputs``."""
        inputs = inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)
        if inputs.shape[0] != self.num_models:
            raise ValueError(
                f"inputs must have a leading axis of num_models={self.num_models}, "
                f"got {tuple(inputs.shape)}."
            )
        rows = math.prod(inputs.shape[1:-1])
        outputs = self.net(inputs.reshape(self.num_models, rows, inputs.shape[-1]))
        return outputs.reshape(*inputs.shape[:-1], outputs.shape[-1])

    @classmethod
    def from_models(cls, models: Sequence[VelocityMLP]) -> StackedVelocityMLP:
        """Stacks copies of the parameters of ``models``.

        Args:
            models (sequence of VelocityMLP): at least one, all of one architecture.

        Returns:
            StackedVelocityMLP: on the device and of the dtype of the first model.

        Raises:
            ValueError: if ``models`` is empty or architectures differ.
        """
        if not len(models):
            raise ValueError("models must hold at least one VelocityMLP, got none.")
        architectures = [_architecture(model) for model in models]
        for architecture in architectures[1:]:
            if architecture != architectures[0]:
                raise ValueError(
                    f"models must share one architecture, got {architectures[0]} "
                    f"and {architecture}."
                )
        # On "meta" the discarded initialisation draws no random numbers.
        stack = cls(len(models), **architectures[0], device="meta")
        states = [model.state_dict() for model in models]
        state = {key: torch.stack([_transpose(s[key]) for s in states]) for key in states[0]}
        stack.load_state_dict(state, assign=True)
        return stack

    def unstack(self) -> list[VelocityMLP]:
        """Separate models with copies of the parameters.

        Returns:
            list of VelocityMLP: one for each model, in order.
        """
        architecture = _architecture(self)
        models = [VelocityMLP(**architecture, device="meta") for _ in range(self.num_models)]
        for index, model in enumerate(models):
            shapes = {key: value.shape for key, value in model.state_dict().items()}
            state = {
                key: value[index]
                .mT.reshape(shapes[key])
                .clone(memory_format=torch.contiguous_format)
                for key, value in self.state_dict().items()
            }
            model.load_state_dict(state, assign=True)
        return models


def _transpose(parameter: Tensor) -> Tensor:
    """A weight ``[out, in]`` as ``[in, out]``, a vector ``[out]`` as ``[1, out]``."""
    return parameter.mT if parameter.ndim == 2 else parameter.unsqueeze(0)


def _architecture(model: VelocityMLP | StackedVelocityMLP) -> dict:
    """Constructor arguments of a model, read from its layers."""
    linear = [layer for layer in model.net if isinstance(layer, (nn.Linear, StackedLinear))]
    norm = any(isinstance(layer, (nn.LayerNorm, StackedLayerNorm)) for layer in model.net)
    return {
        "in_features": linear[0].in_features,
        "out_features": linear[-1].out_features,
        "hidden_sizes": tuple(layer.out_features for layer in linear[:-1]),
        # The representation names the class and its options.
        "activation": next(
            n for n, new in ACTIVATIONS.items() if repr(new()) == repr(model.net[1])
        ),
        "layer_norm": norm,
    }

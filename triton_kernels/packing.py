# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Recognises velocity MLPs and folds their LayerNorms into the following linear maps.

Folding is redone at every call, inside the graph under :func:`torch.compile`. Version counters
would not do as a key of a cache: a write through ``Tensor.data``, which is how target networks are
usually updated, leaves them unchanged.
:meth:`PackedVelocity.freeze` is there for a caller who knows that the weights stay as they are.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "activate",
    "Activation",
    "FoldedVelocity",
    "fold",
    "pack_velocity_mlp",
    "PackedVelocity",
    "why_not_packable",
]

Activation = Literal["gelu_tanh", "gelu", "relu", "silu"]

# What runs the layers of a sequence on the concatenation of its inputs and does nothing else. By
# name, since neither package can be imported here.
_PLAIN_FORWARDS = (
    "torch.nn.modules.container.Sequential.forward",
    "torchrl.modules.models.models.MLP.forward",
    "torchrl_evor.modules.models.flow.VelocityMLP.forward",
)


class FoldedVelocity(NamedTuple):
    """Weights of a velocity MLP with its LayerNorms folded into the linear maps that follow them.

    With ``g`` the activations of a layer, ``mu`` and ``rstd`` their statistics, the next
    pre-activation is ``((g - mu) * rstd) @ weight.T + bias``; without LayerNorm ``g @ weight.T +
    bias``.
    """

    first_weight: Tensor  # [H, obs + act], the columns of observation and action
    first_z: Tensor  # [H], the column of z
    first_t: Tensor  # [H], the column of t
    first_bias: Tensor  # [H]
    weights: tuple[Tensor, ...]  # L - 1 of [H, H], then the head [1, H]
    biases: tuple[Tensor, ...]  # one [out] per entry of weights


def activate(x: Tensor, activation: Activation) -> Tensor:
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}[activation](x)


def _activation_name(module: nn.Module) -> str | None:
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(module))


class PackedVelocity:
    """A live view of a velocity MLP: linear maps, activation and LayerNorms, read at each call.

    Built by :func:`pack_velocity_mlp`. The view holds modules, not tensors, so parameters swapped
    by ``TensorDictParams.to_module``, an optimiser step or ``load_state_dict`` are all seen.

    Attributes:
        observation_dim (int): size of the observation.
        action_dim (int): size of one candidate.
        activation (str): one of ``"gelu_tanh"``, ``"gelu"``, ``"relu"``, ``"silu"``.
        eps (float): epsilon of the LayerNorms; negative where there are none.
    """

    def __init__(self, linears, norms, activation: Activation, observation_dim, action_dim):
        self.linears = tuple(linears)
        self.norms = tuple(norms)
        self.activation = activation
        self.observation_dim = observation_dim
        self.action_dim = action_dim
        self.eps = float(self.norms[0].eps) if self.norms else -1.0

    @property
    def layer_norm(self) -> bool:
        return bool(self.norms)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(linear.out_features for linear in self.linears[:-1])

    def tensors(self) -> list[Tensor | None]:
        """The current parameters: weight and bias of each linear map, then of each LayerNorm."""
        modules = self.linears + self.norms
        return [tensor for module in modules for tensor in (module.weight, module.bias)]

    def __call__(self, inputs: Tensor) -> Tensor:
        """Velocity ``[..., 1]`` at ``concat(observation, action, z, t)``: what a view stands for.

        Plain and differentiable; no path of :func:`evor_select` calls it.
        """
        linears, norms = split_tensors(self.tensors(), self.layer_norm)
        x = F.linear(inputs, *linears[0])
        for index, linear in enumerate(linears[1:]):
            x = activate(x, self.activation)
            if norms:
                x = F.layer_norm(x, x.shape[-1:], *norms[index], self.eps)
            x = F.linear(x, *linear)
        return x

    def freeze(self) -> FrozenVelocity:
        """A snapshot of the current parameters, which later changes of the network do not reach."""
        return FrozenVelocity(self)


class FrozenVelocity:
    """Snapshot of a :class:`PackedVelocity`; layouts made from it are kept and never refreshed.

    Attributes:
        cache (dict): layouts of the weights, filled by the paths that use them.
    """

    def __init__(self, packed: PackedVelocity):
        self.observation_dim = packed.observation_dim
        self.action_dim = packed.action_dim
        self.activation = packed.activation
        self.eps = packed.eps
        self.widths = packed.widths
        self.layer_norm = packed.layer_norm
        self._tensors = [t if t is None else t.detach().clone() for t in packed.tensors()]
        self.cache: dict = {}

    def tensors(self) -> list[Tensor | None]:
        return self._tensors

    __call__ = PackedVelocity.__call__


def _sequence(network: nn.Module) -> nn.Sequential | str:
    """The layers that are all that a call of the network runs, or the reason why there are none."""
    forward = type(network).forward
    if f"{forward.__module__}.{forward.__qualname__}" not in _PLAIN_FORWARDS:
        return (
            f"{type(network).__name__} is no nn.Sequential, VelocityMLP or torchrl MLP, or has a "
            "forward of its own"
        )
    sequence = network if isinstance(network, nn.Sequential) else network.net
    for module in (network, sequence, *sequence):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"a hook changes the call of its {type(module).__name__}"
    return sequence


def _split_layers(layers: list[nn.Module]) -> tuple[list, list, list] | str:
    """Linear maps, activations and LayerNorms in order, or the reason why there is none."""
    linears, activations, norms = [], [], []
    position = 0
    while position < len(layers) - 1:
        # Not isinstance: a subclass may do more.
        if type(layers[position]) is not nn.Linear:
            return f"layer {position} is a {type(layers[position]).__name__}, expected nn.Linear"
        linears.append(layers[position])
        activations.append(_activation_name(layers[position + 1]))
        if activations[-1] is None:
            name = type(layers[position + 1]).__name__
            return f"layer {position + 1} is a {name}, expected GELU, ReLU or SiLU"
        position += 2
        if position < len(layers) and type(layers[position]) is nn.LayerNorm:
            norms.append(layers[position])
            position += 1
    if position != len(layers) - 1 or type(layers[-1]) is not nn.Linear:
        return "the last layer is not an nn.Linear"
    return linears + [layers[-1]], activations, norms


def _why_not_uniform(linears, activations, norms, in_features: int) -> str | None:
    if len(linears) < 3:
        return f"it has {len(linears) - 1} hidden layers, expected at least 2"
    if linears[0].in_features != in_features:
        return f"it reads {linears[0].in_features} features, expected obs + act + 2 = {in_features}"
    if linears[-1].out_features != 1:
        return f"it writes {linears[-1].out_features} features, expected 1"
    if len(set(activations)) > 1:
        return f"its activations differ: {activations}"
    if norms and len(norms) != len(linears) - 1:
        return f"{len(norms)} of its {len(linears) - 1} hidden layers have a LayerNorm"
    if len({norm.eps for norm in norms}) > 1:
        return "the epsilons of its LayerNorms differ"
    for linear, norm in zip(linears, norms):
        if tuple(norm.normalized_shape) != (linear.out_features,):
            return f"a LayerNorm normalises {tuple(norm.normalized_shape)}"
    return None


def _inspect(network: nn.Module, observation_dim: int, action_dim: int):
    sequence = _sequence(network)
    if isinstance(sequence, str):
        return sequence
    split = _split_layers(list(sequence))
    if isinstance(split, str):
        return split
    reason = _why_not_uniform(*split, observation_dim + action_dim + 2)
    return reason if reason is not None else split


def why_not_packable(network: nn.Module, observation_dim: int, action_dim: int) -> str | None:
    """The reason why a network cannot take the fast path, or ``None`` if it can.

    Args:
        network (nn.Module): velocity network of the reward-to-go flow.
        observation_dim (int): size of the observation.
        action_dim (int): size of one candidate.

    Examples:
        >>> from torch import nn
        >>> why_not_packable(nn.Linear(5, 1), 2, 1)
        'Linear is no nn.Sequential, VelocityMLP or torchrl MLP, or has a forward of its own'
    """
    found = _inspect(network, observation_dim, action_dim)
    return found if isinstance(found, str) else None


def pack_velocity_mlp(network: nn.Module, observation_dim: int, action_dim: int) -> PackedVelocity:
    """A view of a velocity MLP for :func:`evor_select` and :func:`sample_returns`.

    Args:
        network (nn.Module): an ``nn.Sequential``, a ``VelocityMLP`` or TorchRL's ``MLP``, without
            hooks or a ``forward`` of its own, of ``Linear, activation[, LayerNorm]`` at least twice
            and a last ``Linear`` to one feature, which reads ``concat(observation, action, z, t)``.
            Activations: ``nn.GELU`` (both forms), ``nn.ReLU``, ``nn.SiLU``.
        observation_dim (int): size of the observation.
        action_dim (int): size of one candidate.

    Returns:
        PackedVelocity: reads the parameters of ``network`` at each call.

    Raises:
        ValueError: if the network is not of this form; the message says why.

    Examples:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(),
        ...                     nn.Linear(8, 1))
        >>> pack_velocity_mlp(net, observation_dim=3, action_dim=2).widths
        (8, 8)
    """
    found = _inspect(network, observation_dim, action_dim)
    if isinstance(found, str):
        raise ValueError(f"network cannot be packed: {found}.")
    linears, activations, norms = found
    return PackedVelocity(linears, norms, activations[0], observation_dim, action_dim)


def split_tensors(tensors: list[Tensor | None], layer_norm: bool):
    """Pairs ``(weight, bias)`` of the linear maps, then of the LayerNorms."""
    pairs = list(zip(tensors[::2], tensors[1::2]))
    num_linear = (len(pairs) + 1) // 2 if layer_norm else len(pairs)
    return pairs[:num_linear], pairs[num_linear:]


def fold(tensors: list[Tensor | None], layer_norm: bool, dtype: torch.dtype | None = None):
    """Folds LayerNorms and splits the first layer.

    Args:
        tensors (list): from :meth:`PackedVelocity.tensors`.
        layer_norm (bool): whether LayerNorms follow the linear maps in ``tensors``.
        dtype (torch.dtype, optional): dtype of the ``weights`` in the result.

    Returns:
        FoldedVelocity: tensors without gradient history if called under ``no_grad``.
    """
    linears, norms = split_tensors(tensors, layer_norm)
    (first, first_bias), rest = linears[0], linears[1:]
    weights, biases = [], []
    for index, (weight, bias) in enumerate(rest):
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        gamma, beta = norms[index] if layer_norm else (None, None)
        biases.append(bias if beta is None else torch.addmv(bias, weight, beta))
        weight = weight if gamma is None else weight * gamma
        weights.append(weight if dtype is None else weight.to(dtype))
    first_bias = first.new_zeros(first.shape[0]) if first_bias is None else first_bias
    return FoldedVelocity(
        first[:, :-2],
        first[:, -2].contiguous(),
        first[:, -1].contiguous(),
        first_bias,
        tuple(weights),
        tuple(biases),
    )

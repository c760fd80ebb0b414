# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchrl_evor.modules.functional import check_positive

__all__ = ["EmbeddedVelocity", "FourierEmbedding", "GaussianBinEmbedding"]


class FourierEmbedding(nn.Module):
    r"""A scalar, and sines and cosines of :math:`\pi 2^k x`, ``[*B, 1] -> [*B, 1 + 2 n]``.

    For the flow time, which lies in :math:`[0, 1]`: no two times in it share
    an embedding. Frequencies are those of NeRF, `arXiv:2003.08934
    <https://arxiv.org/abs/2003.08934>`_, eq. 4. There are no parameters.

    Args:
        num_frequencies (int, optional): ``n``. Defaults to ``4``.

    Raises:
        ValueError: if ``num_frequencies`` is not a positive integer.

    Examples:
        >>> import torch
        >>> FourierEmbedding(1)(torch.tensor([[0.0]]))  # x, sin(pi x), cos(pi x)
        tensor([[0., 0., 1.]])
    """

    def __init__(self, num_frequencies: int = 4) -> None:
        super().__init__()
        check_positive("num_frequencies", num_frequencies)
        self.num_features = 1 + 2 * num_frequencies
        frequencies = math.pi * 2.0 ** torch.arange(num_frequencies)
        self.register_buffer("frequencies", frequencies)

    def forward(self, value: Tensor) -> Tensor:
        """Embeds ``[*B, 1]`` as ``[*B, num_features]``."""
        phase = value * self.frequencies
        return torch.cat([value, phase.sin(), phase.cos()], -1)


class GaussianBinEmbedding(nn.Module):
    r"""A scalar, and the mass of a Gaussian around it in each bin, ``[*B, 1] -> [*B, 1 + n]``.

    :math:`\Phi((e_{i+1} - x)/\sigma) - \Phi((e_i - x)/\sigma)` for the edges
    :math:`e` of equal bins: the histogram that HL-Gauss, `arXiv:2403.03950
    <https://arxiv.org/abs/2403.03950>`_ section 3.1, uses as a target, here as
    an input. The scalar itself comes first, so that values beyond the bins,
    which have no mass in them, stay distinct. There are no parameters.

    Args:
        num_bins (int, optional): ``n``. Defaults to ``32``.

    Keyword Args:
        low (float, optional): lower edge, in the units of the input.
            Defaults to ``-4.0``, for normalised returns and standard normals.
        high (float, optional): upper edge. Defaults to ``4.0``.
        width (float, optional): :math:`\sigma` in widths of a bin. Defaults to ``0.75``.

    Raises:
        ValueError: if ``num_bins`` is not a positive integer, ``low`` is not
            below ``high``, they are not finite, or ``width`` is not positive.

    Examples:
        >>> import torch
        >>> embedding = GaussianBinEmbedding(2, low=-1.0, high=1.0, width=0.01)
        >>> embedding(torch.tensor([[0.5]]))
        tensor([[0.5000, 0.0000, 1.0000]])
    """

    def __init__(
        self, num_bins: int = 32, *, low: float = -4.0, high: float = 4.0, width: float = 0.75
    ) -> None:
        super().__init__()
        check_positive("num_bins", num_bins)
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"low must be below high, both finite, got low={low}, high={high}.")
        if not 0 < width < math.inf:
            raise ValueError(f"width must be positive and finite, got {width}.")
        self.num_features = 1 + num_bins
        self.deviation = width * (high - low) / num_bins
        self.register_buffer("edges", torch.linspace(low, high, num_bins + 1))

    def forward(self, value: Tensor) -> Tensor:
        """Embeds ``[*B, 1]`` as ``[*B, num_features]``."""
        below = torch.special.ndtr((self.edges - value) / self.deviation)
        return torch.cat([value, below.diff(dim=-1)], -1)


class EmbeddedVelocity(nn.Module):
    """Velocity network that sees embeddings of its last two inputs, z and the flow time.

    A legal ``velocity_network`` of :class:`~torchrl_evor.ReturnFlow`: the
    concatenation of observation, action, z and time goes in. What it wraps
    reads the embeddings in their places. Over a
    :class:`~torchrl_evor.StackedVelocityMLP` it is a stack itself. Fused
    kernels do not know it: :class:`~torchrl_evor.EVORActor` runs it in PyTorch.

    Args:
        network (nn.Module): reads ``num_features(z) + num_features(time)``
            columns behind observation and action.

    Keyword Args:
        z (nn.Module, optional): embedding of z. Defaults to ``None``, as it is.
        time (nn.Module, optional): embedding of the flow time. Defaults to
            ``None``, as it is.

    Examples:
        >>> import torch
        >>> from torchrl_evor import ReturnFlow, VelocityMLP
        >>> z, time = GaussianBinEmbedding(16), FourierEmbedding(4)
        >>> inputs = 3 + 2 + EmbeddedVelocity.num_extra(z, time)
        >>> network = EmbeddedVelocity(VelocityMLP(inputs, hidden_sizes=(32,)), z=z, time=time)
        >>> returns = ReturnFlow(network)
        >>> returns.sample(torch.zeros(5, 3), torch.zeros(5, 2), num_samples=8).shape
        torch.Size([5, 8])
    """

    def __init__(
        self, network: nn.Module, *, z: nn.Module | None = None, time: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.z = nn.Identity() if z is None else z
        self.time = nn.Identity() if time is None else time
        # A stack says so; ReturnFlow then keeps its leading axis whole.
        if hasattr(network, "num_models"):
            self.num_models = network.num_models

    @staticmethod
    def num_extra(z: nn.Module | None = None, time: nn.Module | None = None) -> int:
        """Columns that embedded z and time take; one each where there is no embedding."""
        return sum(1 if module is None else module.num_features for module in (z, time))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Velocity at the concatenation of ``inputs``, whose last two columns are z and time."""
        columns = inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)
        z, time = columns[..., -2:-1], columns[..., -1:]
        return self.network(torch.cat([columns[..., :-2], self.z(z), self.time(time)], -1))

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import numpy as np


class GaussianActionNoise:
    """Gaussian noise that the world adds to an action, so that its dynamics become stochastic.

    The executed action is ``clip(action + std * eps, low, high)`` with ``eps ~ N(0, I)``. The agent
    neither chooses nor sees the noise: data and replay buffers hold the commanded action. The
    object is plain numpy, which makes it usable by an environment, by an evaluation loop without
    TorchRL's overhead and by a data collector alike.

    Args:
        std (float): standard deviation of the noise in action units. ``0.0`` leaves actions as
            they are and draws nothing.
        low (float or np.ndarray, optional): lower bound of the executed action.
            Defaults to ``-1.0``.
        high (float or np.ndarray, optional): upper bound of the executed action.
            Defaults to ``1.0``.
        seed (int, optional): seed of the noise. Defaults to ``None``, entropy of the system.

    Raises:
        ValueError: if ``std`` is negative or not finite, or if a bound is not below the other.

    Examples:
        >>> import numpy as np
        >>> from torchrl_evor.envs import GaussianActionNoise
        >>> noise = GaussianActionNoise(0.1, seed=0)
        >>> action = noise(np.zeros(2, dtype=np.float32))
        >>> action.shape, action.dtype
        ((2,), dtype('float32'))
        >>> noise.seed(0)
        >>> bool((noise(np.zeros(2, dtype=np.float32)) == action).all())
        True
    """

    def __init__(
        self,
        std: float,
        low: float | np.ndarray = -1.0,
        high: float | np.ndarray = 1.0,
        *,
        seed: int | None = None,
    ) -> None:
        if not (np.isfinite(std) and std >= 0):
            raise ValueError(f"std must be a finite number of at least 0, got {std}.")
        if not np.all(np.asarray(low) < np.asarray(high)):
            raise ValueError(f"low must be below high everywhere, got low={low} and high={high}.")
        self.std = float(std)
        self.low = np.asarray(low, dtype=np.float32)
        self.high = np.asarray(high, dtype=np.float32)
        self.seed(seed)

    def seed(self, seed: int | None) -> None:
        """Restarts the noise from a seed."""
        self._generator = np.random.default_rng(seed)

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """Returns the action that is executed, of the shape and dtype of ``action``."""
        if self.std == 0.0:
            return action
        noise = self._generator.standard_normal(action.shape, dtype=np.float32)
        return np.clip(action + self.std * noise, self.low, self.high).astype(
            action.dtype, copy=False
        )

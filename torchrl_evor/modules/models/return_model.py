# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch, set_skip_existing
from tensordict.utils import NestedKey, unravel_key_list
from torch import Tensor

from torchrl_evor.modules.functional import check_choice, check_positive, soft_choice

__all__ = ["ReturnModel"]

# Operands of the products of a fused kernel; spelt here, since the kernels are not needed to train.
PRECISIONS = ("fp16", "bf16", "tf32", "tf32x3", "ieee")


def check_precision(precision: str | None) -> str | None:
    """Returns ``precision`` if it is one of ``PRECISIONS`` or ``None``.

    Raises:
        ValueError: naming the choices, otherwise.
    """
    return precision if precision is None else check_choice("precision", precision, PRECISIONS)


class ReturnModel(TensorDictModuleBase):
    """Base of the models of the return of a state and an action.

    Networks see normalised returns ``z``; everything that leaves the model is
    in reward units, ``return = loc + scale * z``. Subclasses define
    :meth:`q_star`, which is what :class:`~torchrl_evor.EVORActor` chooses by.

    Keyword Args:
        loc (float or Tensor, optional): centre of the returns, in reward units;
            a tensor holds one value for each leading index of the batch, as
            for a :class:`~torchrl_evor.StackedVelocityMLP`. Defaults to ``0.0``.
        scale (float or Tensor, optional): spread of the returns, in reward
            units. Defaults to ``1.0``.
        in_keys (sequence of NestedKey, optional): observation and action.
            Defaults to ``["observation", "action"]``.
        out_keys (NestedKey or list of NestedKey, optional): mean of the law, ``[*B, 1]``.
            Defaults to ``"state_action_value"``.
        num_samples (int, optional): nodes of the mean that :meth:`forward`
            writes. Defaults to ``16``.

    Raises:
        ValueError: if ``in_keys`` are not two, ``num_samples`` is below 1, ``loc`` is
            not finite or ``scale`` not positive and finite.
    """

    def __init__(
        self,
        *,
        loc: float | Tensor = 0.0,
        scale: float | Tensor = 1.0,
        in_keys: Sequence[NestedKey] = ("observation", "action"),
        out_keys: NestedKey | list[NestedKey] = "state_action_value",
        num_samples: int = 16,
    ) -> None:
        super().__init__()
        if isinstance(in_keys, str) or len(in_keys) != 2:
            raise ValueError(f"in_keys must name an observation and an action, got {in_keys!r}.")
        self.in_keys = unravel_key_list(list(in_keys))
        self.out_keys = unravel_key_list(out_keys if isinstance(out_keys, list) else [out_keys])
        self.num_samples = check_positive("num_samples", num_samples)
        shape = torch.broadcast_shapes(torch.as_tensor(loc).shape, torch.as_tensor(scale).shape)
        self.register_buffer("loc", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))
        self.set_normalization(loc, scale)

    def set_normalization(self, loc: float | Tensor, scale: float | Tensor) -> None:
        """Sets the affine map between network and reward units, in place.

        Losses follow at once, but for the temperatures of ``next_action="improved"``: the
        target network of a loss keeps the map that it was made with. (Once a loss holds the
        network cast or move the loss, ``loss.double()``: a cast of the network alone would leave
        the loss its old buffers.)

        Args:
            loc (float or Tensor): centre of the returns, in reward units.
            scale (float or Tensor): spread of the returns, in reward units.

        Raises:
            ValueError: if ``loc`` is not finite, ``scale`` not positive and
                finite, or either does not fit the shape given at construction.
        """
        values = {"loc": torch.as_tensor(loc), "scale": torch.as_tensor(scale)}
        if not values["loc"].isfinite().all():
            raise ValueError(f"loc must be finite, got {loc}.")
        if not (values["scale"].isfinite() & (values["scale"] > 0)).all():
            raise ValueError(f"scale must be positive and finite, got {scale}.")
        for name, value in values.items():
            if value.ndim and value.shape != self.loc.shape:
                raise ValueError(
                    f"{name} must be a number or have the shape given at construction, "
                    f"{tuple(self.loc.shape)}, got {tuple(value.shape)}."
                )
            getattr(self, name).copy_(value)

    def denormalize(self, z: Tensor) -> Tensor:
        """Returns in reward units, from normalised returns of any shape."""
        return _lead(self.loc, z) + _lead(self.scale, z) * z

    def normalize(self, returns: Tensor) -> Tensor:
        """Normalised returns, from returns in reward units of any shape."""
        return (returns - _lead(self.loc, returns)) / _lead(self.scale, returns)

    def normalize_reward(self, reward: Tensor, discount: Tensor) -> Tensor:
        """Reward that keeps the form of the Bellman equation in z units.

        From ``loc + scale * z = reward + discount * (loc + scale * z')``.
        """
        return (reward - (1 - discount) * _lead(self.loc, reward)) / _lead(self.scale, reward)

    def q_star(
        self,
        observation: Tensor,
        action: Tensor,
        tau: float,
        num_samples: int,
        nodes: str = "stratified",
    ) -> Tensor:
        r"""Optimal regularised value :math:`\tau \log E \exp(Z / \tau)`, ``[*B]``."""
        raise NotImplementedError

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Draws one candidate from :math:`\mathrm{softmax}(Q^* / \tau_Q)`.

        Args:
            observation (Tensor): ``[*B, obs]``.
            candidates (Tensor): actions, ``[*B, P, act]``.

        Keyword Args:
            tau_r (float): temperature of :math:`Q^*`, in reward units.
            tau_q (float, optional): temperature of the choice, in reward units;
                ``0`` takes the best. Defaults to ``0.0``.
            gumbel (Tensor, optional): standard Gumbel noise ``[*B, P]``, drawn
                by default.
            num_samples (int, optional): nodes per candidate. Defaults to ``16``.
            nodes (str, optional): ``"stratified"``, ``"gauss_hermite"`` or
                ``"random"``. Defaults to ``"stratified"``.
            backend (str, optional): ``"auto"``, ``"torch"`` or ``"triton"``.
                Defaults to ``"auto"``.
            precision (str, optional): operands of the fused kernels' products,
                see :class:`~torchrl_evor.EVORActor`. Read by no other path.

        Returns:
            tuple of Tensor: the chosen action ``[*B, act]``, its value ``[*B]``
            and the values of all candidates ``[*B, P]``, in reward units.

        Raises:
            ValueError: if ``precision`` is unknown.
            RuntimeError: if ``backend="triton"`` and it cannot run; the message
                says why.
        """
        check_precision(precision)
        if backend == "triton":
            raise RuntimeError(
                f"backend='triton' is not available: {type(self).__name__} has no fused kernel."
            )
        values = self._values(observation, candidates, tau_r, num_samples, nodes)
        return self._choose(candidates, values, tau_q, gumbel)

    @staticmethod
    def _choose(candidates, values, tau_q, gumbel) -> tuple[Tensor, Tensor, Tensor]:
        """The chosen action, its value, and all values; see :meth:`select`."""
        index = soft_choice(values, tau_q, gumbel).unsqueeze(-1)
        action = candidates.take_along_dim(index.unsqueeze(-1), -2).squeeze(-2)
        return action, values.gather(-1, index).squeeze(-1), values

    def _values(self, observation, candidates, tau, num_samples, nodes) -> Tensor:
        """:math:`Q^*` of each candidate, ``[*B, P]``."""
        return self.q_star(observation.unsqueeze(-2), candidates, tau, num_samples, nodes)

    @dispatch(auto_batch_size=False)
    @set_skip_existing(None)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the mean return of the state and action, ``[*B, 1]``."""
        observation, action = (tensordict[key] for key in self.in_keys)
        value = self.q_star(observation, action, math.inf, self.num_samples)
        return tensordict.set(self.out_keys[0], value.unsqueeze(-1))


def _lead(buffer: Tensor, like: Tensor) -> Tensor:
    """``buffer`` ``[*M]`` as ``[*M, 1, ..., 1]``, aligned with the leading axes of ``like``."""
    return buffer.reshape((*buffer.shape, *(1,) * (like.ndim - buffer.ndim)))

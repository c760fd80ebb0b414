# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Checks of what the public functions are given; every error names the argument."""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from .packing import FrozenVelocity, PackedVelocity

__all__ = [
    "Backend",
    "check_draws",
    "check_kinds",
    "check_normalization",
    "check_optional",
    "check_options",
    "check_seed_is_read",
    "check_temperatures",
    "check_tensors",
    "Precision",
    "Solver",
]

Solver = Literal["euler", "midpoint"]
Backend = Literal["auto", "torch", "triton", "triton_layered", "triton_loop"]
Precision = Literal["fp16", "bf16", "tf32", "tf32x3", "ieee"]
SOLVERS = ("euler", "midpoint")
BACKENDS = ("auto", "torch", "triton", "triton_layered", "triton_loop")
PRECISIONS = ("fp16", "bf16", "tf32", "tf32x3", "ieee")


def check_tensors(packed, observation: Tensor, action: Tensor) -> None:
    if not isinstance(packed, (PackedVelocity, FrozenVelocity)):
        raise ValueError(
            f"packed is a {type(packed).__name__}, expected a PackedVelocity or a FrozenVelocity:"
            " see pack_velocity_mlp."
        )
    batch = observation.shape[:-1]
    if observation.ndim < 1 or observation.shape[-1] != packed.observation_dim:
        raise ValueError(
            f"observation has shape {tuple(observation.shape)}, expected [*B, obs] with obs ="
            f" {packed.observation_dim}."
        )
    if action.ndim < 2 or action.shape[:-2] != batch or action.shape[-1] != packed.action_dim:
        raise ValueError(
            f"action has shape {tuple(action.shape)}, expected [*B, P, act] with *B ="
            f" {tuple(batch)} and act = {packed.action_dim}."
        )
    if action.shape[-2] < 1:
        raise ValueError(
            f"action has shape {tuple(action.shape)}, expected at least one candidate."
        )


def check_draws(
    action: Tensor, noise: Tensor | None, seed: Tensor | None, num_samples: int | None
) -> int:
    """Checks where the noise comes from and returns the number of nodes."""
    if seed is not None:
        _check_seed(seed, action.device)
    if noise is None:
        if seed is None:
            raise ValueError("noise is needed, or a seed to draw it from.")
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(
                f"num_samples must be an integer of at least 1 where the noise is drawn from seed,"
                f" got {num_samples!r}."
            )
        return num_samples
    if num_samples is not None:
        raise ValueError(
            f"num_samples={num_samples} and noise {tuple(noise.shape)} are both given, expected"
            " num_samples with a seed only."
        )
    if noise.ndim < 1 or noise.shape[-1] < 1:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, expected at least one node.")
    if noise.ndim > 1 and noise.shape[:-1] != action.shape[:-1]:
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}, expected [N] or [*B, P, N] with [*B, P] ="
            f" {list(action.shape[:-1])}."
        )
    return noise.shape[-1]


def check_seed_is_read(seed: Tensor | None, given: str) -> None:
    """A seed that nothing is drawn from is a mistake: two sources of noise are given."""
    if seed is not None and given:
        raise ValueError(f"seed and {given} are given, which leaves nothing to draw from seed.")


def _check_seed(seed: Tensor, device: torch.device) -> None:
    if seed.dtype != torch.int64 or tuple(seed.shape) != (2,):
        raise ValueError(
            f"seed is {seed.dtype} of shape {tuple(seed.shape)}, expected torch.int64 of shape"
            " (2,): a seed and the number of the call."
        )
    if seed.device != device:
        raise ValueError(f"seed is on {seed.device}, action on {device}.")


def check_optional(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}.")


def check_kinds(tensors: list[Tensor | None], named: dict[str, Tensor | None]) -> None:
    """Devices, dtypes and gradients: the kernels read raw memory and have no backward."""
    parameter = tensors[0]
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.device != parameter.device:
            raise ValueError(
                f"{name} is on {tensor.device}, the network's parameters on {parameter.device}."
            )
        if name in ("observation", "action") and tensor.dtype != parameter.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, the parameters are {parameter.dtype}.")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, expected a floating dtype.")
    everything = [*named.values(), *tensors]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in everything):
        raise RuntimeError(
            "the fused path has no backward, and an input or a parameter requires grad: call it"
            " under torch.no_grad()."
        )


def check_options(
    num_steps: int, solver: str, backend: str, precision: str | None, tolerance: float
) -> None:
    check_steps(num_steps, solver)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}.")
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS} or None, got {precision!r}.")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1), got {tolerance}.")


def check_steps(num_steps: int, solver: str) -> None:
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps must be an integer of at least 1, got {num_steps!r}.")
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}.")
    if solver == "midpoint" and num_steps % 2:
        raise ValueError(f"num_steps must be even for solver='midpoint', got {num_steps}.")


def check_normalization(loc: float | Tensor, scale: float | Tensor) -> None:
    """Values of numbers, shapes of tensors: to read those would wait for the device."""
    for name, value in (("loc", loc), ("scale", scale)):
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected one element.")
    # No math.isfinite and math.isnan, which torch.compile cannot trace where a number changes.
    if not isinstance(loc, Tensor) and not (isinstance(loc, Real) and -math.inf < loc < math.inf):
        raise ValueError(f"loc must be a finite number, got {loc!r}.")
    if not isinstance(scale, Tensor) and not (isinstance(scale, Real) and 0 < scale < math.inf):
        raise ValueError(f"scale must be a positive and finite number, got {scale!r}.")


def check_temperatures(
    tau_r: float, tau_q: float, gumbel: Tensor | None, seed: Tensor | None = None
) -> None:
    for name, value in (("tau_r", tau_r), ("tau_q", tau_q)):
        if not isinstance(value, (Real, Tensor)) or not value >= 0:
            raise ValueError(f"{name} must be a number in [0, inf], got {value!r}.")
    if tau_q > 0 and gumbel is None and seed is None:
        raise ValueError(
            "gumbel is needed when tau_q > 0 and there is no seed: standard Gumbel noise [*B, P]."
        )

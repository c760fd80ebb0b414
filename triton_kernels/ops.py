# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Reward-to-go sampling and soft selection for velocity MLPs: checks, dispatch, custom operators.

The slow specification is in :mod:`~torchrl_evor.triton_kernels.reference`.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Literal

import torch
from torch import Tensor

from ._torch_path import folded_sample
from .packing import (
    FrozenVelocity,
    PackedVelocity,
    fold,
    pack_velocity_mlp,
    why_not_packable,
)
from .reference import choose_candidate, q_star

__all__ = [
    "Backend",
    "evor_select",
    "pack_velocity_mlp",
    "PackedVelocity",
    "Precision",
    "sample_returns",
    "why_no_triton",
    "why_not_packable",
]

_has_triton = importlib.util.find_spec("triton") is not None

Backend = Literal["auto", "torch", "triton", "triton_layered", "triton_loop"]
Precision = Literal["fp16", "bf16", "tf32", "tf32x3", "ieee"]
_BACKENDS = ("auto", "torch", "triton", "triton_layered", "triton_loop")
_PRECISIONS = ("fp16", "bf16", "tf32", "tf32x3", "ieee")
_PRECISION_OF_MATMUL = {"highest": "tf32x3", "high": "tf32", "medium": "bf16"}
_PRECISION_OF_DTYPE = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_MAX_ROWS = 2**31 - 2**20  # 32-bit row indices, less the largest tile
_MAX_WIDTH = 1024


def why_no_triton(
    widths: tuple[int, ...], dtype: torch.dtype, device: torch.device, rows: int
) -> str | None:
    """The reason why the Triton kernels cannot run, or ``None`` if they can.

    Args:
        widths (tuple of int): hidden widths of the velocity network.
        dtype (torch.dtype): dtype of its parameters.
        device (torch.device): where the tensors are.
        rows (int): states times candidates times nodes.

    Examples:
        >>> why_no_triton((512, 512), torch.float32, torch.device("cpu"), 64) is None
        False
    """
    if not _has_triton:
        return "the package triton is not installed"
    if device.type != "cuda":
        return f"the tensors are on {device}, the kernels need a CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need compute capability 8.0 or later"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the parameters are {dtype}, expected float32, float16 or bfloat16"
    if max(widths) > _MAX_WIDTH:
        return f"the hidden widths are {widths}, the kernels take up to {_MAX_WIDTH}"
    if rows > _MAX_ROWS:
        return f"{rows} rows exceed the {_MAX_ROWS} that 32-bit indices address"
    return None


def _resolve_backend(backend: str, widths, dtype, device, rows: int) -> str:
    if backend == "torch":
        return backend
    reason = why_no_triton(widths, dtype, device, rows)
    if backend == "auto":
        return "torch" if reason is not None else "triton"
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} is not available: {reason}.")
    return backend


def _resolve_precision(precision: str, dtype: torch.dtype) -> str:
    if precision:
        return precision
    matmul = torch.get_float32_matmul_precision()
    return _PRECISION_OF_DTYPE.get(dtype, _PRECISION_OF_MATMUL[matmul])


def _triton_z(
    packed, tensors, eps, activation, observation, action, noise, num_steps, backend, precision
):
    # The kernels' module imports triton, which is optional.
    from . import _config, _launch

    precision = _resolve_precision(precision, tensors[0].dtype)
    widths = _widths(tensors, eps)
    rows = action.shape[0] * action.shape[1] * noise.shape[-1]
    config = _config.choose(backend, widths, precision, rows, action.device)
    weights = _cached(
        packed,
        ("triton", precision, isinstance(config, _launch.LoopConfig)),
        lambda: _launch.pack_weights(
            tensors, eps >= 0, precision, isinstance(config, _launch.LoopConfig)
        ),
    )
    if noise.ndim > 1:
        noise = noise.expand(*action.shape[:2], noise.shape[-1])
    return _launch.sample_z(
        weights,
        observation.contiguous(),
        action.contiguous(),
        noise.contiguous().view(-1),
        noise.shape[-1],
        num_steps=num_steps,
        activation=activation,
        eps=eps,
        precision=precision,
        config=config,
        programs=_config.num_programs(action.device),
    )


def _value_dtype(tensor: Tensor) -> torch.dtype:
    """Values are at least float32, whatever the network is in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _cached(packed, key, make):
    """Layouts of a frozen view are kept, those of a live view are made anew."""
    if not isinstance(packed, FrozenVelocity):
        return make()
    if key not in packed.cache:
        packed.cache[key] = make()
    return packed.cache[key]


def _widths(tensors: list[Tensor | None], eps: float) -> tuple[int, ...]:
    pairs = len(tensors) // 2
    num_linear = (pairs + 1) // 2 if eps >= 0 else pairs
    return tuple(tensor.shape[0] for tensor in tensors[: 2 * num_linear - 2 : 2])


def _torch_z(packed, tensors, eps, activation, observation, action, noise, num_steps):
    folded = _cached(packed, ("torch",), lambda: fold(tensors, eps >= 0))
    return folded_sample(folded, activation, eps, observation, action, noise, num_steps)


def _sample(
    packed,
    observation: Tensor,
    action: Tensor,
    noise: Tensor,
    tensors: list[Tensor | None],
    activation: str,
    eps: float,
    num_steps: int,
    backend: str,
    precision: str,
) -> Tensor:
    """End points ``[S, P, N]`` on the backend that was asked for; ``packed`` may hold a cache."""
    rows = action.shape[0] * action.shape[1] * noise.shape[-1]
    widths = _widths(tensors, eps)
    backend = _resolve_backend(backend, widths, tensors[0].dtype, action.device, rows)
    if rows == 0:
        shape = (*action.shape[:2], noise.shape[-1])
        return action.new_empty(shape, dtype=_value_dtype(action))
    if backend == "torch":
        return _torch_z(packed, tensors, eps, activation, observation, action, noise, num_steps)
    return _triton_z(
        packed, tensors, eps, activation, observation, action, noise, num_steps, backend, precision
    )


def _select_torch(z, action, gumbel, log_weights, loc, scale, tau_r, tau_q, return_samples):
    returns = loc + scale * z
    q = q_star(returns, tau_r, log_weights)
    index = choose_candidate(q, gumbel, tau_q).unsqueeze(-1)
    chosen = action.gather(1, index.unsqueeze(-1).expand(-1, -1, action.shape[-1])).squeeze(1)
    value = q.gather(1, index).squeeze(1)
    return chosen, value, q, returns if return_samples else returns.new_empty(0)


def _selects_on_device(z: Tensor, backend: str) -> bool:
    runs = z.is_cuda and backend != "torch" and _has_triton
    return runs and z.dtype == torch.float32 and z.numel() > 0


def _select(
    packed,
    observation: Tensor,
    action: Tensor,
    noise: Tensor,
    gumbel: Tensor | None,
    log_weights: Tensor | None,
    loc: Tensor,
    scale: Tensor,
    tensors: list[Tensor | None],
    activation: str,
    eps: float,
    num_steps: int,
    tau_r: float,
    tau_q: float,
    return_samples: bool,
    backend: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sampler = (tensors, activation, eps, num_steps, backend, precision)
    z = _sample(packed, observation, action, noise, *sampler)
    reads = (z, action.contiguous(), gumbel, log_weights, loc, scale, tau_r, tau_q, return_samples)
    if not _selects_on_device(z, backend):
        return _select_torch(*reads)
    from . import _launch

    return _launch.select(*reads)


_SAMPLE_ARGS = (
    "Tensor?[] tensors, str activation, float eps, int num_steps, str backend, str precision"
)


@torch.library.custom_op(
    "torchrl_evor::sample_returns",
    mutates_args=(),
    schema=f"(Tensor observation, Tensor action, Tensor noise, {_SAMPLE_ARGS}) -> Tensor",
)
def _sample_op(observation, action, noise, tensors, activation, eps, num_steps, backend, precision):
    sampler = (tensors, activation, eps, num_steps, backend, precision)
    return _sample(None, observation, action, noise, *sampler)


@_sample_op.register_fake
def _(observation, action, noise, tensors, activation, eps, num_steps, backend, precision):
    shape = (*action.shape[:2], noise.shape[-1])
    return action.new_empty(shape, dtype=_value_dtype(action))


@torch.library.custom_op(
    "torchrl_evor::evor_select",
    mutates_args=(),
    schema="(Tensor observation, Tensor action, Tensor noise, Tensor? gumbel, Tensor? log_weights,"
    " Tensor loc, Tensor scale, Tensor?[] tensors, str activation, float eps, int num_steps,"
    " float tau_r, float tau_q, bool return_samples, str backend, str precision)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _select_op(observation, action, *rest):
    return _select(None, observation, action, *rest)


@_select_op.register_fake
def _(observation, action, noise, *rest):
    return_samples = rest[-3]
    states, candidates, action_dim = action.shape
    samples = (states, candidates, noise.shape[-1]) if return_samples else (0,)
    dtype = _value_dtype(action)
    return (
        action.new_empty(states, action_dim),
        action.new_empty(states, dtype=dtype),
        action.new_empty((states, candidates), dtype=dtype),
        action.new_empty(samples, dtype=dtype),
    )


def _check_tensors(packed, observation: Tensor, action: Tensor, noise: Tensor) -> None:
    batch = observation.shape[:-1]
    if observation.shape[-1] != packed.observation_dim:
        raise ValueError(
            f"observation has shape {tuple(observation.shape)}, expected [*B, obs] with obs ="
            f" {packed.observation_dim}."
        )
    if action.shape[:-2] != batch or action.shape[-1] != packed.action_dim or action.ndim < 2:
        raise ValueError(
            f"action has shape {tuple(action.shape)}, expected [*B, P, act] with *B ="
            f" {tuple(batch)} and act = {packed.action_dim}."
        )
    if action.shape[-2] < 1 or noise.ndim < 1 or noise.shape[-1] < 1:
        raise ValueError(
            f"expected at least one candidate and one node, got action {tuple(action.shape)} and"
            f" noise {tuple(noise.shape)}."
        )
    if noise.ndim > 1 and noise.shape[:-1] != action.shape[:-1]:
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}, expected [N] or [*B, P, N] with [*B, P] ="
            f" {list(action.shape[:-1])}."
        )


def _check_optional(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}.")


def _check_kinds(tensors: list[Tensor | None], named: dict[str, Tensor | None]) -> None:
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


def _check_options(num_steps: int, backend: str, precision: str | None) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {_BACKENDS}, got {backend!r}.")
    if precision is not None and precision not in _PRECISIONS:
        raise ValueError(f"precision must be one of {_PRECISIONS} or None, got {precision!r}.")


def _check_temperatures(tau_r: float, tau_q: float, gumbel: Tensor | None) -> None:
    if math.isnan(tau_r) or tau_r < 0:
        raise ValueError(f"tau_r must be in [0, inf], got {tau_r}.")
    if math.isnan(tau_q) or tau_q < 0 or math.isinf(tau_q):
        raise ValueError(f"tau_q must be in [0, inf), got {tau_q}.")
    if tau_q > 0 and gumbel is None:
        raise ValueError("gumbel is needed when tau_q > 0: standard Gumbel noise [*B, P].")


def _flat_noise(noise: Tensor) -> Tensor:
    return noise if noise.ndim == 1 else noise.reshape(-1, *noise.shape[-2:])


def _as_scalar(value: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.reshape(())
    # A fill, not a copy from the host: legal while a CUDA graph is captured.
    return torch.full((), value, dtype=torch.float32, device=like.device)


def sample_returns(
    packed: PackedVelocity | FrozenVelocity,
    observation: Tensor,
    action: Tensor,
    noise: Tensor,
    num_steps: int,
    *,
    backend: Backend = "auto",
    precision: Precision | None = None,
) -> Tensor:
    """Samples of the reward-to-go flow at several candidates, in units of ``z``.

    Args:
        packed (PackedVelocity): from :func:`pack_velocity_mlp`.
        observation (Tensor): ``[*B, obs]``, in the dtype of the parameters.
        action (Tensor): candidates, ``[*B, P, act]``.
        noise (Tensor): start of the flow, ``[*B, P, N]``, or ``[N]`` shared by all candidates.
        num_steps (int): Euler steps on left end points ``k / num_steps``.

    Keyword Args:
        backend (str): ``"torch"``, ``"triton"``, one of its designs ``"triton_layered"`` and
            ``"triton_loop"``, or ``"auto"``: Triton where it can run, else PyTorch.
        precision (str, optional): operands of the Triton kernels' products. Defaults to the
            parameters' dtype where it is of 16 bits, else to what
            ``torch.get_float32_matmul_precision()`` allows: ``"tf32x3"`` for ``"highest"``,
            ``"tf32"`` for ``"high"``, ``"bf16"`` for ``"medium"``.

    Returns:
        Tensor: ``[*B, P, N]``, float64 for float64 parameters, else float32.

    Raises:
        ValueError: if a shape, dtype, device or option is not as above.
        RuntimeError: if ``backend`` cannot run here, or a gradient would be needed.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(7, 8), nn.SiLU(), nn.Linear(8, 8), nn.SiLU(),
        ...                     nn.Linear(8, 1))
        >>> packed = pack_velocity_mlp(net, observation_dim=3, action_dim=2)
        >>> with torch.no_grad():
        ...     z = sample_returns(packed, torch.randn(5, 3), torch.randn(5, 4, 2), torch.randn(6),
        ...                        num_steps=10)
        >>> z.shape
        torch.Size([5, 4, 6])
    """
    tensors = packed.tensors()
    _check_tensors(packed, observation, action, noise)
    _check_kinds(tensors, {"observation": observation, "action": action, "noise": noise})
    _check_options(num_steps, backend, precision)
    reads = (
        observation.reshape(-1, observation.shape[-1]),
        action.reshape(-1, *action.shape[-2:]),
        _flat_noise(noise),
        tensors,
        packed.activation,
        packed.eps,
        num_steps,
        backend,
        precision or "",
    )
    compiling = torch.compiler.is_compiling()
    z = _sample_op(*reads) if compiling else _sample(packed, *reads)
    return z.reshape(*action.shape[:-1], noise.shape[-1])


def evor_select(
    packed: PackedVelocity | FrozenVelocity,
    observation: Tensor,
    action: Tensor,
    noise: Tensor,
    gumbel: Tensor | None = None,
    *,
    tau_r: float,
    tau_q: float = 0.0,
    num_steps: int,
    loc: float | Tensor = 0.0,
    scale: float | Tensor = 1.0,
    log_weights: Tensor | None = None,
    return_samples: bool = False,
    backend: Backend = "auto",
    precision: Precision | None = None,
) -> tuple[Tensor, ...]:
    r"""Samples the reward-to-go of every candidate and chooses one, in one call.

    :math:`Q(x, a_i) = \tau_R \log \sum_j w_j \exp(z_{ij} / \tau_R)` over the sampled returns, and a
    candidate drawn from :math:`\mathrm{softmax}_i(Q / \tau_Q)` by Gumbel-max (arXiv 2510.08218).
    A candidate whose value is NaN never wins against one that has a value; its NaN stays in ``q``.

    Args:
        packed (PackedVelocity): from :func:`pack_velocity_mlp`.
        observation (Tensor): ``[*B, obs]``, in the dtype of the parameters.
        action (Tensor): candidates, ``[*B, P, act]``.
        noise (Tensor): ``[*B, P, N]``, or ``[N]`` shared by all candidates.
        gumbel (Tensor, optional): standard Gumbel noise ``[*B, P]``, needed when ``tau_q > 0``.

    Keyword Args:
        tau_r (float): temperature of the reward-to-go average in reward units, in ``[0, inf]``:
            0 is the maximum, inf the mean.
        tau_q (float): temperature of the choice in reward units, in ``[0, inf)``: 0 is the argmax,
            lowest index on ties.
        num_steps (int): Euler steps.
        loc (float or Tensor): ``return = loc + scale * z``.
        scale (float or Tensor): see ``loc``.
        log_weights (Tensor, optional): ``[N]``, logarithms of node weights that sum to one.
            Defaults to equal weights.
        return_samples (bool): whether to return all returns as well.
        backend (str): as in :func:`sample_returns`.
        precision (str, optional): as in :func:`sample_returns`.

    Returns:
        tuple of Tensor: the chosen action ``[*B, act]``, its value ``[*B]``, all values ``[*B, P]``
        and, with ``return_samples``, the returns ``[*B, P, N]``; values in reward units.

    Raises:
        ValueError: if a shape, dtype, device, temperature or option is not as above.
        RuntimeError: if ``backend`` cannot run here, or a gradient would be needed.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(7, 8), nn.SiLU(), nn.Linear(8, 8), nn.SiLU(),
        ...                     nn.Linear(8, 1))
        >>> packed = pack_velocity_mlp(net, observation_dim=3, action_dim=2)
        >>> with torch.no_grad():
        ...     chosen, value, q = evor_select(packed, torch.randn(5, 3), torch.randn(5, 4, 2),
        ...                                    torch.randn(6), tau_r=1.0, num_steps=10)
        >>> chosen.shape, value.shape, q.shape
        (torch.Size([5, 2]), torch.Size([5]), torch.Size([5, 4]))
    """
    tensors = packed.tensors()
    _check_tensors(packed, observation, action, noise)
    _check_optional("gumbel", gumbel, tuple(action.shape[:-1]))
    _check_optional("log_weights", log_weights, (noise.shape[-1],))
    _check_options(num_steps, backend, precision)
    _check_temperatures(tau_r, tau_q, gumbel)
    loc, scale = _as_scalar(loc, action), _as_scalar(scale, action)
    named = {"observation": observation, "action": action, "noise": noise, "gumbel": gumbel}
    _check_kinds(tensors, {**named, "log_weights": log_weights, "loc": loc, "scale": scale})
    flat_gumbel = None if gumbel is None else gumbel.reshape(-1, gumbel.shape[-1]).contiguous()
    reads = (
        observation.reshape(-1, observation.shape[-1]),
        action.reshape(-1, *action.shape[-2:]),
        _flat_noise(noise),
        flat_gumbel,
        None if log_weights is None else log_weights.float().contiguous(),
        loc,
        scale,
        tensors,
        packed.activation,
        packed.eps,
        num_steps,
        float(tau_r),
        float(tau_q),
        return_samples,
        backend,
        precision or "",
    )
    results = _select_op(*reads) if torch.compiler.is_compiling() else _select(packed, *reads)
    batch, (candidates, action_dim) = action.shape[:-2], action.shape[-2:]
    chosen = results[0].reshape(*batch, action_dim)
    value, q = results[1].reshape(batch), results[2].reshape(*batch, candidates)
    if return_samples:
        return chosen, value, q, results[3].reshape(*batch, candidates, noise.shape[-1])
    return chosen, value, q

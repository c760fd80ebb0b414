# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""One call on the backend that was asked for, or on the fastest measured one."""

from __future__ import annotations

import contextlib
import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from ._cpu_path import cpu_sample, cpu_weights
from ._steps import Steps
from ._torch_path import folded_sample
from .packing import FrozenVelocity, fold
from .reference import choose_candidate, philox_gumbel, philox_normal, q_star

__all__ = ["Draws", "sample", "select", "value_dtype", "why_no_triton"]

_has_triton = importlib.util.find_spec("triton") is not None

_PRECISION_OF_MATMUL = {"highest": "tf32x3", "high": "tf32", "medium": "bf16"}
_PRECISION_OF_DTYPE = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_MAX_ROWS = 2**31 - 2**20  # 32-bit row indices, less the largest tile
_MAX_WIDTH = 1024


class Draws(NamedTuple):
    """Start of the flow: noise as it is, or a seed from which ``num_nodes`` are drawn."""

    noise: Tensor | None  # [N] or [S, P, N]
    seed: Tensor | None  # [2] int64
    num_nodes: int

    def shape(self, action: Tensor) -> tuple[int, ...]:
        return (*action.shape[:2], self.num_nodes)

    def rows(self, action: Tensor) -> int:
        return action.shape[0] * action.shape[1] * self.num_nodes

    def tensor(self, action: Tensor) -> Tensor:
        return philox_normal(self.seed, self.shape(action)) if self.noise is None else self.noise


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


def _resolve_backend(backend: str, tensors, eps, action, draws: Draws, precision: str) -> str:
    """``"torch"``, ``"triton"`` or one design of it, for one call."""
    if backend == "torch":
        return backend
    widths, dtype = _widths(tensors, eps), tensors[0].dtype
    rows = draws.rows(action)
    reason = why_no_triton(widths, dtype, action.device, rows)
    if backend == "auto":
        return "torch" if reason is not None else _fastest(widths, dtype, rows, precision)
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} is not available: {reason}.")
    return backend


def _fastest(widths: tuple[int, ...], dtype: torch.dtype, rows: int, precision: str) -> str:
    from . import _config

    measured = _config.is_fastest(widths, _resolve_precision(precision, dtype), rows)
    return "triton" if measured else "torch"


def _resolve_precision(precision: str, dtype: torch.dtype) -> str:
    if precision:
        return precision
    matmul = torch.get_float32_matmul_precision()
    return _PRECISION_OF_DTYPE.get(dtype, _PRECISION_OF_MATMUL[matmul])


def _triton_reads(
    packed, tensors, eps, activation, observation, action, draws, steps, backend, precision
) -> tuple[tuple, dict]:
    """What the launches read, as positional and named arguments."""
    # The kernels' module imports triton, which is optional.
    from . import _config, _launch, _triton_weights

    precision = _resolve_precision(precision, tensors[0].dtype)
    widths = _widths(tensors, eps)
    config = _config.choose(backend, widths, precision, draws.rows(action))
    weights = _cached(
        packed,
        ("triton", precision, isinstance(config, _launch.LoopConfig)),
        lambda: _triton_weights.pack_weights(
            tensors, eps >= 0, precision, isinstance(config, _launch.LoopConfig)
        ),
    )
    noise = draws.seed if draws.noise is None else draws.noise
    reads = (
        weights,
        observation.contiguous(),
        action.contiguous(),
        noise.contiguous().view(-1),
        draws.num_nodes,
    )
    return reads, {
        "steps": steps,
        "activation": activation,
        "eps": eps,
        "precision": precision,
        "config": config,
        "programs": _config.num_programs(action.device),
    }


def value_dtype(tensor: Tensor) -> torch.dtype:
    """Values are at least float32, whatever the network is in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _cached(packed, key, make):
    """Layouts of a frozen view are kept, those of a live view are made anew."""
    if not isinstance(packed, FrozenVelocity):
        return make()
    if key in packed.cache:
        return packed.cache[key]
    made = make()
    # What is made during a capture is recorded and not run, and lies in the graph's memory.
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        packed.cache[key] = made
    return made


def _widths(tensors: list[Tensor | None], eps: float) -> tuple[int, ...]:
    pairs = len(tensors) // 2
    num_linear = (pairs + 1) // 2 if eps >= 0 else pairs
    return tuple(tensor.shape[0] for tensor in tensors[: 2 * num_linear - 2 : 2])


def _torch_z(packed, tensors, eps, activation, observation, action, draws, steps, tolerance):
    reads = (observation, action, draws.tensor(action), steps)
    if action.is_cpu and action.dtype in (torch.float32, torch.float64):
        weights = _cached(
            packed,
            ("cpu", torch.get_num_threads()),
            lambda: cpu_weights(fold(tensors, eps >= 0), action.shape[-1], activation, eps),
        )
        return cpu_sample(weights, *reads, tolerance)
    folded = _cached(packed, ("torch",), lambda: fold(tensors, eps >= 0))
    return folded_sample(folded, activation, eps, *reads)


def _sample(
    packed,
    observation: Tensor,
    action: Tensor,
    draws: Draws,
    tensors: list[Tensor | None],
    activation: str,
    eps: float,
    steps: Steps,
    backend: str,
    precision: str,
    tolerance: float,
) -> Tensor:
    """End points ``[S, P, N]`` on a resolved backend; ``packed`` may hold a cache."""
    if action.shape[0] == 0:
        return action.new_empty(draws.shape(action), dtype=value_dtype(action))
    reads = (packed, tensors, eps, activation, observation, action, draws, steps)
    if backend == "torch":
        return _torch_z(*reads, tolerance)
    from . import _launch

    reads, options = _triton_reads(*reads, backend, precision)
    return _launch.sample_z(*reads, **options)


@contextlib.contextmanager
def _own_settings(device: torch.device):
    """What a caller sets for modules, autocast and a default device, does not reach the path."""
    with contextlib.ExitStack() as settings:
        if torch.is_autocast_enabled(device.type):
            settings.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cpu" and torch.get_default_device() != device:
            settings.enter_context(device)
        yield


def sample(
    packed,
    observation,
    action,
    noise,
    seed,
    num_nodes,
    tensors,
    activation,
    eps,
    num_steps,
    solver,
    backend,
    precision,
    tolerance,
):
    draws = Draws(noise, seed, num_nodes)
    backend = _resolve_backend(backend, tensors, eps, action, draws, precision)
    steps = Steps(num_steps, solver)
    sampler = (tensors, activation, eps, steps, backend, precision, tolerance)
    with _own_settings(action.device):
        return _sample(packed, observation, action, draws, *sampler)


def _select_torch(z, action, gumbel, log_weights, loc, scale, tau_r, tau_q, return_samples):
    returns = loc + scale * z
    q = q_star(returns, tau_r, log_weights)
    index = choose_candidate(q, gumbel, tau_q).unsqueeze(-1)
    chosen = action.gather(1, index.unsqueeze(-1).expand(-1, -1, action.shape[-1])).squeeze(1)
    value = q.gather(1, index).squeeze(1)
    return chosen, value, q, returns if return_samples else returns.new_empty(0)


def select(
    packed,
    observation: Tensor,
    action: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    num_nodes: int,
    gumbel: Tensor | None,
    log_weights: Tensor | None,
    loc: Tensor,
    scale: Tensor,
    tensors: list[Tensor | None],
    activation: str,
    eps: float,
    num_steps: int,
    solver: str,
    tau_r: float,
    tau_q: float,
    return_samples: bool,
    backend: str,
    precision: str,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draws = Draws(noise, seed, num_nodes)
    backend = _resolve_backend(backend, tensors, eps, action, draws, precision)
    steps = Steps(num_steps, solver)
    selection = (log_weights, loc, scale, tau_r, tau_q, return_samples)
    with _own_settings(action.device):
        if backend == "torch" or action.shape[0] == 0:
            sampler = (tensors, activation, eps, steps, backend, precision, tolerance)
            z = _sample(packed, observation, action, draws, *sampler)
            if tau_q > 0 and gumbel is None:
                gumbel = philox_gumbel(seed, tuple(action.shape[:2]))
            return _select_torch(z, action, gumbel, *selection)
        from . import _launch

        sampler = (packed, tensors, eps, activation, observation, action, draws, steps)
        reads, options = _triton_reads(*sampler, backend, precision)
        drawn = seed if gumbel is None and tau_q > 0 else gumbel
        return _launch.evor_select(*reads, drawn, *selection, **options)

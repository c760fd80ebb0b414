# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Reward-to-go sampling and soft selection for velocity MLPs: public functions and operators.

The slow specification is in :mod:`~torchrl_evor.triton_kernels.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import (
    Backend,
    Precision,
    Solver,
    check_draws,
    check_kinds,
    check_normalization,
    check_optional,
    check_options,
    check_seed_is_read,
    check_temperatures,
    check_tensors,
)
from ._dispatch import sample, select, value_dtype, why_no_triton
from .packing import FrozenVelocity, PackedVelocity, pack_velocity_mlp, why_not_packable

__all__ = [
    "Backend",
    "evor_select",
    "pack_velocity_mlp",
    "PackedVelocity",
    "Precision",
    "sample_returns",
    "Solver",
    "why_no_triton",
    "why_not_packable",
]

_READS = "Tensor observation, Tensor action, Tensor? noise, Tensor? seed, int num_nodes"
_SAMPLER = "Tensor?[] tensors, str activation, float eps, int num_steps, str solver"
_OPTIONS = "str backend, str precision, float tolerance"


@torch.library.custom_op(
    "torchrl_evor::sample_returns",
    mutates_args=(),
    schema=f"({_READS}, {_SAMPLER}, {_OPTIONS}) -> Tensor",
)
def _sample_op(*reads):
    return sample(None, *reads)


@_sample_op.register_fake
def _(observation, action, noise, seed, num_nodes, *sampler):
    return action.new_empty((*action.shape[:2], num_nodes), dtype=value_dtype(action))


@torch.library.custom_op(
    "torchrl_evor::evor_select",
    mutates_args=(),
    schema=f"({_READS}, Tensor? gumbel, Tensor? log_weights, Tensor loc, Tensor scale, {_SAMPLER},"
    f" float tau_r, float tau_q, bool return_samples, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _select_op(*reads):
    return select(None, *reads)


@_select_op.register_fake
def _(observation, action, noise, seed, num_nodes, *rest):
    return_samples = rest[-4]
    states, candidates, action_dim = action.shape
    samples = (states, candidates, num_nodes) if return_samples else (0,)
    dtype = value_dtype(action)
    return (
        action.new_empty(states, action_dim),
        action.new_empty(states, dtype=dtype),
        action.new_empty((states, candidates), dtype=dtype),
        action.new_empty(samples, dtype=dtype),
    )


def _flat_noise(noise: Tensor | None) -> Tensor | None:
    return noise if noise is None or noise.ndim == 1 else noise.reshape(-1, *noise.shape[-2:])


def _as_scalar(value: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.reshape(())
    # A fill, not a copy from the host: legal while a CUDA graph is captured.
    return torch.full((), value, dtype=torch.float32, device=like.device)


def sample_returns(
    packed: PackedVelocity | FrozenVelocity,
    observation: Tensor,
    action: Tensor,
    noise: Tensor | None,
    num_steps: int,
    *,
    solver: Solver = "euler",
    seed: Tensor | None = None,
    num_samples: int | None = None,
    backend: Backend = "auto",
    precision: Precision | None = None,
    tolerance: float = 0.0,
) -> Tensor:
    """Samples of the reward-to-go flow at several candidates, in units of ``z``.

    Args:
        packed (PackedVelocity): from :func:`pack_velocity_mlp`.
        observation (Tensor): ``[*B, obs]``, in the dtype of the parameters.
        action (Tensor): candidates, ``[*B, P, act]``.
        noise (Tensor, optional): start of the flow, ``[*B, P, N]``, or ``[N]`` shared by all
            candidates. ``None`` draws it from ``seed``.
        num_steps (int): evaluations of the velocity, at flow times ``k / num_steps``.

    Keyword Args:
        solver (str): ``"euler"``, a step for each evaluation, or ``"midpoint"``, a step for two,
            which wants an even ``num_steps``. Defaults to ``"euler"``.
        seed (Tensor, optional): int64 ``[2]`` on the device of the parameters, a seed and the
            number of the call: normal noise ``[*B, P, num_samples]`` is drawn from it inside the
            kernels, on other backends by
            :func:`~torchrl_evor.triton_kernels.reference.philox_normal`, the same numbers up to
            ``2e-6``. The same two numbers give the same noise; ``seed[1] += 1`` before the next
            call (in place, which a captured CUDA graph sees) gives fresh noise.
        num_samples (int, optional): ``N`` where the noise is drawn from ``seed``.
        backend (str): ``"torch"``, ``"triton"``, one of its designs ``"triton_layered"`` and
            ``"triton_loop"``, or ``"auto"``: Triton where it was measured as the
            fastest, else PyTorch.
        precision (str, optional): operands of the Triton kernels' products. Defaults to the
            parameters' dtype where it is of 16 bits, else to what
            ``torch.get_float32_matmul_precision()`` allows: ``"tf32x3"`` for ``"highest"``,
            ``"tf32"`` for ``"high"``, ``"bf16"`` for ``"medium"``. With
            ``backend="auto"`` it also says whose measurements decide. Nothing else reads it:
            products in PyTorch follow torch's own settings.
        tolerance (float): estimated error of the end points, relative to their size, up to which
            the velocity may be interpolated in z and time instead of evaluated at every node and
            step. Only the CPU path does so, where it can; many nodes of a smooth flow gain most.
            Defaults to ``0.0``: no interpolation.

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
    check_tensors(packed, observation, action)
    tensors = packed.tensors()
    num_nodes = check_draws(action, noise, seed, num_samples)
    check_seed_is_read(seed, "" if noise is None else "noise")
    check_kinds(tensors, {"observation": observation, "action": action, "noise": noise})
    check_options(num_steps, solver, backend, precision, tolerance)
    reads = (
        observation.reshape(-1, observation.shape[-1]),
        action.reshape(-1, *action.shape[-2:]),
        _flat_noise(noise),
        seed,
        num_nodes,
        tensors,
        packed.activation,
        packed.eps,
        num_steps,
        solver,
        backend,
        precision or "",
        float(tolerance),
    )
    compiling = torch.compiler.is_compiling()
    z = _sample_op(*reads) if compiling else sample(packed, *reads)
    return z.reshape(*action.shape[:-1], num_nodes)


def evor_select(
    packed: PackedVelocity | FrozenVelocity,
    observation: Tensor,
    action: Tensor,
    noise: Tensor | None = None,
    gumbel: Tensor | None = None,
    *,
    tau_r: float,
    tau_q: float = 0.0,
    num_steps: int,
    solver: Solver = "euler",
    loc: float | Tensor = 0.0,
    scale: float | Tensor = 1.0,
    log_weights: Tensor | None = None,
    seed: Tensor | None = None,
    num_samples: int | None = None,
    return_samples: bool = False,
    backend: Backend = "auto",
    precision: Precision | None = None,
    tolerance: float = 0.0,
) -> tuple[Tensor, ...]:
    r"""Samples the reward-to-go of every candidate and chooses one, in one call.

    :math:`Q(x, a_i) = \tau_R \log \sum_j w_j \exp(z_{ij} / \tau_R)` over the sampled returns, and a
    candidate drawn from :math:`\mathrm{softmax}_i(Q / \tau_Q)` by Gumbel-max (arXiv 2510.08218).
    A candidate whose value is NaN never wins against one that has a value; its NaN stays in ``q``.

    Args:
        packed (PackedVelocity): from :func:`pack_velocity_mlp`.
        observation (Tensor): ``[*B, obs]``, in the dtype of the parameters.
        action (Tensor): candidates, ``[*B, P, act]``.
        noise (Tensor, optional): ``[*B, P, N]``, or ``[N]`` shared by all candidates. ``None``
            draws it from ``seed``.
        gumbel (Tensor, optional): standard Gumbel noise ``[*B, P]``, read when ``tau_q > 0``.
            ``None`` draws it from ``seed``, independently of ``noise``.

    Keyword Args:
        tau_r (float): temperature of the reward-to-go average in reward units, in ``[0, inf]``:
            0 is the maximum, inf the mean.
        tau_q (float): temperature of the choice in reward units, in ``[0, inf]``: 0 is the argmax,
            lowest index on ties, inf draws evenly.
        num_steps (int): as in :func:`sample_returns`.
        solver (str): as in :func:`sample_returns`.
        loc (float or Tensor): ``return = loc + scale * z``.
        scale (float or Tensor): see ``loc``. Positive and finite, which is checked of a number; of
            a tensor it is not, since to read it would wait for the device.
        log_weights (Tensor, optional): ``[N]``, logarithms of node weights that sum to one.
            Defaults to equal weights.
        seed (Tensor, optional): as in :func:`sample_returns`; what is drawn from it is whatever
            of ``noise`` and ``gumbel`` is not given.
        num_samples (int, optional): as in :func:`sample_returns`.
        return_samples (bool): whether to return all returns as well.
        backend (str): as in :func:`sample_returns`.
        precision (str, optional): as in :func:`sample_returns`.
        tolerance (float): as in :func:`sample_returns`.

    Returns:
        tuple of Tensor: the chosen action ``[*B, act]``, its value ``[*B]``, all values ``[*B, P]``
        and, with ``return_samples``, the returns ``[*B, P, N]``; values in reward units.

    Raises:
        ValueError: if a shape, dtype, device, temperature, number or option is not as above.
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

        Noise drawn inside the kernels, other noise at every call:

        >>> seed = torch.tensor([123, 0])
        >>> with torch.no_grad():
        ...     for _ in range(2):
        ...         out = evor_select(packed, torch.randn(5, 3), torch.randn(5, 4, 2), tau_r=1.0,
        ...                           tau_q=0.5, num_steps=10, seed=seed, num_samples=6)
        ...         seed[1] += 1
    """
    check_tensors(packed, observation, action)
    tensors = packed.tensors()
    num_nodes = check_draws(action, noise, seed, num_samples)
    check_optional("gumbel", gumbel, tuple(action.shape[:-1]))
    check_optional("log_weights", log_weights, (num_nodes,))
    check_options(num_steps, solver, backend, precision, tolerance)
    check_temperatures(tau_r, tau_q, gumbel, seed)
    drawn = noise is None or (tau_q > 0 and gumbel is None)
    check_seed_is_read(seed, "" if drawn else "all noise that is read")
    check_normalization(loc, scale)
    loc, scale = _as_scalar(loc, action), _as_scalar(scale, action)
    named = {"observation": observation, "action": action, "noise": noise, "gumbel": gumbel}
    check_kinds(tensors, {**named, "log_weights": log_weights, "loc": loc, "scale": scale})
    flat_gumbel = None if gumbel is None else gumbel.reshape(-1, gumbel.shape[-1]).contiguous()
    reads = (
        observation.reshape(-1, observation.shape[-1]),
        action.reshape(-1, *action.shape[-2:]),
        _flat_noise(noise),
        seed,
        num_nodes,
        flat_gumbel,
        None if log_weights is None else log_weights.float().contiguous(),
        loc,
        scale,
        tensors,
        packed.activation,
        packed.eps,
        num_steps,
        solver,
        float(tau_r),
        float(tau_q),
        return_samples,
        backend,
        precision or "",
        float(tolerance),
    )
    results = _select_op(*reads) if torch.compiler.is_compiling() else select(packed, *reads)
    batch, (candidates, action_dim) = action.shape[:-2], action.shape[-2:]
    chosen = results[0].reshape(*batch, action_dim)
    value, q = results[1].reshape(batch), results[2].reshape(*batch, candidates)
    if return_samples:
        return chosen, value, q, results[3].reshape(*batch, candidates, num_nodes)
    return chosen, value, q

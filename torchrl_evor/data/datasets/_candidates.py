# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_evor.data.datasets._ogbench_windows import check_counts

__all__ = ["sample_candidates"]


@torch.no_grad()
def sample_candidates(
    policy: Callable[[Tensor], Tensor],
    observation: Tensor,
    num_candidates: int,
    *,
    max_rows: int = 4096,
) -> Tensor:
    """Draws candidates of a policy that is trained no more, once for a whole data set.

    A loss that chooses among candidates at the next state, :class:`~torchrl_evor.EVORLoss` with
    ``next_action="improved"`` or :class:`~torchrl_evor.QCLoss`, takes them from its batch at
    ``("next", "candidates")`` and does not sample the policy in every update. A state that is
    met again has the same candidates.

    Args:
        policy (Callable): maps observations ``[n, P, obs]`` to random actions
            ``[n, P, act]``, e.g. a :class:`~torchrl_evor.FlowMatchingPolicy`. Leading axes of
            the actions, as of a stack of policies, are kept.
        observation (Tensor): ``[N, obs]``, on the device of the policy.
        num_candidates (int): ``P``.

    Keyword Args:
        max_rows (int, optional): actions that are drawn at a time. Defaults to ``4096``.

    Returns:
        Tensor: ``[*, N, P, act]``, without a gradient.

    Raises:
        ValueError: if a count is no integer of at least 1, or the policy returns another shape.
        TypeError: if the policy returns no tensor, e.g. several.

    Examples:
        >>> import torch
        >>> from torchrl_evor import FlowMatchingPolicy
        >>> policy = FlowMatchingPolicy(torch.nn.Linear(3 + 2 + 1, 2), action_dim=2)
        >>> sample_candidates(policy, torch.zeros(10, 3), num_candidates=4).shape
        torch.Size([10, 4, 2])
    """
    check_counts(num_candidates=num_candidates, max_rows=max_rows)
    parts = []
    with set_exploration_type(ExplorationType.RANDOM):
        for piece in observation.split(max(1, max_rows // num_candidates)):
            rows = (len(piece), num_candidates)
            actions = policy(piece.unsqueeze(1).expand(*rows, -1))
            if not isinstance(actions, Tensor):
                raise TypeError(
                    f"policy must return one tensor, random actions, got {type(actions).__name__}."
                )
            if actions.ndim < 3 or actions.shape[-3:-1] != rows:
                raise ValueError(
                    f"policy must return actions of the shape {(*rows, 'act')} for observations "
                    f"{(*rows, *piece.shape[1:])}, got {tuple(actions.shape)}."
                )
            parts.append(actions)
    return torch.cat(parts, -3)

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from typing import Literal

from tensordict import TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor

from torchrl_evor.modules.functional import check_positive
from torchrl_evor.modules.models.critics import Critic
from torchrl_evor.modules.tensordict_module.actors import FlowMatchingPolicy
from torchrl_evor.objectives.critics import CriticLoss

__all__ = ["QCLoss"]


class QCLoss(CriticLoss):
    r"""Q-chunking with best-of-N actions (QC).

    Fitted Q iteration inside the support of a flow-matching policy over chunks
    of ``h`` actions,

    .. math::
        L_Q = E \Big( Q(x, a) - \sum_{k<h} \gamma^k r_k
            - \gamma^h \bar Q(x', a^*) \Big)^2, \qquad
        a^* = \arg\max_{a' \in \{a'_1, \dots, a'_N\}} Q(x', a'), \quad a'_i \sim \pi(x').

    The online critic chooses among the candidates and the target critic
    values the choice; both average the members of their ensemble. Chunks are
    flattened into one action, ``reward`` is the discounted sum over a chunk
    and ``steps_to_next_obs`` its length; ``h = 1`` is best-of-N Q-learning.
    Acting is best of N too, by :class:`~torchrl_evor.EVORActor`.

    Source: *Reinforcement Learning with Action Chunking*, `arXiv:2507.07969
    <https://arxiv.org/abs/2507.07969>`_.

    Args:
        actor_network (FlowMatchingPolicy): base policy over chunks.
        qvalue_network (Critic): critic; the paper's is a
            :class:`~torchrl_evor.ScalarCritic` with an ensemble of two
            networks with LayerNorm.

    Keyword Args:
        num_candidates (int, optional): candidates at the next state.
            Defaults to ``32``.
        delay_qvalue (bool, optional): keep a target critic, to be updated by
            :class:`~torchrl.objectives.SoftUpdate`. Defaults to ``True``.
        reduction (str, optional): ``"none"``, ``"mean"`` or ``"sum"``.
            Defaults to ``"mean"``.
        observation_noise (float, optional): see :class:`~torchrl_evor.EVORLoss`.
            Defaults to ``0.0``.
        use_prioritized_weights (bool or ``"auto"``, optional): weigh the
            losses by the ``priority_weight`` entry. Defaults to ``"auto"``.

    .. note::
        Candidates come from the batch where it holds them, see
        :class:`~torchrl_evor.EVORLoss`; then ``num_candidates`` must be as many.

    .. note::
        See :class:`~torchrl_evor.CriticLoss` for the discount, padded chunks
        and the errors of rows.

    Raises:
        ValueError: if an option is unknown, ``num_candidates`` is below 1, or the critic has
            lazy parameters.
        TypeError: if a network is not of the kind that is asked for.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.objectives import SoftUpdate
        >>> from torchrl_evor import EVORActor, FlowMatchingPolicy, QCLoss, ScalarCritic
        >>> from torchrl_evor import StackedVelocityMLP, VelocityMLP
        >>> chunk = 5 * 2  # five actions of size two
        >>> velocity = VelocityMLP(3 + chunk + 1, chunk, hidden_sizes=(32,))
        >>> policy = FlowMatchingPolicy(velocity, chunk)
        >>> network = StackedVelocityMLP(2, 3 + chunk, hidden_sizes=(32,), layer_norm=True)
        >>> critic = ScalarCritic(network, num_critics=2)
        >>> loss = QCLoss(policy, critic, num_candidates=8).make_value_estimator(gamma=0.99)
        >>> updater = SoftUpdate(loss, tau=0.005)
        >>> batch = TensorDict(
        ...     {
        ...         "observation": torch.randn(4, 3),
        ...         "action": torch.rand(4, chunk) * 2 - 1,
        ...         "steps_to_next_obs": torch.full((4, 1), 5),
        ...         "next": {
        ...             "observation": torch.randn(4, 3),
        ...             "reward": torch.randn(4, 1),
        ...             "done": torch.zeros(4, 1, dtype=torch.bool),
        ...             "terminated": torch.zeros(4, 1, dtype=torch.bool),
        ...         },
        ...     },
        ...     batch_size=[4],
        ... )
        >>> losses = loss(batch)
        >>> (losses["loss_actor"] + losses["loss_qvalue"]).backward()
        >>> actor = EVORActor(policy, critic, num_candidates=32)
        >>> actor(batch.select("observation"))["action"].shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        actor_network: FlowMatchingPolicy,
        qvalue_network: Critic,
        *,
        num_candidates: int = 32,
        delay_qvalue: bool = True,
        reduction: Literal["none", "mean", "sum"] | None = None,
        observation_noise: float = 0.0,
        use_prioritized_weights: Literal["auto"] | bool = "auto",
    ) -> None:
        super().__init__(
            actor_network,
            qvalue_network,
            delay_qvalue=delay_qvalue,
            reduction=reduction,
            observation_noise=observation_noise,
            use_prioritized_weights=use_prioritized_weights,
        )
        self.num_candidates = check_positive("num_candidates", num_candidates)

    def _next_action(self, tensordict: TensorDictBase) -> Tensor:
        """Best of the policy's candidates by the online critic, ``[*B, act]``."""
        candidates = self._next_candidates(tensordict)
        observation = tensordict[unravel_key(("next", self._value_observation))]
        with self._swap("qvalue_network"):
            action, _, _ = self.qvalue_network.select(observation, candidates, tau_r=float("inf"))
        return action

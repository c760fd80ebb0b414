# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import math
from typing import Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, dispatch, set_skip_existing
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, exploration_type, set_exploration_type

from torchrl_evor.modules.functional import (
    NODES,
    check_choice,
    check_positive,
    check_temperature,
)
from torchrl_evor.modules.models.flow import FlowMatchingModel
from torchrl_evor.modules.models.return_flow import ReturnFlow
from torchrl_evor.modules.models.return_model import check_precision

__all__ = ["EVORActor", "FlowMatchingPolicy"]

ARGMAX_MODES = (ExplorationType.DETERMINISTIC, ExplorationType.MODE, ExplorationType.MEAN)


def is_flow_policy(policy: nn.Module) -> bool:
    """Whether a policy has a velocity field, as this package's and TorchRL's own do."""
    return hasattr(getattr(policy, "module", None), "velocity")


class FlowMatchingPolicy(TensorDictModule):
    """Policy that samples actions by flow matching.

    The tensor-only :class:`FlowMatchingModel` is reachable as ``.module``. The
    policy is random in every exploration mode; pass explicit noise for
    repeatability. See `Flow Matching for Generative Modeling
    <https://arxiv.org/abs/2210.02747>`_.

    Args:
        velocity_network (nn.Module): maps the concatenation of observation,
            action and flow time ``[*B, obs + act + 1]`` to a velocity ``[*B, act]``.
        action_dim (int): size of the action.
        num_steps (int, optional): evaluations of the velocity, at flow times
            ``k / num_steps``. Defaults to ``10``.
        low (float or Tensor, optional): lower bound of the action. Defaults to ``-1.0``.
        high (float or Tensor, optional): upper bound of the action. Defaults to ``1.0``.

    Keyword Args:
        solver (str, optional): ``"euler"``, a step for each evaluation, or
            ``"midpoint"``, a step for two, for an even ``num_steps``. May be changed
            after training (``policy.module``). Defaults to ``"euler"``.
        in_keys (NestedKey or list of NestedKey, optional): the observation and, if a
            second key is given, the noise to start from ``[*B, act]``.
            Defaults to ``"observation"``.
        out_keys (NestedKey or list of NestedKey, optional): Defaults to ``"action"``.

    Raises:
        ValueError: see :class:`FlowMatchingModel`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> policy = FlowMatchingPolicy(torch.nn.Linear(3 + 2 + 1, 2), action_dim=2)
        >>> data = TensorDict(observation=torch.zeros(5, 3), batch_size=[5])
        >>> policy(data)["action"].shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        velocity_network: nn.Module,
        action_dim: int,
        num_steps: int = 10,
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
        *,
        solver: Literal["euler", "midpoint"] = "euler",
        in_keys: NestedKey | list[NestedKey] = "observation",
        out_keys: NestedKey | list[NestedKey] = "action",
    ) -> None:
        model = FlowMatchingModel(
            velocity_network, action_dim, num_steps, solver=solver, low=low, high=high
        )
        super().__init__(model, in_keys=in_keys, out_keys=out_keys)


class EVORActor(TensorDictModuleBase):
    r"""Acts by sampling candidates from a base policy and choosing by :math:`Q^*`.

    For each state, ``num_candidates`` actions are drawn from the base policy,
    ``num_samples`` reward-to-go nodes are integrated for each of them and
    averaged to :math:`Q^*(x, a) = \tau_R \log E \exp(Z / \tau_R)`, and one
    candidate is drawn from :math:`\mathrm{softmax}(Q^* / \tau_Q)`. More
    candidates or nodes buy better actions without retraining.

    Source: *Expressive Value Learning for Scalable Offline Reinforcement
    Learning*, `arXiv:2510.08218 <https://arxiv.org/abs/2510.08218>`_.

    Args:
        policy (TensorDictModule): base policy; any TensorDict policy without
            memory that writes an action, not only :class:`FlowMatchingPolicy`.
        returns (ReturnFlow): law of the reward-to-go.

    Keyword Args:
        num_candidates (int, optional): :math:`N_\pi`; ``1`` is behaviour
            cloning. Defaults to ``32``.
        num_samples (int, optional): nodes :math:`N` per candidate. Defaults to ``16``.
        tau_r (float, optional): temperature of the average over the
            reward-to-go, in reward units; ``0`` is the maximum, ``inf`` the
            mean. Defaults to ``inf``.
        tau_q (float, optional): temperature of the choice, in reward units;
            ``0`` takes the best candidate. Defaults to ``0.0``.
        nodes (str, optional): ``"stratified"`` (quantiles shared by all
            candidates), ``"gauss_hermite"`` (weighted, for a small ``tau_r``) or
            ``"random"`` (the paper's). Defaults to ``"stratified"``.
        num_steps (int, optional): evaluations of the flow for each node. ``1`` ends
            every node at the mean, whatever ``tau_r`` is; it can rank actions better
            where they differ by less than integration errs. Defaults to ``None``,
            those of ``returns``.
        backend (str, optional): ``"torch"``, ``"triton"`` or ``"auto"``, the
            fastest measured choice for the device; PyTorch where none has been
            measured. Defaults to ``"auto"``.
        precision (str, optional): operands of the Triton kernels' products:
            ``"fp16"``, ``"bf16"``, ``"tf32"``, ``"tf32x3"`` (three products, near
            float32) or ``"ieee"``. Defaults to ``None``: the parameters' dtype where
            it is of 16 bits, else what ``torch.get_float32_matmul_precision()``
            allows, ``"tf32x3"`` for ``"highest"``, ``"tf32"`` for ``"high"``,
            ``"bf16"`` for ``"medium"``; float32 is never rounded to fp16 unasked.
            With ``backend="auto"`` it also says whose measurements decide. Nothing
            else reads it: products in PyTorch follow torch's own settings.
        return_candidates (bool, optional): also write ``"candidates"``
            ``[*B, num_candidates, act]`` and ``"candidate_values"``
            ``[*B, num_candidates]``. Defaults to ``False``.

    .. note::
        Candidates stay random in every exploration mode: a zero latent would
        collapse them into one. So would one noise for all, so that a flow that
        may read its noise draws it here. Under ``ExplorationType.DETERMINISTIC`` (the
        default of TorchRL's ``Evaluator``), ``MODE`` and ``MEAN`` the best
        candidate is taken whatever ``tau_q`` is.

    .. note::
        A loss puts the target's weights into its networks while it is computed, as
        TorchRL's losses do. An actor that works in another thread meanwhile (an
        ``Evaluator`` may) needs networks of its own, ``copy.deepcopy(actor)``.

    Raises:
        ValueError: if a count is below 1, a temperature negative, ``nodes``,
            ``backend`` or ``precision`` unknown, ``num_steps`` given for values that
            are no flow or odd for a midpoint one, the policy does not write the
            action that ``returns`` reads, it writes a state of its own for
            the next step, or a flow within a sequence reads its noise.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> policy = FlowMatchingPolicy(torch.nn.Linear(3 + 2 + 1, 2), action_dim=2)
        >>> returns = ReturnFlow(torch.nn.Linear(3 + 2 + 2, 1))
        >>> actor = EVORActor(policy, returns, num_candidates=8, num_samples=4)
        >>> data = actor(TensorDict(observation=torch.zeros(5, 3), batch_size=[5]))
        >>> data["action"].shape, data["state_action_value"].shape
        (torch.Size([5, 2]), torch.Size([5, 1]))
    """

    def __init__(
        self,
        policy: TensorDictModule,
        returns: ReturnFlow,
        *,
        num_candidates: int = 32,
        num_samples: int = 16,
        tau_r: float = math.inf,
        tau_q: float = 0.0,
        nodes: Literal["stratified", "gauss_hermite", "random"] = "stratified",
        num_steps: int | None = None,
        backend: Literal["auto", "torch", "triton"] = "auto",
        precision: Literal["fp16", "bf16", "tf32", "tf32x3", "ieee"] | None = None,
        return_candidates: bool = False,
    ) -> None:
        super().__init__()
        memory = [key for key in policy.out_keys if isinstance(key, tuple) and key[0] == "next"]
        if memory:
            # Of which candidate? The state would be lost without a word.
            raise ValueError(f"policy must have no memory, got one that writes {memory}.")
        self.policy = policy
        self.returns = returns
        self.num_candidates = check_positive("num_candidates", num_candidates)
        self.num_samples = check_positive("num_samples", num_samples)
        self.tau_r = check_temperature("tau_r", tau_r)
        self.tau_q = check_temperature("tau_q", tau_q)
        self.nodes = check_choice("nodes", nodes, NODES)
        self.num_steps = _check_steps(returns, num_steps)
        self.backend = check_choice("backend", backend, ("auto", "torch", "triton"))
        self.precision = check_precision(precision)
        self.return_candidates = return_candidates
        # Not the policy's first output: that of a ProbabilisticActor is a mean.
        action_key = returns.in_keys[1]
        if action_key not in policy.out_keys:
            raise ValueError(
                f"policy must write the action that returns reads, {action_key!r}, "
                f"got a policy that writes {policy.out_keys}."
            )
        if not is_flow_policy(policy) and any(
            is_flow_policy(part) and len(part.in_keys) > 1 for part in policy.modules()
        ):
            raise ValueError(
                "policy must not read its noise within a sequence, where every candidate would "
                "be the same: leave it to the flow, in_keys of one observation."
            )
        self.in_keys = list(dict.fromkeys([*self._policy_keys, returns.in_keys[0]]))
        self.out_keys = [action_key, *returns.out_keys]
        if return_candidates:
            self.out_keys += ["candidates", "candidate_values"]

    @property
    def _policy_keys(self) -> list[NestedKey]:
        # A flow that may read its noise draws it here, or its candidates would all be the same.
        return self.policy.in_keys[:1] if is_flow_policy(self.policy) else self.policy.in_keys

    def candidates(self, tensordict: TensorDictBase) -> Tensor:
        """Draws ``num_candidates`` actions of the base policy, ``[*B, P, act]``."""
        network = getattr(getattr(self.policy, "module", None), "velocity_network", None)
        # The candidate axis goes first, where it fits leaves of any shape; behind the axis of the
        # models, if the policy is a stack of them.
        axis = int(hasattr(network, "num_models"))
        expanded = TensorDict(
            {
                key: leaf.unsqueeze(axis).expand(
                    *leaf.shape[:axis], self.num_candidates, *leaf.shape[axis:]
                )
                for key in self._policy_keys
                for leaf in [tensordict[key]]
            }
        )
        with set_exploration_type(ExplorationType.RANDOM):
            return self.policy(expanded).get(self.returns.in_keys[1]).movedim(axis, -2)

    @dispatch(auto_batch_size=False)
    @set_skip_existing(None)
    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the chosen action ``[*B, act]`` and its value ``[*B, 1]``."""
        candidates = self.candidates(tensordict)
        # Values that are no flow take no steps.
        steps = {} if self.num_steps is None else {"num_steps": self.num_steps}
        action, value, values = self.returns.select(
            tensordict[self.returns.in_keys[0]],
            candidates,
            tau_r=self.tau_r,
            tau_q=0.0 if exploration_type() in ARGMAX_MODES else self.tau_q,
            num_samples=self.num_samples,
            nodes=self.nodes,
            **steps,
            backend=self.backend,
            precision=self.precision,
        )
        # Not out_keys, of which some may have been selected.
        tensordict.set(self.returns.in_keys[1], action)
        tensordict.set(self.returns.out_keys[0], value.unsqueeze(-1))
        if self.return_candidates:
            tensordict.set("candidates", candidates)
            tensordict.set("candidate_values", values)
        return tensordict


def _check_steps(returns: ReturnFlow, num_steps: int | None) -> int | None:
    """Evaluations of the flow of ``returns``, if they are given and it takes them."""
    if num_steps is None:
        return None
    if not hasattr(returns, "solver_steps"):
        raise ValueError(
            f"num_steps must be None for {type(returns).__name__}, which is no flow, "
            f"got {num_steps!r}."
        )
    returns.solver_steps(num_steps)  # for its errors
    return num_steps

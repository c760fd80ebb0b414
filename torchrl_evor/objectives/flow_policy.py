# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import ValueEstimators, dispatch_value_estimator
from torchrl.objectives.value import TD0Estimator, ValueEstimatorBase

from torchrl_evor.modules.functional import check_choice, check_deviation, interpolate
from torchrl_evor.modules.tensordict_module.actors import FlowMatchingPolicy, is_flow_policy

__all__ = ["FlowPolicyLoss"]

# Share of the observations that `observation_noise` moves: enough to say what to do beside the
# data, where there are no others, and too few to change what is said amid them.
NOISY_SHARE = 0.1


class FlowPolicyLoss(LossModule):
    """Base of the losses that pair a flow-matching policy with a critic.

    It imitates the data with the policy, holds the keys and the discount, and
    reads one Bellman backup from a batch; the critic is up to the subclass.

    Args:
        actor_network (FlowMatchingPolicy): base policy.

    Keyword Args:
        next_action (str): where the action at the next state comes from;
            ``"dataset"`` reads ``("next", "action")``.
        reduction (str, optional): ``"none"``, ``"mean"`` or ``"sum"``.
            Defaults to ``"mean"``.
        observation_noise (float, optional): deviation of the noise by which a tenth of the
            observations are moved that the policy imitates from, in units of each
            feature's deviation over the batch. Defaults to ``0.0``.
        use_prioritized_weights (bool or ``"auto"``, optional): weigh the
            losses by the ``priority_weight`` entry. Defaults to ``"auto"``.

    Raises:
        ValueError: if ``reduction`` or ``use_prioritized_weights`` is unknown, or
            ``observation_noise`` negative or infinite.
        TypeError: if the policy has no velocity field.
    """

    @dataclass
    class _AcceptedKeys:
        """Keys of the batch, to be changed by ``set_keys``.

        Observations are read at the networks' own ``in_keys``.

        Attributes:
            action (NestedKey): action of the data, or chunk of actions,
                flattened. Defaults to ``"action"``.
            reward (NestedKey): reward, under ``"next"``. Defaults to ``"reward"``.
            done (NestedKey): end of trajectory, under ``"next"``. Defaults to ``"done"``.
            terminated (NestedKey): termination, under ``"next"``. Defaults to
                ``"terminated"``.
            steps_to_next_obs (NestedKey): number of steps of an n-step
                transition or a chunk. Defaults to ``"steps_to_next_obs"``.
            action_is_pad (NestedKey): optional; steps of a chunk that lie
                beyond its trajectory, ``[*B, h]``. Defaults to ``"action_is_pad"``.
            candidates (NestedKey): optional, under ``"next"``; actions to choose from at
                the next state, ``[*B, P, act]``. Where the batch holds them the base
                policy is not sampled for them. Defaults to ``"candidates"``.
            priority (NestedKey): where the error of each row is written.
                Defaults to ``"td_error"``.
            priority_weight (NestedKey): importance weights of prioritised
                sampling. Defaults to ``"priority_weight"``.
        """

        action: NestedKey = "action"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        steps_to_next_obs: NestedKey = "steps_to_next_obs"
        action_is_pad: NestedKey = "action_is_pad"
        candidates: NestedKey = "candidates"
        priority: NestedKey = "td_error"
        priority_weight: NestedKey = "priority_weight"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    default_value_estimator = ValueEstimators.TD0
    SUPPORTED_VALUE_ESTIMATORS = (ValueEstimators.TD0,)

    actor_network: FlowMatchingPolicy
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: FlowMatchingPolicy,
        *,
        next_action: str,
        reduction: Literal["none", "mean", "sum"] | None = None,
        observation_noise: float = 0.0,
        use_prioritized_weights: Literal["auto"] | bool = "auto",
    ) -> None:
        self._in_keys = None
        super().__init__()
        if not is_flow_policy(actor_network):
            raise TypeError(f"actor_network must be a FlowMatchingPolicy, got {actor_network!r}.")
        self.next_action = next_action
        self.reduction = check_choice("reduction", reduction or "mean", ("none", "mean", "sum"))
        self.observation_noise = check_deviation("observation_noise", observation_noise)
        self.use_prioritized_weights = check_choice(
            "use_prioritized_weights", use_prioritized_weights, (True, False, "auto")
        )
        self.convert_to_functional(actor_network, "actor_network")
        # Built here, so that the discount is part of every state_dict.
        self.make_value_estimator()

    def _add_critic(self, network: nn.Module, name: str, delay: bool) -> None:
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in network.parameters()):
            # Target parameters are made of values.
            raise ValueError(f"{name} must have seen data, got a network with lazy parameters.")
        self.convert_to_functional(network, name, create_target_params=delay)

    def _apply(self, fn):
        """Casts or moves the loss and with it the networks that it was made of."""
        gamma = self.value_estimator.gamma
        super()._apply(fn)
        # In 16 bits 0.999 would be 1.
        if self.value_estimator.gamma.dtype in (torch.float16, torch.bfloat16):
            self.value_estimator.gamma = gamma.to(self.value_estimator.gamma.device)
        # Parameters are cast in place; a cast buffer is a new tensor, which the network has to get.
        for name, network in self._networks():
            params = getattr(self, name)
            for key, _ in network.named_buffers():
                *path, leaf = key.split(".")
                module = network.get_submodule(".".join(path))
                module._buffers[leaf] = params.get((*path, leaf)).data
        return self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        # A deep copy copies networks and parameters apart.
        for name, network in self._networks():
            setattr(self, name, TensorDict.from_module(network, as_module=True))

    def _networks(self) -> list[tuple[str, nn.Module]]:
        """Names of the parameters that are trained, with the networks that they are of."""
        return [
            (name, getattr(self, name.removesuffix("_params")))
            for name, params in self.named_children()
            if isinstance(params, TensorDictParams) and not name.startswith("target_")
        ]

    @property
    def in_keys(self) -> list[NestedKey]:
        """Keys of the batch that the loss needs, from the networks' and its own.

        These can be passed by keyword. What may be left out (the steps of a window, weights,
        masks, candidates) comes in a TensorDict.
        """
        if self._in_keys is not None:
            return self._in_keys
        keys = self.tensor_keys
        observations = [self._actor_observation, self._value_observation]
        following = [*observations, keys.reward, keys.done, keys.terminated]
        if self.next_action == "dataset":
            following.append(keys.action)
        following = [unravel_key(("next", key)) for key in following]
        return list(dict.fromkeys([*observations, keys.action, *following]))

    @in_keys.setter
    def in_keys(self, values: list[NestedKey]) -> None:
        self._in_keys = values

    def _check_batch(self, tensordict: TensorDictBase) -> None:
        """Names the missing key whole: TensorDict's own error names its last part."""
        for key in self.in_keys:
            if tensordict.get(key, None) is None:
                raise KeyError(
                    f"{type(self).__name__} needs {key!r} in its batch, got "
                    f"{sorted(map(str, tensordict.keys(True, True)))}."
                )

    @property
    def _actor_observation(self) -> NestedKey:
        return self.actor_network.in_keys[0]

    @property
    def _value_observation(self) -> NestedKey:
        raise NotImplementedError

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict]:
        """Flow matching of the base policy to the data's actions."""
        observation = self._move(tensordict[self._actor_observation])
        action = tensordict[self.tensor_keys.action]
        noise = torch.randn_like(action)
        time = torch.rand_like(action[..., :1])
        with self._swap("actor_network"):
            velocity = self.actor_network.module.velocity(
                observation, interpolate(noise, action, time), time
            )
        error = (velocity - (action - noise)).square()
        pad = self._padded_steps(tensordict)
        if pad is not None:
            # The actions of one step lie side by side in a flattened chunk.
            pad = pad.repeat_interleave(action.shape[-1] // pad.shape[-1], -1)
            error = torch.where(pad, torch.zeros_like(error), error)
        loss = self._reduce_loss(error.sum(-1), tensordict, weights=self._weights(tensordict))
        self._clear_weakrefs(tensordict, "actor_network_params")
        return loss, {}

    def _move(self, observation: Tensor) -> Tensor:
        """Observations ``[*B, obs]``, a share of which noise has moved beside the data."""
        if not self.observation_noise:
            return observation
        rows = observation.reshape(-1, observation.shape[-1])
        deviation = (rows - rows.mean(0)).square().mean(0).sqrt()
        moved = torch.rand_like(observation[..., :1]) < NOISY_SHARE
        noise = self.observation_noise * deviation * torch.randn_like(observation)
        return torch.where(moved, observation + noise, observation)

    def _next_action(self, tensordict: TensorDictBase) -> Tensor:
        """Action of the data, or of the base policy, at the next state, ``[*B, act]``."""
        if self.next_action == "dataset":
            return tensordict[unravel_key(("next", self.tensor_keys.action))]
        observation = tensordict[unravel_key(("next", self._actor_observation))]
        with self._swap("actor_network"):
            return self.actor_network.module(observation)

    def _next_candidates(self, tensordict: TensorDictBase) -> Tensor:
        """``num_candidates`` actions at the next state, of the batch or drawn, ``[*B, P, act]``."""
        key = unravel_key(("next", self.tensor_keys.candidates))
        kept = tensordict.get(key, None)
        if kept is None:
            return self._draw_candidates(tensordict)
        *batch, size = tensordict[self.tensor_keys.action].shape
        shape = (*batch, self.num_candidates, size)
        if kept.shape != shape:
            raise ValueError(f"{key!r} must have the shape {shape}, got {tuple(kept.shape)}.")
        return kept

    def _draw_candidates(self, tensordict: TensorDictBase) -> Tensor:
        """``num_candidates`` actions of the base policy at the next state, ``[*B, P, act]``."""
        observation = tensordict[unravel_key(("next", self._actor_observation))]
        rows = (*observation.shape[:-1], self.num_candidates, observation.shape[-1])
        with self._swap("actor_network"):
            return self.actor_network.module(observation.unsqueeze(-2).expand(rows))

    def _swap(self, name: str, target: bool = False):
        """The network with its (target) parameters in place, as a context."""
        params = getattr(self, f"target_{name}_params" if target else f"{name}_params")
        # The default of tensordict turns target buffers into trainable parameters.
        context = params.to_module(getattr(self, name), preserve_module_state=False)
        return context if torch.compiler.is_compiling() else _Restored(context)

    def _backup(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Reward and discount of the Bellman map in reward units, each ``[*B, 1]``."""
        keys = self.tensor_keys
        reward_key = unravel_key(("next", keys.reward))
        names = [unravel_key(("next", key)) for key in (keys.done, keys.terminated)]
        # Strict: TorchRL would take every end for a termination where that key is missing.
        step = tensordict.select(reward_key, *names)
        shape = (*tensordict[keys.action].shape[:-1], 1)
        for key in (reward_key, *names):
            # [B] beside [B, 1] would make every row a mean over the batch.
            if step[key].shape != shape:
                raise ValueError(
                    f"{key!r} must have the shape {shape}, got {tuple(step[key].shape)}."
                )
        if (steps := tensordict.get(keys.steps_to_next_obs, None)) is not None:
            step.set(keys.steps_to_next_obs, steps)
        zero = torch.zeros_like(step[reward_key])
        # The Bellman map is affine in the next value: its estimator gives both coefficients.
        reward = self.value_estimator.value_estimate(step, next_value=zero)
        step.set(reward_key, zero)
        discount = self.value_estimator.value_estimate(step, next_value=zero + 1)
        # That of the networks, but in 16 bits a discount of 0.999 would be 1.
        dtype = torch.promote_types(tensordict[keys.action].dtype, torch.float32)
        return reward.to(dtype), discount.to(dtype)

    def _padded_steps(self, tensordict: TensorDictBase) -> Tensor | None:
        """Which steps of the chunks are padded, ``[*B, h]``, where the batch says so."""
        key = self.tensor_keys.action_is_pad
        pad = tensordict.get(key, None)
        if pad is None:
            return None
        *batch, size = tensordict[self.tensor_keys.action].shape
        fits = list(pad.shape[:-1]) == batch and pad.shape[-1] and not size % pad.shape[-1]
        if pad.dtype != torch.bool or not fits:
            raise ValueError(
                f"{key!r} must be bool, of shape {(*batch, 'h')} for chunks of h steps in actions "
                f"of size {size}, got {pad.dtype} {tuple(pad.shape)}."
            )
        return pad

    def _without_padded(self, error: Tensor, tensordict: TensorDictBase) -> Tensor:
        """``error`` ``[*B]``, zero where a part of the row's chunk is padded."""
        pad = self._padded_steps(tensordict)
        if pad is None:
            return error
        return torch.where(pad.any(-1), torch.zeros_like(error), error)

    def _weights(self, tensordict: TensorDictBase) -> Tensor | None:
        # Not LossModule's own reader, which cannot look up a nested key.
        if self.use_prioritized_weights not in (True, "auto"):
            return None
        weights = tensordict.get(self.tensor_keys.priority_weight, None)
        rows = tensordict[self.tensor_keys.action].shape[:-1]
        if weights is not None and weights.shape != rows:
            raise ValueError(
                f"{self.tensor_keys.priority_weight!r} must hold one weight for each row, "
                f"{tuple(rows)}, got {tuple(weights.shape)}."
            )
        return weights

    def make_value_estimator(
        self,
        value_type: ValueEstimators | TD0Estimator | type[TD0Estimator] | None = None,
        **hyperparams,
    ):
        """Builds the estimator that holds the discount; see :class:`LossModule`.

        Args:
            value_type (ValueEstimators, TD0Estimator or its class, optional): Defaults to
                ``ValueEstimators.TD0``. A batch holds transitions, of any number of steps, and
                no trajectories: estimators that read along time have no meaning here.

        Raises:
            ValueError: if ``gamma`` is not between 0 and 1.
            NotImplementedError: for any other estimator.
        """
        kind = value_type if isinstance(value_type, type) else type(value_type)
        if issubclass(kind, ValueEstimatorBase) and not issubclass(kind, TD0Estimator):
            raise NotImplementedError(f"value_type must be a TD0Estimator, got {kind.__name__}.")
        gamma = hyperparams.get("gamma", getattr(value_type, "gamma", None))
        if gamma is not None and not 0 <= gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], got {float(gamma)!r}.")
        if isinstance(gamma, int):  # whose buffer would cut the digits of one that is loaded
            hyperparams["gamma"] = float(gamma)
        value_type, hyperparams = self._prepare_value_estimator_kwargs(value_type, **hyperparams)
        if value_type is not None:
            dispatch_value_estimator(
                self, value_type, supported=self.SUPPORTED_VALUE_ESTIMATORS, **hyperparams
            )
        self._forward_value_estimator_keys()
        return self

    def _forward_value_estimator_keys(self, **kwargs) -> None:
        if self._value_estimator is not None:
            names = ("reward", "done", "terminated", "steps_to_next_obs")
            self._value_estimator.set_keys(
                **{name: getattr(self.tensor_keys, name) for name in names}
            )


class _Restored(AbstractContextManager):
    """A swap of parameters that ends in any case.

    TensorDict's own leaves them where they are when an error passes. A batch of a wrong shape, or
    no memory for one, would leave the target's weights in the network that an actor shares.
    """

    def __init__(self, swap: AbstractContextManager) -> None:
        self.swap = swap

    def __enter__(self) -> AbstractContextManager:
        return self.swap.__enter__()

    def __exit__(self, *error) -> None:
        self.swap.__exit__(None, None, None)

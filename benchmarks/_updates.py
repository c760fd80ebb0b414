# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Full updates of every loss on random data: sample, loss, backward, fused Adam, target update."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.objectives import SoftUpdate
from torchrl.objectives.common import LossModule

from torchrl_evor import (
    CriticLoss,
    EVORLoss,
    FlowMatchingPolicy,
    QCLoss,
    QuantileCritic,
    ReturnFlow,
    ScalarCritic,
    StackedVelocityMLP,
    VelocityMLP,
)

Update = Callable[[], TensorDict]
Compile = Literal[False, True, "reduce-overhead"]


@dataclass(frozen=True)
class Shapes:
    """Sizes of the problem, the same for every method of a comparison."""

    observation: int = 28
    action: int = 5
    batch: int = 256
    hidden: tuple[int, ...] = (512, 512, 512, 512)
    num_steps: int = 10  # Euler steps
    transitions: int = 100_000
    candidates: int = 0  # of each next state, kept with the data


MAZE = Shapes(observation=2, action=10, hidden=(256,) * 3)  # chunks of five actions


def make_buffer(shapes: Shapes, device: torch.device) -> TensorDictReplayBuffer:
    """Replay buffer of random transitions on ``device``, with the data's next actions."""
    rows = shapes.transitions

    def step() -> dict:
        return {
            "observation": torch.randn(rows, shapes.observation, device=device),
            "action": torch.rand(rows, shapes.action, device=device) * 2 - 1,
        }

    done = torch.zeros(rows, 1, dtype=torch.bool, device=device)
    following = {
        **step(),
        "reward": torch.randn(rows, 1, device=device),
        "done": done,
        "terminated": done.clone(),
    }
    if shapes.candidates:
        size = (rows, shapes.candidates, shapes.action)
        following["candidates"] = torch.rand(size, device=device) * 2 - 1
    data = TensorDict({**step(), "next": following}, batch_size=[rows], device=device)
    storage = LazyTensorStorage(rows, device=device)
    buffer = TensorDictReplayBuffer(storage=storage, batch_size=shapes.batch)
    buffer.extend(data)
    return buffer


def make_policy(shapes: Shapes) -> FlowMatchingPolicy:
    network = VelocityMLP(
        shapes.observation + shapes.action + 1, shapes.action, hidden_sizes=shapes.hidden
    )
    return FlowMatchingPolicy(network, shapes.action, shapes.num_steps)


def make_evor_loss(
    shapes: Shapes, *, next_action: str = "policy", td_target: str = "bellman", **options
) -> EVORLoss:
    """EVOR with LayerNorm in the value network, as in the recipe."""
    network = VelocityMLP(
        shapes.observation + shapes.action + 2, hidden_sizes=shapes.hidden, layer_norm=True
    )
    returns = ReturnFlow(network, shapes.num_steps)
    options |= {"next_action": next_action, "td_target": td_target}
    return EVORLoss(make_policy(shapes), returns, **options)


def make_qc_loss(shapes: Shapes, *, num_candidates: int = 32) -> QCLoss:
    """Best-of-N with two critics."""
    network = StackedVelocityMLP(
        2, shapes.observation + shapes.action, hidden_sizes=shapes.hidden, layer_norm=True
    )
    critic = ScalarCritic(network, num_critics=2)
    return QCLoss(make_policy(shapes), critic, num_candidates=num_candidates)


def make_quantile_loss(shapes: Shapes, *, next_action: str = "policy") -> CriticLoss:
    """The distributional critic that is nearest to EVOR's."""
    network = VelocityMLP(
        shapes.observation + shapes.action, 51, hidden_sizes=shapes.hidden, layer_norm=True
    )
    return CriticLoss(make_policy(shapes), QuantileCritic(network), next_action=next_action)


def make_update(
    loss: LossModule, shapes: Shapes, device: torch.device, *, compile: Compile = False
) -> Update:
    """One training step, sampling included, as a function without arguments."""
    loss = loss.to(device)
    loss.make_value_estimator(gamma=0.99)
    buffer = make_buffer(shapes, device)
    updater = SoftUpdate(loss, tau=0.005)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4, fused=True)
    compute_loss = loss
    if compile:
        mode = None if compile is True else compile
        compute_loss = torch.compile(loss, fullgraph=True, mode=mode)

    def update() -> TensorDict:
        if compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        # Before the loss: CUDA graphs reuse the memory of the last gradients.
        optimizer.zero_grad()
        losses = compute_loss(buffer.sample())
        sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
        optimizer.step()
        updater.step()
        return losses.detach()

    return update


def time_in_turn(updates: Sequence[Update], repeats: int) -> list[float]:
    """Median milliseconds of each, called in turn on a CPU; two calls before are not counted."""
    seconds = [[] for _ in updates]
    for _ in range(repeats + 2):
        for update, taken in zip(updates, seconds):
            start = time.perf_counter()
            update()
            taken.append(time.perf_counter() - start)
    return [1e3 * statistics.median(taken[2:]) for taken in seconds]


def matmul_error(size: int = 512) -> float:
    """Largest error of a float32 product of unit-scale results, which tells its precision.

    About 1e-6 for float32 and 1e-2 for bfloat16 arithmetic.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, size, generator=generator, dtype=torch.float64)
    w = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
    # Both roundings of the inputs are part of the reference.
    x, w = x.float(), w.float()
    product = torch.nn.functional.linear(x, w)
    return (product.double() - x.double() @ w.double().T).abs().max().item()

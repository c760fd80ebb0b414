# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Networks, losses and batches of the tests of EVORLoss."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torchrl.objectives import SoftUpdate

from torchrl_evor import EVORLoss, FlowMatchingPolicy, ReturnFlow, VelocityMLP

NEXT_ACTIONS = ["policy", "dataset", "improved"]
OBS, ACT = 3, 2


def make_networks(dtype=None, **kwargs):
    policy = FlowMatchingPolicy(
        VelocityMLP(OBS + ACT + 1, ACT, hidden_sizes=(16,), dtype=dtype), ACT, num_steps=3
    )
    network = VelocityMLP(OBS + ACT + 2, hidden_sizes=(16,), layer_norm=True, dtype=dtype)
    return policy, ReturnFlow(network, num_steps=3, **kwargs)


def make_loss(dtype=None, gamma=0.9, updater=True, **kwargs):
    loss = EVORLoss(*make_networks(dtype), **kwargs).make_value_estimator(gamma=gamma)
    if updater and kwargs.get("delay_value", True):
        SoftUpdate(loss, tau=0.1)
    return loss


def fit_value(loss, sample, *, updates, lr, tau):
    """Trains the reward-to-go flow alone on batches of ``sample()``; the rate ends at 0."""
    updater = SoftUpdate(loss, tau=tau)
    optimizer = torch.optim.Adam(loss.value_network_params.values(True, True), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        value, _ = loss.value_loss(sample())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        updater.step()
        schedule.step()


def make_batch(*batch, dtype=None, batch_size=None):
    terminated = torch.rand(*batch, 1) < 0.3
    return TensorDict(
        observation=torch.randn(*batch, OBS, dtype=dtype),
        action=torch.rand(*batch, ACT, dtype=dtype) * 2 - 1,
        next=TensorDict(
            observation=torch.randn(*batch, OBS, dtype=dtype),
            action=torch.rand(*batch, ACT, dtype=dtype) * 2 - 1,
            reward=torch.randn(*batch, 1, dtype=dtype),
            done=terminated | (torch.rand(*batch, 1) < 0.3),
            terminated=terminated,
            batch_size=batch if batch_size is None else batch_size,
        ),
        batch_size=batch if batch_size is None else batch_size,
    )


def seeded_call(loss, batch, seed=1):
    torch.manual_seed(seed)
    return loss(batch)


def total(losses):
    return losses["loss_actor"].mean() + losses["loss_value"].mean()

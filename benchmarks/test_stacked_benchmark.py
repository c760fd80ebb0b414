# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Many value flows trained side by side, against the same ones trained in turn.

    pytest benchmarks/test_stacked_benchmark.py -o addopts= -m "not gpu"  # or -m gpu

Both do the same work: one update of each of ``num_models`` return flows on a
batch of its own. ``extra_info`` holds updates per hour, summed over the models.
"""

from __future__ import annotations

import platform

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import SoftUpdate

from torchrl_evor import EVORLoss, FlowMatchingPolicy, ReturnFlow, StackedVelocityMLP, VelocityMLP

OBS, ACT, ROWS = 28, 5, 256  # of OGBench's cube tasks
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make_batch(*shape, device):
    ended = torch.zeros(*shape, 1, dtype=torch.bool, device=device)
    following = {
        "observation": torch.randn(*shape, OBS, device=device),
        "action": torch.rand(*shape, ACT, device=device) * 2 - 1,
        "reward": -torch.ones(*shape, 1, device=device),
        "done": ended,
        "terminated": ended,
    }
    return TensorDict(
        observation=torch.randn(*shape, OBS, device=device),
        action=torch.rand(*shape, ACT, device=device) * 2 - 1,
        next=TensorDict(following, batch_size=shape),
        batch_size=shape,
    )


def make_update(network, num_models, device):
    """One update of a flow, or of a stack of flows, on a fixed batch."""
    policy = FlowMatchingPolicy(VelocityMLP(OBS + ACT + 1, ACT, hidden_sizes=(4,)), ACT)
    returns = ReturnFlow(network, num_steps=10, loc=-50.0, scale=20.0)
    loss = EVORLoss(policy, returns, next_action="dataset").to(device)
    updater = SoftUpdate(loss, tau=0.005)
    optimizer = torch.optim.Adam(returns.parameters(), lr=3e-4, fused=True)
    batch = make_batch(*((num_models,) if num_models > 1 else ()), ROWS, device=device)

    def update():
        value, _ = loss.value_loss(batch)
        optimizer.zero_grad()
        (num_models * value).backward()
        optimizer.step()
        updater.step()

    return update


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("hidden_sizes", [(128, 128), (512, 512, 512, 512)])
@pytest.mark.parametrize("num_models", [5, 20])
@pytest.mark.parametrize("mode", ["in_turn", "stacked"])
def test_value_updates(benchmark, mode, num_models, hidden_sizes, device):
    options = {"hidden_sizes": hidden_sizes, "layer_norm": True, "device": device}
    features = OBS + ACT + 2
    if mode == "stacked":
        updates = [
            make_update(StackedVelocityMLP(num_models, features, **options), num_models, device)
        ]
    else:
        updates = [
            make_update(VelocityMLP(features, **options), 1, device) for _ in range(num_models)
        ]

    def update_all():
        for update in updates:
            update()
        if device == "cuda":
            torch.cuda.synchronize()

    rounds = 50 if device == "cuda" else 5
    benchmark.pedantic(update_all, rounds=rounds, warmup_rounds=2)
    benchmark.extra_info.update(
        model_updates_per_hour=round(3600 * num_models / benchmark.stats["median"]),
        device=torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        precision=torch.get_float32_matmul_precision(),
    )


if __name__ == "__main__":
    pytest.main([__file__, "-o", "addopts=", "-m", "not gpu"])

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate

RECIPE = Path(__file__).resolve().parents[1] / "sota-implementations" / "evor"
sys.path.insert(0, str(RECIPE))

import baselines  # noqa: E402

OBS, ACT = 3, 2


SIZES = baselines.Sizes(
    OBS,
    ACT,
    policy_hidden_sizes=(8, 4),
    value_hidden_sizes=(6,),
    policy_activation="relu",
    value_activation="silu",
    num_steps=2,
    loc=-5.0,
    scale=2.0,
)


def make(method, gamma=0.9, **kwargs):
    actor = {"num_candidates": 3, "num_samples": 2}
    options = {"num_candidates": 4, "actor": actor, **kwargs}
    loss, actor = baselines.make_baseline(method, SIZES, **options)
    loss.make_value_estimator(gamma=gamma)
    return loss, actor


def make_batch(rows, steps=3):
    ended = torch.rand(rows, 1) < 0.3
    return TensorDict(
        observation=torch.randn(rows, OBS),
        action=torch.rand(rows, ACT) * 2 - 1,
        steps_to_next_obs=torch.full((rows, 1), steps),
        next=TensorDict(
            observation=torch.randn(rows, OBS),
            action=torch.rand(rows, ACT) * 2 - 1,
            reward=torch.randn(rows, 1),
            done=ended,
            terminated=ended,
            batch_size=[rows],
        ),
        batch_size=[rows],
    )


def total(losses):
    return sum(value for name, value in losses.items() if name.startswith("loss"))


@pytest.mark.parametrize("method", baselines.METHODS)
def test_policies_and_values_have_their_own_sizes(method):
    loss, _ = make(method)
    widths = {"actor": set(), "value": set()}
    for name, parameter in loss.named_parameters():
        if "bias" in name:
            widths["actor" if name.startswith("actor") else "value"].add(parameter.shape[-1])
    assert widths["actor"] == {8, 4, ACT}
    assert widths["value"] - {1, SIZES.num_atoms} == (set() if method == "bc" else {6})


@pytest.mark.parametrize("method", baselines.METHODS)
def test_trains_and_acts(method):
    loss, actor = make(method)
    updater = None if method == "bc" else SoftUpdate(loss, tau=0.1)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    data = TensorDict(observation=torch.randn(5, OBS), batch_size=[5])
    with set_exploration_type(ExplorationType.RANDOM), torch.no_grad():
        torch.manual_seed(0)
        before = actor(data.clone())["action"]
    assert before.shape == (5, ACT) and (before.abs() <= 1).all()
    trained = {id(parameter) for parameter in loss.parameters()}
    assert all(id(parameter) in trained for parameter in actor.parameters())
    for _ in range(3):
        value = total(loss(make_batch(6)))
        optimizer.zero_grad()
        value.backward()
        assert all(parameter.grad is not None for parameter in loss.parameters())
        optimizer.step()
        if updater is not None:
            updater.step()
    with set_exploration_type(ExplorationType.RANDOM), torch.no_grad():
        torch.manual_seed(0)
        assert not actor(data.clone())["action"].equal(before)


def test_iql_reads_the_number_of_steps():
    losses = {}
    for steps in (1, 5):
        torch.manual_seed(0)
        loss, _ = make("iql", gamma=0.5)
        SoftUpdate(loss, tau=0.1)
        torch.manual_seed(1)
        batch = make_batch(6, steps)
        losses[steps] = loss(batch)["loss_qvalue"]
        value = loss.value_network(batch["next"].copy())["state_value"]
        target = batch["next", "reward"] + 0.5**steps * value * ~batch["next", "terminated"]
        expected = 0.0
        for member in range(2):
            params = loss.qvalue_network_params[member]
            with params.to_module(loss.qvalue_network):
                qvalue = loss.qvalue_network(batch.copy())["state_action_value"]
            expected += (qvalue - target).square().mean()
        torch.testing.assert_close(losses[steps], expected)
    assert losses[1] != losses[5]


def test_bc_needs_no_rewards():
    loss, _ = make("bc")
    assert loss.in_keys == ["observation", "action"]
    loss(make_batch(4).select(*loss.in_keys))["loss_actor"].backward()


def test_bad_input():
    with pytest.raises(ValueError, match="method must be one of"):
        make("sac")
    with pytest.raises(ValueError, match="expectile"):
        make("iql", expectile=1.0)
    with pytest.raises(ValueError, match="temperature"):
        make("iql", temperature=-1.0)


if __name__ == "__main__":
    pytest.main([__file__, "-q"])

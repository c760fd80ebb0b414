# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.objectives import SoftUpdate

from torchrl_evor import (
    EVORActor,
    FlowMatchingPolicy,
    QCLoss,
    QuantileCritic,
    ScalarCritic,
    StackedVelocityMLP,
    VelocityMLP,
)

OBS, ACT, CHUNK, STEPS = 3, 2, 5, 4


def make_networks(chunk=CHUNK, dtype=torch.float64):
    size = chunk * ACT
    policy = FlowMatchingPolicy(
        VelocityMLP(OBS + size + 1, size, hidden_sizes=(8,), dtype=dtype), size, num_steps=STEPS
    )
    stack = StackedVelocityMLP(2, OBS + size, hidden_sizes=(8,), layer_norm=True, dtype=dtype)
    return policy, ScalarCritic(stack, num_critics=2).to(dtype)


def make_loss(chunk=CHUNK, gamma=0.9, dtype=torch.float64, **kwargs):
    loss = QCLoss(*make_networks(chunk, dtype), **kwargs).make_value_estimator(gamma=gamma)
    SoftUpdate(loss, tau=0.1)
    # Targets apart from the online critic, as they are in the middle of training.
    with torch.no_grad():
        for leaf in loss.target_qvalue_network_params.values(True, True):
            if leaf.ndim > 1:
                leaf += 0.5 * torch.randn_like(leaf)
    return loss


def make_batch(rows, chunk=CHUNK, dtype=torch.float64):
    terminated = torch.rand(rows, 1) < 0.4
    steps = torch.where(terminated, torch.randint(1, chunk + 1, (rows, 1)), chunk)
    return TensorDict(
        observation=torch.randn(rows, OBS, dtype=dtype),
        action=torch.rand(rows, chunk * ACT, dtype=dtype) * 2 - 1,
        steps_to_next_obs=steps,
        next=TensorDict(
            observation=torch.randn(rows, OBS, dtype=dtype),
            reward=torch.randn(rows, 1, dtype=dtype),
            done=terminated | (torch.rand(rows, 1) < 0.3),
            terminated=terminated,
            batch_size=[rows],
        ),
        batch_size=[rows],
    )


def slow_loss(loss, batch, noise, gamma):
    """Row by row and network by network, from the parameters."""
    policy = loss.actor_network.module
    online = StackedVelocityMLP(2, OBS + CHUNK * ACT, hidden_sizes=(8,), layer_norm=True).double()
    target = StackedVelocityMLP(2, OBS + CHUNK * ACT, hidden_sizes=(8,), layer_norm=True).double()
    for stack, params in (
        (online, loss.qvalue_network_params),
        (target, loss.target_qvalue_network_params),
    ):
        state = params.get(("network", "net")).flatten_keys(".").data.to_dict()
        stack.net.load_state_dict(state)
    online, target = online.unstack(), target.unstack()
    losses = []
    for row in range(len(batch)):
        following = batch["next", "observation"][row]
        best, best_value = None, -float("inf")
        for start in noise[row]:
            action = start
            for step in range(STEPS):
                time = torch.full((1,), step / STEPS, dtype=torch.float64)
                action = action + policy.velocity_network(following, action, time) / STEPS
            action = action.clamp(-1, 1)
            value = (online[0](following, action) + online[1](following, action)).item() / 2
            if value > best_value:
                best, best_value = action, value
        future = (target[0](following, best) + target[1](following, best)).item() / 2
        steps = batch["steps_to_next_obs"][row].item()
        backup = batch["next", "reward"][row].item()
        if not batch["next", "terminated"][row]:
            backup += gamma**steps * future
        values = [q(batch["observation"][row], batch["action"][row]).item() for q in online]
        losses.append(sum((value - backup) ** 2 for value in values) / 2)
    return torch.tensor(losses, dtype=torch.float64)


class TestAgainstASlowLoop:
    def test_qvalue_loss(self, monkeypatch):
        loss, batch = make_loss(num_candidates=6, reduction="none"), make_batch(7)
        noise = torch.randn(7, 6, CHUNK * ACT, dtype=torch.float64)
        # The candidates' noise is the only draw.
        monkeypatch.setattr(torch, "randn", lambda size, **kwargs: noise.reshape(size))
        actual, metadata = loss.qvalue_loss(batch)
        torch.testing.assert_close(actual, slow_loss(loss, batch, noise, gamma=0.9))
        assert metadata["td_error"].shape == (7,)

    def test_online_chooses_and_target_values(self):
        """Two candidates, on which the online and the target critic disagree."""
        loss = QCLoss(
            FlowMatchingPolicy(Alternating(), 1, num_steps=1),
            ScalarCritic(Linear()),
            num_candidates=2,
        ).make_value_estimator(gamma=0.5)
        SoftUpdate(loss, tau=0.1)
        with torch.no_grad():
            loss.target_qvalue_network_params["network", "gain"].fill_(-10.0)
        batch = TensorDict(
            observation=torch.zeros(1, 1),
            action=torch.zeros(1, 1),
            next=TensorDict(
                observation=torch.zeros(1, 1),
                reward=torch.full((1, 1), 3.0),
                done=torch.zeros(1, 1, dtype=torch.bool),
                terminated=torch.zeros(1, 1, dtype=torch.bool),
            ),
            batch_size=[1],
        )
        values, _ = loss.compute_target(batch)
        # The online gain 1 prefers the action 1 to -1; the target gives it -10.
        assert values.item() == 3.0 + 0.5 * -10.0


class Alternating(nn.Module):
    """Field whose one Euler step leads to -1 for the first candidate and 1 for the second."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, inputs):
        ends = torch.tensor([[-1.0], [1.0]])
        return ends - inputs[..., 1:2] + self.offset


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        return self.gain * inputs[..., -1:]


class TestContracts:
    @pytest.mark.parametrize("chunk", [1, CHUNK])
    def test_each_loss_reaches_its_own_network(self, chunk):
        loss, batch = make_loss(chunk, num_candidates=4), make_batch(6, chunk)
        losses = loss(batch)
        assert list(losses.keys()) == ["loss_actor", "loss_qvalue", "value_target"]
        for name, other in (("actor", "qvalue"), ("qvalue", "actor")):
            loss.zero_grad()
            losses[f"loss_{name}"].backward(retain_graph=True)
            for parameter in loss.get_submodule(f"{name}_network_params").parameters():
                assert parameter.grad is not None and parameter.grad.any()
            for parameter in loss.get_submodule(f"{other}_network_params").parameters():
                assert parameter.grad is None or not parameter.grad.any()
        targets = loss.target_qvalue_network_params.values(True, True)
        assert not any(leaf.requires_grad for leaf in targets)

    def test_does_not_read_the_next_action(self):
        loss = make_loss()
        assert ("next", "action") not in loss.in_keys
        loss(make_batch(3).select(*loss.in_keys, "steps_to_next_obs"))

    @pytest.mark.parametrize("batch", [(), (0,), (2, 3)])
    def test_batch_shapes(self, batch):
        data = make_batch(6)[: max(1, torch.Size(batch).numel())]
        data = data[0] if not batch else data[: torch.Size(batch).numel()].reshape(batch)
        losses = make_loss(reduction="none", num_candidates=3)(data)
        assert losses["loss_qvalue"].shape == losses["loss_actor"].shape == batch

    def test_more_candidates_raise_the_target(self):
        """The best of more candidates, by a critic that is its own target."""
        batch, targets = make_batch(64), []
        for num_candidates in (1, 4, 32):
            torch.manual_seed(3)
            loss = QCLoss(*make_networks(), num_candidates=num_candidates, delay_qvalue=False)
            targets.append(loss.compute_target(batch)[0].mean().item())
        assert targets[0] < targets[1] < targets[2]

    def test_the_best_by_the_mean(self):
        """Of two actions with laws of one mean and another, not that of the highest atom."""

        class Fork(nn.Module):
            def forward(self, inputs):
                wide, narrow = torch.tensor([-9.0, 9.0]), torch.tensor([1.0, 2.0])
                return torch.where(inputs[..., -1:] > 0, wide, narrow)

        policy = FlowMatchingPolicy(nn.Linear(OBS + 1 + 1, 1), 1)
        loss = QCLoss(policy, QuantileCritic(Fork(), num_quantiles=2), num_candidates=32)
        batch = make_batch(8, chunk=1).float()
        assert (loss._next_action(batch) <= 0).all()

    def test_compiled_equals_eager(self):
        loss, batch = make_loss(num_candidates=3), make_batch(4)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for seed in range(2):
            torch.manual_seed(seed)
            expected = loss(batch.clone())
            torch.manual_seed(seed)
            actual = compiled(batch.clone())
            for key in ("loss_actor", "loss_qvalue"):
                torch.testing.assert_close(actual[key], expected[key])

    def test_actor_over_chunks(self):
        policy, critic = make_networks()
        actor = EVORActor(policy, critic, num_candidates=4, return_candidates=True)
        observation = torch.randn(3, OBS, dtype=torch.float64)
        data = actor(TensorDict(observation=observation, batch_size=[3]))
        assert data["action"].shape == (3, CHUNK * ACT)
        best = data["candidate_values"].max(-1, keepdim=True).values
        torch.testing.assert_close(data["state_action_value"], best)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="num_candidates"):
            QCLoss(*make_networks(), num_candidates=0)
        with pytest.raises(TypeError, match="qvalue_network must be a Critic"):
            QCLoss(make_networks()[0], nn.Linear(2, 1))


class TestLearns:
    @pytest.mark.slow
    def test_prefers_the_better_arm(self):
        """One state; the data take both arms, and the reward is the first coordinate."""
        torch.manual_seed(0)
        policy = FlowMatchingPolicy(VelocityMLP(1 + 1 + 1, 1, hidden_sizes=(32, 32)), 1, 10)
        critic = ScalarCritic(
            StackedVelocityMLP(2, 2, hidden_sizes=(32, 32), layer_norm=True), num_critics=2
        )
        loss = QCLoss(policy, critic, num_candidates=8).make_value_estimator(gamma=0.5)
        updater = SoftUpdate(loss, tau=0.05)
        optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3)
        for _ in range(600):
            action = 0.5 * torch.randint(2, (128, 1)) * 2 - 0.5
            ended = torch.zeros(128, 1, dtype=torch.bool)
            following = TensorDict(
                observation=torch.zeros(128, 1), reward=action, done=ended, terminated=ended
            )
            batch = TensorDict(observation=torch.zeros(128, 1), action=action, next=following)
            losses = loss(batch)
            optimizer.zero_grad()
            (losses["loss_actor"] + losses["loss_qvalue"]).backward()
            optimizer.step()
            updater.step()
        actor = EVORActor(policy, critic, num_candidates=16)
        data = actor(TensorDict(observation=torch.zeros(50, 1), batch_size=[50]))
        assert (data["action"] - 0.5).abs().mean() < 0.15
        # Always the better arm: 0.5 / (1 - 0.5); following the data would be 0.5 less.
        observation, arm = torch.zeros(1, 1), torch.full((1, 1), 0.5)
        assert critic.q_star(observation, arm, 1.0).item() == pytest.approx(1.0, abs=0.15)


if __name__ == "__main__":
    pytest.main([__file__, "-q"])

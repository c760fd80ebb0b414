# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What EVORLoss computes: numbers by hand, closed-form laws, a random walk."""

from __future__ import annotations

import pytest
import torch
from _evor_cases import NEXT_ACTIONS, fit_value
from _known_laws import Chain, GaussianReturns
from tensordict import TensorDict
from torch import nn
from torchrl.objectives import SoftUpdate

from torchrl_evor import EVORLoss, FlowMatchingPolicy, ReturnFlow, VelocityMLP
from torchrl_evor.modules.functional import stratified_normal


class TestExactLaw:
    """The network is the closed-form field of Gaussian laws: nothing is left to learn."""

    def batch(self, gamma, size=256):
        """Laws with ``Z = reward + discount * Z'``, for all kinds of transitions."""
        steps = torch.tensor([1, 2, 7, 300])[torch.randint(4, (size, 1))]
        terminated = torch.rand(size, 1) < 0.25
        discount = gamma**steps * ~terminated
        reward, action = torch.randn(2, size, 1)
        following = torch.cat([10 * torch.randn(size, 1), 0.1 + 5 * torch.rand(size, 1)], -1)
        observation = discount * following
        observation[:, :1] += reward
        return TensorDict(
            observation=observation,
            action=action,
            steps_to_next_obs=steps,
            next=TensorDict(
                observation=following,
                action=-action,
                reward=reward,
                done=terminated | (torch.rand(size, 1) < 0.25),
                terminated=terminated,
            ),
            batch_size=[size],
        )

    def td_error(self, gamma, loc=0.0, scale=1.0, **kwargs):
        """Largest absolute error of the public loss, over the batch."""
        policy = FlowMatchingPolicy(VelocityMLP(4, 1, hidden_sizes=(4,)), 1)
        returns = ReturnFlow(GaussianReturns(loc, scale), loc=loc, scale=scale)
        loss = EVORLoss(policy, returns, **kwargs).make_value_estimator(gamma=gamma)
        if kwargs.get("delay_value", True):
            SoftUpdate(loss, tau=0.1)
        batch = self.batch(gamma)
        losses = loss(batch)
        assert losses["loss_value"].item() == pytest.approx(
            batch["td_error"].square().mean().item(), abs=1e-30
        )
        return batch["td_error"].max().item()

    @pytest.fixture(autouse=True)
    def float64(self):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(before)

    @pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9, 0.99, 0.9999, 1.0])
    @pytest.mark.parametrize("loc,scale", [(0.0, 1.0), (-50.0, 20.0)])
    def test_bellman_is_exact(self, gamma, loc, scale):
        assert self.td_error(gamma, loc, scale) < 1e-10

    @pytest.mark.parametrize("next_action", NEXT_ACTIONS)
    @pytest.mark.parametrize("delay_value", [True, False])
    def test_bellman_is_exact_for_every_option(self, next_action, delay_value):
        assert self.td_error(0.99, next_action=next_action, delay_value=delay_value) < 1e-10

    @pytest.mark.parametrize("td_target", ["sample", "coupled", "velocity"])
    def test_the_others_are_not(self, td_target):
        assert self.td_error(0.9, td_target=td_target) > 0.1


class TestByHand:
    """Constant velocities and fixed draws, so that every number can be done on paper."""

    @pytest.fixture(autouse=True)
    def draws(self, monkeypatch):
        noises = iter([1.0, 1.0, 0.0])  # of the policy; of the return and the next return
        monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, next(noises)))
        monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.5))

    def loss(self, gamma=0.5, **kwargs):
        networks = [nn.Linear(2 + 2 + 1, 2), nn.Linear(2 + 2 + 2, 1)]
        for network, bias in zip(networks, (0.0, 1.0)):
            network.weight.data.zero_()
            network.bias.data.fill_(bias)
        policy = FlowMatchingPolicy(networks[0], 2)
        returns = ReturnFlow(networks[1], loc=1.0, scale=2.0)
        loss = EVORLoss(policy, returns, next_action="dataset", **kwargs)
        loss.make_value_estimator(gamma=gamma)
        SoftUpdate(loss, tau=0.1)
        # The target network's velocity is 3: from the next noise 0 to z' = 3.
        loss.target_value_network_params["velocity_network", "bias"].fill_(3.0)
        return loss

    def batch(self, reward=4.5, terminated=False, **entries):
        flag = torch.tensor([[terminated]])
        following = TensorDict(
            observation=torch.zeros(1, 2),
            action=torch.zeros(1, 2),
            reward=torch.tensor([[reward]]),  # (4.5 - 0.5 * 1) / 2 = 2 in z units
            done=flag,
            terminated=flag,
        )
        action = torch.tensor([[0.5, -0.5]])
        return TensorDict(
            observation=torch.zeros(1, 2), action=action, next=following, batch_size=[1], **entries
        )

    def test_actor_loss(self):
        # velocity 0 against a - noise = (-0.5, -1.5)
        assert self.loss()(self.batch())["loss_actor"].item() == 0.25 + 2.25

    @pytest.mark.parametrize(
        "td_target,target",
        [
            ("sample", 2.5),  # 2 + 0.5 * 3 - 1
            ("velocity", 3.5),  # 2 + 0.5 * 3
            ("coupled", 3.0),  # 2 + 0.5 * 3 - 0.5 * 1
            ("bellman", 19 / 6),  # 2 - 0.5 * 5/3 + (0.5 / 0.75) * 3
        ],
    )
    def test_value_loss(self, td_target, target):
        batch = self.batch()
        losses = self.loss(td_target=td_target)(batch)
        assert batch["td_error"].tolist() == pytest.approx([target - 1])  # online velocity 1
        assert losses["loss_value"].item() == pytest.approx((target - 1) ** 2)
        # z_t is 2.25 for all; the path leads on to 2.25 + 0.5 * target, in reward units:
        assert losses["value_target"].item() == pytest.approx(1 + 2 * (2.25 + 0.5 * target))

    def test_terminal(self):
        batch = self.batch(reward=5.0, terminated=True)  # (5 - 1 * 1) / 2 = 2
        self.loss()(batch)
        assert batch["td_error"].tolist() == [0.0]  # reward - noise = 1 = online velocity

    def test_n_step(self):
        batch = self.batch(steps_to_next_obs=torch.tensor([[2]]))
        self.loss(gamma=0.5**0.5)(batch)
        assert batch["td_error"].tolist() == pytest.approx([19 / 6 - 1])

    def test_improved_takes_the_best_candidate(self):
        """The reward-to-go grows with the first action; the choice must too."""
        loss = self.loss()
        loss.next_action, loss.num_candidates = "improved", 64
        loss.target_value_network_params["velocity_network", "weight"][0, 2] = 1.0
        chosen = loss._next_action(self.batch().expand(50).contiguous())[:, 0]
        assert (chosen > 0.9).float().mean() > 0.9  # clipped at 1; P(all < 0.9) is tiny
        loss.tau_q = 1e6  # hardly any preference is left
        drawn = loss._next_action(self.batch().expand(50).contiguous())[:, 0]
        assert (drawn > 0.9).float().mean() < 0.5


class TestChain:
    """A random walk whose returns are known: what each target learns of them."""

    def distance(self, td_target, updates=4000):
        """Mean Wasserstein-1 distance, and the ratio of spreads, over states and actions."""
        chain = Chain()
        policy = FlowMatchingPolicy(VelocityMLP(chain.length + 2, 1, hidden_sizes=(8,)), 1)
        network = VelocityMLP(chain.length + 1 + 2, hidden_sizes=(64, 64))
        returns = ReturnFlow(network, num_steps=10, loc=-3.0, scale=1.5)
        loss = EVORLoss(policy, returns, td_target=td_target, next_action="dataset")
        loss.make_value_estimator(gamma=chain.gamma)
        fit_value(loss, lambda: chain.sample(256), updates=updates, lr=2e-3, tau=0.02)
        errors, spreads = [], []
        probabilities = (torch.arange(64) + 0.5) / 64
        for state in range(chain.length):
            for action in (0, 1):
                index = torch.tensor(state), torch.tensor(action)
                learnt = returns.quantiles(*chain.encode(*index), 64).detach()
                exact = chain.quantiles(state, action, probabilities)
                errors.append((learnt - exact).abs().mean())
                spreads.append((learnt.std(), exact.std()))
        learnt, exact = torch.tensor(spreads).sum(0)
        return torch.stack(errors).mean().item(), (learnt / exact).item()

    def test_exact_law(self):
        """The reference against Monte Carlo, so that the test itself stands on firm ground."""
        chain, state, action = Chain(), 1, 0
        size, returns = 20_000, torch.zeros(20_000)
        position, discount = torch.full((size,), state - 1).clamp_min(0), torch.ones(size)
        returns -= 1
        for _ in range(200):
            discount = chain.gamma * discount * (position < chain.length)
            returns -= discount
            step = torch.where(torch.rand(size) < chain.right, 1, -1)
            position = torch.where(
                position < chain.length, (position + step).clamp_min(0), position
            )
        probabilities = stratified_normal(9).erf() / 2 + 0.5
        exact = chain.quantiles(state, action, probabilities).float()
        torch.testing.assert_close(returns.quantile(probabilities), exact, atol=0.05, rtol=0)

    def test_learns_the_law(self):
        distance, spread = self.distance("bellman")  # measured: 0.12 and 0.90
        assert distance < 0.16 and 0.8 < spread < 1.1

    @pytest.mark.slow
    def test_sample_loses_spread(self):
        distance, spread = self.distance("sample")  # measured: 0.19 and 0.76
        assert distance < 0.25 and spread < 0.85

    @pytest.mark.slow
    def test_coupled_is_close(self):
        assert self.distance("coupled")[0] < 0.2  # measured: 0.14

    @pytest.mark.slow
    def test_velocity_learns_another_law(self):
        distance, spread = self.distance("velocity")  # measured: 1.03 and 2.9
        assert distance > 0.7 and spread > 2


if __name__ == "__main__":
    pytest.main([__file__])

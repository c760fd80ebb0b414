# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from torchrl_evor import (
    CategoricalCritic,
    EVORActor,
    FlowMatchingPolicy,
    HLGaussCritic,
    QuantileCritic,
    ScalarCritic,
    StackedVelocityMLP,
    VelocityMLP,
)
from torchrl_evor.modules.functional import log_mean_exp

INF = float("inf")
OBS, ACT = 3, 2


class Constant(nn.Module):
    """Network that returns the same features for every row."""

    def __init__(self, *features):
        super().__init__()
        self.features = nn.Parameter(torch.tensor(features, dtype=torch.float64))

    def forward(self, inputs):
        return self.features.expand(*inputs.shape[:-1], -1)


class ConstantStack(nn.Module):
    """Stack whose model m returns row m of the features."""

    def __init__(self, features):
        super().__init__()
        self.features = nn.Parameter(torch.tensor(features, dtype=torch.float64))
        self.num_models = len(features)

    def forward(self, inputs):
        features = self.features.reshape(self.num_models, *(1,) * (inputs.ndim - 2), -1)
        return features.expand(*inputs.shape[:-1], -1)


def inputs(*batch):
    return torch.zeros(*batch, OBS, dtype=torch.float64), torch.zeros(
        *batch, ACT, dtype=torch.float64
    )


def make_critic(kind, **kwargs):
    network = VelocityMLP(OBS + ACT, kwargs.pop("features", 5), hidden_sizes=(8,))
    if kind is ScalarCritic:
        network = VelocityMLP(OBS + ACT, 1, hidden_sizes=(8,))
    elif kind is QuantileCritic:
        kwargs["num_quantiles"] = 5
    else:
        kwargs.update(low=-2.0, high=2.0, num_atoms=5)
    return kind(network, **kwargs)


KINDS = [ScalarCritic, CategoricalCritic, HLGaussCritic, QuantileCritic]


class TestWeightedSoftMaximum:
    def test_top_node_of_hardly_any_weight(self):
        # log(1 * e^0 + e^-50 * e^100) = 50, where the top node alone would say 100.
        values, log_weights = torch.tensor([0.0, 100.0]), torch.tensor([0.0, -50.0])
        assert log_mean_exp(values, 1.0, log_weights=log_weights).item() == pytest.approx(50.0)
        log_weights = torch.tensor([0.0, -500.0])
        assert log_mean_exp(values, 1.0, log_weights=log_weights).item() == pytest.approx(0.0)

    @pytest.mark.parametrize("tau", [1e-3, 0.1, 1.0, 10.0, 1e4])
    def test_agrees_with_logsumexp(self, tau):
        values = 5 * torch.randn(9, 16, dtype=torch.float64)
        log_weights = (10 * torch.randn(9, 16, dtype=torch.float64)).log_softmax(-1)
        expected = tau * torch.logsumexp(values / tau + log_weights, -1)
        torch.testing.assert_close(
            log_mean_exp(values, tau, log_weights=log_weights), expected, atol=1e-10, rtol=1e-10
        )


class TestEveryCritic:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("batch", [(), (0,), (4,), (2, 3)])
    def test_shapes_and_broadcasting(self, kind, batch):
        critic = make_critic(kind)
        observation, action = torch.randn(*batch, 1, OBS), torch.randn(*batch, 6, ACT)
        values = critic.q_star(observation, action, 0.5, num_samples=3, nodes="random")
        assert values.shape == (*batch, 6)
        for index in range(6):
            torch.testing.assert_close(
                values[..., index],
                critic.q_star(observation[..., 0, :], action[..., index, :], 0.5),
            )

    @pytest.mark.parametrize("kind", KINDS)
    def test_temperatures(self, kind):
        critic = make_critic(kind, loc=-3.0, scale=2.0)
        observation, action = torch.randn(7, OBS), torch.randn(7, ACT)
        values = [critic.q_star(observation, action, tau) for tau in (0.0, 0.1, 1.0, 10.0, INF)]
        drops = torch.stack(values).diff(dim=0)
        if kind in (ScalarCritic, HLGaussCritic):  # which know the mean alone
            assert (drops == 0).all()
        else:
            assert (drops < 0).all()
        law, log_weights = critic.law(critic.outputs(observation, action))
        weights = 1 / law.shape[-1] if log_weights is None else log_weights.exp()
        torch.testing.assert_close(values[-1], (weights * law).sum(-1))
        with pytest.raises(ValueError, match="tau"):
            critic.q_star(observation, action, -1.0)

    @pytest.mark.parametrize("kind", KINDS)
    def test_writes_the_mean(self, kind):
        critic = make_critic(kind, loc=5.0, scale=3.0)
        observation, action = torch.randn(4, OBS), torch.randn(4, ACT)
        data = critic(TensorDict(observation=observation, action=action, batch_size=[4]))
        torch.testing.assert_close(
            data["state_action_value"], critic.q_star(observation, action, INF).unsqueeze(-1)
        )

    @pytest.mark.parametrize("kind", KINDS)
    def test_units(self, kind):
        """The same outputs in other units: values follow, distances do not change."""
        torch.manual_seed(1)
        one = make_critic(kind)
        other = make_critic(kind, loc=-50.0, scale=20.0)
        other.load_state_dict({**one.state_dict(), "loc": other.loc, "scale": other.scale})
        observation, action = torch.randn(4, OBS), torch.randn(4, ACT)
        outputs, target = one.outputs(observation, action), torch.randn(4, 6)
        torch.testing.assert_close(
            other.q_star(observation, action, 20 * 0.7),
            -50 + 20 * one.q_star(observation, action, 0.7),
        )
        torch.testing.assert_close(
            other.distance(outputs, -50 + 20 * target),
            one.distance(outputs, target),
            atol=1e-4,
            rtol=1e-4,
        )

    @pytest.mark.parametrize("kind", KINDS)
    def test_equal_weights_are_the_default(self, kind):
        critic = make_critic(kind)
        outputs = critic.outputs(torch.randn(4, OBS), torch.randn(4, ACT))
        target = torch.randn(4, 6)
        log_weights = torch.full((4, 6), -math.log(6))
        torch.testing.assert_close(
            critic.distance(outputs, target), critic.distance(outputs, target, log_weights)
        )
        # A node of no weight changes nothing.
        log_weights = torch.tensor([0.0, -INF]).expand(4, 2)
        torch.testing.assert_close(
            critic.distance(outputs, target[:, :2], log_weights),
            critic.distance(outputs, target[:, :1]),
        )

    @pytest.mark.parametrize("kind", KINDS)
    def test_serves_the_actor(self, kind):
        policy = FlowMatchingPolicy(VelocityMLP(OBS + ACT + 1, ACT, hidden_sizes=(4,)), ACT, 2)
        critic = make_critic(kind)
        options = {"tau_r": 1.0, "precision": "fp16", "return_candidates": True}
        actor = EVORActor(policy, critic, num_candidates=5, **options)
        data = actor(TensorDict(observation=torch.randn(3, OBS), batch_size=[3]))
        values = critic.q_star(data["observation"].unsqueeze(-2), data["candidates"], 1.0)
        index = values.argmax(-1)[:, None, None]
        assert data["action"].equal(data["candidates"].take_along_dim(index, 1).squeeze(1))

    def test_bad_input(self):
        critic = ScalarCritic(nn.Linear(OBS + ACT, 1))
        with pytest.raises(ValueError, match="precision must be one of .*, got 'fp8'"):
            candidates = torch.zeros(4, 3, ACT)
            critic.select(torch.zeros(4, OBS), candidates, tau_r=1.0, precision="fp8")
        critic = ScalarCritic(nn.Linear(OBS + ACT, 2))
        with pytest.raises(ValueError, match="network must return 1 features"):
            critic.outputs(torch.zeros(4, OBS), torch.zeros(4, ACT))
        with pytest.raises(ValueError, match="num_critics=2"):
            ScalarCritic(nn.Linear(OBS + ACT, 1), num_critics=2)
        with pytest.raises(ValueError, match="num_critics=2"):
            ScalarCritic(StackedVelocityMLP(3, OBS + ACT, hidden_sizes=(4,)), num_critics=2)
        network = nn.Linear(OBS + ACT, 5)
        with pytest.raises(ValueError, match="low must be below high"):
            CategoricalCritic(network, low=1.0, high=1.0)
        with pytest.raises(ValueError, match="both finite, got -inf and inf"):
            CategoricalCritic(network, low=-float("inf"), high=float("inf"))
        with pytest.raises(ValueError, match="num_atoms must be at least 2"):
            CategoricalCritic(network, low=0.0, high=1.0, num_atoms=1)
        with pytest.raises(ValueError, match="blur must be positive"):
            HLGaussCritic(network, low=0.0, high=1.0, blur=0.0)
        with pytest.raises(ValueError, match="blur must be positive and finite, got inf"):
            HLGaussCritic(network, low=0.0, high=1.0, blur=float("inf"))
        with pytest.raises(ValueError, match="kappa"):
            QuantileCritic(network, kappa=-0.1)


class TestEnsembles:
    def test_scalar_by_hand(self):
        critic = ScalarCritic(ConstantStack([[1.0], [3.0]]), num_critics=2, loc=10.0, scale=2.0)
        observation, action = inputs(4)
        assert critic.q_star(observation, action, 1.0).tolist() == [14.0] * 4  # 10 + 2 * 2
        # The target's mean 12 is z = 1: squares 0 and 4, mean 2.
        values = torch.tensor([[10.0, 14.0]], dtype=torch.float64).expand(4, 2)
        distance = critic.distance(critic.outputs(observation, action), values)
        assert distance.tolist() == [2.0] * 4

    def test_categorical_averages_masses(self):
        logits = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64).log()
        critic = CategoricalCritic(
            ConstantStack(logits.tolist()), low=0.0, high=1.0, num_atoms=2, num_critics=2
        )
        _, log_masses = critic.law(critic.outputs(*inputs(1)))
        torch.testing.assert_close(
            log_masses.exp(), torch.tensor([[0.6, 0.4]], dtype=torch.float64)
        )

    def test_members_are_separate_networks(self):
        stack = StackedVelocityMLP(2, OBS + ACT, 5, hidden_sizes=(8,), layer_norm=True)
        critic = QuantileCritic(stack, num_quantiles=5, num_critics=2)
        observation, action = torch.randn(4, OBS), torch.randn(4, ACT)
        outputs = critic.outputs(observation, action)
        for output, model in zip(outputs, stack.unstack(), strict=True):
            torch.testing.assert_close(output, model(observation, action))
        # Each member has its own gradient, as if it were alone.
        target = torch.randn(4, 5)
        critic.distance(outputs, target).sum().backward()
        single = QuantileCritic(stack.unstack()[1], num_quantiles=5)
        single.distance(single.outputs(observation, action), target).sum().backward()
        torch.testing.assert_close(
            2 * stack.net[0].weight.grad[1], single.network.net[0].weight.grad.mT
        )

    def test_ensembles_of_stacked_runs(self):
        stack = StackedVelocityMLP(6, OBS + ACT, hidden_sizes=(8,))
        critic = ScalarCritic(stack, num_critics=2)
        observation, action = torch.randn(3, 4, OBS), torch.randn(3, 4, ACT)
        outputs = critic.outputs(observation, action)
        assert outputs.shape == (2, 3, 4, 1)
        models = stack.unstack()
        for member in range(2):
            for run in range(3):
                torch.testing.assert_close(
                    outputs[member, run], models[3 * member + run](observation[run], action[run])
                )


class TestCategorical:
    def critic(self, *masses):
        network = Constant(*torch.tensor(masses, dtype=torch.float64).log().tolist())
        return CategoricalCritic(network, low=0.0, high=4.0, num_atoms=5).double()

    def test_projection_by_hand(self):
        critic = self.critic(0.2, 0.2, 0.2, 0.2, 0.2)
        z = torch.tensor([[1.25], [3.0], [-7.0], [9.0]], dtype=torch.float64)
        assert critic.project(z).tolist() == [
            [0, 0.75, 0.25, 0, 0],
            [0, 0, 0, 1, 0],
            [1, 0, 0, 0, 0],
            [0, 0, 0, 0, 1],
        ]
        z = torch.tensor([1.25, 3.5], dtype=torch.float64)
        log_weights = torch.tensor([0.2, 0.8], dtype=torch.float64).log()
        torch.testing.assert_close(
            critic.project(z, log_weights),
            torch.tensor([0.0, 0.15, 0.05, 0.4, 0.4], dtype=torch.float64),
        )

    def test_projection_equals_the_slow_loop(self):
        critic = CategoricalCritic(nn.Identity(), low=-1.0, high=2.0, num_atoms=7).double()
        atoms, spacing = critic.atoms.tolist(), 0.5
        z = 2 * torch.randn(5, 11, dtype=torch.float64)
        weights = torch.rand(5, 11, dtype=torch.float64)
        weights /= weights.sum(-1, keepdim=True)
        expected = torch.zeros(5, 7, dtype=torch.float64)
        for row in range(5):
            for node, weight in zip(z[row].tolist(), weights[row].tolist()):
                node = min(max(node, atoms[0]), atoms[-1])
                below = min(int((node - atoms[0]) / spacing), 5)
                share = (node - atoms[below]) / spacing
                expected[row, below] += weight * (1 - share)
                expected[row, below + 1] += weight * share
        torch.testing.assert_close(critic.project(z, weights.log()), expected)

    def test_projection_keeps_mass_and_mean(self):
        critic = self.critic(0.2, 0.2, 0.2, 0.2, 0.2)
        z = 4 * torch.rand(9, 17, dtype=torch.float64)
        masses = critic.project(z)
        torch.testing.assert_close(masses.sum(-1), torch.ones(9, dtype=torch.float64))
        torch.testing.assert_close((masses * critic.atoms).sum(-1), z.mean(-1))

    def test_cross_entropy_by_hand(self):
        critic = self.critic(0.1, 0.2, 0.4, 0.2, 0.1)
        target = torch.tensor([[1.25]], dtype=torch.float64)
        distance = critic.distance(critic.outputs(*inputs(1)), target)
        assert distance.item() == pytest.approx(-0.75 * math.log(0.2) - 0.25 * math.log(0.4))

    def test_q_star_by_hand(self):
        critic = self.critic(0.5, 1e-300, 1e-300, 1e-300, 0.5)
        for tau, value in ((INF, 2.0), (1.0, math.log(0.5 + 0.5 * math.exp(4))), (0.0, 4.0)):
            assert critic.q_star(*inputs(1), tau).item() == pytest.approx(value)


class TestHLGauss:
    def critic(self, **kwargs):
        return HLGaussCritic(
            Constant(*[0.0] * 5), low=0.0, high=4.0, num_atoms=5, **kwargs
        ).double()

    def test_histogram_by_hand(self):
        # Mean 2 of the nodes 1 and 3; bins of width 1, deviation 0.5: one bin is two of those.
        histogram = self.critic(blur=0.5).project(torch.tensor([1.0, 3.0], dtype=torch.float64))

        def below(deviations):
            return 0.5 * (1 + math.erf(deviations / math.sqrt(2)))

        total = below(5) - below(-5)
        expected = [(below(2 * k - 3) - below(2 * k - 5)) / total for k in range(5)]
        torch.testing.assert_close(histogram, torch.tensor(expected, dtype=torch.float64))

    def test_mean_of_the_histogram(self):
        critic = HLGaussCritic(nn.Identity(), low=-3.0, high=3.0, num_atoms=61).double()
        z = 4 * torch.rand(9, 1, dtype=torch.float64) - 2
        histogram = critic.project(z)
        mean = (histogram * critic.atoms).sum(-1)
        # Binning a Gaussian of 0.75 bins moves its mean by some 1e-5 of a bin.
        torch.testing.assert_close(mean, z.squeeze(-1), atol=2e-6, rtol=0)

    def test_beyond_the_range(self):
        histogram = self.critic().project(torch.tensor([[-1e3], [1e3]], dtype=torch.float64))
        assert histogram.isfinite().all()
        assert histogram[0].argmax() == 0 and histogram[1].argmax() == 4
        torch.testing.assert_close(histogram.sum(-1), torch.ones(2, dtype=torch.float64))


class TestQuantile:
    @pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0])
    def test_loss_equals_the_slow_loop(self, kappa):
        quantiles = torch.randn(4).tolist()
        critic = QuantileCritic(Constant(*quantiles), num_quantiles=4, kappa=kappa).double()
        target = torch.randn(6, dtype=torch.float64)
        weights = torch.rand(6, dtype=torch.float64)
        weights /= weights.sum()
        expected = 0.0
        for index, quantile in enumerate(quantiles):
            probability = (index + 0.5) / 4
            for node, weight in zip(target.tolist(), weights.tolist()):
                error = node - quantile
                slope = probability if error >= 0 else 1 - probability
                if abs(error) > kappa:
                    size = abs(error) - kappa / 2
                else:
                    size = error**2 / (2 * kappa)
                expected += weight * slope * size
        outputs = critic.outputs(*inputs(3))
        distance = critic.distance(outputs, target.expand(3, 6), weights.log().expand(3, 6))
        torch.testing.assert_close(distance, torch.full((3,), expected, dtype=torch.float64))

    def test_quantiles_of_the_target_are_the_minimum(self):
        # 300 nodes 0, ..., 299: quantiles 1/6, 1/2, 5/6 are 50, 150 and 250.
        target = torch.arange(300, dtype=torch.float64) + 0.5
        network = Constant(50.0, 150.0, 250.0)
        critic = QuantileCritic(network, num_quantiles=3, kappa=0.0, loc=0.0).double()
        critic.distance(critic.outputs(*inputs()), target).backward()
        torch.testing.assert_close(network.features.grad, torch.zeros_like(network.features))
        with torch.no_grad():
            network.features.copy_(torch.tensor([40.0, 160.0, 250.0]))
        network.features.grad = None
        critic.distance(critic.outputs(*inputs()), target).backward()
        # A quantile that is short by 10 of 300 nodes feels -10 / 300.
        expected = torch.tensor([-1 / 30, 1 / 30, 0.0], dtype=torch.float64)
        torch.testing.assert_close(network.features.grad, expected)

    def test_q_star_by_hand(self):
        critic = QuantileCritic(Constant(0.0, math.log(3)), num_quantiles=2, loc=1.0, scale=2.0)
        for tau, value in ((INF, math.log(3)), (2.0, 2 * math.log(2)), (0.0, 2 * math.log(3))):
            assert critic.q_star(*inputs(1), tau).item() == pytest.approx(1 + value)


if __name__ == "__main__":
    pytest.main([__file__, "-q"])

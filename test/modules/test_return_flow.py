# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import math

import pytest
import torch
from _known_laws import GaussianReturns, euler_gaussian_std
from tensordict import TensorDict
from tensordict.nn import set_skip_existing
from torch import nn
from torchrl_evor.triton_kernels import _checks

from torchrl_evor import ReturnFlow, ScalarCritic, VelocityMLP
from torchrl_evor.modules.functional import stratified_normal
from torchrl_evor.modules.models import return_model

INF = float("inf")


def gaussian_flow(num_steps=10, **kwargs):
    """Flow whose law is N(mean, std^2) of the observation (mean, std), in reward units."""
    units = {key: kwargs[key] for key in ("loc", "scale") if key in kwargs}
    return ReturnFlow(GaussianReturns(**units, dtype=torch.float64), num_steps, **kwargs)


def gauss_flow_of(std):
    """Flow, its input and the spread that ten Euler steps give to ``N(3, std^2)``."""
    return gaussian_flow(), states((3.0, std)), euler_gaussian_std(std, 10)


def states(*rows):
    observation = torch.tensor(rows, dtype=torch.float64)
    return observation, torch.zeros(*observation.shape[:-1], 1, dtype=torch.float64)


def mlp_flow(**kwargs):
    return ReturnFlow(VelocityMLP(3 + 2 + 2, hidden_sizes=(16,)), **kwargs)


class TestGaussianLaw:
    @pytest.mark.parametrize("num_steps", [1, 2, 10, 100])
    def test_quantiles_in_closed_form(self, num_steps):
        """Euler's own answer: mean + std_K * node, to rounding."""
        quantiles = gaussian_flow(num_steps).quantiles(*states((3.0, 2.0)), 7)
        spread = euler_gaussian_std(2.0, num_steps)
        expected = 3 + spread * stratified_normal(7, dtype=torch.float64)
        torch.testing.assert_close(quantiles, expected.unsqueeze(0), atol=1e-12, rtol=0)

    def test_quantiles_approach_the_law(self):
        errors = [abs(euler_gaussian_std(2.0, num_steps) - 2.0) for num_steps in (10, 100, 1000)]
        assert errors[0] > 5 * errors[1] > 25 * errors[2]
        quantiles = gaussian_flow(1000).quantiles(*states((3.0, 2.0)), 3)
        exact = 3 + 2 * stratified_normal(3, dtype=torch.float64)
        torch.testing.assert_close(quantiles[0], exact, atol=0.01, rtol=0)

    def test_samples_have_the_moments(self):
        samples = gaussian_flow().sample(*states((3.0, 2.0), (-50.0, 0.5)), 20_000)
        assert samples.shape == (2, 20_000)
        spread = torch.tensor([euler_gaussian_std(std, 10) for std in (2.0, 0.5)])
        mean = torch.tensor([3.0, -50.0])
        assert ((samples.mean(-1) - mean).abs() < 4 * spread / 20_000**0.5).all()
        assert ((samples.std(-1) / spread - 1).abs() < 0.03).all()

    @pytest.mark.parametrize("tau", [0.5, 2.0, 50.0])
    def test_q_star_of_a_gaussian(self, tau):
        """tau * log E exp(Z / tau) = mean + std^2 / (2 tau)."""
        flow, std = gaussian_flow(), 0.7
        spread = euler_gaussian_std(std, flow.num_steps)
        value = flow.q_star(*states((3.0, std)), tau, num_samples=4096)
        assert value.item() == pytest.approx(3 + spread**2 / (2 * tau), abs=5e-3)

    def test_q_star_limits(self):
        flow, rows = gaussian_flow(), states((3.0, 2.0), (-4.0, 1.0))
        mean = torch.tensor([3.0, -4.0], dtype=torch.float64)
        torch.testing.assert_close(flow.q_star(*rows, INF, 16), mean)
        quantiles = flow.quantiles(*rows, 16)
        torch.testing.assert_close(flow.q_star(*rows, 0.0, 16), quantiles[:, -1])
        assert flow.q_star(*rows, 0.0, 1).tolist() == pytest.approx([3.0, -4.0])

    def test_random_nodes(self):
        flow, rows = gaussian_flow(), states((3.0, 0.7))
        values = [flow.q_star(*rows, 2.0, 4096, nodes="random").item() for _ in range(2)]
        assert values[0] != values[1]
        expected = 3 + euler_gaussian_std(0.7, 10) ** 2 / 4
        assert values == pytest.approx([expected] * 2, abs=0.06)

    def test_stratified_nodes_beat_random_ones(self):
        flow, rows = gaussian_flow(), states(*[(3.0, 0.7)] * 200)
        exact = 3 + euler_gaussian_std(0.7, 10) ** 2 / 4
        errors = [
            (flow.q_star(*rows, 2.0, 8, nodes=nodes) - exact).square().mean().sqrt()
            for nodes in ("stratified", "random")
        ]
        assert 10 * errors[0] < errors[1]

    @pytest.mark.parametrize("tau", [0.3, 2.0, INF])
    def test_gauss_hermite_nodes_see_the_tail(self, tau):
        """16 weighted nodes are exact where 16 equal ones are far from it."""
        flow, rows, std = gauss_flow_of(0.7)
        exact = 3 + (0 if tau == INF else std**2 / (2 * tau))
        values = [
            flow.q_star(*rows, tau, 16, nodes).item() for nodes in ("gauss_hermite", "stratified")
        ]
        assert values[0] == pytest.approx(exact, abs=1e-9)
        assert tau > 1 or abs(values[1] - exact) > 0.05

    def test_midpoint_steps_are_of_second_order(self):
        """The spread of the law; Euler's is wrong by more with more evaluations."""
        errors = [
            abs(
                gaussian_flow(steps, solver=solver).quantiles(*states((0.0, 2.0)), 3)[0, 2]
                / stratified_normal(3, dtype=torch.float64)[2]
                - 2
            )
            for solver, steps in (("euler", 10), ("midpoint", 6), ("midpoint", 12))
        ]
        assert errors[1] < errors[0] / 5 and errors[2] < errors[1] / 2.5


class TestUnits:
    @pytest.mark.parametrize("loc,scale", [(-50.0, 20.0), (0.0, 0.1)])
    def test_law_is_in_reward_units(self, loc, scale):
        """The same law, seen by a network in other units."""
        rows = states((-47.0, 3.0 * scale))
        flow = gaussian_flow(loc=loc, scale=scale)
        spread = scale * euler_gaussian_std(3.0, 10)
        expected = -47 + spread * stratified_normal(5, dtype=torch.float64)
        torch.testing.assert_close(flow.quantiles(*rows, 5)[0], expected)

    def test_tau_is_in_reward_units(self):
        rows = states((-47.0, 30.0))
        value = gaussian_flow(loc=-50.0, scale=20.0).q_star(*rows, 100.0, 4096)
        spread = 20 * euler_gaussian_std(1.5, 10)
        assert value.item() == pytest.approx(-47 + spread**2 / 200, abs=0.02)

    def test_normalize_reward(self):
        """loc + scale * z = reward + discount * (loc + scale * z') for every z'."""
        flow = mlp_flow(loc=-50.0, scale=20.0)
        reward, discount, following = torch.randn(3, 8, 1)
        z = flow.normalize_reward(reward, discount) + discount * following
        expected = reward + discount * flow.denormalize(following)
        torch.testing.assert_close(flow.denormalize(z), expected)

    def test_set_normalization(self):
        flow = mlp_flow()
        assert (flow.loc.item(), flow.scale.item()) == (0.0, 1.0)
        buffer = flow.scale
        flow.set_normalization(-3, 2)
        assert flow.scale is buffer and (flow.loc.item(), flow.scale.item()) == (-3.0, 2.0)
        assert {"loc", "scale"} <= flow.state_dict().keys()

    @pytest.mark.parametrize(
        "loc,scale,name",
        [(INF, 1.0, "loc"), (float("nan"), 1.0, "loc"), (0.0, 0.0, "scale"), (0.0, -1.0, "scale"),
         (0.0, INF, "scale"), (0.0, float("nan"), "scale")],
    )  # fmt: skip
    def test_bad_normalization(self, loc, scale, name):
        with pytest.raises(ValueError, match=f"{name} must be"):
            mlp_flow(loc=loc, scale=scale)
        with pytest.raises(ValueError, match=f"{name} must be"):
            mlp_flow().set_normalization(loc, scale)


class TestSampling:
    def test_noise_broadcasts(self):
        flow, observation, action = mlp_flow(), torch.randn(2, 3, 3), torch.randn(2, 3, 2)
        shared = torch.randn(5)
        expected = flow.sample(observation, action, 5, shared.expand(2, 3, 5))
        torch.testing.assert_close(flow.sample(observation, action, 5, shared), expected)
        one = flow.sample(observation, action, 5, torch.zeros(2, 3, 1))
        torch.testing.assert_close(one, one[..., :1].expand(2, 3, 5))

    def test_observation_and_action_broadcast(self):
        """One observation and many candidates, without copies by the caller."""
        flow, observation, action = mlp_flow(), torch.randn(4, 1, 3), torch.randn(4, 6, 2)
        noise = torch.randn(5)
        expected = flow.sample(observation.expand(4, 6, 3), action, 5, noise)
        assert expected.shape == (4, 6, 5)
        torch.testing.assert_close(flow.sample(observation, action, 5, noise), expected)

    @pytest.mark.parametrize("batch", [(), (0,), (3,), (2, 3)])
    def test_shapes(self, batch):
        flow, observation, action = mlp_flow(), torch.randn(*batch, 3), torch.randn(*batch, 2)
        assert flow.sample(observation, action, 5).shape == (*batch, 5)
        assert flow.quantiles(observation, action, 5).shape == (*batch, 5)
        for nodes in ("stratified", "gauss_hermite", "random"):
            assert flow.q_star(observation, action, 1.0, 5, nodes).shape == batch

    def test_samples_are_drawn_afresh(self):
        flow, observation, action = mlp_flow(), torch.zeros(4, 3), torch.zeros(4, 2)
        samples = torch.stack([flow.sample(observation, action, 5) for _ in range(2)])
        assert len(samples.unique()) == samples.numel()

    def test_quantiles_increase(self):
        """Even where a coarse integration of a steep field would have lost the order."""
        network = nn.Linear(7, 1)
        network.weight.data[0, 5] = -3.0  # dz/dt = -3 z in one step turns the nodes around
        flow = ReturnFlow(network, num_steps=1)
        quantiles = flow.quantiles(torch.randn(10, 3), torch.randn(10, 2), 16)
        assert (quantiles.diff(dim=-1) > 0).all()

    def test_column_order(self):
        """The network sees observation, action, z, time."""
        seen = []
        flow = mlp_flow()
        flow.velocity_network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        flow.velocity(*[torch.full((1, size), float(i)) for i, size in enumerate((3, 2, 1, 1))])
        assert seen[0].tolist() == [[0, 0, 0, 1, 1, 2, 3]]


class TestModule:
    def test_forward_writes_the_mean(self):
        flow = gaussian_flow()
        observation, action = states((3.0, 2.0), (-4.0, 1.0))
        data = TensorDict(observation=observation, action=action, batch_size=[2])
        assert flow(data)["state_action_value"].flatten().tolist() == pytest.approx([3.0, -4.0])
        assert set(data.keys()) == {"observation", "action", "state_action_value"}

    def test_dispatch(self):
        value = mlp_flow()(observation=torch.zeros(2, 3), action=torch.zeros(2, 2))
        assert value.shape == (2, 1)

    @pytest.mark.parametrize("make", [ReturnFlow, ScalarCritic])
    def test_dispatch_of_equal_sizes(self, make):
        """The last axis of both is no batch."""
        model = make(torch.nn.Linear(6 if make is ReturnFlow else 4, 1))
        assert model(torch.zeros(3, 2), torch.zeros(3, 2)).shape == (3, 1)

    def test_what_exists_is_kept_on_request(self):
        observation, action = states((3.0, 2.0), (-4.0, 1.0))
        seven = torch.full((2, 1), 7.0)
        data = TensorDict(observation=observation, action=action, state_action_value=seven)
        with set_skip_existing():
            assert (gaussian_flow()(data)["state_action_value"] == 7).all()
        assert (gaussian_flow()(data)["state_action_value"] != 7).all()

    def test_nested_keys(self):
        flow = mlp_flow(in_keys=[("agent", "obs"), ("agent", "act")], out_keys=[("agent", "q")])
        data = TensorDict(agent=TensorDict(obs=torch.zeros(2, 3), act=torch.zeros(2, 2)))
        assert flow(data)["agent", "q"].shape == (2, 1)

    @pytest.mark.parametrize("nodes", ["stratified", "gauss_hermite"])
    def test_compiles(self, nodes):
        flow, rows = (
            mlp_flow(num_steps=4, solver="midpoint"),
            (torch.randn(4, 3), torch.randn(4, 2)),
        )
        compiled = torch.compile(
            lambda o, a: flow.q_star(o, a, 3.0, 8, nodes), fullgraph=True, backend="aot_eager"
        )
        torch.testing.assert_close(compiled(*rows), flow.q_star(*rows, 3.0, 8, nodes))

    def test_bad_solver(self):
        with pytest.raises(ValueError, match="solver must be one of .*, got 'heun'"):
            mlp_flow(solver="heun")
        with pytest.raises(ValueError, match="num_steps must be even .*, got 5"):
            mlp_flow(num_steps=5, solver="midpoint")

    @pytest.mark.parametrize("name", ["num_steps", "num_samples"])
    @pytest.mark.parametrize("value", [0, -1, 2.5])
    def test_bad_counts(self, name, value):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1"):
            mlp_flow(**{name: value})

    def test_bad_calls(self):
        flow, rows = mlp_flow(), (torch.zeros(4, 3), torch.zeros(4, 2))
        for call in (flow.sample, flow.quantiles, lambda o, a, n: flow.q_star(o, a, 1.0, n)):
            with pytest.raises(ValueError, match="must be an integer of at least 1, got 0"):
                call(*rows, 0)
        with pytest.raises(ValueError, match="tau must be a temperature"):
            flow.q_star(*rows, -1.0, 4)
        with pytest.raises(ValueError, match="nodes must be one of"):
            flow.q_star(*rows, 1.0, 4, nodes="sobol")

    def test_wrong_network_output(self):
        flow = ReturnFlow(nn.Linear(7, 2))
        with pytest.raises(ValueError, match="velocity_network must return one velocity per row"):
            flow.sample(torch.zeros(4, 3), torch.zeros(4, 2), 5)

    def test_nothing_stays_behind(self):
        """math.inf in a float64 flow keeps the dtype; so does every other temperature."""
        for tau in (0.0, 1.0, math.inf):
            assert gaussian_flow().q_star(*states((0.0, 1.0)), tau, 4).dtype == torch.float64


class TestSelect:
    @staticmethod
    def flow(**kwargs):
        torch.manual_seed(0)
        return ReturnFlow(VelocityMLP(3 + 2 + 2, hidden_sizes=(32, 32)), loc=-5.0, **kwargs)

    @torch.no_grad()
    @pytest.mark.parametrize("nodes", ["stratified", "gauss_hermite"])
    @pytest.mark.parametrize("solver", ["euler", "midpoint"])
    @pytest.mark.parametrize("tolerance", [0.0, 1e-4])
    def test_fused_values_are_the_networks_own(self, tolerance, solver, nodes):
        observation, candidates = torch.randn(4, 3), torch.randn(4, 8, 2)
        flow = self.flow(tolerance=tolerance, solver=solver)
        assert flow.why_not_fused(observation, candidates) is None
        options = {"tau_r": 0.5, "num_samples": 64, "nodes": nodes}
        action, value, values = flow.select(observation, candidates, **options)
        expected = flow.q_star(observation.unsqueeze(-2), candidates, 0.5, 64, nodes)
        torch.testing.assert_close(values, expected, rtol=1e-5 + tolerance, atol=0)
        index = values.argmax(-1)
        torch.testing.assert_close(value, values[torch.arange(4), index])
        torch.testing.assert_close(action, candidates[torch.arange(4), index])

    @torch.no_grad()
    @pytest.mark.parametrize("fused", [True, False])
    def test_steps_of_a_call(self, fused):
        """They are those of a model that was made with as many."""
        observation, candidates = torch.randn(4, 3), torch.randn(4, 8, 2)
        flow = self.flow(num_steps=10, solver="midpoint")
        units = {} if fused else {"loc": torch.full((4,), -5.0)}  # of each state: not fused
        flow = ReturnFlow(flow.velocity_network, 10, solver="midpoint", **{"loc": -5.0, **units})
        coarse = ReturnFlow(flow.velocity_network, 2, solver="midpoint", **{"loc": -5.0, **units})
        assert (flow.why_not_fused(observation, candidates) is None) == fused
        options = {"tau_r": 0.5, "num_samples": 3}
        values = flow.select(observation, candidates, num_steps=2, **options)[2]
        assert torch.equal(values, coarse.select(observation, candidates, **options)[2])
        assert not torch.equal(values, flow.select(observation, candidates, **options)[2])
        pairs = (observation.unsqueeze(-2), candidates, 0.5, 3)
        assert torch.equal(flow.q_star(*pairs, num_steps=2), coarse.q_star(*pairs))
        noise = torch.randn(4, 3)
        drawn = flow.sample(observation, candidates[:, 0], 3, noise, num_steps=2)
        assert torch.equal(drawn, coarse.sample(observation, candidates[:, 0], 3, noise))

    @torch.no_grad()
    @pytest.mark.parametrize("solver", ["euler", "midpoint"])
    def test_one_step_is_the_mean(self, solver):
        """From any noise: the velocity at time 0 is the mean less the noise."""
        flow = gaussian_flow(10, solver=solver)
        observation, action = states((3.0, 2.0), (-1.0, 0.5))
        values = flow.sample(observation, action, 4, num_steps=1)
        torch.testing.assert_close(values, observation[:, :1].expand(2, 4))

    @pytest.mark.parametrize("num_steps", [0, 3])
    def test_bad_steps_of_a_call(self, num_steps):
        flow = self.flow(num_steps=4, solver="midpoint")
        with pytest.raises(ValueError, match=f"num_steps must be .*, got {num_steps}"):
            flow.q_star(torch.zeros(1, 3), torch.zeros(1, 2), 1.0, 3, num_steps=num_steps)
        with torch.no_grad(), pytest.raises(ValueError, match=f"num_steps .* got {num_steps}"):
            flow.select(torch.zeros(1, 3), torch.zeros(1, 2, 2), tau_r=1.0, num_steps=num_steps)

    @torch.no_grad()
    def test_random_nodes_are_each_candidates_own(self):
        observation, candidates = torch.zeros(2, 3), torch.zeros(2, 8, 2)
        flow = self.flow()
        assert flow.why_not_fused(observation, candidates) is None
        options = {"tau_r": INF, "num_samples": 4, "nodes": "random"}
        assert len(flow.select(observation, candidates, **options)[2].unique()) == 2 * 8

    def test_units_of_each_leading_index(self):
        """Without a stack of networks too: every state of an index in its own units."""
        network = VelocityMLP(3 + 2 + 2, hidden_sizes=(8,))
        loc, scale = torch.tensor([1.0, -20.0]), torch.tensor([2.0, 5.0])
        flow = ReturnFlow(network, loc=loc, scale=scale)
        observation, candidates = torch.randn(2, 4, 3), torch.randn(2, 4, 8, 2)
        with torch.no_grad():
            values = flow.select(observation, candidates, tau_r=INF)[2]
            plain = ReturnFlow(network).select(observation, candidates, tau_r=INF)[2]
        want = loc[:, None, None] + scale[:, None, None] * plain
        torch.testing.assert_close(values, want)

    def test_reason_is_given_and_the_network_runs_itself(self):
        flow = ReturnFlow(nn.Linear(3 + 2 + 2, 1))
        observation, candidates = torch.randn(4, 3), torch.randn(4, 8, 2)
        with torch.no_grad():
            assert "nn.Sequential" in flow.why_not_fused(observation, candidates)
            assert flow.select(observation, candidates, tau_r=1.0)[2].shape == (4, 8)
            with pytest.raises(RuntimeError, match="backend='triton' is not available"):
                flow.select(observation, candidates, tau_r=1.0, backend="triton")

    def test_precisions_are_those_of_the_kernels(self):
        assert return_model.PRECISIONS == _checks.PRECISIONS

    def test_unknown_precision(self):
        """Refused by the network itself as well as by the fused path."""
        observation, candidates = torch.randn(4, 3), torch.randn(4, 8, 2)
        for flow in (self.flow(), ReturnFlow(nn.Linear(3 + 2 + 2, 1))):
            with torch.no_grad(), pytest.raises(ValueError, match="precision must be one of .*fp8"):
                flow.select(observation, candidates, tau_r=1.0, precision="fp8")

    def test_gradients_take_the_network_itself(self):
        flow, candidates = self.flow(), torch.randn(4, 8, 2, requires_grad=True)
        assert "gradients" in flow.why_not_fused(torch.randn(4, 3), candidates)
        flow.select(torch.randn(4, 3), candidates, tau_r=1.0)[1].sum().backward()
        assert candidates.grad.abs().sum() > 0

    @pytest.mark.parametrize("tolerance", [-1e-3, 1.0, INF, float("nan")])
    def test_bad_tolerance(self, tolerance):
        with pytest.raises(ValueError, match="tolerance must be"):
            self.flow(tolerance=tolerance)


class TestEnsemble:
    @staticmethod
    def gaussian_pair(**kwargs):
        """Members with laws N(m, s^2) and N((m - 2) / 2, (s / 2)^2) of an observation (m, s)."""
        networks = [GaussianReturns(dtype=torch.float64), GaussianReturns(2.0, 2.0, torch.float64)]
        return ReturnFlow(networks, 10, **kwargs)

    @staticmethod
    def pair(**kwargs):
        torch.manual_seed(0)
        networks = [VelocityMLP(3 + 2 + 2, hidden_sizes=(32, 32)) for _ in range(2)]
        return ReturnFlow(networks, 4, loc=-5.0, scale=2.0, **kwargs), networks

    def test_quantiles_are_averaged(self):
        """Two Gaussians average to one of the mean of means and the mean of spreads."""
        flow = self.gaussian_pair(loc=10.0, scale=3.0)
        spread = (euler_gaussian_std(2.0, 10) + euler_gaussian_std(1.0, 10)) / 2
        nodes = stratified_normal(7, dtype=torch.float64)
        quantiles = flow.quantiles(*states((6.0, 2.0)), 7)
        expected = 10 + 3 * ((6 + 2) / 2 + spread * nodes)
        torch.testing.assert_close(quantiles[0], expected, atol=1e-12, rtol=0)

    @pytest.mark.parametrize("tau", [2.0, INF])
    def test_q_star(self, tau):
        """Of the averaged law: mean + std^2 / (2 tau)."""
        spread = (euler_gaussian_std(0.8, 10) + euler_gaussian_std(0.4, 10)) / 2
        value = self.gaussian_pair().q_star(*states((6.0, 0.8)), tau, num_samples=4096)
        assert value.item() == pytest.approx(4 + spread**2 / (2 * tau), abs=5e-3)

    def test_samples_are_the_mean_of_the_members(self):
        flow, networks = self.pair()
        observation, action, noise = torch.randn(4, 3), torch.randn(4, 2), torch.randn(4, 5)
        alone = [ReturnFlow(network, 4, loc=-5.0, scale=2.0) for network in networks]
        expected = sum(member.sample(observation, action, 5, noise) for member in alone) / 2
        torch.testing.assert_close(flow.sample(observation, action, 5, noise), expected)

    def test_copies_are_one_flow(self):
        single, rows = gaussian_flow(), states((3.0, 2.0), (-4.0, 1.0))
        copies = ReturnFlow([GaussianReturns(dtype=torch.float64) for _ in range(3)])
        torch.testing.assert_close(copies.q_star(*rows, 2.0, 16), single.q_star(*rows, 2.0, 16))

    def test_one_network_is_no_ensemble(self):
        """In a list or not: the same parameters by the same names, and no axis of members."""
        network = VelocityMLP(3 + 2 + 2, hidden_sizes=(8,))
        for alone in ([network], nn.ModuleList([network])):
            flow = ReturnFlow(alone)
            assert flow.velocity_network is network
            assert flow.expand_members(torch.zeros(4, 1)).shape == (4, 1)

    @torch.no_grad()
    @pytest.mark.parametrize("batch", [(), (4,), (0,), (2, 3)])
    @pytest.mark.parametrize("nodes", ["stratified", "gauss_hermite"])
    def test_fused_values_are_the_networks_own(self, nodes, batch):
        flow, _ = self.pair()
        observation, candidates = torch.randn(*batch, 3), torch.randn(*batch, 8, 2)
        assert flow.why_not_fused(observation, candidates) is None
        options = {"tau_r": 0.5, "num_samples": 16, "nodes": nodes}
        action, value, values = flow.select(observation, candidates, **options)
        expected = flow.q_star(observation.unsqueeze(-2), candidates, 0.5, 16, nodes)
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(value, values.amax(-1))
        best = candidates.take_along_dim(values.argmax(-1)[..., None, None], -2).squeeze(-2)
        torch.testing.assert_close(action, best)

    def test_choice_is_soft(self):
        flow, _ = self.pair()
        with torch.no_grad():
            gumbel = torch.tensor([[0.0, 0.0, 1e6]])
            candidates = torch.randn(1, 3, 2)
            options = {"tau_r": INF, "tau_q": 1.0, "gumbel": gumbel}
            action, _, _ = flow.select(torch.randn(1, 3), candidates, **options)
        assert torch.equal(action, candidates[:, 2])

    def test_in_pieces(self, monkeypatch):
        """Rows of all members count."""
        from torchrl_evor.modules.models import return_flow

        flow = ReturnFlow([nn.Linear(3 + 2 + 2, 1) for _ in range(2)])
        observation, candidates = torch.randn(4, 3), torch.randn(4, 8, 2)
        expected = flow.select(observation, candidates, tau_r=1.0)[2]
        rows = []
        monkeypatch.setattr(return_flow, "MAX_ROWS", 100)
        sample = flow.sample
        monkeypatch.setattr(flow, "sample", lambda x, *a: rows.append(len(x)) or sample(x, *a))
        torch.testing.assert_close(flow.select(observation, candidates, tau_r=1.0)[2], expected)
        assert max(rows) * 2 * 16 <= 100 and sum(rows) == 4 * 8

    def test_one_reason_is_enough(self):
        flow = ReturnFlow([VelocityMLP(3 + 2 + 2, hidden_sizes=(8, 8)), nn.Linear(3 + 2 + 2, 1)])
        with torch.no_grad():
            reason = flow.why_not_fused(torch.randn(4, 3), torch.randn(4, 8, 2))
        assert "nn.Sequential" in reason

    def test_compiles(self):
        flow, _ = self.pair()
        observation, candidates = torch.randn(4, 3), torch.randn(4, 8, 2)
        select = torch.compile(flow.select, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            expected = flow.select(observation, candidates, tau_r=1.0)
            for actual, value in zip(select(observation, candidates, tau_r=1.0), expected):
                torch.testing.assert_close(actual, value)

    def test_velocities_of_the_wrong_number_of_members(self):
        flow, _ = self.pair()
        point = torch.zeros(3, 4, 1)
        with pytest.raises(ValueError, match="z and time must be given for 2 members, got 3"):
            flow.velocity(torch.zeros(4, 3), torch.zeros(4, 2), point, point)

    def test_empty(self):
        with pytest.raises(ValueError, match="velocity_network must hold at least one network"):
            ReturnFlow([])


if __name__ == "__main__":
    pytest.main([__file__])

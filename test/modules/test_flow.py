# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import math

import pytest
import torch
from _known_laws import euler_gaussian_std, gaussian_velocity
from tensordict import TensorDict
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_evor import FlowMatchingModel, FlowMatchingPolicy, VelocityMLP


class Constant(nn.Module):
    """Velocity ``value`` in every direction, whatever the input."""

    def __init__(self, value, size=2):
        super().__init__()
        self.value, self.size = value, size

    def forward(self, inputs):
        return torch.full_like(inputs[..., : self.size], self.value)


class Gaussian(nn.Module):
    """Field of a policy of one number, N(0, std^2) in every state."""

    def __init__(self, std):
        super().__init__()
        self.std = torch.tensor(std)

    def forward(self, inputs):
        action, time = inputs[..., -2:-1], inputs[..., -1:]
        return gaussian_velocity(action, time, torch.zeros(()), self.std)


class ThereAndBack(nn.Module):
    """Velocity 8 in the first half of the flow, -8 in the second."""

    def forward(self, inputs):
        return torch.where(inputs[..., -1:] < 0.5, 8.0, -8.0).expand(*inputs.shape[:-1], 2)


class TestVelocityMLP:
    def test_layers(self):
        network = VelocityMLP(6, 2, hidden_sizes=(8, 4), layer_norm=True)
        kinds = [type(layer).__name__ for layer in network.net]
        hidden = ["Linear", "GELU", "LayerNorm"]  # normalised after the activation
        assert kinds == [*hidden, *hidden, "Linear"]
        assert [p.shape for p in network.parameters() if p.ndim == 2] == [(8, 6), (4, 8), (2, 4)]
        assert network.net[1].approximate == "tanh" and network.net[2].eps == 1e-6

    def test_defaults(self):
        network = VelocityMLP(7)
        assert [m.out_features for m in network.net if isinstance(m, nn.Linear)] == [512] * 4 + [1]
        assert not any(isinstance(m, nn.LayerNorm) for m in network.net)

    def test_initial_statistics(self):
        """Xavier-uniform: variance 2 / (fan_in + fan_out); zero biases."""
        for layer in VelocityMLP(300, 200, hidden_sizes=(400,)).net:
            if isinstance(layer, nn.Linear):
                scale = math.sqrt(6 / (layer.in_features + layer.out_features))
                assert layer.weight.std().item() == pytest.approx(scale / math.sqrt(3), rel=0.01)
                assert 0.99 * scale < layer.weight.abs().max().item() <= scale
                assert (layer.bias == 0).all()

    def test_reset_parameters(self):
        network = VelocityMLP(3, hidden_sizes=(4,), layer_norm=True)
        before = [p.clone() for p in network.parameters()]
        for parameter in network.parameters():
            parameter.data.fill_(7.0)
        network.reset_parameters()
        assert not any((p == 7).any() for p in network.parameters())
        assert not torch.equal(before[0], network.net[0].weight)
        assert (network.net[2].weight == 1).all() and (network.net[2].bias == 0).all()

    def test_concatenates_its_inputs(self):
        network = VelocityMLP(6, 2, hidden_sizes=(8,))
        inputs = torch.randn(2, 3, 6)
        torch.testing.assert_close(network(*inputs.split([3, 2, 1], -1)), network(inputs))

    @pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu", "silu"])
    def test_activation(self, activation):
        network = VelocityMLP(1, hidden_sizes=(1,), activation=activation)
        nn.init.ones_(network.net[0].weight), nn.init.ones_(network.net[2].weight)
        expected = {"gelu_tanh": 0.841192, "gelu": 0.841345, "relu": 1.0, "silu": 0.731059}
        assert network(torch.ones(1)).item() == pytest.approx(expected[activation], abs=1e-5)

    def test_dtype_and_device(self):
        network = VelocityMLP(2, hidden_sizes=(3,), dtype=torch.float64, device="meta")
        assert {(p.dtype, p.device.type) for p in network.parameters()} == {(torch.float64, "meta")}

    @pytest.mark.parametrize(
        "kwargs,name",
        [
            ({"in_features": 0}, "in_features"),
            ({"out_features": 0}, "out_features"),
            ({"hidden_sizes": ()}, "hidden_sizes"),
            ({"hidden_sizes": (4, 0)}, "hidden_sizes"),
            ({"activation": "tanhh"}, "activation"),
        ],
    )
    def test_bad_input(self, kwargs, name):
        with pytest.raises(ValueError, match=name):
            VelocityMLP(**{"in_features": 3, **kwargs})


class TestStandardizeInputs:
    @pytest.mark.parametrize("layer_norm", [False, True])
    def test_is_the_network_of_standardized_inputs(self, layer_norm):
        options = {"hidden_sizes": (7, 5), "layer_norm": layer_norm, "dtype": torch.float64}
        network = VelocityMLP(3 + 2, 2, **options)
        loc, scale = torch.tensor([10.0, -4.0, 0.0]), torch.tensor([5.0, 0.1, 1.0])
        raw, rest = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
        expected = network((raw - loc.double()) / scale.double(), rest)
        assert network.standardize_inputs_(loc, scale) is network
        torch.testing.assert_close(network(raw, rest), expected)

    def test_by_hand(self):
        network = VelocityMLP(2, 1, hidden_sizes=(1,))
        layer = network.net[0]
        layer.weight.data.copy_(torch.tensor([[6.0, 5.0]]))
        network.standardize_inputs_(torch.tensor([4.0]), torch.tensor([2.0]))
        assert layer.weight.tolist() == [[3.0, 5.0]]  # 6 / 2
        assert layer.bias.tolist() == [-12.0]  # -4 * 3
        assert layer.weight.requires_grad and layer.weight.is_leaf

    @pytest.mark.parametrize(
        "loc, scale, message",
        [
            ([0.0, 0.0], [1.0], r"got \[2\] and \[1\]"),
            ([0.0] * 4, [1.0] * 4, "at most 3 inputs"),
            ([0.0], [0.0], r"scale must be positive and finite, got \[0.0\]"),
            ([0.0], [math.nan], "scale must be positive"),
            ([0.0], [math.inf], "scale must be positive and finite"),
            ([math.nan], [1.0], r"loc must be finite, got \[nan\]"),
        ],
    )
    def test_bad_input(self, loc, scale, message):
        network = VelocityMLP(3, hidden_sizes=(4,))
        before = network.net[0].weight.clone()
        with pytest.raises(ValueError, match=message):
            network.standardize_inputs_(torch.tensor(loc), torch.tensor(scale))
        assert network.net[0].weight.equal(before)


class TestFlowMatchingModel:
    def test_constant_velocity_by_hand(self):
        model = FlowMatchingModel(Constant(0.5), 2)
        noise = torch.tensor([[0.25, -0.25], [3.0, -3.0]])
        action = model(torch.zeros(2, 3), noise)
        torch.testing.assert_close(action, torch.tensor([[0.75, 0.25], [1.0, -1.0]]))

    def test_clips_once_after_the_last_step(self):
        noise = torch.tensor([[0.5, -0.5]])
        action = FlowMatchingModel(ThereAndBack(), 2, num_steps=4)(torch.zeros(1, 3), noise)
        torch.testing.assert_close(action, noise)  # clipping on the way would lose it

    def test_euler_on_left_end_points(self):
        """da/dt = time, read from the last column: (0 + 1/4 + 1/2 + 3/4) / 4."""
        network = nn.Linear(3 + 2 + 1, 2, bias=False)
        network.weight.data.zero_()[:, -1] = 1.0
        action = FlowMatchingModel(network, 2, num_steps=4)(torch.ones(1, 3), torch.zeros(1, 2))
        torch.testing.assert_close(action, torch.full((1, 2), 0.375))

    def test_midpoint_is_exact_where_velocity_is_linear_in_time(self):
        """da/dt = time again: the velocity in the middle is the mean, 1/2 in all."""
        network = nn.Linear(3 + 2 + 1, 2, bias=False)
        network.weight.data.zero_()[:, -1] = 1.0
        model = FlowMatchingModel(network, 2, num_steps=2, solver="midpoint")
        action = model(torch.ones(1, 3), torch.zeros(1, 2))
        torch.testing.assert_close(action, torch.full((1, 2), 0.5))

    @pytest.mark.parametrize("std", [0.3, 0.6])
    def test_four_evaluations_keep_more_of_the_spread_than_ten_euler_steps(self, std):
        """Of a Gaussian policy: its flow only scales the noise."""
        noise = torch.ones(1, 1)
        kept = {
            solver: FlowMatchingModel(Gaussian(std), 1, num_steps, solver=solver)(noise, noise)
            for solver, num_steps in (("euler", 10), ("midpoint", 4))
        }
        assert kept["euler"].item() == pytest.approx(euler_gaussian_std(std, 10), abs=1e-6)
        assert kept["euler"] < 0.9 * std < kept["midpoint"] <= std

    def test_solver_may_be_changed_after_training(self):
        model = FlowMatchingModel(Gaussian(0.5), 1)
        noise = torch.ones(1, 1)
        before = model(noise, noise)
        model.num_steps, model.solver = 4, "midpoint"
        assert model(noise, noise) > before

    def test_column_order(self):
        """The network sees observation, action, time."""
        seen = []
        network = Constant(0.0)
        network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        FlowMatchingModel(network, 2).velocity(
            torch.full((1, 3), 3.0), torch.full((1, 2), 2.0), torch.full((1, 1), 1.0)
        )
        assert seen[0].tolist() == [[3, 3, 3, 2, 2, 1]]

    def test_bounds_per_dimension(self):
        bounds = {"low": torch.tensor([-1.0, 0.0]), "high": torch.tensor([0.0, 2.0])}
        model = FlowMatchingModel(Constant(0.0), 2, **bounds)
        action = model(torch.zeros(2, 3), torch.tensor([[-5.0, -5.0], [5.0, 5.0]]))
        assert action.tolist() == [[-1, 0], [0, 2]]

    @pytest.mark.parametrize("batch", [(), (0,), (5,), (2, 3)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_shapes(self, batch, dtype):
        model = FlowMatchingModel(VelocityMLP(6, 2, hidden_sizes=(8,), dtype=dtype), 2)
        action = model(torch.randn(*batch, 3, dtype=dtype))
        assert action.shape == (*batch, 2) and action.dtype == dtype
        assert (action.abs() <= 1).all()

    @pytest.mark.parametrize("name", ["low", "high"])
    def test_bounds_of_another_shape(self, name):
        bounds = {"low": -1.0, "high": 1.0, name: torch.full((3,), 1.0 if name == "high" else -1.0)}
        with pytest.raises(
            ValueError, match=rf"{name} must be a number or of shape \(2,\), got \(3,"
        ):
            FlowMatchingModel(Constant(0.0), 2, **bounds)

    def test_bounds_of_another_dtype(self):
        """Those of a Gym space may be float64, which clamping would spread to the actions."""
        bounds = {"low": torch.full((2,), -1.0).double(), "high": torch.ones(2).double()}
        model = FlowMatchingModel(Constant(0.0), 2, **bounds)
        assert model(torch.zeros(4, 3)).dtype == torch.float32

    def test_bounds_follow_the_module(self):
        assert dict(FlowMatchingModel(Constant(0.0), 2).to("meta").named_buffers()).keys() == {
            "low",
            "high",
        }

    @pytest.mark.parametrize(
        "kwargs,name",
        [
            ({"action_dim": 0}, "action_dim"),
            ({"num_steps": 0}, "num_steps"),
            ({"num_steps": 5, "solver": "midpoint"}, "num_steps must be even"),
            ({"solver": "heun"}, "solver must be one of .*, got 'heun'"),
            ({"low": 1.0, "high": 1.0}, "low"),
            ({"low": torch.tensor([-1.0, 2.0])}, "low"),
        ],
    )
    def test_bad_input(self, kwargs, name):
        with pytest.raises(ValueError, match=name):
            FlowMatchingModel(Constant(0.0), **{"action_dim": 2, **kwargs})

    def test_wrong_network_output(self):
        model = FlowMatchingModel(nn.Linear(6, 3), 2)
        with pytest.raises(ValueError, match=r"velocity_network .* \(5, 2\), got \(5, 3\)"):
            model(torch.zeros(5, 3))


class TestFlowMatchingPolicy:
    def make(self, **kwargs):
        return FlowMatchingPolicy(VelocityMLP(6, 2, hidden_sizes=(8,)), 2, **kwargs)

    def test_writes_only_the_action(self):
        data = TensorDict(observation=torch.randn(4, 3), batch_size=[4])
        assert set(self.make()(data).keys()) == {"observation", "action"}

    @pytest.mark.parametrize("mode", list(ExplorationType))
    def test_is_random_in_every_exploration_mode(self, mode):
        policy, data = self.make(), TensorDict(observation=torch.zeros(64, 3), batch_size=[64])
        with set_exploration_type(mode):
            action = policy(data)["action"]
        assert len(action.unique(dim=0)) > 32

    def test_explicit_noise_repeats(self):
        policy = self.make(in_keys=["observation", "noise"])
        data = TensorDict(observation=torch.randn(4, 3), noise=torch.randn(4, 2))
        first = policy(data)["action"].clone()
        torch.testing.assert_close(policy(data)["action"], first)
        torch.testing.assert_close(first, policy.module(data["observation"], data["noise"]))

    def test_nested_keys(self):
        policy = self.make(in_keys=[("agent", "state")], out_keys=[("agent", "move")])
        data = TensorDict(agent=TensorDict(state=torch.zeros(2, 3, 3)))
        assert policy(data)["agent", "move"].shape == (2, 3, 2)

    def test_positional_arguments(self):
        """The order of the public signature, in which bounds come after the steps."""
        policy = FlowMatchingPolicy(Constant(0.0), 2, 3, -0.5, 0.5)
        assert policy.module.num_steps == 3
        assert (policy.module.low.item(), policy.module.high.item()) == (-0.5, 0.5)

    def test_solver(self):
        assert self.make().module.solver == "euler"
        module = self.make(num_steps=4, solver="midpoint").module
        assert (module.num_steps, module.solver) == (4, "midpoint")

    def test_compiles(self):
        policy = self.make(in_keys=["observation", "noise"])
        data = TensorDict(observation=torch.randn(4, 3), noise=torch.randn(4, 2))
        compiled = torch.compile(policy, fullgraph=True, backend="aot_eager")(data.clone())
        torch.testing.assert_close(compiled["action"], policy(data.clone())["action"])


if __name__ == "__main__":
    pytest.main([__file__])

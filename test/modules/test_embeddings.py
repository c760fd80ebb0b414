# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict

from torchrl_evor import EVORActor, FlowMatchingPolicy, ReturnFlow, StackedVelocityMLP, VelocityMLP
from torchrl_evor.modules.models.embeddings import (
    EmbeddedVelocity,
    FourierEmbedding,
    GaussianBinEmbedding,
)


class TestFourier:
    def test_by_hand(self):
        # x = 1/4: sin(pi/4), sin(pi/2), cos(pi/4), cos(pi/2)
        half = math.sqrt(0.5)
        expected = torch.tensor([[0.25, half, 1.0, half, 0.0]])
        embedded = FourierEmbedding(2)(torch.tensor([[0.25]]))
        torch.testing.assert_close(embedded, expected, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("batch", [(), (3,), (2, 0), (2, 3)])
    def test_shapes(self, batch):
        embedding = FourierEmbedding(3)
        assert embedding(torch.zeros(*batch, 1)).shape == (*batch, 7)
        assert embedding.num_features == 7

    def test_bad_size(self):
        with pytest.raises(ValueError, match="num_frequencies"):
            FourierEmbedding(0)


class TestGaussianBins:
    def test_by_hand(self):
        # Edges -1, 0, 1 and deviation 1: Phi(1) - Phi(0) of mass on either side of 0.
        mass = 0.5 * math.erf(1 / math.sqrt(2))
        embedded = GaussianBinEmbedding(2, low=-1.0, high=1.0, width=1.0)(torch.zeros(1, 1))
        torch.testing.assert_close(embedded, torch.tensor([[0.0, mass, mass]]))

    def test_mass_is_one_inside_and_its_centre_is_the_value(self):
        embedding = GaussianBinEmbedding(32, low=-4.0, high=4.0)
        value = torch.linspace(-2, 2, 9).unsqueeze(-1)
        mass = embedding(value)[:, 1:]
        centres = (embedding.edges[1:] + embedding.edges[:-1]) / 2
        torch.testing.assert_close(mass.sum(-1), torch.ones(9))
        torch.testing.assert_close(mass @ centres, value.squeeze(-1), atol=2e-3, rtol=0)

    def test_values_beyond_the_bins_stay_distinct(self):
        embedded = GaussianBinEmbedding(8)(torch.tensor([[100.0], [200.0]]))
        assert embedded[:, 1:].abs().max() == 0
        assert embedded[:, 0].tolist() == [100.0, 200.0]

    @pytest.mark.parametrize(
        "options", [{"num_bins": 0}, {"low": 1.0, "high": 1.0}, {"high": math.inf}, {"width": 0.0}]
    )
    def test_bad_input(self, options):
        with pytest.raises(ValueError, match="|".join(options)):
            GaussianBinEmbedding(**options)


class Columns(torch.nn.Module):
    """Shows a wrapped network's input."""

    def forward(self, columns):
        return columns


def test_only_the_last_two_columns_are_embedded():
    z, time = GaussianBinEmbedding(4), FourierEmbedding(1)
    network = EmbeddedVelocity(Columns(), z=z, time=time)
    inputs = torch.randn(5, 3 + 2)
    out = network(inputs)
    assert out.shape[-1] == 3 + EmbeddedVelocity.num_extra(z, time) == 3 + 5 + 3
    torch.testing.assert_close(out[:, :3], inputs[:, :3])
    torch.testing.assert_close(out[:, 3:8], z(inputs[:, 3:4]))
    torch.testing.assert_close(out[:, 8:], time(inputs[:, 4:]))


def test_no_embedding_changes_nothing():
    inner = VelocityMLP(3 + 2, hidden_sizes=(8,))
    inputs = torch.randn(5, 5)
    torch.testing.assert_close(EmbeddedVelocity(inner)(inputs), inner(inputs))
    assert EmbeddedVelocity.num_extra() == 2


def test_is_a_velocity_network_of_the_actor():
    z, time = GaussianBinEmbedding(4), FourierEmbedding(2)
    inner = VelocityMLP(3 + 2 + EmbeddedVelocity.num_extra(z, time), hidden_sizes=(8,))
    returns = ReturnFlow(EmbeddedVelocity(inner, z=z, time=time), num_steps=2)
    policy = FlowMatchingPolicy(VelocityMLP(3 + 2 + 1, 2, hidden_sizes=(8,)), 2, 2)
    data = TensorDict(observation=torch.randn(4, 3), batch_size=[4])
    actor = EVORActor(policy, returns, num_candidates=3, num_samples=2)
    assert actor(data)["action"].shape == (4, 2)
    with pytest.raises(RuntimeError, match="triton"):
        EVORActor(policy, returns, num_candidates=3, num_samples=2, backend="triton")(data)


def test_over_a_stack_each_model_is_as_alone():
    z, time = GaussianBinEmbedding(4), FourierEmbedding(1)
    stack = StackedVelocityMLP(3, 2 + EmbeddedVelocity.num_extra(z, time), hidden_sizes=(8,))
    network = EmbeddedVelocity(stack, z=z, time=time)
    assert network.num_models == 3
    inputs = torch.randn(3, 5, 2 + 2)
    for index, model in enumerate(stack.unstack()):
        alone = EmbeddedVelocity(model, z=z, time=time)
        torch.testing.assert_close(network(inputs)[index], alone(inputs[index]))


if __name__ == "__main__":
    pytest.main([__file__, "-v"])

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.objectives import SoftUpdate

from torchrl_evor import (
    CategoricalCritic,
    CriticLoss,
    EVORActor,
    EVORLoss,
    FlowMatchingPolicy,
    QuantileCritic,
    ReturnFlow,
    ScalarCritic,
    StackedVelocityMLP,
    VelocityMLP,
)
from torchrl_evor.modules.models import return_flow

OBS, ACT, ROWS = 3, 2, 6
LOC = torch.tensor([-4.0, 0.0, 7.0])
SCALE = torch.tensor([2.0, 1.0, 5.0])


def make_models(num_models=3, layer_norm=True, dtype=torch.float64, **options):
    models = []
    for _ in range(num_models):
        model = VelocityMLP(
            OBS + ACT + 2, 1, hidden_sizes=(8, 7), layer_norm=layer_norm, dtype=dtype, **options
        )
        for parameter in model.parameters():  # so that LayerNorm's affine map is not the identity
            nn.init.normal_(parameter, std=0.5)
        models.append(model)
    return models


def make_batch(*shape, dtype=torch.float64):
    shape = torch.Size(shape)
    return TensorDict(
        {
            "observation": torch.randn(*shape, OBS, dtype=dtype),
            "action": torch.rand(*shape, ACT, dtype=dtype) * 2 - 1,
            "next": {
                "observation": torch.randn(*shape, OBS, dtype=dtype),
                "action": torch.rand(*shape, ACT, dtype=dtype) * 2 - 1,
                "reward": torch.randn(*shape, 1, dtype=dtype),
                "done": torch.rand(*shape, 1) < 0.3,
                "terminated": torch.rand(*shape, 1) < 0.3,
            },
        },
        batch_size=shape,
    )


class TestStackedVelocityMLP:
    @pytest.mark.parametrize("layer_norm", [False, True])
    @pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu", "silu"])
    def test_values_and_gradients(self, layer_norm, activation):
        models = make_models(layer_norm=layer_norm, activation=activation)
        stack = StackedVelocityMLP.from_models(models)
        inputs = torch.randn(3, 5, OBS + ACT + 2, dtype=torch.float64)
        outputs = stack(inputs)
        separate = torch.stack([model(x) for model, x in zip(models, inputs)])
        torch.testing.assert_close(outputs, separate)
        outputs.square().sum().backward()
        separate.square().sum().backward()
        for parameter, separate in zip(
            stack.parameters(), zip(*(model.parameters() for model in models)), strict=True
        ):
            expected = torch.stack([p.grad.mT if p.ndim == 2 else p.grad for p in separate])
            torch.testing.assert_close(parameter.grad, expected.reshape(parameter.shape))

    @pytest.mark.parametrize("batch", [(), (0,), (4,), (2, 0, 3), (2, 5)])
    def test_any_batch_shape(self, batch):
        models = make_models(2)
        stack = StackedVelocityMLP.from_models(models)
        parts = [torch.randn(2, *batch, size, dtype=torch.float64) for size in (OBS, ACT, 1, 1)]
        outputs = stack(*parts)
        assert outputs.shape == (2, *batch, 1)
        for index, model in enumerate(models):
            torch.testing.assert_close(outputs[index], model(*(part[index] for part in parts)))

    def test_unstack_returns_copies_in_order(self):
        models = make_models()
        stack = StackedVelocityMLP.from_models(models)
        for model, copy in zip(models, stack.unstack(), strict=True):
            assert list(copy.state_dict()) == list(model.state_dict())
            for key, value in model.state_dict().items():
                assert (
                    copy.state_dict()[key].equal(value) and copy.state_dict()[key].is_contiguous()
                )
            assert all(parameter.requires_grad for parameter in copy.parameters())
        before = stack(torch.ones(3, 1, OBS + ACT + 2, dtype=torch.float64))
        nn.init.zeros_(copy.net[0].weight)
        torch.testing.assert_close(
            stack(torch.ones(3, 1, OBS + ACT + 2, dtype=torch.float64)), before
        )

    def test_conversion_draws_no_random_numbers(self):
        models = make_models()
        state = torch.get_rng_state()
        StackedVelocityMLP.from_models(models).unstack()
        assert torch.get_rng_state().equal(state)

    @pytest.mark.parametrize("redraw", [False, True])
    def test_initial_statistics_of_each_model(self, redraw):
        torch.manual_seed(0)
        stack = StackedVelocityMLP(3, 200, 100, hidden_sizes=(300,), layer_norm=True)
        if redraw:
            nn.init.constant_(stack.net[0].weight, 9.0)
            stack.reset_parameters()
        for model in stack.unstack():
            for layer, bound in (
                (model.net[0], math.sqrt(6 / (200 + 300))),
                (model.net[3], math.sqrt(6 / (300 + 100))),
            ):
                assert layer.weight.abs().max() <= bound
                # The standard deviation of U(-b, b) is b / sqrt(3); 3e4 draws resolve 2 %.
                assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
                assert layer.weight.mean().abs() < 0.02 * bound
                assert not layer.bias.any()
            assert (model.net[2].weight == 1).all() and not model.net[2].bias.any()
        weight = stack.net[0].weight
        assert not weight[0].equal(weight[1]) and not weight[1].equal(weight[2])

    def test_standardize_inputs(self):
        stack = StackedVelocityMLP(3, 4, hidden_sizes=(6,), dtype=torch.float64)
        loc, scale = torch.tensor([10.0, 2.0]), torch.tensor([5.0, 0.5])
        models = [model.standardize_inputs_(loc, scale) for model in stack.unstack()]
        stack.standardize_inputs_(loc, scale)
        inputs = torch.randn(3, 5, 4, dtype=torch.float64)
        expected = torch.stack([model(x) for model, x in zip(models, inputs)])
        torch.testing.assert_close(stack(inputs), expected)

    def test_bad_input(self):
        stack = StackedVelocityMLP(3, 4, hidden_sizes=(5,))
        with pytest.raises(ValueError, match="num_models=3.*(2, 6, 4)"):
            stack(torch.zeros(2, 6, 4))
        with pytest.raises(ValueError, match="num_models"):
            StackedVelocityMLP(0, 4)
        with pytest.raises(ValueError, match="hidden_sizes"):
            StackedVelocityMLP(2, 4, hidden_sizes=())
        with pytest.raises(ValueError, match="models must hold at least one"):
            StackedVelocityMLP.from_models([])
        models = [VelocityMLP(4, hidden_sizes=(5,), activation=name) for name in ("relu", "silu")]
        with pytest.raises(ValueError, match="one architecture.*relu.*silu"):
            StackedVelocityMLP.from_models(models)


class TestStackedReturnFlow:
    def test_reward_units_of_each_model(self):
        models = make_models()
        stacked = ReturnFlow(
            StackedVelocityMLP.from_models(models), num_steps=3, loc=LOC, scale=SCALE
        ).double()
        observation = torch.randn(3, ROWS, OBS, dtype=torch.float64)
        # As many candidates as models: a shape that would broadcast along the wrong axis.
        action = torch.randn(3, ROWS, 3, ACT, dtype=torch.float64)
        values = stacked.q_star(observation.unsqueeze(-2), action, tau=2.0, num_samples=3)
        assert values.shape == (3, ROWS, 3)
        for index, model in enumerate(models):
            single = ReturnFlow(model, 3, loc=LOC[index].item(), scale=SCALE[index].item())
            expected = single.q_star(observation[index].unsqueeze(-2), action[index], 2.0, 3)
            torch.testing.assert_close(values[index], expected)

    def test_normalization_of_each_model(self):
        returns = ReturnFlow(StackedVelocityMLP(3, 7, hidden_sizes=(4,)), loc=LOC, scale=SCALE)
        reward = returns.normalize_reward(torch.full((3, 2, 1), 1.0), torch.full((3, 2, 1), 0.5))
        # (r - (1 - 0.5) loc) / scale
        assert reward[..., 0].tolist() == [[1.5, 1.5], [1.0, 1.0], [-0.5, -0.5]]
        returns.set_normalization(1.0, 2 * SCALE)
        assert returns.loc.tolist() == [1, 1, 1] and returns.scale.tolist() == [4, 2, 10]
        with pytest.raises(ValueError, match=r"loc must be a number.*\(3,\), got \(2,\)"):
            returns.set_normalization(torch.zeros(2), 1.0)
        with pytest.raises(ValueError, match="scale must be positive"):
            returns.set_normalization(0.0, torch.tensor([1.0, 0.0, 1.0]))
        with pytest.raises(ValueError, match="loc must be finite"):
            returns.set_normalization(float("nan"), 1.0)

    @pytest.mark.parametrize("batch", [(4,), (2, 3), ()])
    def test_pieces_equal_the_whole(self, batch, monkeypatch):
        """Rows go to the networks in pieces; the axis of the models stays whole."""
        network = StackedVelocityMLP(3, 7, hidden_sizes=(4,))
        returns = ReturnFlow(network, 2, loc=LOC, scale=SCALE)
        observation, candidates = torch.randn(3, *batch, OBS), torch.randn(3, *batch, 5, ACT)
        rows = []
        network.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:-1].numel()))
        options = {"tau_r": 1.0, "num_samples": 2}
        whole = returns.select(observation, candidates, **options)
        monkeypatch.setattr(return_flow, "MAX_ROWS", 12)
        rows.clear()
        pieces = returns.select(observation, candidates, **options)
        assert max(rows) == 12 and whole[2].shape == (3, *batch, 5)
        for got, want in zip(pieces, whole):
            torch.testing.assert_close(got, want)

    def test_actor_over_one_policy_and_a_stack(self):
        policy = FlowMatchingPolicy(VelocityMLP(OBS + ACT + 1, ACT, hidden_sizes=(4,)), ACT, 2)
        returns = ReturnFlow(StackedVelocityMLP(3, 7, hidden_sizes=(4,)), 2, loc=LOC, scale=SCALE)
        actor = EVORActor(
            policy,
            returns,
            num_candidates=5,
            num_samples=2,
            return_candidates=True,
            backend="torch",
        )
        data = actor(TensorDict(observation=torch.randn(3, ROWS, OBS), batch_size=[3, ROWS]))
        assert data["candidates"].shape == (3, ROWS, 5, ACT)
        best = data["candidate_values"].argmax(-1)[..., None, None]
        assert data["action"].equal(data["candidates"].take_along_dim(best, -2).squeeze(-2))


def draw_coupled(monkeypatch, draws):
    """Replaces the loss's random tensors by prescribed ones, in order."""
    queue = iter(draws)
    for name in ("randn_like", "rand_like"):
        monkeypatch.setattr(torch, name, lambda like: next(queue).expand_as(like))


def train(loss, batches, draws, monkeypatch, factor):
    optimizer = torch.optim.Adam(loss.value_network_params.values(True, True), lr=1e-2)
    updater = SoftUpdate(loss, tau=0.1)
    for batch, drawn in zip(batches, draws):
        draw_coupled(monkeypatch, drawn)
        value_loss, _ = loss.value_loss(batch)
        optimizer.zero_grad()
        (factor * value_loss).backward()
        optimizer.step()
        updater.step()


class TestManyRunsInOneProgram:
    @pytest.mark.parametrize("td_target", ["bellman", "sample", "coupled", "velocity"])
    def test_training_equals_separate_runs(self, td_target, monkeypatch):
        torch.manual_seed(0)
        models, policy = make_models(), FlowMatchingPolicy(nn.Linear(OBS + ACT + 1, ACT), ACT)
        stack = StackedVelocityMLP.from_models(models)
        batches = [make_batch(3, ROWS) for _ in range(5)]
        # Noise, next noise and flow time of each update.
        draws = [
            [torch.randn(3, ROWS, 1).double() for _ in range(2)] + [torch.rand(3, ROWS, 1).double()]
            for _ in range(5)
        ]
        options = {"td_target": td_target, "next_action": "dataset"}
        returns = ReturnFlow(stack, 2, loc=LOC, scale=SCALE)
        train(EVORLoss(policy, returns, **options), batches, draws, monkeypatch, factor=3)
        for index, (model, trained) in enumerate(zip(models, stack.unstack())):
            start = model.net[0].weight.clone()
            single = ReturnFlow(model, 2, loc=LOC[index].item(), scale=SCALE[index].item())
            train(
                EVORLoss(policy, single, **options),
                [batch[index] for batch in batches],
                [[tensor[index] for tensor in drawn] for drawn in draws],
                monkeypatch,
                factor=1,
            )
            assert (model.net[0].weight - start).abs().max() > 0.01
            for expected, actual in zip(model.parameters(), trained.parameters()):
                torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("kind", ["scalar", "categorical", "quantile"])
    @pytest.mark.parametrize("num_critics", [1, 2])
    def test_training_of_critics_equals_separate_runs(self, kind, num_critics):
        """Members of an ensemble lie one stack of settings apart."""
        outputs = 1 if kind == "scalar" else 5
        make = {
            "scalar": ScalarCritic,
            "categorical": partial(CategoricalCritic, low=-2.0, high=2.0, num_atoms=5),
            "quantile": partial(QuantileCritic, num_quantiles=5),
        }[kind]
        policy = FlowMatchingPolicy(nn.Linear(OBS + ACT + 1, ACT), ACT)
        models = [
            VelocityMLP(OBS + ACT, outputs, hidden_sizes=(8,), dtype=torch.float64)
            for _ in range(3 * num_critics)
        ]
        stack = StackedVelocityMLP.from_models(models)
        batches = [make_batch(3, ROWS) for _ in range(5)]

        def train(critic, batches, factor):
            loss = CriticLoss(policy, critic, next_action="dataset")
            optimizer = torch.optim.Adam(loss.qvalue_network_params.values(True, True), lr=1e-2)
            updater = SoftUpdate(loss, tau=0.1)
            for batch in batches:
                optimizer.zero_grad()
                (factor * loss.qvalue_loss(batch)[0]).backward()
                optimizer.step()
                updater.step()

        train(make(stack, num_critics=num_critics, loc=LOC, scale=SCALE), batches, 3)
        trained = stack.unstack()
        for index in range(3):
            members = models[index::3]
            single = members[0] if num_critics == 1 else StackedVelocityMLP.from_models(members)
            units = {"loc": LOC[index].item(), "scale": SCALE[index].item()}
            critic = make(single, num_critics=num_critics, **units)
            train(critic, [batch[index] for batch in batches], 1)
            alone = [single] if num_critics == 1 else single.unstack()
            for expected, actual in zip(alone, trained[index::3], strict=True):
                for one, other in zip(expected.parameters(), actual.parameters()):
                    torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)

    def test_mean_divides_gradients_by_the_number_of_models(self, monkeypatch):
        models, policy = make_models(), FlowMatchingPolicy(nn.Linear(OBS + ACT + 1, ACT), ACT)
        batch = make_batch(3, ROWS)
        draws = [torch.randn(3, ROWS, 1).double() for _ in range(2)]
        draws.append(torch.rand(3, ROWS, 1).double())
        gradients = {}
        for reduction in ("mean", "none"):
            stack = StackedVelocityMLP.from_models(models)
            loss = EVORLoss(
                policy, ReturnFlow(stack, 2), next_action="dataset", reduction=reduction
            )
            draw_coupled(monkeypatch, draws)
            value, _ = loss.value_loss(batch)
            value = value.mean(-1).sum() if reduction == "none" else value
            value.backward()
            gradients[reduction] = stack.net[0].weight.grad
        torch.testing.assert_close(gradients["none"], 3 * gradients["mean"])

    def test_compiled(self):
        stack = StackedVelocityMLP.from_models(make_models())
        inputs = torch.randn(3, 4, OBS + ACT + 2, dtype=torch.float64)
        compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(inputs), stack(inputs))


if __name__ == "__main__":
    pytest.main([__file__, "-q"])

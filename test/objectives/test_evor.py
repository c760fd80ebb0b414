# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What EVORLoss promises as a loss module."""

from __future__ import annotations

import pickle
import warnings
from copy import deepcopy

import pytest
import torch
from _evor_cases import (
    ACT,
    NEXT_ACTIONS,
    OBS,
    make_batch,
    make_loss,
    make_networks,
    seeded_call,
    total,
)
from tensordict import TensorDict
from torch import nn
from torchrl.data.postprocs import MultiStep
from torchrl.modules import MLP
from torchrl.objectives import HardUpdate, SoftUpdate, ValueEstimators
from torchrl.objectives.value import TD0Estimator, TDLambdaEstimator

from torchrl_evor import (
    EVORLoss,
    FlowMatchingPolicy,
    ReturnFlow,
    StackedVelocityMLP,
    VelocityMLP,
)
from torchrl_evor.objectives.td_targets import TD_TARGETS


class Encoded(nn.Module):
    """A head behind an encoder of the observation, which other networks may share."""

    def __init__(self, encoder, others, outputs):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.out_features + others, outputs)

    def forward(self, x):
        return self.head(torch.cat([self.encoder(x[..., :OBS]), x[..., OBS:]], -1))


class TestGradients:
    @pytest.mark.parametrize("td_target", TD_TARGETS)
    @pytest.mark.parametrize("next_action", NEXT_ACTIONS)
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_each_loss_reaches_its_own_network(self, td_target, next_action, reduction):
        for name in ("actor", "value"):
            loss = make_loss(td_target=td_target, next_action=next_action, reduction=reduction)
            batch = make_batch(8)
            for key in ("observation", "action", ("next", "observation"), ("next", "action")):
                batch[key].requires_grad_()
            loss(batch)[f"loss_{name}"].sum().backward()
            for key, parameter in loss.named_parameters():
                reached = parameter.grad is not None and bool((parameter.grad != 0).any())
                assert reached == key.startswith(f"{name}_network_params"), key
            assert batch["next", "observation"].grad is None
            assert batch["next", "action"].grad is None

    def test_parameters_and_targets(self):
        loss = make_loss()
        names = [name for name, _ in loss.named_parameters()]
        assert len(names) == len(set(names)) == 4 + 6
        assert not any("target" in name for name in names)
        loss(make_batch(4))  # before and after use
        assert names == [name for name, _ in loss.named_parameters()]
        targets = loss.target_value_network_params.values(True, True)
        assert not any(value.requires_grad for value in targets)

    def test_training_reaches_the_users_modules(self):
        policy, returns = make_networks()
        loss = EVORLoss(policy, returns, delay_value=False)
        before = [p.clone() for p in (*policy.parameters(), *returns.parameters())]
        optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
        total(loss(make_batch(8))).backward()
        optimizer.step()
        after = (*policy.parameters(), *returns.parameters())
        assert not any(torch.equal(a, b) for a, b in zip(before, after))

    def test_reset_parameters_recursive(self):
        loss = make_loss()
        everything = loss.state_dict()
        weights = [key for key in everything if key.endswith("net.0.weight")]
        assert len(weights) == 3  # policy, value, target value
        for key in weights:
            everything[key].fill_(1000.0)
        loss.reset_parameters_recursive()
        assert all(loss.state_dict()[key].abs().max() < 10 for key in weights)


class TestKeys:
    def test_only_the_priority_is_added(self):
        batch = make_batch(8)
        before = batch.clone()
        make_loss()(batch)
        assert set(batch.keys(True, True)) == {*before.keys(True, True), "td_error"}
        assert (batch.exclude("td_error") == before).all()
        assert batch["td_error"].shape == (8,) and not batch["td_error"].requires_grad

    @pytest.mark.parametrize("next_action", NEXT_ACTIONS)
    def test_in_keys_suffice(self, next_action):
        loss = make_loss(next_action=next_action)
        assert (("next", "action") in loss.in_keys) == (next_action == "dataset")
        assert total(loss(make_batch(8).select(*loss.in_keys))).isfinite()

    @pytest.mark.parametrize("next_action", NEXT_ACTIONS)
    def test_a_missing_key_is_named(self, next_action):
        loss = make_loss(next_action=next_action)
        for key in loss.in_keys:
            with pytest.raises(KeyError) as error:
                loss(make_batch(8).exclude(key))
            assert f"EVORLoss needs {key!r} in its batch" in error.value.args[0]

    def test_unknown_key(self):
        with pytest.raises(ValueError, match="returns"):
            make_loss().set_keys(returns="nowhere")

    def test_defaults_and_forwarding(self):
        loss = make_loss()
        names = ("reward", "done", "terminated", "steps_to_next_obs")
        for name in (*names, "action"):
            assert getattr(loss.tensor_keys, name) == name
        loss.set_keys(**{name: ("nested", name) for name in names}, priority="error")
        for _ in range(2):
            estimator = loss.value_estimator.tensor_keys
            assert [getattr(estimator, name) for name in names] == [("nested", n) for n in names]
            loss.make_value_estimator(gamma=0.5)  # keys set before survive a new estimator
        loss.set_keys(reward=None)
        assert loss.value_estimator.tensor_keys.reward == "reward"

    def test_nested_keys(self):
        """Every key under an agent's name; the same numbers as with flat keys."""
        policy, returns = make_networks()
        flat = EVORLoss(*deepcopy((policy, returns)), next_action="dataset", delay_value=False)
        policy.in_keys, policy.out_keys = [("agent", "observation")], [("agent", "action")]
        returns.in_keys = [("agent", "observation"), ("agent", "action")]
        nested = EVORLoss(policy, returns, next_action="dataset", delay_value=False)
        names = ("action", "reward", "done", "terminated", "priority_weight")
        nested.set_keys(**{name: ("agent", name) for name in names}, priority=("agent", "error"))
        batch = make_batch(8)
        batch["priority_weight"] = torch.rand(8)
        root = batch.select("observation", "action", "priority_weight")
        wrapped = TensorDict(agent=root, next=TensorDict(agent=batch["next"]), batch_size=[8])
        expected = seeded_call(flat, batch)
        assert (seeded_call(nested, wrapped) == expected).all()
        torch.testing.assert_close(wrapped["agent", "error"], batch["td_error"])
        assert ("next", "agent", "reward") in nested.in_keys

    def test_dispatch(self):
        loss, batch = make_loss(), make_batch(8)
        expected = seeded_call(loss, batch.clone())
        kwargs = {key: batch[key] for key in ("observation", "action")}
        kwargs |= {
            f"next_{key}": batch["next", key]
            for key in ("observation", "reward", "done", "terminated")
        }
        torch.manual_seed(1)
        for made, key in zip(loss(**kwargs), loss.out_keys, strict=True):
            torch.testing.assert_close(made, expected[key])
        assert set(loss.out_keys) == set(expected.keys())
        loss.select_out_keys("loss_value")
        torch.manual_seed(1)
        torch.testing.assert_close(loss(**kwargs), expected["loss_value"])


class TestShapes:
    @pytest.mark.parametrize("batch", [(0,), (1,), (7,), (2, 3), ()])
    @pytest.mark.parametrize("next_action", NEXT_ACTIONS)
    def test_any_batch(self, batch, next_action):
        data = make_batch(*batch)
        losses = make_loss(reduction="none", next_action=next_action)(data)
        assert losses["loss_actor"].shape == losses["loss_value"].shape == batch
        assert data["td_error"].shape == batch

    @pytest.mark.parametrize("td_target", TD_TARGETS)
    def test_no_batch_size(self, td_target):
        loss, batch = make_loss(td_target=td_target), make_batch(4, 5)
        bare = TensorDict(batch.to_dict(), batch_size=[])
        assert (seeded_call(loss, bare) == seeded_call(loss, batch)).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_dtype(self, dtype):
        losses = make_loss(dtype)(make_batch(8, dtype=dtype))
        assert {value.dtype for value in losses.values()} == {dtype}
        total(losses).backward()

    @pytest.mark.parametrize("return_bounds", [None, (-20.0, 20.0)])
    def test_half_precision(self, return_bounds):
        """Losses in the networks' dtype; what is told in reward units keeps its digits."""
        loss = make_loss(torch.bfloat16, return_bounds=return_bounds)
        losses = loss(make_batch(8, dtype=torch.bfloat16))
        assert losses["loss_actor"].dtype == losses["loss_value"].dtype == torch.bfloat16
        assert losses["value_target"].dtype == torch.float32
        total(losses).backward()

    def test_rewards_of_another_dtype(self):
        loss, batch = make_loss(next_action="dataset"), make_batch(8)
        double = batch.clone()
        double["next", "reward"] = batch["next", "reward"].double()
        assert (seeded_call(loss, double) == seeded_call(loss, batch)).all()

    def test_a_cast_reaches_the_networks(self):
        """Their buffers too, so that units set later hold for loss and actor alike."""
        policy, returns = make_networks()
        loss = EVORLoss(policy, returns).double()
        for module in (policy, returns):
            assert {t.dtype for t in module.state_dict().values()} == {torch.float64}
        returns.set_normalization(5.0, 2.0)
        assert loss.value_network_params["loc"] == 5
        assert loss.value_network_params["scale"] == 2
        total(loss(make_batch(4, dtype=torch.float64))).backward()
        assert all(p.grad is not None for p in returns.parameters())

    def test_wrong_network_output(self):
        policy, returns = make_networks()
        with pytest.raises(ValueError, match=r"velocity_network .* \(8, 2\), got \(8, 3\)"):
            bad = FlowMatchingPolicy(VelocityMLP(OBS + ACT + 1, 3, hidden_sizes=(4,)), ACT)
            EVORLoss(bad, returns, delay_value=False)(make_batch(8))
        with pytest.raises(ValueError, match=r"velocity_network .* \(8, 1\), got \(8, 2\)"):
            bad = ReturnFlow(VelocityMLP(OBS + ACT + 2, 2, hidden_sizes=(4,)))
            EVORLoss(policy, bad, delay_value=False)(make_batch(8))


class TestMultiStep:
    """n-step batches of TorchRL's own post-processing."""

    def losses(self, batch, n_steps):
        batch = MultiStep(gamma=0.9, n_steps=n_steps)(batch.clone())
        return seeded_call(make_loss(gamma=0.9), batch), batch["steps_to_next_obs"]

    def test_one_step_changes_nothing(self):
        batch = make_batch(4, 6)
        torch.manual_seed(0)
        expected = seeded_call(make_loss(gamma=0.9), batch)
        torch.manual_seed(0)
        losses, steps = self.losses(batch, 1)
        assert (losses == expected).all() and (steps == 1).all()

    def test_more_steps_change_the_value_loss_only(self):
        batch, results = make_batch(4, 6), []
        for n_steps in (1, 3):
            torch.manual_seed(0)
            results.append(self.losses(batch, n_steps)[0])
        assert results[0]["loss_actor"] == results[1]["loss_actor"]
        assert results[0]["loss_value"] != results[1]["loss_value"]

    @pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1)])
    def test_shape_of_the_steps(self, shape):
        """TorchRL writes them without a trailing dimension, data sets may have one."""
        batch, loss = make_batch(4, 6), make_loss()
        batch["steps_to_next_obs"] = torch.arange(24).reshape(shape)
        _, discount = loss._backup(batch)
        expected = 0.9 ** torch.arange(24.0).reshape(4, 6, 1) * ~batch["next", "terminated"]
        torch.testing.assert_close(discount, expected)


class TestReduction:
    def rows(self, loss, batch):
        """Losses row by row, with the draws of ``seeded_call``."""
        reduction, loss.reduction = loss.reduction, "none"
        rows = seeded_call(loss, batch.exclude("collector", "priority_weight"))
        loss.reduction = reduction
        return rows

    @pytest.mark.parametrize("key", ["loss_actor", "loss_value"])
    def test_mean_and_sum(self, key):
        loss, batch = make_loss(), make_batch(8)
        rows = self.rows(loss, batch)[key]
        torch.testing.assert_close(seeded_call(loss, batch)[key], rows.mean())
        loss.reduction = "sum"
        torch.testing.assert_close(seeded_call(loss, batch)[key], rows.sum())

    @pytest.mark.parametrize("key", ["loss_actor", "loss_value"])
    def test_mask(self, key):
        loss, batch = make_loss(), make_batch(8)
        mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 0], dtype=torch.bool)
        batch["collector", "mask"] = mask
        rows = self.rows(loss, batch)[key]
        torch.testing.assert_close(seeded_call(loss, batch)[key], rows[mask].mean())
        loss.reduction = "none"
        torch.testing.assert_close(seeded_call(loss, batch)[key], rows * mask)

    def test_everything_masked(self):
        loss, batch = make_loss(), make_batch(8)
        batch["collector", "mask"] = torch.zeros(8, dtype=torch.bool)
        losses = loss(batch)
        assert losses["loss_actor"] == 0 and losses["loss_value"] == 0
        total(losses).backward()
        assert all((p.grad == 0).all() for p in loss.parameters())

    @pytest.mark.parametrize("key", ["loss_actor", "loss_value"])
    def test_priority_weights(self, key):
        loss, batch = make_loss(), make_batch(8)
        rows = self.rows(loss, batch)[key]
        weight = batch["priority_weight"] = torch.rand(8)
        weighted = (weight * rows).sum() / weight.sum()
        torch.testing.assert_close(seeded_call(loss, batch)[key], weighted)
        loss.use_prioritized_weights = False
        torch.testing.assert_close(seeded_call(loss, batch)[key], rows.mean())

    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_priority_weights_of_another_shape(self, reduction):
        """They would be broadcast to a matrix of rows and weights."""
        loss, batch = make_loss(reduction=reduction), make_batch(8)
        batch["priority_weight"] = torch.rand(8, 1)
        with pytest.raises(ValueError, match=r"one weight for each row, \(8,\), got \(8, 1\)"):
            loss(batch)


class TestTargetNetwork:
    def distance(self, loss):
        online = loss.value_network_params.data["velocity_network"]
        return (
            (online - loss.target_value_network_params["velocity_network"]).abs().sum(reduce=True)
        )

    def step(self, loss):
        optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
        total(loss(make_batch(8))).backward()
        optimizer.step()

    def test_soft_update(self):
        loss = make_loss(updater=False)
        updater = SoftUpdate(loss, tau=0.25)
        assert self.distance(loss) == 0
        self.step(loss)
        moved = self.distance(loss)
        assert moved > 0
        updater.step()
        torch.testing.assert_close(self.distance(loss), 0.75 * moved)

    def test_hard_update(self):
        loss = make_loss(updater=False)
        updater = HardUpdate(loss, value_network_update_interval=2)
        self.step(loss)
        distances = []
        for _ in range(3):
            updater.step()
            distances.append(self.distance(loss).item())
        assert distances[0] == distances[1] > 0 == distances[2]

    def test_without_a_target_network(self):
        loss = make_loss(delay_value=False)
        self.step(loss)
        assert self.distance(loss) == 0

    def test_value_loss_reads_the_target_network(self):
        loss, batch = make_loss(), make_batch(64)
        before = seeded_call(loss, batch)["value_target"]
        loss.target_value_network_params["velocity_network", "net", "3", "bias"].add_(1.0)
        assert seeded_call(loss, batch)["value_target"] > before + 0.1

    @pytest.mark.parametrize("delay_value", [True, False])
    @pytest.mark.parametrize("next_action", ["dataset", "improved"])
    def test_an_error_leaves_the_users_network(self, delay_value, next_action):
        """And not the target's weights in it, by which an actor would go on."""
        policy, returns = make_networks()
        loss = EVORLoss(policy, returns, delay_value=delay_value, next_action=next_action)
        before = {**dict(policy.named_parameters()), **dict(returns.named_parameters())}
        bad = [make_batch(4) for _ in range(3)]
        bad[0]["next", "observation"] = torch.randn(4, OBS + 1)
        bad[1]["next", "action"] = torch.randn(4, ACT + 1)
        bad[2]["observation"] = torch.randn(4, OBS + 1)
        failed = 0
        for batch in bad:
            try:
                loss(batch)
            except RuntimeError:
                failed += 1
            now = {**dict(policy.named_parameters()), **dict(returns.named_parameters())}
            assert now.keys() == before.keys()
            assert all(now[key] is value for key, value in before.items())
        assert failed == (3 if next_action == "dataset" else 2)  # which alone reads the action

    @pytest.mark.parametrize("delay_value", [True, False])
    def test_warns_only_without_an_updater(self, delay_value):
        loss = make_loss(delay_value=delay_value, updater=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss(make_batch(4))
        assert any("target" in str(w.message).lower() for w in caught) == delay_value
        loss = make_loss(delay_value=delay_value)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            total(loss(make_batch(4))).backward()


class TestEstimator:
    def test_gamma(self):
        """A next return of 1 with no reward is worth gamma."""
        loss = make_loss(gamma=0.7)
        assert loss.value_estimator.gamma.item() == pytest.approx(0.7)
        assert EVORLoss(*make_networks()).value_estimator.gamma.item() == pytest.approx(0.99)

    @pytest.mark.parametrize("gamma", [-0.1, 1.5, float("nan")])
    def test_bad_gamma(self, gamma):
        with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\], got"):
            make_loss().make_value_estimator(gamma=gamma)

    @pytest.mark.parametrize("kind", [k for k in ValueEstimators if k != ValueEstimators.TD0])
    def test_unsupported(self, kind):
        with pytest.raises(NotImplementedError):
            make_loss().make_value_estimator(kind)

    @pytest.mark.parametrize("made", [False, True])
    def test_estimators_that_read_along_time(self, made):
        """The rows of a batch are no trajectory."""
        loss, kwargs = make_loss(), {"gamma": 0.9, "lmbda": 0.9, "value_network": None}
        kind = TDLambdaEstimator(**kwargs) if made else TDLambdaEstimator
        with pytest.raises(NotImplementedError, match="must be a TD0Estimator, got TDLambda"):
            loss.make_value_estimator(kind, **({} if made else {"gamma": 0.9, "lmbda": 0.9}))
        with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\], got 1.7"):
            loss.make_value_estimator(TD0Estimator(gamma=1.7, value_network=None))
        loss.make_value_estimator(TD0Estimator(gamma=0.5, value_network=None))
        batch = make_batch(4)
        batch["next", "terminated"].zero_()
        torch.testing.assert_close(loss._backup(batch)[1], torch.full((4, 1), 0.5))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("steps", [1, 300])
    def test_discount_keeps_its_digits(self, dtype, steps):
        """In bfloat16 0.999 would be 1."""
        loss = make_loss(gamma=0.999).to(dtype)
        assert loss.value_estimator.gamma.item() == pytest.approx(0.999)
        batch = make_batch(4).apply(lambda x: x.to(dtype) if x.is_floating_point() else x)
        batch["steps_to_next_obs"] = torch.full((4, 1), steps)
        batch["next", "terminated"].zero_()
        discount = loss._backup(batch)[1].flatten().tolist()
        assert discount == pytest.approx([0.999**steps] * 4, rel=1e-4)
        assert {tensor.dtype for tensor in loss.compute_target(batch)} == {dtype}
        assert loss.double().value_estimator.gamma.item() == pytest.approx(0.999)

    def test_a_whole_discount_takes_the_digits_of_a_checkpoint(self):
        loss = make_loss(gamma=1)
        loss.load_state_dict(make_loss(gamma=0.99).state_dict())
        assert loss.value_estimator.gamma.item() == pytest.approx(0.99)

    @pytest.mark.parametrize("next_action", ["policy", "dataset"])
    def test_vmap_over_parameters(self, next_action):
        loss, batch = make_loss(next_action=next_action), make_batch(8)
        one = TensorDict.from_module(loss).data
        both = TensorDict.stack([one, one.apply(lambda x: x * 0.5)])

        def value(params):
            with params.to_module(loss):
                return loss(batch.clone())["loss_value"]

        first, second = torch.vmap(value, randomness="different")(both).tolist()
        assert first > 0 and second > 0 and first != second

    def test_padded_chunks(self):
        batch = make_batch(3)
        batch["action_is_pad"] = torch.tensor([[False, False], [False, True], [True, True]])
        losses = seeded_call(make_loss(reduction="none"), batch)
        assert losses["loss_value"].ne(0).tolist() == [True, False, False]
        assert batch["td_error"].ne(0).tolist() == [True, False, False]

    def test_options_of_the_improved_choice(self, monkeypatch):
        options = {"tau_r": 3.0, "tau_q": 0.5, "num_samples": 6, "num_steps": 2}
        loss = make_loss(next_action="improved", num_candidates=5, **options)
        select, seen = ReturnFlow.select, []

        def spy(self, observation, candidates, **kwargs):
            seen.append((candidates.shape, kwargs))
            return select(self, observation, candidates, **kwargs)

        monkeypatch.setattr(ReturnFlow, "select", spy)
        loss(make_batch(4))
        assert seen == [((4, 5, ACT), options)]

    @pytest.mark.parametrize("key", ["candidates", ("drawn", "before")])
    def test_candidates_of_the_batch(self, monkeypatch, key):
        """The best of them by the target network; one alone is the next action itself."""
        batch, drawn = make_batch(6), torch.rand(6, 3, ACT)
        loss = make_loss(next_action="improved", num_candidates=3, num_samples=5)
        loss.set_keys(candidates=key)
        for leaf in loss.target_value_network_params.values(True, True):
            leaf.data.add_(0.3 * torch.randn_like(leaf))
        batch["next"].set(key, drawn)
        monkeypatch.setattr(type(loss.actor_network.module), "forward", None)
        _, target = make_networks()
        loss.target_value_network_params.data.to_module(target)
        values = target.q_star(batch["next", "observation"].unsqueeze(-2), drawn, float("inf"), 5)
        best = drawn[torch.arange(6), values.argmax(-1)]
        assert torch.equal(loss._next_action(batch), best)
        dataset = make_loss(next_action="dataset")
        dataset.load_state_dict(loss.state_dict())
        batch["next", "action"] = best
        assert (seeded_call(loss, batch.clone()) == seeded_call(dataset, batch)).all()

    def test_candidates_of_another_number(self):
        batch = make_batch(6)
        batch["next", "candidates"] = torch.rand(6, 3, ACT)
        loss = make_loss(next_action="improved", num_candidates=4)
        message = r"'candidates'\) must have the shape \(6, 4, 2\), got \(6, 3, 2\)"
        with pytest.raises(ValueError, match=message):
            loss(batch)
        make_loss(next_action="dataset")(batch)  # which does not choose

    @pytest.mark.parametrize(
        "solver, num_steps, message",
        [
            ("euler", 0, "num_steps must be an integer of at least 1, got 0"),
            ("midpoint", 3, "num_steps must be even for solver='midpoint'.* got 3"),
        ],
    )
    def test_bad_steps_of_the_improved_choice(self, solver, num_steps, message):
        policy, returns = make_networks()
        returns.num_steps, returns.solver = 4, solver
        with pytest.raises(ValueError, match=message):
            EVORLoss(policy, returns, num_steps=num_steps)

    def test_an_optimizer_copied_with_its_loss(self):
        loss = make_loss()
        copy, optimizer = deepcopy((loss, torch.optim.Adam(loss.parameters())))
        mine = {id(p) for p in copy.parameters()}
        assert {id(p) for p in optimizer.param_groups[0]["params"]} == mine

    def test_copy_of_a_shared_encoder(self):
        encoder = nn.Linear(OBS, 4)
        policy = FlowMatchingPolicy(Encoded(encoder, ACT + 1, ACT), ACT)
        loss = deepcopy(EVORLoss(policy, ReturnFlow(Encoded(encoder, ACT + 2, 1))))
        assert len(list(loss.parameters())) == 2 + 2 + 2
        networks = loss.actor_network.module, loss.value_network
        assert len({id(network.velocity_network.encoder.weight) for network in networks}) == 1

    @pytest.mark.parametrize("copied", [deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
    def test_networks_of_a_copy_are_its_own(self, copied):
        """They follow what is loaded into the copy, and the copy follows their units."""
        source, other = make_loss(), make_loss()
        loss = copied(source)
        loss.load_state_dict(other.state_dict())
        for network in ("actor_network", "value_network"):
            expected = dict(getattr(other, network).named_parameters())
            for name, value in getattr(loss, network).named_parameters():
                torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
        loss.value_network.set_normalization(-200.0, 50.0)
        assert loss.value_network_params["loc"].item() == -200.0
        assert source.value_network.loc.item() == 0.0
        total(loss(make_batch(4))).backward()
        assert all(p.grad is not None for p in loss.value_network.parameters())

    def test_state_dict_round_trip(self):
        source, copy = make_loss(gamma=0.7), make_loss(gamma=0.9)
        source.target_value_network_params["velocity_network", "net", "0", "bias"].fill_(5.0)
        copy.load_state_dict(source.state_dict())
        batch = make_batch(8)
        assert (seeded_call(source, batch) == seeded_call(copy, batch)).all()
        assert copy.value_estimator.gamma.item() == pytest.approx(0.7)

    def test_fresh_loss_has_the_same_state(self):
        """A checkpoint loads whether or not the discount was ever named."""
        fresh = EVORLoss(*make_networks())
        assert fresh.state_dict().keys() == make_loss().state_dict().keys()


class TestEnsemble:
    """Flows of one ensemble are trained side by side, each by a target of its own."""

    @staticmethod
    def pair(**kwargs):
        policy, first = make_networks()
        _, second = make_networks()
        networks = [first.velocity_network, second.velocity_network]
        returns = ReturnFlow(networks, num_steps=3, loc=-2.0, scale=3.0)
        return EVORLoss(policy, returns, **kwargs).make_value_estimator(gamma=0.9)

    @pytest.mark.parametrize("td_target", TD_TARGETS)
    @pytest.mark.parametrize("next_action", NEXT_ACTIONS)
    def test_members_share_nothing(self, td_target, next_action):
        """The target of one member does not reach the gradient of the other."""
        loss = self.pair(td_target=td_target, next_action=next_action, tau_q=float("inf"))
        SoftUpdate(loss, tau=0.1)
        batch = make_batch(8)

        def gradients():
            loss.zero_grad()
            torch.manual_seed(1)
            loss(batch)["loss_value"].backward()
            return {k: p.grad.clone() for k, p in loss.named_parameters() if p.grad is not None}

        before = gradients()
        targets = loss.target_value_network_params["velocity_network", "1"]
        targets.apply_(lambda p: p.add_(0.1))
        after = gradients()
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        names = {key for key in before if "velocity_network.1." in key}
        assert len(names) == 6 and changed == names

    def test_loss_is_the_mean_of_the_members(self):
        """By the errors of each member at the points that the ensemble drew."""
        loss = self.pair(next_action="dataset")
        batch = make_batch(8)
        torch.manual_seed(1)
        point, time, target = loss.compute_target(batch)
        assert point.shape == time.shape == target.shape == (2, 8, 1)
        assert not torch.equal(time[0], time[1])
        errors = []
        for index in range(2):
            member = loss.value_network.members[index]
            params = loss.value_network_params["velocity_network", str(index)]
            with params.to_module(member):
                inputs = (batch["observation"], batch["action"], point[index], time[index])
                errors.append(member(torch.cat(inputs, -1)) - target[index])
        errors = torch.cat(errors, -1)
        torch.manual_seed(1)
        value, metadata = loss.value_loss(batch)
        torch.testing.assert_close(value, errors.square().mean())
        torch.testing.assert_close(metadata["td_error"], errors.abs().mean(-1))

    @pytest.mark.parametrize("batch", [(8,), (2, 3), (0,)])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_shapes(self, batch, reduction):
        loss = self.pair(reduction=reduction)
        data = make_batch(*batch)
        losses = loss(data)
        assert losses["loss_value"].shape == (batch if reduction == "none" else ())
        assert data["td_error"].shape == batch and losses["value_target"].shape == ()

    def test_a_network_for_each_model_of_a_stack(self):
        """Members may be stacks, for batches with a leading axis of models."""
        stacks = [StackedVelocityMLP(4, OBS + ACT + 2, hidden_sizes=(8,)) for _ in range(2)]
        returns = ReturnFlow(stacks, num_steps=3, loc=torch.arange(4.0), scale=torch.ones(4))
        loss = EVORLoss(make_networks()[0], returns, next_action="dataset", reduction="none")
        batch = make_batch(4, 5)
        value, _ = loss.value_loss(batch)
        assert value.shape == (4, 5)
        value.mean(-1).sum().backward()
        parameters = dict(loss.value_network_params.flatten_keys().items())
        for key, parameter in parameters.items():
            if "net" in key:
                assert (parameter.grad.flatten(1) != 0).any(-1).all(), key

    def test_trains_the_users_networks(self):
        loss = self.pair(delay_value=False)
        before = [p.clone() for p in loss.parameters()]
        optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
        total(loss(make_batch(8))).backward()
        optimizer.step()
        assert not any(torch.equal(a, b) for a, b in zip(before, loss.parameters()))

    def test_state_dict_round_trip(self):
        first, second = self.pair(), self.pair()
        second.load_state_dict(first.state_dict())
        batch = make_batch(8)
        assert (seeded_call(first, batch.clone()) == seeded_call(second, batch.clone())).all()


class TestReturnBounds:
    """What is known of returns keeps a network that extrapolates out of its own targets."""

    low, high = -10.0, 0.0

    @staticmethod
    def runaway(num_networks=1, gain=50.0, **kwargs):
        """Flows that carry any noise away, ``dz/dt = gain z``."""
        networks = [nn.Linear(OBS + ACT + 2, 1) for _ in range(num_networks)]
        for network in networks:
            nn.init.zeros_(network.bias)
            with torch.no_grad():
                network.weight.zero_()[0, -2] = gain
        returns = ReturnFlow(networks, num_steps=4, solver="midpoint", loc=-2.0, scale=3.0)
        loss = EVORLoss(make_networks()[0], returns, next_action="dataset", **kwargs)
        return loss.make_value_estimator(gamma=0.9)

    def excess(self, loss, batch):
        """How far the ends of the regression's paths lie beyond what is possible, in rewards."""
        point, time, target = loss.compute_target(batch)
        end = loss.value_network.denormalize(point + (1 - time) * target)
        reward = batch["next", "reward"]
        discount = 0.9 * ~batch["next", "terminated"]
        low, high = reward + discount * self.low, reward + discount * self.high
        return torch.maximum(low - end, end - high).max().item()

    @pytest.mark.parametrize("td_target", ["bellman", "sample"])
    @pytest.mark.parametrize("num_networks", [1, 2])
    def test_targets_lie_between(self, td_target, num_networks):
        batch = make_batch(500)
        options = {"num_networks": num_networks, "td_target": td_target}
        assert self.excess(self.runaway(**options), batch) > 1000
        for gain in (5.0, 50.0):  # under the smaller one midpoints alone would lead beyond them
            bounds = {"return_bounds": (self.low, self.high), "gain": gain}
            assert self.excess(self.runaway(**options, **bounds), batch) < 1e-3

    @pytest.mark.parametrize("td_target", TD_TARGETS)
    def test_points_stay_near(self, td_target):
        """Where the next regression is fitted: between noises and returns, in z units."""
        batch = make_batch(500)
        bounded = self.runaway(td_target=td_target, return_bounds=(self.low, self.high))
        assert bounded.compute_target(batch)[0].abs().max() < 10
        assert self.runaway(td_target=td_target).compute_target(batch)[0].abs().max() > 1000

    def test_without_effect(self):
        batch = make_batch(8)
        loss = make_loss(return_bounds=(-float("inf"), float("inf")))
        free = make_loss()
        free.load_state_dict(loss.state_dict())
        assert (seeded_call(loss, batch) == seeded_call(free, batch)).all()

    def test_units_of_each_model_of_a_stack(self):
        stack = StackedVelocityMLP(4, OBS + ACT + 2, hidden_sizes=(8,))
        returns = ReturnFlow(stack, num_steps=3, loc=torch.arange(4.0), scale=torch.ones(4))
        bounds = {"return_bounds": (-0.01, 0.01)}
        loss = EVORLoss(make_networks()[0], returns, next_action="dataset", **bounds)
        loss.make_value_estimator(gamma=0.9)
        batch = make_batch(4, 50)
        point, time, target = loss.compute_target(batch)
        end = loss.value_network.denormalize(point + (1 - time) * target)
        assert (end - batch["next", "reward"]).abs().max() < 0.01


class TestObservationNoise:
    """The policy learns beside the data what is done near by; nothing else hears of it."""

    def recorded(self, monkeypatch, *batch, **kwargs):
        """The observations, and those at which the velocity fields were asked."""
        loss, asked = make_loss(**kwargs), {"policy": [], "value": []}
        modules = {"policy": loss.actor_network.module, "value": loss.value_network}
        for name, module in modules.items():

            def velocity(observation, *rest, _original=module.velocity, _name=name):
                asked[_name].append(observation)
                return _original(observation, *rest)

            monkeypatch.setattr(module, "velocity", velocity)
        data = make_batch(*batch)
        data["observation"] = data["observation"] * torch.tensor([1.0, 10.0, 0.0]) + 5.0
        before = data["observation"].clone()
        loss(data)
        assert torch.equal(data["observation"], before)
        return before, asked

    @pytest.mark.parametrize("batch", [(40_000,), (200, 200)])
    def test_a_tenth_moves_by_the_deviation_of_each_feature(self, monkeypatch, batch):
        torch.manual_seed(0)
        observation, asked = self.recorded(monkeypatch, *batch, observation_noise=0.5)
        seen = asked["policy"][0]
        moved = (seen != observation).any(-1)
        # Of 40,000 rows the share has a deviation of 0.0015.
        assert moved.float().mean().item() == pytest.approx(0.1, abs=0.006)
        step = (seen - observation)[moved]
        # Whole rows, and no feature that says nothing.
        assert (step[:, :2] != 0).all() and (step[:, 2] == 0).all()
        expected = [0.5, 5.0]  # half of 1 and of 10
        assert step[:, :2].std(0).tolist() == pytest.approx(expected, rel=0.06)
        assert step[:, :2].mean(0).abs().tolist() == pytest.approx([0, 0], abs=0.4)

    @pytest.mark.parametrize("next_action", NEXT_ACTIONS)
    def test_the_value_reads_the_data(self, monkeypatch, next_action):
        kwargs = {"observation_noise": 0.5, "next_action": next_action}
        observation, asked = self.recorded(monkeypatch, 500, **kwargs)
        assert torch.equal(asked["value"][-1], observation)
        assert not torch.equal(asked["policy"][0], observation)

    def test_by_default_there_is_none(self, monkeypatch):
        observation, asked = self.recorded(monkeypatch, 500)
        assert torch.equal(asked["policy"][0], observation)

    @pytest.mark.parametrize("batch", [(0,), (1,), (2, 3), ()])
    def test_any_batch(self, batch):
        losses = make_loss(reduction="none", observation_noise=0.5)(make_batch(*batch))
        assert losses["loss_actor"].shape == batch
        assert losses["loss_actor"].isfinite().all()


class TestBadInput:
    @pytest.mark.parametrize(
        "kwargs,name",
        [
            ({"td_target": "td3"}, "td_target must be one of .*bellman.*, got 'td3'"),
            ({"next_action": "data"}, "next_action must be one of .*dataset.*, got 'data'"),
            ({"reduction": "max"}, "reduction must be one of .*mean.*, got 'max'"),
            ({"use_prioritized_weights": "always"}, "use_prioritized_weights must be .*'always'"),
            ({"num_candidates": 0}, "num_candidates must be an integer of at least 1, got 0"),
            ({"num_samples": -1}, "num_samples must be an integer of at least 1, got -1"),
            ({"tau_r": -1.0}, "tau_r must be a temperature"),
            ({"tau_r": None}, "tau_r must be a temperature"),
            ({"tau_q": float("nan")}, "tau_q must be a temperature"),
            ({"observation_noise": -0.1}, r"observation_noise must be a deviation .* got -0.1"),
            ({"observation_noise": float("inf")}, "observation_noise must be a deviation"),
            ({"observation_noise": float("nan")}, "observation_noise must be a deviation"),
            ({"observation_noise": True}, "observation_noise must be a deviation"),
            ({"observation_noise": "0.1"}, "observation_noise must be a deviation"),
            ({"return_bounds": (0.0, -1.0)}, r"return_bounds must be .* got \(0.0, -1.0\)"),
            ({"return_bounds": (-1.0,)}, "return_bounds must be None or two increasing numbers"),
            ({"return_bounds": (float("nan"), 0.0)}, "return_bounds must be None or two"),
            ({"return_bounds": 5.0}, "return_bounds must be None or two increasing numbers"),
            ({"return_bounds": "ab"}, "return_bounds must be None or two increasing numbers"),
        ],
    )
    def test_options(self, kwargs, name):
        with pytest.raises(ValueError, match=name):
            EVORLoss(*make_networks(), **kwargs)

    @pytest.mark.parametrize(
        "pad",
        [
            torch.tensor([True, False, False, False]),  # [B], not [B, h]
            torch.zeros(4, 2),
            torch.zeros(4, 3, dtype=torch.bool),  # actions of 2 numbers are no 3 steps
            torch.zeros(3, 2, dtype=torch.bool),
        ],
    )
    def test_padding(self, pad):
        batch = make_batch(4, batch_size=[]).set("action_is_pad", pad)
        with pytest.raises(ValueError, match=r"'action_is_pad' must be bool, of shape \(4, 'h'\)"):
            make_loss().actor_loss(batch)

    def test_networks(self):
        policy, returns = make_networks()
        with pytest.raises(TypeError, match="actor_network must be a FlowMatchingPolicy"):
            EVORLoss(nn.Linear(2, 2), returns)
        with pytest.raises(TypeError, match="value_network must be a ReturnFlow"):
            EVORLoss(policy, nn.Linear(2, 2))

    def test_lazy_value_network(self):
        policy, _ = make_networks()
        returns = ReturnFlow(MLP(out_features=1, num_cells=[8]))
        with pytest.raises(ValueError, match="value_network must have seen data"):
            EVORLoss(policy, returns)
        returns(make_batch(2).select("observation", "action"))
        EVORLoss(policy, returns)(make_batch(2))

    def test_options_are_keyword_only(self):
        with pytest.raises(TypeError):
            EVORLoss(*make_networks(), "bellman")


if __name__ == "__main__":
    pytest.main([__file__])

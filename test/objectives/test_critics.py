# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import pytest
import torch
from _known_laws import Chain
from tensordict import TensorDict
from torch import nn
from torchrl.objectives import SoftUpdate, ValueEstimators

from torchrl_evor import (
    CategoricalCritic,
    CriticLoss,
    EVORLoss,
    FlowMatchingPolicy,
    HLGaussCritic,
    QuantileCritic,
    ReturnFlow,
    ScalarCritic,
    StackedVelocityMLP,
    VelocityMLP,
)

INF = float("inf")
OBS, ACT = 3, 2
KINDS = {
    "scalar": (ScalarCritic, 1, {}),
    "categorical": (CategoricalCritic, 11, {"low": -2.0, "high": 2.0, "num_atoms": 11}),
    "hl_gauss": (HLGaussCritic, 11, {"low": -2.0, "high": 2.0, "num_atoms": 11}),
    "quantile": (QuantileCritic, 7, {"num_quantiles": 7}),
}


def make_policy(dtype=None, **kwargs):
    network = VelocityMLP(OBS + ACT + 1, ACT, hidden_sizes=(8,), dtype=dtype)
    return FlowMatchingPolicy(network, ACT, num_steps=2, **kwargs)


def make_critic(kind="scalar", dtype=None, **kwargs):
    cls, features, options = KINDS[kind]
    stack = StackedVelocityMLP(2, OBS + ACT, features, hidden_sizes=(8,), dtype=dtype)
    return cls(stack, num_critics=2, scale=2.0, **options, **kwargs).to(dtype)


def make_loss(kind="scalar", dtype=None, gamma=0.9, updater=True, **kwargs):
    loss = CriticLoss(make_policy(dtype), make_critic(kind, dtype), **kwargs)
    loss.make_value_estimator(gamma=gamma)
    if updater and kwargs.get("delay_qvalue", True):
        SoftUpdate(loss, tau=0.1)
    return loss


def make_batch(*batch, dtype=None, batch_size=None):
    batch_size = batch if batch_size is None else batch_size
    terminated = torch.rand(*batch, 1) < 0.3
    return TensorDict(
        observation=torch.randn(*batch, OBS, dtype=dtype),
        action=torch.rand(*batch, ACT, dtype=dtype) * 2 - 1,
        next=TensorDict(
            observation=torch.randn(*batch, OBS, dtype=dtype),
            action=torch.rand(*batch, ACT, dtype=dtype) * 2 - 1,
            reward=torch.randn(*batch, 1, dtype=dtype),
            done=terminated | (torch.rand(*batch, 1) < 0.3),
            terminated=terminated,
            batch_size=batch_size,
        ),
        batch_size=batch_size,
    )


def seeded_call(loss, batch, seed=1):
    torch.manual_seed(seed)
    return loss(batch)


def total(losses):
    return losses["loss_actor"].mean() + losses["loss_qvalue"].mean()


class Linear(nn.Module):
    """The sum of its inputs times a gain: a value that can be done on paper."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, inputs):
        return self.gain * inputs.sum(-1, keepdim=True)


class TestByHand:
    def batch(self, **extra):
        return TensorDict(
            observation=torch.tensor([[1.0], [1.0], [1.0]]),
            action=torch.tensor([[0.5], [0.5], [0.5]]),
            next=TensorDict(
                observation=torch.tensor([[4.0], [4.0], [4.0]]),
                action=torch.tensor([[2.0], [2.0], [2.0]]),
                reward=torch.tensor([[10.0], [10.0], [10.0]]),
                done=torch.tensor([[False], [True], [True]]),
                terminated=torch.tensor([[False], [False], [True]]),
            ),
            batch_size=[3],
            **extra,
        )

    def loss(self, **kwargs):
        policy = FlowMatchingPolicy(VelocityMLP(3, 1, hidden_sizes=(4,)), 1)
        critic = ScalarCritic(Linear(), **kwargs)
        loss = CriticLoss(policy, critic, next_action="dataset", reduction="none")
        SoftUpdate(loss, tau=0.5)
        return loss.make_value_estimator(gamma=0.5)

    def test_scalar(self):
        batch = self.batch()
        loss, metadata = self.loss().qvalue_loss(batch)
        # Value 1.5; targets 10 + 0.5 * 6, the same past a time limit, 10 at a terminal.
        assert metadata["td_error"].tolist() == [11.5, 11.5, 8.5]
        assert loss.tolist() == [11.5**2, 11.5**2, 8.5**2]
        assert metadata["value_target"].item() == 12.0

    def test_units(self):
        loss, metadata = self.loss(loc=3.0, scale=2.0).qvalue_loss(self.batch())
        # Value 3 + 2 * 1.5 = 6, next value 3 + 2 * 6 = 15; the regression is in z units.
        assert metadata["td_error"].tolist() == [11.5, 11.5, 4.0]
        assert loss.tolist() == [(11.5 / 2) ** 2, (11.5 / 2) ** 2, 4.0]

    def test_n_step(self):
        batch = self.batch(steps_to_next_obs=torch.tensor([[1], [2], [3]]))
        _, metadata = self.loss().qvalue_loss(batch)
        assert metadata["td_error"].tolist() == [11.5, 10.0, 8.5]

    def test_target_network(self):
        loss = self.loss()
        with torch.no_grad():
            loss.qvalue_network_params.get(("network", "gain")).fill_(3.0)
        _, metadata = loss.qvalue_loss(self.batch())
        assert metadata["td_error"].tolist() == [8.5, 8.5, 5.5]  # value 4.5, targets as before

    def test_quantile_targets(self):
        network = nn.Linear(2, 2)
        with torch.no_grad():
            network.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
            network.bias.zero_()
        critic = QuantileCritic(network, num_quantiles=2, kappa=0.0)
        policy = FlowMatchingPolicy(VelocityMLP(3, 1, hidden_sizes=(4,)), 1)
        loss = CriticLoss(policy, critic, next_action="dataset").make_value_estimator(gamma=0.5)
        SoftUpdate(loss, tau=0.5)
        values, log_weights = loss.compute_target(self.batch())
        assert log_weights is None
        assert values.tolist() == [[12.0, 11.0], [12.0, 11.0], [10.0, 10.0]]

    @pytest.mark.parametrize("name", ["reward", "done", "terminated"])
    @pytest.mark.parametrize("shape", [(3,), (3, 2)])
    def test_shapes_that_would_mix_rows(self, name, shape):
        """[B] beside [B, 1] broadcasts to [B, B]: every row would learn a mean over the batch."""
        batch = make_batch(3)
        entry = batch["next", name]
        batch["next", name] = entry.expand(3, 2) if len(shape) == 2 else entry.squeeze(-1)
        expected = rf"\('next', '{name}'\) must have the shape \(3, 1\), got \({shape[0]},"
        with pytest.raises(ValueError, match=expected):
            make_loss()(batch)

    @pytest.mark.parametrize("kind", KINDS)
    def test_units_set_late_hold_for_the_target_too(self, kind):
        """The target is r + 0.9 Q', and Q' moves with the centre of the returns."""
        loss, batch = make_loss(kind), make_batch(5)
        batch["next", "terminated"][:] = False
        targets = []
        for loc in (0.0, -7.0):
            loss.qvalue_network_params["loc"].fill_(loc)
            torch.manual_seed(0)
            targets.append(loss.compute_target(batch)[0])
        torch.testing.assert_close(targets[1], targets[0] - 0.9 * 7.0)

    def test_padded_chunks(self):
        pad = torch.tensor([[False, False], [False, True], [True, True]])
        batch = make_batch(3)
        batch["action_is_pad"] = pad
        loss = make_loss(reduction="none")
        losses = seeded_call(loss, batch)
        full = seeded_call(loss, batch.exclude("action_is_pad"))
        assert losses["loss_qvalue"].tolist() == [full["loss_qvalue"][0].item(), 0.0, 0.0]
        assert losses["loss_actor"][0] == full["loss_actor"][0] and losses["loss_actor"][2] == 0
        assert 0 < losses["loss_actor"][1] < full["loss_actor"][1]
        assert batch["td_error"].tolist() == [batch["td_error"][0].item(), 0.0, 0.0]
        assert batch["td_error"][0] > 0

    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_padded_steps_do_not_reach_the_policy(self, size):
        """The ``size`` coordinates of a step lie side by side in a flattened chunk."""
        batch = make_batch(3)
        batch["action"] = torch.rand(3, 2 * size) * 2 - 1
        batch["action_is_pad"] = torch.tensor([[False, True]]).expand(3, 2)
        network = VelocityMLP(OBS + 2 * size + 1, 2 * size, hidden_sizes=(8,))
        loss = CriticLoss(FlowMatchingPolicy(network, 2 * size), make_critic())
        bias = loss.actor_network_params["module", "velocity_network", "net", "2", "bias"]
        (gradient,) = torch.autograd.grad(loss.actor_loss(batch)[0], [bias])
        assert (gradient[:size] != 0).all() and (gradient[size:] == 0).all()


class Table(nn.Module):
    """Free parameters for each state and action of the chain."""

    def __init__(self, length, num_outputs):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2 * length, num_outputs))

    def forward(self, inputs):
        state, right = inputs[..., :-1], inputs[..., -1:] > 0
        index = torch.cat([state * ~right, state * right], -1)
        return index @ self.table


class TestLearnsTheChain:
    """Policy evaluation on a chain whose return laws are known exactly."""

    def fit(self, critic, updates=1500):
        torch.manual_seed(0)
        chain = Chain()
        policy = FlowMatchingPolicy(VelocityMLP(chain.length + 2, 1, hidden_sizes=(4,)), 1)
        loss = CriticLoss(policy, critic, next_action="dataset")
        loss.make_value_estimator(gamma=chain.gamma)
        updater = SoftUpdate(loss, tau=0.1)
        optimizer = torch.optim.Adam(loss.qvalue_network_params.values(True, True), lr=0.05)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, updates)
        for _ in range(updates):
            value, _ = loss.qvalue_loss(chain.sample(256))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            updater.step()
        return chain

    def exact(self, chain, tau):
        values, law = chain.returns()
        if tau == INF:
            return (law * values).sum(-1).flatten()
        return tau * torch.logsumexp(values / tau + law.log(), -1).flatten()

    def q_star(self, chain, critic, tau):
        state = torch.arange(chain.length).repeat_interleave(2)
        action = torch.arange(2).repeat(chain.length)
        return critic.q_star(*chain.encode(state, action), tau).double()

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "kind,num_outputs,options,temperatures",
        [
            ("scalar", 1, {}, [INF]),
            ("hl_gauss", 51, {"low": -5.5, "high": 0.5, "num_atoms": 51}, [INF]),
            # Not 0.3: the mass that a softmax leaves on unreachable high atoms decides there.
            ("categorical", 51, {"low": -5.0, "high": 0.0, "num_atoms": 51}, [INF, 1.0]),
            ("quantile", 31, {"num_quantiles": 31, "kappa": 0.01}, [INF, 1.0, 0.3]),
        ],
    )
    def test_q_star(self, kind, num_outputs, options, temperatures):
        critic = KINDS[kind][0](Table(4, num_outputs), **options)
        chain = self.fit(critic)
        for tau in temperatures:
            error = (self.q_star(chain, critic, tau) - self.exact(chain, tau)).abs().max()
            assert error < 0.15, (tau, error)


class TestContracts:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("next_action", ["policy", "dataset"])
    def test_each_loss_reaches_its_own_network(self, kind, next_action):
        loss, batch = make_loss(kind, next_action=next_action), make_batch(6)
        before = batch.clone()
        losses = loss(batch)
        assert (batch.exclude("td_error") == before).all()
        assert batch["td_error"].shape == (6,) and not batch["td_error"].requires_grad
        for name, other in (("actor", "qvalue"), ("qvalue", "actor")):
            loss.zero_grad()
            losses[f"loss_{name}"].backward(retain_graph=True)
            for parameter in loss.get_submodule(f"{name}_network_params").parameters():
                assert parameter.grad is not None and parameter.grad.any()
            for parameter in loss.get_submodule(f"{other}_network_params").parameters():
                assert parameter.grad is None or not parameter.grad.any()
        assert len(list(loss.parameters())) == len(set(loss.parameters()))

    @pytest.mark.parametrize("kind", KINDS)
    def test_updates_leave_targets_as_buffers(self, kind):
        loss = make_loss(kind, updater=False)
        updater = SoftUpdate(loss, tau=0.25)
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
        targets = loss.target_qvalue_network_params
        start = loss.qvalue_network_params.data.clone()
        for _ in range(2):
            optimizer.zero_grad()
            total(loss(make_batch(6))).backward()
            optimizer.step()
        assert not any(leaf.requires_grad for leaf in targets.values(True, True))
        assert (targets.data == start).all()
        updater.step()
        expected = start * 0.75 + loss.qvalue_network_params.data * 0.25
        for key, leaf in targets.data.items(True, True):
            torch.testing.assert_close(leaf, expected[key])

    def test_in_keys(self):
        loss = make_loss()
        following = ["observation", "reward", "done", "terminated"]
        assert loss.in_keys == ["observation", "action", *[("next", key) for key in following]]
        assert ("next", "action") in make_loss(next_action="dataset").in_keys
        for kwargs in ({}, {"next_action": "dataset"}):
            loss, batch = make_loss(**kwargs), make_batch(4)
            expected = seeded_call(loss, batch)
            reduced = seeded_call(loss, batch.select(*loss.in_keys))
            assert total(reduced) == total(expected)

    def test_dispatch(self):
        loss, batch = make_loss(), make_batch(4)
        expected = seeded_call(loss, batch)
        flat = {"_".join(k) if isinstance(k, tuple) else k: batch[k] for k in loss.in_keys}
        torch.manual_seed(1)
        assert loss(**flat) == tuple(expected[key] for key in loss.out_keys)
        assert set(loss.out_keys) == set(expected.keys())

    @pytest.mark.parametrize("batch", [(), (0,), (2, 3), (2, 0)])
    @pytest.mark.parametrize("kind", KINDS)
    def test_batch_shapes(self, kind, batch):
        losses = make_loss(kind, reduction="none")(make_batch(*batch))
        assert losses["loss_actor"].shape == losses["loss_qvalue"].shape == batch

    def test_batch_size_of_the_tensordict_does_not_matter(self):
        loss, batch = make_loss(), make_batch(4)
        bare = TensorDict(batch.to_dict(), batch_size=[])
        assert total(seeded_call(loss, bare)) == total(seeded_call(loss, batch))

    def test_nested_keys(self):
        plain, batch = make_loss(next_action="dataset"), make_batch(4)
        policy = make_policy(in_keys=[("agent", "seen")])
        critic = make_critic(in_keys=[("agent", "state"), ("agent", "act")])
        loss = CriticLoss(policy, critic, next_action="dataset").make_value_estimator(gamma=0.9)
        SoftUpdate(loss, tau=0.1)
        names = ("action", "reward", "done", "terminated", "priority", "priority_weight")
        loss.set_keys(**{name: ("agent", name) for name in names})
        loss.load_state_dict(plain.state_dict())
        agent = {name: batch["next", name] for name in ("reward", "done", "terminated", "action")}
        nested = TensorDict(
            {
                "agent": {
                    "seen": batch["observation"],
                    "state": batch["observation"],
                    "action": batch["action"],
                    "priority_weight": torch.ones(4),
                },
                "next": {
                    "agent": {
                        "seen": batch["next", "observation"],
                        "state": batch["next", "observation"],
                        **agent,
                    }
                },
            },
            batch_size=[4],
        )
        torch.testing.assert_close(
            total(seeded_call(loss, nested)), total(seeded_call(plain, batch))
        )
        assert nested["agent", "priority"].equal(batch["td_error"])
        assert all(key in nested.keys(True) for key in loss.in_keys)
        with pytest.raises(ValueError):
            loss.set_keys(unknown="key")

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none", None])
    def test_reduction_mask_and_weights(self, reduction):
        loss, batch = make_loss(reduction=reduction), make_batch(6)
        rows = seeded_call(make_loss_like(loss, "none"), batch)
        batch["priority_weight"] = torch.rand(6)
        batch["collector", "mask"] = torch.arange(6) < 4
        losses = seeded_call(loss, batch)
        weights = torch.where(batch["collector", "mask"], batch["priority_weight"], 0.0)
        for key in ("loss_actor", "loss_qvalue"):
            weighted = weights * rows[key]
            expected = {"none": weighted, "sum": weighted.sum()}.get(
                reduction, weighted.sum() / weights.sum()
            )
            torch.testing.assert_close(losses[key], expected)

    def test_state_dict(self):
        loss, other, batch = make_loss(gamma=0.5), make_loss(gamma=0.9), make_batch(4)
        assert total(seeded_call(loss, batch)) != total(seeded_call(other, batch))
        other.load_state_dict(loss.state_dict())
        assert total(seeded_call(loss, batch)) == total(seeded_call(other, batch))

    def test_reset_parameters_recursive(self):
        loss = make_loss()
        weight = loss.qvalue_network_params["network", "net", "0", "weight"]
        target = loss.target_qvalue_network_params["network", "net", "0", "weight"]
        before = weight.clone(), target.clone()
        loss.reset_parameters_recursive()
        assert not weight.equal(before[0]) and not target.equal(before[1])

    def test_missing_target_updater_warns(self):
        with pytest.warns(UserWarning, match="No target network updater"):
            make_loss(updater=False)(make_batch(2))

    def test_without_target_network(self):
        loss = make_loss(delay_qvalue=False)
        total(loss(make_batch(4))).backward()
        assert not any(name.startswith("target_qvalue") for name, _ in loss.named_buffers())

    @pytest.mark.parametrize(
        "kind", ["scalar", *(pytest.param(k, marks=pytest.mark.slow) for k in list(KINDS)[1:])]
    )
    def test_compiled_equals_eager(self, kind):
        loss, batch = make_loss(kind, next_action="dataset"), make_batch(6)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for _ in range(3):
            expected, actual = seeded_call(loss, batch.clone()), seeded_call(compiled, batch)
            assert not actual["loss_qvalue"].equal(actual["loss_actor"])
            torch.testing.assert_close(actual["loss_qvalue"], expected["loss_qvalue"])
            total(actual).backward()
            with torch.no_grad():
                for parameter in loss.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None

    def test_bad_input(self):
        policy, critic = make_policy(), make_critic()
        with pytest.raises(ValueError, match="next_action must be one of.*'improved'"):
            CriticLoss(policy, critic, next_action="improved")
        with pytest.raises(ValueError, match="reduction"):
            CriticLoss(policy, critic, reduction="average")
        with pytest.raises(TypeError, match="qvalue_network must be a Critic"):
            CriticLoss(policy, ReturnFlow(nn.Linear(OBS + ACT + 2, 1)))
        with pytest.raises(TypeError, match="actor_network must be a FlowMatchingPolicy"):
            CriticLoss(critic, critic)
        with pytest.raises(NotImplementedError):
            CriticLoss(policy, critic).make_value_estimator(ValueEstimators.GAE)
        with pytest.raises(KeyError, match="terminated"):
            make_loss()(make_batch(2).exclude(("next", "terminated")))


class TestAgainstEVOR:
    def test_same_actor_loss(self):
        policy, batch = make_policy(), make_batch(5)
        evor = EVORLoss(policy, ReturnFlow(nn.Linear(OBS + ACT + 2, 1)))
        critic = CriticLoss(policy, make_critic())
        torch.manual_seed(0)
        expected, _ = evor.actor_loss(batch)
        torch.manual_seed(0)
        actual, _ = critic.actor_loss(batch)
        assert actual == expected


def make_loss_like(loss, reduction):
    other = make_loss(reduction=reduction)
    other.load_state_dict(loss.state_dict())
    return other


if __name__ == "__main__":
    pytest.main([__file__, "-q"])

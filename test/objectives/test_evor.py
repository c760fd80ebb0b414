# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import warnings
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from _known_laws import Chain, GaussianReturns
from tensordict import TensorDict
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import HardUpdate, SoftUpdate, ValueEstimators
from torchrl.trainers._execution import _LossForwarder

from torchrl_evor import EVORLoss, FlowMatchingPolicy, ReturnFlow, VelocityMLP
from torchrl_evor.modules.functional import TD_TARGETS, stratified_normal

NEXT_ACTIONS = ["policy", "dataset", "improved"]
OBS, ACT = 3, 2


def make_networks(dtype=None, **kwargs):
    policy = FlowMatchingPolicy(
        VelocityMLP(OBS + ACT + 1, ACT, hidden_sizes=(16,), dtype=dtype), ACT, num_steps=3
    )
    network = VelocityMLP(OBS + ACT + 2, hidden_sizes=(16,), layer_norm=True, dtype=dtype)
    return policy, ReturnFlow(network, num_steps=3, **kwargs)


def make_loss(dtype=None, gamma=0.9, updater=True, **kwargs):
    loss = EVORLoss(*make_networks(dtype), **kwargs).make_value_estimator(gamma=gamma)
    if updater and kwargs.get("delay_value", True):
        SoftUpdate(loss, tau=0.1)
    return loss


def make_batch(*batch, dtype=None, batch_size=None):
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
            batch_size=batch if batch_size is None else batch_size,
        ),
        batch_size=batch if batch_size is None else batch_size,
    )


def seeded_call(loss, batch, seed=1):
    torch.manual_seed(seed)
    return loss(batch)


def total(losses):
    return losses["loss_actor"].mean() + losses["loss_value"].mean()


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
            with pytest.raises(KeyError, match=key if isinstance(key, str) else key[-1]):
                loss(make_batch(8).exclude(key))

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
        actor, value = loss(**kwargs)
        torch.testing.assert_close(actor, expected["loss_actor"])
        torch.testing.assert_close(value, expected["loss_value"])
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

    def test_wrong_network_output(self):
        policy, returns = make_networks()
        with pytest.raises(ValueError, match=r"velocity_network .* \(8, 2\), got \(8, 3\)"):
            bad = FlowMatchingPolicy(VelocityMLP(OBS + ACT + 1, 3, hidden_sizes=(4,)), ACT)
            EVORLoss(bad, returns, delay_value=False)(make_batch(8))
        with pytest.raises(ValueError, match=r"velocity_network .* \(8, 1\), got \(8, 2\)"):
            bad = ReturnFlow(VelocityMLP(OBS + ACT + 2, 2, hidden_sizes=(4,)))
            EVORLoss(policy, bad, delay_value=False)(make_batch(8))


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

    @pytest.mark.parametrize("kind", [k for k in ValueEstimators if k != ValueEstimators.TD0])
    def test_unsupported(self, kind):
        with pytest.raises(NotImplementedError):
            make_loss().make_value_estimator(kind)

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


class TestRandomness:
    def test_same_seed_same_run(self):
        def run():
            torch.manual_seed(3)
            loss = make_loss()
            optimizer = torch.optim.Adam(loss.parameters())
            for _ in range(3):
                optimizer.zero_grad()
                total(loss(make_batch(8))).backward()
                optimizer.step()
            return loss.state_dict()

        first, second = run(), run()
        assert all(torch.equal(first[key], second[key]) for key in first)

    def test_noise_is_fresh(self):
        loss, batch = make_loss(), make_batch(8)
        assert loss(batch)["loss_actor"] != loss(batch)["loss_actor"]

    def test_improved_reads_the_target_network(self):
        """The same candidates, judged by another target network."""
        loss, batch = make_loss(next_action="improved", num_candidates=16), make_batch(32)
        torch.manual_seed(1)
        before = loss._next_action(batch)
        target = loss.target_value_network_params["velocity_network", "net", "3"]
        target["weight"].neg_(), target["bias"].neg_()
        torch.manual_seed(1)
        assert (loss._next_action(batch) != before).any(-1).float().mean() > 0.5

    def test_policy_is_sampled_inside_the_loss(self):
        """TorchRL evaluates losses in deterministic mode, which must not reach the noise."""
        loss, batch = make_loss(), make_batch(1).expand(64).contiguous()
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            assert len(loss._next_action(batch).unique(dim=0)) == 64


def optimise(update, loss, batches):
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    updater = SoftUpdate(loss, tau=0.1)
    torch.manual_seed(1)
    for batch in batches:
        optimizer.zero_grad()
        losses = update(batch)
        total(losses).backward()
        optimizer.step()
        updater.step()
    return losses.detach(), {key: value.clone() for key, value in loss.state_dict().items()}


def wave(x):
    """Uneven numbers in [-1, 1] in the shape of ``x``."""
    return torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape).sin()


class TestCompile:
    @pytest.fixture
    def draws(self, monkeypatch):
        """The same noise in eager and compiled programs, which order their draws differently."""
        monkeypatch.setattr(torch, "randn_like", wave)
        monkeypatch.setattr(torch, "rand_like", lambda x: wave(x).abs())
        monkeypatch.setattr(torch.Tensor, "normal_", lambda x: x.copy_(wave(x)))

    def check(self, dtype, backend, weights=True, **kwargs):
        """Three optimiser steps with masks, the last one all masked, in both modes."""
        batches = [make_batch(8, dtype=dtype) for _ in range(3)]
        for batch, mask in zip(batches, (1.0, 0.5, 0.0)):
            batch["collector", "mask"] = torch.rand(8) < mask
            if weights and mask:  # a weighted mean of nothing is 0 / 0 in TorchRL
                batch["priority_weight"] = 0.1 + torch.rand(8, dtype=dtype)
        loss = make_loss(dtype, updater=False, **kwargs)
        start = {key: value.clone() for key, value in loss.state_dict().items()}
        expected = optimise(loss, loss, [batch.clone() for batch in batches])
        loss.load_state_dict(start)
        for parameter in loss.parameters():
            parameter.grad = None
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend=backend)
        result = optimise(compiled, loss, batches)
        tolerance = {
            torch.float32: {"atol": 1e-5, "rtol": 1e-4},
            torch.float64: {"atol": 1e-9, "rtol": 1e-7},
        }[dtype]
        for key in ("loss_actor", "loss_value"):
            torch.testing.assert_close(result[0][key], expected[0][key], **tolerance)
        for key, value in expected[1].items():
            torch.testing.assert_close(result[1][key], value, **tolerance)

    def test_traces_without_a_break(self, draws):
        self.check(torch.float64, "aot_eager", weights=False)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "td_target,next_action,dtype",
        [
            ("bellman", "policy", torch.float32),
            ("bellman", "policy", torch.float64),
            ("bellman", "dataset", torch.float32),
            ("bellman", "improved", torch.float32),
            ("sample", "policy", torch.float32),
            ("coupled", "dataset", torch.float64),
            ("velocity", "dataset", torch.float32),
        ],
    )
    def test_inductor_equals_eager(self, td_target, next_action, dtype, draws):
        self.check(dtype, "inductor", td_target=td_target, next_action=next_action)

    @pytest.mark.slow
    def test_compiled_noise_is_fresh(self):
        loss, batch = make_loss(), make_batch(8)
        compiled = torch.compile(loss, fullgraph=True)
        values = [compiled(batch)["loss_value"].item() for _ in range(4)]
        assert len(set(values)) == 4


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
def test_distributed_data_parallel(tmp_path):
    """The gradients of one process are those of the plain loss."""
    loss, batch = make_loss(), make_batch(8)
    total(seeded_call(loss, batch)).backward()
    expected = [parameter.grad.clone() for parameter in loss.parameters()]
    loss.zero_grad()
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        parallel = DistributedDataParallel(_LossForwarder(loss), find_unused_parameters=True)
        losses, _ = seeded_call(parallel, batch)
        total(losses).backward()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close([parameter.grad for parameter in loss.parameters()], expected)


class TestBadInput:
    @pytest.mark.parametrize(
        "kwargs,name",
        [
            ({"td_target": "td3"}, "td_target must be one of .*bellman.*, got 'td3'"),
            ({"next_action": "data"}, "next_action must be one of .*dataset.*, got 'data'"),
            ({"reduction": "max"}, "reduction must be one of .*mean.*, got 'max'"),
            ({"num_candidates": 0}, "num_candidates must be an integer of at least 1, got 0"),
            ({"num_samples": -1}, "num_samples must be an integer of at least 1, got -1"),
            ({"tau_r": -1.0}, "tau_r must be a temperature"),
            ({"tau_q": float("nan")}, "tau_q must be a temperature"),
        ],
    )
    def test_options(self, kwargs, name):
        with pytest.raises(ValueError, match=name):
            EVORLoss(*make_networks(), **kwargs)

    def test_networks(self):
        policy, returns = make_networks()
        with pytest.raises(TypeError, match="actor_network must be a FlowMatchingPolicy"):
            EVORLoss(nn.Linear(2, 2), returns)
        with pytest.raises(TypeError, match="value_network must be a ReturnFlow"):
            EVORLoss(policy, nn.Linear(2, 2))

    def test_options_are_keyword_only(self):
        with pytest.raises(TypeError):
            EVORLoss(*make_networks(), "bellman")


@pytest.mark.slow
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
        updater = SoftUpdate(loss, tau=0.02)
        optimizer = torch.optim.Adam(returns.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
        for _ in range(updates):
            value, _ = loss.value_loss(chain.sample(256))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            updater.step()
            schedule.step()
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

    def test_sample_loses_spread(self):
        distance, spread = self.distance("sample")  # measured: 0.19 and 0.76
        assert distance < 0.25 and spread < 0.85

    def test_coupled_is_close(self):
        assert self.distance("coupled")[0] < 0.2  # measured: 0.14

    def test_velocity_learns_another_law(self):
        distance, spread = self.distance("velocity")  # measured: 1.03 and 2.9
        assert distance > 0.7 and spread > 2


if __name__ == "__main__":
    pytest.main([__file__])

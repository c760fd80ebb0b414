# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import math

import pytest
import torch
import torchrl_evor.triton_kernels as triton_kernels
from _known_laws import GaussianReturns, PointEnv, euler_gaussian_std
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential, set_skip_existing
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import SerialEnv
from torchrl.envs.utils import ExplorationType, check_env_specs, set_exploration_type
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal

from torchrl_evor import (
    EVORActor,
    FlowMatchingPolicy,
    ReturnFlow,
    ScalarCritic,
    StackedVelocityMLP,
    VelocityMLP,
)
from torchrl_evor.modules.functional import stratified_normal
from torchrl_evor.modules.models import return_flow

GREEDY = [ExplorationType.DETERMINISTIC, ExplorationType.MODE, ExplorationType.MEAN]
SOFT = [None, ExplorationType.RANDOM]


class ActionIsReturn(nn.Module):
    """Velocity that moves any noise by ``2 * action[0]``: the law is N(2 * action[0], 1)."""

    def __init__(self, observation_dim=2):
        super().__init__()
        self.first = observation_dim

    def forward(self, inputs):
        return 2 * inputs[..., self.first : self.first + 1]


class Cycle(nn.Module):
    """Base policy whose candidate ``i`` of every state is the ``i``-th of a list."""

    def __init__(self, actions):
        super().__init__()
        self.register_buffer("actions", torch.tensor(actions))

    def forward(self, observation):
        shape = (len(self.actions), *[1] * (observation.ndim - 2), 1)
        return self.actions.reshape(shape).expand(*observation.shape[:-1], 1)


def listed(actions, **kwargs):
    """Actor over fixed candidates of value ``2 * action``."""
    policy = TensorDictModule(Cycle(actions), in_keys=["observation"], out_keys=["action"])
    kwargs = {"num_samples": 8, **kwargs}
    return EVORActor(policy, ReturnFlow(ActionIsReturn()), num_candidates=len(actions), **kwargs)


def make_actor(**kwargs):
    policy = FlowMatchingPolicy(VelocityMLP(2 + 2 + 1, 2, hidden_sizes=(16,)), 2, num_steps=3)
    returns = ReturnFlow(VelocityMLP(2 + 2 + 2, hidden_sizes=(16,)), num_steps=3)
    return EVORActor(policy, returns, **{"num_candidates": 6, "num_samples": 4, **kwargs})


def observations(*batch):
    return TensorDict(observation=torch.randn(*batch, 2), batch_size=batch)


class TestChoice:
    def test_takes_the_best(self):
        data = listed([-0.5, 0.75, 0.25])(observations(2, 3))
        assert (data["action"] == 0.75).all() and data["action"].shape == (2, 3, 1)
        torch.testing.assert_close(data["state_action_value"], torch.full((2, 3, 1), 1.5))

    @pytest.mark.parametrize("mode", SOFT)
    def test_softmax_frequencies(self, mode):
        """P(i) ~ exp(Q_i / tau_q), with Q = 0, 1, 2 and tau_q = 0.5."""
        size = 20_000
        with set_exploration_type(mode):
            data = listed([0.0, 0.5, 1.0], tau_q=0.5)(observations(size))
        expected = torch.tensor([0.0, 2.0, 4.0]).softmax(0)
        counts = torch.stack([(data["action"] == value).sum() for value in (0.0, 0.5, 1.0)])
        spread = (size * expected * (1 - expected)).sqrt()
        assert ((counts - size * expected).abs() < 4 * spread).all()
        # The value that is written is that of the action that was chosen.
        torch.testing.assert_close(data["state_action_value"], 2 * data["action"])

    @pytest.mark.parametrize("mode", GREEDY)
    def test_is_greedy_when_asked(self, mode):
        with set_exploration_type(mode):
            data = listed([0.0, 0.5, 1.0], tau_q=100.0)(observations(100))
        assert (data["action"] == 1.0).all()

    def test_infinite_tau_q_ignores_values(self):
        with set_exploration_type(ExplorationType.RANDOM):
            data = listed([0.0, 1.0], tau_q=float("inf"))(observations(2000))
        assert data["action"].mean().item() == pytest.approx(0.5, abs=0.05)

    def test_tau_r_weighs_spread_against_mean(self):
        """A sure 1 against N(0, 2^2): the mean prefers the first, the maximum the second."""

        class Law(nn.Module):
            def __init__(self):
                super().__init__()
                self.gaussian = GaussianReturns()

            def forward(self, inputs):
                sure = inputs[..., 2:3] > 0
                law = torch.where(sure, torch.tensor([1.0, 1e-3]), torch.tensor([0.0, 2.0]))
                return self.gaussian(torch.cat([law, inputs[..., 2:]], -1))

        policy = TensorDictModule(Cycle([1.0, -1.0]), in_keys=["observation"], out_keys=["action"])
        returns = ReturnFlow(Law())
        # Q of the second is std^2 / (2 tau): equal to 1 at tau = std^2 / 2.
        even = euler_gaussian_std(2.0, 10) ** 2 / 2
        for tau_r, best in (
            (float("inf"), 1.0),
            (1.2 * even, 1.0),
            (0.8 * even, -1.0),
            (0.0, -1.0),
        ):
            actor = EVORActor(policy, returns, num_candidates=2, num_samples=256, tau_r=tau_r)
            assert actor(observations())["action"].item() == best


class TestCandidates:
    @pytest.mark.parametrize("mode", SOFT + GREEDY)
    def test_are_random_in_every_mode(self, mode):
        with set_exploration_type(mode):
            candidates = make_actor(num_candidates=50).candidates(observations(3))
        assert candidates.shape == (3, 50, 2)
        assert all(len(rows.unique(dim=0)) > 25 for rows in candidates)  # corners repeat

    def test_one_candidate_is_behaviour_cloning(self):
        actor = make_actor(num_candidates=1)
        data = observations(5)
        torch.manual_seed(3)
        chosen = actor(data.clone())["action"]
        torch.manual_seed(3)
        torch.testing.assert_close(chosen, actor.policy(data)["action"])

    def test_more_candidates_are_better(self):
        actor = make_actor()
        values = []
        for number in (1, 4, 64):
            actor.num_candidates = number
            values.append(actor(observations(256))["state_action_value"].mean().item())
        assert values[0] < values[1] < values[2]

    def test_on_request_only(self):
        data = make_actor()(observations(4))
        assert set(data.keys()) == {"observation", "action", "state_action_value"}
        data = make_actor(return_candidates=True)(observations(4))
        assert data["candidates"].shape == (4, 6, 2)
        assert data["candidate_values"].shape == (4, 6)
        best = data["candidate_values"].max(-1, keepdim=True)
        torch.testing.assert_close(data["state_action_value"], best.values)
        expected = data["candidates"].take_along_dim(best.indices.unsqueeze(-1), 1).squeeze(1)
        torch.testing.assert_close(data["action"], expected)

    def test_selected_keys(self):
        actor = make_actor().select_out_keys("action")
        assert set(actor(observations(4)).keys()) == {"observation", "action"}

    def test_stack_of_policies(self):
        """Each model's candidates for its own states, as one policy draws them."""
        models = [VelocityMLP(2 + 2 + 1, 2, hidden_sizes=(16,)) for _ in range(3)]
        for index, model in enumerate(models):  # far apart, and nothing is clamped
            nn.init.zeros_(model.net[-1].weight)
            nn.init.constant_(model.net[-1].bias, 10.0 * index)
        stack = StackedVelocityMLP.from_models(models)
        policy = FlowMatchingPolicy(stack, 2, low=-100.0, high=100.0)
        returns = ReturnFlow(StackedVelocityMLP(3, 2 + 2 + 2, hidden_sizes=(16,)))
        actor = EVORActor(policy, returns, num_candidates=4, return_candidates=True)
        data = actor(observations(3, 5))
        assert data["candidates"].shape == (3, 5, 4, 2)
        means = data["candidates"].mean((1, 2, 3))
        torch.testing.assert_close(means, torch.tensor([0.0, 10.0, 20.0]), atol=1.0, rtol=0)

    def test_values_are_q_star(self):
        actor = make_actor(return_candidates=True, tau_r=0.7)
        data = actor(observations(2, 3))
        expected = actor.returns.q_star(
            data["observation"].unsqueeze(-2), data["candidates"], 0.7, 4
        )
        torch.testing.assert_close(data["candidate_values"], expected)

    @pytest.mark.parametrize("nodes", ["stratified", "gauss_hermite", "random"])
    def test_nodes(self, nodes):
        """Equal candidates have equal values on shared quantiles, and not on random nodes."""
        actor = make_actor(nodes=nodes, return_candidates=True)
        actor.policy = TensorDictModule(
            lambda observation: torch.zeros_like(observation), ["observation"], ["action"]
        )
        values = actor(observations(4))["candidate_values"]
        assert (values == values[:, :1]).all() == (nodes != "random")

    @pytest.mark.parametrize("solver", ["euler", "midpoint"])
    def test_steps(self, solver):
        """Are the flow's own, or those asked for; one ends where the first velocity points."""
        actor = make_actor(return_candidates=True, num_steps=1)
        returns = ReturnFlow(actor.returns.members[0], num_steps=4, solver=solver, scale=3.0)
        for num_steps in (None, 1, 2):
            actor = EVORActor(actor.policy, returns, num_steps=num_steps, return_candidates=True)
            data = actor(observations(3))
            pairs = data["observation"].unsqueeze(-2), data["candidates"]
            expected = returns.q_star(*pairs, math.inf, 16, num_steps=num_steps)
            torch.testing.assert_close(data["candidate_values"], expected)
            if num_steps == 1:
                noise = stratified_normal(16)[:, None]
                start = [x.expand(3, 32, -1).unsqueeze(-2).expand(-1, -1, 16, -1) for x in pairs]
                z = noise.expand(3, 32, -1, -1)
                mean = (z + returns.velocity(*start, z, torch.zeros_like(z))).mean((-2, -1))
                torch.testing.assert_close(data["candidate_values"], 3 * mean)


class TestAnyPolicy:
    def test_a_flow_that_reads_its_noise_in_a_sequence(self):
        keys = {"in_keys": ["latent", "noise"]}
        flow = FlowMatchingPolicy(VelocityMLP(2 + 2 + 1, 2, hidden_sizes=(8,)), 2, **keys)
        encoder = TensorDictModule(nn.Linear(2, 2), in_keys=["observation"], out_keys=["latent"])
        returns = ReturnFlow(VelocityMLP(2 + 2 + 2, hidden_sizes=(8,)))
        with pytest.raises(ValueError, match="policy must not read its noise within a sequence"):
            EVORActor(TensorDictSequential(encoder, flow), returns)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_a_flow_that_may_read_its_noise_draws_it(self, compiled):
        """All candidates would be made from one draw."""
        keys = {"in_keys": ["observation", "noise"]}
        policy = FlowMatchingPolicy(VelocityMLP(2 + 2 + 1, 2, hidden_sizes=(4,)), 2, **keys)
        policy = torch.compile(policy, backend="eager") if compiled else policy
        actor = EVORActor(policy, make_actor().returns, num_candidates=8, return_candidates=True)
        assert actor.in_keys == ["observation"]
        data = observations(3)
        assert len(actor(data)["candidates"].unique(dim=1)[0]) == 8
        data["noise"] = torch.zeros(3, 2)
        assert len(actor(data)["candidates"].unique(dim=1)[0]) == 8

    def probabilistic(self, **kwargs):
        head = nn.Sequential(nn.Linear(2, 4), NormalParamExtractor())
        module = TensorDictModule(head, in_keys=["observation"], out_keys=["loc", "scale"])
        return ProbabilisticActor(
            module, in_keys=["loc", "scale"], distribution_class=TanhNormal, **kwargs
        )

    @pytest.mark.parametrize("return_log_prob", [False, True])
    @pytest.mark.parametrize("mode", [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC])
    def test_probabilistic_actor(self, mode, return_log_prob):
        """Its first output is a mean, not an action; its mode would be one candidate."""
        policy = self.probabilistic(return_log_prob=return_log_prob)
        returns = ReturnFlow(ActionIsReturn())
        actor = EVORActor(policy, returns, num_candidates=32, return_candidates=True)
        with set_exploration_type(mode):
            data = actor(observations(8))
        assert set(data.keys()) == {"observation", *actor.out_keys}
        assert actor.out_keys[:2] == ["action", "state_action_value"]
        assert len(data["candidates"].unique(dim=-2)[0]) == 32
        best = data["candidates"][..., 0].amax(-1)
        torch.testing.assert_close(data["action"][..., 0], best)
        torch.testing.assert_close(data["state_action_value"][..., 0], 2 * best)

    def test_equals_are_drawn_alike_in_16_bits(self):
        """By a network of 16 bits on the plain path."""
        returns = ReturnFlow(ActionIsReturn(), loc=-200.0).to(torch.bfloat16)
        torch.manual_seed(0)
        candidates = torch.arange(4).view(4, 1).expand(20_000, 4, 1).to(torch.bfloat16)
        zero = torch.zeros(20_000, 4, 2, dtype=torch.bfloat16)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(returns, "_values", lambda *_: torch.full((20_000, 4), -200.0).bfloat16())
            action, _, _ = returns.select(zero[:, 0], candidates, tau_r=1.0, tau_q=1.0)
        share = action.long().flatten().bincount(minlength=4) / 20_000
        torch.testing.assert_close(share, torch.full((4,), 0.25), rtol=0, atol=0.015)

    def test_policy_with_memory(self):
        """The state of which candidate would be kept?"""
        policy = TensorDictModule(
            nn.Linear(2, 2), in_keys=["observation"], out_keys=["action", ("next", "state")]
        )
        with pytest.raises(ValueError, match="must have no memory, got .*'next', 'state'"):
            EVORActor(policy, ReturnFlow(ActionIsReturn()))

    def test_keys_as_tensordict_takes_them(self):
        policy = FlowMatchingPolicy(
            nn.Linear(5, 2), 2, in_keys=("agent", "state"), out_keys=("agent", "move")
        )
        assert (policy.in_keys, policy.out_keys) == ([("agent", "state")], [("agent", "move")])
        assert FlowMatchingPolicy(nn.Linear(5, 2), 2, in_keys="state").in_keys == ["state"]
        keys = {"in_keys": ("state", ("agent", ("move",))), "out_keys": "value"}
        returns = ReturnFlow(nn.Linear(6, 1), **keys)
        assert returns.in_keys == ["state", ("agent", "move")] and returns.out_keys == ["value"]
        for keys in ("state", ["state"], ["a", "b", "c"]):
            with pytest.raises(ValueError, match="in_keys must name an observation and an action"):
                ReturnFlow(nn.Linear(6, 1), in_keys=keys)
        with pytest.raises(KeyError, match="agent"):
            returns(TensorDict(state=torch.zeros(2, 2), batch_size=[2]))

    def test_policy_that_writes_no_action(self):
        policy = TensorDictModule(nn.Linear(2, 2), in_keys=["observation"], out_keys=["move"])
        with pytest.raises(ValueError, match="policy must write .*'action'.*move"):
            EVORActor(policy, ReturnFlow(ActionIsReturn()))

    def test_nested_keys(self):
        policy = FlowMatchingPolicy(
            nn.Linear(5, 2), 2, in_keys=[("agent", "state")], out_keys=[("agent", "move")]
        )
        returns = ReturnFlow(
            nn.Linear(6, 1),
            in_keys=[("agent", "state"), ("agent", "move")],
            out_keys=[("agent", "value")],
        )
        actor = EVORActor(policy, returns, num_candidates=3)
        data = actor(TensorDict(agent=TensorDict(state=torch.zeros(2, 3, 2))))
        assert data["agent", "move"].shape == (2, 3, 2)
        assert data["agent", "value"].shape == (2, 3, 1)

    def test_two_observations(self):
        """The policy may see something else than the reward-to-go."""
        policy = FlowMatchingPolicy(nn.Linear(4 + 2 + 1, 2), 2, in_keys=["pixels"])
        actor = EVORActor(policy, ReturnFlow(ActionIsReturn()))
        assert actor.in_keys == ["pixels", "observation"]
        data = observations(3).set("pixels", torch.zeros(3, 4))
        assert actor(data)["action"].shape == (3, 2)


class TestBackend:
    def test_triton_without_a_device(self):
        if torch.cuda.is_available():
            pytest.skip("there is a device")
        with pytest.raises((RuntimeError, ValueError), match="backend='triton'"):
            make_actor(backend="triton")(observations(4))

    @pytest.mark.parametrize("precision", [None, "fp16"])
    @pytest.mark.parametrize("members", [1, 2])
    def test_precision_reaches_the_kernels(self, monkeypatch, members, precision):
        """Through the call for one flow and through that for each member of an ensemble."""
        name, found = ("evor_select" if members == 1 else "sample_returns"), []
        call = getattr(triton_kernels, name)
        monkeypatch.setattr(
            triton_kernels,
            name,
            lambda *reads, **options: found.append(options["precision"]) or call(*reads, **options),
        )
        networks = [VelocityMLP(2 + 2 + 2, hidden_sizes=(8, 8)) for _ in range(members)]
        EVORActor(make_actor().policy, ReturnFlow(networks), precision=precision)(observations(3))
        assert found == [precision] * members

    def test_pytorch_does_not_read_the_precision(self):
        data, found = observations(5), []
        actor = make_actor(backend="torch", return_candidates=True)
        actor.returns.velocity_network = VelocityMLP(2 + 2 + 2, hidden_sizes=(16, 16))
        for actor.precision in (None, "bf16"):
            torch.manual_seed(1)
            found.append(actor(data.clone()))
        for key in actor.out_keys:
            assert torch.equal(found[0][key], found[1][key])

    @pytest.mark.parametrize("tau_r", [0.0, 1.0, float("inf")])
    def test_fast_path_equals_the_network_itself(self, tau_r):
        """The split first layer, and any other network on the same weights."""
        actor = make_actor(tau_r=tau_r, return_candidates=True)
        # A network that is recognised, which wants two hidden layers.
        actor.returns.velocity_network = VelocityMLP(2 + 2 + 2, hidden_sizes=(16, 16))
        data = observations(5)
        torch.manual_seed(1)
        fast = actor(data.clone())
        with torch.no_grad():
            assert actor.returns.why_not_fused(data["observation"], fast["candidates"]) is None
        network = actor.returns.velocity_network
        actor.returns.velocity_network = nn.Sequential(nn.Identity(), network)  # not recognised
        with torch.no_grad():
            reason = actor.returns.why_not_fused(data["observation"], fast["candidates"])
        assert "Identity" in reason
        torch.manual_seed(1)
        slow = actor(data.clone())
        for key in actor.out_keys:
            torch.testing.assert_close(fast[key], slow[key], atol=1e-5, rtol=1e-5)

    @torch.no_grad()
    def test_a_seed_means_the_same_actions_on_every_path(self):
        network, chosen = VelocityMLP(2 + 2 + 2, hidden_sizes=(16, 16)), []
        actor, data = make_actor(tau_q=0.5), observations(50)
        actor.returns = ReturnFlow(network)
        for fused in (True, False):
            if not fused:  # a hook has to be called
                network.register_forward_hook(lambda module, inputs, output: output)
            reason = actor.returns.why_not_fused(data["observation"], torch.zeros(50, 6, 2))
            assert (reason is None) == fused
            torch.manual_seed(3)
            with set_exploration_type(ExplorationType.RANDOM):
                chosen.append(actor(data.clone())["action"])
        torch.testing.assert_close(chosen[0], chosen[1])

    @pytest.mark.parametrize(
        "settings", [torch.autocast("cpu", torch.bfloat16), torch.device("meta")], ids=str
    )
    def test_a_callers_settings_do_not_reach_the_fused_path(self, settings):
        """More than 64 rows per state, which take another road on some processors."""
        flow = ReturnFlow(VelocityMLP(2 + 2 + 2, hidden_sizes=(64, 64)), num_steps=3)
        state, candidates = torch.randn(50, 2), torch.randn(50, 32, 2)
        options = {"tau_r": 1.0, "tau_q": 0.0, "num_samples": 16}
        with torch.no_grad():
            want = flow.select(state, candidates, **options)
            with settings:
                got = flow.select(state, candidates, **options)
        for one, other in zip(got, want):
            assert one.device == other.device and one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=0, atol=0)

    @pytest.mark.parametrize("hidden_sizes", [(16,), (16, 16)])
    def test_behind_an_encoder_under_autocast(self, hidden_sizes):
        flow = ReturnFlow(VelocityMLP(2 + 2 + 2, hidden_sizes=hidden_sizes), num_steps=3)
        options = {"tau_r": 1.0, "tau_q": 0.0, "num_samples": 4}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            state, candidates = nn.Linear(3, 2)(torch.randn(5, 3)), torch.randn(5, 8, 2)
            assert state.dtype == torch.bfloat16
            _, _, got = flow.select(state, candidates, **options)
        _, _, want = flow.select(state.float(), candidates, **options)
        torch.testing.assert_close(got.float(), want, rtol=0, atol=0.1)

    def test_pieces_equal_the_whole(self, monkeypatch):
        """Memory is bounded by working on few rows at a time, with the same values."""
        actor = make_actor(return_candidates=True)
        actor.returns.velocity_network = nn.Sequential(actor.returns.velocity_network)
        data, rows = observations(5), []
        torch.manual_seed(1)
        whole = actor(data.clone())
        monkeypatch.setattr(return_flow, "MAX_ROWS", 20)
        network = actor.returns.velocity_network
        network.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:-1].numel()))
        torch.manual_seed(1)
        pieces = actor(data.clone())
        assert max(rows) <= 20 < 5 * 6 * 4
        for key in actor.out_keys:
            torch.testing.assert_close(pieces[key], whole[key])


class TestShapes:
    @pytest.mark.parametrize("batch", [(), (0,), (1,), (5,), (2, 3)])
    def test_any_batch(self, batch):
        data = make_actor()(observations(*batch))
        assert data["action"].shape == (*batch, 2)
        assert data["state_action_value"].shape == (*batch, 1)

    def test_no_batch_size(self):
        data = make_actor()(TensorDict(observation=torch.randn(4, 5, 2)))
        assert data["action"].shape == (4, 5, 2)

    def test_float64(self):
        data = make_actor().double()(observations(4).double())
        assert data["action"].dtype == data["state_action_value"].dtype == torch.float64

    def test_dispatch(self):
        action, value = make_actor()(observation=torch.zeros(4, 2))
        assert action.shape == (4, 2) and value.shape == (4, 1)

    def test_what_exists_is_kept_on_request(self):
        data = observations(4).set("action", torch.full((4, 2), 7.0))
        with set_skip_existing():
            assert "state_action_value" in make_actor()(data)  # of two entries one was missing
            there = make_actor()(data.set("action", torch.full((4, 2), 7.0)))
        assert (there["action"] == 7).all()
        assert (make_actor()(data)["action"] != 7).all()

    def test_no_gradient(self):
        data = observations(4)
        data["observation"].requires_grad_()
        assert not make_actor()(data)["action"].requires_grad

    def test_missing_observation(self):
        with pytest.raises(KeyError, match="observation"):
            make_actor()(TensorDict(state=torch.zeros(4, 2), batch_size=[4]))


class TestInTorchRL:
    def test_the_toy_environment(self):
        check_env_specs(PointEnv())

    @pytest.mark.parametrize("number", [None, 3])
    def test_rollout(self, number):
        env = PointEnv() if number is None else SerialEnv(number, PointEnv)
        actor = make_actor()
        data = env.rollout(5, actor)
        assert data["action"].shape == (*env.batch_size, 5, 2)
        assert "state_action_value" in data.keys() and "candidates" not in data.keys()

    @pytest.mark.parametrize("mode", [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC])
    def test_collector(self, mode):
        """The collector's own mode decides between the best and a soft choice."""
        collector = Collector(
            lambda: PointEnv((64,)),
            listed([0.0, 0.5, 1.0], tau_q=100.0),
            frames_per_batch=64,
            total_frames=64,
            exploration_type=mode,
        )
        try:
            data = next(iter(collector))
        finally:
            collector.shutdown()
        greedy = bool((data["action"] == 1.0).all())
        assert greedy == (mode == ExplorationType.DETERMINISTIC)

    @pytest.mark.parametrize("tau_q", [0.0, 1.0])
    def test_compiles(self, tau_q):
        actor = make_actor(tau_q=tau_q, return_candidates=True)
        compiled = torch.compile(actor, fullgraph=True, backend="aot_eager")
        data = observations(4)
        torch.manual_seed(1)
        expected = actor(data.clone())
        torch.manual_seed(1)
        with set_exploration_type(ExplorationType.RANDOM):
            result = compiled(data.clone())
        for key in actor.out_keys:
            torch.testing.assert_close(result[key], expected[key])

    @pytest.mark.slow
    def test_compiled_candidates_are_fresh(self):
        compiled = torch.compile(make_actor(), fullgraph=True)
        data = TensorDict(observation=torch.zeros(4, 2), batch_size=[4])
        actions = torch.cat([compiled(data.clone())["action"] for _ in range(3)])
        assert len(actions.unique(dim=0)) == 12


class TestBadInput:
    @pytest.mark.parametrize(
        "kwargs,message",
        [
            ({"num_candidates": 0}, "num_candidates must be an integer of at least 1, got 0"),
            ({"num_samples": 0}, "num_samples must be an integer of at least 1, got 0"),
            ({"tau_r": -1.0}, "tau_r must be a temperature"),
            ({"tau_q": -0.1}, "tau_q must be a temperature"),
            ({"nodes": "sobol"}, "nodes must be one of .*stratified.*, got 'sobol'"),
            ({"backend": "cuda"}, "backend must be one of .*triton.*, got 'cuda'"),
            ({"precision": "fp8"}, "precision must be one of .*fp16.*, got 'fp8'"),
            ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        ],
    )
    def test_options(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            make_actor(**kwargs)

    def test_steps_of_what_takes_none(self):
        actor = make_actor()
        midpoint = ReturnFlow(actor.returns.members[0], num_steps=4, solver="midpoint")
        with pytest.raises(ValueError, match="num_steps must be even .*, got 3"):
            EVORActor(actor.policy, midpoint, num_steps=3)
        critic = ScalarCritic(VelocityMLP(2 + 2, hidden_sizes=(4,)))
        with pytest.raises(ValueError, match="num_steps must be None for ScalarCritic, .* got 1"):
            EVORActor(actor.policy, critic, num_steps=1)


if __name__ == "__main__":
    pytest.main([__file__])

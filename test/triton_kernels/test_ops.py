# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The public functions on the CPU: parity with the reference, live weights, compilation, bad
input."""

from __future__ import annotations

import doctest
import importlib.util
import math

import pytest
import torch
from _kernel_cases import TOLERANCE, Case, assert_matches, make_mlp, relative_error
from tensordict import TensorDict
from torch import nn
from torchrl.modules import MLP
from torchrl_evor.triton_kernels import (
    _checks,
    _dispatch,
    _torch_path,
    evor_select,
    ops,
    pack_velocity_mlp,
    packing,
    reference,
    sample_returns,
    why_no_triton,
    why_not_packable,
)
from torchrl_evor.triton_kernels._steps import Steps
from torchrl_evor.triton_kernels.packing import fold
from torchrl_evor.triton_kernels.reference import (
    choose_candidate,
    evor_select_reference,
    q_star,
    sample_returns_reference,
)

from torchrl_evor.modules import VelocityMLP


@torch.no_grad()
def _run(case, **changes):
    options = case.options | {"return_samples": True} | changes
    return evor_select(case.packed, *case.inputs(), **options)


class TestReference:
    def test_two_steps_by_hand(self):
        """With v = x + 2a + 3z + 4t: z1 = z + (x + 2a + 3z)/2, z2 = z1 + (x + 2a + 3z1 + 2)/2."""
        weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
        noise = torch.tensor([[[1.0], [2.0]]])
        z = sample_returns_reference(
            lambda inputs: (inputs * weight).sum(-1, keepdim=True),
            torch.tensor([[10.0]]),
            torch.tensor([[[0.0], [1.0]]]),
            noise,
            num_steps=2,
        )
        # 1 -> 7.5 -> 7.5 + (10 + 22.5 + 2) / 2; 2 -> 11 -> 11 + (12 + 33 + 2) / 2.
        assert z.flatten().tolist() == [24.75, 34.5]

    def test_a_midpoint_step_by_hand(self):
        """The same field: 1 -> 7.5 at time 1/2, whose velocity 34.5 carries the whole step."""
        z = sample_returns_reference(
            lambda inputs: (inputs * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum(-1, keepdim=True),
            torch.tensor([[10.0]]),
            torch.tensor([[[0.0]]]),
            torch.tensor([[[1.0]]]),
            2,
            "midpoint",
        )
        assert z.item() == 35.5

    @pytest.mark.parametrize(
        "num_steps, solver, message",
        [
            (0, "euler", "num_steps"),
            (3, "midpoint", "num_steps must be even"),
            (2, "heun", "solver"),
        ],
    )
    def test_bad_steps(self, num_steps, solver, message):
        inputs = torch.zeros(1, 1), torch.zeros(1, 1, 1), torch.zeros(1)
        with pytest.raises(ValueError, match=message):
            sample_returns_reference(nn.Identity(), *inputs, num_steps, solver)

    def test_log_mean_exp_by_hand(self):
        """Weights 1/4 and 3/4 on 0 and tau log 9: the value is tau log(1/4 + 27/4) = tau log 7."""
        returns = torch.tensor([0.0, 2.0 * math.log(9.0)], dtype=torch.float64)
        log_weights = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
        assert q_star(returns, 2.0, log_weights).item() == pytest.approx(2.0 * math.log(7.0))
        assert q_star(returns, 0.0, log_weights) == returns[1]
        assert q_star(returns, math.inf, log_weights).item() == pytest.approx(1.5 * math.log(9.0))

    def test_limits_join(self):
        returns = torch.randn(9, dtype=torch.float64)
        assert q_star(returns, 1e-4).item() == pytest.approx(q_star(returns, 0.0).item(), abs=1e-3)
        assert q_star(returns, 1e6).item() == pytest.approx(returns.mean().item(), abs=1e-5)

    @pytest.mark.parametrize("weighted", [False, True])
    def test_large_temperatures_keep_their_digits(self, weighted):
        """Next to the mean, where a logsumexp in float32 cancels."""
        returns = torch.randn(5, 9)
        weights = torch.randn(9).log_softmax(0) if weighted else torch.full((9,), -math.log(9))
        for tau in (1e3, 1e5, 1e7):
            want = q_star(returns.double(), tau, weights.double().log_softmax(0))
            got = q_star(returns, tau, weights)
            torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=0)

    def test_a_top_node_of_hardly_any_weight(self):
        """At 0.2 the rest counts alone, at 0.01 the top node alone."""
        returns, tail = torch.tensor([0.0, 10.0]), torch.tensor([0.0, -45 * math.log(10.0)])
        assert q_star(returns, 0.2, tail).item() == pytest.approx(0.0, abs=1e-4)
        assert q_star(returns, 0.01, tail).item() == pytest.approx(
            10 - 0.45 * math.log(10.0), rel=1e-5
        )

    def test_a_node_of_no_weight_counts_in_no_limit(self):
        returns = torch.tensor([5.0, 1.0])
        log_weights = torch.tensor([-math.inf, 0.0])
        assert [q_star(returns, tau, log_weights).item() for tau in (0.0, 1.0, math.inf)] == [
            1.0
        ] * 3

    def test_choice(self):
        q = torch.tensor([1.0, 3.0, 3.0, math.nan])
        assert choose_candidate(q, None, 0.0) == 1
        assert choose_candidate(q, torch.tensor([4.5, 0.0, 1.0, 0.0]), 2.0) == 0
        assert choose_candidate(torch.full((3,), math.nan), None, 0.0) == 0

    @pytest.mark.parametrize("layer_norm", [False, True])
    @pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu", "silu"])
    def test_takes_packed_views(self, activation, layer_norm):
        """A live view is the network that it was made from, a frozen one what that was."""
        case = Case(2, 3, 4, (16, 8), activation=activation, layer_norm=layer_norm)
        frozen = case.packed.freeze()
        options = case.options
        want = evor_select_reference(case.network, *case.inputs(), **options)
        for view in (case.packed, frozen):
            for got, expected in zip(evor_select_reference(view, *case.inputs(), **options), want):
                torch.testing.assert_close(got, expected)
        case.network[0].weight.data.mul_(2.0)
        inputs = torch.randn(5, 10)
        torch.testing.assert_close(case.packed(inputs), case.network(inputs))
        assert relative_error(frozen(inputs), case.network(inputs).double()) > 1e-3
        case.packed(inputs).sum().backward()
        assert case.network[0].weight.grad.abs().sum() > 0

    def test_a_view_of_a_network_without_biases_and_affine_norms(self):
        network = make_mlp(10, (16, 16), layer_norm=True)
        network[0] = nn.Linear(10, 16, bias=False)
        network[2] = nn.LayerNorm(16, eps=1e-6, elementwise_affine=False)
        inputs = torch.randn(5, 10)
        packed = pack_velocity_mlp(network, 5, 3)
        torch.testing.assert_close(packed(inputs), network(inputs))

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"tau_r": -1.0}, r"tau_r must be a number in \[0, inf\], got -1.0"),
            ({"tau_r": math.nan}, r"tau_r must be a number in \[0, inf\], got nan"),
            ({"tau_q": -1.0}, r"tau_q must be a number in \[0, inf\], got -1.0"),
            ({"tau_q": math.nan}, r"tau_q must be a number in \[0, inf\], got nan"),
            ({"gumbel": None}, "gumbel is needed when tau_q > 0"),
        ],
        ids=str,
    )
    def test_bad_input(self, changes, message):
        case = Case(2, 3, 4, (16, 16))
        options = {"gumbel": case.gumbel} | case.options | changes
        with pytest.raises(ValueError, match=message):
            evor_select_reference(case.network, *case.inputs()[:3], **options)
        if "gumbel" in changes:
            evor_select_reference(case.network, *case.inputs()[:3], **options | {"tau_q": 0.0})

    def test_gumbel_draws_follow_the_softmax(self):
        generator = torch.Generator().manual_seed(0)
        q = torch.tensor([0.0, 1.0, 2.0])
        gumbel = -torch.empty(20_000, 3).exponential_(generator=generator).log()
        index = choose_candidate(q.expand(20_000, 3), gumbel, 1.5)
        share = torch.bincount(index, minlength=3) / 20_000
        torch.testing.assert_close(share, (q / 1.5).softmax(-1), atol=0.012, rtol=0)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu", "silu"])
def test_matches_the_reference(activation, layer_norm):
    case = Case(3, 4, 5, (48, 20, 33), activation=activation, layer_norm=layer_norm)
    assert_matches(_run(case), case, "float32")


@pytest.mark.parametrize("num_steps", [2, 6])
@pytest.mark.parametrize("shape", [(1, 5, 7), (30, 3, 2)])
def test_midpoint_steps_match_the_reference(shape, num_steps):
    case = Case(*shape, (16, 16), num_steps=num_steps, solver="midpoint")
    assert_matches(_run(case), case, "float32")


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_pieces_of_the_torch_path(solver, monkeypatch):
    """What other devices run, in one piece and in many: never more rows at once than fit."""
    case = Case(5, 4, 3, (16, 32, 16), num_steps=4, solver=solver)
    case.network.double()
    weights = fold(list(case.packed.tensors()), True)
    reads = [tensor.double() for tensor in case.inputs()[:3]]
    rows = []
    activate = _torch_path.activate
    monkeypatch.setattr(
        _torch_path, "activate", lambda x, name: rows.append(x[..., 0].numel()) or activate(x, name)
    )
    found = []
    for room in (2**28, 7 * 32 * 8):
        monkeypatch.setattr(_torch_path, "_CHUNK_BYTES", room)
        with torch.no_grad():
            args = weights, "gelu_tanh", case.packed.eps, *reads, Steps(4, solver)
            found.append(_torch_path.folded_sample(*args))
    assert max(rows) == 60 and min(rows) == 6
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    assert relative_error(found[0], (case.want()[3] - 2.0) / 3.0) < TOLERANCE["float64"]


@pytest.mark.parametrize(
    "options",
    [
        {"shared": True},
        {"weighted": True},
        {"tau_r": 0.0},
        {"tau_r": math.inf},
        {"tau_q": 0.0},
        {"tau_q": math.inf},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 1), (3, 1, 4), (40, 9, 7)])
def test_matches_the_reference_in_all_modes(shape, options):
    case = Case(*shape, (16, 16), **options)
    assert_matches(_run(case), case, "float32")


def test_double_precision():
    case = Case(2, 3, 4, (32, 32))
    want = case.want()
    packed = pack_velocity_mlp(case.network.double(), 5, 3)
    inputs = [tensor.double() for tensor in case.inputs()]
    with torch.no_grad():
        got = evor_select(packed, *inputs, **case.options, return_samples=True)
    for tensor, expected in zip(got, want):
        assert tensor.dtype == torch.float64
        assert relative_error(tensor, expected) < TOLERANCE["float64"]


def test_any_batch_shape():
    case = Case(6, 3, 4, (16, 16))
    want = _run(case)
    case.observation = case.observation.reshape(2, 3, 5)
    case.action, case.noise = case.action.reshape(2, 3, 3, 3), case.noise.reshape(2, 3, 3, 4)
    case.gumbel = case.gumbel.reshape(2, 3, 3)
    for tensor, expected in zip(_run(case), want):
        assert torch.equal(tensor, expected.reshape(2, 3, *expected.shape[1:]))


def test_one_state_without_a_batch_dimension():
    case = Case(1, 3, 4, (16, 16))
    want = _run(case)
    case.observation, case.action = case.observation[0], case.action[0]
    case.noise, case.gumbel = case.noise[0], case.gumbel[0]
    for tensor, expected in zip(_run(case), want):
        torch.testing.assert_close(tensor, expected[0])


def test_zero_states():
    case = Case(0, 3, 4, (16, 16))
    assert [tuple(tensor.shape) for tensor in _run(case)] == [(0, 3), (0,), (0, 3), (0, 3, 4)]


def test_non_contiguous_inputs():
    case = Case(4, 3, 5, (16, 16))
    want = _run(case)
    case.observation = case.observation.t().contiguous().t()
    case.action = case.action.transpose(0, 1).contiguous().transpose(0, 1)
    case.noise = case.noise.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    case.gumbel = case.gumbel.t().contiguous().t()
    for tensor, expected in zip(_run(case), want):
        torch.testing.assert_close(tensor, expected)


class TestLiveWeights:
    def test_optimiser_step(self):
        case = Case(2, 3, 4, (16, 16))
        before = _run(case)[2]
        optimiser = torch.optim.Adam(case.network.parameters(), lr=0.1)
        case.network(torch.randn(4, 10)).sum().backward()
        optimiser.step()
        after = _run(case)
        assert relative_error(after[2], before.double()) > 1e-3
        assert_matches(after, case, "float32")

    def test_write_through_data_and_load_state_dict(self):
        case = Case(2, 3, 4, (16, 16))
        version = case.network[0].weight._version
        case.network[0].weight.data.mul_(2.0)
        assert case.network[0].weight._version == version
        assert_matches(_run(case), case, "float32")
        other = make_mlp(10, (16, 16), layer_norm=True)
        case.network.load_state_dict(other.state_dict())
        assert_matches(_run(case), case, "float32")

    def test_parameters_swapped_by_tensordict(self):
        case, other = Case(2, 3, 4, (16, 16)), make_mlp(10, (16, 16), layer_norm=True)
        before = _run(case)
        with TensorDict.from_module(other).to_module(case.network):
            assert_matches(_run(case), case, "float32")
        for tensor, expected in zip(_run(case), before):
            assert torch.equal(tensor, expected)

    def test_frozen_view_keeps_its_weights(self):
        case = Case(2, 3, 4, (16, 16))
        before = _run(case)[2]
        case.packed = case.packed.freeze()
        case.network[0].weight.data.mul_(2.0)
        assert torch.equal(_run(case)[2], before)


class TestCustomOperator:
    def test_opcheck(self):
        case = Case(2, 3, 4, (16, 16))
        tensors = [tensor.detach() for tensor in case.packed.tensors()]
        sampler = (tensors, "gelu_tanh", 1e-6, 4, "midpoint")
        inputs = (case.observation, case.action, case.noise)
        torch.library.opcheck(ops._sample_op, (*inputs, None, 4, *sampler, "torch", "", 0.0))
        loc, scale = torch.zeros(()), torch.ones(())
        for samples in (False, True):
            options = (0.7, 0.5, samples, "torch", "", 0.0)
            reads = (*inputs, None, 4, case.gumbel, None, loc, scale, *sampler, *options)
            torch.library.opcheck(ops._select_op, reads)

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_compiles_without_graph_breaks_and_sees_new_weights(self, backend):
        case = Case(2, 3, 4, (16, 16))
        compiled = torch.compile(evor_select, fullgraph=True, backend=backend)
        # Temperatures that change become symbols of the graph.
        for tau_r, tau_q in ((0.7, 0.5), (0.8, 0.5), (0.9, 0.4)):
            case.options.update(tau_r=tau_r, tau_q=tau_q)
            with torch.no_grad():
                got = compiled(case.packed, *case.inputs(), **case.options, return_samples=True)
            assert_matches(got, case, "float32")
            case.network[0].weight.data.mul_(1.5)
            case.noise.normal_()


class Scaled(VelocityMLP):
    """A network whose call is more than its layers."""

    def forward(self, *inputs):
        return 3 * super().forward(*inputs)


class Doubled(nn.Sequential):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


class Rounded(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs).round()


def hooked(network):
    network[2].register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    return network


class TestPacking:
    def test_velocity_mlp(self):
        network = VelocityMLP(7, hidden_sizes=(16, 8), layer_norm=True)
        packed = pack_velocity_mlp(network, observation_dim=3, action_dim=2)
        assert packed.widths == (16, 8) and packed.layer_norm
        assert packed.activation == "gelu_tanh" and packed.eps == 1e-6

    def test_torchrl_mlp(self):
        network = MLP(in_features=7, out_features=1, num_cells=[16, 8], activation_class=nn.ReLU)
        assert pack_velocity_mlp(network, observation_dim=3, action_dim=2).widths == (16, 8)

    @pytest.mark.parametrize(
        "network, reason",
        [
            (nn.Linear(7, 1), "is no nn.Sequential"),
            (Scaled(7, hidden_sizes=(4, 4)), "Scaled is no nn.Sequential"),
            (Doubled(*make_mlp(7, (4, 4))), "Doubled is no nn.Sequential"),
            (nn.Sequential(Rounded(7, 4), *make_mlp(7, (4, 4))[1:]), "layer 0 is a Rounded"),
            (hooked(make_mlp(7, (4, 4))), "a hook changes the call of its Linear"),
            (nn.Sequential(nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 1)), "1 hidden layers"),
            (make_mlp(6, (4, 4)), "reads 6 features"),
            (nn.Sequential(*make_mlp(7, (4, 4))[:-1], nn.Linear(4, 2)), "writes 2 features"),
            (nn.Sequential(*make_mlp(7, (4, 4)), nn.Tanh()), "layer 5 is a Tanh"),
            (nn.Sequential(nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 1)), "layer 1 is a Tanh"),
            (
                nn.Sequential(nn.Linear(7, 4), nn.ReLU(), *make_mlp(4, (4,))),
                "activations differ",
            ),
            (
                nn.Sequential(*make_mlp(7, (4,), layer_norm=True)[:-1], *make_mlp(4, (4,))),
                "1 of its 2 hidden layers",
            ),
        ],
    )
    def test_reasons(self, network, reason):
        assert reason in why_not_packable(network, 3, 2)
        with pytest.raises(ValueError, match=reason):
            pack_velocity_mlp(network, 3, 2)

    def test_linear_without_bias_and_norm_without_affine(self):
        network = make_mlp(10, (16, 16), layer_norm=True)
        network[0], network[3] = nn.Linear(10, 16, bias=False), nn.Linear(16, 16, bias=False)
        network[2] = nn.LayerNorm(16, eps=1e-6, elementwise_affine=False)
        network[5] = nn.LayerNorm(16, eps=1e-6, bias=False)
        case = Case(2, 3, 4, (16, 16))
        case.network, case.packed = network, pack_velocity_mlp(network, 5, 3)
        assert_matches(_run(case), case, "float32")


class TestBadInput:
    @pytest.mark.parametrize(
        "name, shape",
        [
            ("observation", (2, 6)),
            ("observation", ()),
            ("action", ()),
            ("action", (3,)),
            ("action", (2, 3, 4)),
            ("action", (3, 3, 3)),
            ("action", (2, 0, 3)),
            ("noise", (2, 4, 4)),
            ("noise", (0,)),
            ("gumbel", (2, 4)),
        ],
    )
    def test_shapes(self, name, shape):
        case = Case(2, 3, 4, (16, 16))
        setattr(case, name, torch.randn(shape))
        with pytest.raises(ValueError, match=name):
            _run(case)

    def test_dtypes(self):
        case = Case(2, 3, 4, (16, 16))
        case.observation = case.observation.double()
        with pytest.raises(ValueError, match="observation is torch.float64"):
            _run(case)

    @pytest.mark.parametrize("name", ["noise", "gumbel"])
    def test_integers_are_no_noise(self, name):
        case = Case(2, 3, 4, (16, 16))
        setattr(case, name, getattr(case, name).long())
        with pytest.raises(ValueError, match=f"{name} is torch.int64, expected a floating"):
            _run(case)

    @pytest.mark.parametrize("name", ["observation", "action", "noise", "gumbel"])
    def test_devices(self, name):
        case = Case(2, 3, 4, (16, 16))
        setattr(case, name, getattr(case, name).to("meta"))
        with pytest.raises(ValueError, match=f"{name} is on meta"):
            _run(case)

    @pytest.mark.parametrize("reason", ["the hidden widths are (2048,)", "2147483648 rows exceed"])
    def test_what_the_kernels_cannot_is_refused_not_replaced(self, monkeypatch, reason):
        monkeypatch.setattr(_dispatch, "why_no_triton", lambda *_: reason)
        with pytest.raises(
            RuntimeError, match="backend='triton' is not available: .*" + reason[:8]
        ):
            _run(Case(2, 3, 4, (16, 16)), backend="triton")
        _run(Case(2, 3, 4, (16, 16)), backend="auto")

    @pytest.mark.parametrize(
        "changes",
        [
            {"tau_r": -1.0},
            {"tau_r": math.nan},
            {"tau_r": "1"},
            {"tau_q": -1.0},
            {"tau_q": math.nan},
            {"tau_q": None},
            {"num_steps": 0},
            {"num_steps": 2.5},
            {"num_steps": True},
            {"num_steps": 3, "solver": "midpoint"},
            {"solver": "heun"},
            {"loc": torch.zeros(2)},
            {"loc": math.nan},
            {"loc": -math.inf},
            {"loc": "0"},
            {"scale": torch.ones(2, 1)},
            {"scale": 0},
            {"scale": -1.0},
            {"scale": math.inf},
            {"scale": math.nan},
            {"scale": None},
            {"tolerance": math.nan},
            {"backend": "cuda"},
            {"precision": "fp8"},
            {"log_weights": torch.zeros(5)},
        ],
        ids=str,
    )
    def test_options(self, changes):
        with pytest.raises(ValueError, match=next(iter(changes))):
            _run(Case(2, 3, 4, (16, 16)), **changes)

    def test_a_network_is_no_packed_view(self):
        case = Case(2, 3, 4, (16, 16))
        case.packed = case.network
        with pytest.raises(ValueError, match="packed is a Sequential, expected a PackedVelocity"):
            _run(case)
        with torch.no_grad(), pytest.raises(ValueError, match="packed is a Sequential"):
            sample_returns(case.packed, *case.inputs()[:3], 2)

    def test_a_state_of_one_action_without_candidates(self):
        """Shapes are looked at only where there are as many axes."""
        case = Case(2, 3, 4, (16, 16))
        case.observation, case.action = case.observation[0], case.action[0, 0, 0]
        with pytest.raises(ValueError, match=r"action has shape \(\), expected"):
            _run(case)

    def test_tensors_of_loc_and_scale_are_not_read(self):
        """That would wait for the device; on ``meta`` there is nothing to read."""
        tensors = {"loc": torch.zeros((), device="meta"), "scale": torch.ones(1, device="meta")}
        _checks.check_normalization(**tensors)

    def test_gumbel_is_needed_to_draw(self):
        case = Case(2, 3, 4, (16, 16))
        with torch.no_grad(), pytest.raises(ValueError, match="gumbel is needed"):
            evor_select(case.packed, *case.inputs()[:3], **case.options)

    def test_gradients(self):
        case = Case(2, 3, 4, (16, 16))
        with pytest.raises(RuntimeError, match="no backward"):
            evor_select(case.packed, *case.inputs(), **case.options)
        case.network.requires_grad_(False)
        evor_select(case.packed, *case.inputs(), **case.options)
        case.action.requires_grad_()
        with pytest.raises(RuntimeError, match="no backward"):
            evor_select(case.packed, *case.inputs(), **case.options)

    @pytest.mark.parametrize("backend", ["triton", "triton_layered", "triton_loop"])
    def test_triton_where_it_cannot_run(self, backend, monkeypatch):
        with pytest.raises(RuntimeError, match="CUDA device"):
            _run(Case(2, 3, 4, (16, 16)), backend=backend)
        monkeypatch.setattr(_dispatch, "_has_triton", False)
        with pytest.raises(RuntimeError, match="triton is not installed"):
            _run(Case(2, 3, 4, (16, 16)), backend=backend)

    @pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
    def test_auto_takes_measured_kernels_only(self, monkeypatch):
        from torchrl_evor.triton_kernels import _config

        monkeypatch.setattr(_config, "_FASTEST", {("tf32x3", 512): (1000, 2000)})
        width = (512, 300)
        assert [_config.is_fastest(width, "tf32x3", n) for n in (999, 1000, 2000, 2001)] == [
            False,
            True,
            True,
            False,
        ]
        assert not _config.is_fastest(width, "fp16", 1500)
        assert not _config.is_fastest((256, 300), "tf32x3", 1500)

    def test_reasons_of_the_device_side(self, monkeypatch):
        monkeypatch.setattr(_dispatch, "_has_triton", True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        cuda = torch.device("cuda", 0)
        assert why_no_triton((512, 512), torch.float32, cuda, 64) is None
        assert "float64" in why_no_triton((512, 512), torch.float64, cuda, 64)
        assert "up to 1024" in why_no_triton((2048, 512), torch.float32, cuda, 64)
        assert "32-bit" in why_no_triton((512, 512), torch.float32, cuda, 2**31)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
        assert "8.0" in why_no_triton((512, 512), torch.float32, cuda, 64)


@pytest.mark.parametrize("module", [ops, packing, reference, _dispatch], ids=lambda m: m.__name__)
def test_examples(module):
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed


def test_reference_takes_any_module():
    """A network that cannot be packed still has the slow path."""
    network = nn.Sequential(nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 1))
    case = Case(2, 3, 4, (16, 16))
    with torch.no_grad():
        chosen, *_ = evor_select_reference(network, *case.inputs(), **case.options)
    assert chosen.shape == (2, 3)


def test_sample_returns_is_the_first_half_of_the_whole():
    case = Case(2, 3, 4, (16, 16))
    with torch.no_grad():
        z = sample_returns(case.packed, *case.inputs()[:3], case.options["num_steps"])
    torch.testing.assert_close(2.0 + 3.0 * z, _run(case)[3])


if __name__ == "__main__":
    pytest.main([__file__, "-q"])

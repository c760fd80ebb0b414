# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The CPU path: parity in both layouts of the rows, and interpolation with its error control."""

from __future__ import annotations

import math

import pytest
import torch
from _kernel_cases import TOLERANCE, Case, relative_error
from torchrl_evor.triton_kernels import _chebyshev, _cpu_path, evor_select, sample_returns
from torchrl_evor.triton_kernels._steps import Steps
from torchrl_evor.triton_kernels.packing import fold
from torchrl_evor.triton_kernels.reference import sample_returns_reference

TEN = Steps(10, "euler")


def _z(case, **options):
    steps = {key: case.options[key] for key in ("num_steps", "solver")}
    with torch.no_grad():
        return sample_returns(case.packed, *case.inputs()[:3], **steps, **options)


def _want(case):
    return (case.want()[3] - 2.0) / 3.0


# One state with many rows, in several chunks; many states with few rows each.
@pytest.mark.parametrize("shape", [(1, 33, 70), (2, 9, 8), (70, 3, 5)])
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu", "silu"])
def test_matches_the_reference(shape, activation, layer_norm, onednn, monkeypatch):
    if onednn and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("PyTorch was built without oneDNN")
    monkeypatch.setattr(_cpu_path, "_has_onednn", lambda: onednn)
    monkeypatch.setattr(_cpu_path, "_CHUNK_BYTES", 2**16)
    case = Case(*shape, (48, 20, 33), activation=activation, layer_norm=layer_norm)
    assert relative_error(_z(case), _want(case)) < TOLERANCE["float32"]


@pytest.mark.parametrize("steps", [{}, {"num_steps": 4, "solver": "midpoint"}], ids=str)
@pytest.mark.parametrize("shape", [(1, 33, 70), (70, 3, 5)])
def test_double_precision(shape, steps):
    case = Case(*shape, (48, 20, 33), **steps)
    want = _want(case)
    case.network.double()
    case.observation, case.action = case.observation.double(), case.action.double()
    assert relative_error(_z(case), want) < TOLERANCE["float64"]


def test_two_threads():
    case, threads = Case(3, 40, 16, (64, 64)), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert relative_error(_z(case), _want(case)) < TOLERANCE["float32"]
    finally:
        torch.set_num_threads(threads)


def test_inputs_stay_as_they_are():
    case = Case(2, 40, 16, (16, 16), shared=True)
    before = [tensor.clone() for tensor in case.inputs()]
    _z(case)
    _z(case, tolerance=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(case.inputs(), before))


def test_normalisation_is_that_of_layer_norm():
    """Also for a mean that is large against the deviation, and for equal activations."""
    g = torch.randn(5, 33, dtype=torch.float64)
    g[1] += 1e4
    g[2] = 3.0
    weights = _cpu_path.CPUWeights(None, None, (), "relu", 1e-6, False)
    want = torch.nn.functional.layer_norm(g, (33,), eps=1e-6)
    torch.testing.assert_close(_cpu_path._normalized(weights, g), want, rtol=1e-9, atol=1e-9)


class Field:
    """Velocities given by a formula, one parameter per candidate; counts its evaluations."""

    num_products = 0

    def __init__(self, formula, parameter, count=None):
        self.formula, self.parameter = formula, parameter
        self.count = [0] if count is None else count

    def __call__(self, z, time, maps=()):
        assert not maps
        self.count[0] += z.numel()
        return self.formula(z, time, self.parameter)

    def layers(self, z, time):
        return self(z, time), []

    def subset(self, index):
        return Field(self.formula, self.parameter[index], self.count)


def _euler(field, z, num_steps=10):
    for k in range(num_steps):
        z = z + field(z, k / num_steps) / num_steps
    return z


def _velocity_of(case, num_steps):
    """Velocity of a case in float64, the box of its paths, and its noise ``[N, P]``."""
    with torch.no_grad():
        case.network.double()
        packed = case.packed
        folded = fold([t.detach() for t in packed.tensors()], packed.layer_norm)
        weights = _cpu_path.cpu_weights(folded, 3, packed.activation, packed.eps)
        reads = case.observation.double(), case.action.double()
        velocity = next(iter(_cpu_path._velocities(weights, *reads, case.noise.shape[-1])))[1]
        noise = case.noise[0].double().t().contiguous()
        return velocity, _chebyshev._box(velocity, noise, num_steps), noise


class TestInterpolation:
    @pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 40])
    def test_low_degrees_are_exact(self, num_steps):
        """Products of low degree are among the polynomials of every grid."""
        field = Field(lambda z, t, p: 0.3 * z * z - p * t * z + t * t - 1.0, torch.rand(5).double())
        noise = torch.randn(400, 5, dtype=torch.float64).clamp(-2, 2)
        got, left = _chebyshev.interpolated_flow(field, noise, Steps(num_steps, "euler"), 1e-9)
        assert not len(left)
        torch.testing.assert_close(got, _euler(field, noise, num_steps), rtol=1e-10, atol=1e-10)

    def test_midpoint_steps(self):
        """The same evaluations in time, of which every second one starts where the first did."""
        field = Field(lambda z, t, p: 0.3 * z * z - p * t * z + t * t - 1.0, torch.rand(5).double())
        noise = torch.randn(400, 5, dtype=torch.float64).clamp(-2, 2)
        got, left = _chebyshev.interpolated_flow(field, noise, Steps(6, "midpoint"), 1e-9)
        want = noise
        for k in range(0, 6, 2):
            middle = want + field(want, k / 6) / 6
            want = want + field(middle, (k + 1) / 6) / 3
        assert not len(left)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)

    def test_cost_does_not_depend_on_the_number_of_nodes(self):
        counts = []
        for nodes in (100, 1000):
            field = Field(lambda z, t, p: torch.sin(p * z + t), torch.full((20,), 0.5))
            _chebyshev.interpolated_flow(field, torch.randn(nodes, 20).clamp(-2, 2), TEN, 1e-4)
            counts.append(field.count[0])
        assert counts[0] <= 20 * 100 * 10 / 4
        assert counts[1] <= 1.1 * counts[0]

    def test_sharp_candidates_are_left_to_the_caller(self):
        """tanh(80 z) is what the field of two narrow modes looks like near flow time 1."""
        steepness = torch.full((30,), 0.5, dtype=torch.float64)
        steepness[[5, 17]] = 80.0
        field = Field(lambda z, t, p: torch.tanh(p * z) - 0.1 * z, steepness)
        noise = torch.randn(200, 30, dtype=torch.float64).clamp(-2, 2)
        got, left = _chebyshev.interpolated_flow(field, noise, TEN, 1e-5)
        assert left.tolist() == [5, 17]
        kept = torch.ones(30, dtype=torch.bool)
        kept[left] = False
        assert relative_error(got[:, kept], _euler(field, noise)[:, kept]) < 1e-5

    def test_all_sharp_costs_a_probe_only(self):
        field = Field(lambda z, t, p: torch.tanh(p * z), torch.full((64,), 80.0))
        _, left = _chebyshev.interpolated_flow(field, torch.randn(64, 64), TEN, 1e-4)
        assert len(left) == 64 and field.count[0] <= 0.05 * 64 * 64 * 10

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_what_is_not_finite_is_left(self, bad):
        field = Field(lambda z, t, p: p * z, torch.tensor([0.1, 0.1, 0.1, bad, 0.1]))
        _, left = _chebyshev.interpolated_flow(field, torch.randn(400, 5), TEN, 1e-4)
        assert 3 in left.tolist()

    def test_equal_nodes(self):
        """An interval of no length: nothing to interpolate, nothing to divide by."""
        field = Field(lambda z, t, p: -p * z, torch.rand(4))
        noise = torch.ones(100, 4)
        got, left = _chebyshev.interpolated_flow(field, noise, TEN, 1e-4)
        got[:, left] = _euler(field, noise)[:, left]
        torch.testing.assert_close(got, _euler(field, noise), rtol=1e-4, atol=0)

    @pytest.mark.parametrize("steepness", [0.3, 1.0, 3.0, 10.0])
    @pytest.mark.parametrize("tolerance", [1e-5, 1e-3])
    def test_networks_of_all_kinds_keep_the_tolerance(self, steepness, tolerance):
        case = Case(2, 20, 64, (32, 32), num_steps=10)
        with torch.no_grad():
            case.network[0].weight[:, -2:] *= steepness
        assert relative_error(_z(case, tolerance=tolerance), _want(case)) < tolerance

    def test_layers_take_fewer_points_the_earlier_they_are(self):
        case = Case(1, 8, 64, (32, 32, 32), num_steps=10)
        with torch.no_grad():
            for layer in case.network[3::3]:
                layer.weight *= 2
        velocity, box, noise = _velocity_of(case, num_steps=10)
        ladder = _chebyshev._ladder(64, 10, noise.dtype)
        _, _, grids = _chebyshev._probe(velocity, noise, box, TEN, 1e-5, ladder)
        first, second, last = (grid.size for grid in grids)
        assert first < second < last

    @pytest.mark.parametrize("levels", [((4, 2), (8, 4), (20, 6)), ((6, 3), (6, 3), (24, 6))])
    def test_layers_on_too_few_points_are_found_out(self, levels):
        """The last coefficients do not show it, values of the velocity do."""
        case = Case(1, 24, 16, (32, 32, 32), num_steps=10)
        velocity, box, noise = _velocity_of(case, num_steps=10)
        grids = [_chebyshev._grid(level, 10, noise.dtype) for level in levels]
        z, estimate = _chebyshev._run(velocity, noise, box, TEN, grids)
        true = ((z - _euler(velocity, noise)).square().mean(0) / z.square().mean(0)).sqrt()
        assert true.square().mean().sqrt() <= estimate.square().mean().sqrt()
        assert true.max() > 1e-4

    @pytest.mark.parametrize("layer_norm", [True, False])
    def test_maps_between_grids_in_chunks(self, layer_norm, monkeypatch):
        """Fine grids for all layers give what evaluation at the last grid gives."""
        case = Case(2, 30, 16, (24, 24), num_steps=10, layer_norm=layer_norm)
        velocity, box, noise = _velocity_of(case, num_steps=10)
        grids = [_chebyshev._grid(level, 10, noise.dtype) for level in ((32, 7), (8, 3))]
        points, time = _chebyshev._points(box, grids[0], 10)
        mapping = _chebyshev._map((32, 7), (8, 3), 10, noise.dtype)
        want = velocity(*_chebyshev._points(box, grids[1], 10))
        assert relative_error(velocity(points, time, (mapping,)), want) < 1e-6
        monkeypatch.setattr(_cpu_path, "_chunk_rows", lambda _: 7 * len(points))
        assert relative_error(velocity(points, time, (mapping,)), want) < 1e-6

    def test_few_nodes_are_evaluated_one_by_one(self):
        case = Case(2, 3, 4, (16, 16))
        assert torch.equal(_z(case, tolerance=1e-2), _z(case))

    def test_zero_tolerance_is_exact_and_is_the_default(self):
        case = Case(1, 8, 100, (16, 16), num_steps=10, layer_norm=False)
        assert torch.equal(_z(case, tolerance=0.0), _z(case))
        assert not torch.equal(_z(case, tolerance=1e-3), _z(case))

    def test_selection(self):
        case = Case(3, 8, 100, (16, 16), num_steps=10, layer_norm=False)
        with torch.no_grad():
            want = evor_select(case.packed, *case.inputs(), **case.options)
            got = evor_select(case.packed, *case.inputs(), **case.options, tolerance=1e-5)
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[2], want[2], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("tolerance", [-1e-3, 1.0, math.nan])
    def test_bad_tolerance(self, tolerance):
        with pytest.raises(ValueError, match="tolerance"):
            _z(Case(2, 3, 4, (16, 16)), tolerance=tolerance)


def test_trained_on_two_modes():
    """A flow trained on a law of two modes: interpolation helps little and must not harm."""
    torch.manual_seed(0)
    case = Case(1, 16, 64, (64, 64), num_steps=10, obs=1, act=1)
    optimizer = torch.optim.Adam(case.network.parameters(), lr=3e-3)
    for _ in range(200):
        x, a, noise, t = *torch.randn(3, 256, 1), torch.rand(256, 1)
        data = torch.where(torch.rand(256, 1) < torch.sigmoid(a), 1.0, -1.0)
        data = data + 0.05 * torch.randn(256, 1)
        inputs = torch.cat([x, a, (1 - t) * noise + t * data, t], -1)
        loss = (case.network(inputs) - (data - noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    inputs = [tensor.double() for tensor in case.inputs()[:3]]
    with torch.no_grad():
        for tolerance in (0.0, 1e-5, 1e-3):
            got = _z(case, tolerance=tolerance)
            want = sample_returns_reference(case.network.double(), *inputs, 10)
            case.network.float()
            assert relative_error(got, want) < max(tolerance, 1e-5)


if __name__ == "__main__":
    pytest.main([__file__, "-q"])

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The kernels on a CUDA device, against float64."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from _kernel_cases import TOLERANCE, Case, assert_matches, relative_error
from torchrl_evor.triton_kernels import (
    evor_select,
    philox_gumbel,
    philox_normal,
    sample_returns,
)

_has_triton = importlib.util.find_spec("triton") is not None

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not _has_triton, reason="needs CUDA and triton"
    ),
]
DESIGNS = ("triton_layered", "triton_loop")


def _run(case, backend, precision, **changes):
    with torch.no_grad():
        return evor_select(
            case.packed,
            *case.inputs(),
            **case.options,
            return_samples=True,
            backend=backend,
            precision=precision,
            **changes,
        )


@pytest.mark.parametrize("backend", DESIGNS)
@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32", "tf32x3", "ieee"])
def test_parity_at_full_size(backend, precision):
    case = Case(3, 5, 23, (512,) * 4, num_steps=10, device="cuda")
    assert_matches(_run(case, backend, precision), case, precision)


@pytest.mark.parametrize("backend", DESIGNS)
@pytest.mark.parametrize(
    "widths, activation, layer_norm",
    [
        ((48, 48), "relu", False),
        ((64, 64, 64), "silu", True),
        ((200, 200, 200), "gelu", True),
        ((1000, 1000), "gelu_tanh", False),
    ],
)
def test_parity_of_other_networks(backend, widths, activation, layer_norm):
    options = {"activation": activation, "layer_norm": layer_norm, "device": "cuda"}
    case = Case(4, 3, 7, widths, **options)
    assert_matches(_run(case, backend, "fp16"), case, "fp16")


@pytest.mark.parametrize("backend", DESIGNS)
@pytest.mark.parametrize("precision", ["fp16", "tf32x3"])
def test_parity_of_midpoint_steps(backend, precision):
    case = Case(4, 30, 70, (512,) * 3, num_steps=6, solver="midpoint", device="cuda")
    assert_matches(_run(case, backend, precision), case, precision)


def test_parity_of_unequal_widths():
    case = Case(4, 3, 7, (130, 64, 300), device="cuda")
    assert_matches(_run(case, "triton_layered", "tf32x3"), case, "tf32x3")
    with pytest.raises(RuntimeError, match="equal hidden widths"):
        _run(case, "triton_loop", "tf32x3")


@pytest.mark.parametrize("backend", DESIGNS)
def test_many_rows_in_several_chunks(backend):
    case = Case(70, 11, 100, (64, 64, 64), device="cuda")
    assert_matches(_run(case, backend, "fp16"), case, "fp16")


@pytest.mark.parametrize(
    "options",
    [
        {"tau_r": 0.0},
        {"tau_r": float("inf")},
        {"tau_r": 100.0},
        {"tau_r": 1e-3},
        {"tau_q": 0.0},
        {"weighted": True},
        {"weighted": True, "tau_r": float("inf")},
        {"shared": True},
    ],
    ids=str,
)
def test_selection_modes(options):
    case = Case(3, 40, 70, (64, 64), device="cuda", **options)
    assert_matches(_run(case, "triton", "tf32x3"), case, "tf32x3")


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 1), (1, 33, 1), (1, 1, 65)])
def test_smallest_shapes(shape):
    case = Case(*shape, (64, 64), device="cuda")
    assert_matches(_run(case, "triton", "tf32x3"), case, "tf32x3")


@pytest.mark.parametrize("backend", DESIGNS)
def test_zero_states(backend):
    case = Case(0, 3, 4, (64, 64), device="cuda")
    assert [tuple(t.shape) for t in _run(case, backend, None)] == [(0, 3), (0,), (0, 3), (0, 3, 4)]


@pytest.mark.parametrize("backend", DESIGNS)
@pytest.mark.parametrize("precision", ["fp16", "tf32x3"])
def test_repeats_bit_for_bit(backend, precision):
    """A missing barrier shows as an error that moves between runs."""
    case = Case(2, 32, 50, (512,) * 4, num_steps=5, device="cuda")
    first = _run(case, backend, precision)
    for _ in range(1000):
        for got, want in zip(_run(case, backend, precision), first):
            assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:Deterministic behavior")  # of cuBLAS, in older PyTorch
@pytest.mark.parametrize("backend", DESIGNS)
def test_uninitialised_memory_is_not_read(backend):
    case = Case(3, 5, 7, (48, 48, 48), device="cuda")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    try:
        got = _run(case, backend, "tf32x3")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_matches(got, case, "tf32x3")


@pytest.mark.parametrize("backend", DESIGNS)
def test_graph_replays_fresh_noise_and_fresh_weights(backend):
    case = Case(2, 8, 16, (64, 64, 64), device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _run(case, backend, "tf32x3")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = _run(case, backend, "tf32x3")
    for _ in range(3):
        case.noise.normal_()
        for parameter in case.network.parameters():
            # A write through `.data` does not bump the version counter.
            parameter.data.mul_(1.1)
        graph.replay()
        assert_matches(got, case, "tf32x3")


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiles_without_graph_breaks(mode):
    """The second mode captures CUDA graphs of its own."""
    case = Case(2, 8, 16, (64, 64, 64), device="cuda")

    @torch.compile(fullgraph=True, mode=mode)
    def compiled(observation, action, noise, gumbel):
        return evor_select(
            case.packed,
            observation,
            action,
            noise,
            gumbel,
            **case.options,
            return_samples=True,
            backend="triton",
            precision="tf32x3",
        )

    for _ in range(5):
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            assert_matches(compiled(*case.inputs()), case, "tf32x3")
        case.network[0].weight.data.mul_(1.1)
        case.noise.normal_()


class TestSeed:
    """Noise drawn inside the kernels is that of the reference."""

    @staticmethod
    def _run(case, seed, backend="triton", **changes):
        nodes = case.noise.shape[-1]
        with torch.no_grad():
            return evor_select(
                case.packed,
                case.observation,
                case.action,
                seed=seed,
                num_samples=nodes,
                **case.options,
                return_samples=True,
                backend=backend,
                precision="tf32x3",
                **changes,
            )

    @staticmethod
    def _explicit(case, seed):
        case.noise = philox_normal(seed, tuple(case.noise.shape))
        case.gumbel = philox_gumbel(seed, tuple(case.gumbel.shape))
        return case

    @pytest.mark.parametrize("backend", [*DESIGNS, "torch"])
    def test_parity(self, backend):
        case = Case(3, 5, 23, (512,) * 4, device="cuda")
        seed = torch.tensor([7, 2**33], device="cuda")
        got = self._run(case, seed, backend)
        assert_matches(got, self._explicit(case, seed), "tf32x3")

    def test_noise_itself(self):
        """A flow that stands still returns its start, whatever the design."""
        seed, shape = torch.tensor([-3, 1], device="cuda"), (70, 32, 33)
        case = Case(*shape, (64, 64), device="cuda")
        torch.nn.init.zeros_(case.network[-1].weight)
        torch.nn.init.zeros_(case.network[-1].bias)
        reads = case.packed, case.observation, case.action, None, 2
        want = philox_normal(seed, shape)
        with torch.no_grad():
            found = [
                sample_returns(*reads, seed=seed, num_samples=33, backend=design)
                for design in DESIGNS
            ]
        assert torch.equal(*found)
        torch.testing.assert_close(found[0], want, rtol=5e-6, atol=5e-6)
        assert torch.equal(philox_normal(seed.cpu(), shape), want.cpu())

    @pytest.mark.parametrize("backend", DESIGNS)
    def test_graph_replays_fresh_noise(self, backend):
        case = Case(2, 8, 16, (64, 64, 64), device="cuda")
        seed = torch.tensor([5, 0], device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run(case, seed, backend)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = self._run(case, seed, backend)
            seed[1] += 1
        before = None
        for call in range(3):
            graph.replay()
            now = torch.tensor([5, call], device="cuda")
            assert_matches(got, self._explicit(case, now), "tf32x3")
            assert before is None or not torch.equal(got[3], before)
            before = got[3].clone()
        assert seed.tolist() == [5, 3]

    def test_compiles_without_graph_breaks(self):
        case, seed = Case(2, 8, 16, (64, 64), device="cuda"), torch.tensor([5, 0], device="cuda")
        compiled = torch.compile(lambda seed: self._run(case, seed), fullgraph=True)
        for _ in range(2):
            assert_matches(compiled(seed), self._explicit(case, seed), "tf32x3")
            seed[1] += 1


def test_torch_backend_on_the_device():
    case = Case(3, 5, 7, (64, 64), device="cuda")
    assert_matches(_run(case, "torch", None), case, "float32")


@pytest.mark.parametrize("dtype, row", [(torch.float16, "fp16"), (torch.bfloat16, "bf16")])
def test_half_parameters(dtype, row):
    case = Case(3, 5, 7, (64, 64), device="cuda")
    want = case.want()[3]
    case.network.to(dtype)
    inputs = case.observation.to(dtype), case.action.to(dtype), case.noise
    with torch.no_grad():
        z = sample_returns(case.packed, *inputs, 3, backend="triton")
    assert z.dtype == torch.float32
    assert relative_error(2.0 + 3.0 * z, want) < 2 * TOLERANCE[row]


@pytest.mark.parametrize("backend", DESIGNS)
def test_more_than_32_bits_of_first_layers(backend):
    """Candidates times width exceed 2**31: the last states are compared."""
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip("needs 32 GiB of free memory")
    case = Case(67_000, 32, 1, (1024, 1024), num_steps=1, device="cuda")
    got = _run(case, backend, "fp16")
    for name in ("observation", "action", "noise", "gumbel"):
        setattr(case, name, getattr(case, name)[-100:])
    assert_matches([tensor[-100:] for tensor in got], case, "fp16")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_device_that_is_not_current():
    case = Case(2, 3, 4, (64, 64), device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert_matches(_run(case, "triton", "tf32x3"), case, "tf32x3")


if __name__ == "__main__":
    pytest.main([__file__, "-m", "gpu", "-q"])

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The kernels in Triton's interpreter, on the CPU: run by ``test_evor_select_interpreter.py``.

Needs ``TRITON_INTERPRET=1`` before triton is imported, hence a process of its own. The interpreter
cannot see missing barriers; tf32 operands lose their low bits in it as they do in matrix units.
"""

from __future__ import annotations

import pytest
import torch
from _kernel_cases import Case, assert_matches, relative_error
from torchrl_evor.triton_kernels import (
    _config,
    _dispatch,
    _launch,
    _launch_select,
    evor_select,
    philox_gumbel,
    philox_normal,
    sample_returns,
)
from torchrl_evor.triton_kernels.reference import q_star

LAYERED = {
    "16x16": _launch.LayerConfig(16, 16, 16, 4, 1, rows=32),
    "32x64": _launch.LayerConfig(32, 64, 32, 4, 1),
}
LOOP = {"16": _launch.LoopConfig(16, 16, 4, 1), "32": _launch.LoopConfig(32, 32, 4, 1)}
TILES = LAYERED | {f"loop {name}": tile for name, tile in LOOP.items()}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills ``torch.empty`` with NaN, so that reading what nothing wrote cannot hide."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def use_tile(monkeypatch):
    monkeypatch.setattr(_dispatch, "why_no_triton", lambda *_: None)
    monkeypatch.setattr(_config, "num_programs", lambda _: 2)
    return lambda tile: monkeypatch.setattr(_config, "choose", lambda *_: tile)


def _run(case, precision, **changes):
    with torch.no_grad():
        return evor_select(
            case.packed,
            *case.inputs(),
            **case.options,
            return_samples=True,
            backend="triton",
            precision=precision,
            **changes,
        )


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    "states, candidates, nodes, widths, options",
    [
        (2, 3, 5, (48, 48, 48), {}),
        (1, 1, 1, (16, 16), {"activation": "relu", "layer_norm": False}),
        (3, 1, 2, (20, 20, 20), {"activation": "silu", "shared": True}),
        (1, 5, 9, (33, 33), {"activation": "gelu", "weighted": True}),
    ],
    ids=["layernorm", "one-of-each", "silu-shared-nodes", "erf-weights"],
)
def test_parity(use_tile, tile, states, candidates, nodes, widths, options):
    use_tile(TILES[tile])
    case = Case(states, candidates, nodes, widths, num_steps=2, **options)
    assert_matches(_run(case, "tf32x3"), case, "float32")


@pytest.mark.parametrize("tile", ["16x16", "loop 16"])
def test_midpoint_steps(use_tile, tile):
    """Several chunks of rows, whose half steps must not reach the stored start."""
    use_tile(TILES[tile])
    case = Case(3, 5, 7, (16, 16), num_steps=4, solver="midpoint")
    assert_matches(_run(case, "tf32x3"), case, "float32")


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32"])
@pytest.mark.parametrize("tile", ["16x16", "loop 16"])
def test_half_operands(use_tile, tile, precision):
    use_tile(TILES[tile])
    case = Case(2, 2, 3, (48, 48, 48), num_steps=2)
    assert_matches(_run(case, precision), case, precision)


@pytest.mark.parametrize("tile", ["16x16", "loop 16"])
def test_means_of_rounded_operands_cancel(use_tile, tile):
    """Activations far from zero: a folded LayerNorm subtracts what the product has added."""
    use_tile(TILES[tile])
    case = Case(2, 2, 3, (64, 64, 64), num_steps=2, activation="relu")
    for linear in case.packed.linears[:-1]:
        linear.bias.data.fill_(30.0)
    want = case.want()[3]
    tf32, half = (relative_error(_run(case, name)[3], want) for name in ("tf32", "fp16"))
    assert tf32 < 1.1 * half  # operands of as many digits


def test_unequal_widths_and_two_products_per_step(use_tile):
    use_tile(LAYERED["16x16"])
    case = Case(2, 2, 3, (20, 70, 40), num_steps=2)
    assert_matches(_run(case, "tf32x3"), case, "float32")


@pytest.mark.parametrize(
    "options",
    [
        {"tau_r": 0.0, "weighted": True},
        {"tau_r": float("inf"), "weighted": True},
        {"tau_r": 100.0},
        {"tau_r": 1e-3},
        {"tau_q": 0.0},
        {"tau_q": float("inf")},
    ],
    ids=str,
)
def test_temperatures(use_tile, options):
    """More candidates and nodes than one block of the selection holds."""
    use_tile(LOOP["32"])
    case = Case(2, 35, 66, (16, 16), num_steps=1, **options)
    assert_matches(_run(case, "tf32x3"), case, "float32")


@pytest.mark.parametrize("design", ["layered", "loop"])
def test_parameters_of_any_stride(use_tile, design):
    """Transposed weights, and LayerNorms and biases that are views of wider tensors."""
    use_tile(LAYERED["16x16"] if design == "layered" else LOOP["16"])
    case = Case(2, 3, 4, (16, 16), layer_norm=True)
    for parameter in case.network.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.t().contiguous().t()
        else:
            parameter.data = parameter.data.repeat_interleave(2)[::2]
    assert_matches(_run(case, "tf32x3"), case, "float32")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tau_r", [5.0, 1e3, 1e5, 1e7])
def test_large_temperatures_keep_their_digits(use_tile, tau_r, weighted):
    """Next to the mean, where a logsumexp in float32 cancels; nodes in two blocks."""
    use_tile(LOOP["32"])
    case = Case(2, 3, 66, (16, 16), num_steps=1, tau_r=tau_r, weighted=weighted)
    _, _, q, returns = _run(case, "tf32x3")
    weights = case.options.get("log_weights", torch.full((66,), 1 / 66).log())
    want = q_star(returns.double(), tau_r, weights.double().log_softmax(0))
    torch.testing.assert_close(q.double(), want, atol=5e-6, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"tau_r": 0.0, "weighted": True},
        {"tau_r": float("inf"), "tau_q": 0.0},
        {"tau_r": 0.7, "shared": True},
        {"tau_r": 0.7, "num_steps": 2, "solver": "midpoint"},
    ],
    ids=str,
)
@pytest.mark.parametrize("nodes, at_once", [(5, 5), (40, 1)])
@pytest.mark.parametrize("design", ["layered", "loop"])
def test_memory_does_not_grow_with_the_nodes(
    use_tile, monkeypatch, design, nodes, at_once, options
):
    """End points are kept for a few candidates at a time, or for one whose nodes fill the room."""
    tile = LAYERED["16x16"] if design == "layered" else LOOP["16"]._replace(rows=32)
    use_tile(tile)
    case = Case(2, 7, nodes, (16, 16), **{"num_steps": 1} | options)
    whole, kept = _run(case, "tf32x3"), []
    average = _launch.average
    monkeypatch.setattr(
        _launch, "average", lambda z, *reads: kept.append(z.numel()) or average(z, *reads)
    )
    with torch.no_grad():
        got = evor_select(case.packed, *case.inputs(), **case.options, backend="triton")
    assert kept == [at_once * nodes] * -(-14 // at_once)  # of 14 candidates
    for tensor, expected in zip(got, whole):
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-5)


def test_nan_never_wins_and_ties_go_to_the_lowest_index():
    z = torch.tensor([[[float("nan")], [1.0], [2.0], [2.0]], [[float("nan")]] * 4])
    one, zero = torch.ones(()), torch.zeros(())
    action = torch.arange(8.0).reshape(2, 4, 1)
    chosen, value, q, _ = _launch_select.select(z, action, None, None, zero, one, 1.0, 0.0, False)
    assert chosen.flatten().tolist() == [2.0, 4.0]
    assert value[0] == 2.0 and value[1].isnan()
    assert q[0, 0].isnan() and q[1].isnan().all()


def test_zero_states(use_tile):
    use_tile(LOOP["16"])
    case = Case(0, 3, 4, (16, 16))
    assert [tuple(t.shape) for t in _run(case, None)] == [(0, 3), (0,), (0, 3), (0, 3, 4)]


def test_non_contiguous_inputs(use_tile):
    use_tile(LAYERED["16x16"])
    case = Case(2, 3, 4, (16, 16), num_steps=1)
    want = sample_returns(case.packed.freeze(), *case.inputs()[:3], 1, backend="torch")
    case.observation = case.observation.t().contiguous().t()
    case.action = case.action.transpose(0, 1).contiguous().transpose(0, 1)
    case.noise = case.noise.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    with torch.no_grad():
        got = sample_returns(case.packed, *case.inputs()[:3], 1, backend="triton")
    assert relative_error(got, want.double()) < 1e-5


@pytest.mark.parametrize("layer_norm", [False, True])
def test_weights_of_a_live_view_are_never_stale(use_tile, layer_norm):
    use_tile(LOOP["16"])
    case = Case(1, 2, 3, (16, 16), layer_norm=layer_norm, num_steps=1)
    _run(case, "tf32x3")
    for parameter in case.network.parameters():
        parameter.data.add_(0.1)  # leaves the version counter as it was
    assert_matches(_run(case, "tf32x3"), case, "float32")


@torch.no_grad()
def _drawn_noise(shape, seed):
    """End points of a flow that stands still, which are the noise that the kernel drew."""
    case = Case(*shape[:2], shape[2], (16, 16), num_steps=2)
    torch.nn.init.zeros_(case.network[-1].weight)
    torch.nn.init.zeros_(case.network[-1].bias)
    reads = case.packed, case.observation, case.action, None, 2
    return sample_returns(*reads, seed=seed, num_samples=shape[2], backend="triton")


@pytest.mark.parametrize("seed", [(0, 0), (-5, 2**40 + 1)])
def test_noise_of_a_seed_is_that_of_the_reference_on_every_tile(use_tile, seed):
    seed, shape, found = torch.tensor(seed), (3, 5, 7), []
    for tile in TILES.values():
        use_tile(tile)
        found.append(_drawn_noise(shape, seed))
        assert torch.equal(found[-1], found[0])
    torch.testing.assert_close(found[0], philox_normal(seed, shape), rtol=2e-6, atol=2e-6)


def test_gumbel_noise_of_a_seed_is_that_of_the_reference():
    """Uniform values make the choice the largest Gumbel; the margin shows as its value."""
    seed, shape = torch.tensor([11, 5]), (64, 35)
    action = torch.arange(35.0).expand(64, 35).unsqueeze(-1).contiguous()
    scalars = torch.zeros(()), torch.ones(())
    z = torch.zeros(*shape, 1)
    chosen, *_ = _launch_select.select(z, action, seed, None, *scalars, 1.0, 0.5, False)
    assert torch.equal(chosen.flatten().long(), philox_gumbel(seed, shape).argmax(-1))
    # Values that cancel the noise of the reference leave a tie of all candidates.
    z = -0.5 * philox_gumbel(seed, shape).unsqueeze(-1)
    z[:, 20] += 1e-5
    chosen, *_ = _launch_select.select(z, action, seed, None, *scalars, 1.0, 0.5, False)
    assert (chosen == 20).all()


@pytest.mark.parametrize("tile", ["16x16", "loop 16"])
def test_selection_with_a_seed(use_tile, tile):
    use_tile(TILES[tile])
    seed, case = torch.tensor([3, 1]), Case(2, 3, 5, (16, 16))
    with torch.no_grad():
        got = evor_select(
            case.packed,
            case.observation,
            case.action,
            seed=seed,
            num_samples=5,
            **case.options,
            return_samples=True,
            backend="triton",
        )
    case.noise, case.gumbel = philox_normal(seed, (2, 3, 5)), philox_gumbel(seed, (2, 3))
    assert_matches(got, case, "float32")


if __name__ == "__main__":
    pytest.main([__file__, "-q"])

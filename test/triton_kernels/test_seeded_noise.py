# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Noise of a seed: the generator against its published answers, the laws, the public functions."""

from __future__ import annotations

import math

import pytest
import torch
from _kernel_cases import Case
from torchrl_evor.triton_kernels import (
    evor_select,
    ops,
    philox_gumbel,
    philox_normal,
    sample_returns,
)
from torchrl_evor.triton_kernels.reference import philox

SEED = torch.tensor([2026, 3])


def _distance(draws, distribution) -> float:
    """Kolmogorov-Smirnov statistic times sqrt(n): above 1.95 in one of 1,000 samples of the law."""
    ordered, n = draws.double().flatten().sort().values, draws.numel()
    at, rank = distribution(ordered), torch.arange(n, dtype=torch.float64)
    gap = torch.maximum((at - rank / n).abs(), (at - (rank + 1) / n).abs())
    return gap.max().item() * math.sqrt(n)


def _seeded(case, seed=SEED, num_samples=4, **changes):
    options = case.options | {"return_samples": True} | changes
    with torch.no_grad():
        return evor_select(
            case.packed,
            case.observation,
            case.action,
            seed=seed,
            num_samples=num_samples,
            **options,
        )


class TestGenerator:
    @pytest.mark.parametrize(
        "counter, key, words",
        [
            ("00000000" * 4, "00000000" * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
            ("ffffffff" * 4, "ffffffff" * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
            (
                "243f6a88 85a308d3 13198a2e 03707344",
                "a4093822 299f31d0",
                "d16cfe09 94fdcceb 5001e420 24126ea1",
            ),
        ],
        ids=["zeros", "ones", "pi"],
    )
    def test_known_answers_of_random123(self, counter, key, words):
        def unpack(text):
            text = text.replace(" ", "")
            return torch.tensor([int(text[i : i + 8], 16) for i in range(0, len(text), 8)])

        assert torch.equal(philox(unpack(counter), unpack(key)), unpack(words))

    def test_entry_by_hand(self):
        """The third normal of a call uses the words at the counter (2, 0, call, call >> 32)."""
        seed = torch.tensor([(5 << 32) + 7, (1 << 32) + 9])
        words = philox(torch.tensor([2, 0, 9, 1]), torch.tensor([7, 5]))
        u, v = (((word.item() >> 9) + 0.5) / 2**23 for word in words[:2])
        want = math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v)
        assert philox_normal(seed, (4,))[2].item() == pytest.approx(want, rel=1e-6)
        words = philox(torch.tensor([2, 1, 9, 1]), torch.tensor([7, 5]))
        want = -math.log(-math.log(((words[0].item() >> 9) + 0.5) / 2**23))
        assert philox_gumbel(seed, (4,))[2].item() == pytest.approx(want, rel=1e-6)

    def test_negative_seeds_are_read_as_unsigned(self):
        assert philox_normal(torch.tensor([-1, -1]), (8,)).isfinite().all()

    def test_too_many_entries(self):
        with pytest.raises(ValueError, match="up to 2\\*\\*32"):
            philox_normal(SEED, (2**17, 2**16))


class TestLaw:
    COUNT = 200_000

    def test_normal(self):
        draws = philox_normal(SEED, (self.COUNT,)).double()
        error = 1 / math.sqrt(self.COUNT)
        assert abs(draws.mean()) < 4 * error
        assert abs(draws.var() - 1) < 4 * math.sqrt(2) * error
        assert abs((draws**4).mean() - 3) < 4 * math.sqrt(96) * error
        levels = torch.tensor([0.001, 0.05, 0.5, 0.95, 0.999], dtype=torch.float64)
        below = (draws[:, None] < torch.special.ndtri(levels)).double().mean(0)
        assert ((below - levels).abs() < 4 * (levels * (1 - levels)).sqrt() * error).all()
        assert _distance(draws, torch.special.ndtr) < 1.95

    def test_gumbel(self):
        draws = philox_gumbel(SEED, (self.COUNT,)).double()
        error = 1 / math.sqrt(self.COUNT)
        deviation = math.pi / math.sqrt(6)
        assert abs(draws.mean() - 0.5772156649) < 4 * deviation * error
        assert abs(draws.var() - deviation**2) < 4 * math.sqrt(4.4) * deviation**2 * error
        assert _distance(draws, lambda x: (-(-x).exp()).exp()) < 1.95

    def test_gumbel_draws_follow_the_softmax(self):
        q = torch.tensor([0.0, 1.0, 2.0])
        index = (q / 1.5 + philox_gumbel(SEED, (20_000, 3))).argmax(-1)
        share = torch.bincount(index, minlength=3) / 20_000
        torch.testing.assert_close(share, (q / 1.5).softmax(-1), atol=0.012, rtol=0)

    @pytest.mark.parametrize("lag", [1, 2, 64])
    def test_neighbours_are_independent(self, lag):
        draws = philox_normal(SEED, (self.COUNT,)).double()
        correlation = (draws[lag:] * draws[:-lag]).mean()
        assert abs(correlation) < 4 / math.sqrt(self.COUNT)

    @pytest.mark.parametrize("other", [(2027, 3), (2026, 4), (2026, 3 + 2**32), (3, 2026)])
    def test_seeds_and_calls_are_independent(self, other):
        first = philox_normal(SEED, (self.COUNT,)).double()
        second = philox_normal(torch.tensor(other), (self.COUNT,)).double()
        assert abs((first * second).mean()) < 4 / math.sqrt(self.COUNT)

    def test_normal_and_gumbel_of_one_seed_are_independent(self):
        normal = philox_normal(SEED, (self.COUNT,)).double()
        gumbel = philox_gumbel(SEED, (self.COUNT,)).double() - 0.5772156649
        bound = 4 * math.pi / math.sqrt(6) / math.sqrt(self.COUNT)
        assert (
            abs((normal * gumbel).mean()) < bound and abs((normal**2 * gumbel).mean()) < 2 * bound
        )

    def test_shape_does_not_change_the_numbers(self):
        flat = philox_normal(SEED, (24,))
        assert torch.equal(philox_normal(SEED, (2, 3, 4)).flatten(), flat)
        assert torch.equal(philox_normal(SEED, (10,)), flat[:10])


class TestPublicFunctions:
    def test_is_explicit_noise_of_the_same_seed(self):
        case = Case(2, 3, 4, (16, 16))
        got = _seeded(case)
        case.noise, case.gumbel = philox_normal(SEED, (2, 3, 4)), philox_gumbel(SEED, (2, 3))
        with torch.no_grad():
            want = evor_select(case.packed, *case.inputs(), **case.options, return_samples=True)
            z = sample_returns(
                case.packed, case.observation, case.action, None, 3, seed=SEED, num_samples=4
            )
            noise = sample_returns(case.packed, *case.inputs()[:3], 3)
        for tensor, expected in zip(got, want):
            assert torch.equal(tensor, expected)
        assert torch.equal(z, noise)

    def test_double_precision_has_the_same_noise(self):
        case = Case(2, 3, 4, (16, 16))
        single = _seeded(case)
        case.network.double()
        case.observation, case.action = case.observation.double(), case.action.double()
        double = _seeded(case)
        assert double[3].dtype == torch.float64
        torch.testing.assert_close(single[3].double(), double[3], rtol=1e-4, atol=1e-5)

    def test_repeats_until_the_seed_changes(self):
        case, seed = Case(2, 3, 4, (16, 16)), SEED.clone()
        first = _seeded(case, seed)[3]
        assert torch.equal(_seeded(case, seed)[3], first)
        seed[1] += 1
        second = _seeded(case, seed)[3]
        assert (second != first).all()
        seed[0] += 1
        assert (_seeded(case, seed)[3] != second).all()

    def test_any_batch_shape(self):
        case = Case(6, 3, 4, (16, 16))
        want = _seeded(case)
        case.observation = case.observation.reshape(2, 3, 5)
        case.action = case.action.reshape(2, 3, 3, 3)
        for tensor, expected in zip(_seeded(case), want):
            assert torch.equal(tensor, expected.reshape(2, 3, *expected.shape[1:]))

    def test_non_contiguous_seed_and_zero_states(self):
        case = Case(2, 3, 4, (16, 16))
        seed = torch.stack([SEED, SEED + 9], 1)[:, 0]
        assert not seed.is_contiguous()
        assert torch.equal(_seeded(case, seed)[3], _seeded(case)[3])
        empty = _seeded(Case(0, 3, 4, (16, 16)))
        assert [tuple(tensor.shape) for tensor in empty] == [(0, 3), (0,), (0, 3), (0, 3, 4)]

    def test_given_nodes_with_a_drawn_choice(self):
        case = Case(2, 3, 4, (16, 16), shared=True)
        with torch.no_grad():
            reads = case.packed, *case.inputs()[:3]
            got = evor_select(*reads, seed=SEED, **case.options)
            want = evor_select(*reads, philox_gumbel(SEED, (2, 3)), **case.options)
        for tensor, expected in zip(got, want):
            assert torch.equal(tensor, expected)

    def test_opcheck(self):
        case = Case(2, 3, 4, (16, 16))
        tensors = [tensor.detach() for tensor in case.packed.tensors()]
        sampler = (tensors, "gelu_tanh", 1e-6, 4, "midpoint")
        inputs = (case.observation, case.action, None, SEED, 4)
        torch.library.opcheck(ops._sample_op, (*inputs, *sampler, "torch", "", 0.0))
        scalars = (torch.zeros(()), torch.ones(()))
        options = (0.7, 0.5, True, "torch", "", 0.0)
        torch.library.opcheck(ops._select_op, (*inputs, None, None, *scalars, *sampler, *options))

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_compiles_without_graph_breaks_and_sees_the_new_seed(self, backend):
        case, seed = Case(2, 3, 4, (16, 16)), SEED.clone()
        compiled = torch.compile(evor_select, fullgraph=True, backend=backend)
        for _ in range(2):
            with torch.no_grad():
                got = compiled(
                    case.packed,
                    case.observation,
                    case.action,
                    seed=seed,
                    num_samples=4,
                    **case.options,
                    return_samples=True,
                )
            torch.testing.assert_close(got, _seeded(case, seed))
            seed[1] += 1


class TestBadInput:
    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"seed": torch.tensor([1, 2], dtype=torch.int32)}, "seed is torch.int32"),
            ({"seed": torch.tensor([1.0, 2.0])}, "seed is torch.float32"),
            ({"seed": torch.tensor(1)}, "seed is torch.int64 of shape \\(\\)"),
            ({"seed": torch.tensor([1, 2, 3])}, "of shape \\(3,\\), expected torch.int64"),
            ({"seed": SEED.to("meta")}, "seed is on meta"),
            ({"seed": None}, "noise is needed, or a seed"),
            ({"num_samples": None}, "num_samples must be an integer of at least 1"),
            ({"num_samples": 0}, "num_samples must be an integer of at least 1"),
            ({"num_samples": 2.5}, "num_samples must be an integer .*, got 2.5"),
            ({"noise": torch.randn(4)}, "num_samples=4 and noise \\(4,\\) are both given"),
            ({"log_weights": torch.zeros(5)}, "log_weights has shape"),
        ],
    )
    def test_arguments(self, changes, message):
        with pytest.raises(ValueError, match=message):
            _seeded(Case(2, 3, 4, (16, 16)), **changes)

    @pytest.mark.parametrize("tau_q", [0.0, 0.5])
    def test_nothing_left_to_draw(self, tau_q):
        case = Case(2, 3, 4, (16, 16), tau_q=tau_q)
        with torch.no_grad(), pytest.raises(ValueError, match="nothing to draw from seed"):
            evor_select(case.packed, *case.inputs(), seed=SEED, **case.options)
        with torch.no_grad(), pytest.raises(ValueError, match="seed and noise are given"):
            sample_returns(case.packed, *case.inputs()[:3], 3, seed=SEED)


if __name__ == "__main__":
    pytest.main([__file__, "-q"])

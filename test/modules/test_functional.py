# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import math

import pytest
import torch
from torchrl_evor.triton_kernels.reference import choose_candidate, q_star

from torchrl_evor.modules.functional import (
    check_choice,
    check_positive,
    check_solver,
    check_temperature,
    gauss_hermite_normal,
    integrate,
    interpolate,
    log_mean_exp,
    soft_choice,
    standard_gumbel,
    stratified_normal,
)

INF = float("inf")


def column(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype).unsqueeze(-1)


class TestPath:
    def test_interpolate(self):
        noise, data = torch.tensor([[2.0, 0.0]]), torch.tensor([[6.0, -4.0]])
        point = interpolate(noise, data, torch.tensor([[0.25]]))
        torch.testing.assert_close(point, torch.tensor([[3.0, -1.0]]))

    def test_ends(self):
        noise, data = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
        assert (interpolate(noise, data, torch.zeros(2, 3, 1)) == noise).all()
        assert (interpolate(noise, data, torch.ones(2, 3, 1)) == data).all()

    def test_euler_uses_left_end_points(self):
        seen = []
        z = integrate(lambda z, t: seen.append(t) or 2 * t, torch.zeros(2, 1), 4)
        assert [t[0].item() for t in seen] == [0.0, 0.25, 0.5, 0.75]
        assert (z == 0.75).all()  # 2 * (0 + 1/4 + 1/2 + 3/4) / 4

    def test_euler_compounds(self):
        z = integrate(lambda z, t: z, torch.full((1,), 4.0), 2)
        assert z.item() == 9.0  # 4 * (1 + 1/2)^2

    def test_midpoint_by_hand(self):
        seen = []
        z = integrate(lambda z, t: seen.append(t) or 2 * t, torch.zeros(2, 1), 4, "midpoint")
        assert [t[0].item() for t in seen] == [0.0, 0.25, 0.5, 0.75]
        assert (z == 1.0).all()  # 2 * (1/4 + 3/4) / 2, exact
        z = integrate(lambda z, t: z, torch.full((1,), 4.0), 2, "midpoint")
        assert z.item() == 10.0  # 4 * (1 + 1 + 1/2)

    def test_midpoint_is_of_second_order(self):
        errors = [
            abs(integrate(lambda z, t: z, torch.ones(1).double(), 2 * steps, "midpoint") - math.e)
            for steps in (10, 20)
        ]
        assert (errors[0] / errors[1]).item() == pytest.approx(4, rel=0.1)

    def test_solver_is_checked(self):
        assert check_solver("euler", 3) == "euler"
        with pytest.raises(ValueError, match="solver must be one of .*'midpoint'.*, got 'heun'"):
            check_solver("heun", 4)
        with pytest.raises(ValueError, match="num_steps must be even .*midpoint.*, got 3"):
            check_solver("midpoint", 3)
        with pytest.raises(ValueError, match="num_steps must be even"):
            integrate(lambda z, t: z, torch.ones(1), 5, "midpoint")

    @pytest.mark.parametrize("batch", [(), (0,), (2, 3)])
    def test_euler_shapes(self, batch):
        def velocity(z, time):
            assert time.shape == (*batch, 1)
            return z

        assert integrate(velocity, torch.zeros(*batch, 5), 3).shape == (*batch, 5)


class TestLogMeanExp:
    def test_by_hand(self):
        # tau * log((1 + 3) / 2) with exp(v / tau) = 1 and 3
        values = torch.tensor([0.0, 5 * math.log(3)], dtype=torch.float64)
        assert log_mean_exp(values, 5.0).item() == pytest.approx(5 * math.log(2), abs=1e-12)

    def test_weights_by_hand(self):
        values = torch.tensor([0.0, math.log(3)], dtype=torch.float64)
        log_weights = torch.tensor([0.75, 0.25], dtype=torch.float64).log()
        expected = {0.0: math.log(3), 1.0: math.log(1.5), INF: 0.25 * math.log(3)}
        for tau, value in expected.items():
            result = log_mean_exp(values, tau, log_weights=log_weights)
            assert result.item() == pytest.approx(value, abs=1e-12)

    @pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-9)])
    def test_limits_are_continuous(self, dtype, tolerance):
        values = 10 * torch.randn(2, 3, 16, dtype=dtype)
        for tau, limit in ((1e-10, values.amax(-1)), (1e12, values.mean(-1))):
            torch.testing.assert_close(
                log_mean_exp(values, tau), limit, atol=tolerance, rtol=tolerance
            )
        assert (log_mean_exp(values, 0.0) == values.amax(-1)).all()
        torch.testing.assert_close(log_mean_exp(values, INF), values.mean(-1))

    @pytest.mark.parametrize("tau", [1e-3, 0.1, 1.0, 100.0])
    def test_agrees_with_logsumexp(self, tau):
        values = torch.randn(7, 16, dtype=torch.float64)
        expected = tau * (torch.logsumexp(values / tau, -1) - math.log(16))
        torch.testing.assert_close(log_mean_exp(values, tau), expected, atol=1e-11, rtol=1e-11)

    def test_decreases_in_tau(self):
        values = torch.randn(9, 16, dtype=torch.float64)
        taus = (0.0, 0.01, 0.1, 1.0, 10.0, 1e3, INF)
        results = torch.stack([log_mean_exp(values, tau) for tau in taus])
        assert (results.diff(dim=0) < 0).all()

    def test_shift_and_scale(self):
        values = torch.randn(5, 8, dtype=torch.float64)
        torch.testing.assert_close(
            log_mean_exp(3 * values - 200, 3.0), 3 * log_mean_exp(values, 1.0) - 200
        )

    def test_large_values(self):
        values = torch.tensor([1e6, 1e6 - 1, -1e6])
        assert log_mean_exp(values, 1e-3).item() == pytest.approx(1e6, abs=0.1)

    @pytest.mark.parametrize("num_nodes", [16, 4096, 65536])
    def test_many_nodes_far_below_the_highest(self, num_nodes):
        values = 5 * stratified_normal(num_nodes, dtype=torch.float64)
        exact = torch.logsumexp(values, -1) - math.log(num_nodes)
        assert log_mean_exp(values.float(), 1.0).item() == pytest.approx(exact.item(), abs=1e-5)

    def test_dim_and_shapes(self):
        values = torch.randn(2, 5, 3)
        for tau in (0.0, 1.0, INF):
            torch.testing.assert_close(
                log_mean_exp(values, tau, dim=1), log_mean_exp(values.mT, tau)
            )
            assert log_mean_exp(torch.zeros(0, 4), tau).shape == (0,)

    @pytest.mark.parametrize("tau", [0.0, 0.3, 7.0, 1e6, INF])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_agrees_with_the_kernels_reference(self, tau, weighted):
        """Which is written apart from it; a node of no weight is the highest of its row."""
        values = torch.randn(5, 4, dtype=torch.float64).sort(-1).values
        log_weights = torch.tensor([0.2, 0.3, 0.5, 0.0], dtype=torch.float64).log()
        log_weights = log_weights if weighted else None
        got = log_mean_exp(values, tau, log_weights=log_weights)
        torch.testing.assert_close(got, q_star(values, tau, log_weights), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("tau", [-1e-6, -INF, float("nan")])
    def test_bad_temperature(self, tau):
        with pytest.raises(ValueError, match="tau must be a temperature"):
            log_mean_exp(torch.zeros(2), tau)


class TestSoftChoice:
    @pytest.mark.parametrize("tau", [0.0, 2.0])
    def test_a_nan_never_wins(self, tau):
        nan = float("nan")
        values = torch.tensor([[nan, 1.0, 3.0, 3.0], [nan, nan, -INF, nan], [nan] * 4])
        gumbel = torch.zeros(3, 4)
        index = soft_choice(values, tau, gumbel)
        assert index[0] == 2
        assert torch.equal(index, choose_candidate(values, gumbel, tau))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_equals_are_drawn_alike_in_16_bits(self, dtype):
        """Beside returns of -200 the noise would be rounded to ties."""
        torch.manual_seed(0)
        index = soft_choice(torch.full((40_000, 4), -200.0, dtype=dtype), 1.0)
        share = index.bincount(minlength=4) / len(index)
        torch.testing.assert_close(share, torch.full((4,), 0.25), rtol=0, atol=0.01)

    def test_cold_in_16_bits(self):
        """-100 / 1e-3 is beyond float16."""
        values = torch.tensor([-300.0, -300.0, -100.0, -300.0], dtype=torch.float16)
        assert soft_choice(values, 1e-3) == 2

    def test_noise_of_another_shape(self):
        with pytest.raises(ValueError, match=r"gumbel must .* \(5, 4\), got \(5, 1\)"):
            soft_choice(torch.zeros(5, 4), 1.0, torch.zeros(5, 1))


class TestGumbel:
    def test_a_seed_means_the_same_noise_for_any_strides(self):
        shape, drawn = (3, 5), []
        for like in (torch.zeros(shape), torch.zeros(5, 3).mT, torch.zeros(3, 5, 2)[..., 0]):
            torch.manual_seed(0)
            drawn.append(standard_gumbel(like))
        assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


class TestStratifiedNormal:
    def test_by_hand(self):
        # Phi(0.6745) = 3/4; Phi(0.3186) = 5/8; Phi(1.1503) = 7/8
        assert stratified_normal(1).tolist() == [0.0]
        torch.testing.assert_close(
            stratified_normal(4),
            torch.tensor([-1.1503, -0.3186, 0.3186, 1.1503]),
            atol=1e-4,
            rtol=0,
        )

    def test_increasing_and_symmetric(self):
        nodes = stratified_normal(10001)
        assert nodes.isfinite().all() and (nodes.diff() > 0).all()
        torch.testing.assert_close(nodes, -nodes.flip(0))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_dtype(self, dtype):
        assert stratified_normal(3, dtype=dtype).dtype == dtype

    def test_moments(self):
        nodes = stratified_normal(1000, dtype=torch.float64)
        assert nodes.mean().item() == pytest.approx(0, abs=1e-12)
        assert nodes.square().mean().item() == pytest.approx(1, abs=5e-3)


class TestGaussHermite:
    def test_three_nodes_by_hand(self):
        """The roots of x^3 - 3x and their weights 1/6, 2/3, 1/6."""
        nodes, log_weights = gauss_hermite_normal(3, dtype=torch.float64)
        root = math.sqrt(3)
        torch.testing.assert_close(nodes, torch.tensor([-root, 0, root], dtype=torch.float64))
        expected = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)
        torch.testing.assert_close(log_weights.exp(), expected)

    @pytest.mark.parametrize("num_nodes", [1, 2, 8, 64, 256])
    def test_moments_are_exact(self, num_nodes):
        """E x^2k = 1 * 3 * ... * (2k - 1) below degree 2N, and odd moments vanish."""
        nodes, log_weights = gauss_hermite_normal(num_nodes, dtype=torch.float64)
        for k in range(min(num_nodes, 10)):
            moment = (log_weights.exp() * nodes ** (2 * k)).sum().item()
            assert moment == pytest.approx(math.prod(range(1, 2 * k, 2)), rel=1e-10)
        assert torch.equal(nodes, -nodes.flip(0)) and (nodes.diff() > 0).all()

    def test_weights_keep_their_digits_in_the_tail(self):
        """log E exp(s x) = s^2 / 2 rests on the outermost nodes, of weights of 1e-20 and less."""
        nodes, log_weights = gauss_hermite_normal(64, dtype=torch.float64)
        for s in (1.0, 4.0, 8.0):
            value = torch.logsumexp(s * nodes + log_weights, 0).item()
            assert value == pytest.approx(s * s / 2, rel=1e-9)

    def test_gradients_in_the_tail(self):
        """Where the excess cancels to -1, its branch is not taken, nor are its gradients."""
        values = torch.tensor([0.0, 100.0], requires_grad=True)
        log_weights = torch.tensor([0.0, -60.0])
        value = log_mean_exp(values, 1.0, log_weights=log_weights)
        (gradient,) = torch.autograd.grad(value, values)
        assert value.item() == pytest.approx(40.0)
        torch.testing.assert_close(gradient, torch.tensor([0.0, 1.0]))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_over_many_nodes(self, dtype):
        values = (torch.arange(1024.0) / 1024).to(dtype)
        value = log_mean_exp(values, 0.01)
        assert value.dtype == dtype
        expected = log_mean_exp(values.double(), 0.01)
        torch.testing.assert_close(value.double(), expected, atol=0.01, rtol=0)

    def test_more_nodes_than_float64_holds(self):
        with pytest.raises(ValueError, match="num_nodes must be at most some 700, got 1024"):
            gauss_hermite_normal(1024)

    def test_what_is_kept_follows_dtype_and_inference_mode(self):
        with torch.inference_mode():
            nodes, _ = gauss_hermite_normal(5, dtype=torch.float16)
        assert nodes.dtype == torch.float16 and not nodes.is_inference()
        assert gauss_hermite_normal(5)[0].dtype == torch.float32
        assert gauss_hermite_normal(5)[0] is gauss_hermite_normal(5)[0]


class TestChecks:
    @pytest.mark.parametrize("value", [0, -1, 1.0, True, "3"])
    def test_positive(self, value):
        with pytest.raises(ValueError, match="num_steps must be an integer of at least 1, got"):
            check_positive("num_steps", value)
        assert check_positive("num_steps", 3) == 3

    def test_temperature(self):
        assert [check_temperature("tau_r", value) for value in (0, 2.5, INF)] == [0, 2.5, INF]
        with pytest.raises(ValueError, match=r"tau_r must be a temperature in \[0, inf\], got -1"):
            check_temperature("tau_r", -1)
        with pytest.raises(ValueError, match=r"tau_r must be .*got '.inf'"):
            check_temperature("tau_r", ".inf")  # YAML's infinity, where a command line left it text

    def test_choice(self):
        assert check_choice("nodes", "random", ("random", "stratified")) == "random"
        with pytest.raises(ValueError, match="nodes must be one of .*'random'.*, got 'sobol'"):
            check_choice("nodes", "sobol", ("random", "stratified"))


if __name__ == "__main__":
    pytest.main([__file__])

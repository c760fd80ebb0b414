# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import pytest
import torch
from _known_laws import gaussian_velocity

from torchrl_evor.modules.functional import integrate
from torchrl_evor.objectives.td_targets import TD_TARGETS, bellman_target, confine_velocity

INF = float("inf")


def column(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype).unsqueeze(-1)


HAND = {
    "noise": column(1.0), "time": column(0.5), "reward": column(2.0), "discount": column(0.5),
    "next_return": column(4.0), "next_velocity": lambda z, t: z + 2 * t,
}  # fmt: skip


class TestTargets:
    @pytest.mark.parametrize(
        "name,point,target",
        [
            ("sample", 2.5, 3.0),  # backup 4: half-way from 1, velocity 4 - 1
            ("velocity", 2.5, 3.75),  # 2 + 0.5 * (2.5 + 1)
            ("coupled", 2.5, 3.25),  # next point 2.5: 2 + 0.5 * 3.5 - 0.5 * 1
            ("bellman", 2.5, 1 + 16 / 9),  # c 3/4, t' 1/3, next point 2, velocity 2 + 2/3
        ],
    )
    def test_by_hand(self, name, point, target):
        result = TD_TARGETS[name](**HAND)
        torch.testing.assert_close(result, (column(point), column(target)))

    @pytest.mark.parametrize("name", ["bellman", "sample", "coupled"])
    def test_terminal(self, name):
        values = dict(HAND, discount=column(0.0), next_velocity=lambda z, t: 1e3 * z)
        torch.testing.assert_close(TD_TARGETS[name](**values), (column(1.5), column(1.0)))

    def test_velocity_forgets_the_noise_at_a_terminal(self):
        values = dict(HAND, discount=column(0.0))
        assert TD_TARGETS["velocity"](**values)[1].item() == 2.0  # not reward - noise

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_bellman_at_the_corner(self, dtype):
        """A terminal at flow time 1 is the only place where its divisor vanishes."""
        one, zero = torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype)
        point, target = bellman_target(3 * one, one, 2 * one, zero, 7 * one, lambda z, t: z)
        assert point.item() == 2.0 and target.item() == -1.0

    def test_bellman_without_discount(self):
        noise, time, reward, sample = torch.randn(4, 50, 1, dtype=torch.float64)
        time = time.sigmoid()
        point, target = bellman_target(
            noise, time, reward, torch.ones_like(time), sample, lambda z, t: z.sin() + t
        )
        torch.testing.assert_close(target, reward + (point - time * reward).sin() + time)

    @pytest.mark.parametrize("name", TD_TARGETS)
    @pytest.mark.parametrize("batch", [(), (0,), (2, 3)])
    def test_shapes(self, name, batch):
        args = torch.rand(5, *batch, 1)
        point, target = TD_TARGETS[name](*args, lambda z, t: z * t)
        assert point.shape == target.shape == (*batch, 1)


class TestConfineVelocity:
    def test_hand_computed(self):
        """Half-way from 0.5, ends at 5, at -4 and at 0.55 become 1, -1 and 0.55."""
        half = column(0.5, 0.5, 0.5)
        confined = confine_velocity(column(9.0, -9.0, 0.1), half, half, -1.0, 1.0)
        torch.testing.assert_close(confined, column(1.0, -3.0, 0.1))

    def test_exact_field_is_left_alone(self):
        """Of two prizes, -1 and 1: the posterior mean is a hyperbolic tangent."""
        point = 3 * torch.randn(1000, 1, dtype=torch.float64)
        time = 0.99 * torch.rand(1000, 1, dtype=torch.float64)
        field = ((time * point / (1 - time).square()).tanh() - point) / (1 - time)
        torch.testing.assert_close(confine_velocity(field, point, time, -1.0, 1.0), field)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_any_field_ends_between_the_bounds(self, dtype):
        def field(z, t):
            return confine_velocity(50 * z, z, t, -1.0, 2.0)

        end = integrate(field, torch.linspace(-5, 5, 101, dtype=dtype).unsqueeze(-1), 10)
        assert end.min().item() == pytest.approx(-1) and end.max().item() == pytest.approx(2)

    def test_bounds_of_rows(self):
        low, high = column(0.0, -1.0), column(0.5, 7.0)
        confined = confine_velocity(column(3.0, 3.0), column(0.0, 0.0), column(0.0, 0.0), low, high)
        torch.testing.assert_close(confined, column(0.5, 3.0))

    def test_limits(self):
        point, velocity = column(-2.0, 0.0, 2.0), column(5.0, 6.0, 7.0)
        time = column(0.0, 0.5, 1.0)
        assert torch.equal(confine_velocity(velocity, point, time, -INF, INF), velocity)
        ends = column(0.0, 1.0, 0.5)  # at its end, on a bound and between them
        assert confine_velocity(velocity, ends, torch.ones_like(ends), 0.0, 1.0).isfinite().all()


class TestLaws:
    """The target velocity against the closed-form field of ``reward + discount * Z'``."""

    mean, std, reward = 3.0, 2.0, -1.0

    def errors(self, name, discount, size=200_000):
        """Target minus the exact field, and the point at which it was computed."""
        noise, draw = torch.randn(2, size, 1, dtype=torch.float64)
        time = torch.rand(size, 1, dtype=torch.float64)
        mean, std = torch.full_like(time, self.mean), torch.full_like(time, self.std)
        discounts = torch.full_like(time, discount)
        point, target = TD_TARGETS[name](
            noise,
            time,
            torch.full_like(time, self.reward),
            discounts,
            mean + std * draw,
            lambda z, t: gaussian_velocity(z, t, mean, std),
        )
        exact = gaussian_velocity(point, time, self.reward + discount * mean, discounts * std)
        return target - exact, point

    def bias(self, name, discount):
        """Largest z-score of the mean error against a constant, a slope and a curve."""
        error, point = self.errors(name, discount)
        moments = torch.cat([error, error * point.tanh(), error * point.cos()], -1)
        return (moments.mean(0) / moments.std(0) * len(moments) ** 0.5).abs().max().item()

    @pytest.mark.parametrize("discount", [0.0, 1e-6, 0.3, 0.9, 0.99, 1.0])
    def test_bellman_is_exact_at_every_point(self, discount):
        assert self.errors("bellman", discount, size=2000)[0].abs().max() < 1e-9

    @pytest.mark.parametrize("discount", [0.3, 0.99])
    def test_sample_is_unbiased(self, discount):
        assert self.bias("sample", discount) < 4
        assert self.errors("sample", discount)[0].std() > 0.5

    def test_velocity_and_coupled_are_biased(self):
        assert self.bias("velocity", 0.3) > 20
        assert self.bias("coupled", 0.3) > 20

    def test_coupled_is_exact_without_discount(self):
        assert self.errors("coupled", 1.0)[0].abs().max() < 1e-9


if __name__ == "__main__":
    pytest.main([__file__, "-v"])

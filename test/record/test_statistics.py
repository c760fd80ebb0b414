# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import numpy as np
import pytest

from torchrl_evor.record import (
    iqm,
    mean,
    mean_difference,
    median,
    optimality_gap,
    probability_of_improvement,
    stratified_bootstrap,
    wilson_interval,
)

# runs x tasks, worked by hand below
SCORES = np.array(
    [
        [0.0, 0.2, 1.0],
        [0.2, 0.4, 1.0],
        [0.4, 0.6, 1.0],
        [0.6, 0.8, 0.2],
    ]
)


class TestAggregates:
    def test_mean(self):
        # columns sum to 1.2, 2.0, 3.2
        assert mean(SCORES) == pytest.approx(6.4 / 12)

    def test_median(self):
        # means of the tasks: 0.3, 0.5, 0.8
        assert median(SCORES) == pytest.approx(0.5)

    def test_median_of_an_even_number_of_tasks(self):
        assert median(SCORES[:, :2]) == pytest.approx(0.4)

    def test_iqm(self):
        # sorted: 0 .2 .2 | .2 .4 .4 .6 .6 .8 | 1 1 1
        assert iqm(SCORES) == pytest.approx(3.0 / 6)

    @pytest.mark.parametrize(
        "scores, expected",
        [
            ([[3.0]], 3.0),  # one score: nothing to drop
            ([[1.0, 2.0, 6.0]], 3.0),  # 3 // 4 = 0 dropped
            ([[1.0, 2.0, 3.0, 4.0, 50.0]], 3.0),  # one dropped at either end
            ([[9.0], [0.0], [2.0], [3.0], [4.0], [5.0], [1.0]], 3.0),  # 7 // 4 = 1: 1 2 3 4 5
        ],
    )
    def test_iqm_of_sizes_that_four_does_not_divide(self, scores, expected):
        assert iqm(np.array(scores)) == pytest.approx(expected)

    def test_iqm_ignores_outliers(self):
        wild = SCORES.copy()
        wild[0, 0], wild[0, 2] = -1e9, 1e9
        assert iqm(wild) == iqm(SCORES)

    def test_optimality_gap(self):
        assert optimality_gap(SCORES) == pytest.approx(1 - 6.4 / 12)
        # above 0.5 there is no gap: 0.5 .3 .1 0 | .3 .1 0 0 | 0 0 0 .3
        assert optimality_gap(SCORES, target=0.5) == pytest.approx(1.6 / 12)

    def test_probability_of_improvement(self):
        x = np.array([[1.0, 0.0], [3.0, 0.0]])
        y = np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        # task 1: 1 beats 0, ties 1 -> 1.5; 3 beats all -> 3; 4.5 of 6.  task 2: 4 ties -> 2 of 6
        assert probability_of_improvement(x, y) == pytest.approx((4.5 / 6 + 2 / 6) / 2)
        assert probability_of_improvement(y, x) == pytest.approx(
            1 - probability_of_improvement(x, y)
        )

    def test_mean_difference(self):
        assert mean_difference(SCORES, SCORES[:1]) == pytest.approx(6.4 / 12 - 0.4)

    @pytest.mark.parametrize("statistic", [mean, median, iqm, optimality_gap])
    @pytest.mark.parametrize(
        "scores, match",
        [
            (np.zeros(3), r"must have the shape \[runs, tasks\], got \[3\]"),
            (np.zeros((0, 3)), r"must not be empty, got the shape \[0, 3\]"),
            (np.zeros((3, 0)), "must not be empty"),
            (np.array([[0.0, 1.0], [0.0, np.nan]]), "finite, got nan for run 1 on task 1"),
            (np.array([[np.inf]]), "finite, got inf"),
        ],
    )
    def test_bad_scores(self, statistic, scores, match):
        with pytest.raises(ValueError, match=f"scores.*{match}"):
            statistic(scores)

    @pytest.mark.parametrize("statistic", [mean_difference, probability_of_improvement])
    def test_bad_pairs(self, statistic):
        with pytest.raises(ValueError, match="must have the same tasks, got 3 and 2"):
            statistic(SCORES, SCORES[:, :2])
        with pytest.raises(ValueError, match="baseline must be finite"):
            statistic(SCORES, SCORES * np.nan)


class TestStratifiedBootstrap:
    @staticmethod
    def rng(seed=0):
        return np.random.default_rng(seed)

    def test_tasks_are_never_mixed(self):
        # Every column is constant, so stratified resampling has nothing to vary.
        scores = np.tile([0.1, 0.5, 0.9], (4, 1))
        assert stratified_bootstrap(scores, mean, generator=self.rng()) == (0.5, 0.5)

    def test_known_law_of_two_runs(self):
        # Two runs 0 and 1: resampled means are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.
        scores = np.array([[0.0], [1.0]])
        interval = stratified_bootstrap(scores, mean, confidence=0.4, generator=self.rng())
        assert interval == (0.5, 0.5)
        interval = stratified_bootstrap(scores, mean, confidence=0.6, generator=self.rng())
        assert interval == (0.0, 1.0)

    def test_width_of_the_mean(self):
        # The resampled mean has the variance sum_t var_t / (runs * tasks^2), var_t with divisor n.
        scores = self.rng(1).normal(size=(50, 3))
        std = np.sqrt(scores.var(axis=0).sum() / (50 * 9))
        interval = stratified_bootstrap(scores, mean, num_resamples=8000, generator=self.rng())
        assert interval.high - interval.low == pytest.approx(2 * 1.96 * std, rel=0.05)
        assert interval.low < scores.mean() < interval.high

    def test_repeatable(self):
        first = stratified_bootstrap(SCORES, iqm, generator=self.rng(3))
        assert first == stratified_bootstrap(SCORES, iqm, generator=self.rng(3))
        assert first != stratified_bootstrap(SCORES, iqm, num_resamples=50, generator=self.rng(4))

    def test_several_methods(self):
        better, worse = SCORES + 2, SCORES
        interval = stratified_bootstrap(
            (better, worse), probability_of_improvement, generator=self.rng()
        )
        assert interval == (1.0, 1.0)

    def test_different_numbers_of_runs(self):
        low, high = stratified_bootstrap(
            [SCORES, SCORES[:3]], mean_difference, generator=self.rng()
        )
        assert low < mean_difference(SCORES, SCORES[:3]) < high

    def test_pairing_removes_what_the_runs_share(self):
        # Methods that differ by a constant on every run: paired, there is no uncertainty left.
        scores = SCORES + 0.25
        paired = stratified_bootstrap(
            (scores, SCORES), mean_difference, generator=self.rng(), paired=True
        )
        assert paired == pytest.approx((0.25, 0.25))
        low, high = stratified_bootstrap((scores, SCORES), mean_difference, generator=self.rng())
        assert low < 0.1 and high > 0.4

    def test_coverage(self):
        # Resampling n = 10 runs shows 9/10 of the variance: a nominal 95 % interval of the mean
        # covers about 2 Phi(1.96 sqrt(0.9)) - 1 = 93.7 %. 400 trials: standard error 1.2 %.
        rng = self.rng(5)
        truth = np.array([0.0, 1.0, -2.0])
        hits = 0
        for _ in range(400):
            scores = truth + rng.normal(size=(10, 3)) * np.array([0.1, 1.0, 0.5])
            low, high = stratified_bootstrap(scores, mean, num_resamples=300, generator=rng)
            hits += low <= truth.mean() <= high
        assert 0.90 <= hits / 400 <= 0.97

    @pytest.mark.slow
    def test_coverage_of_the_iqm(self):
        # The population's IQM by 100,000 runs; scores are skewed, as success rates are.
        rng = self.rng(6)

        def draw(runs):
            return rng.beta([8.0, 2.0, 1.0], [1.0, 2.0, 4.0], size=(runs, 3))

        truth = iqm(draw(100_000))
        hits = 0
        for _ in range(400):
            low, high = stratified_bootstrap(draw(10), iqm, num_resamples=500, generator=rng)
            hits += low <= truth <= high
        assert 0.88 <= hits / 400 <= 0.98

    @pytest.mark.parametrize(
        "scores, kwargs, match",
        [
            (SCORES[:1], {}, "at least 2 runs per task for an interval, got 1"),
            ((SCORES, SCORES[:1]), {}, "at least 2 runs per task for an interval, got 1"),
            (np.zeros((0, 2)), {}, "must not be empty"),
            ((), {}, "must not be empty"),
            (SCORES * np.nan, {}, "must be finite"),
            ((SCORES, SCORES[:, :2]), {}, "same tasks in all matrices"),
            ((SCORES, SCORES[:3]), {"paired": True}, r"paired=True .* got \[4, 3\]"),
            (SCORES, {"num_resamples": 0}, "num_resamples must be at least 1, got 0"),
            (SCORES, {"confidence": 95}, "confidence must lie strictly between 0 and 1, got 95"),
            (SCORES, {"confidence": 1.0}, "confidence must lie strictly between 0 and 1, got 1.0"),
            (SCORES, {"confidence": 0.0}, "confidence must lie strictly between 0 and 1, got 0.0"),
        ],
    )
    def test_bad_input(self, scores, kwargs, match):
        with pytest.raises(ValueError, match=match):
            stratified_bootstrap(scores, mean, generator=self.rng(), **kwargs)


class TestWilsonInterval:
    def test_textbook(self):
        # 15 of 50: centre (0.3 + 0.038415) / 1.076829 = 0.314271,
        # half width 1.959964 / 1.076829 * sqrt(0.0042 + 0.000384) = 0.123231
        low, high = wilson_interval(15, 50)
        assert low == pytest.approx(0.314271 - 0.123231, abs=2e-5)
        assert high == pytest.approx(0.314271 + 0.123231, abs=2e-5)

    def test_ends(self):
        assert wilson_interval(0, 50).low == 0.0
        # z^2 / (n + z^2) = 3.841459 / 53.841459
        assert wilson_interval(0, 50).high == pytest.approx(0.0713476, abs=1e-6)
        assert wilson_interval(50, 50).high == 1.0

    def test_one_trial(self):
        assert wilson_interval(1, 1).low == pytest.approx(1 / 4.841459, abs=1e-6)

    @pytest.mark.parametrize(
        "successes, trials, match",
        [
            (0, 0, "trials must be at least 1"),
            (3, 2, "successes must be a count between 0 and trials=2, got 3"),
            (-1, 2, "successes"),
            (0.96, 50, "successes must be a count"),  # a rate
        ],
    )
    def test_bad_input(self, successes, trials, match):
        with pytest.raises(ValueError, match=match):
            wilson_interval(successes, trials)


if __name__ == "__main__":
    pytest.main([__file__])

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Honest statistics of few runs on several tasks.

Scores are matrices ``[runs, tasks]``. The estimators follow *Deep Reinforcement Learning at the
Edge of the Statistical Precipice* (``arXiv:2108.13264``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A confidence interval, ``low <= high``."""

    low: float
    high: float


def mean(scores: np.ndarray) -> float:
    """Mean over runs and tasks.

    Args:
        scores (np.ndarray): ``[runs, tasks]``.

    Examples:
        >>> import numpy as np
        >>> from torchrl_evor.record import mean
        >>> mean(np.array([[0.0, 1.0], [1.0, 1.0]]))
        0.75
    """
    return float(_matrix(scores).mean())


def median(scores: np.ndarray) -> float:
    """Median over tasks of the mean over runs.

    Args:
        scores (np.ndarray): ``[runs, tasks]``.

    Examples:
        >>> import numpy as np
        >>> from torchrl_evor.record import median
        >>> median(np.array([[0.0, 0.5, 1.0], [0.0, 0.7, 1.0]]))
        0.6
    """
    return float(np.median(_matrix(scores).mean(axis=0)))


def iqm(scores: np.ndarray) -> float:
    """Interquartile mean: the mean of the middle half of all scores, runs and tasks together.

    A quarter of the scores, rounded down to whole scores, is dropped at either end.

    Args:
        scores (np.ndarray): ``[runs, tasks]``.

    Examples:
        >>> import numpy as np
        >>> from torchrl_evor.record import iqm
        >>> iqm(np.array([[0.0, 2.0], [4.0, 100.0]]))
        3.0
    """
    ordered = np.sort(_matrix(scores), axis=None)
    cut = ordered.size // 4
    return float(ordered[cut : ordered.size - cut].mean())


def optimality_gap(scores: np.ndarray, target: float = 1.0) -> float:
    """Mean amount by which scores fall short of ``target``; what lies above counts as no gap.

    Args:
        scores (np.ndarray): ``[runs, tasks]``.
        target (float, optional): the score that is good enough. Defaults to ``1.0``.

    Examples:
        >>> import numpy as np
        >>> from torchrl_evor.record import optimality_gap
        >>> optimality_gap(np.array([[0.5, 3.0]]))
        0.25
    """
    return float(target - np.minimum(_matrix(scores), target).mean())


def mean_difference(scores: np.ndarray, baseline: np.ndarray) -> float:
    """Mean of ``scores`` minus mean of ``baseline``, both ``[runs, tasks]`` on the same tasks.

    Examples:
        >>> import numpy as np
        >>> from torchrl_evor.record import mean_difference
        >>> mean_difference(np.array([[1.0], [0.5]]), np.array([[0.25]]))
        0.5
    """
    scores, baseline = _same_tasks(scores, baseline)
    return mean(scores) - mean(baseline)


def probability_of_improvement(scores: np.ndarray, baseline: np.ndarray) -> float:
    """Probability that a run beats a run of the baseline on the same task, averaged over tasks.

    A tie counts one half (the Mann-Whitney statistic).

    Args:
        scores (np.ndarray): ``[runs, tasks]``.
        baseline (np.ndarray): ``[runs of the baseline, tasks]``.

    Examples:
        >>> import numpy as np
        >>> from torchrl_evor.record import probability_of_improvement
        >>> probability_of_improvement(np.array([[1.0], [0.0]]), np.array([[0.0]]))
        0.75
    """
    scores, baseline = _same_tasks(scores, baseline)
    # [runs, runs of the baseline, tasks]
    gain = np.sign(scores[:, None] - baseline[None])
    return float((0.5 * (gain + 1)).mean())


def stratified_bootstrap(
    scores: np.ndarray | Sequence[np.ndarray],
    statistic: Callable[..., float],
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    generator: np.random.Generator,
    paired: bool = False,
) -> Interval:
    """Percentile interval of a statistic, by resampling the runs of each task separately.

    Tasks are fixed, runs are the randomness. With few runs the interval is too narrow (resampling
    n runs shows only (n - 1) / n of their variance): read intervals of two or three runs as
    lower bounds of the uncertainty.

    Args:
        scores (np.ndarray or sequence of np.ndarray): one matrix ``[runs, tasks]``, or one for each
            method that the statistic compares.
        statistic (callable): maps as many matrices to a number.
        num_resamples (int, optional): number of resamples. Defaults to ``2000``.
        confidence (float, optional): probability mass inside. Defaults to ``0.95``.
        generator (np.random.Generator): source of randomness.
        paired (bool, optional): resamples the same runs in all matrices, for methods whose run
            ``i`` shares its seed (data, base policy). Defaults to ``False``, independent runs.

    Returns:
        The interval ``(low, high)``.

    Raises:
        ValueError: if a matrix is empty, not two-dimensional, holds NaN or infinities, has fewer
            than 2 runs, or if the matrices' tasks (with ``paired`` also runs) differ in number.

    Examples:
        >>> import numpy as np
        >>> from torchrl_evor.record import iqm, stratified_bootstrap
        >>> scores = np.array([[0.8, 0.2], [0.9, 0.4], [1.0, 0.3]])
        >>> low, high = stratified_bootstrap(scores, iqm, generator=np.random.default_rng(0))
        >>> bool(low <= iqm(scores) <= high)
        True
    """
    matrices = _resampling_input(scores, paired)
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}.")
    _check_confidence(confidence)
    resampled = [statistic(*_resample(matrices, generator, paired)) for _ in range(num_resamples)]
    tail = 0.5 * (1 - confidence)
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(float(low), float(high))


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's interval for a success rate: sensible at 0 % and 100 % as well.

    It measures the uncertainty of *one* policy's rate from finitely many episodes, not that of
    the training.

    Args:
        successes (int): number of successful episodes.
        trials (int): number of episodes.
        confidence (float, optional): probability mass inside. Defaults to ``0.95``.

    Examples:
        >>> from torchrl_evor.record import wilson_interval
        >>> low, high = wilson_interval(50, 50)
        >>> round(low, 3), high
        (0.929, 1.0)
    """
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}.")
    if not 0 <= successes <= trials or successes % 1:
        raise ValueError(
            f"successes must be a count between 0 and trials={trials}, got {successes}."
        )
    _check_confidence(confidence)
    z = NormalDist().inv_cdf(0.5 * (1 + confidence))
    rate = successes / trials
    shrink = 1 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / shrink
    half = z / shrink * (rate * (1 - rate) / trials + z * z / (4 * trials * trials)) ** 0.5
    # At the ends the bound is exactly 0 or 1; rounding must not put the rate outside.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return Interval(low, high)


def _matrix(scores: np.ndarray, name: str = "scores") -> np.ndarray:
    matrix = np.asarray(scores, dtype=np.float64)
    if matrix.ndim != 2:
        raise ValueError(f"{name} must have the shape [runs, tasks], got {list(matrix.shape)}.")
    if matrix.size == 0:
        raise ValueError(f"{name} must not be empty, got the shape {list(matrix.shape)}.")
    if not np.isfinite(matrix).all():
        run, task = np.argwhere(~np.isfinite(matrix))[0]
        raise ValueError(
            f"{name} must be finite, got {matrix[run, task]} for run {run} on task {task}."
        )
    return matrix


def _same_tasks(scores: np.ndarray, baseline: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, baseline = _matrix(scores), _matrix(baseline, "baseline")
    if scores.shape[1] != baseline.shape[1]:
        raise ValueError(
            "scores and baseline must have the same tasks, "
            f"got {scores.shape[1]} and {baseline.shape[1]}."
        )
    return scores, baseline


def _resampling_input(scores, paired: bool) -> list[np.ndarray]:
    several = [scores] if isinstance(scores, np.ndarray) else scores
    matrices = [_matrix(matrix) for matrix in several]
    if not matrices:
        raise ValueError("scores must not be empty, got no matrix.")
    for matrix in matrices:
        if matrix.shape[0] < 2:
            raise ValueError(
                f"scores must have at least 2 runs per task for an interval, got {len(matrix)}."
            )
    if len({matrix.shape[1] for matrix in matrices}) > 1:
        shapes = [list(matrix.shape) for matrix in matrices]
        raise ValueError(f"scores must have the same tasks in all matrices, got shapes {shapes}.")
    if paired and len({matrix.shape[0] for matrix in matrices}) > 1:
        runs = [matrix.shape[0] for matrix in matrices]
        raise ValueError(f"paired=True needs as many runs in all matrices, got {runs}.")
    return matrices


def _resample(
    matrices: list[np.ndarray], generator: np.random.Generator, paired: bool
) -> list[np.ndarray]:
    """Draws runs with replacement, separately for each task (column)."""
    indices = None
    resampled = []
    for matrix in matrices:
        if indices is None or not paired:
            indices = generator.integers(len(matrix), size=matrix.shape)
        resampled.append(np.take_along_axis(matrix, indices, axis=0))
    return resampled


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}.")

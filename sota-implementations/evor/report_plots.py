# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Plots of methods."""

from __future__ import annotations

from pathlib import Path

import figures
import numpy as np
from matplotlib.figure import Figure
from report_methods import Method, curves
from report_tables import Estimator

from torchrl_evor.record import mean


def plot_environment(env: str, methods: list[Method], estimator: Estimator, path: Path) -> None:
    """Mean success and return with intervals, dots for single seeds; success by task beside."""
    figure = Figure(figsize=(12, 1.2 + 0.45 * len(methods)), layout="constrained")
    success, returns, tasks = figure.subplots(1, 3, sharey=True)
    for y, method in enumerate(methods):
        _draw_mean(success, y, 100 * method.scores, estimator)
        _draw_mean(returns, y, method.returns, estimator)
        for index, value in enumerate(100 * method.scores.mean(axis=0)):
            tasks.plot(value, y, "o", color=f"C{index}", alpha=0.8)
    for index, task in enumerate(methods[0].tasks):
        tasks.plot([], [], "o", color=f"C{index}", label=f"task {task}")
    success.set(title="mean over tasks; dots: seeds", yticks=range(len(methods)))
    success.set_yticklabels([method.name for method in methods])
    success.set_ylim(len(methods) - 0.4, -0.6)  # the first method on top, as in the table
    returns.set(title="mean over tasks; dots: seeds", xlabel="return (reward units)")
    tasks.set(title="tasks, mean over seeds")
    # Beside the axes, where it hides no point.
    tasks.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    for axis in (success, tasks):
        axis.set(xlabel="success (%)", xlim=(-3, 103))
    for axis in (success, returns, tasks):
        axis.grid(axis="x", alpha=0.3)
    figure.suptitle(env)
    figures.save(figure, path, dpi=120)


def _draw_mean(axis, y: int, table: np.ndarray, estimator: Estimator) -> None:
    """One line of a panel: the mean of ``[seeds, tasks]``, its interval, the seeds."""
    interval = estimator.interval(mean, table)
    if interval is not None:
        axis.plot(interval, [y, y], color="C0", lw=6, alpha=0.35)
    axis.plot(table.mean(axis=1), [y] * len(table), ".", color="C7")
    axis.plot(mean(table), y, "|", color="C0", ms=16, mew=2)


def plot_curves(environments: dict[str, list[Method]], column: str, path: Path) -> None:
    """Success against return along the values of ``column``, a curve for each method."""
    drawn = {env: curves(methods, column) for env, methods in environments.items()}
    names = sorted({name for points in drawn.values() for name in points})
    figure = Figure(figsize=(1 + 5 * len(drawn), 4.5), layout="constrained")
    for axis, (env, points) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items()):
        for index, name in enumerate(names):
            here = points.get(name, [])
            returns, success = ([point[i] for point in here] for i in (1, 2))
            axis.plot(returns, success, "o-", color=f"C{index % 10}", label=name)
            for value, *at in here:
                axis.annotate(
                    f"{value:g}", at, (3, 3), textcoords="offset points", fontsize="x-small"
                )
        axis.set(title=env, xlabel="return (reward units)", ylabel="success (%)")
        axis.grid(alpha=0.3)
    figures.legend_beside(figure, axis)
    figure.suptitle(f"along {column}, whose values stand at the points")
    figures.save(figure, path, dpi=120, bbox_inches="tight")  # with the legend

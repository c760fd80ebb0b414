# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Tables of methods, with intervals, in markdown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from report_methods import Method, Pooled, pool, settings_of

from torchrl_evor.record import (
    iqm,
    mean,
    mean_difference,
    probability_of_improvement,
    stratified_bootstrap,
)


class Estimator:
    """Point estimates with intervals, as text."""

    def __init__(self, num_resamples: int, confidence: float, seed: int, single: bool) -> None:
        self.num_resamples, self.confidence = num_resamples, confidence
        self.seed, self.single = seed, single

    def interval(
        self, statistic, *scores: np.ndarray, paired: bool = False
    ) -> tuple[float, float] | None:
        """The bootstrap interval; None for a single seed, where that was asked for."""
        if min(len(matrix) for matrix in scores) < 2:
            if self.single:
                return None
            raise ValueError(
                "an interval needs at least 2 seeds per task, got 1; pass --allow-single-seed "
                "to report single seeds without intervals."
            )
        return stratified_bootstrap(
            scores,
            statistic,
            num_resamples=self.num_resamples,
            confidence=self.confidence,
            # The same draws for each estimate, so that a method more leaves the others as they are.
            generator=np.random.default_rng(self.seed),
            paired=paired,
        )

    def text(
        self,
        statistic,
        *scores: np.ndarray,
        scale: float = 100.0,
        form: str = ".1f",
        paired: bool = False,
    ) -> str:
        """``estimate [low, high]``, in percent by default."""
        value, interval = statistic(*scores), self.interval(statistic, *scores, paired=paired)
        if interval is None:
            return f"{number(value, form, scale)} (1 seed)"
        low, high = (number(end, form, scale) for end in interval)
        return f"{number(value, form, scale)} [{low}, {high}]"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, form: str = ",.0f", scale: float = 1.0) -> str:
    """A number, or a dash for what was not measured."""
    return "-" if value is None else format(scale * value, form)


def success_header(estimator: Estimator) -> list[str]:
    """Header of :func:`success_cells`."""
    level = f"{100 * estimator.confidence:g} %"
    return ["Method", "Seeds × tasks", f"Success, mean [{level}]", f"Success, IQM [{level}]"]


def success_cells(method: Method | Pooled, estimator: Estimator) -> list[str]:
    """Name, size and success of a method."""
    shape = "{} × {}".format(*method.scores.shape)
    estimates = (estimator.text(statistic, method.scores) for statistic in (mean, iqm))
    return [method.name, shape, *estimates]


def main_table(methods: list[Method], published: list[dict], estimator: Estimator) -> str:
    """Success with intervals and cost of each method; published numbers in the last column."""
    level = f"{100 * estimator.confidence:g} %"
    header = [*success_header(estimator), f"Return, mean [{level}]", "Updates", "Parameters"]
    header += ["Training, s", "Peak MB", "ms per decision", "**Published, not our runs** (%)"]
    cited = {row["method"]: f"{row['success_percent']} ({row['source']})" for row in published}
    rows = []
    for method in methods:
        rows.append(
            [
                *success_cells(method, estimator),
                estimator.text(mean, method.returns, scale=1),
                number(method.average("num_updates")),
                number(method.average("parameters")),
                number(method.average("train_seconds")),
                number(method.average("peak_memory_mb")),
                number(method.average("eval_seconds_per_decision"), ".2f", 1e3),
                cited.pop(method.name, "-"),
            ]
        )
    rows += [[f"*{name}*", *["-"] * (len(header) - 2), text] for name, text in cited.items()]
    return table(header, rows)


def task_table(methods: list[Method]) -> str:
    """Mean over seeds for each task, in percent."""
    header = ["Method", *(f"Task {task}" for task in methods[0].tasks)]
    rows = [[m.name, *(f"{100 * x:.1f}" for x in m.scores.mean(axis=0))] for m in methods]
    return table(header, rows)


def comparison_table(
    methods: list[Method] | list[Pooled], reference: str, estimator: Estimator
) -> str:
    """The reference method against every other one, over the seeds that both have.

    Where they share none, or tasks have different ones, over all of either.
    """
    first = next(method for method in methods if method.name == reference)
    level = f"{100 * estimator.confidence:g} %"
    header = [
        f"{reference} against",
        f"Difference of means, points [{level}]",
        f"Probability of improvement, % [{level}]",
        f"Difference of returns [{level}]",
        "Of each shared seed: points; returns",
    ]
    rows = []
    for other in methods:
        if other is first:
            continue
        # Runs of one seed share data, and in one program the base policy.
        shared = sorted(set(first.seeds or ()) & set(other.seeds or ()))
        paired = bool(shared)
        success, returns = zip(of_seeds(first, shared), of_seeds(other, shared))
        rows.append(
            [
                other.name,
                estimator.text(mean_difference, *success, paired=paired),
                estimator.text(probability_of_improvement, *success, paired=paired),
                estimator.text(mean_difference, *returns, scale=1, paired=paired),
                differences(shared, success, returns),
            ]
        )
    return table(header, rows)


def of_seeds(method: Method | Pooled, seeds: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Success and returns of some seeds, in their order; of all if none are named."""
    index = [method.seeds.index(seed) for seed in seeds] if seeds else slice(None)
    return method.scores[index], method.returns[index]


def differences(seeds: list[int], success, returns) -> str:
    """Mean differences over tasks of two matrices ``[seeds, tasks]`` each, for each seed."""
    if not seeds:
        return "-"
    columns = (
        [f"{scale * x:.1f}" for x in (first - other).mean(axis=1)]
        for (first, other), scale in ((success, 100), (returns, 1))
    )
    return f"{', '.join(map(str, seeds))}: " + "; ".join(map(", ".join, columns))


def comparison_tables(
    methods: list[Method] | list[Pooled], references: list[str], estimator: Estimator
) -> list[str]:
    """A comparison for each reference that is among the methods, if there is another one."""
    here = [name for name in references if name in [method.name for method in methods]]
    return [comparison_table(methods, name, estimator) for name in here if len(methods) > 1]


def settings_list(methods: list[Method]) -> str:
    """What rows were made with: what all share, then each method's own and one of its commands."""
    settings = [settings_of(method.rows[0]) for method in methods]
    common = {
        name: value
        for name, value in settings[0].items()
        if all(each.get(name) == value for each in settings)
    }
    lines = [f"- All: {show_settings(common)}"]
    for method, each in zip(methods, settings):
        own = {name: value for name, value in each.items() if name not in common}
        command = method.rows[0].command
        command = f"first of {len(method.rows)} runs: `{command}`" if command else ""
        lines.append(f"- {method.name}: " + "; ".join(filter(None, (show_settings(own), command))))
    return "\n".join(lines)


def show_settings(settings: dict[str, str]) -> str:
    """One line."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def environment_section(
    env: str,
    methods: list[Method],
    published: list[dict],
    references: list[str],
    estimator: Estimator,
) -> str:
    """Everything about one environment."""
    parts = [f"### {env}", main_table(methods, published, estimator), task_table(methods)]
    parts += comparison_tables(methods, references, estimator)
    parts.append(settings_list(methods))
    return "\n\n".join(parts)


def overall_section(
    environments: dict[str, list[Method]],
    references: list[str],
    estimator: Estimator,
    same: dict[str, str],
    free: Sequence[str],
) -> str:
    """All tasks of all environments, for the methods that were run on each of them."""
    pooled, notes = pool(environments, same, free)
    rows = [success_cells(method, estimator) for method in pooled]
    body = [table(success_header(estimator), rows)] if rows else []
    body += comparison_tables(pooled, references, estimator)
    return "\n\n".join([f"### All {len(environments)} environments", *body, *notes])

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Turns raw result rows into tables with intervals, and plots.

    python report.py                                  writes report/report.md and plots
    python report.py --readme ../../docs/results.md   also renews the tables of a page
    python report.py --where evor:tau_r=inf           picks one of several settings
    python report.py --split tau_r                    shows each of them as a method of its own
    python report.py --same EVOR=evor,evor-5          one method in the table of all environments
    python report.py --mix num_updates                methods of different budgets in one table
    python report.py --split tau_q --curve tau_q      draws each method along its temperatures
    python report.py --best tau_r --best tau_q        each method as it returns most, by environment

Reads results/<env>/<method>.csv (see results_io.py), one row per trained seed and task. Per
environment: mean and interquartile mean (IQM) of success with intervals by stratified bootstrap
over seeds, cost, comparisons with one method, and published numbers (published.csv) in a column
of their own. Rows of different settings or protocols are never averaged: that is an error.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from results_io import (
    COLUMNS,
    SETTINGS,
    ResultRow,
    parse_training,
    parse_value,
    read_rows,
    write_text,
)

from torchrl_evor.record import (
    iqm,
    mean,
    mean_difference,
    probability_of_improvement,
    stratified_bootstrap,
)

_has_matplotlib = importlib.util.find_spec("matplotlib") is not None

HERE = Path(__file__).resolve().parent
PLOTS = "@plots@"  # stands for the plots' folder as seen from the file that is written
START, END = "<!-- results:start -->", "<!-- results:end -->"
# What all methods of one table must share; the remaining settings may differ between methods.
SHARED = ("protocol", "num_transitions", "episodes", "num_updates")
# Along what a curve can be drawn: the numbers that are chosen when acting.
CURVES = ("num_candidates", "num_samples", "tau_r", "tau_q")
# What belongs to an environment rather than to a method.
OF_ENVIRONMENT = ("gamma",)


@dataclasses.dataclass
class Method:
    """The rows of one method on one environment; success and returns as ``[seeds, tasks]``."""

    name: str
    rows: list[ResultRow]

    def __post_init__(self) -> None:
        self.where = f"{self.rows[0].env}, {self.name}"
        self._check_settings()
        self.tasks = sorted({row.task for row in self.rows})
        seeds = {tuple(sorted(r.seed for r in self.rows if r.task == t)) for t in self.tasks}
        # Those of the matrices' rows, if all tasks have the same.
        self.seeds = seeds.pop() if len(seeds) == 1 else None
        self.scores, self.returns = self._matrix("success"), self._matrix("return_mean")

    def _check_settings(self) -> None:
        for column in SETTINGS:
            values = {getattr(row, column) for row in self.rows}
            if len(values) > 1:
                raise ValueError(
                    f"{self.where}: rows of different {column} would be averaged: "
                    f"{sorted(map(str, values))}. Choose with --where {self.name}:{column}=..."
                )

    def _matrix(self, column: str) -> np.ndarray:
        columns = []
        for task in self.tasks:
            rows = sorted((row for row in self.rows if row.task == task), key=lambda r: r.seed)
            columns.append([getattr(row, column) for row in rows])
        counts = {task: len(column) for task, column in zip(self.tasks, columns)}
        if len(set(counts.values())) > 1:
            raise ValueError(f"{self.where}: as many seeds for each task needed, got {counts}.")
        return np.array(columns).T

    def average(self, column: str) -> float | None:
        """Mean over all rows, None where a row was not measured."""
        values = [getattr(row, column) for row in self.rows]
        return None if None in values else float(np.mean(values))


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


def group(rows: list[ResultRow], mixed: Sequence[str] = ()) -> dict[str, list[Method]]:
    """Environment -> its methods, each checked, comparable with each other but for ``mixed``."""
    environments = {}
    for env in sorted({row.env for row in rows}):
        here = [row for row in rows if row.env == env]
        names = sorted({row.method for row in here})
        methods = [Method(name, [row for row in here if row.method == name]) for name in names]
        _check_comparable(env, methods, mixed)
        environments[env] = methods
    return environments


def _check_comparable(env: str, methods: list[Method], mixed: Sequence[str]) -> None:
    for column in SHARED:
        values = {method.name: getattr(method.rows[0], column) for method in methods}
        if column not in mixed and len(set(values.values())) > 1:
            raise ValueError(
                f"{env}: methods of different {column} would share a table: {values}. "
                f"Choose with --where {column}=... or allow it with --mix {column}."
            )
    data = {method.name: setting(method.rows[0], "data") for method in methods}
    # Older rows do not say which data they are of.
    if len(set(data.values()) - {None}) > 1:
        raise ValueError(f"{env}: methods of different data would share a table: {data}.")
    tasks = {method.name: method.tasks for method in methods}
    if len(set(map(tuple, tasks.values()))) > 1:
        raise ValueError(f"{env}: all methods must have the same tasks, got {tasks}.")


def select(rows: list[ResultRow], conditions: list[str]) -> list[ResultRow]:
    """Keeps the rows that meet all ``[METHOD:]COLUMN=VALUE``; others' methods are unaffected."""
    for condition in conditions:
        target, equals, text = condition.partition("=")
        method, colon, column = target.rpartition(":")
        if not equals or column not in COLUMNS:
            raise ValueError(
                f"--where must be [METHOD:]COLUMN=VALUE with a column of {', '.join(COLUMNS)}, "
                f"got {condition!r}."
            )
        value = parse_value(column, text)
        rows = [
            row for row in rows if (colon and row.method != method) or getattr(row, column) == value
        ]
        if not rows:
            raise ValueError(f"--where {condition} leaves no rows.")
    return rows


def split(rows: list[ResultRow], columns: list[str]) -> list[ResultRow]:
    """Makes each value of the settings a method of its own, for methods that have several."""
    for column in columns:
        values: dict[str, set] = {}
        for row in rows:
            values.setdefault(row.method, set()).add(setting(row, column))
        rows = [
            dataclasses.replace(row, method=f"{row.method} {column}={setting(row, column)}")
            if len(values[row.method]) > 1
            else row
            for row in rows
        ]
    return rows


def best(rows: list[ResultRow], columns: list[str]) -> list[ResultRow]:
    """Of each method's values of some settings, those of the best mean return, by environment."""
    readings: dict[tuple, dict[tuple, list[ResultRow]]] = {}
    for row in rows:
        values = tuple(setting(row, column) for column in columns)
        readings.setdefault((row.env, row.method), {}).setdefault(values, []).append(row)
    kept = []
    for (env, method), groups in readings.items():
        runs = {tuple(sorted((row.task, row.seed) for row in group)) for group in groups.values()}
        if len(runs) > 1:
            raise ValueError(
                f"{env}, {method}: --best needs the same tasks and seeds for each of "
                f"{', '.join(columns)}, got {sorted(map(len, groups.values()))} runs."
            )
        kept += max(groups.values(), key=lambda group: np.mean([row.return_mean for row in group]))
    return kept


def known_settings(rows: list[ResultRow]) -> list[str]:
    """Names of the settings of the rows and of their training."""
    return [*SETTINGS, *sorted({name for row in rows for name in parse_training(row.training)})]


def check_known(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Names what an option that may be used several times does not know."""
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{option} must be one of {', '.join(known)}, got {unknown}.")


def setting(row: ResultRow, name: str) -> object:
    """A setting of a row, or of its training; None if it says nothing of it."""
    return getattr(row, name) if name in SETTINGS else parse_training(row.training).get(name)


def read_published(path: Path) -> dict[str, list[dict[str, str]]]:
    """Environment -> published rows (method, success_percent, source)."""
    published: dict[str, list[dict[str, str]]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            published.setdefault(row["env"], []).append(row)
    return published


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


def settings_of(row: ResultRow) -> dict[str, str]:
    """The settings of a row, those of its training by their own names."""
    values = {name: getattr(row, name) for name in SETTINGS}
    training = parse_training(values.pop("training"))
    texts = {name: str(value) for name, value in values.items() if value is not None}
    return {**texts, **training}


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


@dataclasses.dataclass
class Pooled:
    """All tasks of all environments of one method; success and returns as ``[seeds, tasks]``."""

    name: str
    scores: np.ndarray
    returns: np.ndarray
    seeds: tuple[int, ...] | None


def overall_section(
    environments: dict[str, list[Method]],
    references: list[str],
    estimator: Estimator,
    same: dict[str, str],
    free: Sequence[str],
) -> str:
    """All tasks of all environments, for the methods that were run on each of them."""
    by_name: dict[str, list[Method]] = {}
    for methods in environments.values():
        for method in methods:
            by_name.setdefault(same.get(method.name, method.name), []).append(method)
    pooled, missing, notes = [], [], []
    for name, parts in sorted(by_name.items()):
        seeds = [len(part.scores) for part in parts]
        if len({part.rows[0].env for part in parts}) < len(parts):
            raise ValueError(f"--same {name} must name one method for each environment.")
        if len(parts) < len(environments):
            missing.append(name)
            continue
        _check_poolable(name, parts, free)
        if len(set(seeds)) > 1:
            notes.append(f"{name} is left out: {seeds} seeds, not the same number everywhere.")
        else:
            columns = zip(*((part.scores, part.returns) for part in parts))
            scores, returns = (np.concatenate(column, axis=1) for column in columns)
            numbers = {part.seeds for part in parts}
            pooled.append(
                Pooled(name, scores, returns, numbers.pop() if len(numbers) == 1 else None)
            )
    if missing:
        notes.append(f"Left out, because not run on all of them: {', '.join(missing)}.")
    rows = [success_cells(method, estimator) for method in pooled]
    body = [table(success_header(estimator), rows)] if rows else []
    body += comparison_tables(pooled, references, estimator)
    return "\n\n".join([f"### All {len(environments)} environments", *body, *notes])


def _check_poolable(name: str, parts: list[Method], free: Sequence[str]) -> None:
    """One method over several environments has one protocol, and under one name one setting.

    But for those that are ``free``, chosen for each environment.
    """
    settings = [settings_of(part.rows[0]) for part in parts]
    one_name = len({part.name for part in parts}) == 1
    names = {key for each in settings for key in each} if one_name else {*SHARED, "data"}
    for key in sorted(names - {*OF_ENVIRONMENT, *free}):
        values = {part.rows[0].env: each.get(key) for part, each in zip(parts, settings)}
        if len(set(values.values())) > 1:
            raise ValueError(f"{name}: different {key} would be averaged: {values}.")


def parse_same(options: list[str], names: set[str]) -> dict[str, str]:
    """Method -> the name it shares with methods of other environments."""
    same: dict[str, str] = {}
    for option in options:
        name, _, members = option.partition("=")
        for member in members.split(","):
            if member not in names:
                raise ValueError(
                    f"--same must be NAME=METHOD,METHOD with methods of {sorted(names)}, "
                    f"got {option!r}."
                )
            same[member] = name
    return same


def plot_environment(env: str, methods: list[Method], estimator: Estimator, path: Path) -> None:
    """Mean success and return with intervals, dots for single seeds; success by task beside."""
    import figures
    from matplotlib.figure import Figure

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


def curves(methods: list[Method], column: str) -> dict[str, list[tuple[float, float, float]]]:
    """Name without ``column`` -> its values, each with mean return and mean success in percent.

    Of methods that have several.
    """
    points: dict[str, list[tuple[float, float, float]]] = {}
    for method in methods:
        value = setting(method.rows[0], column)
        if value is None:  # it does not choose at all
            continue
        name = " ".join(word for word in method.name.split() if not word.startswith(f"{column}="))
        at = float(value), float(method.returns.mean()), 100 * float(method.scores.mean())
        points.setdefault(name, []).append(at)
    return {name: sorted(values) for name, values in points.items() if len(values) > 1}


def plot_curves(environments: dict[str, list[Method]], column: str, path: Path) -> None:
    """Success against return along the values of ``column``, a curve for each method."""
    import figures
    from matplotlib.figure import Figure

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


def renew(readme: Path, text: str) -> None:
    """Replaces what stands between the two markers."""
    content = readme.read_text(encoding="utf-8")
    if content.count(START) != 1 or content.count(END) != 1:
        raise ValueError(f"{readme} must hold the lines {START} and {END} once each.")
    before, rest = content.split(START)
    if END not in rest:
        raise ValueError(f"{readme} must hold {START} before {END}.")
    write_text(readme, f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}")


def build(args: argparse.Namespace) -> str:
    """The report's text; writes the plots on the way."""
    check_known("--mix", args.mix, SHARED)
    if args.curve not in (None, *CURVES):
        raise ValueError(f"--curve must be one of {', '.join(CURVES)}, got {args.curve!r}.")
    if args.plots and not _has_matplotlib:
        raise ImportError("plots need matplotlib: pip install matplotlib, or pass --no-plots.")
    rows = select(read_rows(args.results), args.where)
    settings = known_settings(rows)
    check_known("--split", args.split, settings)
    check_known("--best", args.best, settings)
    environments = group(best(split(rows, args.split), args.best), args.mix)
    names = {method.name for methods in environments.values() for method in methods}
    same = parse_same(args.same, names)
    names |= set(same.values())
    check_known("--reference", args.reference or (), sorted(names))
    references = ["evor"] if args.reference is None else args.reference
    published = read_published(args.published)
    estimator = Estimator(args.num_resamples, args.confidence, args.seed, args.allow_single_seed)
    sections = [
        environment_section(env, methods, published.get(env, []), references, estimator)
        for env, methods in environments.items()
    ]
    if len(environments) > 1:
        sections.insert(0, overall_section(environments, references, estimator, same, args.best))
    if args.curve is not None and args.plots:
        plot_curves(environments, args.curve, args.output / f"{args.curve}.png")
        sections.append(f"![Success against return along {args.curve}]({PLOTS}/{args.curve}.png)")
    for env, methods in environments.items() if args.plots else ():
        plot_environment(env, methods, estimator, args.output / f"{env}.png")
        sections.append(f"![Success on {env}]({PLOTS}/{env}.png)")
    note = (
        "Success in percent, returns in reward units. Intervals: stratified bootstrap over the "
        "seeds of each task, too narrow where seeds are few, and where what the tasks of a seed "
        "have in common, such as a base policy, weighs much. Published numbers come from 1M "
        "official transitions and 1M updates with other code and hardware, some by way of "
        "secondary notes; they are not comparable with smaller runs. Seconds of training and "
        "memory are those of the program that trained a method, with others where it did."
    )
    return "\n\n".join([note, *sections])


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--results", type=Path, default=HERE / "results", help="folder of <env>/<method>.csv")
    add("--output", type=Path, default=HERE / "report", help="folder for report.md and plots")
    add("--readme", type=Path, help=f"file whose text between {START} and {END} is replaced")
    add("--published", type=Path, default=HERE / "published.csv", help="cited numbers")
    add("--where", action="append", default=[], metavar="[METHOD:]COLUMN=VALUE", help="row filter")
    add(
        "--split",
        action="append",
        default=[],
        metavar="COLUMN",
        help="a method for each value; a setting of the training will do",
    )
    text = "keeps the values of the best mean return, for each method and environment"
    add("--best", action="append", default=[], metavar="COLUMN", help=text)
    text = "what may differ between the methods of a table nevertheless, one for each use"
    add("--mix", action="append", default=[], metavar="COLUMN", help=text)
    text = "method that the others are compared with, one for each use; evor by default"
    add("--reference", action="append", metavar="METHOD", help=text)
    add("--curve", metavar="COLUMN", help="draws success against return along its values")
    text = "what is one method in the table of all environments, under whatever name in each"
    add("--same", action="append", default=[], metavar="NAME=METHOD,METHOD", help=text)
    add("--num-resamples", type=int, default=2000, help="bootstrap resamples")
    add("--confidence", type=float, default=0.95, help="mass of the intervals")
    add("--seed", type=int, default=0, help="seed of the bootstrap")
    add("--allow-single-seed", action="store_true", help="single seeds, without intervals")
    add("--no-plots", dest="plots", action="store_false", help="tables only")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    text = build(args)
    write_text(args.output / "report.md", text.replace(PLOTS, ".") + "\n")
    if args.readme is not None:
        plots = Path(os.path.relpath(args.output.resolve(), args.readme.resolve().parent))
        renew(args.readme, text.replace(PLOTS, plots.as_posix()))
    print(f"wrote {args.output / 'report.md'}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")

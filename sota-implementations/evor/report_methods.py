# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Result rows as methods: choosing rows, and refusing to average what differs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from results_io import COLUMNS, SETTINGS, ResultRow, parse_training, parse_value

# What all methods of one table must share; the remaining settings may differ between methods.
SHARED = ("protocol", "num_transitions", "episodes", "num_updates")
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


@dataclasses.dataclass
class Pooled:
    """All tasks of all environments of one method; success and returns as ``[seeds, tasks]``."""

    name: str
    scores: np.ndarray
    returns: np.ndarray
    seeds: tuple[int, ...] | None


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
    methods = {row.method for row in rows}
    for condition in conditions:
        target, equals, text = condition.partition("=")
        method, colon, column = target.rpartition(":")
        if not equals or column not in COLUMNS:
            raise ValueError(
                f"--where must be [METHOD:]COLUMN=VALUE with a column of {', '.join(COLUMNS)}, "
                f"got {condition!r}."
            )
        if colon:
            check_known("--where METHOD", [method], sorted(methods))
        try:
            value = parse_value(column, text)
        except ValueError as error:
            raise ValueError(
                f"--where {condition} must hold a value of {column}: {error}"
            ) from error
        rows = [
            row for row in rows if (colon and row.method != method) or getattr(row, column) == value
        ]
        if not any(not colon or row.method == method for row in rows):
            left = f"no rows of {method}" if colon else "no rows"
            raise ValueError(f"--where {condition} leaves {left}.")
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


def settings_of(row: ResultRow) -> dict[str, str]:
    """The settings of a row, those of its training by their own names."""
    values = {name: getattr(row, name) for name in SETTINGS}
    training = parse_training(values.pop("training"))
    texts = {name: str(value) for name, value in values.items() if value is not None}
    return {**texts, **training}


def pool(
    environments: dict[str, list[Method]], same: dict[str, str], free: Sequence[str]
) -> tuple[list[Pooled], list[str]]:
    """The methods that were run on all environments, and why others are left out."""
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
    return pooled, notes


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

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Raw result rows: one CSV line per trained and evaluated seed, results/<env>/<method>.csv.

Aggregates are never stored; report.py recomputes them from these rows.
"""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import io
import math
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class ResultRow:
    """One evaluated seed of one method on one task. What was not measured is ``None``.

    Args:
        env (str): dataset without task and version, for example ``pointmaze-medium-navigate``.
        task (int): OGBench's task, from 1.
        method (str): for example ``evor``, ``qc-1``, ``bc``.
        seed (int): seed of the training run.
        num_updates (int): gradient steps.
        hidden (str): hidden layers, for example ``256x256x256``.
        batch_size (int): rows in a gradient step.
        device (str): what it ran on, for example ``cpu``.
        episodes (int): evaluation episodes.
        success (float): share of successful episodes, 0 to 1.
        return_mean (float): mean undiscounted return of the episodes.
        protocol (str, optional): label of the setting; different ones are never put together.
        num_transitions (int, optional): transitions in the dataset.
        n_step (int, optional): steps of data rewards in a target.
        num_candidates (int, optional): candidates per decision.
        num_samples (int, optional): reward-to-go nodes per candidate.
        nodes (str, optional): how they are placed: ``stratified``, ``gauss_hermite``, ``random``.
        num_steps (int, optional): evaluations of the flow for each, where not those of training.
        tau_r (float, optional): temperature of the reward-to-go average, reward units.
        tau_q (float, optional): temperature of the choice among candidates, reward units.
        training (str, optional): what else the training depends on, ``name=value`` each, see
            ``training_text``.
        length_mean (float, optional): mean number of steps of an episode.
        train_seconds (float, optional): wall-clock time of training.
        eval_seconds_per_decision (float, optional): time of the actor per decision and episode.
        peak_memory_mb (float, optional): peak memory of training.
        parameters (int, optional): trained parameters.
        command (str, optional): the command that repeats it.
    """

    env: str
    task: int
    method: str
    seed: int
    num_updates: int
    hidden: str
    batch_size: int
    device: str
    episodes: int
    success: float
    return_mean: float
    protocol: str | None = None
    num_transitions: int | None = None
    n_step: int | None = None
    num_candidates: int | None = None
    num_samples: int | None = None
    nodes: str | None = None
    num_steps: int | None = None
    tau_r: float | None = None
    tau_q: float | None = None
    training: str | None = None
    length_mean: float | None = None
    train_seconds: float | None = None
    eval_seconds_per_decision: float | None = None
    peak_memory_mb: float | None = None
    parameters: int | None = None
    command: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_field(field.name, field.type, getattr(self, field.name))
        if not 0 <= self.success <= 1:
            raise ValueError(f"success must lie between 0 and 1, got {self.success}.")
        if self.episodes < 1:
            raise ValueError(f"episodes must be at least 1, got {self.episodes}.")
        if self.task < 1:
            raise ValueError(f"task must be at least 1, got {self.task}.")

    @property
    def key(self) -> tuple:
        """The run and its setting: what may occur only once."""
        return tuple(getattr(self, name) for name in ("env", "method", "task", "seed", *SETTINGS))


COLUMNS = tuple(field.name for field in dataclasses.fields(ResultRow))
LATER = {"num_steps"}  # columns that older files do not have
# What has to agree before rows of one method may be averaged.
SETTINGS = (
    "protocol",
    "num_updates",
    "num_transitions",
    "n_step",
    "hidden",
    "batch_size",
    "device",
    "episodes",
    "num_candidates",
    "num_samples",
    "nodes",
    "num_steps",
    "tau_r",
    "tau_q",
    "training",
)
# What the training of a method depends on, besides the columns of a row.
_POLICY_TRAINING = (
    *("data", "lr", "schedule", "observation_spread"),
    *("policy_hidden", "policy_activation", "policy_steps", "policy_noise"),
)
# Younger than some rows and agents; with these values none has them.
YOUNGER = {"policy_noise": "0"}
_VALUE_TRAINING = ("gamma", "tau", "value_spread", "value_activation", "layer_norm")
_OWN_TRAINING = {
    "evor": ("value_steps", "value_solver", "td_target", "next_action", "bound_returns"),
    "scalar": ("next_action",),
    "qc": ("num_critics", "next_candidates"),
    "iql": ("expectile", "temperature"),
    **dict.fromkeys(("hl_gauss", "categorical", "quantile"), ("next_action", "num_atoms")),
}
_TYPES = {"str": str, "int": int, "float": float}


def parse_value(column: str, text: str) -> object:
    """The value that a cell's text stands for; an empty optional cell is ``None``."""
    field = next(f for f in dataclasses.fields(ResultRow) if f.name == column)
    if text == "" and field.default is None:
        return None
    return _TYPES[field.type.split(" ")[0]](text)


def _check_field(name: str, kind: str, value: object) -> None:
    if value is None and kind.endswith("| None"):
        return
    base = kind.split(" ")[0]
    if base == "str":
        if not (isinstance(value, str) and value.strip()):
            raise ValueError(f"{name} must be a text that is not empty, got {value!r}.")
    elif isinstance(value, bool) or not isinstance(value, int if base == "int" else (int, float)):
        raise ValueError(f"{name} must be of type {base}, got {value!r}.")
    elif math.isnan(value) or (math.isinf(value) and name not in ("tau_r", "tau_q")):
        raise ValueError(f"{name} must be finite, got {value!r}.")
    elif value < 0 and name != "return_mean":
        raise ValueError(f"{name} must be at least 0, got {value!r}.")


def next_action_text(
    next_action: str, improved: Mapping[str, float | None], kept: bool = False
) -> str:
    """Where EVOR's next action comes from, with the options of ``"improved"``.

    Those that are ``None`` are left out; ``kept`` says that candidates were drawn once.
    """
    given = {name: value for name, value in improved.items() if value is not None}
    options = ",".join(f"{name}:{value:g}" for name, value in given.items()) + ",kept" * kept
    return f"improved({options})" if next_action == "improved" else next_action


def steps_text(num_steps: int, solver: str) -> str:
    """Evaluations of a base policy's flow, with the solver where it is not Euler's."""
    return str(num_steps) if solver == "euler" else f"{num_steps}({solver})"


def training_text(method: str, settings: Mapping[str, object]) -> str:
    """What the training of a method depends on, ``name=value`` each: rows of one text compare.

    Args:
        method (str): ``"evor"``, ``"bc"`` or another of ``baselines.METHODS``.
        settings (mapping): at least the values of the names that concern the method.
    """
    names = _POLICY_TRAINING
    if method != "bc":
        names = (*names, *_VALUE_TRAINING, *_OWN_TRAINING[method])
    parts = []
    for name in names:
        value = settings[name]
        # Numbers in one form, 8 for 8.0; truth values are no numbers.
        text = f"{value:g}" if type(value) in (int, float) else str(value)
        if YOUNGER.get(name) != text:
            parts.append(f"{name}={text}")
    return " ".join(parts)


def parse_training(text: str | None) -> dict[str, str]:
    """What :func:`training_text` put together, by name."""
    return dict(part.split("=", 1) for part in (text or "").split())


def command() -> str:
    """The command line of this program, to be pasted into a shell."""
    return shlex.join(["python", *sys.argv])


def make_row(row: Mapping[str, object] | ResultRow) -> ResultRow:
    """Checks a mapping from columns to values."""
    if isinstance(row, ResultRow):
        return row
    required = {f.name for f in dataclasses.fields(ResultRow) if f.default is dataclasses.MISSING}
    unknown, missing = sorted(set(row) - set(COLUMNS)), sorted(required - set(row))
    if unknown or missing:
        raise ValueError(
            f"row must have the columns of ResultRow, got unknown {unknown}, missing {missing}."
        )
    return ResultRow(**row)


def append_row(path: str | Path, row: Mapping[str, object] | ResultRow) -> None:
    """Adds a row to a csv file; a row of the same run in the same setting is replaced.

    The file is rewritten under a temporary name and renamed, and writers wait for each other: an
    interrupt or a second process leaves no half-written or lost line.

    Args:
        path (str or Path): the file, ``results/<env>/<method>.csv``; made with its folder if
            missing.
        row (Mapping or ResultRow): values of the columns, see :class:`ResultRow`.

    Raises:
        ValueError: if a column is unknown or missing, a value is bad, or the file is not ours.
    """
    row, path = make_row(row), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path.parent):
        rows = read_file(path) if path.exists() else []
        _write(path, [*(old for old in rows if old.key != row.key), row])


def read_rows(results: str | Path) -> list[ResultRow]:
    """All rows of a results folder, checked.

    Folders and files whose name starts with ``_`` or ``.`` are left alone.

    Args:
        results (str or Path): the folder that holds ``<env>/<method>.csv``.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds no rows, or a file that does not belong: another place, no rows,
            other columns, rows of another environment or method than its path says, bad values,
            duplicates.
    """
    root = Path(results)
    if not root.is_dir():
        raise FileNotFoundError(f"results must be a folder, got {str(root)!r}.")
    names = [path.relative_to(root) for path in sorted(root.rglob("*.csv"))]
    names = [name for name in names if not any(part[0] in "_." for part in name.parts)]
    rows = []
    for name in names:
        if len(name.parts) != 2:
            raise ValueError(f"results must hold <env>/<method>.csv alone, got {root / name}.")
        found = read_file(root / name)
        if not found:
            raise ValueError(f"{root / name} must hold rows, got none.")
        for row in found:
            if (row.env, row.method) != (name.parent.name, name.stem):
                raise ValueError(
                    f"{root / name} must hold rows of env={name.parent.name!r} and "
                    f"method={name.stem!r} only, got {row.env!r} and {row.method!r}."
                )
            rows.append(row)
    if not rows:
        raise ValueError(f"results must hold rows in <env>/<method>.csv, got none in {root}.")
    return rows


def read_file(path: str | Path) -> list[ResultRow]:
    """The rows of one file, checked."""
    with open_csv(path) as file:
        reader = csv.DictReader(file)
        names = tuple(reader.fieldnames or ())
        if names != tuple(name for name in COLUMNS if name in names or name not in LATER):
            raise ValueError(
                f"{path} must have the columns {','.join(COLUMNS)}, got {reader.fieldnames}."
            )
        rows = [_parse(path, reader.line_num, record) for record in reader]
    keys = [row.key for row in rows]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{path} holds a run twice: {key}.")
    return rows


@contextmanager
def open_csv(path: str | Path) -> Iterator[io.TextIOBase]:
    """A file to be read; where it is no text, the error names it."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            yield file
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} must be a csv file in UTF-8: {error}") from error


def _parse(path: str | Path, line: int, record: dict) -> ResultRow:
    if None in record or None in record.values():
        columns = [name for name in record if name is not None]
        raise ValueError(f"{path}, line {line}: expected {len(columns)} values.")
    try:
        return ResultRow(**{column: parse_value(column, text) for column, text in record.items()})
    except ValueError as error:
        raise ValueError(f"{path}, line {line}: {error}") from error


def _write(path: Path, rows: list[ResultRow]) -> None:
    write_csv(path, COLUMNS, [dataclasses.asdict(row) for row in rows])


def write_csv(path: str | Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """Writes rows, one to a line; what a row does not hold stays empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_text(path: str | Path, text: str) -> None:
    """Writes a file under a temporary name, then renames it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Holds the folder against other writers (released by the system if the process dies)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

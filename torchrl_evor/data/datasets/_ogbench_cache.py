# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Memory-mapped copies of OGBench files: what tasks share is kept once."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict

from torchrl_evor.data._memmap import check_memmap
from torchrl_evor.data.datasets._ogbench_arrays import (
    label_rewards,
    open_npz,
    outcome_columns,
    read_array,
    transition_columns,
    transition_rows,
)

_STATES = ("observations", "actions", "terminals")


def fingerprint(path: Path) -> str:
    """A short name for a user's file, which changes when the file does."""
    stat = path.stat()
    identity = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def write_transitions(npz: Path, folder: Path) -> None:
    """Writes the columns that all tasks share as a memory-mapped TensorDict."""
    with open_npz(npz, _STATES) as file:
        arrays = {key: read_array(file, key) for key in _STATES}
    rows = transition_rows(arrays)
    _write_memmap(folder, transition_columns(arrays, rows), len(rows))


def write_outcomes(npz: Path, folder: Path, env_id: str, *, sparse: bool) -> None:
    """Writes one task's rewards and ends as a memory-mapped TensorDict."""
    with open_npz(npz, ("terminals", "qpos")) as file:
        keys = [key for key in ("terminals", "qpos", "button_states") if key in file.files]
        arrays = {key: read_array(file, key) for key in keys}
    rows = transition_rows(arrays)
    arrays.update(label_rewards(arrays, env_id, sparse=sparse))
    columns = outcome_columns(arrays, rows)
    _write_memmap(
        folder, {key: lambda column=column: column for key, column in columns.items()}, len(rows)
    )


def load_dataset_memmap(transitions: Path, outcomes: Path) -> TensorDict:
    """Both parts as one TensorDict in TED layout, memory-mapped, nothing copied.

    Raises:
        ValueError: if a file of them was cut or is missing.
    """
    for folder in (transitions, outcomes):
        check_memmap(folder)
    data = TensorDict.load_memmap(transitions)
    ends = TensorDict.load_memmap(outcomes)
    items = dict(data.items())
    following = {**dict(data["next"].items()), **dict(ends["next"].items())}
    items["next"] = TensorDict(following, batch_size=data.batch_size)
    return TensorDict(items, batch_size=data.batch_size).lock_()


def _write_memmap(folder: Path, columns: dict, num_rows: int) -> None:
    """Fills a temporary folder, one column in memory at a time, then renames it to ``folder``."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        data = TensorDict({}, batch_size=[num_rows]).memmap(temporary)
        for key, make in columns.items():
            column = torch.from_numpy(np.ascontiguousarray(make()))
            _check_free_space(temporary, column.nbytes)
            data.make_memmap(key, column.shape, dtype=column.dtype).copy_(column)
            del column  # before the next one is made
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_free_space(folder: Path, num_bytes: int) -> None:
    # A full disk kills a process that writes to a mapped file, without an exception.
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            errno.ENOSPC,
            f"The cache needs {num_bytes} more bytes, but only {free} are free (root=... names "
            f"another place)",
            str(folder),
        )

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""From OGBench's arrays to TorchRL's TED layout: checks, rewards and the pure converter."""

from __future__ import annotations

import importlib.util
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict

from torchrl_evor.data.datasets._ogbench_episodes import numpy_seed

_has_ogbench = importlib.util.find_spec("ogbench") is not None

# Actions are kept this far inside [-1, 1], as in TorchRL's flow Q-learning recipe ...
_ACTION_MARGIN = 1e-5
# ... and further outside than this they are no rounding of a bounded action.
_ACTION_EXCESS = 1e-3


def ogbench_arrays_to_tensordict(dataset: Mapping[str, np.ndarray]) -> TensorDict:
    """Converts the arrays of an OGBench file to a TensorDict in TED layout.

    An OGBench file lists, for each trajectory of T transitions, its T + 1 states; ``terminals`` is
    1 at the last one, whose action leads nowhere and is no transition of its own. It is
    still an exact sample of the behaviour policy there, and so it becomes the
    ``("next", "action")`` of the last transition. ``terminals`` is the boundary of a trajectory:
    the time ran out. ``masks == 0`` is termination, which may occur inside a trajectory, that
    then goes on.

    Args:
        dataset (mapping): arrays of equal lengths. ``"observations"`` ``[R, obs]`` and
            ``"actions"`` ``[R, act]`` in [-1, 1], floating point; ``"terminals"`` ``[R]``, 0 or
            1; ``"rewards"`` ``[R]`` and ``"masks"`` ``[R]`` (0 or 1), floating point. Row t's
            reward and mask belong to the transition that leaves its state. Others are ignored.

    Returns:
        TensorDict: of batch size ``[N]``, N = R - number of trajectories, with ``observation``,
        ``action`` (kept inside ±(1 - 1e-5)), ``episode`` (int64, from 0), ``done``,
        ``terminated``, ``truncated`` (all False), and under ``next``: ``observation``,
        ``action``, ``reward`` ``[N, 1]``, ``terminated`` (mask 0), ``truncated`` (boundary without
        termination), ``done`` (either). float32, int64 and bool.

    Raises:
        KeyError: if an array is missing.
        TypeError: if an array's dtype is not one of the above.
        ValueError: for unequal lengths, an empty data set, one that does not end with a terminal,
            NaN or infinite entries, or actions outside [-1, 1].

    Examples:
        >>> arrays = {
        ...     "observations": np.arange(4, dtype=np.float32)[:, None],
        ...     "actions": np.zeros((4, 1), np.float32),
        ...     "terminals": np.array([0, 0, 0, 1], bool),
        ...     "rewards": -np.ones(4, np.float32),
        ...     "masks": np.ones(4, np.float32),
        ... }
        >>> data = ogbench_arrays_to_tensordict(arrays)
        >>> data["next", "observation"].squeeze(-1)
        tensor([1., 2., 3.])
        >>> data["next", "truncated"].squeeze(-1)
        tensor([False, False,  True])
    """
    if "next_observations" in dataset:
        raise ValueError(
            "dataset must hold the arrays of an OGBench file, where the last state of each "
            "trajectory is a row; got 'next_observations', the form that "
            "ogbench.load_dataset returns, which has lost the last action of each trajectory."
        )
    rows = transition_rows(dataset)
    columns = {key: column() for key, column in transition_columns(dataset, rows).items()}
    columns.update(outcome_columns(dataset, rows))
    data = TensorDict({}, batch_size=[len(rows)])
    for key, column in columns.items():
        data[key] = torch.from_numpy(column)
    return data


def transition_rows(dataset: Mapping[str, np.ndarray]) -> np.ndarray:
    """Rows of a file that are transitions: all but the last state of each trajectory."""
    terminals = _read(dataset, "terminals", ndim=1)
    if not len(terminals):
        raise ValueError("dataset is empty: its arrays have no rows.")
    terminals = _checked_flags("terminals", terminals)
    if not terminals[-1]:
        raise ValueError(
            "dataset must end with a terminal: its last row has terminals == 0, so that its last "
            "trajectory is incomplete (a truncated file?)."
        )
    rows = np.flatnonzero(~terminals)
    if not len(rows):
        raise ValueError("dataset is empty: every row is the last state of a trajectory.")
    return rows


def transition_columns(dataset: Mapping[str, np.ndarray], rows: np.ndarray) -> dict:
    """What all tasks of an environment share, as functions so that each is made when needed."""
    num_rows = len(dataset["terminals"])
    observations = _checked_floats(dataset, "observations", 2, num_rows)
    actions = _checked_actions(dataset, num_rows)
    episode = np.cumsum(np.asarray(dataset["terminals"], dtype=np.int64))
    flags = np.zeros((len(rows), 1), dtype=bool)
    return {
        "observation": lambda: observations[rows],
        "action": lambda: actions[rows],
        "episode": lambda: episode[rows],
        "done": lambda: flags,
        "terminated": lambda: flags.copy(),
        "truncated": lambda: flags.copy(),
        ("next", "observation"): lambda: observations[rows + 1],
        ("next", "action"): lambda: actions[rows + 1],
    }


def outcome_columns(dataset: Mapping[str, np.ndarray], rows: np.ndarray) -> dict:
    """What depends on the task: rewards and ends, each ``[N, 1]``."""
    num_rows = len(dataset["terminals"])
    reward = _checked_floats(dataset, "rewards", 1, num_rows)[rows]
    masks = _checked_flags("masks", _checked_floats(dataset, "masks", 1, num_rows))
    boundary = np.asarray(dataset["terminals"], dtype=bool)[rows + 1]
    terminated = ~masks[rows]
    columns = {
        "reward": reward,
        "terminated": terminated,
        "truncated": boundary & ~terminated,
        "done": boundary | terminated,
    }
    return {("next", key): column[:, None] for key, column in columns.items()}


def open_npz(path: Path, required: tuple[str, ...]) -> np.lib.npyio.NpzFile:
    """Opens an OGBench file without executing pickled code.

    Args:
        path (Path): the file.
        required (tuple of str): arrays that must be in it.

    Returns:
        NpzFile: arrays are read when they are asked for.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is no complete zip archive of arrays.
        KeyError: if a required array is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The OGBench data file {path} does not exist.")
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is not a complete npz archive: truncated, or no "
            f"OGBench data file. Delete it and get it again."
        )
    file = np.load(path, allow_pickle=False)
    missing = [key for key in required if key not in file.files]
    if missing:
        raise KeyError(f"{path} lacks the arrays {missing}; it has {sorted(file.files)}.")
    return file


def read_array(file: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    """One array of an npz file, with a readable error for damaged and pickled ones."""
    try:
        return file[key]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"The array {key!r} of the npz file is damaged: {error}.") from error
    except ValueError as error:
        raise TypeError(
            f"The array {key!r} of the npz file is no plain numeric array: {error}"
        ) from error


def label_rewards(arrays: Mapping[str, np.ndarray], env_id: str, *, sparse: bool = False) -> dict:
    """Rewards and masks of a single task, by OGBench's own relabelling.

    The reward of a transition is a function of the state *before* the step.

    Args:
        arrays (mapping): ``"qpos"`` and, where the environment has buttons, ``"button_states"``.
        env_id (str): the single-task environment, ``"cube-single-singletask-task1-v0"``.
        sparse (bool, optional): -1 until everything is in place, instead of minus the number of
            things that are not.

    Returns:
        dict: ``"rewards"`` and ``"masks"``, float32 ``[R]``.

    Raises:
        ValueError: if an array has the wrong shape or holds NaN, or is of another environment.
    """
    if not _has_ogbench:
        raise ImportError("Rewards are computed by the ogbench package: pip install ogbench==1.2.2")
    import gymnasium
    import ogbench.relabel_utils

    arrays = dict(arrays)
    num_rows = len(arrays["terminals"]) if "terminals" in arrays else len(arrays["qpos"])
    _checked_floats(arrays, "qpos", 2, num_rows)
    if "button_states" in arrays:
        buttons = _read(arrays, "button_states", 2)
        if len(buttons) != num_rows:
            raise ValueError(f"'button_states' must have {num_rows} rows, got {len(buttons)}.")
    env = gymnasium.make(env_id, disable_env_checker=True)
    try:
        with numpy_seed(0):
            env.reset()
        expected, width = env.unwrapped.model.nq, arrays["qpos"].shape[1]
        if width != expected:
            raise ValueError(
                f"'qpos' must have the {expected} columns of {env_id}, got {width}: "
                "is the file of another environment?"
            )
        if buttons := getattr(env.unwrapped, "_num_buttons", 0):
            states = _read(arrays, "button_states", 2)
            if states.shape[1] != buttons or not np.isfinite(states).all():
                raise ValueError(
                    f"'button_states' of {env_id} must be finite, of shape {(num_rows, buttons)}, "
                    f"got shape {states.shape}."
                )
        with numpy_seed(0):  # the reset that sets the task draws from numpy's global generator
            ogbench.relabel_utils.relabel_dataset(env_id, env, arrays)
    finally:
        env.close()
    rewards = -arrays["masks"] if sparse else arrays["rewards"]
    return {"rewards": rewards, "masks": arrays["masks"]}


def _read(dataset, key, ndim) -> np.ndarray:
    if key not in dataset:
        raise KeyError(f"dataset lacks the array {key!r}; it has {sorted(dataset)}.")
    array = np.asarray(dataset[key])
    if array.ndim != ndim:
        raise ValueError(f"{key!r} must have {ndim} dimension(s), got shape {array.shape}.")
    return array


def _checked_floats(dataset, key, ndim, num_rows) -> np.ndarray:
    array = _read(dataset, key, ndim)
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"{key!r} must be floating point, got dtype {array.dtype}.")
    if len(array) != num_rows:
        raise ValueError(
            f"{key!r} must have as many rows as 'terminals' ({num_rows}), got {len(array)}."
        )
    # The sum is NaN or infinite if an entry is: no array of booleans is needed for good data.
    if not np.isfinite(array.sum(dtype=np.float64)) and not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array.reshape(num_rows, -1)).all(-1))[0])
        raise ValueError(f"{key!r} must be finite, got {array[row]} in row {row}.")
    return array.astype(np.float32, copy=False)


def _checked_actions(dataset, num_rows) -> np.ndarray:
    actions = _checked_floats(dataset, "actions", 2, num_rows)
    if not actions.shape[1]:
        raise ValueError(f"'actions' must have at least one column, got shape {actions.shape}.")
    excess = max(float(actions.max()), -float(actions.min()))
    if excess > 1 + _ACTION_EXCESS:
        raise ValueError(f"'actions' must lie in [-1, 1], got an entry of magnitude {excess}.")
    return actions.clip(-1 + _ACTION_MARGIN, 1 - _ACTION_MARGIN)


def _checked_flags(key, array) -> np.ndarray:
    if array.dtype == bool:
        return array
    if not (np.issubdtype(array.dtype, np.number) and ((array == 0) | (array == 1)).all()):
        raise TypeError(f"{key!r} must be boolean or hold only 0 and 1, got dtype {array.dtype}.")
    return array.astype(bool)

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""n-step and action-chunk windows over flat trajectories."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data.replay_buffers import TensorStorage

_PIECE = 2**17  # transitions that are worked on at once, about


@dataclasses.dataclass(frozen=True)
class Windows:
    """Where the windows of a data set start and end, and what they earn.

    Args:
        start (Tensor): int64 ``[W]``, first transition.
        end (Tensor): int64 ``[W]``, last transition, included.
        reward (Tensor): float32 ``[W]``, sum of ``gamma**k * r`` over the window.
        terminated (Tensor): bool ``[W]``, the window ends in a terminal.
        done (Tensor): bool ``[W]``, it ends in a terminal or with its trajectory.
        last (Tensor, optional): int64 ``[W]``, last transition of its trajectory.
    """

    start: torch.Tensor
    end: torch.Tensor
    reward: torch.Tensor
    terminated: torch.Tensor
    done: torch.Tensor
    last: torch.Tensor | None


def discounted_sums(reward: np.ndarray, steps: np.ndarray, gamma: float) -> np.ndarray:
    """Sums ``gamma**k * reward[t + k]`` over ``k < steps[t]``, for every t.

    Sums over powers of two are built by doubling and put together from the bits of ``steps``:
    log2(max(steps)) passes, and only additions, so that nothing cancels as it does between
    prefix sums.

    Args:
        reward (array): ``[N]``.
        steps (array): int ``[N]``, at least 0, with ``t + steps[t] <= N``.
        gamma (float): the discount in [0, 1].

    Returns:
        array: float64 ``[N]``.

    Examples:
        >>> discounted_sums(np.array([1.0, 2.0, 4.0]), np.array([3, 1, 0]), 0.5)
        array([3., 2., 0.])
    """
    block = np.asarray(reward, dtype=np.float64)  # sums over 2**bit steps
    total, offset = np.zeros_like(block), np.zeros_like(steps)
    for bit in range(int(steps.max(initial=0)).bit_length()):
        chosen = np.flatnonzero(steps >> bit & 1)
        past = offset[chosen]
        total[chosen] += gamma**past * block[chosen + past]
        offset[chosen] = past + (1 << bit)
        # Blocks that would leave the array are never chosen and may stay as they are.
        block[: -(1 << bit)] = block[: -(1 << bit)] + gamma ** (1 << bit) * block[1 << bit :]
    return total


def next_true(flags: np.ndarray) -> np.ndarray:
    """Index of the first true entry at or after each position; ``len(flags)`` where none is."""
    size = len(flags)
    index = np.where(flags, np.arange(size), size)
    return np.minimum.accumulate(index[::-1])[::-1]


def make_windows(data: TensorDict, n_step: int, chunk_size: int, gamma: float) -> Windows:
    """Lays one window at every transition that can have one.

    A window covers ``n_step`` chunks of ``chunk_size`` steps. It stops at the first terminal.
    Otherwise it stops, at the latest, where a whole next chunk of actions still follows in the
    trajectory (for ``chunk_size=1``: at the trajectory's end, because the last state's action
    is known). Transitions whose own chunk is incomplete, or with no whole next chunk and no
    terminal, have no window.

    Args:
        data (TensorDict): in TED layout, trajectories contiguous and numbered by ``episode``.
        n_step (int): length in chunks; more than a trajectory has means its rest.
        chunk_size (int): actions per decision.
        gamma (float): the discount per step.

    Returns:
        Windows: sorted by their start.

    Raises:
        ValueError: if a number is out of range, a trajectory lies in several pieces, or a
            transition has several rewards.
        KeyError: if ``data`` lacks an entry, naming it.
    """
    check_windows(n_step, chunk_size, gamma)
    _check_entries(data, ("episode", ("next", "reward"), ("next", "terminated")))
    episode = data["episode"].numpy()
    num_pieces = np.count_nonzero(_is_last(episode))
    if num_pieces != len(np.unique(episode)):
        raise ValueError(
            f"episode must number whole trajectories, got {len(np.unique(episode))} numbers in "
            f"{num_pieces} pieces."
        )
    terminal, reward = (data["next", name].numpy().ravel() for name in ("terminated", "reward"))
    for name, column in (("terminated", terminal), ("reward", reward)):
        if len(column) != len(episode):
            raise ValueError(
                f"('next', {name!r}) must have one number for each of {len(episode)} transitions, "
                f"got the shape {tuple(data['next', name].shape)}."
            )
    # Filled piece by piece, so that nothing is held twice; pages that stay empty cost nothing.
    types = (np.int64, np.int64, np.float32, bool, bool, np.int64)
    columns = [np.empty(len(episode), dtype) for dtype in types]
    count = 0
    for piece in _pieces(episode):
        inputs = (column[piece] for column in (episode, terminal, reward))
        parts = _windows_of(*inputs, n_step, chunk_size, gamma)
        for index in (parts[0], parts[1], parts[-1]):
            index += piece.start
        filled = slice(count, count + len(parts[0]))
        for column, part in zip(columns, parts):
            column[filled] = part
        count = filled.stop
    return Windows(*(torch.from_numpy(column[:count]) for column in columns))


def check_counts(**counts) -> None:
    """Raises a ValueError that names a count which is no integer of at least 1."""
    for argument, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{argument} must be an integer >= 1, got {value!r}.")


def check_windows(n_step: int, chunk_size: int, gamma: float) -> None:
    """Raises a ValueError that names what of a window's shape is out of range."""
    check_counts(n_step=n_step, chunk_size=chunk_size)
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma!r}.")


def _check_entries(data: TensorDict, keys) -> None:
    for key in keys:
        if data.get(key, None) is None:
            raise KeyError(
                f"data must have the entry {key!r}, got {sorted(map(str, data.keys(True, True)))}."
            )


def _is_last(episode: np.ndarray) -> np.ndarray:
    """Marks the last transition of each trajectory."""
    return np.append(episode[1:] != episode[:-1], True)


def _pieces(episode: np.ndarray) -> list[slice]:
    """Slices of whole trajectories, so that what is only computed on the way stays small."""
    ends = np.flatnonzero(_is_last(episode)) + 1
    cuts = np.unique(ends[np.searchsorted(ends, np.arange(_PIECE, len(episode), _PIECE))])
    edges = [0, *cuts[cuts < len(episode)].tolist(), len(episode)]
    return [slice(first, stop) for first, stop in zip(edges[:-1], edges[1:])]


def _windows_of(episode, terminal, reward, n_step, chunk_size, gamma) -> tuple[np.ndarray, ...]:
    """The columns of :class:`Windows` for some whole trajectories, indices from 0 on."""
    start = np.arange(len(episode))
    last = next_true(_is_last(episode))
    end = np.minimum(start + min(n_step * chunk_size, len(start)) - 1, last)
    first_terminal = next_true(terminal)
    terminated = first_terminal <= end
    end = np.where(terminated, first_terminal, np.minimum(end, last - (chunk_size - 1)))
    own_end = start + chunk_size - 1
    valid = (own_end <= last) & (terminated | (own_end <= end))
    steps = np.where(valid, end - start + 1, 0)
    total = discounted_sums(reward, steps, gamma).astype(np.float32)
    kept = np.flatnonzero(valid)
    columns = (start, end, total, terminated, terminated | (end == last), last)
    return tuple(column[kept] for column in columns)


def gather_chunks(
    action: torch.Tensor, first: torch.Tensor, chunk_size: int, last: torch.Tensor | None = None
) -> torch.Tensor:
    """Actions of ``chunk_size`` rows from ``first`` on, flattened.

    Only behind a terminal, where nothing is bootstrapped, can the next chunk run out of its
    trajectory; the last action is repeated then.

    Args:
        action (Tensor): ``[N, act]``.
        first (Tensor): rows, integers ``[*B]``.
        chunk_size (int): actions per decision.
        last (Tensor, optional): last rows that may be read, ``[*B]``. Defaults to that of all.

    Returns:
        Tensor: ``[*B, chunk_size * act]``.
    """
    if chunk_size == 1:
        return action[first]
    rows = first.unsqueeze(-1) + torch.arange(chunk_size, device=first.device)
    if last is None:
        rows = rows.clamp_max(len(action) - 1)
    else:
        rows = torch.minimum(rows, last.unsqueeze(-1))
    return action[rows].flatten(-2)


def empirical_returns(data: TensorDict, gamma: float) -> torch.Tensor:
    """Discounted return of the data from every transition on.

    It ends at a terminal. Where a trajectory ends first, its future is unknown, and is taken to
    earn the mean reward of the data at every further step (nothing, if ``gamma`` is 1).

    Args:
        data (TensorDict): in TED layout.
        gamma (float): the discount per step.

    Returns:
        Tensor: float64 ``[N]``.
    """
    episode = data["episode"].numpy()
    reward = data["next", "reward"].numpy().ravel()
    terminal = data["next", "terminated"].numpy().ravel()
    tail = reward.mean(dtype=np.float64) / (1 - gamma) if gamma < 1 else 0.0
    returns = np.empty(len(reward))
    for piece in _pieces(episode):
        last = next_true(_is_last(episode[piece]))
        first_terminal = next_true(terminal[piece])
        steps = np.minimum(last, first_terminal) - np.arange(len(last)) + 1
        unknown = np.where(first_terminal <= last, 0.0, gamma**steps * tail)
        returns[piece] = discounted_sums(reward[piece], steps, gamma) + unknown
    return torch.from_numpy(returns)


class WindowStorage(TensorStorage):
    """A read-only storage whose items are windows over a TED TensorDict.

    A sample costs one gather of the rows where windows start and one where they end; rewards
    were summed once, when the storage was made.

    Args:
        data (TensorDict): transitions in TED layout, batch size ``[N]``.
        n_step (int): length of a window in chunks.
        chunk_size (int): actions per decision.
        gamma (float): the discount per step.
        device (torch.device, optional): where the data lie and samples are made.

    Items are copies: what is done to them does not reach the data, nor their file.

    Attributes:
        candidates (Tensor or None): ``[N, P, act]``, actions to choose from at the state behind
            each transition; where they are given, items hold them as ``("next", "candidates")``.
    """

    def __init__(self, data, *, n_step=1, chunk_size=1, gamma=0.99, device="cpu"):
        _check_entries(data, _COLUMNS)
        windows = make_windows(data, n_step, chunk_size, gamma)
        if not len(windows.start):
            raise ValueError(
                f"chunk_size={chunk_size} leaves no window: no trajectory has {2 * chunk_size - 1} "
                f"transitions or reaches a terminal."
            )
        if torch.device(device).type != "cpu":
            data = data.to(device)
        super().__init__(data, device=device)
        self._len = len(windows.start)
        self.max_size = len(windows.start)
        self.n_step, self.chunk_size, self.gamma = n_step, chunk_size, gamma
        self.candidates = None
        # Plain views: indexing a memory-mapped tensor subclass costs several times as much.
        self._columns = {key: _plain(data[key]) for key in _COLUMNS}
        if chunk_size == 1:  # only longer chunks can run out of their trajectory
            windows = dataclasses.replace(windows, last=None)
        columns = vars(windows).items()
        self._windows = Windows(**{key: x if x is None else x.to(device) for key, x in columns})

    @property
    def shape(self):
        return torch.Size([self._len])

    def get(self, index) -> TensorDict:
        """The windows at ``index`` (int, slice, list or tensor), in TED layout."""
        windows = self._windows
        if isinstance(index, tuple):
            (index,) = index
        if isinstance(index, slice):
            index = range(*index.indices(len(self)))
        index = torch.as_tensor(index, device=windows.start.device)
        if not index.numel() and index.dtype != torch.bool:  # a list of nothing has no integers
            index = index.long()
        if not index.ndim:  # which would select views
            return self.get(index.unsqueeze(0))[0]
        start, end = windows.start[index], windows.end[index]
        last = None if windows.last is None else windows.last[index]
        columns = self._columns
        flags = torch.zeros((*start.shape, 1), dtype=torch.bool, device=start.device)
        terminated = windows.terminated[index].unsqueeze(-1)
        done = windows.done[index].unsqueeze(-1)
        following = {
            "observation": columns["next", "observation"][end],
            "action": gather_chunks(columns["next", "action"], end, self.chunk_size, last),
            "reward": windows.reward[index].unsqueeze(-1),
            "terminated": terminated,
            "truncated": done & ~terminated,
            "done": done,
        }
        if self.candidates is not None:
            following["candidates"] = self.candidates[end]
        sample = {
            "observation": columns["observation"][start],
            "action": gather_chunks(columns["action"], start, self.chunk_size, last),
            "episode": columns["episode"][start],
            "steps_to_next_obs": (end - start + 1).unsqueeze(-1),
            "done": flags,
            "terminated": flags.clone(),
            "truncated": flags.clone(),
            "next": _tensordict(following, start),
        }
        return _tensordict(sample, start)

    def set(self, *args, **kwargs):
        raise RuntimeError("An OGBench data set cannot be written to.")

    # The data are on disk already: checkpoints of a buffer do not copy them.
    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state_dict: dict) -> None:
        return None

    def dumps(self, path) -> None:
        return None

    def loads(self, path) -> None:
        return None


_COLUMNS = ("observation", "action", "episode", ("next", "observation"), ("next", "action"))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(torch.Tensor)


def _tensordict(items: dict, like: torch.Tensor) -> TensorDict:
    # Built without the checks: all tensors were just made with this batch shape.
    return TensorDict._new_unsafe(items, batch_size=like.shape, device=like.device)

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""OGBench's single-task data sets as TorchRL replay buffers."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data.datasets.common import BaseDatasetExperienceReplay
from torchrl.data.datasets.utils import _get_root_dir, register_dataset
from torchrl.data.replay_buffers import (
    ImmutableDatasetWriter,
    Sampler,
    TensorDictReplayBuffer,
    TensorStorage,
    Writer,
)
from torchrl.data.utils import DEVICE_TYPING
from torchrl.envs.transforms import Transform

from torchrl_evor.data.datasets._candidates import sample_candidates
from torchrl_evor.data.datasets._ogbench_arrays import ogbench_arrays_to_tensordict
from torchrl_evor.data.datasets._ogbench_cache import (
    fingerprint,
    load_dataset_memmap,
    write_outcomes,
    write_transitions,
)
from torchrl_evor.data.datasets._ogbench_download import download_npz
from torchrl_evor.data.datasets._ogbench_names import SINGLE_TASKS, parse_task_name
from torchrl_evor.data.datasets._ogbench_windows import (
    WindowStorage,
    check_counts,
    check_windows,
    empirical_returns,
)
from torchrl_evor.data.datasets.ogbench_scripted import collect_ogbench

_has_ogbench = importlib.util.find_spec("ogbench") is not None

__all__ = ["OGBenchExperienceReplay", "ogbench_arrays_to_tensordict"]


class OGBenchExperienceReplay(BaseDatasetExperienceReplay):
    """A state-based, single-task OGBench data set.

    *OGBench: Benchmarking Offline Goal-Conditioned RL* (https://arxiv.org/abs/2410.20092).
    Rewards are OGBench's own: they belong to the state *before* a step, and an environment's five
    tasks share their trajectories. The data are kept in TED layout, memory-mapped.

    Samples are windows of ``n_step`` chunks of ``chunk_size`` actions. A window never leaves
    its trajectory; it stops at the first terminal, and it is shorter than asked for where its
    trajectory ends. With B the batch size:

    - ``observation`` ``[B, obs]``, ``action`` ``[B, chunk_size * act]`` (flattened, in order),
      ``episode`` ``[B]``;
    - ``steps_to_next_obs`` ``[B, 1]``: environment steps in the window (int64). The return that
      is bootstrapped is discounted by ``gamma ** steps_to_next_obs``;
    - ``("next", "reward")`` ``[B, 1]``: ``sum(gamma**k * r_k)`` over the window;
    - ``("next", "observation")``: the state that the window reaches;
    - ``("next", "action")``: what the data do there, the whole next chunk. It exists for every
      window: OGBench's files hold an action for the last state of a trajectory, and windows of
      chunks stop where a whole next chunk still follows. (Behind a terminal, where nothing is
      bootstrapped, the trajectory's last action may be repeated.);
    - ``("next", "terminated")``: the window ends in a terminal; ``("next", "truncated")``: it
      ends with its trajectory; ``("next", "done")``: either.

    Transitions whose chunk, or the next one, would leave the trajectory are not sampled
    (the last ``2 * chunk_size - 2`` of each trajectory, unless a terminal comes first; none for
    ``chunk_size=1``). ``len(data)`` counts windows.

    Args:
        dataset_id (str): ``"<scene>-<kind>-singletask-v0"`` for the default task, or
            ``"<scene>-<kind>-singletask-task<1..5>-v0"``; see :attr:`available_datasets`.
        batch_size (int, optional): windows per sample. Defaults to 256.

    Keyword Args:
        n_step (int, optional): chunks per window. Defaults to 1.
        chunk_size (int, optional): actions per decision. Defaults to 1.
        gamma (float, optional): discount per environment step, within a window and in
            :meth:`return_statistics`. Defaults to 0.99.
        source (str, optional): ``"auto"`` (the cache, else the official file is downloaded) or
            ``"local"`` (collected on this machine with OGBench's own scripted controllers, see
            :func:`collect_ogbench`).
        root (path-like, optional): the cache. Defaults to ``~/.cache/torchrl/ogbench``.
        directory (path-like, optional): a folder that holds the official files,
            ``<scene>-<kind>-v0.npz`` and ``...-val.npz``; nothing is downloaded then.
        download (bool or "force", optional): ``False`` only uses what is in the cache;
            ``"force"`` gets and converts everything again. Defaults to ``True``.
        split (str, optional): ``"train"`` or ``"val"``.
        reward_type (str, optional): ``"default"`` (minus the number of things not yet in
            place) or ``"sparse"`` (-1 until everything is, 0 then). They differ where there are
            several things: cube double and more, scene, puzzle.
        num_transitions (int, optional): size of a local collection (its ``"val"`` has a
            tenth of it); the official size by default. Only for ``source="local"``.
        seed (int, optional): seed of a local collection, for which it defaults to 0.
        num_workers (int, optional): processes of a local collection.
        device (torch.device, optional): where the data lie. Defaults to ``"cpu"``; another
            device holds a copy of them.
        sampler (Sampler, optional): defaults to a :class:`~torchrl.data.RandomSampler`. TorchRL's
            slice samplers read whole columns: give them ``cache_values=True``.
        writer (Writer, optional): defaults to an immutable one.
        collate_fn (callable, optional): see :class:`~torchrl.data.TensorDictReplayBuffer`.
        pin_memory (bool, optional): see there.
        prefetch (int, optional): see there.
        transform (Transform, optional): see there.

    Raises:
        ValueError: for an unknown name (the nearest are suggested), an argument out of range,
            damaged or inconsistent data.
        FileNotFoundError: if ``download=False`` and the cache, or ``directory``, lacks the file.
        ConnectionError: if the download fails.

    Examples:
        >>> from torchrl_evor.data import OGBenchExperienceReplay
        >>> data = OGBenchExperienceReplay(
        ...     "pointmaze-medium-navigate-singletask-task1-v0", batch_size=32, n_step=300,
        ...     gamma=0.995, source="local", num_transitions=300_000)  # doctest: +SKIP
        >>> data.sample()["next", "observation"].shape  # doctest: +SKIP
        torch.Size([32, 2])
    """

    available_datasets = SINGLE_TASKS

    def __init__(
        self,
        dataset_id: str,
        batch_size: int = 256,
        *,
        n_step: int = 1,
        chunk_size: int = 1,
        gamma: float = 0.99,
        source: Literal["auto", "local"] = "auto",
        root: str | Path | None = None,
        directory: str | Path | None = None,
        download: bool | Literal["force"] = True,
        split: Literal["train", "val"] = "train",
        reward_type: Literal["default", "sparse"] = "default",
        num_transitions: int | None = None,
        seed: int | None = None,
        num_workers: int | None = None,
        device: DEVICE_TYPING = "cpu",
        sampler: Sampler | None = None,
        writer: Writer | None = None,
        collate_fn: Callable | None = None,
        pin_memory: bool = False,
        prefetch: int | None = None,
        transform: Transform | None = None,
    ):
        self._name = parse_task_name(dataset_id)
        _check_choice("source", source, ("auto", "local"))
        _check_choice("split", split, ("train", "val"))
        _check_choice("reward_type", reward_type, ("default", "sparse"))
        _check_choice("download", download, (True, False, "force"))
        check_counts(batch_size=batch_size)
        check_windows(n_step, chunk_size, gamma)
        collection = {"num_transitions": num_transitions, "seed": seed, "num_workers": num_workers}
        _check_sources(source, directory, collection)
        self.dataset_id = dataset_id
        self.root = Path(root if root is not None else _get_root_dir("ogbench")).expanduser()
        self.directory = None if directory is None else Path(directory).expanduser()
        self.split, self.source, self.reward_type = split, source, reward_type
        self.n_step, self.chunk_size, self.gamma = n_step, chunk_size, gamma
        self._collection = {"seed": 0 if seed is None else seed, "num_workers": num_workers}
        self._num_transitions = num_transitions
        self._prepare(download)
        try:
            self._data = load_dataset_memmap(self._transitions_path, self.data_path)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(
                f"The cache is damaged ({error}) Delete {self.data_path_root / self.split}: it is "
                f"then made again from the npz file."
            ) from error
        storage = WindowStorage(
            self._data, n_step=n_step, chunk_size=chunk_size, gamma=gamma, device=device
        )
        super().__init__(
            batch_size=batch_size,
            storage=storage,
            sampler=sampler,
            writer=writer if writer is not None else ImmutableDatasetWriter(),
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            prefetch=prefetch,
            transform=transform,
        )

    @property
    def transitions(self) -> TensorDict:
        """All transitions in TED layout, batch size ``[N]``, memory-mapped.

        To be read: an operation in place on one of its tensors writes to the cache on disk.
        """
        return self._data

    @property
    def data_path_root(self) -> Path:
        """The cache of this data file: both splits, all tasks, and the npz files if ours."""
        return self.root / self.origin / self._name.file.name

    @property
    def data_path(self) -> Path:
        """This task's rewards and ends; what tasks share lies beside it."""
        suffix = "-sparse" if self.reward_type == "sparse" else ""
        return self.data_path_root / self.split / f"{self._name.task}{suffix}"

    @property
    def _transitions_path(self) -> Path:
        return self.data_path_root / self.split / "transitions"

    @functools.cached_property  # that of the file that was read, whatever becomes of it later
    def origin(self) -> str:
        """Where the data come from; names the folder that keeps them apart from others.

        ``"official"``, ``"local-seed<seed>-<transitions>"`` or ``"directory-<fingerprint>"``.
        """
        if self.directory is not None:
            return f"directory-{fingerprint(self._npz_path)}"
        if self.source == "local":
            size = "official" if self._num_transitions is None else self._num_transitions
            return f"local-seed{self._collection['seed']}-{size}"
        return "official"

    @property
    def _npz_path(self) -> Path:
        name = self._name.file.npz_name(self.split)
        if self.directory is None:
            return self.data_path_root / name
        path = self.directory / name
        if not path.is_file():
            raise FileNotFoundError(f"directory={str(self.directory)!r} has no file {name!r}.")
        return path

    def _is_downloaded(self) -> bool:
        return self.data_path.exists() and self._transitions_path.exists()

    def _prepare(self, download) -> None:
        """Makes sure that the memory-mapped data are there."""
        if download != "force" and self._is_downloaded():
            return
        self.data_path.parent.mkdir(parents=True, exist_ok=True)
        # One process collects, downloads or converts; others wait and find the result.
        with FileLock(str(self.data_path_root) + ".lock"):
            if download == "force":
                self._renew()
            if not self._is_downloaded():
                self._obtain(download, self._npz_path)
                self._convert()

    def _renew(self) -> None:
        """Gets the npz file again, if it is ours; what there is stays until it has come."""
        if self.directory is not None:
            self._forget()
            return
        fresh = self.data_path_root / ".new"
        fresh.mkdir(exist_ok=True)
        self._obtain(True, fresh / self._npz_path.name)
        self._forget()
        for path in fresh.iterdir():
            os.replace(path, self.data_path_root / path.name)
        fresh.rmdir()

    def _forget(self) -> None:
        # Renamed first: whoever looks finds all of it or nothing.
        folder = self.data_path_root / self.split
        old = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder, old)
        shutil.rmtree(old, ignore_errors=True)
        self.data_path.parent.mkdir(parents=True)

    def _obtain(self, download, path: Path) -> None:
        """Makes sure that the npz file is there."""
        if path.exists():
            return
        if not download:
            raise FileNotFoundError(
                f"{self.dataset_id} ({self.split}) is not in the cache {self.data_path_root}, and "
                f"download=False forbids to get it."
            )
        if self.source == "local":
            size = self._num_transitions
            if size is not None and self.split == "val":
                size = max(1, size // 10)
            collect_ogbench(self._name.file.name, path, size, split=self.split, **self._collection)
        else:
            download_npz(f"{_dataset_url()}/{path.name}", path)

    def _convert(self) -> None:
        if not self._transitions_path.exists():
            write_transitions(self._npz_path, self._transitions_path)
        if not self.data_path.exists():
            write_outcomes(
                self._npz_path,
                self.data_path,
                self._name.env_id,
                sparse=self.reward_type == "sparse",
            )

    def preprocess(self, fn: Callable[[TensorDictBase], TensorDictBase], *args, **kwargs):
        """Maps ``fn`` over the single transitions (windows are only laid when sampling).

        Takes the arguments of :meth:`BaseDatasetExperienceReplay.preprocess` and returns, as it
        does, a new :class:`~torchrl.data.TensorStorage`. ``fn`` gets copies.
        """
        transitions = TensorDictReplayBuffer(storage=TensorStorage(self._data))
        on_copy = functools.partial(_on_copy, fn)
        return BaseDatasetExperienceReplay.preprocess(transitions, on_copy, *args, **kwargs)

    def keep_candidates(self, policy: Callable[[Tensor], Tensor], num_candidates: int) -> None:
        """Draws candidates of a policy at every next state; samples hold them from now on.

        Losses that choose among candidates at the next state, :class:`~torchrl_evor.EVORLoss`
        with ``next_action="improved"`` and :class:`~torchrl_evor.QCLoss`, take them from
        ``("next", "candidates")``, ``[batch, num_candidates, act]``, and are spared the samples of
        every update. For a policy that is trained no more; drawn again when called again. They
        lie in memory, on the device of the data, and are part of no checkpoint.

        Args:
            policy (Callable): maps observations to random actions, on the device of the data; see
                :func:`~torchrl_evor.data.sample_candidates`.
            num_candidates (int): actions for each state, as many as the loss is made with.

        Raises:
            ValueError: if ``num_candidates`` is no integer of at least 1, or actions are not of
                the size of the data's, a whole chunk.
            RuntimeError: if the buffer has transforms: they may change observations, and the
                policy is asked at those of the data. Append them afterwards.
        """
        if len(self._transform):
            raise RuntimeError(
                f"keep_candidates asks the policy at the observations of the data: call it before "
                f"transforms are appended, got a buffer with {len(self._transform)}."
            )
        observation = self.transitions["next", "observation"].as_subclass(Tensor)
        observation = observation.to(self._storage.device)
        candidates = sample_candidates(policy, observation, num_candidates)
        shape = (*candidates.shape[:2], self.chunk_size * self.transitions["action"].shape[-1])
        if candidates.shape != shape:
            raise ValueError(
                f"policy must return chunks of {self.chunk_size} actions, {shape}, got "
                f"{tuple(candidates.shape)}."
            )
        self._storage.candidates = candidates

    def empirical_returns(self, gamma: float | None = None) -> torch.Tensor:
        """Discounted return that the data earn from every transition on.

        A terminal ends a return. Where a trajectory ends first, the unknown future is taken to
        earn the data's mean reward at every step (nothing, if ``gamma`` is 1).

        Args:
            gamma (float, optional): the discount per step; the data set's by default.

        Returns:
            Tensor: float64 ``[N]``, in the order of the file, for each transition (also those
            that start no window).
        """
        gamma = self.gamma if gamma is None else gamma
        check_windows(1, 1, gamma)
        return empirical_returns(self._data, gamma)

    def return_statistics(self, gamma: float | None = None) -> tuple[float, float]:
        """Location and scale of the data's returns, for ``ReturnFlow(loc=..., scale=...)``.

        Args:
            gamma (float, optional): the discount per step; the data set's by default.

        Returns:
            tuple: mean and standard deviation of :meth:`empirical_returns`, in reward units.
            The scale is 1 if all returns are the same (a task that the data never solve).
        """
        returns = self.empirical_returns(gamma)
        loc, scale = returns.mean().item(), returns.std(correction=0).item()
        return loc, scale if scale > 1e-6 * max(1.0, abs(loc)) else 1.0

    def return_bounds(self, gamma: float | None = None, slack: float = 0.0) -> tuple[float, float]:
        """Least and greatest return of rewards like the data's, for :class:`EVORLoss`.

        Args:
            gamma (float, optional): the discount per step, below 1; the data set's by default.
            slack (float, optional): share of their distance by which either is moved out.
                Without it, errors of a network are cut off on one side only where returns lie
                at a bound, which is a bias. Defaults to 0.

        Returns:
            tuple: in reward units; a single reward, or the same one for ever, whichever is further
            out.

        Raises:
            ValueError: if ``gamma`` is not between 0 and 1, where sums have no bound, or
                ``slack`` is negative.
        """
        gamma = self.gamma if gamma is None else gamma
        if not 0 <= gamma < 1:
            raise ValueError(f"gamma must be at least 0 and below 1, got {gamma!r}.")
        if not slack >= 0:
            raise ValueError(f"slack must be at least 0, got {slack!r}.")
        reward = self.transitions["next", "reward"]
        low, high = reward.min().item(), reward.max().item()
        low, high = min(low, low / (1 - gamma)), max(high, high / (1 - gamma))
        room = slack * (high - low)
        return low - room, high + room

    def observation_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the observations, for ``VelocityMLP.standardize_inputs_``.

        Returns:
            tuple: two float32 tensors ``[observation]``, in the units of the observation. The
            deviation is 1 where an observation never changes.
        """
        observation = self.transitions["observation"]
        deviation, mean = torch.std_mean(observation, 0, correction=0)
        return mean, torch.where(deviation > 1e-6 * mean.abs().clamp_min(1.0), deviation, 1.0)


def _dataset_url() -> str:
    if not _has_ogbench:
        raise ImportError("The download address comes from the ogbench package: pip install it.")
    import ogbench.utils

    return ogbench.utils.DATASET_URL


def _on_copy(fn, rows: TensorDictBase) -> TensorDictBase:
    return fn(rows.clone())


def _check_choice(argument, value, allowed) -> None:
    if not any(value is a or (isinstance(a, str) and value == a) for a in allowed):
        raise ValueError(f"{argument} must be one of {allowed}, got {value!r}.")


def _check_sources(source, directory, collection: dict) -> None:
    if source == "local" and directory is not None:
        raise ValueError(
            "source='local' collects its own data: directory must not be given with it "
            "(root names the place of the cache)."
        )
    if collection["num_transitions"] is not None:
        check_counts(num_transitions=collection["num_transitions"])
    for argument, value in collection.items():
        if source != "local" and value is not None:
            raise ValueError(
                f"{argument}={value!r} belongs to a local collection: it needs source='local', "
                f"got source={source!r}."
            )


register_dataset("ogbench", "torchrl_evor.data:OGBenchExperienceReplay", replace=True)

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Collects OGBench data sets on this machine, with OGBench's own scripted controllers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import traceback
import types
from pathlib import Path
from typing import Literal

import numpy as np
from filelock import FileLock
from torchrl._utils import logger as torchrl_logger

from torchrl_evor.data.datasets._ogbench_arrays import open_npz, read_array
from torchrl_evor.data.datasets._ogbench_episodes import Behaviour, make_episode_source
from torchrl_evor.data.datasets._ogbench_names import OGBenchFile, parse_file_name

_has_tqdm = importlib.util.find_spec("tqdm") is not None

# Families whose behaviour policy is a script; the others walk with a trained network.
_SCRIPTED = {
    "pointmaze": ("navigate", "stitch"),
    "cube": ("play", "noisy"),
    "scene": ("play", "noisy"),
    "puzzle": ("play", "noisy"),
}
# Work is saved every so many transitions: at worst, this much is lost by an interrupt.
_SHARD_TRANSITIONS = 10_000
_SPLITS = ("train", "val")


def collect_ogbench(
    dataset_id: str,
    path: str | os.PathLike,
    num_transitions: int | None = None,
    *,
    seed: int = 0,
    split: Literal["train", "val"] = "train",
    num_workers: int | None = None,
    noise: float | None = None,
    p_random_action: float | None = None,
    episode_length: int | None = None,
    action_noise: float = 0.0,
    progress: bool = True,
) -> Path:
    """Collects one OGBench data file with OGBench's own scripted controllers.

    The file has the format of the official ones (``observations``, ``actions``, ``terminals``,
    ``qpos``, ``qvel`` and, where there are buttons, ``button_states``), so that it is read by the
    same loader. Each episode has its own seed, derived from ``(seed, split, episode)``: the same
    arguments give the same arrays whatever the number of workers.

    Finished pieces are kept in ``<path>.parts`` until the file is complete. A call that was
    interrupted, or that met a full disk, continues from there when it is repeated with the
    same arguments.

    Args:
        dataset_id (str): ``"cube-single-play-v0"``, or a single-task name, whose task is ignored
            because all tasks share their data.
        path (path-like): the ``.npz`` file to write, or a folder (anything without a suffix), where
            the file gets OGBench's own name: ``<name>.npz``, or ``<name>-val.npz``.
        num_transitions (int, optional): how many transitions at least; whole episodes are
            recorded. Defaults to the size of the official file (a tenth of it for ``"val"``).
        seed (int, optional): the seed of the whole file. Defaults to 0.
        split (str, optional): ``"train"`` or ``"val"``; they never share an episode's seed.
        num_workers (int, optional): parallel processes; 1 collects in this process. Defaults to
            the number of CPU cores that this process may use.
        noise (float, optional): level of the action noise; the official one by default.
        p_random_action (float, optional): probability of a uniform action (cube, scene, puzzle).
        episode_length (int, optional): transitions per trajectory; the official one by default.
        action_noise (float, optional): standard deviation of Gaussian noise that the world adds to
            each action, as in ``OGBenchEnv(action_noise=...)``; files hold the commanded action.
            Defaults to 0.
        progress (bool, optional): show a progress bar if tqdm is installed.

    Returns:
        Path: the file written. An existing file is left alone and returned. What it was made with
        is kept beside it, in ``<path>.json``.

    Raises:
        ValueError: for an unknown name, for one whose behaviour policy is no script
            (antmaze, humanoidmaze, antsoccer), and for numbers out of range.
        RuntimeError: if the file or ``<path>.parts`` belongs to other arguments.
        OSError: if a file cannot be written; what was finished stays for the next call.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> file = collect_ogbench(
        ...     "pointmaze-medium-navigate-v0", f"{folder}/data.npz", 20, episode_length=10,
        ...     num_workers=1, progress=False)
        >>> np.load(file)["observations"].shape
        (22, 2)
    """
    plan = _Plan.make(
        dataset_id,
        path,
        num_transitions,
        seed,
        split,
        noise,
        p_random_action,
        episode_length,
        action_noise,
    )
    num_workers = _checked_workers(num_workers)
    if plan.path.exists():
        torchrl_logger.info(f"{plan.path} exists already; nothing is collected.")
    else:
        plan.path.parent.mkdir(parents=True, exist_ok=True)
        lock = plan.path.with_name(plan.path.name + ".lock")
        # One process collects; others wait and find the result.
        with FileLock(lock):
            if not plan.path.exists():
                _collect(plan, num_workers, progress)
        lock.unlink(missing_ok=True)
    plan.check_finished()
    return plan.path


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Which episodes make up a file, how they are cut into parts, and where these lie."""

    name: str
    path: Path
    behaviour: Behaviour
    num_episodes: int
    episodes_per_shard: int
    seed: int
    split: str

    @classmethod
    def make(
        cls, dataset_id, path, num_transitions, seed, split, noise, p_random, length, action_noise
    ):
        file = parse_file_name(dataset_id)
        _check_scripted(file)
        if not 0 <= action_noise < float("inf"):
            raise ValueError(f"action_noise must be a finite number >= 0, got {action_noise!r}.")
        _check_numbers(num_transitions, seed, split, noise, p_random, length)
        if p_random is not None and file.family == "pointmaze":
            raise ValueError(f"p_random_action must be None for mazes, got {p_random!r}.")
        path = Path(path)
        if not path.suffix or path.is_dir():
            path = path / file.npz_name(split)
        if path.suffix != ".npz":
            raise ValueError(f"path must end in '.npz' or be a folder, got {str(path)!r}.")
        behaviour = Behaviour.official(
            file,
            noise=noise,
            p_random_action=p_random,
            episode_length=length,
            action_noise=action_noise,
        )
        if num_transitions is None:
            total = file.num_episodes * file.episode_length
            num_transitions = total if split == "train" else total // 10
        num_episodes = -(-num_transitions // behaviour.episode_length)
        per_shard = max(1, _SHARD_TRANSITIONS // behaviour.episode_length)
        return cls(file.name, path, behaviour, num_episodes, per_shard, int(seed), split)

    @property
    def num_shards(self) -> int:
        return -(-self.num_episodes // self.episodes_per_shard)

    @property
    def parts(self) -> Path:
        return self.path.with_name(self.path.name + ".parts")

    def part(self, shard: int) -> Path:
        return self.parts / f"{shard:06d}.npz"

    def episodes(self, shard: int) -> range:
        first = shard * self.episodes_per_shard
        return range(first, min(first + self.episodes_per_shard, self.num_episodes))

    def transitions(self, shards) -> int:
        return sum(len(self.episodes(shard)) for shard in shards) * self.behaviour.episode_length

    def episode_seed(self, episode: int) -> int:
        entropy = (self.seed, _SPLITS.index(self.split), episode)
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def describe(self) -> dict:
        """What must agree before the parts of an earlier call are used."""
        return {
            "name": self.name,
            "num_episodes": self.num_episodes,
            "episodes_per_shard": self.episodes_per_shard,
            "seed": self.seed,
            "split": self.split,
            **dataclasses.asdict(self.behaviour),
        }

    def open_parts(self) -> None:
        self.parts.mkdir(parents=True, exist_ok=True)
        manifest, described = self.parts / "plan.json", self.describe()
        if not manifest.exists():
            write_atomically(manifest, lambda f: f.write(json.dumps(described).encode()))
            return
        found = _read_json(manifest)
        if found != described:
            raise RuntimeError(
                f"{self.parts} holds an unfinished collection with other arguments: found {found}, "
                f"asked for {described}. Repeat the call with those, or delete that folder."
            )

    @property
    def manifest(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    def check_finished(self) -> None:
        """Compares the arguments with those of a finished file, where these are known."""
        if not self.manifest.exists():
            return
        found, described = _read_json(self.manifest), self.describe()
        differing = {
            name: (found.get(name), value)
            for name, value in described.items()
            if name != "episodes_per_shard" and found.get(name) != value
        }
        if differing:
            raise RuntimeError(
                f"{self.path} holds a collection with other arguments, (found, asked for): "
                f"{differing}. Give another path, or delete that file."
            )

    def merge_parts(self) -> None:
        """Writes the parts, in order, as one file, and deletes them."""
        columns: dict[str, list] = {}
        for shard in range(self.num_shards):
            with open_npz(self.part(shard), ()) as part:
                for key in part.files:
                    columns.setdefault(key, []).append(read_array(part, key))
        # Each column's pieces are freed as soon as they are joined.
        arrays = {key: np.concatenate(columns.pop(key)) for key in tuple(columns)}
        described = json.dumps(self.describe()).encode()
        # First what it was made with: without it any arguments would be taken for these.
        write_atomically(self.manifest, lambda f: f.write(described))
        write_atomically(self.path, lambda f: np.savez_compressed(f, **arrays))
        shutil.rmtree(self.parts)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise RuntimeError(
            f"{path} is damaged ({error}): delete it, and repeat the call."
        ) from error


def write_atomically(path: Path, write) -> None:
    """Lets ``write(file)`` fill a temporary file, then renames it to ``path``.

    Nothing half-written is ever found under ``path``: not after an interrupt, nor on a full disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(
            error.errno, f"{path} could not be written ({error.strerror or error})", str(path)
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _collect(plan: _Plan, num_workers: int, progress: bool) -> None:
    plan.open_parts()
    missing = [shard for shard in range(plan.num_shards) if not plan.part(shard).exists()]
    with _progress_bar(plan, missing, progress) as advance:
        _collect_shards(plan, missing, num_workers, advance)
    plan.merge_parts()


def _collect_shard(plan: _Plan, shard: int) -> int:
    """Plays a part's episodes and saves them; returns the part's number."""
    source = _episode_source(plan.behaviour)
    episodes = [source(plan.episode_seed(episode)) for episode in plan.episodes(shard)]
    arrays = {key: np.concatenate([e[key] for e in episodes]) for key in episodes[0]}
    write_atomically(plan.part(shard), lambda f: np.savez(f, **arrays))
    return shard


@functools.lru_cache(maxsize=1)
def _episode_source(behaviour: Behaviour):
    # Building an environment takes seconds: one for each process.
    return make_episode_source(behaviour)


def _collect_shards(plan, shards, num_workers, advance) -> None:
    if num_workers == 1 or len(shards) <= 1:
        for shard in shards:
            _collect_shard(plan, shard)
            advance(plan.transitions([shard]))
        return
    # A forked process may inherit locked mutexes of torch's threads.
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    num_workers = min(num_workers, len(shards))
    shares = [shards[worker::num_workers] for worker in range(num_workers)]
    workers = [
        context.Process(target=_work, args=(plan, share, results), daemon=True) for share in shares
    ]
    try:
        with _without_main():
            for worker in workers:
                worker.start()
        for _ in shards:
            advance(plan.transitions([_next_result(results, workers)]))
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
                worker.join()


@contextlib.contextmanager
def _without_main():
    """Processes started here do not run the main program again, as spawned ones do.

    A script without ``if __name__ == "__main__"`` would come to this collection again in each of
    them, which would wait for the lock that this one holds; a program from a pipe has no file.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _work(plan: _Plan, shards: list[int], results) -> None:
    """A process that collects its share; an interrupt is for the parent, which ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for shard in shards:
            results.put(_collect_shard(plan, shard))
    except OSError as error:
        results.put(error)
    except Exception as error:
        # As text: what cannot be pickled would be lost, and waited for.
        results.put(RuntimeError("".join(traceback.format_exception(error))))


def _next_result(results, workers) -> int:
    """The next finished part; raises what a worker raised, or if one died."""
    while True:
        # Asked before the queue is, so that the last result of a worker is not missed.
        codes = [worker.exitcode for worker in workers]
        died = [code for code in codes if code] or (codes if None not in codes else [])
        try:
            result = results.get(timeout=1.0)
        except queue.Empty:
            if died:
                raise RuntimeError(
                    f"A collecting process ended with exit code {died[0]} (killed, or out of "
                    f"memory?). Finished parts are kept: repeat the call to go on."
                ) from None
            continue
        if isinstance(result, Exception):
            raise result
        return result


@contextlib.contextmanager
def _progress_bar(plan, missing, show):
    if not (show and _has_tqdm):
        yield lambda count: None
        return
    from tqdm import tqdm

    total = plan.num_episodes * plan.behaviour.episode_length
    done = total - plan.transitions(missing)
    with tqdm(total=total, initial=done, unit="step", desc=plan.path.name, smoothing=0.1) as bar:
        yield bar.update


def _check_scripted(file: OGBenchFile) -> None:
    if file.kind in _SCRIPTED.get(file.family, ()):
        return
    if file.family in _SCRIPTED:
        raise ValueError(
            f"dataset_id={file.name!r} cannot be collected locally: {file.family} supports "
            f"{' and '.join(_SCRIPTED[file.family])} data, got {file.kind!r}."
        )
    raise ValueError(
        f"dataset_id={file.name!r} cannot be collected locally: {file.family} data come from a "
        f"walking policy that was trained with reinforcement learning and that the ogbench "
        f"package does not contain. Download the official file (source='auto') or name a folder "
        f"that holds it (directory=...). Local collection: {', '.join(_SCRIPTED)}."
    )


def _check_numbers(num_transitions, seed, split, noise, p_random_action, episode_length) -> None:
    if split not in _SPLITS:
        raise ValueError(f"split must be 'train' or 'val', got {split!r}.")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an integer >= 0, got {seed!r}.")
    for name, value in (("num_transitions", num_transitions), ("episode_length", episode_length)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")
    if noise is not None and not 0 <= noise < float("inf"):
        raise ValueError(f"noise must be a finite number >= 0, got {noise!r}.")
    if p_random_action is not None and not 0 <= p_random_action <= 1:
        raise ValueError(f"p_random_action must lie in [0, 1], got {p_random_action!r}.")


def _checked_workers(num_workers) -> int:
    if num_workers is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if not isinstance(num_workers, int) or num_workers < 1:
        raise ValueError(f"num_workers must be an integer >= 1, got {num_workers!r}.")
    return num_workers

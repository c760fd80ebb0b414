# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Names of OGBench's state-based data sets, and what their official files contain."""

from __future__ import annotations

import dataclasses
import difflib
import re

# The suffixes under which OGBench registers its reward-based tasks; no number = the default task.
TASK_SUFFIXES = ("singletask", *(f"singletask-task{task}" for task in range(1, 6)))


@dataclasses.dataclass(frozen=True)
class OGBenchFile:
    """An official data file: its goal-conditioned environment and its size.

    Args:
        name (str): file name without its extension, ``"cube-single-play-v0"``.
        family (str): ``"pointmaze"``, ``"antmaze"``, ``"humanoidmaze"``, ``"antsoccer"``,
            ``"cube"``, ``"scene"`` or ``"puzzle"``.
        kind (str): how it was collected: ``"navigate"``, ``"stitch"``, ``"explore"``,
            ``"play"`` or ``"noisy"``.
        env_id (str): the goal-conditioned environment, ``"cube-single-v0"``.
        num_episodes (int): trajectories in the official training file.
        episode_length (int): transitions per trajectory; the file has one more row for each.
    """

    name: str
    family: str
    kind: str
    env_id: str
    num_episodes: int
    episode_length: int

    def npz_name(self, split: str) -> str:
        """OGBench's file name for ``"train"`` or ``"val"``."""
        return f"{self.name}{'-val' if split == 'val' else ''}.npz"


@dataclasses.dataclass(frozen=True)
class OGBenchName:
    """A parsed single-task data set name.

    Args:
        dataset_id (str): the whole name.
        file (OGBenchFile): the data file that all tasks of the environment share.
        task (str): ``"singletask"`` (the default task) or ``"singletask-task1"`` to 5.
        env_id (str): the single-task environment that defines the reward.
    """

    dataset_id: str
    file: OGBenchFile
    task: str
    env_id: str


def _maze_files():
    for family, sizes in (
        ("pointmaze", ("medium", "large", "giant", "teleport")),
        ("antmaze", ("medium", "large", "giant", "teleport")),
        ("humanoidmaze", ("medium", "large", "giant")),
    ):
        human = family == "humanoidmaze"
        for size in sizes:
            scene = f"{family}-{size}"
            giant = size == "giant"
            if human:
                yield scene, "navigate", 1000, 4000 if giant else 2000
                yield scene, "stitch", 10_000 if giant else 5000, 400
                continue
            yield scene, "navigate", 500 if giant else 1000, 2000 if giant else 1000
            yield scene, "stitch", 5000, 200
            if family == "antmaze" and not giant:
                yield scene, "explore", 10_000, 500
    yield "antsoccer-arena", "navigate", 1000, 1000
    yield "antsoccer-arena", "stitch", 5000, 200
    yield "antsoccer-medium", "navigate", 4000, 1000
    yield "antsoccer-medium", "stitch", 8000, 500


def _manipulation_files():
    for scene, num_episodes in (
        ("cube-single", 1000),
        ("cube-double", 1000),
        ("cube-triple", 3000),
        ("cube-quadruple", 5000),
        ("scene", 1000),
        ("puzzle-3x3", 1000),
        ("puzzle-4x4", 1000),
        ("puzzle-4x5", 3000),
        ("puzzle-4x6", 5000),
    ):
        yield scene, "play", num_episodes, 1000
        yield scene, "noisy", num_episodes, 1000


def _all_files() -> dict[str, OGBenchFile]:
    files = {}
    for scene, kind, num_episodes, length in (*_maze_files(), *_manipulation_files()):
        name = f"{scene}-{kind}-v0"
        family = scene.split("-")[0]
        files[name] = OGBenchFile(name, family, kind, f"{scene}-v0", num_episodes, length)
    return files


FILES = _all_files()
SINGLE_TASKS = tuple(
    f"{name.removesuffix('-v0')}-{suffix}-v0" for name in FILES for suffix in TASK_SUFFIXES
)


def unknown_name_error(argument: str, name: object, known) -> ValueError:
    """An error that names the argument and suggests the nearest known names."""
    near = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return ValueError(f"{argument}={name!r} is not a known state-based OGBench data set.{hint}")


def parse_file_name(dataset_id: str) -> OGBenchFile:
    """The data file behind a name, with or without its ``singletask`` part.

    Args:
        dataset_id (str): ``"cube-single-play-v0"`` or ``"cube-single-play-singletask-task2-v0"``.

    Returns:
        OGBenchFile: the official file that holds the trajectories.

    Raises:
        ValueError: for a name that OGBench does not have; the nearest names are suggested.

    Examples:
        >>> parse_file_name("cube-single-play-singletask-task2-v0").name
        'cube-single-play-v0'
    """
    name = re.sub(r"-singletask(-task[1-5])?-v0$", "-v0", str(dataset_id))
    if name not in FILES:
        raise unknown_name_error("dataset_id", dataset_id, (*FILES, *SINGLE_TASKS))
    return FILES[name]


def parse_task_name(dataset_id: str) -> OGBenchName:
    """Splits a single-task data set name.

    Args:
        dataset_id (str): ``"<scene>-<kind>-singletask-v0"`` (default task) or
            ``"<scene>-<kind>-singletask-task<1..5>-v0"``.

    Returns:
        OGBenchName: the file, the task and the environment.

    Raises:
        ValueError: for an unknown name, with the nearest ones.

    Examples:
        >>> parse_task_name("scene-play-singletask-v0").env_id
        'scene-singletask-v0'
    """
    if dataset_id not in SINGLE_TASKS:
        raise unknown_name_error("dataset_id", dataset_id, SINGLE_TASKS)
    file = parse_file_name(dataset_id)
    task = re.search(r"(singletask(-task\d)?)-v0$", dataset_id).group(1)
    env_id = f"{file.env_id.removesuffix('-v0')}-{task}-v0"
    return OGBenchName(dataset_id, file, task, env_id)

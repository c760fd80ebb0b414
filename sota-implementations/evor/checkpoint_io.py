# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What keeps a checkpoint whole: room on the disk, no interrupt half-way, sizes of its files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torchrl.checkpoint import Checkpoint

SIZES = "sizes.json"
# What a checkpoint must share with the run that continues it; train_baseline.py adds the last two.
IDENTITY = (
    *("env", "chunk_size", "data", "policy", "value", "loss", "optim", "seed"),
    *("method", "baseline"),
)


def check_room(folder: Path, loss: torch.nn.Module) -> None:
    """Raises before a checkpoint is begun that would not fit.

    A full disk kills a process that writes to a mapped file, without an
    exception. Parameters and Adam's two moments are counted, and a megabyte.
    """
    values = loss.state_dict().values()
    needed = 3 * sum(v.nbytes for v in values if isinstance(v, torch.Tensor)) + 2**20
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"the checkpoint needs {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free",
            str(folder),
        )


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Puts off an interrupt (Ctrl-C) until what is inside has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    received: list = []
    before = signal.signal(signal.SIGINT, lambda *event: received.append(event))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if received:
            signal.raise_signal(signal.SIGINT)


def write_sizes(folder: Path) -> None:
    """Records the sizes of all files of a checkpoint in it."""
    content = json.dumps(_sizes(folder), indent=0)
    partial = folder / f".{SIZES}.part"
    partial.write_text(content)
    os.replace(partial, folder / SIZES)


def check_sizes(folder: Path, option: str = "resume") -> None:
    """Raises if a file of a checkpoint is missing or was cut; mapped files would be regrown."""
    recorded = folder / SIZES
    if not recorded.exists():
        raise ValueError(f"{option}={str(folder)!r} has no {SIZES}: it was not written by evor.py.")
    try:
        sizes = json.loads(recorded.read_text()).items()
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{option}={str(folder)!r} is damaged: {SIZES} must hold the sizes of its files, "
            f"got something else ({error})."
        ) from error
    found = _sizes(folder)
    for name, size in sizes:
        if found.get(name) != size:
            raise ValueError(
                f"{option}={str(folder)!r} is damaged: {name} must have {size} bytes, "
                f"got {found.get(name, 'no file')}."
            )


def load_progress(cfg: DictConfig) -> dict:
    """Progress of the checkpoint ``cfg.resume``, which must fit ``cfg`` and be whole.

    Raises:
        ValueError: if the checkpoint is damaged, belongs to another
            configuration, or was not written by the recipe.
    """
    check_sizes(Path(cfg.resume))
    saved = Checkpoint(config={}, progress={})
    try:
        saved.load(cfg.resume)
        then = OmegaConf.to_container(with_defaults(saved.components["config"]))
    except Exception as error:
        raise ValueError(f"resume={cfg.resume!r} is no checkpoint of a recipe: {error}") from error
    now = OmegaConf.to_container(cfg, resolve=True)
    for config in (then, now):
        # What knows no end may be extended.
        if config["optim"]["schedule"] == "constant" and not config["loss"]["keep_candidates"]:
            config["optim"] = {**config["optim"], "num_updates": None}
    for group in IDENTITY:
        if then.get(group) != now.get(group):
            raise ValueError(
                f"resume={cfg.resume!r} belongs to another configuration: {group} was "
                f"{then.get(group)}, this run has {now.get(group)}."
            )
    return saved.components["progress"]


def with_defaults(config: dict) -> DictConfig:
    """A checkpoint's configuration; options that are younger than it have their defaults."""
    return OmegaConf.merge(OmegaConf.load(Path(__file__).with_name("config.yaml")), config)


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in files
        if SIZES not in path.name
    }

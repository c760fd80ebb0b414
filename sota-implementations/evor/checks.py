# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Options of a script, checked before any work: each is of the kind of its default."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number (on a command line inf, not .inf)",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


def check_options(cfg: DictConfig, free: Sequence[str] = ()) -> None:
    """Compares the options of a running script with those of its configuration file.

    Args:
        cfg (DictConfig): what the script is given.
        free (sequence of str, optional): mappings whose keys are names of the user's own.

    Raises:
        ValueError: if an option is of another kind than its default, or has none.
    """
    program = HydraConfig.get()
    defaults = compose(program.job.config_name)
    added = [name for name in cfg if name not in defaults]
    if added and "settings" in program.runtime.choices:
        raise ValueError(
            f"+settings must be left to evor.py and train_baseline.py: {program.job.name}.py does "
            f"not have the options {added}."
        )
    given, own = (OmegaConf.to_container(x, resolve=True) for x in (cfg, defaults))
    compare("", given, own, free)


def compare(name: str, value: object, default: object, free: Sequence[str] = ()) -> None:
    """Raises a ValueError unless a value is of the kind of its default, of which null says none."""
    if default is None or name in free:
        return
    kind = type(default)
    if type(value) is not kind and (kind, type(value)) != (float, int):
        raise ValueError(f"{name} must be {KINDS[kind]}, got {value!r}.")
    if kind is dict:
        for key, entry in value.items():
            full = f"{name}.{key}" if name else str(key)
            if key not in default:
                raise ValueError(f"{full} is no option, there are {', '.join(map(str, default))}.")
            compare(full, entry, default[key], free)
    if kind is list and default:
        for index, entry in enumerate(value):
            compare(f"{name}[{index}]", entry, default[0], free)


def check_not_negative(name: str, value: int) -> None:
    """Raises a ValueError that names the option if it is no integer of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an integer of at least 0, got {value!r}.")


def check_number(name: str, value) -> float:
    """A value as a float; infinity is ``.inf`` in a YAML file and ``inf`` on a command line."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(
            f"{name} must hold numbers (on a command line inf, not .inf), got {value!r}."
        )
    return float(value)


def check_sweep(name: str, values, numbers: bool = False) -> list:
    """The values of a sweep as a list, as floats if they are to be ``numbers``.

    Raises:
        ValueError: if there are none, one comes twice, or one is no number.
    """
    values = list(values or ())
    if numbers:
        values = [check_number(name, value) for value in values]
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{name} must hold at least one value, and none twice, got {values}.")
    return values


def check_folder(name: str, path: str | None) -> None:
    """Raises a ValueError that names the option if no folder can be made of a path."""
    for part in () if path is None else (Path(path), *Path(path).parents):
        if part.exists() and not part.is_dir():
            raise ValueError(f"{name} must be a folder, got {str(path)!r}: {part} is a file.")

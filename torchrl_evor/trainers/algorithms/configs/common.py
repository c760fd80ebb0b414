# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from typing import Any

import torch
from torchrl.trainers.algorithms.configs.common import _normalize_hydra_key


def build(cls: type, kwargs: dict[str, Any]) -> Any:
    """Calls ``cls`` with what a yaml file can say.

    Lists under ``in_keys`` and ``out_keys`` become keys (``[agent, action]`` is
    nested), the name of a dtype becomes the dtype, and lists become tuples.
    """
    for name, value in kwargs.items():
        if name in ("in_keys", "out_keys"):
            kwargs[name] = [_normalize_hydra_key(key) for key in value]
        elif name == "dtype" and isinstance(value, str):
            kwargs[name] = getattr(torch, value)
        elif name == "hidden_sizes":
            kwargs[name] = tuple(value)
    return cls(**kwargs)

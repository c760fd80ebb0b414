# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Whether memory-mapped TensorDicts on disk are whole."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch


def check_memmap(folder: Path) -> None:
    """Compares the files of memory-mapped TensorDicts with what their ``meta.json`` says.

    To be called before they are loaded: TensorDict grows a file that was cut (by a full disk, an
    interrupted copy) to its size, with zeros.

    Args:
        folder (Path): holds them, at any depth.

    Raises:
        ValueError: naming the file, if one is missing, too short or no JSON.
    """
    for meta in sorted(folder.rglob("meta.json")):
        try:
            entries = json.loads(meta.read_text())
        except ValueError as error:
            raise ValueError(f"{meta} is damaged: {error}.") from error
        for key, entry in entries.items():
            if not isinstance(entry, dict) or "dtype" not in entry:
                continue  # not a tensor
            dtype = getattr(torch, entry["dtype"].removeprefix("torch."))
            expected = math.prod(entry["shape"]) * dtype.itemsize
            file = meta.with_name(f"{key}.memmap")
            found = file.stat().st_size if file.is_file() else 0
            if found < expected:
                raise ValueError(f"{file} is damaged: it must have {expected} bytes, got {found}.")

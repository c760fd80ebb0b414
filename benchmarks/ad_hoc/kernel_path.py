# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Importing this finds the kernels where nothing is installed but torch and triton."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _found() -> bool:
    try:
        return importlib.util.find_spec("torchrl_evor.triton_kernels") is not None
    except ImportError:  # of the package, or of TorchRL in it
        return False


if not _found():
    package = types.ModuleType("torchrl_evor")
    package.__path__ = [str(ROOT / "torchrl_evor"), str(ROOT)]
    sys.modules["torchrl_evor"] = package

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Lets these tests run where only torch and triton are (a bare GPU machine), nothing installed."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

try:
    found = importlib.util.find_spec("torchrl_evor.triton_kernels") is not None
except ImportError:
    found = False
if not found:
    root = Path(__file__).resolve().parents[2]
    package = types.ModuleType("torchrl_evor")
    package.__path__ = [str(root / "torchrl_evor"), str(root)]
    sys.modules["torchrl_evor"] = package

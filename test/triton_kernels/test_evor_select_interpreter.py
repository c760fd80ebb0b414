# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Runs ``interpreted.py`` with Triton's interpreter, which is switched on before the import."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

_has_triton = importlib.util.find_spec("triton") is not None


@pytest.mark.skipif(not _has_triton, reason="needs triton")
def test_kernels_in_the_interpreter():
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", str(folder / "interpreted.py"), "-q", "-x"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command += ["-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


if __name__ == "__main__":
    pytest.main([__file__, "-q"])

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How the driver talks to its workers: one JSON object a line, standard library only."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable

WARMUP = 4


def open_channel():
    """The pipe to the driver; everything printed from now on goes to standard error."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return channel


def serve(channel, run: Callable[[int], None], info: dict) -> None:
    """Warms up, describes itself, then times as many updates as each line of the input asks for.

    Args:
        channel (TextIO): where answers go.
        run (Callable): performs a number of updates and waits for the last of them.
        info (dict): what the numbers depend on, for the report.
    """
    seconds = [_timed(run, 1) for _ in range(1 + WARMUP)]
    info = {
        **info,
        "python": platform.python_version(),
        "first_call_seconds": seconds[0],
        "seconds_per_update": min(seconds[1:]),
    }
    print(json.dumps(info), file=channel)
    for line in sys.stdin:
        print(json.dumps(_timed(run, int(line))), file=channel)


def _timed(run: Callable[[int], None], count: int) -> float:
    start = time.perf_counter()
    run(count)
    return time.perf_counter() - start

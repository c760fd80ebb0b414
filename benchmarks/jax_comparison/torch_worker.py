# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Worker of ``compare.py`` that runs updates of this library. Started by the driver."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tensordict
import torch
import torchrl

sys.path.insert(0, str(Path(__file__).parents[1]))

import _protocol  # noqa: E402
import _updates  # noqa: E402


def main(options: dict) -> None:
    channel = _protocol.open_channel()
    torch.set_num_threads(options["threads"])
    torch.set_float32_matmul_precision(options["torch_matmul_precision"])
    torch.manual_seed(0)
    device = torch.device(options["device"])
    sizes = {**options["shapes"], "hidden": tuple(options["shapes"]["hidden"])}
    shapes = _updates.Shapes(**sizes)
    loss = _updates.make_evor_loss(shapes, next_action=options["next_action"])
    update = _updates.make_update(loss, shapes, device, compile=options["compile"])

    def run(count: int) -> None:
        for _ in range(count):
            update()
        if device.type == "cuda":
            torch.cuda.synchronize()

    info = {
        "versions": {
            "torch": torch.__version__,
            "torchrl": torchrl.__version__,
            "tensordict": tensordict.__version__,
        },
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "matmul_error": _matmul_error(device),
    }
    _protocol.serve(channel, run, info)


def _matmul_error(device: torch.device) -> float:
    with torch.device(device):
        return _updates.matmul_error()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

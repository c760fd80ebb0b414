# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from torchrl_evor.trainers.algorithms.evor import EVORTrainer, LossSumStepper

__all__ = ["EVORTrainer", "LossSumStepper"]

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from torchrl_evor.record.statistics import (
    Interval,
    iqm,
    mean,
    mean_difference,
    median,
    optimality_gap,
    probability_of_improvement,
    stratified_bootstrap,
    wilson_interval,
)

__all__ = [
    "Interval",
    "iqm",
    "mean",
    "mean_difference",
    "median",
    "optimality_gap",
    "probability_of_improvement",
    "stratified_bootstrap",
    "wilson_interval",
]

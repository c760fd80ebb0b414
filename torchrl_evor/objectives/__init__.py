# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from torchrl_evor.objectives.critics import CriticLoss
from torchrl_evor.objectives.evor import EVORLoss
from torchrl_evor.objectives.qc import QCLoss

__all__ = ["CriticLoss", "EVORLoss", "QCLoss"]

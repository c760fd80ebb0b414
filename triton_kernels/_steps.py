# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The steps of the flow: at which times the velocity is evaluated, and how far it carries."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Steps"]


class Steps(NamedTuple):
    """``num`` evaluations at flow times ``k / num``: an Euler step each, or two to a midpoint step.

    The first of two carries half a midpoint step, to the point whose velocity then carries the
    whole step from the same start.
    """

    num: int
    solver: str

    def is_half(self, k: int) -> bool:
        """Whether evaluation ``k`` only leads to the next one and is then taken back."""
        return self.solver == "midpoint" and k % 2 == 0

    def length(self, k: int) -> int:
        """How far evaluation ``k`` carries, in units of ``1 / num``."""
        return 2 if self.solver == "midpoint" and k % 2 else 1

    def move(self, start: Tensor, velocity: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Start of the next evaluation's step and the point where it takes place."""
        z = start + velocity / (self.num / self.length(k))
        return (start if self.is_half(k) else z), z

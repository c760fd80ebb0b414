# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from setuptools import find_packages, setup

OGBENCH = ["ogbench==1.2.2"]
HYDRA = ["hydra-core>=1.3,<1.4"]
WANDB = ["wandb"]
TRITON = ["triton>=3.3; sys_platform == 'linux'"]
PLOTS = ["matplotlib>=3.8", "scipy"]
# The TensorBoard logger of TorchRL needs the tensorboard package.
ALL = OGBENCH + HYDRA + WANDB + PLOTS + ["tensorboard", "tqdm"]
# numpy: the Triton interpreter of some releases rejects runtime loop bounds with newer versions.
DEV = ALL + TRITON + ["pytest>=8", "pytest-benchmark", "ruff==0.17.5", "numpy<2.3"]

setup(
    name="torchrl_evor",
    version="0.1.0",
    description="EVOR: expressive value learning by flow matching, for TorchRL",
    license="MIT",
    python_requires=">=3.10,<3.13",
    packages=[p for p in find_packages() if p.startswith("torchrl_evor")]
    + ["torchrl_evor.triton_kernels"],
    # The bare name triton_kernels is another project's package, so the folder is mapped.
    package_dir={"torchrl_evor.triton_kernels": "triton_kernels"},
    install_requires=["torch>=2.6", "tensordict>=0.14.3,<0.15", "torchrl==0.14.1"],
    extras_require={
        "ogbench": OGBENCH,
        "hydra": HYDRA,
        "wandb": WANDB,
        "triton": TRITON,
        "plots": PLOTS,
        "all": ALL,
        "dev": DEV,
    },
)

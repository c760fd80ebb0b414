# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Worker of ``compare.py`` that runs an official JAX agent from a checkout.

Started by the driver with a Python that has the agent's own requirements; needs nothing of
this library.
"""

from __future__ import annotations

import json
import sys

import _protocol
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax


def make_arrays(shapes: dict) -> dict:
    """Random transitions in the layout of OGBench."""
    rng = np.random.default_rng(0)
    rows = shapes["transitions"]

    def observation():
        return rng.standard_normal((rows, shapes["observation"]), dtype=np.float32)

    terminals = np.zeros(rows, dtype=np.float32)
    terminals[-1] = 1
    return {
        "observations": observation(),
        "next_observations": observation(),
        "actions": rng.uniform(-1, 1, (rows, shapes["action"])).astype(np.float32),
        "rewards": rng.standard_normal(rows, dtype=np.float32),
        "masks": np.ones(rows, dtype=np.float32),
        "terminals": terminals,
    }


def make_fql(options: dict, dataset):
    """FQL and its way to sample, as in the repository's main.py."""
    from agents.fql import FQLAgent, get_config

    config = configure(get_config(), options)
    example = dataset.sample(1)
    agent = FQLAgent.create(0, example["observations"], example["actions"], config)
    return agent, lambda: dataset.sample(options["shapes"]["batch"])


def make_qc(options: dict, dataset):
    """QC, best of N, and its way to sample, as in the repository's main.py."""
    from agents.acfql import ACFQLAgent, get_config

    config = configure(get_config(), options)
    config["actor_type"] = "best-of-n"
    config["actor_num_samples"] = options["num_candidates"]
    config["horizon_length"] = options["horizon"]
    example = dataset.sample(())
    agent = ACFQLAgent.create(0, example["observations"], example["actions"], config)
    return agent, lambda: dataset.sample_sequence(
        options["shapes"]["batch"],
        sequence_length=options["horizon"],
        discount=config["discount"],
    )


def configure(config, options: dict):
    """Sizes on top of the agent's own defaults."""
    shapes = options["shapes"]
    config["batch_size"] = shapes["batch"]
    config["flow_steps"] = shapes["num_steps"]
    config["actor_hidden_dims"] = tuple(shapes["hidden"])
    config["value_hidden_dims"] = tuple(shapes["hidden"])
    return config


def matmul_error(size: int = 512) -> float:
    """Largest error of a float32 product of unit-scale results, as in the other worker."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, size)).astype(np.float32)
    w = (rng.standard_normal((size, size)) / size**0.5).astype(np.float32)
    product = np.asarray(jnp.asarray(x) @ jnp.asarray(w), dtype=np.float64)
    return float(np.abs(product - x.astype(np.float64) @ w.astype(np.float64)).max())


def main(options: dict) -> None:
    channel = _protocol.open_channel()
    # The checkout's packages have names as plain as "utils": nothing else may come first.
    sys.path.insert(0, options["checkout"])
    from utils.datasets import Dataset

    np.random.seed(0)
    make = {"fql": make_fql, "qc": make_qc}[options["agent"]]
    agent, sample = make(options, Dataset.create(**make_arrays(options["shapes"])))

    def run(count: int) -> None:
        nonlocal agent
        for _ in range(count):
            agent, _ = agent.update(sample())
        jax.block_until_ready(agent.network.params)

    info = {
        "versions": {
            "jax": jax.__version__,
            "flax": flax.__version__,
            "optax": optax.__version__,
            "numpy": np.__version__,
        },
        "threads": options["threads"],
        "matmul_precision": str(jax.config.jax_default_matmul_precision),
        "matmul_error": matmul_error(),
        "device": str(jax.devices()[0]),
    }
    _protocol.serve(channel, run, info)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Every constructor argument has a field in the Hydra configuration, with the same default."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import typing

import pytest
import torch

pytest.importorskip("hydra")

from _known_laws import Chain  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from hydra.errors import ConfigCompositionException  # noqa: E402
from hydra.utils import get_object, instantiate  # noqa: E402
from omegaconf import MISSING  # noqa: E402
from omegaconf.errors import MissingMandatoryValue  # noqa: E402
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer  # noqa: E402

import torchrl_evor  # noqa: E402
from torchrl_evor import EVORLoss, EVORTrainer, QCLoss  # noqa: E402
from torchrl_evor.trainers.algorithms import configs  # noqa: E402
from torchrl_evor.trainers.algorithms.configs import CONFIGS  # noqa: E402

# Fields that are no argument of the constructor, and why.
EXTRA = {"gamma"}  # of a loss: goes to its value estimator


def constructor_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Arguments of a constructor by name, those behind its ``**kwargs`` included."""
    parameters: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        own = inspect.signature(base.__init__).parameters
        named = {
            name: parameter
            for name, parameter in own.items()
            if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
        }
        # What a subclass says of an argument goes before what its base says.
        parameters = {**named, **parameters}
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.values()):
            break
    return parameters


def target_class(config):
    """The class that a configuration builds, directly or through its factory."""
    target = get_object(config._target_)
    return target if isinstance(target, type) else typing.get_type_hints(target)["return"]


def defaults(config):
    values = {}
    for field in dataclasses.fields(config):
        made = field.default_factory is not dataclasses.MISSING
        values[field.name] = field.default_factory() if made else field.default
    return values


@pytest.mark.parametrize("config", CONFIGS.values(), ids=lambda c: c.__name__)
class TestParity:
    def test_every_argument_is_a_field_with_its_default(self, config):
        fields = defaults(config)
        for name, parameter in constructor_parameters(target_class(config)).items():
            default = parameter.default
            expected = MISSING if default is parameter.empty else default
            if isinstance(expected, tuple):
                expected = list(expected)
            elif name in ("in_keys", "out_keys"):  # one key
                expected = [expected]
            assert fields[name] == expected, name

    def test_every_field_is_an_argument(self, config):
        names = set(constructor_parameters(target_class(config)))
        extra = EXTRA if config.__name__.endswith("LossConfig") else set()
        assert set(defaults(config)) - {"_target_", "_partial_"} - extra <= names

    def test_fields_are_public(self, config):
        assert hasattr(torchrl_evor, target_class(config).__name__)


YAML = """
defaults:
  - trainer: evor
  - loss@trainer.loss_module: evor
  - model@trainer.loss_module.actor_network: flow_matching_policy
  - network@trainer.loss_module.actor_network.velocity_network: velocity_mlp
  - model@trainer.loss_module.value_network: return_flow
  - network@trainer.loss_module.value_network.velocity_network: velocity_mlp
  - optimizer@trainer.optimizer: adam
  - target_net_updater@trainer.target_net_updater: soft
  - _self_
trainer:
  total_updates: 3
  progress_bar: false
  loss_module:
    gamma: 0.8
    next_action: dataset
    actor_network:
      action_dim: 1
      velocity_network: {in_features: 6, hidden_sizes: [8, 4]}
    value_network:
      scale: 2.0
      velocity_network: {in_features: 7, hidden_sizes: [8], layer_norm: true, dtype: float32}
  target_net_updater:
    tau: 0.25
"""


@pytest.fixture
def composed(tmp_path):
    (tmp_path / "config.yaml").write_text(YAML)

    def compose_with(*overrides):
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            return compose("config", overrides=list(overrides))

    return compose_with


@pytest.fixture
def data():
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(64), batch_size=16)
    buffer.extend(Chain().sample(64))
    return buffer


class TestCompose:
    def test_trains(self, composed, data):
        trainer = instantiate(composed().trainer, replay_buffer=data)
        assert isinstance(trainer, EVORTrainer) and trainer.collector.replay_buffer is data
        loss = trainer.loss_module
        assert isinstance(loss, EVORLoss)
        assert loss.value_estimator.gamma.item() == pytest.approx(0.8)
        assert loss.value_network.scale.item() == 2.0
        network = loss.actor_network.module.velocity_network.net
        assert [m.out_features for m in network if hasattr(m, "out_features")] == [8, 4, 1]
        trainer.train()
        assert trainer.updates == 3

    def test_overrides(self, composed, data):
        cfg = composed("trainer.loss_module.td_target=coupled", "trainer.total_updates=5")
        trainer = instantiate(cfg.trainer, replay_buffer=data)
        assert trainer.loss_module.td_target == "coupled" and trainer.total_frames == 5

    def test_unknown_field(self, composed):
        with pytest.raises(ConfigCompositionException, match="td_targets"):
            composed("trainer.loss_module.td_targets=coupled")

    def test_unknown_choice(self, composed, data):
        cfg = composed("trainer.loss_module.td_target=td3")
        with pytest.raises(Exception, match="td_target must be one of"):
            instantiate(cfg.trainer, replay_buffer=data)

    def test_missing_argument(self, composed):
        with pytest.raises(MissingMandatoryValue, match="replay_buffer"):
            instantiate(composed().trainer)

    def test_qc(self):
        config = CONFIGS
        network = config["network", "stacked_velocity_mlp"](
            num_models=2, in_features=5, hidden_sizes=[8], layer_norm=True
        )
        velocity = config["network", "velocity_mlp"](in_features=6, hidden_sizes=[8])
        loss = instantiate(
            config["loss", "qc"](
                actor_network=config["model", "flow_matching_policy"](
                    velocity_network=velocity, action_dim=1
                ),
                qvalue_network=config["model", "scalar_critic"](network=network, num_critics=2),
                gamma=0.5,
            )
        )
        assert isinstance(loss, QCLoss) and loss.value_estimator.gamma.item() == 0.5

    def test_an_ensemble_is_a_list_of_networks(self):
        velocity = CONFIGS["network", "velocity_mlp"](in_features=7, hidden_sizes=[8])
        returns = instantiate(CONFIGS["model", "return_flow"](velocity_network=[velocity] * 2))
        first, second = returns.members
        assert first is not second and first.net[0].in_features == 7

    def test_nested_keys_and_dtype(self):
        velocity = CONFIGS["network", "velocity_mlp"](
            in_features=6, hidden_sizes=[8], dtype="float64"
        )
        policy = instantiate(
            CONFIGS["model", "flow_matching_policy"](
                velocity_network=velocity,
                action_dim=1,
                in_keys=[["agent", "observation"]],
                out_keys=[["agent", "action"]],
            )
        )
        assert policy.in_keys == [("agent", "observation")]
        assert policy.out_keys == [("agent", "action")]
        assert next(policy.parameters()).dtype == torch.float64


def test_import_without_hydra(monkeypatch):
    """The configurations say what is missing; the package itself imports without it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "hydra" else find(name)
    )
    with pytest.raises(ImportError, match=r"hydra-core: pip install torchrl_evor\[hydra\]"):
        importlib.reload(configs)


if __name__ == "__main__":
    pytest.main([__file__])

# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import copy

import pytest
import torch
from _known_laws import Chain
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers import RandomSampler, SamplerWithoutReplacement
from torchrl.objectives import BCLoss, SoftUpdate
from torchrl.objectives.common import LossModule
from torchrl.record import CSVLogger

from torchrl_evor import EVORLoss, FlowMatchingPolicy, ReturnFlow, VelocityMLP
from torchrl_evor.data.datasets import WindowStorage
from torchrl_evor.trainers import EVORTrainer, OfflineSource


def make_loss(seed=0, **kwargs):
    torch.manual_seed(seed)
    policy = FlowMatchingPolicy(VelocityMLP(4 + 1 + 1, 1, hidden_sizes=(8,)), 1, num_steps=2)
    returns = ReturnFlow(VelocityMLP(4 + 1 + 2, hidden_sizes=(8,)), num_steps=2)
    return EVORLoss(policy, returns, next_action="dataset", **kwargs)


def make_buffer(size=64, batch_size=16):
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(size), batch_size=batch_size)
    buffer.extend(Chain().sample(size))
    return buffer


def make_trainer(loss=None, updater=True, **kwargs):
    loss = make_loss() if loss is None else loss
    kwargs = {"replay_buffer": make_buffer(), "total_updates": 6, **kwargs}
    return EVORTrainer(
        loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters(), lr=1e-2),
        target_net_updater=SoftUpdate(loss, tau=0.1) if updater else None,
        progress_bar=False,
        **kwargs,
    )


def by_hand(loss, buffer, updates):
    """The loop that the trainer stands for."""
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    updater = SoftUpdate(loss, tau=0.1)
    for _ in range(updates):
        losses = loss(buffer.sample())
        optimizer.zero_grad()
        (losses["loss_actor"] + losses["loss_value"]).backward()
        optimizer.step()
        updater.step()


def assert_same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


class TestLoop:
    @pytest.mark.parametrize("block", [1, 3])
    def test_equals_a_loop_by_hand(self, block):
        buffer, expected, loss = make_buffer(), make_loss(), make_loss()
        torch.manual_seed(5)
        by_hand(expected, buffer, 6)
        trainer = make_trainer(loss, replay_buffer=buffer, optim_steps_per_batch=block)
        torch.manual_seed(5)
        trainer.train()
        assert_same_state(loss, expected)
        assert trainer.updates == 6

    def test_any_loss_module(self):
        """Only the names that start with ``loss`` are summed and minimised."""
        loss = make_loss()
        loss.select_out_keys("loss_value")
        before = copy.deepcopy(loss.actor_network_params.data)
        make_trainer(loss).train()
        assert (loss.actor_network_params.data == before).all()

    def test_clip_norm(self):
        loss = make_loss()
        optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
        before = torch.nn.utils.parameters_to_vector(loss.parameters()).detach()
        EVORTrainer(
            loss_module=loss, optimizer=optimizer, replay_buffer=make_buffer(), total_updates=1,
            target_net_updater=SoftUpdate(loss, tau=0.1), clip_norm=0.01, progress_bar=False,
        ).train()  # fmt: skip
        after = torch.nn.utils.parameters_to_vector(loss.parameters()).detach()
        assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)

    def test_seed(self):
        buffer, losses = make_buffer(), (make_loss(), make_loss())
        for loss in losses:
            make_trainer(loss, replay_buffer=buffer, seed=3).train()
        assert_same_state(*losses)

    def test_hooks_of_torchrl(self):
        calls = []
        trainer = make_trainer(optim_steps_per_batch=3)
        trainer.register_op("post_optim", lambda: calls.append("update"))
        trainer.register_op("post_steps", lambda: calls.append("turn"))
        trainer.train()
        assert calls == ["update"] * 3 + ["turn"] + ["update"] * 3 + ["turn"]

    def test_progress_bar(self, capsys):
        loss = make_loss()
        EVORTrainer(
            loss_module=loss, optimizer=torch.optim.Adam(loss.parameters()),
            replay_buffer=make_buffer(), total_updates=2,
            target_net_updater=SoftUpdate(loss, tau=0.1),
        ).train()  # fmt: skip
        assert "2/2" in capsys.readouterr().err


class TestSource:
    def test_priorities_are_written_back(self, monkeypatch):
        buffer, written = make_buffer(), []
        monkeypatch.setattr(buffer, "update_tensordict_priority", written.append)
        make_trainer(replay_buffer=buffer).train()
        assert len(written) == 6
        assert all({"index", "td_error"} <= set(batch.keys()) for batch in written)

    def test_batch_size_and_device(self):
        source = OfflineSource(make_buffer(batch_size=None), 2, batch_size=5, device="meta")
        assert source.sample().shape == (5,)
        assert source.sample()["observation"].device.type == "meta"
        assert next(iter(source)).numel() == 2

    def test_no_batch_size(self):
        with pytest.raises(ValueError, match="batch_size must be given"):
            OfflineSource(make_buffer(batch_size=None))


class TestLogs:
    def rows(self, folder, name):
        (path,) = folder.rglob(f"{name}.csv")
        return [tuple(map(float, line.split(","))) for line in path.read_text().splitlines()]

    def test_logger(self, tmp_path):
        logger = CSVLogger(exp_name="run", log_dir=str(tmp_path))
        make_trainer(logger=logger, log_interval=2).train()
        for name in ("loss_actor", "loss_value", "value_target"):
            assert [step for step, _ in self.rows(tmp_path, name)] == [2, 4, 6]

    @pytest.mark.parametrize("block,steps", [(1, [4, 8]), (3, [6, 9]), (6, [6, 12])])
    def test_evaluate(self, tmp_path, block, steps):
        """Every ``eval_interval`` updates, at the end of the turn in which it falls."""
        logger = CSVLogger(exp_name="run", log_dir=str(tmp_path))
        make_trainer(
            logger=logger, total_updates=12 if block == 6 else 9, optim_steps_per_batch=block,
            evaluate=lambda: {"success": 0.5}, eval_interval=4,
        ).train()  # fmt: skip
        assert self.rows(tmp_path, "success") == [(step, 0.5) for step in steps]

    def test_what_is_kept_has_no_graph_and_does_not_grow(self):
        trainer = make_trainer()
        trainer.train()
        assert {len(values) for values in trainer._log_dict.values()} == {1}
        kept = [value for values in trainer._log_dict.values() for value in values]
        assert not any(torch.is_tensor(value) and value.requires_grad for value in kept)


class TestCheckpoint:
    @pytest.mark.parametrize("sampler", [RandomSampler, SamplerWithoutReplacement])
    def test_resumed_run_equals_an_unbroken_one(self, tmp_path, sampler):
        torch.manual_seed(0)
        data = Chain().sample(64)

        def buffer():
            made = TensorDictReplayBuffer(
                storage=LazyTensorStorage(64), batch_size=16, sampler=sampler()
            )
            made.extend(data)
            return made

        unbroken, loss = make_loss(), make_loss()
        make_trainer(unbroken, replay_buffer=buffer(), seed=1, total_updates=8).train()
        path = tmp_path / "checkpoint"
        make_trainer(
            loss, replay_buffer=buffer(), seed=1, total_updates=5, checkpoint_path=path
        ).train()
        resumed = make_loss(seed=9)
        trainer = make_trainer(resumed, replay_buffer=buffer(), total_updates=8).resume(path)
        assert trainer.updates == 5
        trainer.train()
        assert_same_state(resumed, unbroken)

    def test_the_rest_is_no_multiple(self, tmp_path):
        path = tmp_path / "checkpoint"
        make_trainer(total_updates=5, checkpoint_path=path).train()
        trainer = make_trainer(total_updates=6, optim_steps_per_batch=2)
        with pytest.raises(ValueError, match="must be a multiple .*, got 1 and 2"):
            trainer.resume(path)

    def test_interval(self, tmp_path, monkeypatch):
        saved = []
        trainer = make_trainer(checkpoint_path=tmp_path / "checkpoint", checkpoint_interval=4)
        monkeypatch.setattr(trainer, "_save_trainer", lambda: saved.append(trainer.updates))
        trainer.train()
        assert saved == [4, 6]  # and once at the end

    def test_finished_run_stays_finished(self, tmp_path):
        path, loss = tmp_path / "checkpoint", make_loss()
        make_trainer(loss, checkpoint_path=path).train()
        resumed = make_loss(seed=9)
        trainer = make_trainer(resumed).resume(path)
        trainer.train()
        assert trainer.updates == 6
        assert_same_state(resumed, loss)

    def test_holds_no_data(self, tmp_path):
        path = tmp_path / "checkpoint"
        buffer = make_buffer(size=20_000)
        make_trainer(replay_buffer=buffer, checkpoint_path=path).train()
        assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < 500_000

    def test_no_such_checkpoint(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="path must be the folder of a checkpoint"):
            make_trainer().resume(tmp_path / "nowhere")

    def test_checkpoint_of_another_network(self, tmp_path):
        path = tmp_path / "checkpoint"
        make_trainer(checkpoint_path=path).train()
        other = EVORLoss(
            FlowMatchingPolicy(VelocityMLP(6, 1, hidden_sizes=(9,)), 1),
            ReturnFlow(VelocityMLP(7, hidden_sizes=(9,))),
        )
        with pytest.raises(RuntimeError, match="loss_module"):
            make_trainer(other).resume(path)

    def test_a_cut_checkpoint(self, tmp_path):
        path = tmp_path / "checkpoint"
        make_trainer(checkpoint_path=path).train()
        largest = max(path.rglob("*.memmap"), key=lambda file: file.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:16])
        trainer = make_trainer()
        before = copy.deepcopy(trainer.loss_module)
        with pytest.raises(ValueError, match=f"{largest.name} is damaged: .* bytes, got 16"):
            trainer.resume(path)
        assert_same_state(trainer.loss_module, before)

    def test_nothing_but_a_checkpoint_is_replaced(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("x")
        for path in (tmp_path, tmp_path / "thesis.txt"):
            with pytest.raises(ValueError, match="checkpoint_path must be a new or empty folder"):
                make_trainer(checkpoint_path=path)
        assert (tmp_path / "thesis.txt").read_text() == "x"
        (tmp_path / "empty").mkdir()
        for _ in range(2):  # empty, then a checkpoint
            make_trainer(checkpoint_path=tmp_path / "empty").train()


class TestBadInput:
    @pytest.mark.parametrize(
        "name",
        ["total_updates", "optim_steps_per_batch", "log_interval", "eval_interval",
         "checkpoint_interval", "batch_size"],
    )  # fmt: skip
    def test_counts(self, name):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
            make_trainer(**{name: 0})

    @pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
    def test_clip_norm(self, value):
        with pytest.raises(ValueError, match="clip_norm must be positive or None, got"):
            make_trainer(clip_norm=value)

    def test_two_discounts(self):
        """Windows of five steps by 0.99 with a value behind them by 0.9 are no return."""
        loss, ted = make_loss().make_value_estimator(gamma=0.9), Chain().sample(64)
        ted["episode"] = torch.zeros(64, dtype=torch.int64)

        def buffer(**windows):
            return TensorDictReplayBuffer(storage=WindowStorage(ted, **windows), batch_size=16)

        with pytest.raises(ValueError, match="gamma of replay_buffer .* 0.9 .*, got 0.99"):
            make_trainer(loss, replay_buffer=buffer(n_step=5, gamma=0.99))
        make_trainer(loss, replay_buffer=buffer(n_step=1, gamma=0.99))  # nothing is summed
        make_trainer(loss, replay_buffer=buffer(n_step=5, gamma=0.9))

    def test_discount_of_a_checkpoint(self, tmp_path):
        """It is part of the loss's state."""
        path = tmp_path / "checkpoint"
        make_trainer(make_loss().make_value_estimator(gamma=0.9), checkpoint_path=path).train()
        ted = Chain().sample(64)
        ted["episode"] = torch.zeros(64, dtype=torch.int64)
        windows = WindowStorage(ted, n_step=5, gamma=0.99)
        loss = make_loss().make_value_estimator(gamma=0.99)
        buffer = TensorDictReplayBuffer(storage=windows, batch_size=16)
        with pytest.raises(ValueError, match="gamma of replay_buffer .* 0.9 .*, got 0.99"):
            make_trainer(loss, replay_buffer=buffer).resume(path)

    def test_discounts_of_a_loss_without(self):
        """Behaviour cloning reads no reward."""
        ted = Chain().sample(64)
        ted["episode"] = torch.zeros(64, dtype=torch.int64)
        actor = TensorDictModule(nn.Linear(4, 1), in_keys=["observation"], out_keys=["action"])
        buffer = TensorDictReplayBuffer(storage=WindowStorage(ted, n_step=5), batch_size=16)
        make_trainer(BCLoss(actor), updater=False, replay_buffer=buffer)

    def test_a_loss_that_names_no_keys(self):
        class Square(LossModule):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(()))

            def forward(self, tensordict):
                return TensorDict(loss=(self.weight * tensordict["observation"]).square().mean())

        make_trainer(Square(), updater=False, replay_buffer=make_buffer()).train()

    def test_not_a_multiple(self):
        with pytest.raises(ValueError, match="total_updates must be a multiple .* got 6 and 4"):
            make_trainer(optim_steps_per_batch=4)


if __name__ == "__main__":
    pytest.main([__file__])

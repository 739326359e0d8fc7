"""BatchNorm under its policies, in one process (on two ranks: test_engine.py, test_memory.py)."""

import pytest
import torch

from imitate_ds.config import ModelConfig, TrainConfig
from imitate_ds.models.imitate import ImitateModel
from imitate_ds.training.batch_norm import batch_norm_policy, hold_batch_norm_statistics, set_training_mode
from tests.training.zero_worker import MODEL, SIZE, TEXT_WIDTH, global_batch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_policy_follows_the_device_and_what_it_cannot_do_is_refused():
    auto, sync = TrainConfig(), TrainConfig(batch_norm="sync")
    assert [batch_norm_policy(auto, device) for device in (CPU, CUDA)] == ["mean", "sync"]
    with pytest.raises(ValueError, match=r"train\.batch_norm = 'sync': SyncBatchNorm needs CUDA; use mean"):
        batch_norm_policy(sync, CPU)


@pytest.mark.parametrize("policy", ["mean", "freeze"])
def test_holding_statistics_changes_nothing_else(policy):
    torch.manual_seed(0)
    config = ModelConfig.model_validate({**MODEL.model_dump(), "projection_norm": "batch"})
    network, batch = ImitateModel(config, TEXT_WIDTH, input_size=SIZE), global_batch(0)
    set_training_mode(network, policy)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with hold_batch_norm_statistics(network):
        held = network(batch)
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    for a, b in zip(held[:-1], network(batch)[:-1], strict=True):  # the last is a temperature, which it has not
        assert torch.equal(a, b)

"""Bytes by what they are for, of plain PyTorch (under ZeRO: test_flops.py)."""

from types import SimpleNamespace

import torch
from torch import nn

from imitate_ds.flight import flight
from imitate_ds.training.held_memory import count_saved, held_bytes

CPU = torch.device("cpu")


def test_weights_gradients_and_state_are_told_apart_and_views_are_not_counted_twice():
    model = nn.Linear(64, 64, bias=False)
    model.register_buffer("view", model.weight.detach()[:2])
    engine = SimpleNamespace(module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    model(torch.ones(2, 64)).sum().backward()
    size = 64 * 64 * 4
    assert held_bytes(engine, CPU) == {"parameters": size, "gradients": size, "buckets": 0, "optimizer": 0}
    engine.optimizer.step()
    engine.optimizer.zero_grad()
    assert held_bytes(engine, CPU) == {"parameters": size, "gradients": 0, "buckets": 0, "optimizer": size}


def test_what_is_saved_for_backward_by_whom_and_at_the_most():
    model = nn.Sequential(nn.Linear(8, 32), nn.Sigmoid())
    with count_saved(model) as saved:
        for rows in (10, 20):  # one after the other, as the chunks of GradCache
            flight.begin("forward")
            out = model(torch.ones(rows, 8))
            flight.begin("loss")
            loss = out.exp().sum()
            assert saved.now == {"activations": rows * (8 + 32) * 4, "loss": rows * 32 * 4}
            flight.begin("backward")
            loss.backward()
            del out, loss
            assert saved.now.total() == 0
    assert saved.most == {"activations": 20 * (8 + 32) * 4, "loss": 20 * 32 * 4}

"""The loss's cost by formula, against a trace of the loss itself."""

import pytest
import torch
from torch import Tensor, nn

from imitate_ds.batch import Batch, Features
from imitate_ds.config import build_run_config
from imitate_ds.objective import imitate_loss
from imitate_ds.planning.loss import _dense_trace, loss_cost
from imitate_ds.planning.trace import trace_step

WIDTH, TEXT = 64, 48


def config_of(backend: str, **objective):
    values = {"name": "x", "data": {"shards": "s"}, "model": {"joint_dim": WIDTH}}
    return build_run_config(values | {"objective": {"backend": backend, **objective}})


def traced(config, studies: int):
    def step(_: nn.Module, count: int) -> Tensor:
        views = [torch.empty(count, 2, WIDTH, requires_grad=True) for _ in range(3)]
        words = [torch.empty(count, WIDTH, requires_grad=True) for _ in range(2)]
        texts, there = torch.empty(count, TEXT), torch.ones(count, dtype=torch.bool)
        batch = Batch([""] * count, torch.empty(count, 2, 1, 1, 1), texts, texts, there, there, 0)
        return imitate_loss(Features(*views, *words), batch, config.objective).total

    given = studies * 4 * (8 * WIDTH + TEXT)
    return trace_step(nn.Identity(), step, studies), given


@pytest.mark.parametrize("studies", [700, 2500])
def test_strips_need_what_their_sizes_say(studies: int) -> None:
    config = config_of("strips")
    trace, given = traced(config, studies)
    found = loss_cost(config, studies=studies, ranks=1, nodes=1, text_width=TEXT, on_cuda=False)
    assert found.peak == pytest.approx(trace.peak() - given, rel=0.1)
    assert found.saved == pytest.approx(trace.saved - given, rel=0.05)
    assert found.flops == pytest.approx(trace.flops.sum(), rel=0.05)
    assert (found.wire, found.messages) == (0, 0)


def test_the_dense_form_is_quadratic() -> None:
    config = config_of("dense")
    found = loss_cost(config, studies=100, ranks=7, nodes=1, text_width=TEXT, on_cuda=True)
    peak, _, flops, _ = _dense_trace(config.objective, WIDTH, TEXT, 700)
    assert found.peak == pytest.approx(peak, rel=0.01)
    assert found.flops == pytest.approx(flops, rel=0.01)


def test_more_ranks_send_more_and_local_negatives_nothing() -> None:
    few, many = (
        loss_cost(config_of("strips"), studies=512, ranks=ranks, nodes=1, text_width=TEXT, on_cuda=False)
        for ranks in (2, 8)
    )
    assert few.wire < many.wire
    assert few.gathered == 2 * 512 * (2 * TEXT * 4 + 2)  # two texts a study, and two masks
    alone = config_of("strips", negatives="local")
    local = loss_cost(alone, studies=512, ranks=8, nodes=1, text_width=TEXT, on_cuda=False)
    assert (local.wire, local.hidden_wire, local.messages) == (0, 0, 0)
    assert local.gathered == few.gathered / 2


def test_terms_that_weigh_nothing_cost_nothing() -> None:
    weights = {"image_impression": 1.0, "image_findings": 0.0, "views_impression": 0.0, "views_findings": 0.0}
    whole, part = (
        loss_cost(config, studies=1024, ranks=1, nodes=1, text_width=TEXT, on_cuda=False)
        for config in (config_of("strips"), config_of("strips", weights=weights))
    )
    assert part.saved == pytest.approx(whole.saved * 2 / 6)

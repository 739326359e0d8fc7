"""Parts of a batch, and the whole from parts."""

import pytest
import torch

from imitate_ds.batch import Batch, Features
from imitate_ds.config import AugmentConfig
from imitate_ds.data.transforms import TrainViews

STUDIES = 5


@pytest.fixture
def batch():
    rows = torch.arange(STUDIES)
    images, texts = rows.view(-1, 1, 1, 1, 1).to(torch.uint8), rows[:, None].float()
    return Batch([f"{i:016x}" for i in rows], images, texts, texts + 10, rows % 2 == 0, rows % 3 == 0, step=7)


def test_split_keeps_every_study_once_and_the_step(batch):
    parts = batch.split(2)
    assert [len(part.keys) for part in parts] == [2, 3]
    assert [len(part.keys) for part in batch.split(4)] == [1, 1, 1, 2]
    assert {part.step for part in parts} == {7}
    assert [key for part in parts for key in part.keys] == batch.keys
    for name in ("images", "findings", "impression", "has_findings", "has_impression"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    (whole,) = batch.split(1)
    assert torch.equal(whole.images, batch.images)


def test_joined_features_are_those_of_the_whole():
    def features(rows, temperature=None):
        return Features(torch.randn(rows, 2, 3), None, None, torch.randn(rows, 3), torch.randn(rows, 3), temperature)

    parts = [features(2), features(3)]
    whole = Features.join(parts)
    assert whole.image_findings is None
    assert whole.temperature is None
    assert torch.equal(whole.image_impression, torch.cat([part.image_impression for part in parts]))
    assert torch.equal(whole.text_findings, torch.cat([part.text_findings for part in parts]))


def test_every_part_has_its_share_in_the_temperature():
    rows = torch.zeros(1, 3)
    temperatures = [torch.full((1,), 0.07, requires_grad=True) for _ in range(4)]
    whole = Features.join([Features(rows, None, None, rows, rows, temperature) for temperature in temperatures])
    assert whole.temperature.shape == (1,)
    whole.temperature.backward()
    assert [temperature.grad.item() for temperature in temperatures] == [0.25] * 4


def test_draws_stay_where_views_are_planned():
    """`meta` stands for a GPU: what the views are computed from stays on the CPU, or the first step fails there."""
    config = AugmentConfig()
    views = TrainViews(config, 8)
    nothing = torch.zeros(2, 3)
    has = torch.ones(2, dtype=torch.bool)
    images = torch.zeros(2, 1, 1, 12, 12, dtype=torch.uint8)
    batch = Batch(["a", "b"], images, nothing, nothing, has, has, 0, draws=views.draw([1, 2]))
    moved = batch.to(torch.device("meta"))
    assert moved.images.device.type == "meta"
    assert moved.draws is not None
    assert views(moved.images[:, 0], moved.draws).shape == (2, 2, 1, 8, 8)
    assert [len(part.draws) for part in batch.split(2)] == [1, 1]

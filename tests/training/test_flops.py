"""Floating-point operations of a step by part: against hand counts, whole steps, ranks, ZeRO, chunks and checkpoints."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from imitate_ds.distributed import init_world
from imitate_ds.training.counters import parameter_counts
from imitate_ds.training.engine import build_engine
from imitate_ds.training.flops import count_flops
from imitate_ds.training.held_memory import count_saved, held_bytes
from tests.training.zero_worker import OPTIM, build_model, global_batch, train, train_config


class TwoTowers(nn.Module):
    """Neither tower's input needs a gradient, as images and frozen texts do not."""

    def __init__(self, again: bool = False):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
        self.text = nn.Linear(32, 4)
        self.again = again

    def forward(self, image, text):
        images = checkpoint(self.image, image, use_reentrant=False) if self.again else self.image(image)
        return images, self.text(text)


IMAGE, TEXT = 2 * 5 * (2 * 8 * 16 + 3 * 16 * 4), 2 * 5 * 2 * 32 * 4  # of the first layers, no gradient of their input


@pytest.mark.parametrize("again", [False, True])
def test_backward_belongs_to_the_part_that_made_it_and_what_is_computed_twice_counts_once(again):
    model = TwoTowers(again)
    with count_flops(model) as flops:
        image, text = model(torch.randn(5, 8), torch.randn(5, 32))
        (image @ text.T).sum().backward()  # the loss, which belongs to no part
    assert flops.by_part == {"image": IMAGE, "text": TEXT}
    assert flops.again == (2 * 5 * 8 * 16 if again else 0)  # checkpointing stops before what it does not need


def test_a_pass_without_gradient_comes_back():
    model, inputs = TwoTowers(), (torch.randn(5, 8), torch.randn(5, 32))
    with count_flops(model) as flops:
        with torch.no_grad():
            model(*inputs)
        sum(side.sum() for side in model(*inputs)).backward()
    assert flops.by_part == {"image": IMAGE, "text": TEXT}
    assert flops.again == 2 * 5 * (8 * 16 + 16 * 4 + 32 * 4)


def test_attention_is_counted_as_its_products():
    class Attention(nn.Module):
        def forward(self, rows):
            return scaled_dot_product_attention(rows, rows, rows)

    model = nn.ModuleDict({"attention": Attention()})
    rows = torch.randn(2, 3, 7, 16, requires_grad=True)
    with count_flops(model) as flops:
        model["attention"](rows).sum().backward()
    assert flops.by_part == {"attention": 3 * 2 * (2 * 2 * 3 * 7 * 7 * 16)}


@pytest.mark.parametrize(("stage", "chunk"), [(1, 0), (3, 2)])
def test_counting_changes_no_number_and_neither_zero_nor_chunks_change_the_count(process_group, stage, chunk):
    """On two ranks: test_pretrain.py, whose losses are golden."""
    here = init_world()
    plain, engine = (build_engine(build_model(), train_config(stage, chunk=chunk), OPTIM) for _ in range(2))
    expected = train(plain, here.rank, here.size, range(2), chunk=chunk)
    with count_flops(engine.module) as flops, count_saved(engine.module) as saved:
        losses, norms = train(engine, here.rank, here.size, range(1), chunk=chunk)
    more = train(engine, here.rank, here.size, range(1, 2), chunk=chunk)
    assert (losses + more[0], norms + more[1]) == expected

    model = build_model().train()
    with count_flops(model) as whole:
        features = model(global_batch(0))
        sum(side.sum() for side in features if side is not None).backward()
    assert set(flops.by_part) == {"image_encoder", "impression_head", "findings_branch", "text_projection"}
    assert flops.by_part == whole.by_part
    assert 0.3 < flops.again / sum(flops.by_part.values()) < 0.4 if chunk else flops.again == 0
    weights = sum(p.numel() for p in model.parameters())
    assert parameter_counts(engine.module)[0] == weights
    held = held_bytes(engine, torch.device("cpu"))
    assert held["parameters"] == pytest.approx(4 * weights, rel=0.01)
    assert held["optimizer"] == pytest.approx(
        3 * 4 * weights, rel=0.01
    )  # DeepSpeed's copy of the weights, and AdamW's two
    assert saved.most.total() > 2**20
    assert saved.now.total() == 0


def test_convolutions_are_told_from_matrix_products():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.Flatten(), nn.Linear(4 * 36, 5, bias=False))
    with count_flops(model) as flops:
        model(torch.randn(3, 2, 8, 8)).sum().backward()
    forward = 2 * 3 * 36 * 4 * 2 * 9
    assert flops.convolutions == flops.by_part["0"] == 2 * forward  # the image wants no gradient
    assert flops.by_part["2"] == 3 * 2 * 3 * 4 * 36 * 5

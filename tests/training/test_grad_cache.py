"""GradCache around a plain engine: exact, alike in both passes (with DeepSpeed on two ranks: test_engine.py)."""

import math
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from imitate_ds.batch import Features
from imitate_ds.config import ModelConfig, ObjectiveConfig, TemperatureConfig, TrainConfig
from imitate_ds.data.shard_plan import rank_rows
from imitate_ds.models.imitate import ImitateModel
from imitate_ds.models.text_tower import TextTower
from imitate_ds.objective import imitate_loss
from imitate_ds.training.batch_norm import set_training_mode
from imitate_ds.training.engine import _check_one_reduction
from imitate_ds.training.grad_cache import backward_in_chunks, chunk_count
from tests.tiny_bert import tiny_bert
from tests.training.zero_worker import MODEL, SIZE, TEXT_WIDTH, WORDS, batch_with_tokens, global_batch

OBJECTIVE = ObjectiveConfig(temperature=TemperatureConfig(learnable=True))


class PlainEngine:
    """What GradCache asks of an engine, without DeepSpeed; remembers what it was asked, and its features."""

    def __init__(self, module):
        self.module, self.seen, self.reductions = module, [], 0

    def __call__(self, batch):
        features = self.module(batch)
        self.seen.append(features)
        return features

    def zero_optimization_stage(self):
        return 0

    @contextmanager
    def no_sync(self):
        assert not self.reductions
        yield

    def allreduce_gradients(self):
        self.reductions += 1

    def backward(self, loss, scale_wrt_gas=True):
        assert not scale_wrt_gas
        loss.backward()


def build(policy="freeze", **model):
    torch.manual_seed(0)
    config = ModelConfig.model_validate({**MODEL.model_dump(), **model})
    network = ImitateModel(config, TEXT_WIDTH, input_size=SIZE, temperature=OBJECTIVE.temperature)
    set_training_mode(network, policy)
    return network


def loss_of(features, batch):
    losses = imitate_loss(features, batch, OBJECTIVE)
    return losses.total, losses


def gradients(network):
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("parts", [4, 3, 1])
def test_chunks_leave_the_gradient_of_the_whole(parts):
    batch, whole, engine = global_batch(0), build(), PlainEngine(build())
    loss_of(whole(batch), batch)[0].backward()
    features, losses = backward_in_chunks(engine, batch.split(parts), Features.join, partial(loss_of, batch=batch))
    assert engine.reductions == 1
    assert losses.total.item() == pytest.approx(loss_of(whole(batch), batch)[0].item(), rel=1e-6)
    assert len(features.image_impression) == len(batch.keys)
    assert not features.image_impression.requires_grad
    expected, found = gradients(whole), gradients(engine.module)
    assert "temperature.exponent" in found
    assert list(found) == list(expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=2e-4, atol=2e-5 * expected[name].abs().max().item())


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_no_rank_cuts_off_a_single_study(ranks):
    for batch_size in range(2 * ranks, 14 * ranks):
        counts = [len(rank_rows(batch_size, rank, ranks)) for rank in range(ranks)]
        for chunk in range(2, 8):
            parts = chunk_count(counts, chunk)
            assert all(count // parts >= 2 for count in counts)
            uneven = counts[0] % 2 or len(set(counts)) > 1
            assert math.ceil(max(counts) / parts) <= chunk + 2 * uneven
            if counts[0] % chunk == 0 and len(set(counts)) == 1:
                assert parts * chunk == counts[0]


def test_an_odd_batch_passes_a_model_with_batch_norm():
    batch, engine = global_batch(0), PlainEngine(build("mean", projection_norm="batch"))
    odd = batch._replace(**{n: v[:5] for n, v in batch._asdict().items() if isinstance(v, list | Tensor)})
    chunks = odd.split(chunk_count([5], 2))
    assert [len(chunk.keys) for chunk in chunks] == [2, 3]
    features, _ = backward_in_chunks(engine, chunks, Features.join, partial(loss_of, batch=odd))
    assert len(features.image_impression) == 5


def test_both_passes_of_a_chunk_draw_alike_and_randomness_goes_on():
    batch, engine = global_batch(0), PlainEngine(build(drop_path=0.5))
    for module in engine.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm's zeros silence what a path may drop
    torch.manual_seed(3)
    backward_in_chunks(engine, batch.split(4), Features.join, partial(loss_of, batch=batch))
    after = torch.get_rng_state()
    for first, second in zip(engine.seen[:4], engine.seen[4:], strict=True):
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)
    torch.manual_seed(3)
    for chunk in batch.split(4):
        engine.module(chunk)
    assert torch.equal(torch.get_rng_state(), after)
    engine.module(batch.split(4)[0])
    assert not torch.equal(engine.module(batch.split(4)[0])[0], engine.seen[0][0])  # it does draw


def test_both_passes_drop_alike_in_a_text_encoder():
    batch, tower = batch_with_tokens(0), TextTower(tiny_bert(WORDS, dropout=0.3), "all")
    network = ImitateModel(MODEL, tower.width, input_size=SIZE, text_tower=tower)
    set_training_mode(network, "freeze")
    engine = PlainEngine(network)
    backward_in_chunks(engine, batch.split(2), Features.join, partial(loss_of, batch=batch))
    for first, second in zip(engine.seen[:2], engine.seen[2:], strict=True):
        assert torch.equal(first.text_findings, second.text_findings)
    assert not torch.equal(network(batch.split(2)[0]).text_findings, engine.seen[0].text_findings)  # it does draw


def test_batch_norm_learns_its_statistics_once():
    batch = global_batch(0)
    engine, alone = PlainEngine(build("mean", projection_norm="batch")), build("mean", projection_norm="batch")
    backward_in_chunks(engine, batch.split(4), Features.join, partial(loss_of, batch=batch))
    for chunk in batch.split(4):
        alone(chunk)
    for (name, found), (_, expected) in zip(engine.module.named_buffers(), alone.named_buffers(), strict=True):
        assert torch.equal(found, expected), name


class Pair(NamedTuple):
    first: Tensor
    second: Tensor
    third: Tensor | None = None


def test_a_feature_without_part_in_the_loss_is_left_alone():
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    engine = PlainEngine(lambda rows: Pair(first(rows), second(rows)))
    engine.module.modules = list  # type: ignore[attr-defined]
    rows = torch.randn(4, 3)

    def join(parts):
        return Pair(torch.cat([part.first for part in parts]), torch.cat([part.second for part in parts]))

    backward_in_chunks(engine, rows.split(2), join, lambda pair: (pair.first.square().sum(), None))
    expected = torch.autograd.grad(first(rows).square().sum(), first.weight)[0]
    torch.testing.assert_close(first.weight.grad, expected)
    assert second.weight.grad is None


def test_an_optimizer_that_cannot_add_up_chunks_is_refused_at_the_start():
    engine = PlainEngine(nn.Identity())
    engine.zero_optimization_stage = lambda: 1  # type: ignore[method-assign]
    engine.optimizer = nullcontext()  # type: ignore[attr-defined]
    train = TrainConfig(micro_batch_size=4, grad_cache_chunk=2)
    with pytest.raises(ValueError, match=r"train\.grad_cache_chunk = 2: DeepSpeed's nullcontext"):
        _check_one_reduction(engine, train)

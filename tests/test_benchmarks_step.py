"""The published step of benchmarks/step.py computes what ours computes; the benchmark runs, and says nothing about speed here."""

import importlib
import json
import sys
from copy import deepcopy

import pytest
import torch
from transformers import BertConfig, BertModel

from imitate_ds.batch import Batch
from imitate_ds.config import build_run_config
from imitate_ds.models.aggregation import draw_seed
from imitate_ds.models.imitate import ImitateModel
from imitate_ds.objective import imitate_loss
from imitate_ds.training.batch_norm import set_training_mode

pytestmark = pytest.mark.slow

STUDIES, TEXT_WIDTH, SIZE = 4, 32, 32
NAMES = {  # of ours -> of the published network
    "image_encoder.backbone.": "backbone.",
    "impression_head.layers.": "impression_head.",
    "findings_branch.aggregation.": "block.",
    "findings_branch.projection.layers.": "findings_head.",
    "text_projection.layers.": "text_head.",
}


@pytest.fixture(scope="module")
def step(repository):
    """The module; benchmarks are scripts, which import one another by their folder."""
    sys.path.insert(0, str(repository / "benchmarks"))
    try:
        yield importlib.import_module("step")
    finally:
        sys.path.remove(str(repository / "benchmarks"))


@pytest.fixture(scope="module")
def published(step):
    return sys.modules["published_step"]


@pytest.fixture(scope="module")
def config():
    values = {"name": "x", "preset": "paper", "data": {"shards": "none"}, "model": {"image_encoder": "resnet18"}}
    return build_run_config(values)


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(1)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 100}
    return BertModel(BertConfig(hidden_size=TEXT_WIDTH, **layers), add_pooling_layer=False).eval()


@pytest.fixture(scope="module")
def studies(published, text):
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(256, (STUDIES, 2, 1, SIZE, SIZE), generator=generator).byte()
    tokens = {}
    for section in published.SECTIONS:
        lengths = torch.randint(4, 12, (STUDIES, 1), generator=generator)
        ids = torch.randint(100, (STUDIES, int(lengths.max())), generator=generator)
        tokens[section] = {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths).long(),
        }
    with torch.no_grad():
        cached = {name: text(**tokens[name]).last_hidden_state[:, 0] for name in published.SECTIONS}
    return published.Studies(images, tokens, cached)


@pytest.fixture(scope="module")
def ours(config, published, studies):
    """Our model and its batch of the same studies; BatchNorm frozen, since the published one sees one view at a time."""
    torch.manual_seed(3)
    model = ImitateModel(config.model, TEXT_WIDTH, input_size=SIZE)
    with torch.no_grad():  # both begin at zero, where no position matters
        for parameter in (model.findings_branch.aggregation.cls_token, model.findings_branch.aggregation.positions):
            parameter.normal_()
    set_training_mode(model, "freeze")
    present = torch.ones(STUDIES, dtype=torch.bool)
    texts = studies.texts["findings"], studies.texts["impression"]
    return model, Batch([""] * STUDIES, studies.images, *texts, present, present, step=5)


def loss_and_gradient(published, savings, ours, studies, text):
    """Of the published network with our weights and our draws."""
    model, batch = ours
    encoder = model.image_encoder
    text = None if savings.cached_text else text
    network = published.PublishedNetwork(deepcopy(encoder.backbone), encoder.channels, text, TEXT_WIDTH, savings)
    state = {}
    for name, tensor in model.state_dict().items():
        old, new = next(names for names in NAMES.items() if name.startswith(names[0]))
        state[new + name.removeprefix(old)] = tensor
    left = network.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    assert all(name.startswith("text.") for name in left.missing_keys)
    set_training_mode(network, "freeze")
    draws = [model.findings_branch.aggregation.draw_channels(draw_seed("step", batch.step, i)) for i in range(2)]
    total = torch.stack(published.published_losses(*network(studies, draws), savings)).sum()
    weights = [network.backbone.conv1.weight, network.block.attention.in_proj_weight, network.text_head[0].weight]
    return total, torch.autograd.grad(total, weights)


def test_published_network_and_losses_are_our_paper_preset(published, config, ours, studies, text):
    model, batch = ours
    total = imitate_loss(model(batch), batch, config.objective).total
    weights = [
        model.image_encoder.backbone.conv1.weight,
        model.findings_branch.aggregation.attention.in_proj_weight,
        model.text_projection.layers[0].weight,
    ]
    gradients = torch.autograd.grad(total, weights)
    one_by_one = [published.Savings(**{name: True}) for name in published.Savings._fields]
    for savings in [published.Savings(), *one_by_one, published.Savings(*[True] * len(one_by_one))]:
        same, theirs = loss_and_gradient(published, savings, ours, studies, text)
        torch.testing.assert_close(same, total, rtol=2e-6, atol=0)
        for found, expected in zip(theirs, gradients, strict=True):
            assert (found - expected).norm() < 2e-4 * expected.norm(), savings


def test_published_losses_in_float64(published, config):
    generator = torch.Generator().manual_seed(4)
    rows = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    unit = lambda *shape: torch.nn.functional.normalize(rows(*shape, 16), dim=-1)  # noqa: E731
    features = published.Features(*(unit(9, 2) for _ in range(3)), *(unit(9) for _ in range(2)))
    priors = {name: rows(9, 24) for name in published.SECTIONS}
    present = torch.ones(9, dtype=torch.bool)
    batch = Batch([""] * 9, torch.empty(9, 2, 1, 0, 0), priors["findings"], priors["impression"], present, present, 0)
    losses = published.published_losses(features, priors, published.Savings())
    assert len(losses) == 8
    expected = imitate_loss(features, batch, config.objective).total
    torch.testing.assert_close(torch.stack(losses).sum(), expected, rtol=1e-12, atol=0)


def test_tokens_have_the_published_shapes(published):
    draw = published.draw_channels([256, 512, 1024, 2048], torch.device("cpu"))
    assert [len(kept) for kept in draw] == [64, 76, 102, 204]
    block, asked = published.AggregationBlock(), []
    block.attention.register_forward_pre_hook(lambda _, given: asked.append([side.shape[1] for side in given]))
    levels = [
        torch.randn(2, width, side, side) for width, side in zip([256, 512, 1024, 2048], [56, 28, 14, 7], strict=True)
    ]
    assert block(levels, draw, cls_query=False).shape == (2, 256)
    assert asked == [[513, 513, 513]]


def test_steps_are_measured_part_by_part(step, process_group):
    """In this process, so without memory: that of a process of its own is asked for below."""
    small = step.Job("", "resnet10t", 32, 2, "fp32", "cpu", warm=1, steps=1)
    found = {}
    for row in ("published_gathered", "cached_text", "ours"):
        found[row] = step.measure_here(small._replace(row=row))
        parts = found[row]["parts"]
        assert {"heads", "backbone", "loss", "optimizer"} <= set(parts)
        assert found[row]["busy_seconds"] == pytest.approx(sum(parts.values()))  # of the one step after the warm one
    assert found["published_gathered"]["parts"]["text"] > 0
    assert "text" not in found["cached_text"]["parts"]
    assert found["ours"]["operations"] < found["cached_text"]["operations"] < found["published_gathered"]["operations"]
    chunks = step.measure_here(small._replace(row="ours", batch=4, chunk=2))
    assert chunks["operations"] > 2.2 * found["ours"]["operations"]  # the second forward pass
    for row in ("published", "ours"):
        assert step.measure_here(small._replace(row=row, loss_only=True))["seconds"] > 0


def test_parts_begin_where_they_are_told_to(step, monkeypatch):
    phases, clock = step.Phases(torch.device("cpu")), iter([0, 1, 3, 3.5, 10, 12, 13, 20])
    monkeypatch.setattr(phases, "_now", lambda: next(clock))
    for name in (step.STEP, "backbone", "backbone", "loss", "backbone", step.STEP, "loss", "backbone", step.STEP):
        phases.enter(name)
    assert phases.steps() == [
        {"other": 1, "backbone": 2 + 6.5, "loss": 0.5},
        {"other": 2, "loss": 1, "backbone": 7},
    ]


def test_the_line_through_peaks_says_what_it_is(step):
    line = step.line_through({4: 140, 8: 180, 16: 260}, many=1024)
    assert (line["fixed_bytes"], line["bytes_a_study"], line["bytes_there"]) == pytest.approx((100, 10, 10340))
    assert line["kind"] == "extrapolated"
    assert step.line_through({4: 140, 8: 180}, many=8)["kind"] == "measured"


def test_the_benchmark_writes_what_it_measured(step, tmp_path, monkeypatch, capsys):
    """Its processes are real; the one that starts them is this one."""
    out = tmp_path / "step.json"
    settings = "--encoder resnet10t --size 32 --batch 2 --rows ours --repeats 1 --steps 1 --threads 1 --only rows"
    monkeypatch.setattr(sys, "argv", ["step.py", *settings.split(), "--out", str(out)])
    step.main()
    assert "| ours, all of them |" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert record["gpu"] == "not measured"
    ours = record["rows"]["cells"]["ours"]
    assert ours["pairs_per_second"] > 0
    assert 2**20 < ours["peak_bytes"] < 2**31

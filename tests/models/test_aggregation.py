import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

from imitate_ds.config import AggregationConfig, build_run_config
from imitate_ds.models.aggregation import HierarchicalAggregation, draw_seed

RESNET50 = [256, 512, 1024, 2048]
SMALL = [8, 12, 16, 20]
PAPER = build_run_config({"name": "x", "preset": "paper", "data": {"shards": "x"}}).model.aggregation


def small(**settings) -> HierarchicalAggregation:
    block = HierarchicalAggregation(SMALL, AggregationConfig(pool=4, heads=2, slots=12, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():  # off their zeros, so that every part counts
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return block.double()


def small_levels() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(3, width, side, side, generator=generator, dtype=torch.float64)
        for width, side in zip(SMALL, (16, 8, 4, 2), strict=True)
    ]


def test_published_shapes_of_resnet50():
    block = HierarchicalAggregation(RESNET50, PAPER)
    assert block.kept == [64, 76, 102, 204]
    assert sum(block.kept) == 446
    assert block.width == 256
    assert block.attention.num_heads == 4
    assert block.positions.shape == (1, 513, 256)
    assert not block.positions.any()
    assert not block.cls_token.any()
    levels = [torch.zeros(1, c, s, s) for c, s in zip(RESNET50, (56, 28, 14, 7), strict=True)]
    assert block._tokens(levels, block.draw_channels(0)).shape == (1, 512, 256)  # CLS makes 513
    assert block(levels, seed=0).shape == (1, 256)


@pytest.mark.parametrize("settings", [{}, {"mask_padding": False}, {"with_replacement": True}])
def test_asking_the_cls_query_alone_equals_full_attention(settings):
    block, levels = small(**settings), small_levels()
    draw = block.draw_channels(5)
    tokens = torch.cat(
        [adaptive_avg_pool2d(level, 4).flatten(2)[:, i] for level, i in zip(levels, draw, strict=True)], dim=1
    )
    assert tokens.shape[1] == 2 + 1 + 1 + 2
    if not block.config.mask_padding:
        tokens = torch.cat([tokens, tokens.new_zeros(3, 12 - tokens.shape[1], 16)], dim=1)
    x = torch.cat([block.cls_token.expand(3, -1, -1), tokens], dim=1)
    x = x + block.positions[:, : x.shape[1]]
    full = x + block.attention(x, x, x)[0]
    torch.testing.assert_close(block(levels, seed=5), full[:, 0], rtol=1e-12, atol=1e-13)


def test_padding_without_a_mask_changes_the_result():
    levels = small_levels()
    masked, published = (small(mask_padding=flag)(levels, seed=5) for flag in (True, False))
    assert (masked - published).abs().max() > 1e-3


def test_draws_are_distinct_seeded_and_leave_the_global_generator_alone():
    block = HierarchicalAggregation(RESNET50, AggregationConfig())
    state = torch.get_rng_state()
    first, again, other = (block.draw_channels(seed) for seed in (11, 11, 12))
    assert torch.equal(torch.get_rng_state(), state)
    for level, (drawn, width) in enumerate(zip(first, RESNET50, strict=True)):
        assert len(drawn.unique()) == len(drawn) == block.kept[level]
        assert 0 <= drawn.min() < drawn.max() < width
        assert torch.equal(drawn, again[level])
        assert not torch.equal(drawn, other[level])


def test_published_draws_repeat_channels():
    drawn = HierarchicalAggregation(RESNET50, PAPER).draw_channels(0)
    assert any(len(level.unique()) < len(level) for level in drawn)


def test_seeds_of_draws_differ_and_are_pinned():
    seeds = {draw_seed("step", step, draw) for step in range(50) for draw in range(2)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert draw_seed("step", 7, 1) == 9204327285909719417  # another value would change every run that is resumed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots": 445}, r"model.aggregation.slots = 445: must be at least 446"),
        ({"keep": (0.5, 0.5)}, r"model.aggregation.keep = \[0.5, 0.5\]: must be one share .* each of the 4 levels"),
        ({"keep": (0.5, 0.5, 0.5, 1.5)}, r"model.aggregation.keep"),
        ({"heads": 3}, r"model.aggregation.heads = 3: must divide pool\^2 = 256"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        HierarchicalAggregation(RESNET50, AggregationConfig(**settings))

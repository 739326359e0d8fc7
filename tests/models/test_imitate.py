import pytest
import torch
from torch import Tensor

from imitate_ds.batch import Batch
from imitate_ds.config import AggregationConfig, ModelConfig, ObjectiveConfig
from imitate_ds.models.imitate import ImitateModel
from imitate_ds.objective import imitate_loss

STUDIES, TEXT, JOINT = 4, 24, 16


def batch(missing_findings: tuple[int, ...] = (), missing_impression: tuple[int, ...] = (), step: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(0)
    findings, impression = (torch.randn(STUDIES, TEXT, generator=generator) for _ in "fi")
    has_findings, has_impression = (torch.ones(STUDIES, dtype=torch.bool) for _ in "fi")
    has_findings[list(missing_findings)] = False
    has_impression[list(missing_impression)] = False
    return Batch(
        keys=[f"{i:016x}" for i in range(STUDIES)],
        images=torch.randint(0, 256, (STUDIES, 2, 1, 64, 64), dtype=torch.uint8, generator=generator),
        findings=findings * has_findings[:, None],
        impression=impression * has_impression[:, None],
        has_findings=has_findings,
        has_impression=has_impression,
        step=step,
    )


def model(name: str = "resnet10t", **settings) -> ImitateModel:
    torch.manual_seed(0)
    return ImitateModel(
        ModelConfig(image_encoder=name, joint_dim=JOINT, text_hidden=20, **settings), TEXT, input_size=64
    )


def is_unit(rows: Tensor) -> bool:
    return rows.dtype == torch.float32 and torch.allclose(rows.norm(dim=-1), torch.ones(rows.shape[:-1]), atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_features_and_gradients_of_every_kind_of_backbone(name):
    network = model(name)
    features = network(batch())
    for rows in (features.image_impression, features.image_findings, features.view_findings):
        assert rows.shape == (STUDIES, 2, JOINT)
        assert is_unit(rows)
    for rows in (features.text_impression, features.text_findings):
        assert rows.shape == (STUDIES, JOINT)
        assert is_unit(rows)
    assert not torch.equal(features.image_findings, features.view_findings)
    imitate_loss(features, batch(), ObjectiveConfig()).total.backward()
    without = [key for key, parameter in network.named_parameters() if parameter.grad is None]
    assert not without
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_every_parameter_gets_a_gradient_when_everything_is_masked():
    network = model()
    everyone = tuple(range(STUDIES))
    empty = batch(everyone, everyone)
    losses = imitate_loss(network(empty), empty, ObjectiveConfig())
    losses.total.backward()
    assert losses.total == 0
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert not parameter.grad.any(), key


def test_no_parameter_at_the_root_and_none_without_dimension():
    network = model()
    assert not list(network.parameters(recurse=False))
    assert all(parameter.ndim for parameter in network.parameters())


def test_autocast_keeps_unit_rows_in_float32():
    network = model()
    with torch.autocast("cpu", torch.bfloat16):
        features = network(batch())
        assert all(is_unit(rows) for rows in features if rows is not None)
        losses = imitate_loss(features, batch(), ObjectiveConfig())
    assert all(loss.dtype == torch.float32 for loss in losses)


def test_layer_norm_model_runs_in_bfloat16_throughout():
    network = model("convnext_atto", projection_norm="layer").bfloat16()
    assert all(is_unit(rows) for rows in network(batch()) if rows is not None)


def test_the_step_decides_the_channels():
    network = model(projection_norm="layer")
    for module in network.image_encoder.modules():  # the same features at every call
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    first, again, other = (network(batch(step=step)).image_findings for step in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@torch.inference_mode()
def test_evaluation_is_fixed_and_does_not_depend_on_the_batch():
    network = model().eval()
    whole = batch(step=9)
    features = network(whole)
    assert torch.equal(features.image_findings, features.view_findings)
    assert torch.equal(features.image_findings, network(whole._replace(step=1)).image_findings)
    impression, findings, pooled = network.encode_image(whole.images[:1, 0])
    assert pooled.shape == (1, 512)
    assert is_unit(findings)
    torch.testing.assert_close(impression, features.image_impression[:1, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(findings, features.image_findings[:1, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.encode_text(whole.findings), features.text_findings, rtol=1e-4, atol=1e-5)


def test_eval_draws_are_averaged():
    one, four = (model(aggregation=AggregationConfig(eval_draws=draws)).eval() for draws in (1, 4))
    four.load_state_dict(one.state_dict())
    images = batch().images[:, 0]
    assert not torch.equal(one.encode_image(images)[1], four.encode_image(images)[1])


def test_without_findings_branch():
    network = model(aggregation=AggregationConfig(enabled=False))
    features = network(batch())
    assert features.image_findings is None
    assert features.view_findings is None
    assert network.eval().encode_image(batch().images[:, 0])[1] is None
    with pytest.raises(ValueError, match=r"objective.weights.image_findings = 1.0: must be 0"):
        imitate_loss(features, batch(), ObjectiveConfig())


def test_missing_sections_do_not_reach_the_text_statistics():
    network = model()
    some = batch(missing_findings=(1,), missing_impression=(2,))
    network(some)
    norm = network.text_projection.layers[1]
    texts = torch.cat([some.impression[[0, 1, 2, 3]], some.findings[[0, 1, 2, 3]]])
    texts[2], texts[5] = some.findings[2], some.impression[1]
    hidden = network.text_projection.layers[0](texts)
    torch.testing.assert_close(norm.running_mean, 0.1 * hidden.mean(dim=0), rtol=1e-4, atol=1e-6)


def test_head_widths_follow_the_settings():
    assert model().impression_head.layers[0].out_features == 512  # as wide as the last level
    assert model(image_hidden=48).impression_head.layers[0].out_features == 48
    assert model().findings_branch.projection.layers[0].in_features == 256
    assert model().text_projection.layers[0].out_features == 20


def test_text_of_another_encoder_is_refused():
    with pytest.raises(ValueError, match=r"embeddings: must be \[n, 24\]"):
        model().encode_text(torch.zeros(2, 25))


def test_a_network_in_float64_computes_in_float64():
    """The definition that faster forms are held to: nothing on the way is rounded to float32."""
    features = model().double()(batch())
    assert {rows.dtype for rows in features if rows is not None} == {torch.float64}
    assert (features.image_impression.norm(dim=-1) - 1).abs().max() < 1e-14
    loss = imitate_loss(features, batch(), ObjectiveConfig()).total
    assert loss.dtype == torch.float64

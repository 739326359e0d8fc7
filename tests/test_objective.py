"""The four terms and their sum, against the eight losses of the published program."""

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from imitate_ds.batch import Batch, Features
from imitate_ds.config import NegativesConfig, ObjectiveConfig, TemperatureConfig, TermWeights
from imitate_ds.objective import TERMS, imitate_loss, loss_flops
from imitate_ds.ops.contrastive import clinical_contrastive_loss

STUDIES, JOINT, TEXT = 9, 6, 15
PUBLISHED = ObjectiveConfig(negatives=NegativesConfig(scope="local"), target_norm="none")


@pytest.fixture
def given() -> tuple[Features, Batch]:
    generator = torch.Generator().manual_seed(4)

    def unit(*shape):
        rows = torch.randn(*shape, JOINT, generator=generator, dtype=torch.float64)
        return normalize(rows, dim=-1).requires_grad_()

    features = Features(*(unit(STUDIES, 2) for _ in range(3)), *(unit(STUDIES) for _ in range(2)))
    findings, impression = (torch.randn(STUDIES, TEXT, generator=generator) for _ in "fi")
    has_findings, has_impression = torch.arange(STUDIES) != 2, torch.arange(STUDIES) != 5
    batch = Batch(
        keys=[""] * STUDIES,
        images=torch.empty(STUDIES, 2, 1, 0, 0),
        findings=findings * has_findings[:, None],
        impression=impression * has_impression[:, None],
        has_findings=has_findings,
        has_impression=has_impression,
        step=0,
    )
    return features, batch


def eight_losses(features: Features, batch: Batch) -> torch.Tensor:
    """The sum as the published program forms it, doubles and all, on the studies that have the text."""
    d, r, other, t_i, t_f = features[:5]
    concluded, described = batch.has_impression, batch.has_findings
    prior_i, prior_f = batch.impression[concluded], batch.findings[described]

    def ell(x, y, keep, prior, temperature):
        return clinical_contrastive_loss(x[keep], y[keep], prior, temperature=temperature)

    return sum(
        [
            ell(d[:, 0], t_i, concluded, prior_i, 0.07),
            ell(d[:, 1], t_i, concluded, prior_i, 0.07),
            ell(r[:, 0], t_f, described, prior_f, 0.07),
            ell(r[:, 1], t_f, described, prior_f, 0.07),
            ell(d[:, 0], d[:, 1], concluded, prior_i, 0.2),
            ell(d[:, 1], d[:, 0], concluded, prior_i, 0.2),
            ell(other[:, 0], other[:, 1], described, None, 0.2),
            ell(other[:, 1], other[:, 0], described, None, 0.2),
        ]
    )


@pytest.mark.parametrize("backend", ["dense", "strips"])
def test_total_is_the_published_sum_of_eight(given, backend):
    features, batch = given
    losses = imitate_loss(features, batch, PUBLISHED.model_copy(update={"backend": backend}))
    expected = eight_losses(features, batch)
    torch.testing.assert_close(losses.total, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(losses.total, features[:5]), torch.autograd.grad(expected, features[:5]), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_weights_weigh_and_zero_leaves_out(given):
    features, batch = given
    whole = imitate_loss(features, batch, PUBLISHED)
    for name in TERMS:
        alone = PUBLISHED.model_copy(update={"weights": TermWeights(**{term: 0.5 * (term == name) for term in TERMS})})
        losses = imitate_loss(features, batch, alone)
        torch.testing.assert_close(losses.total, 0.5 * getattr(whole, name))
        assert all(getattr(losses, term) == 0 for term in TERMS if term != name)


def test_settings_reach_the_loss(given):
    features, batch = given
    base = imitate_loss(features, batch, PUBLISHED)
    changes = [
        {"temperature": TemperatureConfig(init=0.1)},
        {"views_temperature": 0.3},
        {"prior_strength": 1.0},
        {"target_norm": "row"},
    ]
    changed = [
        {name for name in TERMS if getattr(losses, name) != getattr(base, name)}
        for losses in (imitate_loss(features, batch, PUBLISHED.model_copy(update=change)) for change in changes)
    ]
    softened = {"image_impression", "image_findings", "views_impression"}
    assert changed == [
        {"image_impression", "image_findings"},
        {"views_impression", "views_findings"},
        softened,
        softened,
    ]


@pytest.mark.parametrize(
    "weights",
    [
        TermWeights(),
        TermWeights(image_findings=0, views_findings=0),
        TermWeights(image_impression=0, views_impression=0),
        TermWeights(image_impression=0, image_findings=0, views_impression=0),
    ],
)
def test_the_formula_counts_what_the_dense_form_multiplies(given, weights):
    config = PUBLISHED.model_copy(update={"weights": weights, "backend": "dense"})
    with FlopCounterMode(display=False) as counter:
        imitate_loss(*given, config).total.backward()
    formula = loss_flops(config, compared=STUDIES, views=2, joint=JOINT, text=TEXT)
    assert counter.get_total_flops() == STUDIES * formula


def test_global_on_one_rank_is_local(given):
    features, batch = given
    scopes = (NegativesConfig(scope=scope) for scope in ("local", "global"))
    both = [imitate_loss(features, batch, PUBLISHED.model_copy(update={"negatives": n})) for n in scopes]
    assert torch.equal(both[0].total, both[1].total)


def test_a_single_view_has_no_views_terms(given):
    features, batch = given
    single = features._replace(**{name: getattr(features, name)[:, :1] for name in Features._fields[:3]})
    with pytest.raises(ValueError, match=r"objective.weights.views_impression = 2.0: must be 0 for batches of 1 view"):
        imitate_loss(single, batch, PUBLISHED)
    weights = TermWeights(views_impression=0, views_findings=0)
    losses = imitate_loss(single, batch, PUBLISHED.model_copy(update={"weights": weights}))
    assert losses.views_impression == 0
    assert losses.total == losses.image_impression + losses.image_findings


def test_a_learned_temperature_is_that_of_images_against_texts(given):
    features, batch = given
    constant = imitate_loss(features, batch, PUBLISHED.model_copy(update={"temperature": TemperatureConfig(init=0.1)}))
    learned = features._replace(temperature=torch.tensor([0.1], requires_grad=True))
    losses = imitate_loss(learned, batch, PUBLISHED)
    torch.testing.assert_close(losses.total, constant.total)
    losses.total.backward()
    assert learned.temperature is not None
    assert learned.temperature.grad is not None
    assert learned.temperature.grad.abs() > 1


@pytest.mark.parametrize("backend", ["dense", "strips"])
def test_nan_is_never_hidden(given, backend):
    features, batch = given
    broken = features.image_impression.detach().clone()
    broken[1, 0, 2] = torch.nan
    losses = imitate_loss(
        features._replace(image_impression=broken), batch, PUBLISHED.model_copy(update={"backend": backend})
    )
    assert losses.total.isnan()
    assert losses.image_findings.isfinite()

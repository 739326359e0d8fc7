"""Several gloo ranks against one process: the same loss, the same gradient, and a wrong variant that shows."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from imitate_ds.batch import Batch, Features
from imitate_ds.config import NegativesConfig, ObjectiveConfig
from imitate_ds.distributed import (
    count_rows,
    gather_rows,
    gather_rows_keep_gradient,
    scale_gradient,
    world,
)
from imitate_ds.objective import exchange_texts, imitate_loss
from imitate_ds.ops import contrastive_strips
from imitate_ds.ops.contrastive import Pair, clinical_contrastive_losses

pytestmark = pytest.mark.slow

STUDIES, PIXELS, JOINT, TEXT = 12, 10, 6, 15
RAGGED = {1: (12,), 2: (5, 7), 3: (4, 0, 8), 4: (2, 6, 1, 3)}  # studies a rank holds
OWNER, SCATTER = NegativesConfig(exchange="owner"), NegativesConfig(exchange="reduce_scatter")
CONFIGS = {
    "ref": ObjectiveConfig(),
    "row": ObjectiveConfig(target_norm="row"),
    "none": ObjectiveConfig(target_norm="none", prior_strength=1.0),
    "ref, owner": ObjectiveConfig(backend="strips", negatives=OWNER),
    "row, owner": ObjectiveConfig(backend="strips", negatives=OWNER, target_norm="row"),
    "none, owner": ObjectiveConfig(backend="strips", negatives=OWNER, target_norm="none", prior_strength=1.0),
    "ref, scatter": ObjectiveConfig(backend="strips", negatives=SCATTER),
    "row, scatter": ObjectiveConfig(backend="strips", negatives=SCATTER, target_norm="row"),
    "none, scatter": ObjectiveConfig(backend="strips", negatives=SCATTER, target_norm="none", prior_strength=1.0),
}
LOCAL = ObjectiveConfig(negatives=NegativesConfig(scope="local"))
LOCALS = {"dense": LOCAL, "strips": LOCAL.model_copy(update={"backend": "strips"})}
PRECISIONS = {"fp64": (torch.float64, "fp32"), "fp32": (torch.float32, "fp32"), "fp16": (torch.float32, "fp16")}
FORMS = [("dense", "auto"), ("strips", "owner"), ("strips", "reduce_scatter")]


class Network(nn.Module):
    """Linear maps in float64, so that a rank's rows do not depend on the rest of the batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.impression, self.findings, self.view = (nn.Linear(PIXELS, JOINT).double() for _ in range(3))
        self.text = nn.Linear(TEXT, JOINT).double()
        self.temperature = nn.Parameter(torch.tensor([0.07], dtype=torch.float64))

    def forward(self, views: Tensor, batch: Batch) -> Features:
        images = (normalize(branch(views), dim=-1) for branch in (self.impression, self.findings, self.view))
        texts = (normalize(self.text(text), dim=-1) for text in (batch.impression, batch.findings))
        return Features(*images, *texts, self.temperature)


def own_rows(rank: int, size: int, total: int) -> slice:
    """Uneven shares of `total` rows: those of RAGGED, for any total."""
    ends = [sum(RAGGED[size][:n]) * total // STUDIES for n in (rank, rank + 1)]
    return slice(*ends)


def samples(rank: int, size: int) -> tuple[Tensor, Batch]:
    """This rank's slice of one fixed global batch. The last third has no findings: on four ranks, all of two ranks."""
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(STUDIES, 2, PIXELS, generator=generator, dtype=torch.float64)
    findings, impression = (torch.randn(STUDIES, TEXT, generator=generator, dtype=torch.float64) for _ in "fi")
    has_findings, has_impression = torch.arange(STUDIES) < 8, torch.arange(STUDIES) != 3
    mine = own_rows(rank, size, STUDIES)
    keys = [f"{i:016x}" for i in range(STUDIES)][mine]
    tensors = (findings[mine], impression[mine], has_findings[mine], has_impression[mine])
    return views[mine], Batch(keys, torch.empty(len(keys), 2, 1, 0, 0), *tensors, step=0)


def embeddings(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """Three sides in a cone, as early training has them, a prior and a mask; more rows than strips are high."""
    generator = torch.Generator().manual_seed(2)

    def draw(width: int, centre: float) -> Tensor:
        return torch.randn(150, width, generator=generator, dtype=torch.float64) + centre

    sides = [normalize(draw(32, 0.7), dim=1).to(dtype) for _ in range(3)]
    prior, valid = draw(40, 0).to(dtype), torch.rand(150, generator=generator) > 0.2
    valid[:30] = False  # a whole strip
    return sides, prior, valid


def averaged_gradient(network: Network, loss: Tensor) -> Tensor:
    """One vector, averaged over ranks as DeepSpeed averages."""
    parts = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True, materialize_grads=True)
    gradient = torch.cat([part.flatten() for part in parts])
    if world().size > 1:
        dist.all_reduce(gradient)
        gradient /= world().size
    return gradient


def clip_loss(features: Features, *, exact: bool) -> Tensor:
    """Plain InfoNCE of images and impressions on gathered rows; not `exact`: as open_clip without gather_with_grad."""
    image, text = features.image_impression[:, 0], features.text_impression
    if exact:
        held = count_rows(len(image))
        image, text = gather_rows_keep_gradient(image, held), gather_rows_keep_gradient(text, held)
        loss = sum(cross_entropy(a @ b.T / 0.07, torch.arange(len(a))) for a, b in ((image, text), (text, image)))
        return scale_gradient(loss, world().size)
    held = count_rows(len(image))
    own = torch.arange(held.total)[held.own]
    whole = gather_rows(image, held), gather_rows(text, held)
    if not len(image):
        return (image.sum() + text.sum()) * 0
    return sum(cross_entropy(a @ b.T / 0.07, own) for a, b in ((image, whole[1]), (text, whole[0])))


def measure(rank: int, size: int) -> dict[str, Tensor]:
    network = Network()
    views, batch = samples(rank, size)
    results: dict[str, Tensor] = {}
    for name, config in CONFIGS.items():
        texts = exchange_texts(batch, config)
        losses = imitate_loss(network(views, batch), batch, config, texts)
        results[f"{name}/losses"] = torch.stack(losses).detach()
        results[f"{name}/gradient"] = averaged_gradient(network, losses.total)
    for name, config in LOCALS.items() if batch.keys else ():
        losses = imitate_loss(network(views, batch), batch, config)
        results[f"local, {name}/losses"] = torch.stack(losses).detach()
    for name, exact in {"clip": True, "wrong": False}.items():
        loss = clip_loss(network(views, batch), exact=exact)
        gradient = torch.autograd.grad(loss, [network.impression.weight, network.text.weight])
        results[f"{name}/gradient"] = torch.cat([part.flatten() for part in gradient])
        if size > 1:
            dist.all_reduce(results[f"{name}/gradient"])
            results[f"{name}/gradient"] /= size
    if size > 1:
        with pytest.raises(ValueError, match=r"text width = 7, 8.* on ranks 0 to \d: must not differ between ranks"):
            count_rows(2, **{"text width": 7 + rank})
    for precision, (dtype, operands) in PRECISIONS.items():
        for backend, exchange in FORMS:
            group = of_group(rank, size, dtype, backend, exchange, operands)
            results |= {f"{backend} {exchange} {precision}/{name}": tensor for name, tensor in group.items()}
    return results


def of_group(rank: int, size: int, dtype, backend: str, exchange: str, operands: str) -> dict[str, Tensor]:
    """Losses of a group and the gradients of own rows, of the whole batch once all ranks' lie together."""
    (first, second, text), prior, valid = embeddings(dtype)
    held = count_rows(len(first[own_rows(rank, size, len(first))]), width=32)
    leaves = [side[held.own].clone().requires_grad_() for side in (first, second, text)]
    tau = torch.tensor(0.07, dtype=dtype, requires_grad=True)
    pairs = [Pair(leaves[0], leaves[2], tau), Pair(leaves[1], leaves[2], tau), Pair(leaves[0], leaves[1], 0.2)]
    options = {"valid": valid, "target_norm": "ref", "rows": held, "exchange": exchange, "operands": operands}
    losses = clinical_contrastive_losses(pairs, prior, backend=backend, **options)
    *gradients, d_tau = torch.autograd.grad((losses * losses.new_tensor([1.0, 1.0, 2.0])).sum(), [*leaves, tau])
    return {"losses": losses.detach(), **{f"d{i}": g for i, g in enumerate(gradients)}, "d_tau": d_tau}


def one_rank(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    contrastive_strips.STRIP_ROWS = (24, 24)  # several strips a rank, the last one shorter
    contrastive_strips.BUFFER_BYTES = 8 * 24 * 150 * 8  # some of which stay and some are computed again
    store = dist.FileStore(str(folder / f"store-{size}"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    torch.save(measure(rank, size), folder / f"{size}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(request, tmp_path_factory) -> list[dict[str, Tensor]]:
    folder, size = tmp_path_factory.mktemp("ranks"), request.param
    torch.multiprocessing.spawn(one_rank, args=(size, folder), nprocs=size)
    return [torch.load(folder / f"{size}-{rank}.pt", weights_only=True) for rank in range(size)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return measure(0, 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_equal_those_of_one_process(ranks, alone, name):
    definition = name.split(",")[0]
    for rank in ranks:
        for what in ("losses", "gradient"):
            expected = alone[f"{definition}/{what}"]
            torch.testing.assert_close(rank[f"{name}/{what}"], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-12), ("fp32", 1e-6), ("fp16", 5e-3)])
@pytest.mark.parametrize(("backend", "exchange"), FORMS)
def test_uneven_ranks_hold_the_tolerance(ranks, alone, backend, exchange, precision, tolerance):
    name, definition = f"{backend} {exchange} {precision}", "dense auto fp64"
    for rank in ranks:
        assert error(rank[f"{name}/losses"], alone[f"{definition}/losses"]) < tolerance
    for side in ("d0", "d1", "d2"):
        whole = torch.cat([rank[f"{name}/{side}"] for rank in ranks])
        assert error(whole, alone[f"{definition}/{side}"]) < tolerance, side
    d_tau = torch.stack([rank[f"{name}/d_tau"] for rank in ranks]).sum()
    assert error(d_tau, alone[f"{definition}/d_tau"]) < tolerance


def error(ours: Tensor, definition: Tensor) -> float:
    """Relative to the norm of the definition."""
    return float((ours.double() - definition).norm() / definition.norm())


@pytest.mark.parametrize("backend", LOCALS)
def test_local_negatives_are_each_ranks_own(ranks, backend):
    network = Network()
    for rank, result in enumerate(ranks):
        views, batch = samples(rank, len(ranks))
        if not batch.keys:
            continue
        losses = imitate_loss(network(views, batch), batch, LOCAL)
        torch.testing.assert_close(
            result[f"local, {backend}/losses"], torch.stack(losses).detach(), rtol=1e-12, atol=1e-12
        )


def test_a_gather_without_gradient_is_wrong_and_is_seen(ranks, alone):
    for rank in ranks:
        torch.testing.assert_close(rank["clip/gradient"], alone["clip/gradient"], rtol=1e-12, atol=1e-12)
        wrong = rank["wrong/gradient"]
        assert torch.cosine_similarity(wrong, alone["clip/gradient"], dim=0) < 0.99
        with pytest.raises(AssertionError):
            torch.testing.assert_close(wrong, alone["clip/gradient"], rtol=1e-2, atol=1e-2)

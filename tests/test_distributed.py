"""Several gloo ranks against one process: the same loss, the same gradient, and a wrong variant that shows."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from imitate_ds.batch import Batch, Features
from imitate_ds.config import ObjectiveConfig
from imitate_ds.distributed import gather_rows, gather_rows_keep_gradient, scale_gradient, world
from imitate_ds.objective import imitate_loss

STUDIES, PIXELS, JOINT, TEXT = 12, 10, 6, 15
CONFIGS = {
    "ref": ObjectiveConfig(),
    "row": ObjectiveConfig(target_norm="row"),
    "none": ObjectiveConfig(target_norm="none", prior_strength=1.0),
    "local": ObjectiveConfig(negatives="local"),
}


class Network(nn.Module):
    """Linear maps in float64, so that a rank's rows do not depend on the rest of the batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.impression, self.findings, self.view = (nn.Linear(PIXELS, JOINT).double() for _ in range(3))
        self.text = nn.Linear(TEXT, JOINT).double()

    def forward(self, views: Tensor, batch: Batch) -> Features:
        images = (normalize(branch(views), dim=-1) for branch in (self.impression, self.findings, self.view))
        texts = (normalize(self.text(text), dim=-1) for text in (batch.impression, batch.findings))
        return Features(*images, *texts)


def samples(rank: int, size: int) -> tuple[Tensor, Batch]:
    """This rank's slice of one fixed global batch. The last third has no findings: on three ranks, all of one rank."""
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(STUDIES, 2, PIXELS, generator=generator, dtype=torch.float64)
    findings, impression = (torch.randn(STUDIES, TEXT, generator=generator, dtype=torch.float64) for _ in "fi")
    has_findings, has_impression = torch.arange(STUDIES) < 8, torch.arange(STUDIES) != 3
    mine = slice(rank * STUDIES // size, (rank + 1) * STUDIES // size)
    keys = [f"{i:016x}" for i in range(STUDIES)][mine]
    tensors = (torch.empty(0), findings[mine], impression[mine], has_findings[mine], has_impression[mine])
    return views[mine], Batch(keys, *tensors, step=0)


def averaged_gradient(network: Network, loss: Tensor) -> Tensor:
    """One vector, averaged over ranks as DeepSpeed averages."""
    gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(network.parameters()))])
    if world().size > 1:
        dist.all_reduce(gradient)
        gradient /= world().size
    return gradient


def clip_loss(features: Features, *, exact: bool) -> Tensor:
    """Plain InfoNCE of images and impressions on gathered rows; not `exact`: as open_clip without gather_with_grad."""
    image, text = features.image_impression[:, 0], features.text_impression
    if exact:
        image, text = gather_rows_keep_gradient(image), gather_rows_keep_gradient(text)
        loss = sum(cross_entropy(a @ b.T / 0.07, torch.arange(len(a))) for a, b in ((image, text), (text, image)))
        return scale_gradient(loss, world().size)
    own = torch.arange(len(image)) + world().rank * len(image)
    return sum(cross_entropy(a @ gather_rows(b).T / 0.07, own) for a, b in ((image, text), (text, image)))


def measure(rank: int, size: int) -> dict[str, Tensor]:
    network = Network()
    views, batch = samples(rank, size)
    results: dict[str, Tensor] = {}
    for name, config in CONFIGS.items():
        losses = imitate_loss(network(views, batch), batch, config)
        results[f"{name}/losses"] = torch.stack(losses).detach()
        results[f"{name}/gradient"] = averaged_gradient(network, losses.total)
    for name, exact in {"clip": True, "wrong": False}.items():
        loss = clip_loss(network(views, batch), exact=exact)
        gradient = torch.autograd.grad(loss, [network.impression.weight, network.text.weight])
        results[f"{name}/gradient"] = torch.cat([part.flatten() for part in gradient])
        if size > 1:
            dist.all_reduce(results[f"{name}/gradient"])
            results[f"{name}/gradient"] /= size
    return results


def one_rank(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{size}"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    torch.save(measure(rank, size), folder / f"{size}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory) -> list[dict[str, Tensor]]:
    folder, size = tmp_path_factory.mktemp("ranks"), request.param
    torch.multiprocessing.spawn(one_rank, args=(size, folder), nprocs=size)
    return [torch.load(folder / f"{size}-{rank}.pt", weights_only=True) for rank in range(size)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return measure(0, 1)


@pytest.mark.parametrize("name", ["ref", "row", "none"])
def test_losses_and_gradients_equal_those_of_one_process(ranks, alone, name):
    for rank in ranks:
        torch.testing.assert_close(rank[f"{name}/losses"], alone[f"{name}/losses"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(rank[f"{name}/gradient"], alone[f"{name}/gradient"], rtol=1e-12, atol=1e-12)


def test_local_negatives_are_each_ranks_own(ranks):
    network = Network()
    for rank, result in enumerate(ranks):
        views, batch = samples(rank, len(ranks))
        losses = imitate_loss(network(views, batch), batch, CONFIGS["local"])
        torch.testing.assert_close(result["local/losses"], torch.stack(losses).detach(), rtol=1e-12, atol=1e-12)


def test_a_gather_without_gradient_is_wrong_and_is_seen(ranks, alone):
    for rank in ranks:
        torch.testing.assert_close(rank["clip/gradient"], alone["clip/gradient"], rtol=1e-12, atol=1e-12)
        wrong = rank["wrong/gradient"]
        assert torch.cosine_similarity(wrong, alone["clip/gradient"], dim=0) < 0.99
        with pytest.raises(AssertionError):
            torch.testing.assert_close(wrong, alone["clip/gradient"], rtol=1e-2, atol=1e-2)

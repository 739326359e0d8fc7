"""The forms of the contrastive loss that loss.py measures, and the inputs that they share."""

import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package need not be installed

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from imitate_ds.distributed import RankRows
from imitate_ds.ops import contrastive_strips
from imitate_ds.ops.contrastive import Pair, clinical_contrastive_losses

PRIOR_STRENGTH = 0.2
UPSTREAM = 2.0**14  # 16-bit gradients are taken of a scaled loss, as a GradScaler does


class Link(NamedTuple):
    query: str
    keys: str
    temperature: float
    weight: int


class Group(NamedTuple):
    prior: str | None
    links: tuple[Link, ...]


KINDS = {
    "pair": (Group("prior", (Link("x", "y", 0.07, 1),)),),
    # Two views of the image with the impression and the findings, and with each other (imitate_ds/objective.py).
    "step": (
        Group(
            "impression",
            (Link("d1", "t_i", 0.07, 1), Link("d2", "t_i", 0.07, 1), Link("d1", "d2", 0.2, 2)),
        ),
        Group("findings", (Link("r1", "t_f", 0.07, 1), Link("r2", "t_f", 0.07, 1))),
        Group(None, (Link("s1", "s2", 0.2, 2),)),
    ),
}


class Case(NamedTuple):
    """The inputs of one size; all forms read the same."""

    kind: str
    rows: int  # B
    columns: int  # N
    own: dict[str, Tensor]  # [B, D] by name, unit norm; the first is the one whose gradient is compared
    everyone: dict[str, Tensor]  # [N, D], own where the rank is alone
    priors: dict[str, Tensor]  # [N, E]

    @property
    def groups(self) -> tuple[Group, ...]:
        return KINDS[self.kind]

    @property
    def links(self) -> list[Link]:
        return [link for group in self.groups for link in group.links]

    @property
    def size(self) -> str:
        return f"{self.rows}x{self.columns}"

    @property
    def work(self) -> int:
        """Logits of all losses."""
        return self.rows * self.columns * len(self.links)

    @property
    def device(self) -> torch.device:
        return self.first.device

    @property
    def first(self) -> Tensor:
        return next(iter(self.own.values()))


class Width(NamedTuple):
    joint: int  # D
    text: int  # E


def make_case(kind: str, rows: int, columns: int, width: Width, device: torch.device) -> Case:
    """Embeddings in a cone, as early in training: two of them have a cosine of about a half; texts likewise."""
    generator = torch.Generator(device).manual_seed(0)

    def cone(count: int, dim: int) -> Tensor:
        rows = torch.randn(count, dim, generator=generator, device=device)
        return rows.add_(torch.randn(dim, generator=generator, device=device))

    links = [link for group in KINDS[kind] for link in group.links]
    names = dict.fromkeys(name for link in links for name in (link.query, link.keys))
    own, everyone = {}, {}
    for name in names:
        side = cone(rows, width.joint)
        own[name] = side.div_(side.norm(dim=1, keepdim=True)).requires_grad_()
    for name in names:
        alone = rows == columns
        everyone[name] = own[name] if alone else own[name].detach().repeat(columns // rows, 1).requires_grad_()
    priors = {group.prior: cone(columns, width.text) for group in KINDS[kind] if group.prior}
    return Case(kind, rows, columns, own, everyone, priors)


# A form is built once a case, and then runs forward and backward; the first gradient it returns is that of case.first.
Run = Callable[[], Sequence[Tensor]]


def ours(case: Case, *, backend: str, operands: str = "fp32") -> Run:
    """Through the door, as imitate_ds/objective.py calls it: once a group."""
    if backend == "dense" and case.columns > case.rows:
        return plain(case)  # the door's dense form is N x N on every rank; a rank that did its share would do this
    rows = RankRows((case.rows,) * (case.columns // case.rows), 0)
    options: dict[str, Any] = {"backend": backend, "operands": operands, "prior_strength": PRIOR_STRENGTH}

    def run() -> Sequence[Tensor]:
        with one_rank_of(rows):
            loss = torch.stack([losses_of(group) for group in case.groups]).sum()
        return torch.autograd.grad(loss, list(case.own.values()))

    def losses_of(group: Group) -> Tensor:
        pairs = [Pair(case.own[link.query], case.own[link.keys], link.temperature) for link in group.links]
        prior = case.priors[group.prior] if group.prior else None
        losses = clinical_contrastive_losses(pairs, prior, rows=rows, exchange="reduce_scatter", **options)
        return sum(link.weight * loss for link, loss in zip(group.links, losses.unbind(), strict=True))  # type: ignore[return-value]

    return run


@contextmanager
def one_rank_of(rows: RankRows) -> Iterator[None]:
    """Rank 0 of many, alone: buffers of the same sizes as in an exchange, filled with its own rows, and no message."""
    if len(rows.counts) == 1:
        yield
        return

    def gather_rows(own: Tensor, held: RankRows) -> Tensor:
        return own.detach().repeat(len(held.counts), *(1 for _ in own.shape[1:]))

    def sum_to_owner(whole: Tensor, held: RankRows) -> Tensor:
        return whole[held.own].clone()

    # Sums and maxima over ranks are nothing to do already: no process group was started.
    with mock.patch.multiple(contrastive_strips, gather_rows=gather_rows, sum_to_owner=sum_to_owner):
        yield


def plain(case: Case, *, compiled: bool = False, amp: bool = False, published: bool = False) -> Run:
    """The dense form of a rank's share, in plain PyTorch; logits and targets are B x N."""
    total = partial(published_total if published else dense_total, case.groups)
    if compiled:
        total = torch.compile(total, dynamic=False)
    leaves = list({id(side): side for side in (*case.own.values(), *case.everyone.values())}.values())

    def run() -> Sequence[Tensor]:
        with autocast(amp):
            loss = total(case.own, case.everyone, case.priors)
        return torch.autograd.grad(loss * UPSTREAM if amp else loss, leaves)

    return run


def dense_total(groups: Sequence[Group], own: dict, everyone: dict, priors: dict) -> Tensor:
    losses = []
    for group in groups:
        prior = priors[group.prior] if group.prior else None
        shared = None if prior is None else softness(prior, len(next(iter(own.values()))))
        losses += [link.weight * dense_loss(own, everyone, shared, link) for link in group.links]
    return torch.stack(losses).sum()


def published_total(groups: Sequence[Group], own: dict, everyone: dict, priors: dict) -> Tensor:
    """What the authors' program does: eight losses, two of them doubles, and every one makes its targets anew."""
    losses = []
    for group in groups:
        prior = priors[group.prior] if group.prior else None
        for link in (once for once in group.links for _ in range(once.weight)):
            shared = None if prior is None else softness(prior, len(own[link.query]))
            losses.append(dense_loss(own, everyone, shared, link))
    return torch.stack(losses).sum()


def softness(prior: Tensor, rows: int) -> Tensor:
    """1 - exp(-strength * max(Pearson correlation, 0)) of the first samples with all, [B, N]; none with itself."""
    unit = normalize(prior - prior.mean(dim=1, keepdim=True), dim=1)
    correlation = (unit[:rows] @ unit.T).clamp(min=0)
    itself = torch.eye(rows, len(prior), dtype=torch.bool, device=prior.device)
    return 1 - torch.exp(-PRIOR_STRENGTH * correlation.masked_fill(itself, 0))


def dense_loss(own: dict, everyone: dict, shared: Tensor | None, link: Link) -> Tensor:
    """Cross entropy of own queries against all keys, and of own keys against all queries, B x N each.

    Alone, the second is the first transposed. On several ranks it is a product of its own, as in open_clip's local_loss:
    the softmax over a column of the first would miss the rows of the other ranks.
    """
    logits = own[link.query] @ everyone[link.keys].T / link.temperature
    rows, columns = logits.shape
    alone = rows == columns
    flipped = logits.T if alone else own[link.keys] @ everyone[link.query].T / link.temperature
    if shared is None:
        labels = torch.arange(rows, device=logits.device)
        return cross_entropy(logits, labels) + cross_entropy(flipped, labels)
    targets = torch.eye(rows, columns, device=logits.device) + link.temperature * shared  # symmetric as a whole
    return cross_entropy(logits, targets) + cross_entropy(flipped, targets)


def clip_loss(case: Case, *, amp: bool = False) -> Run:
    """open_clip's ClipLoss with a learnable scale; on several ranks with local_loss and gather_with_grad."""
    (link,) = case.links
    # Its file alone: the package imports timm, ftfy, regex and more, and the loss needs none of them.
    module = file_module("open_clip", "loss.py")
    ranks = case.columns // case.rows
    loss_fn = module.ClipLoss(local_loss=ranks > 1, gather_with_grad=ranks > 1, rank=0, world_size=ranks)
    query, keys = case.own[link.query], case.own[link.keys]
    scale = torch.tensor(1 / link.temperature, device=case.device, requires_grad=True)
    gathered = ()
    if ranks > 1:  # in place of its gather; the gradient of these is what it would reduce-scatter
        gathered = tuple(side.detach().repeat(ranks, 1).requires_grad_() for side in (query, keys))
        module.gather_features = lambda *_, **__: gathered

    def run() -> Sequence[Tensor]:
        with autocast(amp):
            loss = loss_fn(query, keys, scale)
        return torch.autograd.grad(loss * UPSTREAM if amp else loss, [query, keys, scale, *gathered])

    return run


def memeff_loss(case: Case, *, half: bool = False) -> Run:
    import memeff

    (link,) = case.links
    # stable=True, its default, multiplies the gradient by sqrt(B * temperature).
    loss_fn = memeff.MemoryEfficientCLIPLoss(link.temperature, normalized_inputs=True, stable=False)
    sides = [case.own[link.query], case.own[link.keys]]
    if half:
        sides = [side.detach().half().requires_grad_() for side in sides]

    def run() -> Sequence[Tensor]:
        loss = loss_fn(*sides)
        return torch.autograd.grad(loss * UPSTREAM if half else loss, sides)

    return run


SIGMOID_START = (2.302585, -10.0)  # log temperature and bias, as SigLIP begins


def siglip_loss(case: Case) -> Run:
    import siglip_kernel

    (link,) = case.links
    sides = [case.own[name].detach().bfloat16().requires_grad_() for name in (link.query, link.keys)]
    numbers = [torch.tensor(value, device=case.device, requires_grad=True) for value in SIGMOID_START]
    return lambda: torch.autograd.grad(siglip_kernel.fused_siglip_loss(*sides, *numbers), [*sides, *numbers])


def products(case: Case, *, priors: int, half: bool = False) -> Run:
    """The matrix products of strips and nothing else: for every strip, four a pair and one or two of a prior."""
    dtype = torch.float16 if half else torch.float32
    buffers = contrastive_strips._Buffers(case.rows, case.columns, torch.float32, case.device)
    height = buffers.strips[0].stop
    own, keys = case.first.detach().to(dtype), next(iter(case.everyone.values())).detach().to(dtype)
    texts = {name: normalize(prior, dim=1).to(dtype) for name, prior in case.priors.items()}
    z = torch.empty(height, case.columns, device=case.device)
    g = torch.randn(height, case.columns, device=case.device).to(dtype)
    d_query, d_keys = torch.empty(case.rows, own.shape[1], device=case.device), torch.empty_like(keys, dtype=z.dtype)

    def product(left: Tensor, right: Tensor, out: Tensor) -> None:
        if half:
            torch.mm(left, right, out_dtype=torch.float32, out=out)  # type: ignore[call-overload]
        else:
            torch.mm(left, right, out=out)

    def run() -> Sequence[Tensor]:
        for group, strip in itertools.product(case.groups, buffers.strips):
            now = slice(0, strip.stop - strip.start)
            for text in [texts[group.prior]] * priors if group.prior else []:
                product(text[strip], text.T, z[now])
            for _ in group.links:
                product(own[strip], keys.T, z[now])
                product(own[strip], keys.T, z[now])
                product(g[now], keys, d_query[strip])
                product(g[now].T, own[strip], d_keys)
        return ()

    return run


def flops_of_products(case: Case, *, priors: int) -> int:
    joint = 4 * len(case.links) * case.first.shape[1]
    return 2 * case.rows * case.columns * (joint + priors * sum(prior.shape[1] for prior in case.priors.values()))


@contextmanager
def counted_flops() -> Iterator[list[int]]:
    """What the strips really multiply: less than all where strips are kept between the sweeps."""
    counts: list[int] = []

    def counting(name: str, left: int) -> Any:
        original = getattr(contrastive_strips, name)

        def wrapped(*args: Tensor, **out: Tensor) -> Any:
            (m, k), (_, n) = args[left].shape, args[left + 1].shape
            counts.append(2 * m * k * n)
            return original(*args, **out)

        return mock.patch.object(contrastive_strips, name, wrapped)

    with counting("_product", 0), counting("_add_product", 1):
        yield counts


@contextmanager
def autocast(amp: bool) -> Iterator[None]:
    with torch.autocast("cuda", torch.float16) if amp else nullcontext():
        yield


def file_module(package: str, file: str) -> Any:
    origin = importlib.util.find_spec(package)
    assert origin is not None
    assert origin.origin is not None
    spec = importlib.util.spec_from_file_location(f"{package}_{Path(file).stem}", Path(origin.origin).parent / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Form(NamedTuple):
    """One row of the table."""

    title: str
    build: Callable[[Case], Run]
    leaves_out: str = ""
    kinds: tuple[str, ...] = ("pair", "step")
    objective: str = "clinical"  # what its gradient is held against: clinical, hard, sigmoid; none: it has no gradient
    gradient_scale: float = 1.0  # its gradient over that of the definition
    half: bool = False  # 16-bit operands: on CUDA only, and compared with others of that kind
    bytes_a_logit: int = 0  # of one loss, at least; 0 where memory does not grow with B x N
    priors: int = 0  # of matrix products alone: how often they multiply a prior
    compiled: bool = False
    package: str = ""  # its name on PyPI; what it is imported by has underscores
    needs_cuda: bool = False
    square: bool = False  # N = B only

    @property
    def module(self) -> str:
        return {"open_clip_torch": "open_clip"}.get(self.package, self.package.replace("-", "_"))


def in_half(form: Form, build: Callable[[Case], Run], how: str = "fp16", **changes: Any) -> Form:
    return form._replace(title=f"{form.title}, {how}", build=build, half=True, **changes)


HARD = "soft targets and the prior (its positives are the diagonal), masks"
PARTIAL = "masks"

STRIPS = Form("strips", partial(ours, backend="strips"))
TRITON = Form("triton", partial(ours, backend="triton"), package="triton", needs_cuda=True)
GEMM = Form(
    "matrix products alone",
    partial(products, priors=1),
    "all but the matrix products of strips: four a pair, the prior's once",
    objective="none",
    priors=1,
)
GEMM_TWICE = Form(
    "matrix products alone, prior twice",
    partial(products, priors=2),
    "all but the matrix products of strips where nothing is kept between the sweeps: four a pair, the prior's twice",
    objective="none",
    priors=2,
)
PUBLISHED = Form("published, eight calls", partial(plain, published=True), PARTIAL, kinds=("step",), bytes_a_logit=18)
COMPILED = Form("torch.compile of dense", partial(plain, compiled=True), PARTIAL, bytes_a_logit=4, compiled=True)
DENSE = Form("dense", partial(ours, backend="dense"), "with N > B, as torch.compile of dense", bytes_a_logit=20)
OPEN_CLIP = Form(
    "open_clip ClipLoss",
    clip_loss,
    HARD,
    kinds=("pair",),
    objective="hard",
    gradient_scale=0.5,  # it takes the mean of the two directions
    bytes_a_logit=14,
    package="open_clip_torch",
)
MEMEFF = Form(
    "memeff",
    memeff_loss,
    f"{HARD}, full fp32 products (tf32 instead), the gradient of a temperature, equal bits in two runs",
    kinds=("pair",),
    objective="hard",
    gradient_scale=0.5,
    package="memeff",
    needs_cuda=True,
    square=True,
)
SIGLIP = Form(
    "siglip-kernel, bf16",
    siglip_loss,
    f"{HARD}, the softmax: every logit is a loss of its own, so one sweep of three products is enough",
    kinds=("pair",),
    objective="sigmoid",
    half=True,
    package="siglip-kernel",
    needs_cuda=True,
    square=True,
)

# In the order in which they get a share of the time.
FORMS = {
    "strips": STRIPS,
    "triton": TRITON,
    "strips_fp16": in_half(STRIPS, partial(ours, backend="strips", operands="fp16")),
    "triton_fp16": in_half(TRITON, partial(ours, backend="triton", operands="fp16")),
    "gemm": GEMM,
    "gemm_twice": GEMM_TWICE,
    "gemm_fp16": in_half(GEMM, partial(products, priors=1, half=True)),
    "gemm_twice_fp16": in_half(GEMM_TWICE, partial(products, priors=2, half=True)),
    "published": PUBLISHED,
    "published_fp16": in_half(
        PUBLISHED, partial(plain, published=True, amp=True), "fp16 autocast", gradient_scale=UPSTREAM, bytes_a_logit=16
    ),
    "compiled": COMPILED,
    "compiled_fp16": in_half(
        COMPILED, partial(plain, compiled=True, amp=True), "fp16 autocast", gradient_scale=UPSTREAM, bytes_a_logit=3
    ),
    "dense": DENSE,
    "open_clip": OPEN_CLIP,
    "open_clip_fp16": in_half(
        OPEN_CLIP, partial(clip_loss, amp=True), "fp16 autocast", gradient_scale=0.5 * UPSTREAM, bytes_a_logit=10
    ),
    "memeff": MEMEFF,
    "memeff_fp16": in_half(
        MEMEFF,
        partial(memeff_loss, half=True),
        leaves_out=f"{HARD}, the gradient of a temperature, equal bits in two runs",
        gradient_scale=0.5 * UPSTREAM,
    ),
    "siglip_kernel": SIGLIP,
}


def reference_gradient(case: Case, objective: str) -> Tensor:
    """Of case.first, in float64, from the definition."""
    own = {name: side.detach().double().requires_grad_() for name, side in case.own.items()}
    if objective == "sigmoid":
        x, y = own.values()
        signs = 2 * torch.eye(len(x), dtype=x.dtype, device=x.device) - 1
        scale, bias = torch.tensor(SIGMOID_START[0]).exp().item(), SIGMOID_START[1]
        loss = -logsigmoid(signs * (scale * x @ y.T + bias)).sum() / len(x)
        return torch.autograd.grad(loss, [x])[0]
    wide = case._replace(own=own, everyone=own)
    if objective == "clinical":
        return ours(wide, backend="dense")()[0]
    (link,) = case.links
    losses = clinical_contrastive_losses([Pair(own[link.query], own[link.keys], link.temperature)], backend="dense")
    return torch.autograd.grad(losses.sum(), [own[link.query]])[0]

"""The clinical contrastive loss in strips of rows: the production form. Its gradient is computed in the forward pass.

Nothing of size rows x columns survives, so memory is linear in the batch. With unit rows x_i, y_j, temperature tau,
logits z_ij = x_i.y_j / tau, softness q_ij, targets t_ij = [i=j] + tau q_ij and sample weights w (1 / valid samples):

    L    = sum_i w_i s_i r_i + sum_j w_j s_j c_j - sum_ij t_ij z_ij (w_i + w_j)
    s_i  = sum_j t_ij (T is symmetric),  r_i = logsumexp_j z_ij,  c_j = logsumexp_i z_ij
    G_ij = dL/dz_ij = w_i s_i exp(z_ij - r_i) + w_j s_j exp(z_ij - c_j) - t_ij (w_i + w_j)
    dX   = G Y / tau,  dY = G^T X / tau,  dL/dtau = -<X, dX> / tau

Two sweeps over the strips: one for s, r and c, one for G and its products. One tile serves both directions, and the
pairs of a group share q. "row" targets are w_i = 1 / (n s_i) in the same formulas. See README, Decisions.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imitate_ds.distributed import RankRows, gather_rows, maximum_over_ranks, sum_over_ranks, sum_to_owner
from imitate_ds.ops.contrastive_reference import REFERENCE_ROWS, Pair, embedding_dtype, standardise

NEVER = -1e30  # added to a logit that takes no part: its exponential is 0, and so is its product with a target of 0

# A strip should stay in the last cache on a CPU, and fill the device on a GPU.
STRIP_BYTES = {"cpu": 8 * 2**20, "cuda": 128 * 2**20}
STRIP_ROWS = (512, 4096)
# Strips are kept between the sweeps while all of them hold no more rows than this, which is linear in N, and no more bytes.
BUFFER_ROWS = 10 * 1024
BUFFER_BYTES = 640 * 2**20
SCRATCH = 3  # strips for "z", "q" and "spare", always there


class Direction(NamedTuple):
    """What the samples of one side, [R] rows or [N] columns, bring to G."""

    maximum: Tensor  # of their logits; 0 where not valid
    share: Tensor  # weight times sum of their targets, divided by the sum of exp(logit - maximum)
    weight: Tensor  # 0 where not valid
    bias: Tensor  # 0, or NEVER where not valid


class Stages(NamedTuple):
    """What happens to a strip between two matrix products; the strip is overwritten."""

    q_strip: Callable[..., Tensor]
    sumexp_strip: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    g_strip: Callable[..., Tensor]
    spare: bool = True  # whether they need a strip to work in; without, they are given an empty one


def q_strip(correlation: Tensor, spare: Tensor, *, prior_strength: float, first: int) -> Tensor:
    """Correlations [R, N] become softness q = 1 - exp(-prior_strength * max(c, 0)), in place; their row sums [R].

    Row i is the sample of column first + i, which is no neighbour of itself. spare [R, N] is overwritten.
    """
    # 1 - exp(-u) = 2 t / (1 + t) with t = tanh(u / 2): as exact as expm1, which torch runs ten times slower on a CPU.
    half = correlation.clamp_(min=0).mul_(prior_strength / 2).tanh_()
    torch.add(half, 1, out=spare)
    half.div_(spare).mul_(2)
    half.diagonal(first).zero_()
    return half.sum(dim=1)


def sumexp_strip(
    logits: Tensor, spare: Tensor, *, row_bias: Tensor, column_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maxima, and sums of exp(logit - maximum), of the rows, [R] each, and of the columns in this strip, [N] each.

    Not their logsumexps: those are larger numbers, whose rounding would be an error of a whole row of G.
    The biases are left in the logits [R, N]; spare [R, N] is overwritten.
    """
    logits.add_(column_bias).add_(row_bias[:, None])
    row_max, column_max = logits.amax(dim=1), logits.amax(dim=0)
    torch.sub(logits, row_max[:, None], out=spare)
    row_sum = spare.exp_().sum(dim=1)
    torch.sub(logits, column_max, out=spare)
    return row_max, row_sum, column_max, spare.exp_().sum(dim=0)


def g_strip(
    logits: Tensor,
    q: Tensor | None,
    spare: Tensor,
    out: Tensor,
    *,
    rows: Direction,
    columns: Direction,
    softness: Tensor,
    scale: Tensor,
    first: int,
) -> Tensor:
    """scale * G [R, N] into `out` (which may be `logits`), and sum_j t_ij z_ij (w_i + w_j) for every row, [R].

    t_ij = [j = first + i] + softness * q_ij; softness and scale are tensors of one element, so that nobody waits for
    the device. logits and spare are overwritten.
    """
    positives = logits.diagonal(first).clone()
    both = rows.weight + columns.weight[first : first + len(logits)]
    agreement = positives * both
    logits.add_(columns.bias).add_(rows.bias[:, None])
    if q is not None:
        torch.mul(logits, q, out=spare)
        agreement += softness * (spare.sum(dim=1) * rows.weight + spare @ columns.weight)
    torch.sub(logits, columns.maximum, out=spare)
    spare.exp_().mul_(columns.share)
    logits.sub_(rows.maximum[:, None]).exp_().mul_(rows.share[:, None]).add_(spare)
    if q is not None:
        torch.mul(q, softness * columns.weight, out=spare)
        logits.sub_(spare).addcmul_(q, (softness * rows.weight)[:, None], value=-1)
    logits.diagonal(first).sub_(both)
    if out is not logits:
        out.copy_(logits.mul_(scale))
    return agreement


TORCH_STAGES = Stages(q_strip, sumexp_strip, g_strip)


class Task(NamedTuple):
    """What a group of pairs is compared under; prior and valid are those of all ranks."""

    prior: Tensor | None  # [N, E]
    valid: Tensor  # bool [N]
    prior_strength: float
    target_norm: str
    operands: str  # "fp32" or "fp16": what the matrix products read; they add up in float32
    rows: RankRows
    exchange: str  # "reduce_scatter" or "owner"
    stages: Stages = TORCH_STAGES


@torch.compiler.disable()
def strip_contrastive_losses(pairs: Sequence[Pair], task: Task) -> Tensor:
    """One scalar a pair, [len(pairs)]. Arguments as in contrastive.clinical_contrastive_losses, already checked.

    Collectives in forward only, and the same on all ranks whatever is valid, as long as all want gradients or none does.
    """
    dtype, device = embedding_dtype(pairs), task.valid.device
    with torch.autocast(device.type, enabled=False):
        given = [side for pair in pairs for side in (pair.query, pair.keys)]
        names = tuple(next(n for n, other in enumerate(given) if other is side) for side in given)
        sides = [side.to(dtype) for side in given]
        temperatures = [_scalar(pair.temperature, dtype, device) for pair in pairs]
        return _StripLosses.apply(task, names, *sides, *temperatures)  # type: ignore[return-value]


def _scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device, dtype).reshape(())
    return torch.full((), value, dtype=dtype, device=device)  # a copy from the host would wait for the device


class _StripLosses(torch.autograd.Function):
    """What backward needs was computed in forward, and waits to be multiplied by the gradient of each loss."""

    @staticmethod
    def forward(ctx: Any, task: Task, names: tuple[int, ...], *tensors: Tensor) -> Tensor:
        """names: a number for each side, the same for one that serves two pairs, so that it travels once."""
        group = _Group(task, names, tensors[: len(names)], tensors[len(names) :])
        group.first_sweep()
        losses, gradients = group.second_sweep(wanted=any(ctx.needs_input_grad))
        ctx.sides = len(names)
        ctx.save_for_backward(*gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: what comes back would pass for a constant
            raise RuntimeError("strips and triton have no second derivative; use backend='dense' for one")
        of_pair = [*(n // 2 for n in range(ctx.sides)), *range(ctx.sides // 2)]
        return None, None, *(upstream[0][k] * saved for k, saved in zip(of_pair, ctx.saved_tensors, strict=True))


class _Found(NamedTuple):
    """What the first sweep finds of a pair, over all ranks."""

    softness: Tensor  # scalar: what q is multiplied by in the targets
    rows: Direction  # [N]
    columns: Direction  # [N]
    entropy: Tensor  # [N], float64: weight times the sum of the targets times both logsumexps


class _Group:
    """The two sweeps over a group of pairs. A strip is some of this rank's rows; its columns are those of all ranks."""

    def __init__(self, task: Task, names: Sequence[int], sides: Sequence[Tensor], temperatures: Sequence[Tensor]):
        self.task, self.own, self.stages = task, task.rows.own, task.stages
        self.queries, self.temperatures = sides[::2], temperatures
        self.pairs = range(len(temperatures))
        self.dtype, self.half = sides[0].dtype, task.operands == "fp16"
        self.buffers = _Buffers(len(sides[0]), task.rows.total, self.dtype, task.valid.device)
        if not task.stages.spare:
            self.buffers.do_without("spare")

        # Alone, nobody has to be spared a message, and reduce_scatter needs one product less.
        owner = task.exchange == "owner" and not self._alone
        own = {name: self._operand(side) for name, side in zip(names, sides, strict=True)}
        every = _gathered({name: own[name] for name in own if owner or name in names[1::2]}, task.rows)
        self.own_keys, self.all_keys = [own[n] for n in names[1::2]], [every[n] for n in names[1::2]]

        def scaled(rows: dict[int, Tensor]) -> list[Tensor]:
            """With the temperature in the queries, their products are logits."""
            return [self._operand(rows[n] / tau) for n, tau in zip(names[::2], temperatures, strict=True)]

        self.own_scaled = scaled(own)
        self.all_scaled = scaled(every) if owner else None

        valid = task.valid.to(self.dtype)
        self.valid, self.samples = valid, valid.sum().clamp(min=1)
        self.bias = (1 - valid) * NEVER
        self.prior = None
        if task.prior is not None:
            self.prior = self._operand(standardise(task.prior.to(self.dtype)).mul_(valid[:, None]))
        # Before it is rounded to fp16, G is brought near 1, by a power of two because that rounds nothing itself.
        self.scale = torch.exp2(self.samples.log2().floor()) if self.half else torch.ones_like(self.samples)

    @property
    def _alone(self) -> bool:
        return len(self.task.rows.counts) == 1

    def first_sweep(self) -> None:
        """The sums that G needs: of the targets, and of the exponentials in both directions."""
        mass = self._prior_mass()
        rows, columns = zip(*(self._exponentials(k) for k in self.pairs), strict=True)
        rows = gather_rows(torch.stack(rows, dim=1), self.task.rows)  # [N, pairs, 2]
        columns = self._over_ranks(torch.stack(columns))  # [pairs, 2, N]
        self.found = [self._found(self.temperatures[k], mass, rows[:, k].T, columns[k]) for k in self.pairs]

    def second_sweep(self, *, wanted: bool) -> tuple[Tensor, list[Tensor]]:
        """Losses [pairs], and where wanted the gradients: of both sides of every pair, then of the temperatures."""
        losses = torch.stack([found.entropy[self.own].sum() for found in self.found])
        d_query = [torch.zeros_like(query) for query in self.queries]
        owned = self.own_keys if self.all_scaled else self.all_keys
        d_keys = [torch.zeros(rows.shape, dtype=self.dtype, device=rows.device) for rows in owned]
        for strip in self.buffers.strips:
            q = self._soft(strip)
            for k, (softness, rows, columns, _) in enumerate(self.found):
                g, agreement = self._g(strip, self._logits(k, strip), q, softness, rows, columns)
                losses[k] -= agreement.double().sum()
                if wanted:
                    _product(g, self.all_keys[k], out=d_query[k][strip])
                if wanted and self.all_scaled:
                    flipped = self.buffers.scratch("z", strip)
                    _product(self.own_keys[k][strip], self.all_scaled[k].T, out=flipped)
                    g, _ = self._g(strip, flipped, q, softness, columns, rows)
                    _product(g, self.all_scaled[k], out=d_keys[k][strip])
                elif wanted:
                    _add_product(d_keys[k], g.T, self.own_scaled[k][strip])
        if not self._alone:
            losses = sum_over_ranks(losses)
        return losses.to(self.dtype), self._finished(d_query, d_keys) if wanted else []

    def _finished(self, d_query: list[Tensor], d_keys: list[Tensor]) -> list[Tensor]:
        """Scales taken back, columns added up over ranks; the gradients in the order of _StripLosses' arguments."""
        if not self.all_scaled:
            d_keys = [sum_to_owner(columns, self.task.rows) for columns in d_keys]
        sides: list[Tensor] = []
        d_temperatures = []
        for query, tau, dx, dy in zip(self.queries, self.temperatures, d_query, d_keys, strict=True):
            sides += [dx.div_(tau * self.scale), dy.div_(self.scale)]
            d_temperatures.append(-(query * dx).sum() / tau)
        return sides + d_temperatures

    def _prior_mass(self) -> Tensor:
        """sum_j q_ij for the samples of all ranks, [N]."""
        if self.prior is None:
            return torch.zeros_like(self.valid)
        sums = [self._soften(strip, self.buffers.take(("q",), strip)) for strip in self.buffers.strips]
        return gather_rows(torch.cat([*sums, self.valid[:0]]), self.task.rows)

    def _soft(self, strip: slice) -> Tensor | None:
        if self.prior is None:
            return None
        q, kept = self.buffers.recall(("q",), strip)
        if not kept:
            self._soften(strip, q)
        return q

    def _soften(self, strip: slice, q: Tensor) -> Tensor:
        assert self.prior is not None
        _product(self.prior[self.own][strip], self.prior.T, out=q)
        first, spare = self.own.start + strip.start, self.buffers.scratch("spare", strip)
        return self.stages.q_strip(q, spare, prior_strength=self.task.prior_strength, first=first)

    def _logits(self, k: int, strip: slice) -> Tensor:
        logits, kept = self.buffers.recall(("z", k), strip)
        if not kept:
            _product(self.own_scaled[k][strip], self.all_keys[k].T, out=logits)
        return logits

    def _exponentials(self, k: int) -> tuple[Tensor, Tensor]:
        """Maxima of logits and sums of exp(logit - maximum): of own rows [B, 2]; of the columns, over own rows, [2, N]."""
        rows = [self.valid.new_zeros(0, 2)]
        largest, total = torch.full_like(self.valid, 2 * NEVER), torch.zeros_like(self.valid)
        for strip in self.buffers.strips:
            logits = self.buffers.take(("z", k), strip)
            _product(self.own_scaled[k][strip], self.all_keys[k].T, out=logits)
            spare = self.buffers.scratch("spare", strip)
            row_max, row_sum, highest, part = self.stages.sumexp_strip(
                logits, spare, row_bias=self.bias[self.own][strip], column_bias=self.bias
            )
            rows.append(torch.stack([row_max, row_sum], dim=1))
            before, largest = largest, torch.maximum(largest, highest)
            total = total * (before - largest).exp() + part * (highest - largest).exp()
        return torch.cat(rows), torch.stack([largest, total])

    def _over_ranks(self, columns: Tensor) -> Tensor:
        """Maxima and sums of the columns over the rows of all ranks, from those of each, [pairs, 2, N]."""
        if self._alone:
            return columns
        own, total = columns.unbind(dim=1)
        largest = maximum_over_ranks(own.contiguous())
        return torch.stack([largest, sum_over_ranks(total * (own - largest).exp())], dim=1)

    def _found(self, temperature: Tensor, mass: Tensor, rows: Tensor, columns: Tensor) -> _Found:
        softness, weight = temperature, self.valid / self.samples
        if self.task.target_norm == "ref":
            softness = temperature * REFERENCE_ROWS / self.samples
        target_sums = 1 + softness * mass
        if self.task.target_norm == "row":
            weight = weight / target_sums
        share, outside = weight * target_sums, ~self.task.valid
        directions, logsumexps = [], []
        for largest, total in (rows, columns):
            largest, total = largest.masked_fill(outside, 0), total.masked_fill(outside, 1)
            directions.append(Direction(largest, share / total, weight, self.bias))
            logsumexps.append(largest.double() + total.double().log())
        return _Found(softness, *directions, entropy=share * sum(logsumexps))

    def _g(
        self, strip: slice, logits: Tensor, q: Tensor | None, softness: Tensor, rows: Direction, columns: Direction
    ) -> tuple[Tensor, Tensor]:
        """scale * G of a strip, as operand, and what its targets agree with; overwrites the logits."""
        first = self.own.start + strip.start
        here = Direction(*(numbers[first : first + len(logits)] for numbers in rows))
        out = self.buffers.scratch("half", strip) if self.half else logits
        options = {"rows": here, "columns": columns, "softness": softness, "scale": self.scale, "first": first}
        agreement = self.stages.g_strip(logits, q, self.buffers.scratch("spare", strip), out, **options)
        return (logits.copy_(out) if self.half and not out.is_cuda else out), agreement

    def _operand(self, rows: Tensor) -> Tensor:
        """fp16 and not bf16: unit vectors cannot overflow it, and it has three more bits.

        On a CPU the rounded operands are multiplied in float32, which is what tensor cores do.
        """
        if not self.half:
            return rows
        return rows.half() if rows.is_cuda else rows.half().to(self.dtype)


class _Buffers:
    """Strips [height, N] of this rank's rows: scratch, and as many as the budget holds kept between the sweeps.

    What is not kept is computed again; the result is the same, bit for bit.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device):
        one = columns * dtype.itemsize
        least, most = STRIP_ROWS
        allowed = STRIP_BYTES.get(device.type, STRIP_BYTES["cpu"]) // one
        height = max(1, min(rows, max(least, min(most, allowed))))
        self.strips = [slice(start, min(start + height, rows)) for start in range(0, rows, height)]
        self._new = partial(torch.empty, height, columns, dtype=dtype, device=device)
        self._free = min(BUFFER_ROWS, BUFFER_BYTES // one) // height - SCRATCH
        self._scratch: dict[str, Tensor] = {}
        self._kept: dict[tuple, Tensor] = {}

    def do_without(self, kind: str) -> None:
        self._scratch[kind] = self._new()[:0].clone()  # a view would hold all of it
        self._free += 1

    def scratch(self, kind: str, strip: slice) -> Tensor:
        if kind not in self._scratch:
            self._scratch[kind] = self._new(dtype=torch.float16) if kind == "half" else self._new()
        return self._scratch[kind][: strip.stop - strip.start]

    def take(self, name: tuple, strip: slice) -> Tensor:
        """A strip to fill in the first sweep: one that stays, while the budget lasts."""
        if self._free <= 0:
            return self.scratch(name[0], strip)
        self._free -= 1
        self._kept[(*name, strip.start)] = self._new()[: strip.stop - strip.start]
        return self._kept[(*name, strip.start)]

    def recall(self, name: tuple, strip: slice) -> tuple[Tensor, bool]:
        """The same strip in the second sweep, and whether it still holds what was put there."""
        kept = self._kept.pop((*name, strip.start), None)
        return (self.scratch(name[0], strip), False) if kept is None else (kept, True)


def _gathered(sides: dict[int, Tensor], rows: RankRows) -> dict[int, Tensor]:
    """[B, D] each -> [N, D] each, in one message."""
    if len(rows.counts) == 1:
        return sides
    whole = gather_rows(torch.cat(list(sides.values()), dim=1), rows)
    return dict(zip(sides, whole.split([side.shape[1] for side in sides.values()], dim=1), strict=True))


def _product(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
    if left.dtype == torch.float16:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)  # type: ignore[call-overload]
    return torch.mm(left, right, out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == torch.float16:
        total += torch.mm(left, right, out_dtype=torch.float32)  # type: ignore[call-overload]
    else:
        total.addmm_(left, right)

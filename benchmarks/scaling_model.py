"""What a step of the loss sends, multiplies and holds on every rank, in closed formulas; and what time that takes, a model.

scaling.py checks the formulas against real ranks, and prints what comes of them.
"""

import json
import math
import os
import statistics
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from loss_forms import KINDS, Group

from imitate_ds.distributed import RankRows
from imitate_ds.ops import contrastive
from imitate_ds.ops.contrastive import EXCHANGES
from imitate_ds.ops.contrastive_strips import _Buffers

GROUPS = KINDS["step"]
IMPRESSION = GROUPS[0]
CPU = torch.device("cpu")
SMALL = 0.1  # of the largest message: one of fewer bytes is all latency

# The model's machine: a DGX H100 node, eight GPUs and eight network cards (NVIDIA DGX H100 data sheet). Peak speeds, so
# that its times are lower bounds.
NVLINK = 450e9  # bytes a second and direction, of one GPU: 18 links of fourth-generation NVLink
CARD = 50e9  # of one 400 Gb/s NDR InfiniBand card
HBM = 3.35e12  # H100 SXM5 data sheet
CACHE = 50e6  # bytes of its L2, from which a smaller side is read again
# An assumption, whose place a measured rate takes: 0.6 of the 989 TFLOP/s, dense 16-bit, of the data sheet.
GEMM_RATE = 600e12
# Seconds that NCCL itself reckons with (src/graph/tuning.cc, LL128): to begin, and for a step of a ring or a tree.
BEGIN = 14e-6
RING_STEP = {"node": 1.9e-6, "network": 4.0e-6}
TREE_STEP = {"node": 1.25e-6, "network": 8.5e-6}
FITTED = (1, 2)  # ranks
GPUS = tuple(2**k for k in range(3, 11))
GPU_ROWS = (128, 1024)
RATIO_ROWS = (128, 512, 1024, 2048, 4096, 16384)
GPU_RESULTS = ("loss-h100.json", "loss-h200.json")


class Width(NamedTuple):
    joint: int  # D
    text: int  # E


class Share(NamedTuple):
    """One rank's share of a step: what all closed formulas depend on."""

    ranks: int
    rows: int  # B
    width: Width
    exchange: str
    device: torch.device = CPU
    half: bool = False

    @property
    def columns(self) -> int:
        return self.ranks * self.rows

    @property
    def operand(self) -> int:
        """Bytes of a number that a matrix product reads. A CPU holds rounded ones in 32 bits."""
        return 2 if self.half and self.device.type == "cuda" else 4

    @property
    def owner(self) -> bool:
        return self.exchange == "owner" and self.ranks > 1


class Message(NamedTuple):
    title: str
    kind: str  # all_gather, all_reduce, reduce_scatter
    size: int  # bytes of the whole, which a gather ends with and a reduction begins with

    def rounds(self, ranks: int) -> int:
        """Of a ring: an all-reduce is a reduce-scatter and an all-gather."""
        return (ranks - 1) * (2 if self.kind == "all_reduce" else 1)

    def sent(self, ranks: int) -> float:
        """Bytes that leave one rank of a ring."""
        return self.rounds(ranks) * self.size / ranks

    def under_gloo(self) -> "Message":
        """gloo's reduce-scatter is an all-reduce of which most is thrown away (torch 2.14; its bytes are counted here)."""
        return self._replace(kind="all_reduce") if self.kind == "reduce_scatter" else self


def messages_of(group: Group, share: Share) -> list[Message]:
    """What the loss of a group sends, in order."""
    if share.ranks == 1:
        return []
    pairs, (joint, _) = len(group.links), share.width
    keys = {link.keys for link in group.links}
    sides = keys | {link.query for link in group.links} if share.owner else keys
    column = 4 * share.columns
    sent = [Message("sides", "all_gather", len(sides) * joint * share.operand * share.columns)]
    if group.prior:
        sent.append(Message("sums of the prior", "all_gather", column))
    sent.append(Message("maxima and sums of rows", "all_gather", 2 * pairs * column))
    sent.append(Message("maxima of columns", "all_reduce", pairs * column))
    sent.append(Message("sums of columns", "all_reduce", pairs * column))
    sent.append(Message("losses", "all_reduce", 8 * pairs))
    if not share.owner:
        sent += [Message("gradient of keys", "reduce_scatter", joint * column)] * pairs
    return sent


def text_messages(share: Share) -> list[Message]:
    """What exchange_texts sends: how many rows, width, step and views; two texts; two masks."""
    text = Message("text vectors", "all_gather", 4 * share.width.text * share.columns)
    mask = Message("masks", "all_gather", share.columns)
    return [Message("row counts", "all_gather", 4 * 8 * share.ranks), text, text, mask, mask]


class Strips(NamedTuple):
    """How one rank cuts its rows: strips, and how many are computed again because the budget does not keep them."""

    count: int
    height: int
    kept: int
    again_q: tuple[int, ...]  # rows of each
    again_z: tuple[int, ...]


def strips_of(group: Group, share: Share) -> Strips:
    buffers = _Buffers(share.rows, share.columns, torch.float32, share.device)  # it allocates nothing until it is asked
    heights = tuple(strip.stop - strip.start for strip in buffers.strips)
    free = max(0, buffers._free + (share.device.type == "cuda"))  # Triton's stages do without a spare strip
    of_q = len(heights) if group.prior else 0
    slots = heights * (bool(group.prior) + len(group.links))
    return Strips(len(heights), heights[0], min(free, len(slots)), slots[free:of_q], slots[max(free, of_q) :])


class Product(NamedTuple):
    """Matrix products of one kind: [rows, inner] with all columns, in so many strips."""

    rows: int
    strips: int
    inner: int
    moved: int  # bytes a column, each strip: the side of all ranks that is read or added to


def products_of(group: Group, share: Share) -> list[Product]:
    pairs, (joint, text), strips = len(group.links), share.width, strips_of(group, share)
    all_pairs = Product(pairs * share.rows, pairs * strips.count, joint, joint * share.operand)
    # Into fp32: with operands in fp16 the product is written, then read and added to the sum.
    added = all_pairs._replace(moved=joint * (16 if share.operand == 2 else 8))
    again = all_pairs._replace(rows=sum(strips.again_z), strips=len(strips.again_z))
    done = [all_pairs, again, all_pairs, *([all_pairs, all_pairs] if share.owner else [added])]
    if group.prior:
        prior = Product(share.rows, strips.count, text, text * share.operand)
        done += [prior, prior._replace(rows=sum(strips.again_q), strips=len(strips.again_q))]
    return done


def flops_of(group: Group, share: Share) -> int:
    return sum(2 * share.columns * product.rows * product.inner for product in products_of(group, share))


def memory_of(group: Group, share: Share) -> dict[str, int]:
    """Bytes at the peak of the second sweep, beyond inputs; and while the prior is made, before there are buffers."""
    pairs, (joint, text), strips = len(group.links), share.width, strips_of(group, share)
    names = {link.keys for link in group.links}
    if share.owner:
        names |= {link.query for link in group.links}
    rows, columns, strip = share.rows, share.columns, strips.height * share.columns
    scratch = 4 * (bool(strips.again_z) or share.owner) + 4 * bool(strips.again_q)
    scratch += 4 * (share.device.type == "cpu") + 2 * share.half
    held = {
        "sides": joint * share.operand * ((len(names) * columns if share.ranks > 1 else 0) + pairs * rows),
        "scaled queries": joint * share.operand * pairs * columns * share.owner,
        "prior": text * share.operand * columns * bool(group.prior),
        "column sums": 4 * columns * (4 + 12 * pairs),
        "strips": strip * (4 * strips.kept + scratch),
        "gradients": 4 * joint * pairs * (rows + (rows if share.owner else columns)),
    }
    if share.operand == 2 and not share.owner:
        held["product to add"] = 4 * joint * columns
    # contrastive_reference.standardise holds three copies at a time.
    making_prior = held["sides"] + held["scaled queries"] + 3 * 4 * text * columns * bool(group.prior)
    return {**held, "peak": max(sum(held.values()), making_prior), "while the prior is made": making_prior}


def crowding(ranks: int) -> float:
    """How many ranks share a core."""
    return max(1.0, ranks / len(os.sched_getaffinity(0)))


def fitted(measured: dict[str, dict]) -> dict[str, float]:
    """Constants of CPU ranks under gloo, from the runs on 1 and 2 ranks; the others are left to be predicted."""
    found = [(count, cell) for count in FITTED for cell in measured[str(count)]["exchanges"].values()]
    rates = {
        ranks: statistics.mean(cell["flops"] * crowding(n) / cell["computing_s"] for n, cell in found if n == ranks)
        for ranks in FITTED
    }
    sent = [
        (Message(m["title"], m["kind"], m["bytes"]).under_gloo(), count, m["seconds"] / crowding(count))
        for count, cell in found
        for m in cell["messages"]
    ]
    small = SMALL * max(m.size for m, _, _ in sent)
    round_s = statistics.median(seconds / m.rounds(count) for m, count, seconds in sent if m.size < small)
    large = [(m.sent(count), seconds - round_s * m.rounds(count)) for m, count, seconds in sent if m.size >= small]
    return {
        "flops_per_s_alone": rates[1],
        "flops_per_s_beside_others": rates[2],
        "round_s": round_s,
        "bytes_per_s": sum(size for size, _ in large) / max(1e-9, sum(seconds for _, seconds in large)),
    }


def cpu_seconds(share: Share, constants: dict[str, float]) -> dict[str, float]:
    """Model of a step of the impression group on CPU ranks."""
    sent = [message.under_gloo() for message in messages_of(IMPRESSION, share)]
    rounds, size = sum(m.rounds(share.ranks) for m in sent), sum(m.sent(share.ranks) for m in sent)
    crowd = crowding(share.ranks)
    rate = constants["flops_per_s_alone" if share.ranks == 1 else "flops_per_s_beside_others"]
    computing = crowd * flops_of(IMPRESSION, share) / rate
    return {
        "computing_s": computing,
        "sending_s": crowd * (constants["round_s"] * rounds + size / constants["bytes_per_s"]),
    }


class Cluster(NamedTuple):
    title: str
    node: int  # GPUs
    network: float  # bytes a second and direction, of a node


# A ring enters a node once, through all its cards: the node's network is what bounds it, not that of one GPU.
INFINIBAND = Cluster("8 x 400 Gb/s a node", 8, 8 * CARD)
ETHERNET = Cluster("1 x 100 Gb/s a node", 8, 12.5e9)
LONELY = Cluster("1 GPU, 1 x 400 Gb/s a node", 1, CARD)


def message_seconds(message: Message, gpus: int, cluster: Cluster) -> float:
    """On a ring, or where that is faster, an all-reduce on a tree, as NCCL chooses."""
    nodes = math.ceil(gpus / cluster.node)
    carried = message.sent(gpus) / (NVLINK if nodes == 1 else min(NVLINK, cluster.network))
    both_ways = message.rounds(gpus) // (gpus - 1)
    ring = both_ways * ((gpus - nodes) * RING_STEP["node"] + (nodes - 1) * RING_STEP["network"])
    tree = 2 * ((gpus / nodes - 1) * TREE_STEP["node"] + math.log2(nodes) * TREE_STEP["network"])
    return BEGIN + carried + (min(ring, tree) if message.kind == "all_reduce" else ring)


def product_seconds(share: Share, flops_per_s: float) -> float:
    """Of all products of a training step on a GPU: each as long as it multiplies, or as its large side takes to move."""
    seconds = 0.0
    for product in (product for group in GROUPS for product in products_of(group, share)):
        multiplying = 2 * share.columns * product.rows * product.inner / flops_per_s
        moved = share.columns * product.moved
        seconds += max(multiplying, product.strips * moved / HBM if moved > CACHE else 0)
    return seconds


def gpu_seconds(share: Share, cluster: Cluster, gpu: dict) -> dict[str, float]:
    """Model of the loss of a whole training step on one GPU of many."""
    between = gpu["other_s_per_flop"] * sum(flops_of(group, share) for group in GROUPS)
    computing = product_seconds(share, gpu["gemm_flops_per_s"]) + between
    sent = [message for group in GROUPS for message in messages_of(group, share)]
    sending, texts = (
        sum(message_seconds(m, share.ranks, cluster) for m in some) for some in (sent, text_messages(share))
    )
    return {"computing_s": computing, "sending_s": sending, "step_s": computing + sending, "texts_s": texts}


def gpu_share(gpus: int, rows: int, exchange: str, width: Width) -> Share:
    return Share(gpus, rows, width, exchange, torch.device("cuda"), half=True)


def gpu_memory(share: Share) -> int:
    """The largest group at its peak, and the texts of all ranks, which the loop holds meanwhile."""
    texts = 2 * share.columns * (4 * share.width.text + 1)
    return texts + max(memory_of(group, share)["peak"] for group in GROUPS)


def gpu_constants(results: Path, overhead: float) -> dict:
    """Rate of the products, and seconds a FLOP of what happens between them.

    From what loss.py measured on a GPU where its file is there, so that the model agrees with it at its largest step;
    else the stated rate, and an overhead that was measured elsewhere.
    """
    for path in (results / name for name in GPU_RESULTS if (results / name).exists()):
        times = json.loads(path.read_text())["times"]
        cells = {
            tuple(map(int, size.split("x"))): cell
            for size, cell in times["cells"].get("step", {}).items()
            if all("seconds_median" in cell.get(form, {}) for form in ("gemm_fp16", "triton_fp16"))
        }
        if cells:
            rows, columns = max(cells, key=math.prod)
            gemm, whole = cells[rows, columns]["gemm_fp16"], cells[rows, columns]["triton_fp16"]["seconds_median"]
            rate = gemm["flops"] / gemm["seconds_median"]
            share = gpu_share(columns // rows, rows, "reduce_scatter", Width(times["D"], times["E"]))
            flops = sum(flops_of(group, share) for group in GROUPS)
            return {
                "gemm_flops_per_s": rate,
                "other_s_per_flop": max(0.0, whole - product_seconds(share, rate)) / flops,
                "source": f"{path.name}: triton with fp16 operands at {rows}x{columns} on {times['machine']['device']}",
            }
    return {
        "gemm_flops_per_s": GEMM_RATE,
        "other_s_per_flop": (overhead - 1) / GEMM_RATE,
        "source": f"assumed, no GPU was measured; {overhead:.2f} times the products alone, as on one core of this CPU",
    }


def choice_of_the_door(gpus: int, cluster: Cluster) -> str:
    """What `exchange: auto` takes."""
    with mock.patch.object(contrastive, "node_count", return_value=math.ceil(gpus / cluster.node)):
        return contrastive.choose_exchange("auto", RankRows((1,) * gpus, 0))


def ratios(gpu: dict, width: Width) -> list[dict]:
    """Time of owner over that of reduce-scatter, by network and rows a GPU."""
    places = [(8, INFINIBAND), (16, INFINIBAND), (64, INFINIBAND), (1024, INFINIBAND), (64, ETHERNET), (64, LONELY)]
    lines = []
    for gpus, cluster in places:

        def seconds(rows: int, exchange: str, gpus: int = gpus, cluster: Cluster = cluster) -> float:
            return gpu_seconds(gpu_share(gpus, rows, exchange, width), cluster, gpu)["step_s"]

        by_rows = {str(rows): seconds(rows, "owner") / seconds(rows, "reduce_scatter") for rows in RATIO_ROWS}
        network = cluster.title if gpus > cluster.node else "NVLink, one node"
        lines.append({"gpus": gpus, "network": network, "auto": choice_of_the_door(gpus, cluster), "by_rows": by_rows})
    return lines


def model_of(gpu: dict, width: Width) -> dict:
    cells = []
    for rows in GPU_ROWS:
        for gpus in GPUS:
            door = choice_of_the_door(gpus, INFINIBAND)
            cell: dict[str, Any] = {"rows_per_gpu": rows, "gpus": gpus, "columns": rows * gpus, "auto": door}
            for exchange in EXCHANGES:
                share = gpu_share(gpus, rows, exchange, width)
                cell[exchange] = {**gpu_seconds(share, INFINIBAND, gpu), "memory_bytes": gpu_memory(share)}
            cell["faster"] = min(EXCHANGES, key=lambda name: cell[name]["step_s"])
            cells.append(cell)
    return {
        "kind": "model, not measured",
        "step": "all three groups of a training step, forward and backward, operands fp16; texts are gathered meanwhile",
        "gpu": gpu,
        "links": {
            "nvlink_bytes_per_s": NVLINK,
            "network_bytes_per_s_a_node": INFINIBAND.network,
            "gpus_a_node": INFINIBAND.node,
            "hbm_bytes_per_s": HBM,
            "cache_bytes": CACHE,
            "begin_s": BEGIN,
            "ring_step_s": RING_STEP,
            "tree_step_s": TREE_STEP,
            "sources": "peak speeds of the DGX H100 data sheet; seconds of NCCL's src/graph/tuning.cc (LL128)",
        },
        "cells": cells,
        "owner_over_reduce_scatter": ratios(gpu, width),
    }


def cpu_model(measured: dict[str, dict], share: Share) -> dict:
    """Beside what was measured, its relative error."""
    constants = fitted(measured)
    cells: dict[str, dict] = {}
    for count, cell in measured.items():
        cells[count] = {}
        for exchange, found in cell["exchanges"].items():
            times = cpu_seconds(share._replace(ranks=int(count), exchange=exchange), constants)
            whole = sum(times.values())
            cells[count][exchange] = {**times, "step_s": whole, "error": whole / found["step_s"] - 1}
    return {"kind": "model", "fitted_on_ranks": list(FITTED), "constants": constants, "cells": cells}

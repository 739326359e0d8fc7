"""The door: what it lets in, and what it says of the rest."""

import pytest
import torch

from imitate_ds.distributed import RankRows
from imitate_ds.ops import contrastive
from imitate_ds.ops.contrastive import choose_backend, choose_exchange, clinical_contrastive_loss

ROWS = torch.eye(4)


def test_auto_is_dense_at_this_size():
    auto, dense = (clinical_contrastive_loss(ROWS, ROWS, temperature=0.1, backend=name) for name in ("auto", "dense"))
    assert torch.equal(auto, dense)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.eye(3)}, r"found \[4, 4\] and \[3, 3\]"),
        ({"query": ROWS[0], "keys": ROWS[0]}, r"must both be \[B, D\]"),
        ({"query": ROWS[:0], "keys": ROWS[:0]}, "at least one row"),
        ({"prior": torch.eye(5)}, r"prior: must be \[N, E\] with N = 4, found \[5, 5\]"),
        ({"valid": torch.ones(4)}, r"valid: must be bool \[N\] with N = 4, found torch.float32"),
        ({"valid": torch.ones(3, dtype=torch.bool)}, r"found torch.bool \[3\]"),
        ({"temperature": 0.0}, r"temperature = 0.0: must be at least 0.01"),
        ({"temperature": float("inf")}, r"temperature = inf: must be at least 0.01, and finite"),
        ({"temperature": float("nan")}, r"temperature = nan: must be at least 0.01"),
        ({"temperature": torch.tensor([0.005])}, r"temperature = 0.00\d*: must be at least 0.01"),
        ({"temperature": torch.ones(2)}, r"must hold one number, found shape \[2\]"),
        ({"prior_strength": -0.1}, r"prior_strength = -0.1: must be at least 0"),
        ({"target_norm": "rows"}, r"target_norm = 'rows': must be one of none, row, ref"),
        ({"backend": "cuda"}, r"backend = 'cuda': must be one of auto, dense, strips, triton"),
        ({"query": ROWS.double(), "operands": "fp16"}, r"operands = 'fp16': must be fp32 for float64 embeddings"),
        ({"operands": "bf16"}, r"operands = 'bf16': must be one of fp32, fp16"),
        ({"exchange": "ring"}, r"exchange = 'ring': must be one of auto, reduce_scatter, owner"),
        ({"rows": RankRows((3, 1), 0)}, r"must hold the 3 rows of this rank, found 4"),
        ({"rows": RankRows((4, 1), 0), "prior": torch.eye(4)}, r"prior: must be \[N, E\] with N = 5, found \[4, 4\]"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    arguments = {"query": ROWS, "keys": ROWS, "temperature": 0.1} | change
    with pytest.raises(ValueError, match=message):
        clinical_contrastive_loss(**arguments)


def test_auto_turns_to_strips_above_the_measured_size():
    edge, cpu = int(contrastive.DENSE_LOGITS["cpu"] ** 0.5), torch.device("cpu")
    assert choose_backend("auto", cpu, edge) == "dense"
    assert choose_backend("auto", cpu, edge + 1) == "strips"
    assert choose_backend("strips", cpu, 2) == "strips"


def test_triton_asked_for_and_absent_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError, match=r"backend = 'triton': its kernels need a CUDA device, .*; use auto, or strips"
    ):
        clinical_contrastive_loss(ROWS, ROWS, temperature=0.1, backend="triton")
    monkeypatch.setattr(contrastive.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"triton is not installed"):
        choose_backend("triton", torch.device("cuda"), 8)


def test_exchange_follows_the_nodes(monkeypatch):
    ranks = RankRows((2, 2), 0)
    for nodes, expected in ((1, "reduce_scatter"), (2, "owner")):
        monkeypatch.setattr(contrastive, "node_count", lambda nodes=nodes: nodes)
        assert choose_exchange("auto", ranks) == expected
        assert choose_exchange("owner", ranks) == "owner"
    assert choose_exchange("auto", RankRows((4,), 0)) == "reduce_scatter"


def test_float64_has_no_triton():
    cuda = torch.device("cuda")
    assert choose_backend("auto", cuda, 10**4, torch.float64) == "strips"
    with pytest.raises(ValueError, match="its kernels compute in float32, and the embeddings are float64"):
        choose_backend("triton", cuda, 10**4, torch.float64)


def test_a_group_without_pairs_is_refused():
    with pytest.raises(ValueError, match="pairs: must hold at least one pair"):
        contrastive.clinical_contrastive_losses([])

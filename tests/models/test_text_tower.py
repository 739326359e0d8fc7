"""The text encoder in training: one pass over both sections equals each text alone, and only what is asked for learns."""

import pytest
import torch
from transformers import DistilBertConfig, DistilBertModel

from imitate_ds.batch import Tokens
from imitate_ds.config import TextConfig
from imitate_ds.data.loader import _tokens
from imitate_ds.models.lsa_encoder import LsaEncoder
from imitate_ds.models.text_encoder import load_text_encoder
from imitate_ds.models.text_tower import TextTower, _laid_out, open_text_source
from tests.tiny_bert import save_tiny_bert, tiny_bert

WORDS = ("the", "lungs", "are", "clear", "no", "pleural", "effusion", "large", "heart", ".")
REPORTS = [
    ("The lungs are clear. No pleural effusion.", "Clear lungs."),
    ("", "Large pleural effusion."),
    ("The heart is large.", ""),
    ("", ""),
    ("No effusion. " * 40, "No effusion."),
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"), WORDS)


@pytest.fixture
def encoder(bert):
    return load_text_encoder(str(bert))


def learning(tower):
    return {name for name, parameter in tower.model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("layers", [0, 1, "all"])
@pytest.mark.parametrize("packs", [True, False])
def test_one_pass_gives_each_text_as_it_is_alone(encoder, layers, packs):
    tower = TextTower(encoder.model, layers).eval()
    assert tower._packs
    tower._packs = packs
    rows = tower(_tokens(REPORTS, encoder.tokenize)).detach()
    alone = torch.stack([torch.cat([encoder.encode([text]) for text in report]) for report in REPORTS])
    torch.testing.assert_close(rows, alone, rtol=1e-5, atol=1e-6)
    assert rows.eq(0).all(dim=2).tolist() == [[not text for text in report] for report in REPORTS]


def test_in_float64_vectors_stay_so(encoder):
    tokens = _tokens(REPORTS, encoder.tokenize)
    rows = TextTower(encoder.model, 0).eval()(tokens)
    exact = TextTower(encoder.model.double(), 0).eval()(tokens)
    assert (rows.dtype, exact.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(rows.double(), exact, rtol=1e-5, atol=1e-6)
    assert not torch.equal(rows.double(), exact)


def test_short_texts_share_a_row():
    laid = _laid_out(torch.tensor([2, 7, 3, 2, 1]), together=True)
    assert laid.owners.tolist() == [[1] * 7, [2, 2, 2, 0, 0, 3, 3], [4, *[-1] * 6]]
    assert laid.starts.tolist() == [10, 0, 7, 12, 14]
    assert laid.positions.tolist() == [0, 1, 0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 0, 1, 0]
    apart = _laid_out(torch.tensor([2, 7, 3]), together=False).owners
    assert sorted(apart.tolist()) == [[0, 0, *[-1] * 5], [1] * 7, [2, 2, 2, *[-1] * 4]]
    assert _laid_out(torch.tensor([], dtype=torch.long), together=True).owners.tolist() == [[-1]]


@pytest.mark.parametrize("packs", [True, False])
def test_packed_texts_learn_as_texts_apart(encoder, packs):
    """The gradient of one pass is that of every text in a pass of its own."""
    tower, tokens = TextTower(encoder.model, "all").eval(), _tokens(REPORTS, encoder.tokenize)
    tower._packs = packs
    weights = torch.randn(len(REPORTS), 2, 32, generator=torch.Generator().manual_seed(0))
    learned = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    found = torch.autograd.grad((tower(tokens) * weights).sum(), learned)
    alone = [tower(tokens.of_reports(i, i + 1)) * weights[i] for i in range(len(REPORTS))]
    for one, other in zip(found, torch.autograd.grad(torch.stack(alone).sum(), learned), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_part_of_a_batch_has_its_own_tokens(encoder):
    tower, whole = TextTower(encoder.model, 0).eval(), _tokens(REPORTS, encoder.tokenize)
    parts = [whole.of_reports(0, 2), whole.of_reports(2, 4), whole.of_reports(4, 5)]
    assert sum(len(part.ids) for part in parts) == len(whole.ids) == int(whole.lengths.sum())
    torch.testing.assert_close(torch.cat([tower(part) for part in parts]), tower(whole), rtol=1e-5, atol=1e-6)


def test_findings_can_be_left_out(encoder):
    tower, tokens = TextTower(encoder.model, 0).eval(), _tokens(REPORTS, encoder.tokenize)
    without = tower(tokens, with_findings=False)
    assert not without[:, 0].any()
    torch.testing.assert_close(without[:, 1], tower(tokens)[:, 1], rtol=1e-5, atol=1e-6)


def test_a_batch_without_one_text_still_gives_gradients(encoder):
    tower = TextTower(encoder.model, "all").train()
    rows = tower(_tokens([("", ""), ("", "")], encoder.tokenize))
    assert rows.shape == (2, 2, 32)
    rows.sum().backward()
    for name, parameter in tower.model.named_parameters():
        assert (parameter.grad is not None) == (name in learning(tower))
        assert parameter.grad is None or not parameter.grad.any()


def test_only_what_the_vector_depends_on_learns(encoder):
    names = {name for name, _ in encoder.model.named_parameters()}
    pooler = {"pooler.dense.weight", "pooler.dense.bias"}
    last = {name for name in names if name.startswith("encoder.layer.1.")}
    assert learning(TextTower(encoder.model, "all")) == names - pooler
    assert learning(TextTower(encoder.model, 2)) == {name for name in names if name.startswith("encoder.layer.")}
    assert learning(TextTower(encoder.model, 1)) == last
    assert learning(TextTower(encoder.model, 0)) == set()


def test_frozen_layers_stay_in_evaluation_mode(encoder):
    tower, tokens = TextTower(encoder.model, 1).train(), _tokens(REPORTS, encoder.tokenize)
    model = tower.model
    assert model.encoder.layer[1].output.dropout.training
    assert not model.encoder.layer[0].output.dropout.training
    assert not model.embeddings.dropout.training
    assert not torch.equal(tower(tokens), tower(tokens))  # the last layer does draw
    assert torch.equal(tower.eval()(tokens), tower(tokens))
    frozen = TextTower(model, 0).train()
    assert torch.equal(frozen(tokens), frozen(tokens))
    assert not frozen(tokens).requires_grad


def test_layers_of_other_encoders_are_found():
    config = DistilBertConfig(vocab_size=20, dim=32, n_layers=3, n_heads=2, hidden_dim=48, max_position_embeddings=16)
    tower = TextTower(DistilBertModel(config), 1)
    assert {name.rpartition("layer.2.")[1] for name in learning(tower)} == {"layer.2."}
    tokens = Tokens(torch.tensor([1, 2, 3], dtype=torch.int32), torch.tensor([[1, 2]]))
    assert tower(tokens).shape == (1, 2, 32)


def test_what_cannot_learn_as_asked_is_refused(bert, tmp_path):
    with pytest.raises(ValueError, match=r"text\.trainable_layers = 3: this encoder has 2; name fewer, or all"):
        open_text_source(TextConfig(mode="online", trainable_layers=3), str(bert))
    with pytest.raises(ValueError, match=r"text\.max_tokens = 65: this encoder reads 64 at most"):
        open_text_source(TextConfig(mode="online", max_tokens=65), str(bert))
    with pytest.raises(FileNotFoundError, match=r"text\.encoder = .*: neither a folder .* 'hf download"):
        open_text_source(TextConfig(mode="online"), str(tmp_path / "none"))
    LsaEncoder.fit(["clear lungs", "large heart"], dim=2).save(tmp_path)
    with pytest.raises(ValueError, match=r"text\.encoder = .* is of kind lsa, which cannot learn"):
        open_text_source(TextConfig(mode="online"), str(tmp_path))


def test_tokens_that_are_read_can_be_fewer_and_are_remembered(bert, tmp_path):
    source = open_text_source(TextConfig(mode="online", max_tokens=8), str(bert))
    assert [len(ids) for ids in source.tokenize(["no " * 20, "no"])] == [8, 3]
    weights = {f"text_tower.model.{name}": tensor for name, tensor in tiny_bert(len(WORDS)).state_dict().items()}
    encoder = source.trained(weights | {"image_encoder.weight": torch.zeros(1)})
    assert encoder.fingerprint == source.fingerprint  # the same weights
    weights["text_tower.model.encoder.layer.1.output.dense.bias"] += 0.1
    moved = source.trained(weights)
    assert moved.fingerprint != source.fingerprint
    moved.save(tmp_path)
    assert load_text_encoder(str(tmp_path)).fingerprint == moved.fingerprint
    assert load_text_encoder(str(tmp_path)).max_tokens == 8

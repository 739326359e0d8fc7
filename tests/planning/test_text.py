"""A text encoder in the step is planned as it will run: operations, bytes, how long reports are."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AlbertConfig,
    DebertaConfig,
    DistilBertConfig,
    ElectraConfig,
    LongformerConfig,
    ModernBertConfig,
    RobertaConfig,
)

from imitate_ds.batch import Tokens
from imitate_ds.config import build_run_config
from imitate_ds.data.shard_index import load_index, read_samples
from imitate_ds.data.shards import build_shards
from imitate_ds.data.sources.phantom import PhantomSource
from imitate_ds.data.text_cache import embed_shards, fit_texts
from imitate_ds.models.huggingface_encoder import TextShape
from imitate_ds.models.text_encoder import load_text_encoder
from imitate_ds.models.text_tower import TextTower
from imitate_ds.planning.text import Lengths, PlannedText, PlannedTower, read_text
from imitate_ds.planning.trace import Trace, trace_step
from tests.tiny_bert import save_tiny_bert, tiny_bert

STUDIES, FINDINGS, IMPRESSION = 16, 12, 12
WORDS = [f"word{chr(97 + i)}" for i in range(20)]


@pytest.fixture(scope="module")
def bert(phantom_shards: Path, tmp_path_factory) -> Path:
    """One that knows every word of the phantoms' reports."""
    words = sorted({word.strip(".,").lower() for text in fit_texts(phantom_shards) for word in text.split()})
    return save_tiny_bert(tmp_path_factory.mktemp("bert"), [*words, ".", ","], positions=96)


def read(shards: Path | list[dict], data: dict | None = None, **text) -> PlannedText:
    places = shards if isinstance(shards, list) else str(shards)
    values = {"name": "x", "data": {"shards": places, **(data or {})}, "text": {"mode": "online", **text}}
    return read_text(build_run_config(values))


def planned(config, layers, *, on_cuda: bool = False, longest: int = FINDINGS) -> PlannedTower:
    text = PlannedText(TextShape(config, 12, None), Lengths(FINDINGS, IMPRESSION, 6.0, longest, FINDINGS * 2), "")
    return PlannedTower(text, layers, on_cuda=on_cuda).train()


def step(tower: TextTower, studies: int) -> torch.Tensor:
    return embed(tower, Tokens(torch.empty(0), torch.empty(studies, 2)))


def embed(tower: TextTower, tokens: Tokens) -> torch.Tensor:
    return (tower(tokens) * torch.ones(32, requires_grad=True)).sum()  # as the projection has weights that learn


def trace(tower: TextTower, studies: int = STUDIES) -> Trace:
    return trace_step(tower, step, studies)


@pytest.mark.parametrize("layers", [1, 2, "all"])
def test_operations_and_bytes_are_those_of_the_real_tower(layers) -> None:
    lengths = torch.tensor([[FINDINGS, IMPRESSION]] * STUDIES)
    tokens = Tokens(torch.zeros(int(lengths.sum()), dtype=torch.int32), lengths)
    found = trace(planned(tiny_bert(20, dropout=0.0).config, layers))
    eager = tiny_bert(20, dropout=0.0)
    eager.set_attn_implementation("eager")  # torch's counter does not know the fused attention of a CPU
    with FlopCounterMode(display=False) as counter:
        embed(TextTower(eager, layers).train(), tokens).backward()
    # rows of 24 tokens here, of 12 there: attention is a small part of this little network too
    assert found.flops.sum() == pytest.approx(counter.get_total_flops(), rel=0.15)
    real, saved = TextTower(tiny_bert(20, dropout=0.0), layers).train(), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in real.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda it: it):
        embed(real, tokens).backward()
    assert found.saved == pytest.approx(sum(saved.values()), rel=0.08)


def test_layers_that_do_not_learn_keep_nothing() -> None:
    shape = tiny_bert(20).config
    none, last, every = (trace(planned(shape, layers)) for layers in (0, 1, "all"))
    assert none.saved < last.saved < every.saved
    assert none.finished[-1] == 0 < last.finished[-1] < every.finished[-1]
    assert none.flops.sum() < last.flops.sum() < every.flops.sum()


def test_sections_apart_are_as_long_as_the_longest() -> None:
    shape = DistilBertConfig(vocab_size=20, dim=32, n_layers=2, n_heads=2, hidden_dim=48, max_position_embeddings=16)
    tower = planned(shape, "all")
    assert not tower._packs
    assert trace(tower, 32).flops.sum() == pytest.approx(2 * trace(tower, 16).flops.sum())
    short = planned(shape, "all", longest=FINDINGS // 2)
    assert trace(short).flops.sum() == pytest.approx(trace(tower).flops.sum() / 2, rel=0.15)


def test_findings_that_nothing_is_aligned_with_cost_nothing() -> None:
    both = trace(planned(tiny_bert(20).config, "all"))
    tokens = Tokens(torch.empty(0), torch.empty(STUDIES, 2))
    tower = planned(tiny_bert(20).config, "all")
    alone = trace_step(tower, lambda model, _: model(tokens, with_findings=False).sum(), STUDIES)
    assert alone.flops.sum() == pytest.approx(both.flops.sum() / 2, rel=0.1)


@pytest.mark.parametrize("config", [RobertaConfig, DebertaConfig, ElectraConfig, ModernBertConfig, AlbertConfig])
def test_encoders_of_every_kind_are_planned(config) -> None:
    shape = config(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    assert trace(planned(shape, "all")).flops.sum() > 1e6


def test_an_encoder_that_looks_at_what_it_reads_is_named() -> None:
    shape = LongformerConfig(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        attention_window=[8],
    )
    with pytest.raises(ValueError, match=r"what a LongformerModel does depends on .* --set text\.mode=cached"):
        trace(planned(shape, "all"))


def test_a_small_micro_batch_meets_longer_reports() -> None:
    lengths = Lengths(80.0, 20.0, 50.0, 200, 256)
    assert lengths.of_a_study() == (80, 20)
    assert lengths.of_a_study(4) == (140, 35)  # 3 standard deviations of a mean of four: 75 tokens
    assert lengths.of_a_study(400) == (86, 22)
    assert lengths._replace(most=100).of_a_study(4) == (100, 35)  # no more than is read of a section
    assert Lengths(0.0, 0.0, 0.0, 0, 256).of_a_study(2) == (1, 1)
    tower = planned(tiny_bert(20).config, "all")
    usual = trace(tower)
    tower.met = STUDIES
    assert trace(tower).saved > 1.1 * usual.saved


def test_sections_apart_are_all_of_full_length_where_one_is() -> None:
    shape = DistilBertConfig(vocab_size=20, dim=32, n_layers=2, n_heads=2, hidden_dim=48, max_position_embeddings=24)
    tower = planned(shape, "all")
    usual = trace(tower)
    tower.met = 1e9
    assert trace(tower).flops.sum() == pytest.approx(2 * usual.flops.sum(), rel=0.1)


def test_reports_that_are_here_are_counted(phantom_shards: Path, bert: Path) -> None:
    found, tokenize = read(phantom_shards, encoder=str(bert)), load_text_encoder(str(bert)).tokenize
    metas = [meta for _, _, meta in read_samples(load_index(phantom_shards), "train")]
    texts = [(meta["findings"], meta["impression"]) for meta in metas]
    counts = np.array([[len(tokenize([text])[0]) if text else 0 for text in pair] for pair in texts])
    assert len(counts) == 182
    assert counts.min() == 0  # a section that a report lacks costs nothing
    assert found.lengths[:2] == pytest.approx(counts.mean(0))
    assert found.lengths.spread == pytest.approx(counts.sum(1).std())
    assert found.lengths.longest == counts.max()
    assert found.shape.config.hidden_size == 32
    assert found.source == f"{bert}; {counts.sum(1).mean():.0f} tokens in a report of {phantom_shards}"
    short = read(phantom_shards, encoder=str(bert), max_tokens=4).lengths
    assert short.findings < short.longest == 4
    with pytest.raises(ValueError, match=r"text\.max_tokens = 97: this encoder reads 96 at most"):
        read(phantom_shards, encoder=str(bert), max_tokens=97)


def test_reports_are_those_that_the_run_reads(phantom_shards: Path, bert: Path) -> None:
    usual = read(phantom_shards, encoder=str(bert)).lengths
    whole = read(phantom_shards, {"impression_text": "report"}, encoder=str(bert)).lengths
    assert whole.findings == usual.findings
    assert whole.impression == pytest.approx(usual.findings + usual.impression - 2, abs=0.5)  # marked at its ends once
    val = read(phantom_shards, {"train_split": "val", "val_split": "train"}, encoder=str(bert)).lengths
    assert val != usual


def test_folders_count_by_the_studies_that_an_epoch_passes(phantom_shards: Path, bert: Path, tmp_path: Path) -> None:
    source = PhantomSource(studies=30, seed=8, val_share=0.2)
    build_shards(source, tmp_path / "few", image_size=64, workers=1, samples_per_shard=48, progress=False)
    embed_shards(tmp_path / "few", load_text_encoder(str(phantom_shards / "text_encoder")))
    folders = [phantom_shards, tmp_path / "few"]
    many, few = (read(folder, encoder=str(bert)).lengths.findings for folder in folders)
    assert abs(many - few) > 0.2
    both = [{"shards": str(folder), "weight": weight} for folder, weight in zip(folders, (1.0, 2.0), strict=True)]
    passed = [sum(shard.samples for shard in load_index(folder).of_split("train")) for folder in folders]
    expected = np.average([many, few], weights=[passed[0], 2 * passed[1]])
    assert read(both, encoder=str(bert)).lengths.findings == pytest.approx(expected)


def test_tars_that_are_not_here_need_not_be(phantom_shards: Path, bert: Path, tmp_path: Path) -> None:
    index = shutil.copytree(phantom_shards, tmp_path / "index", ignore=shutil.ignore_patterns("*.tar"))
    found = read(index, encoder=str(bert))
    assert found.lengths[:2] == (80, 32)
    assert found.source == f"{bert}; 112 tokens in a report assumed"


def test_what_is_not_here_is_assumed_and_said(tmp_path: Path) -> None:
    found = read(tmp_path / "nowhere", max_tokens=1024)  # more than the BERT-base in its place reads
    assert (found.shape.config.hidden_size, found.lengths) == (768, Lengths(80, 32, 56, 512, 512))
    assert found.source == (
        "emilyalsentzer/Bio_ClinicalBERT is not here, a BERT-base is assumed; 112 tokens in a report assumed"
    )
    assert read(tmp_path / "nowhere", {"impression_text": "report"}).lengths == Lengths(80, 112, 96, 256, 256)


def test_shards_whose_encoder_cannot_learn_are_refused(phantom_shards: Path) -> None:
    with pytest.raises(ValueError, match=r"text\.mode = 'online': .* is embedded by lsa, which cannot learn"):
        read(phantom_shards)

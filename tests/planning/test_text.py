"""A text encoder in the step is planned as it will run: operations, bytes, how long reports are."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DistilBertConfig

from imitate_ds.batch import Tokens
from imitate_ds.config import build_run_config
from imitate_ds.data.loader import _tokens
from imitate_ds.data.text_cache import fit_texts
from imitate_ds.models.huggingface_encoder import TextShape
from imitate_ds.models.text_encoder import load_text_encoder
from imitate_ds.models.text_tower import TextTower
from imitate_ds.planning.assumptions import USUAL_TOKENS
from imitate_ds.planning.text import PlannedText, PlannedTower, read_text
from imitate_ds.planning.trace import Trace, trace_step
from tests.tiny_bert import save_tiny_bert, tiny_bert

STUDIES, FINDINGS, IMPRESSION = 16, 12, 12
WORDS = [f"word{chr(97 + i)}" for i in range(20)]


def read(shards: Path | str, **text):
    return read_text(
        build_run_config({"name": "x", "data": {"shards": str(shards)}, "text": {"mode": "online", **text}})
    )


def planned(config, layers, *, on_cuda: bool = False) -> PlannedTower:
    text = PlannedText(TextShape(config, 12, None), (FINDINGS, IMPRESSION), FINDINGS, "")
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
    short = PlannedTower(tower._text._replace(longest=FINDINGS // 2), "all", on_cuda=False).train()
    assert trace(short).flops.sum() == pytest.approx(trace(tower).flops.sum() / 2, rel=0.15)


def test_findings_that_nothing_is_aligned_with_cost_nothing() -> None:
    both = trace(planned(tiny_bert(20).config, "all"))
    tokens = Tokens(torch.empty(0), torch.empty(STUDIES, 2))
    tower = planned(tiny_bert(20).config, "all")
    alone = trace_step(tower, lambda model, _: model(tokens, with_findings=False).sum(), STUDIES)
    assert alone.flops.sum() == pytest.approx(both.flops.sum() / 2, rel=0.1)


def test_reports_that_are_here_are_counted(phantom_shards: Path, tmp_path: Path) -> None:
    words = sorted({word.strip(".,").lower() for text in fit_texts(phantom_shards) for word in text.split()})
    folder = save_tiny_bert(tmp_path / "bert", [*words, ".", ","], positions=96)
    found = read(phantom_shards, encoder=str(folder))
    reports = _tokens([(text, "") for text in fit_texts(phantom_shards)], load_text_encoder(str(folder)).tokenize)
    assert sum(found.tokens) * 182 == pytest.approx(int(reports.lengths.sum()), rel=0.05)
    assert found.shape.config.hidden_size == 32
    assert found.source == f"{folder}; {sum(found.tokens)} tokens in a report of {phantom_shards}"
    assert found.longest == max(map(len, load_text_encoder(str(folder)).tokenize(fit_texts(phantom_shards))))
    short = read(phantom_shards, encoder=str(folder), max_tokens=4)
    assert (max(short.tokens), short.longest) == (4, 4)
    with pytest.raises(ValueError, match=r"text\.max_tokens = 97: this encoder reads 96 at most"):
        read(phantom_shards, encoder=str(folder), max_tokens=97)


def test_what_is_not_here_is_assumed_and_said(tmp_path: Path) -> None:
    found = read(tmp_path / "nowhere")
    assert (found.shape.config.hidden_size, found.tokens, found.longest) == (768, USUAL_TOKENS, 256)
    assert found.source.startswith("emilyalsentzer/Bio_ClinicalBERT is not here, a BERT-base is assumed; ")
    assert "tokens in a report assumed" in found.source


def test_shards_whose_encoder_cannot_learn_are_refused(phantom_shards: Path) -> None:
    with pytest.raises(ValueError, match=r"text\.mode = 'online': .* is embedded by lsa, which cannot learn"):
        read(phantom_shards)

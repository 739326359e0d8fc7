import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, DistilBertConfig, RobertaConfig

from imitate_ds.models.huggingface_encoder import HuggingFaceEncoder, TextShape, look_up_shape
from imitate_ds.models.lsa_encoder import LsaEncoder
from imitate_ds.models.text_encoder import load_text_encoder
from imitate_ds.models.text_encoder_folder import DESCRIPTION
from imitate_ds.models.text_tower import TextTower
from tests.tiny_bert import save_tiny_bert

REPORTS = [
    "The lungs are clear. No pleural effusion.",
    "Small left pleural effusion.",
    "Large right pleural effusion with atelectasis.",
    "Cardiomegaly. No pneumothorax.",
    "The heart is enlarged.",
    "No acute cardiopulmonary abnormality.",
]
WORDS = [
    "the",
    "lungs",
    "are",
    "clear",
    "no",
    "pleural",
    "effusion",
    "left",
    "right",
    "large",
    "heart",
    "##s",
    ".",
    ",",
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A BERT of two layers and a WordPiece tokenizer with random weights, saved as a hub folder would be."""
    return save_tiny_bert(tmp_path_factory.mktemp("bert"), WORDS, positions=24)


def test_bert_gives_the_vector_of_its_first_token(bert):
    encoder = load_text_encoder(str(bert))
    rows = encoder.encode(["The lungs are clear.", "No effusion."])
    model = BertModel.from_pretrained(bert).eval()
    ids = [
        [2, *(5 + WORDS.index(word) for word in text.split()), 3] for text in ("the lungs are clear .", "no effusion .")
    ]
    for row, tokens in zip(rows, ids, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([tokens])).last_hidden_state[0, 0]
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-6)
    assert rows.dtype == torch.float32
    assert encoder.width == 32


def test_bert_rows_do_not_depend_on_their_neighbours(bert):
    encoder = load_text_encoder(str(bert))
    texts = [*REPORTS, "", "Effusion.", "N/A"]
    together, one_by_one = encoder.encode(texts, batch_size=4), [encoder.encode([text])[0] for text in texts]
    torch.testing.assert_close(together, torch.stack(one_by_one), rtol=1e-5, atol=1e-6)
    missing = together.eq(0).all(dim=1)
    assert missing.tolist() == [text in ("", "N/A") for text in texts]


def test_bert_reads_as_many_tokens_as_it_has_positions(bert):
    encoder = load_text_encoder(str(bert))  # 24 positions: [CLS], 22 words, [SEP]
    start = "lungs clear " * 11
    torch.testing.assert_close(encoder.encode([start + "no effusion"]), encoder.encode([start + "large heart"]))
    assert not torch.allclose(encoder.encode([start]), encoder.encode(["heart " + start]))
    short = HuggingFaceEncoder.load(str(bert), max_tokens=4)
    torch.testing.assert_close(short.encode(["no effusion left"]), short.encode(["no effusion right"]))


def test_a_bert_folder_of_the_older_kind_has_its_words_in_vocab_txt(bert, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(bert / name, tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=r"lacks tokenizer\.json or vocab\.txt|and tokenizer"):
        load_text_encoder(str(tmp_path))
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    expected = load_text_encoder(str(bert)).encode(["No effusion.", "Lungs clear, LARGE heart."])
    torch.testing.assert_close(
        load_text_encoder(str(tmp_path)).encode(["No effusion.", "Lungs clear, LARGE heart."]), expected
    )


def test_damaged_bert_weights_are_named(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "bert")
    (folder / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot be read \(SafetensorError: .* copy or download it again"):
        load_text_encoder(str(folder))


@pytest.mark.parametrize("read", [load_text_encoder, look_up_shape])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[]"),
        ("config.json", {"hidden_size": "wide"}),
        ("config.json", {"model_type": "of_next_year"}),
        ("tokenizer.json", "[1]"),
        ("tokenizer_config.json", "[1]"),
    ],
)
def test_a_bert_folder_of_another_form_is_damaged(bert, tmp_path, read, name, content):
    folder = shutil.copytree(bert, tmp_path / "bert")
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(json.loads(path.read_text()) | content))
    with pytest.raises(ValueError, match=r"bert': cannot be read \(\w+: .*\); copy or download it again"):
        read(str(folder))


def test_a_bert_folder_without_weights_or_with_those_of_another_is_not_lost(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "bert", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ValueError, match=r"cannot be read \(OSError: .* copy or download it again"):
        load_text_encoder(str(folder))
    config = json.loads((bert / "config.json").read_text())
    shutil.copy(bert / "model.safetensors", folder)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(ValueError, match=r"cannot be read \(RuntimeError: .* copy or download it again"):
        load_text_encoder(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 5}))
    for read in (load_text_encoder, lambda name: look_up_shape(name).build()):
        with pytest.raises(ValueError, match=r"bert': cannot be read \(ValueError: .* attention heads"):
            read(str(folder))


@pytest.mark.parametrize(
    ("changes", "left_out", "reason"),
    [
        ({"model_type": "of_next_year"}, [], r"cannot be read \(\w+: .*of_next_year"),
        ({"num_attention_heads": 5}, [], r"cannot be read \(ValueError: .* attention heads"),
        ({}, ["*.safetensors"], r"cannot be read \(OSError: "),
        ({}, ["config.json"], r"the hub has no such model or cannot be reached"),
    ],
)
def test_what_the_cache_of_the_hub_holds_is_not_called_absent(bert, tmp_path, monkeypatch, changes, left_out, reason):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--some--bert"
    snapshot = shutil.copytree(bert, folder / "snapshots/abc", ignore=shutil.ignore_patterns(*left_out))
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")
    if changes:
        config = json.loads((snapshot / "config.json").read_text())
        (snapshot / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        load_text_encoder("some/bert")
    if "model_type" in changes:
        with pytest.raises(ValueError, match=reason):
            look_up_shape("some/bert")


@pytest.mark.parametrize("read", [load_text_encoder, look_up_shape])
def test_a_bert_folder_without_its_words_is_refused(bert, tmp_path, read):
    folder = shutil.copytree(bert, tmp_path / "bert", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(
        ValueError, match=r"knows \d tokens, its model \d+; the folder lacks tokenizer\.json or vocab\.txt"
    ):
        read(str(folder))


def test_the_shape_is_that_of_the_encoder(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))  # as its weights were saved
    shape, encoder = look_up_shape(str(folder)), load_text_encoder(str(folder))
    assert isinstance(encoder, HuggingFaceEncoder)
    assert shape.tokenize
    assert shape.tokenize(REPORTS) == encoder.tokenize(REPORTS)
    assert shape.max_tokens == encoder.max_tokens < 256  # it has fewer positions
    built = {name: (weight.shape, weight.dtype) for name, weight in shape.build().named_parameters()}
    assert built == {name: (weight.shape, weight.dtype) for name, weight in encoder.model.named_parameters()}


@pytest.mark.parametrize("config", [BertConfig(), DistilBertConfig(), RobertaConfig()])
def test_a_shape_is_built_without_dropout_of_attention(config):
    config.num_hidden_layers, config.hidden_dropout_prob = 1, 0.0
    model = TextShape(config, 8, None).build(attention_dropout=False)
    assert [name for name, module in model.named_modules() if "attention" in name and getattr(module, "p", 0.0)] == []


def test_the_shape_of_what_cannot_learn_or_is_not_whole_is_refused(tmp_path):
    LsaEncoder.fit(REPORTS, dim=4).save(tmp_path / "lsa")
    for name in ("lsa", str(tmp_path / "lsa")):
        with pytest.raises(ValueError, match="is of kind lsa, which cannot learn; name a Hugging Face encoder"):
            look_up_shape(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="not a folder with a Hugging Face model and tokenizer"):
        look_up_shape(str(tmp_path / "empty"))
    assert look_up_shape(str(tmp_path / "nowhere"), 9_999).max_tokens == 512  # a BERT-base in its place


def test_bert_is_frozen_and_the_same_every_time(bert):
    encoder = load_text_encoder(str(bert))
    assert isinstance(encoder, HuggingFaceEncoder)
    rows = encoder.encode(REPORTS)
    assert not rows.requires_grad
    assert torch.equal(rows, encoder.encode(REPORTS))


def test_bert_saved_and_loaded_is_the_same_encoder(bert, tmp_path):
    encoder = HuggingFaceEncoder.load(str(bert), max_tokens=8)
    encoder.encode(REPORTS)
    encoder.save(tmp_path)
    again = load_text_encoder(str(tmp_path))
    assert again.fingerprint == encoder.fingerprint
    assert torch.equal(again.encode(REPORTS), encoder.encode(REPORTS))
    assert json.loads((tmp_path / DESCRIPTION).read_text())["kind"] == "huggingface"
    assert (tmp_path / "model.safetensors").is_file()


def test_fingerprint_changes_with_weights_and_with_settings(bert, tmp_path):
    encoder = load_text_encoder(str(bert))
    encoder.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["encoder.layer.1.output.dense.bias"] += 1e-3
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    prints = {encoder.fingerprint, load_text_encoder(str(tmp_path)).fingerprint}
    prints.add(HuggingFaceEncoder.load(str(bert), max_tokens=8).fingerprint)
    assert len(prints) == 3
    assert all(len(text) == 16 for text in prints)
    assert load_text_encoder(str(bert)).fingerprint == encoder.fingerprint


def test_weights_without_a_pooler_are_the_same_encoder_every_time(bert, tmp_path):
    """As those of a masked language model are: what transformers makes up for it is random, and read by nothing."""
    folder = shutil.copytree(bert, tmp_path / "bert")
    weights = load_file(folder / "model.safetensors")
    save_file({n: w for n, w in weights.items() if "pooler" not in n}, folder / "model.safetensors", {"format": "pt"})
    encoder = load_text_encoder(str(folder))
    assert load_text_encoder(str(folder)).fingerprint == encoder.fingerprint
    encoder.save(tmp_path / "saved")
    assert load_text_encoder(str(tmp_path / "saved")).fingerprint == encoder.fingerprint
    assert torch.equal(encoder.encode(REPORTS), load_text_encoder(str(bert)).encode(REPORTS))


def test_weights_that_lack_a_layer_are_refused(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "bert")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {n: w for n, w in weights.items() if ".layer.1." not in n}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"16 weights are missing, encoder\.layer\.1\..* download it again"):
        load_text_encoder(str(folder))


def with_own_code(bert: Path, folder: Path, name: str) -> Path:
    """The folder that needs code beside it: classes of its own, which end the process when anyone imports them."""
    shutil.copytree(bert, folder)
    classes = {"AutoConfig": f"code_of.{name}Config", "AutoModel": f"code_of.{name}Model"}
    about = json.loads((folder / "config.json").read_text())
    about |= {"model_type": {"CXRBert": "cxr-bert"}.get(name, name), "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "code_of.py").write_text("raise SystemExit('code of others was run')")
    weights = {f"bert.{n}": w for n, w in load_file(bert / "model.safetensors").items() if "pooler" not in n}
    weights["cls_projection_head.dense_to_hidden.weight"] = torch.zeros(4, 32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = {
        "tokenizer_class": f"{name}Tokenizer",
        "auto_map": {"AutoTokenizer": [f"code_of.{name}Tokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def test_cxr_bert_is_read_without_its_code(bert, tmp_path):
    folder = with_own_code(bert, tmp_path / "cxr_bert", "CXRBert")
    encoder = load_text_encoder(str(folder))
    assert isinstance(encoder, HuggingFaceEncoder)
    assert torch.equal(encoder.encode(REPORTS), load_text_encoder(str(bert)).encode(REPORTS))
    encoder.save(tmp_path / "saved")
    assert load_text_encoder(str(tmp_path / "saved")).fingerprint == encoder.fingerprint
    assert TextTower(encoder.model, 1).width == 32  # it learns as BERT does


def test_code_of_others_is_never_run(bert, tmp_path):
    folder = with_own_code(bert, tmp_path / "stranger", "Stranger")
    with pytest.raises(ValueError, match="never executes; use an encoder that transformers knows"):
        load_text_encoder(str(folder))


def test_an_encoder_that_is_nowhere_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (str(tmp_path), str(tmp_path / "absent"), "nobody-at-all/no-such-model"):
        with pytest.raises(FileNotFoundError, match=r"hf download .* pass DIR, or use 'lsa'"):
            load_text_encoder(name)

"""A BERT of two layers and a WordPiece tokenizer with random weights, saved as a hub folder would be."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

MARKS = ("PAD", "UNK", "CLS", "SEP", "MASK")


def tiny_bert(words: int, *, positions: int = 64, dropout: float = 0.1) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(MARKS) + words,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=positions,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertModel(config)


def save_tiny_bert(folder: Path, words: Sequence[str], **options) -> Path:
    vocabulary = {word: i for i, word in enumerate([*(f"[{mark}]" for mark in MARKS), *words])}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{mark.lower()}_token": f"[{mark}]" for mark in MARKS}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    tiny_bert(len(words), **options).save_pretrained(folder)
    return folder

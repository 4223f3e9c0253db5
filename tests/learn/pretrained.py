"""Tiny pretrained models as the hub gives them: folders with a configuration, weights and a tokenizer."""
import json
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)
from transformers.utils import logging

from stream.core.features import COUNTERS
from stream.learn.graph import write_graph
from stream.learn.model import INPUT_NAMES, ShopperModel
from stream.learn.text.readers import OPENING, slot_words

SPECIAL = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
CORPUS = [f'{OPENING} {word}' for words in slot_words({}) for word in words] + ['now then silence']


def save_tiny(name: str, folder: Path, positions: int = 512, dropout: float = 0.1) -> Path:
    """A model of 2 layers that has learned nothing, with a small vocabulary of its own kind, saved into `folder`."""
    torch.manual_seed(7)
    tokenizer = {'bert': _word_pieces, 'distilbert': _word_pieces, 't5': _unigrams, 'gpt2': _byte_pairs}[name]()
    tokenizer.model_max_length = positions
    size = len(tokenizer)
    model = {
        'bert': lambda: BertForMaskedLM(BertConfig(
            vocab_size=size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=positions, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)),
        'distilbert': lambda: DistilBertForMaskedLM(DistilBertConfig(
            vocab_size=size, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=positions,
            dropout=dropout, attention_dropout=dropout)),
        't5': lambda: T5ForConditionalGeneration(T5Config(
            vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=dropout)),
        'gpt2': lambda: GPT2LMHeadModel(GPT2Config(
            vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=positions, bos_token_id=0, eos_token_id=0,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)),
    }[name]()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
    return folder


def _word_pieces() -> BertTokenizer:
    trained = BertTokenizer().backend_tokenizer     # for its normalizer
    trained.train_from_iterator(CORPUS, trainers.WordPieceTrainer(
        vocab_size=150, special_tokens=SPECIAL, show_progress=False))
    return BertTokenizer(vocab=trained.get_vocab())


def _byte_pairs() -> GPT2Tokenizer:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=350, special_tokens=['<|endoftext|>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    learned = json.loads(trained.to_str())['model']
    return GPT2Tokenizer(vocab=learned['vocab'], merges=[tuple(merge) for merge in learned['merges']])


def _unigrams() -> T5Tokenizer:
    trained = T5Tokenizer(extra_ids=0).backend_tokenizer
    trained.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=150, special_tokens=['<pad>', '</s>', '<unk>'], unk_token='<unk>', show_progress=False))
    return T5Tokenizer(vocab=[tuple(piece) for piece in json.loads(trained.to_str())['model']['vocab']], extra_ids=0)


def windows(filled: list[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Made-up categories and numbers of rows with so many slots, padded to `length`."""
    rng = np.random.default_rng([length, *filled])
    there = np.arange(length) < np.array(filled)[:, None]
    categories = rng.integers((1, 0, 0), (15, 4096, 1024), (len(filled), length, 3)) * there[:, :, None]
    rows = (len(filled), length)
    gaps, amounts = rng.exponential(5, rows) * there, rng.exponential(40, rows) * (rng.random(rows) < 0.5)
    ages = np.cumsum(gaps[:, ::-1], 1)[:, ::-1]         # oldest first
    hours = rng.uniform(-1, 1, (2, *rows))
    numbers = np.stack([np.log1p(amounts), np.log1p(gaps), np.log1p(ages), np.log(rng.integers(1, 9, rows)),
                        rng.integers(0, 102, rows) / 10, *hours], -1) * there[:, :, None]
    return torch.from_numpy(categories.astype(np.int32)), torch.from_numpy(numbers.astype(np.float32))


def export_graph(model: ShopperModel, path: Path) -> None:
    """A shopper model as one graph with any number of rows and slots."""
    parts = (*windows([8, 3], 8), torch.zeros(2, COUNTERS), torch.arange(2)[:, None])
    write_graph(model, {8: dict(zip(INPUT_NAMES, parts, strict=True))}, path)


def assert_same_scores(model: torch.nn.Module, path: Path, filled: list[int], length: int) -> None:
    """The graph gives torch's scores."""
    categories, numbers = windows(filled, length)
    rows = len(filled)
    counters = torch.rand((rows, COUNTERS), generator=torch.Generator().manual_seed(rows))
    parts = dict(zip(INPUT_NAMES, (categories, numbers, counters, torch.arange(rows)[:, None]), strict=True))
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    got = session.run(None, {name: part.numpy() for name, part in parts.items()})
    with torch.no_grad():
        wanted = model(*parts.values())
    for mine, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-5, atol=1e-5)

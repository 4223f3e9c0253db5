"""The models that are measured: each backbone under the same heads, with random weights, and full windows for them.

How fast a model is does not depend on what it has learned, so that nothing is loaded from anywhere. The backbones of
text have the sizes that `transformers` gives them by default, or tiny ones (`quick`); their tokenizer has one token for
each word, and windows of 64 slots fill the 512 that they take.
"""
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from stream.core.features import CATEGORY_BUCKETS, COUNTERS, ITEM_BUCKETS, SLOT_NUMBERS, SLOTS_MAX, TYPE_VOCABULARY
from stream.learn.backbones import EncoderOptions, EventsBackbone
from stream.learn.model import BINARY, INPUT_NAMES, ShopperModel
from stream.learn.text.readers import (
    OPENING,
    TEXT_BACKBONES,
    TOKENS_MAX,
    TextBackbone,
    slot_words,
    token_tables,
    untrained_reader,
)

BACKBONES = ('events', *TEXT_BACKBONES)
TIERS = 5
_QUICK = {
    'bert': {'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 32},
    'distilbert': {'dim': 16, 'n_layers': 2, 'n_heads': 2, 'hidden_dim': 32},
    't5': {'d_model': 16, 'd_kv': 8, 'd_ff': 32, 'num_layers': 2, 'num_heads': 2},
    'gpt2': {'n_embd': 16, 'n_layer': 2, 'n_head': 2},
}


def make_model(backbone: str, quick: bool) -> ShopperModel:
    """A shopper model with this backbone, that has learned nothing."""
    torch.manual_seed(7)
    if backbone == 'events':
        sizes = EncoderOptions(hidden=16, layers=1, heads=2, intermediate=32) if quick else EncoderOptions()
        return ShopperModel(EventsBackbone(sizes), TIERS).eval()
    reader = untrained_reader(backbone, _QUICK[backbone] if quick else {})
    tables = token_tables(_tokenizer(), slot_words({}))
    return ShopperModel(TextBackbone(backbone, reader, tables, {}, TOKENS_MAX), TIERS).eval()


def _tokenizer() -> PreTrainedTokenizerFast:
    texts = [OPENING, 'now then silence', *(word for words in slot_words({}) for word in words)]
    words = dict.fromkeys(word for text in texts for word in text.split())
    by_word = Tokenizer(models.WordLevel({word: place for place, word in enumerate(['[UNK]', *words])}, '[UNK]'))
    by_word.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=by_word, unk_token='[UNK]', pad_token='[UNK]')


def windows(rows: int) -> dict[str, Tensor]:
    """Full windows by input name, the same for the same number of rows."""
    draw = torch.Generator().manual_seed(rows)
    shape = (rows, SLOTS_MAX)
    types, items, categories = (torch.randint(1, top, shape, generator=draw, dtype=torch.int32)
                                for top in (TYPE_VOCABULARY, ITEM_BUCKETS, CATEGORY_BUCKETS))
    made = {'categories': torch.stack([types, items, categories], -1),
            'numbers': torch.rand((*shape, SLOT_NUMBERS), generator=draw),
            'counters': torch.rand((rows, COUNTERS), generator=draw), 'row_id': torch.arange(rows)[:, None]}
    assert tuple(made) == INPUT_NAMES
    return made


def labels(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """What came after, made up: binary [b, BINARY], tier [b], spend [b]."""
    draw = torch.Generator().manual_seed(rows)
    return (torch.randint(0, 2, (rows, BINARY), generator=draw).float(),
            torch.randint(0, TIERS, (rows,), generator=draw), 50 * torch.rand(rows, generator=draw))

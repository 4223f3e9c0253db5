"""Pretrained text models on windows written as text: BERT, DistilBERT, the encoder of T5, GPT-2.

    categories, numbers -> which words each slot has -> their token ids, packed -> the pretrained model -> one state

Serving sends the same tensors as to any other backbone, so the graph itself writes the text. Every word that a slot can
have is tokenised once, when the pretrained model is loaded, into tables that the graph looks up. The tables are
buffers: a checkpoint holds them, and needs no tokenizer. The text, oldest slot first, is

    history: {slot} {slot} .. {slot} {now}

    slot    {after 3 days} {add to cart} {category 17} {price 20} {3 lines} {rated 4}
            the time since the slot before, the type, the category, the amount in the configured currency, the lines of
            its basket, the rating: each only where there is any
    now     {now}, or {then 5 days silence}: the time from the newest slot to the time of the snapshot

with the tokenizer's special tokens around it. Numbers are rounded to the marks below. A category is called by its
bucket, or by its name where a catalogue gives one (catalogue.py). If the text is
longer than the model's input, the oldest slots are left out.

The state is the mean over all tokens without padding; for GPT-2, which reads from left to right, the last token's.

Sources: Devlin et al. (2018), arXiv 1810.04805; Sanh et al. (2019), arXiv 1910.01108; Raffel et al. (2019), arXiv
1910.10683; Radford et al. (2019), GPT-2; all from Hugging Face `transformers`.
"""
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, T5EncoderModel
from transformers.utils import logging

from stream.core.events import TYPE_NAMES
from stream.core.features import CATEGORY_BUCKETS, SLOT_NUMBER_NAMES
from stream.errors import UsageError
from stream.learn.model import Backbone

TextName = Literal['bert', 'distilbert', 't5', 'gpt2']
TEXT_BACKBONES: tuple[TextName, ...] = get_args(TextName)
ATTENTION = 'eager'         # what torch exports as plain operations
READER_OPTIONS: dict[str, dict[str, bool]] = {'bert': {'add_pooling_layer': False}}
TOKENS_MAX = 512            # of a model that has no bound of its own: T5 was pretrained on so many
OPENING = 'history:'
NAME_WORDS_MAX = 4          # of a category's name
_EMBEDDED_ROWS = 64
_GAP, _AGE, _AMOUNT, _LINES, _RATING = map(
    SLOT_NUMBER_NAMES.index, ('gap_days', 'age_days', 'amount', 'lines', 'rating'))

_DAYS = (1, 2, 3, 4, 5, 6, 7, 10, 14, 21, 30, 45, 60, 90, 120, 180, 365)
_PRICES = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000, 2000, 5000, 10000)
_LINE_COUNTS = (2, 3, 4, 5, 7, 10, 20, 50)
_RATINGS = tuple(range(11))


def _edges(least: float, marks: Sequence[int]) -> list[float]:
    """From where on a number is called by each mark: the nearest by ratio; nothing below `least`."""
    return [least, *(math.sqrt(lower * upper) for lower, upper in pairwise(marks))]


# As the features have them: spans in log(1 + days), amounts in log(1 + x), lines in log(lines), ratings plus 0.1.
_DAY_EDGES = torch.tensor([math.log1p(edge) for edge in _edges(0.5, _DAYS)])
_PRICE_EDGES = torch.tensor([math.log1p(edge) for edge in _edges(0.005, _PRICES)])
_LINE_EDGES = torch.tensor([math.log(edge) for edge in _edges(1.5, _LINE_COUNTS)])
_RATING_EDGES = torch.tensor([0.05, *(rating - 0.4 for rating in _RATINGS[1:])])


def _days(count: int) -> str:
    return '1 day' if count == 1 else f'{count} days'


_NOW_WORDS = ('now', *(f'then {_days(count)} silence' for count in _DAYS))


def slot_words(category_names: Mapping[int, str]) -> tuple[tuple[str, ...], ...]:
    """What a slot can have, in the order in which it is written: of each field its words by value, '' for none.

    category_names   of category buckets; the others are called by their number
    """
    named = {bucket: ' '.join(re.findall(r'\w+', name.lower())[:NAME_WORDS_MAX])
             for bucket, name in category_names.items()}
    return (
        ('', *(f'after {_days(count)}' for count in _DAYS)),
        ('', *(TYPE_NAMES[kind].replace('_', ' ') for kind in sorted(TYPE_NAMES))),
        ('', *(named.get(bucket) or f'category {bucket}' for bucket in range(1, CATEGORY_BUCKETS))),
        ('', *(f'price {price}' for price in _PRICES)),
        ('', *(f'{count} lines' for count in _LINE_COUNTS)),
        ('', *(f'rated {rating}' for rating in _RATINGS)),
    )


def slot_values(categories: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
    """Which of `slot_words` each slot has, int [b, l] of each field; padding has none."""
    return (_bucket(numbers[:, :, _GAP], _DAY_EDGES), categories[:, :, 0], categories[:, :, 2],
            _bucket(numbers[:, :, _AMOUNT], _PRICE_EDGES), _bucket(numbers[:, :, _LINES], _LINE_EDGES),
            _bucket(numbers[:, :, _RATING], _RATING_EDGES))


def now_value(categories: Tensor, numbers: Tensor) -> Tensor:
    """Which of the words for the time since the newest slot a row has, int64 [b]. A window without slots has 'now'."""
    filled = categories[:, :, 0] > 0
    return _bucket(torch.where(filled, numbers[:, :, _AGE], 99.0).amin(1) * filled.any(1), _DAY_EDGES)


def _bucket(values: Tensor, edges: Tensor) -> Tensor:
    return (values[..., None] >= edges.to(values.device)).sum(-1)


class TextBackbone(Backbone):
    """A pretrained model on the window's text.

    reader           the pretrained model; stream.learn.text.tuning puts what is tuned into it
    tables           token ids of what can be written, see `token_tables`
    category_names   of category buckets; the others are called by their number
    tokens_max       the longest text, special tokens included
    """

    opening: Tensor
    closing: Tensor
    tokens_now: Tensor

    def __init__(self, name: TextName, reader: PreTrainedModel, tables: Mapping[str, Tensor],
                 category_names: Mapping[int, str], tokens_max: int) -> None:
        super().__init__()
        self.name: TextName = name
        self.reader: Any = reader       # or peft's model around it
        self.width = reader.config.hidden_size
        self.tokens_max = tokens_max
        self.category_names = dict(category_names)
        self.words = slot_words(category_names)
        for table, ids in tables.items():
            self.register_buffer(table, ids)

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        """[b, width]"""
        return self.state(*self.tokens(categories, numbers))

    def tokens(self, categories: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids, int64 [b, t], and which of them are no padding, bool [b, t]; t is that of the longest row."""
        slots, now = self._looked_up(categories, numbers)
        rows = categories.shape[0]
        return _packed(torch.cat([self.opening.expand(rows, -1), slots.flatten(1), now,
                                  self.closing.expand(rows, -1)], 1))

    def state(self, ids: Tensor, real: Tensor) -> Tensor:
        """[b, width] from what `tokens` gives."""
        states = self.reader(input_ids=ids, attention_mask=real.long(), **self._how()).last_hidden_state    # [b, t, h]
        count = real.sum(1)                                                                         # [b], never 0
        if self.name == 'gpt2':
            return states.gather(1, (count - 1)[:, None, None].expand(-1, 1, self.width))[:, 0]
        return (states * real[:, :, None]).sum(1) / count[:, None]

    def written(self, categories: Tensor, numbers: Tensor) -> list[str]:
        """The text of each row as a person reads it: what the model sees, without the special tokens."""
        kept = (self._looked_up(categories, numbers)[0] >= 0).any(-1)                               # [b, l]
        values = torch.stack(slot_values(categories, numbers), -1)                                  # [b, l, fields]
        now = now_value(categories, numbers)
        texts = []
        for row in range(len(kept)):
            slots = [words[value] for slot in values[row, kept[row]].tolist()
                     for words, value in zip(self.words, slot, strict=True)]
            texts.append(' '.join(filter(None, [OPENING, *slots, _NOW_WORDS[int(now[row])]])))
        return texts

    def embed(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
        """The mean state of any texts, float [n, width], without gradients; cut at the model's longest input."""
        parts = []
        training = self.training
        self.eval()
        with torch.no_grad():
            for at in range(0, len(texts), _EMBEDDED_ROWS):
                some = tokenizer(list(texts[at:at + _EMBEDDED_ROWS]), truncation=True, max_length=self.tokens_max)
                width = max(1, *map(len, some['input_ids']))
                ids = torch.tensor([row + [-1] * (width - len(row)) for row in some['input_ids']])
                states = self.reader(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(), **self._how())
                real = (ids >= 0)[:, :, None]
                parts.append((states.last_hidden_state * real).sum(1) / real.sum(1).clamp(min=1))
        self.train(training)
        return torch.cat(parts)

    def _looked_up(self, categories: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids of the slots, int64 [b, l, w], and of the words for now, int64 [b, v]; -1 is no token.

        Of slots that find no room any more, the oldest ones, there is none.
        """
        slots = torch.cat([getattr(self, f'tokens_{field}')[value.long()]
                           for field, value in enumerate(slot_values(categories, numbers))], -1)
        now = self.tokens_now[now_value(categories, numbers)]
        lengths = (slots >= 0).sum(-1)                                                              # [b, l]
        room = self.tokens_max - len(self.opening) - len(self.closing) - (now >= 0).sum(1)          # [b]
        since = lengths.sum(1, keepdim=True) - lengths.cumsum(1) + lengths      # tokens of a slot and of all newer ones
        return torch.where((since <= room[:, None])[:, :, None], slots, -1), now

    def _how(self) -> dict:
        return {'use_cache': False} if self.name == 'gpt2' else {}


def token_tables(tokenizer: PreTrainedTokenizerBase, words: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """What the graph has to know of a tokenizer, int64.

    words             as from `slot_words`
    opening, closing  the tokens before the first slot and after the last word, special ones included
    tokens_0, ..      of each field of a slot the tokens by value, [values, the longest one's], -1 after shorter ones
    tokens_now        likewise of the words for now
    Errors            UsageError where a text's tokens are not those of its words.
    """
    def tokens(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=False, verbose=False)['input_ids']

    opening = tokens([OPENING])[0]
    around = tokenizer(OPENING)['input_ids']
    end = next(at for at in range(len(around)) if around[at:at + len(opening)] == opening) + len(opening)
    tables = {}
    for table, values in [*((f'tokens_{field}', values) for field, values in enumerate(words)),
                          ('tokens_now', _NOW_WORDS)]:
        # Within a text words follow a space, which many tokenizers keep as a part of the word.
        rows = [ids[len(opening):] for ids in tokens([f'{OPENING} {word}' if word else OPENING for word in values])]
        width = max(map(len, rows))
        tables[table] = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
    every = [word for values in (*words, _NOW_WORDS) for word in values if word]
    if tokens([' '.join([OPENING, *every])])[0] != [
            *opening, *torch.cat([table[table >= 0] for table in tables.values()]).tolist()]:
        raise UsageError('The tokenizer joins words across spaces.',
                         do='use a checkpoint with the tokenizer that it was published with.')
    return {'opening': torch.tensor(around[:end]), 'closing': torch.tensor(around[end:], dtype=torch.long)} | tables


def _packed(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's tokens moved to the front, in their order: ids, 0 where there is none, and where there is one.

    Here -1 stands for no token. Positions count tokens only, so that a row is the same whatever its neighbours hold.
    """
    real = ids >= 0
    count = real.sum(1)
    places = torch.where(real, real.long().cumsum(1) - 1, ids.shape[1])    # no token: to a column that is cut off
    packed = torch.zeros_like(torch.cat([ids, ids[:, :1]], 1)).scatter(1, places, ids)
    longest = count.amax()
    return packed[:, :longest], (torch.arange(ids.shape[1], device=ids.device) < count[:, None])[:, :longest]


def load_text_backbone(name: TextName, source: str, category_names: Mapping[int, str],
                       ) -> tuple[TextBackbone, PreTrainedTokenizerBase]:
    """A pretrained model and its tokenizer from a folder or from the hub.

    Errors   UsageError where there is none, or it is of another kind, or lacks weights.
    """
    try:
        with _quiet():
            kind = AutoConfig.from_pretrained(source).model_type
            if kind != name:
                raise UsageError(f'{source!r} holds a {kind}, not a {name}.',
                                 do='name the backbone that it holds, or another folder.')
            loader: Any = T5EncoderModel if name == 't5' else AutoModel     # the hints of from_pretrained lack options
            reader, found = loader.from_pretrained(
                source, attn_implementation=ATTENTION, dtype=torch.float32, output_loading_info=True,
                **READER_OPTIONS.get(name, {}))
            tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UsageError(f'No pretrained {name} can be loaded from {source!r}: {str(error).splitlines()[0]}',
                         do='name a folder that holds config.json, model.safetensors and tokenizer.json, or an id of '
                            'the hub while it can be reached.') from error
    if found['missing_keys']:
        raise UsageError(f'{source!r} lacks weights: {", ".join(sorted(found["missing_keys"])[:3])}, ..',
                         do='use a checkpoint of the whole model.')
    tokens_max = min(getattr(reader.config, 'max_position_embeddings', TOKENS_MAX), tokenizer.model_max_length)
    tables = token_tables(tokenizer, slot_words(category_names))
    return TextBackbone(name, reader, tables, category_names, tokens_max), tokenizer


def untrained_reader(name: str, config: Mapping[str, Any]) -> PreTrainedModel:
    """A model of that configuration whose weights are to come; `config` as from its `to_diff_dict`."""
    given: Any = AutoConfig.for_model(**{**config, 'model_type': name}, attn_implementation=ATTENTION)
    with _quiet():
        return (T5EncoderModel(given) if name == 't5' else
                AutoModel.from_config(given, dtype=torch.float32, **READER_OPTIONS.get(name, {})))


@contextmanager
def _quiet() -> Iterator[None]:
    """Load without a progress bar, and without the warning about weights that only pretraining needed."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()

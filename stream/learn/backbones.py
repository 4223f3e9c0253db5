"""Networks that read a window: slots in, one state per row out. A model (stream.learn.model) puts its heads on it.

`events`, the default, is a small encoder on event tokens. A slot is the sum of the embeddings of its type, item and
category, and of its numbers. A query comes last and attends to all slots. Slots see only earlier ones, so the state
after each slot can predict the next (stream.learn.pretrain). b rows, l slots, h units. The other backbones read the
window as text (stream.learn.text.readers).

Sources: Devlin et al. (2018), BERT, arXiv 1810.04805, from Hugging Face `transformers`, here with causal attention, as
in Radford et al. (2018). Kang, McAuley (2018), SASRec, arXiv 1808.09781, for causal attention over a shopper's events.
"""
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertLayer, eager_attention_forward

from stream.core.features import (
    CATEGORY_BUCKETS,
    ITEM_BUCKETS,
    SLOT_NUMBER_NAMES,
    SLOT_NUMBERS,
    SLOTS_MAX,
    TYPE_VOCABULARY,
)
from stream.errors import UsageError
from stream.learn.model import Backbone
from stream.learn.options import Count, NotNegative, Share
from stream.learn.text.catalogue import WithItems, bag_of_words, item_table, read_catalogue
from stream.learn.text.readers import (
    TEXT_BACKBONES,
    TextBackbone,
    TextName,
    load_text_backbone,
    untrained_reader,
)
from stream.learn.text.tuning import prefix_tokens, put_prefix, tune

_AMOUNT, _AGE = SLOT_NUMBER_NAMES.index('amount'), SLOT_NUMBER_NAMES.index('age_days')
_DECAY_DAYS = (3.0, 10.0, 30.0, 90.0)       # a slot's weight falls to 1/e in so many days
_TOTAL_DAYS = (1.0, *_DECAY_DAYS)
_TOTALS = 2 * len(_TOTAL_DAYS) * (TYPE_VOCABULARY - 1)      # of each type: how many slots, and how much money
_MONEY_SCALE = 0.25                         # the logarithm of money is about four times that of a count
_AGES = 3                                   # of the newest slot, of the oldest one, and how many there are
# Added to the attention's logits where a token must not look: e^-60 of a weight stays, which no float32 sum notices.
# With much less the weights are denormal numbers, which a CPU is slow at: -1e9 cost 40 % of all scoring.
_HIDE = -60.0


@dataclass(frozen=True)
class BackboneOptions:
    """The choice of a backbone.

    name           'events', or one of TEXT_BACKBONES, which are pretrained
    source         a pretrained model: its folder, or its Hugging Face id
    tuning         which of the pretrained weights to train: see stream.learn.text.tuning
    learning_rate  peak rate of those weights; None: the default of the tuning
    catalogue      an item catalogue's file (stream.learn.text.catalogue)
    """

    name: str = 'events'
    source: str = ''
    tuning: str = 'full'
    learning_rate: NotNegative | None = None
    catalogue: str | None = None


@dataclass(frozen=True)
class EncoderOptions:
    """Sizes: hidden units, encoder layers, attention heads, feed-forward units; dropout share.

    items   whether items have embeddings: 260,000 weights, which overfit a small recording
    """

    hidden: Count = 64
    layers: Count = 2
    heads: Count = 4
    intermediate: Count = 128
    dropout: Share = 0.2
    items: bool = False

    @property
    def sizes(self) -> dict[str, int | bool]:
        """The options on which the weights' shapes depend."""
        return {name: value for name, value in asdict(self).items() if name != 'dropout'}


def check_backbone(options: BackboneOptions, encoder: EncoderOptions) -> None:
    """Check the options without loading anything. Errors: UsageError where they contradict one another."""
    if options.name != 'events' and options.name not in TEXT_BACKBONES:
        raise UsageError(f'There is no backbone {options.name!r}.', do=f'use events, {", ".join(TEXT_BACKBONES)}.')
    if options.name != 'events' and not options.source:
        raise UsageError(f'The backbone {options.name} is pretrained.',
                         do='name its folder, or its Hugging Face id, with --pretrained.')
    if options.name == 'events' and (options.source or options.tuning != 'full'):
        raise UsageError('The backbone events is not pretrained: there is nothing to load or to keep.',
                         do='leave --pretrained and --tuning out, or use a --backbone that reads text.')
    if options.name == 'events' and encoder.hidden % encoder.heads:
        raise UsageError(f'{encoder.heads} attention heads cannot share {encoder.hidden} hidden units evenly.',
                         do=f'choose a multiple of {encoder.heads}.')


def make_backbone(options: BackboneOptions, encoder: EncoderOptions) -> Backbone:
    """A backbone ready for training. `encoder` applies to `events`.

    Errors   UsageError where options contradict one another, or there is no such model; InputError where the
             catalogue cannot be read.
    """
    check_backbone(options, encoder)
    catalogue = read_catalogue(Path(options.catalogue)) if options.catalogue else None
    if options.name in TEXT_BACKBONES:
        backbone, tokenizer = load_text_backbone(options.name, options.source,
                                                 catalogue.category_names() if catalogue else {})
        # Before tuning: the items' vectors come from the pretrained weights.
        table = item_table(catalogue, partial(backbone.embed, tokenizer)) if catalogue else None
        tune(backbone, options.tuning)
    else:
        backbone = EventsBackbone(encoder)
        table = item_table(catalogue, bag_of_words) if catalogue else None
    return backbone if table is None else WithItems(backbone, table)


@dataclass(frozen=True)
class Description:
    """A backbone without its weights: enough to build it again without its source and catalogue.

    encoder             sizes of that of events
    reader              configuration of a pretrained one, as `transformers` writes it
    tables              shapes of its token tables
    category_names      of category buckets, as it calls them
    tokens_max          the longest text, beside a prefix
    prefix_tokens       of prefix tuning
    catalogue_columns   of the table of items; 0: there is none
    """

    name: Literal['events'] | TextName
    encoder: EncoderOptions | None = None
    reader: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, tuple[int, ...]] = field(default_factory=dict)
    category_names: dict[int, str] = field(default_factory=dict)
    tokens_max: int = 0
    prefix_tokens: int = 0
    catalogue_columns: int = 0


def describe(backbone: Backbone) -> Description:
    """The description of a backbone. LoRA and IA3 must be merged first."""
    if isinstance(backbone, WithItems):
        return replace(describe(backbone.backbone), catalogue_columns=backbone.table.shape[1])
    if isinstance(backbone, TextBackbone):
        return Description(
            backbone.name, reader=backbone.reader.config.to_diff_dict(),
            tables={name: tuple(table.shape) for name, table in backbone.named_buffers(recurse=False)},
            category_names=backbone.category_names, tokens_max=backbone.tokens_max,
            prefix_tokens=prefix_tokens(backbone))
    assert isinstance(backbone, EventsBackbone)
    return Description('events', encoder=backbone.options)


def remake(description: Description) -> Backbone:
    """The backbone of a description, before its weights and tables are loaded.

    Errors   ValueError, or whatever `transformers` raises, where the description is wrong.
    """
    if description.name == 'events':
        if description.encoder is None:
            raise ValueError('the sizes of the encoder are missing')
        backbone = EventsBackbone(description.encoder)
    else:
        reader = untrained_reader(description.name, description.reader)
        tables = {name: torch.zeros(shape, dtype=torch.long) for name, shape in description.tables.items()}
        backbone = TextBackbone(description.name, reader, tables, description.category_names,
                                description.tokens_max + description.prefix_tokens)
        if description.prefix_tokens:
            put_prefix(backbone, description.prefix_tokens)
    columns = description.catalogue_columns
    return WithItems(backbone, torch.zeros(ITEM_BUCKETS, columns)) if columns else backbone


class EventsBackbone(Backbone):
    """The encoder on event tokens."""

    def __init__(self, options: EncoderOptions) -> None:
        super().__init__()
        self.options = options
        h = self.width = options.hidden
        self.type_embedding = nn.Embedding(TYPE_VOCABULARY, h)
        self.category_embedding = nn.Embedding(CATEGORY_BUCKETS, h)
        self.item_embedding = nn.Embedding(ITEM_BUCKETS, h) if options.items else None
        for embedding in filter(None, (self.type_embedding, self.category_embedding, self.item_embedding)):
            nn.init.normal_(embedding.weight, std=0.02)
        self.numbers = nn.Sequential(               # + decays, + how often the slot's item is in the window
            nn.Linear(SLOT_NUMBERS + len(_DECAY_DAYS) + 1, h), nn.GELU(), nn.Linear(h, h))
        self.query = nn.Parameter(torch.randn(h) * 0.1)     # the token that collects what the scores need
        self.query_totals = nn.Linear(_AGES + _TOTALS, h)
        self.masked = nn.Parameter(torch.randn(h) * 0.1)    # stands for a slot that pretraining hides
        self.encoder = BertModel(BertConfig(
            vocab_size=1, hidden_size=h, num_hidden_layers=options.layers, num_attention_heads=options.heads,
            intermediate_size=options.intermediate, max_position_embeddings=1 + SLOTS_MAX, type_vocab_size=1,
            hidden_dropout_prob=options.dropout, attention_probs_dropout_prob=options.dropout,
            attn_implementation='eager',        # pyright: ignore[reportCallIssue]  # among the **kwargs of the base class
        ), add_pooling_layer=False)
        # Its words are not used: slots come embedded.
        self.encoder.set_input_embeddings(None)     # pyright: ignore[reportArgumentType]

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        """The query's state, [b, h]. The last layer computes only the query, because nothing reads its other states."""
        states, hide = self._embedded(categories, numbers)
        *layers, last = self.encoder.encoder.layer
        for layer in layers:
            states = layer(states, hide)
        return _of_last_token(cast(BertLayer, last), states, hide)

    def states(self, categories: Tensor, numbers: Tensor, hidden: Tensor | None = None) -> Tensor:
        """States [b, l + 1, h], the query's last. `hidden` [b, l]: slots whose content is masked."""
        states, hide = self._embedded(categories, numbers, hidden)
        for layer in self.encoder.encoder.layer:
            states = layer(states, hide)
        return states

    def _embedded(self, categories: Tensor, numbers: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The first layer's input, [b, l + 1, h], and the attention mask to add to the logits, [b, 1, l + 1, l + 1]."""
        length = categories.shape[1]
        kind, item, category = categories.unbind(-1)                                # [b, l] each
        filled = kind > 0                                                           # [b, l]
        if hidden is not None:      # nor may a later slot say that it is the same item, or the totals what it is
            kind, item = kind.masked_fill(hidden, 0), item.masked_fill(hidden, 0)
        age_days = numbers[:, :, _AGE].exp() - 1                                    # [b, l]
        same = (item[:, :, None] == item[:, None, :]) & (item > 0)[:, None, :]      # [b, l, l]
        # How often a slot's item came before in the window.
        again = torch.log1p((same.tril().sum(-1) - 1).clamp(min=0).float())         # [b, l]
        decays = [torch.exp(-age_days / days) for days in _DECAY_DAYS]
        slots = (self.type_embedding(kind) + self.category_embedding(category)
                 + self.numbers(torch.cat([numbers, torch.stack([*decays, again], -1)], -1)))       # [b, l, h]
        if self.item_embedding is not None:
            slots = slots + self.item_embedding(item)
        if hidden is not None:
            slots = torch.where(hidden[:, :, None], self.masked, slots)
        newest = torch.where(filled, numbers[:, :, _AGE], 99.0).amin(1) * filled.any(1)
        oldest = torch.where(filled, numbers[:, :, _AGE], 0.0).amax(1)
        count = filled.sum(1)                                                       # [b]
        ages = torch.stack([newest, oldest, torch.log1p(count.float())], -1)        # [b, 3]
        query = self.query + self.query_totals(torch.cat([ages, _totals(kind, numbers, age_days)], -1))
        tokens = torch.cat([slots, query[:, None]], 1)                              # [b, l + 1, h]
        seen = torch.cat([filled, torch.ones_like(filled[:, :1])], 1)               # [b, l + 1]
        before = torch.ones(length + 1, length + 1, dtype=torch.bool, device=seen.device).tril()
        places = (count[:, None] - torch.arange(length, device=seen.device)) * filled       # newest slot 1
        places = torch.cat([places, torch.zeros_like(places[:, :1])], 1)            # padding and the query 0
        return (self.encoder.embeddings(inputs_embeds=tokens, position_ids=places),
                (~(before & seen[:, None, :])).float()[:, None] * _HIDE)


def _totals(kind: Tensor, numbers: Tensor, age_days: Tensor) -> Tensor:
    """Counts that attention, an average, cannot give: slots and money of each type, weighted by age, [b, _TOTALS]."""
    of_type = one_hot(kind.long(), TYPE_VOCABULARY)[:, :, 1:].float().transpose(1, 2)           # [b, types, l]
    amount = (numbers[:, :, _AMOUNT].exp() - 1)[:, None]                            # [b, 1, l]
    weights = torch.stack([torch.exp(-age_days / days) for days in _TOTAL_DAYS], -1)            # [b, l, decays]
    slots, money = torch.log1p(of_type @ weights), torch.log1p((of_type * amount) @ weights)    # [b, types, decays]
    return torch.cat([slots, money * _MONEY_SCALE], -1).flatten(1)


def _of_last_token(layer: BertLayer, states: Tensor, hide: Tensor) -> Tensor:
    """The layer's output for the last token alone, [b, h]: the last row of `layer(states, hide)`."""
    attention = layer.attention.self

    def heads(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2)     # [b, heads, n, units]

    last = states[:, -1:]
    mixed, _ = eager_attention_forward(
        attention, heads(attention.query(last)), heads(attention.key(states)), heads(attention.value(states)),
        hide[:, :, -1:], attention.scaling, attention.dropout.p if layer.training else 0.0)
    return layer.feed_forward_chunk(layer.attention.output(mixed.flatten(2), last))[:, 0]

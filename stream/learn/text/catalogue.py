"""An item catalogue: texts and vectors of the items, beside the events.

A catalogue is a file of JSON lines, or a Parquet file (.parquet), with the columns

    item_id     as in the events
    text        optional: a description of the item
    embedding   optional: a vector, of the same length for every item that has one
    category    optional: as in the events; text backbones then write the category's name

An item's vector is its embedding and the vector of its text, side by side. The text backbone embeds the text if there
is one, else the text becomes a hashed bag of words. Events carry an item's bucket, so the items of a bucket share the
mean of their vectors. `WithItems` adds the mean over the window's slots, through a linear layer, to a backbone's
state. It is added late, so that no backbone has to know of it.

Source: Weinberger et al. (2009), "Feature Hashing for Large Scale Multitask Learning", arXiv 0902.2206, for signed
hashing.
"""
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pyarrow
import torch
from pyarrow import compute, parquet
from torch import Tensor, nn

from stream.core.events import hash16, hash32
from stream.core.features import CATEGORY_BUCKETS, ITEM_BUCKETS, buckets
from stream.errors import InputError
from stream.learn.model import Backbone

WORD_COLUMNS = 256          # of the hashed bag of words


@dataclass(frozen=True)
class Catalogue:
    """The catalogue of I items.

    texts        '' where there is none
    embeddings   float32 [I, d], zeros where there is none; d is 0 where no item has any
    categories   '' where there is none
    """

    item_ids: list[str]
    texts: list[str]
    embeddings: np.ndarray
    categories: list[str]

    def __len__(self) -> int:
        return len(self.item_ids)

    def category_names(self) -> dict[int, str]:
        """Of category buckets; of those that share one, the first."""
        names: dict[int, str] = {}
        for category in filter(None, self.categories):
            names.setdefault(int(buckets(hash16(category), CATEGORY_BUCKETS)), category)
        return names


class _Row(msgspec.Struct):
    item_id: str
    text: str | None = None
    embedding: list[float] | None = None
    category: str | None = None


def read_catalogue(path: Path) -> Catalogue:
    """A catalogue from its file.

    Errors   InputError where there is none, or it does not hold the columns above.
    """
    try:
        rows = _parquet_rows(path) if path.suffix == '.parquet' else _lines(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f'The catalogue {path} cannot be read: {error}', do='name a file that is there.') from error
    except msgspec.MsgspecError as error:
        raise InputError(f'The catalogue {path} holds something else: {error}',
                         do='write item_id and text as text, embedding as a list of numbers.') from error
    widths = {len(row.embedding) for row in rows if row.embedding}
    if len(widths) > 1:
        raise InputError(f'The embeddings in {path} are of different lengths: {sorted(widths)[:5]}.',
                         do='write vectors of one model.')
    if not widths and not any(row.text for row in rows):
        raise InputError(f'The catalogue {path} has neither a text nor an embedding.', do='write one of the columns.')
    width = widths.pop() if widths else 0
    with np.errstate(over='ignore'):    # what is too large becomes infinite, and is refused as such
        embeddings = np.array([row.embedding or [0.0] * width for row in rows], np.float32).reshape(len(rows), width)
    if not np.isfinite(embeddings).all():
        raise InputError(f'The embeddings in {path} are not all finite.', do='leave such items out.')
    return Catalogue([row.item_id for row in rows], [row.text or '' for row in rows], embeddings,
                     [row.category or '' for row in rows])


def _lines(path: Path) -> list[_Row]:
    rows = []
    decode = msgspec.json.Decoder(_Row).decode
    with path.open('rb') as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    rows.append(decode(line))
            except msgspec.MsgspecError as error:
                raise InputError(f'Line {number} of the catalogue {path} is not an item: {error}',
                                 do='write one JSON object a line, with item_id, and text or embedding.') from error
    return rows


def _parquet_rows(path: Path) -> list[_Row]:
    with parquet.ParquetFile(path) as file:
        table = file.read([name for name in _Row.__struct_fields__ if name in file.schema_arrow.names])
    if 'item_id' in table.column_names:     # a shop's ids are often numbers; events have them as text
        place = table.column_names.index('item_id')
        table = table.set_column(place, 'item_id', compute.cast(table['item_id'], pyarrow.string()))
    return msgspec.convert(table.to_pylist(), list[_Row])


def item_table(catalogue: Catalogue, embed: Callable[[Sequence[str]], Tensor]) -> Tensor:
    """A vector for each item bucket, float32 [ITEM_BUCKETS, d]; zeros where no item falls.

    embed   texts to vectors, [n, d]
    """
    items = len(catalogue)
    embedded = np.flatnonzero(catalogue.embeddings.any(1))
    parts = [_spread(items, embedded, torch.from_numpy(catalogue.embeddings[embedded]))] if len(embedded) else []
    if any(catalogue.texts):
        told = np.flatnonzero(catalogue.texts)
        parts.append(_spread(items, told, embed([catalogue.texts[place] for place in told])))
    vectors = torch.cat(parts, 1)
    buckets = torch.tensor([item_bucket(item_id) for item_id in catalogue.item_ids])
    total = vectors.new_zeros(ITEM_BUCKETS, vectors.shape[1]).index_add(0, buckets, vectors)
    return total / torch.bincount(buckets, minlength=ITEM_BUCKETS).clamp(min=1)[:, None]


def item_bucket(item_id: str) -> int:
    """The bucket of an item in stream.core.features."""
    return int(buckets(hash32(item_id), ITEM_BUCKETS))


def bag_of_words(texts: Sequence[str]) -> Tensor:
    """Signed counts of hashed words, float32 [n, WORD_COLUMNS]."""
    counts = np.zeros((len(texts), WORD_COLUMNS), np.float32)
    for row, text in zip(counts, texts, strict=True):
        for word in re.findall(r'\w+', text.lower()):
            place = hash32(word)
            row[place % WORD_COLUMNS] += 1.0 if place & 1 << 31 else -1.0
    return torch.from_numpy(counts)


def _spread(items: int, places: np.ndarray, vectors: Tensor) -> Tensor:
    """The vectors at their places among so many items, the others 0, [items, d].

    Made even: around 0, with a mean square of 1. Vectors of a pretrained model mostly say that they are of that model.
    """
    centred = vectors - vectors.mean(0)
    even = centred / centred.square().mean().sqrt().clamp(min=1e-6)
    return even.new_zeros(items, vectors.shape[1]).index_copy(0, torch.from_numpy(places), even)


class WithItems(Backbone):
    """A backbone, with the catalogue's columns for the items of the window.

    table   float32 [ITEM_BUCKETS, d], a bucket that is all 0 is not known
    """

    table: Tensor
    known: Tensor

    def __init__(self, backbone: Backbone, table: Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        self.width = backbone.width
        self.register_buffer('table', table)
        self.register_buffer('known', (table != 0).any(1))
        self.linear = nn.Linear(table.shape[1], self.width)
        nn.init.zeros_(self.linear.weight)      # so that the start is the backbone's
        nn.init.zeros_(self.linear.bias)

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        """[b, width]"""
        items = categories[:, :, 1].long()                                          # [b, l]
        count = self.known[items].sum(1, keepdim=True)                              # [b, 1]
        return self.backbone(categories, numbers) + self.linear(self.table[items].sum(1) / count.clamp(min=1))

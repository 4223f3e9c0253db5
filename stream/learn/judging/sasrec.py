"""SASRec: causal self-attention over a user's items predicts the next one; a contender of the ranking.

    items so far -> embeddings + places -> blocks of attention and feed-forward -> state . embedding of each item

Sources: Kang, McAuley (2018), "Self-Attentive Sequential Recommendation", arXiv 1808.09781: sizes, blocks, shared
embeddings, dropout. It trains against one drawn item a place; here against NEGATIVES of them by cross-entropy, which
Klenitskiy and Vasilev (2023), arXiv 2309.07602, found to rank better. n users, l places, h units.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stream.learn.epochs import reproducible

NEGATIVES = 256


@dataclass(frozen=True)
class SasRecOptions:
    """Sizes of the paper, except for shorter sequences: `length` newest items of a user, cut anew in each pass."""

    hidden: int = 50
    blocks: int = 2
    length: int = 50
    dropout: float = 0.2
    epochs: int = 60
    patience: int = 5
    batch_users: int = 64
    learning_rate: float = 1e-3


class SasRec(nn.Module):
    """Item 0 is padding, at the left."""

    def __init__(self, items: int, options: SasRecOptions) -> None:
        super().__init__()
        h = options.hidden
        self.options = options
        self.items = nn.Embedding(items + 1, h, padding_idx=0)
        self.places = nn.Embedding(options.length, h)
        nn.init.normal_(self.items.weight, std=h**-0.5)
        nn.init.normal_(self.places.weight, std=0.02)
        self.dropout = nn.Dropout(options.dropout)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(
            h, 1, h, options.dropout, batch_first=True, norm_first=True) for _ in range(options.blocks))
        self.norm = nn.LayerNorm(h)

    def forward(self, items: Tensor) -> Tensor:
        """States [n, l, h] from int [n, l]; each has seen the items up to its own."""
        length = items.shape[1]
        states = self.dropout(self.items(items) * math.sqrt(self.options.hidden)
                              + self.places.weight[-length:])
        before = torch.ones(length, length, dtype=torch.bool).tril()
        # A place of padding sees itself, so that no row of the attention is empty.
        seen = before & ((items > 0)[:, None, :] | torch.eye(length, dtype=torch.bool))
        hidden = torch.where(seen, 0.0, -1e9)
        for block in self.blocks:
            states = block(states, src_mask=hidden)
        return self.norm(states)

    def score(self, sequences: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [n, items + 1]: how well each item continues each sequence."""
        self.eval()
        with torch.no_grad():
            rows = [_padded(part[-self.options.length:], self.options.length) for part in sequences]
            parts = [self(torch.from_numpy(np.stack(rows[at:at + 256])))[:, -1] @ self.items.weight.T
                     for at in range(0, len(rows), 256)]
        return torch.cat(parts).numpy()


def fit_sasrec(sequences: Sequence[np.ndarray], items: int, options: SasRecOptions, seed: int) -> SasRec:
    """Of sequences of items 1 to `items`; a seventh of them chooses the pass: the loss at their places."""
    with reproducible(seed):
        rng = np.random.default_rng(seed)
        usable = rng.permutation([place for place, part in enumerate(sequences) if len(part) > 1])
        held_out, train = usable[:len(usable) // 7], usable[len(usable) // 7:]
        model = SasRec(items, options)
        optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98))
        best, best_epoch, best_weights = math.inf, 0, model.state_dict()
        for epoch in range(options.epochs):
            model.train()
            for at in range(0, len(train), options.batch_users):
                optimizer.zero_grad()
                _loss(model, [sequences[place] for place in train[at:at + options.batch_users]], rng).backward()
                optimizer.step()
            rng.shuffle(train)
            model.eval()
            same = np.random.default_rng(seed)      # the same cuts and the same drawn items in each pass
            with torch.no_grad():
                loss = float(_loss(model, [sequences[place] for place in held_out], same))
            if loss < best:
                best, best_epoch = loss, epoch
                best_weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            elif epoch - best_epoch >= options.patience:
                break
        model.load_state_dict(best_weights)
        return model.eval()


def _loss(model: SasRec, sequences: Sequence[np.ndarray], rng: np.random.Generator) -> Tensor:
    """Cross-entropy of the next item against drawn ones, a mean over the places of all sequences."""
    length, items = model.options.length, model.items.num_embeddings - 1
    cuts = []
    for part in sequences:
        end = len(part) if len(part) <= length + 1 else int(rng.integers(length + 1, len(part) + 1))
        cuts.append(_padded(part[max(0, end - length - 1):end], length + 1))
    told = torch.from_numpy(np.stack(cuts))
    now, following = told[:, :-1], told[:, 1:]
    asked = (now > 0) & (following > 0)
    states, target = model(now)[asked], following[asked]                    # [p, h], [p]
    drawn = torch.from_numpy(rng.integers(1, items + 1, NEGATIVES))
    right = (states * model.items(target)).sum(-1, keepdim=True)
    others = (states @ model.items(drawn).T).masked_fill(drawn == target[:, None], -1e9)
    return cross_entropy(torch.cat([right, others], 1), torch.zeros(len(target), dtype=torch.long))


def _padded(part: np.ndarray, length: int) -> np.ndarray:
    row = np.zeros(length, np.int64)
    row[length - len(part):] = part
    return row

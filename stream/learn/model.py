"""The model: a small transformer over the window's slots beside a branch over the counters, added at the logit.

    categories, numbers -> slots + query -> encoder (BERT) -> query's state -> linear ---+
                                                                                         +-> 10 logits -> scores
    counters -> normalise -> linear + MLP -----------------------------------------------+

The mask is derived from the padding inside the graph, attention never crosses rows, and positions count from the newest
slot: a row's scores depend neither on its padding nor on its neighbours. The inputs are `stream.core.features.Batch`;
b rows, l slots, h hidden units.

Sources: Devlin et al. (2018), BERT, arXiv 1810.04805, from Hugging Face `transformers`. Wang, Liu, Miao (2019), "A Deep
Probabilistic Model for Customer Lifetime Value Prediction", arXiv 1912.07753, for the zero-inflated log-normal spend.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, softplus
from transformers import BertConfig, BertModel

from stream.core.features import (
    CATEGORY_BUCKETS,
    COUNTERS,
    ITEM_BUCKETS,
    SLOT_NUMBERS,
    SLOTS_MAX,
    TYPE_VOCABULARY,
)
from stream.learn.dataset import TIERS

INPUT_NAMES = ('categories', 'numbers', 'counters', 'row_id')
_LOGIT_SIZES = (1, 1, TIERS, 3)     # intent, churn, tier, spend (bought, mu, sigma)
_COUNTER_LIMIT = 6.0                # normalised counters are cut here: a user like nobody in training stays in range
_SIGMA_RANGE = (0.05, 3.0)
_HIDE = -1e9


@dataclass(frozen=True)
class ModelOptions:
    """Sizes: hidden units, encoder layers, attention heads, feed-forward units, counter MLP units; dropout share."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    intermediate: int = 128
    counter_hidden: int = 64
    dropout: float = 0.2


@dataclass(frozen=True)
class Logits:
    """What the scores are made of: intent, churn, bought, mu, sigma [b]; tier [b, TIERS]."""

    intent: Tensor
    churn: Tensor
    tier: Tensor
    bought: Tensor      # log-odds of any spend
    mu: Tensor          # of log spend, where there is any
    sigma: Tensor


class ShopperModel(nn.Module):
    """Batch in, scores out: see `forward`."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        h = options.hidden
        self.type_embedding = nn.Embedding(TYPE_VOCABULARY, h)
        self.item_embedding = nn.Embedding(ITEM_BUCKETS, h)
        self.category_embedding = nn.Embedding(CATEGORY_BUCKETS, h)
        for embedding in (self.type_embedding, self.item_embedding, self.category_embedding):
            nn.init.normal_(embedding.weight, std=0.02)
        self.numbers = nn.Linear(SLOT_NUMBERS + 1, h)       # + how often the slot's item is in the window
        self.query = nn.Parameter(torch.randn(h) * 0.1)     # the token that collects what the scores need
        self.masked = nn.Parameter(torch.randn(h) * 0.1)    # stands for a slot that pretraining hides
        self.encoder = BertModel(BertConfig(
            vocab_size=1, hidden_size=h, num_hidden_layers=options.layers, num_attention_heads=options.heads,
            intermediate_size=options.intermediate, max_position_embeddings=1 + SLOTS_MAX, type_vocab_size=1,
            hidden_dropout_prob=options.dropout, attention_probs_dropout_prob=options.dropout,
            attn_implementation='eager'), add_pooling_layer=False)
        self.encoder.set_input_embeddings(None)             # its words are not used: slots come embedded
        self.from_slots = nn.Linear(h, sum(_LOGIT_SIZES))
        self.from_counters = nn.Linear(COUNTERS, sum(_LOGIT_SIZES))
        self.counter_mlp = nn.Sequential(
            nn.Linear(COUNTERS, options.counter_hidden), nn.GELU(), nn.Dropout(options.dropout),
            nn.Linear(options.counter_hidden, sum(_LOGIT_SIZES)))
        for layer in (self.from_slots, self.from_counters, self.counter_mlp[-1]):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.register_buffer('counter_mean', torch.zeros(COUNTERS))
        self.register_buffer('counter_scale', torch.ones(COUNTERS))     # 1 / standard deviation
        self.register_buffer('log_spend_max', torch.tensor(0.0))
        self.register_buffer('log_spend_scale', torch.tensor(0.0))      # see stream.learn.train, 4 calibration

    def fit_averages(self, counters: Tensor, intent: Tensor, churn: Tensor, spend: Tensor, tier: Tensor) -> None:
        """Start from the training rows' averages: counters [n, COUNTERS], labels [n] as in `stream.learn.dataset`.

        Sets the normalisation, the bound of expected spend, and the biases, so that the first step already predicts the
        base rates. A counter that never changes in training is switched off: its weights learn nothing to rely on.
        """
        deviation = counters.std(0, unbiased=False)
        self.counter_mean.copy_(counters.mean(0))
        self.counter_scale.copy_(torch.where(deviation > 1e-6, 1 / deviation.clamp(min=1e-6), 0.0))
        self.log_spend_max.copy_(spend.max().log())
        log_spend = spend[spend > 0].log()
        shares = torch.stack([intent.mean(), churn.mean(), (spend > 0).float().mean()]).clamp(0.01, 0.99).logit()
        tiers = (torch.bincount(tier, minlength=TIERS) / len(tier)).clamp(min=0.01).log()
        spread = log_spend.std(unbiased=False).clamp(min=0.1).expm1().log()     # the inverse of softplus
        with torch.no_grad():
            self.from_counters.bias.copy_(torch.cat([
                shares[:2], tiers, shares[2:], torch.stack([log_spend.mean(), spread])]))

    def encode(self, categories: Tensor, numbers: Tensor, hidden: Tensor | None = None) -> Tensor:
        """States [b, 1 + l, h], the query's first. `hidden` [b, l]: slots whose content the encoder must not see."""
        b, length = categories.shape[:2]
        kind, item, category = categories.unbind(-1)                                # [b, l] each
        filled = kind > 0                                                           # [b, l]
        same = (item[:, :, None] == item[:, None, :]) & (item > 0)[:, None, :]      # [b, l, l]
        again = torch.log1p((same.sum(-1) - 1).clamp(min=0).float())                # [b, l] views of a wanted item
        slots = (self.type_embedding(kind) + self.item_embedding(item) + self.category_embedding(category)
                 + self.numbers(torch.cat([numbers, again[:, :, None]], -1)))       # [b, l, h]
        if hidden is not None:
            slots = torch.where(hidden[:, :, None], self.masked, slots)
        tokens = torch.cat([self.query.expand(b, 1, -1), slots], 1)                 # [b, 1 + l, h]
        seen = torch.cat([torch.ones_like(filled[:, :1]), filled], 1)               # [b, 1 + l]
        places = filled.sum(1, keepdim=True) - torch.arange(length, device=filled.device)   # newest slot 1
        places = torch.cat([torch.zeros_like(places[:, :1]), places * filled], 1)   # query and padding 0
        return self.encoder(
            inputs_embeds=tokens, position_ids=places,
            attention_mask=(~seen).float()[:, None, None, :] * _HIDE).last_hidden_state

    def logits(self, categories: Tensor, numbers: Tensor, counters: Tensor) -> Logits:
        """Both branches, added."""
        normal = ((counters - self.counter_mean) * self.counter_scale).clamp(-_COUNTER_LIMIT, _COUNTER_LIMIT)
        total = (self.from_slots(self.encode(categories, numbers)[:, 0])
                 + self.from_counters(normal) + self.counter_mlp(normal))           # [b, 10]
        intent, churn, tier, spend = total.split(_LOGIT_SIZES, -1)
        bought, mu, raw_sigma = spend.unbind(-1)
        return Logits(intent[:, 0], churn[:, 0], tier, bought, mu, softplus(raw_sigma).clamp(*_SIGMA_RANGE))

    def forward(
        self, categories: Tensor, numbers: Tensor, counters: Tensor, row_id: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A batch's scores, in the order of OUTPUT_NAMES: [b, 1], [b, TIERS], [b, 1], [b, 1], [b, 1].

        Units    probabilities; expected_spend in the configured currency over 90 days: the chance of any spend times
                 the log-normal's mean, calibrated, which is at most the largest spend of the training split.
        """
        out = self.logits(categories, numbers, counters)
        log_mean = torch.minimum(out.mu + out.sigma**2 / 2 + self.log_spend_scale, self.log_spend_max)
        spend = out.bought.sigmoid() * log_mean.exp()
        return (out.intent.sigmoid()[:, None], out.tier.softmax(-1), spend[:, None], out.churn.sigmoid()[:, None],
                row_id.clone())

    def slot_guesses(self, categories: Tensor, numbers: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of type [m, TYPE_VOCABULARY] and category bucket [m, CATEGORY_BUCKETS] of the m hidden slots."""
        states = self.encode(categories, numbers, hidden)[:, 1:][hidden]            # [m, h]
        return states @ self.type_embedding.weight.T, states @ self.category_embedding.weight.T


def losses(out: Logits, intent: Tensor, churn: Tensor, spend: Tensor, tier: Tensor) -> dict[str, Tensor]:
    """The mean loss of each task over a batch, in nats; labels as in `stream.learn.dataset`, [b] each.

    Spend is the negative log-likelihood of a zero-inflated log-normal, less the terms that the model cannot change.
    """
    positive = spend > 0
    z = (torch.where(positive, spend, 1.0).log() - out.mu) / out.sigma
    log_normal = torch.where(positive, out.sigma.log() + z**2 / 2, 0.0).mean()
    return {
        'intent': binary_cross_entropy_with_logits(out.intent, intent),
        'churn': binary_cross_entropy_with_logits(out.churn, churn),
        'tier': cross_entropy(out.tier, tier),
        'spend': binary_cross_entropy_with_logits(out.bought, positive.float()) + log_normal,
    }

"""Every format of a recorded file, by name. Each turns its rows into event JSON: the bytes that a producer would send.

    format           columns (any order, more are ignored)                     becomes
    events           one event JSON a line, or Parquet with its field names    itself
    retailrocket     timestamp visitorid event itemid transactionid            view, add_to_cart, purchase
    rees46           event_time event_type product_id category_id              view, add_to_cart, remove_from_cart,
                     category_code price user_id user_session                  purchase
    online-retail    InvoiceNo StockCode Quantity InvoiceDate UnitPrice        purchase; refund if InvoiceNo starts
                     CustomerID                                                with C
    cdnow            customer, yyyymmdd, CDs, dollars, separated by blanks     purchase
    tmall            user_id brand_id type visit_datetime                      click, purchase, favorite, add_to_cart
    kafka            records of the input topics (see topic_records)           as the worker would read them

Times without a zone are UTC. Only rows of `events` and `kafka` name a currency. If a data set has a known currency, its
format says which (`currency`).

The id of an event is part of the row in `events` and `kafka`. In the other formats it is made of three parts: the
format, the XXH3 of the row's bytes as 16 hex digits, and how often these bytes have been seen so far, from 1. Example:
`cdnow-0123456789abcdef-1`. So a file gives the same ids whatever the order of its rows, and a row that occurs twice is
two events.

Sources: Retailrocket recommender system dataset (Kaggle); REES46 eCommerce behavior data from multi category store;
UCI Online Retail; CDNOW master data of Fader and Hardie; Tmall (Alibaba big data competition 2014).
"""
from functools import partial
from pathlib import Path

from stream.replay.data_sets import DATA_SETS
from stream.replay.event_files import event_rows
from stream.replay.rows import Format, Occurrences, Rows, lines
from stream.replay.topic_records import Inputs


def kafka_format(inputs: Inputs) -> Format:
    """The format that `stream record` writes, for these input topics."""
    return Format('kafka', 'What stream record writes: records of the input topics.', partial(_record_rows, inputs),
                  inputs)


def _record_rows(inputs: Inputs, path: Path, _occurrences: Occurrences) -> Rows:
    yield from filter(inputs.holds, lines(path))


FORMATS: dict[str, Format] = {given.name: given for given in (
    Format('events', 'Event JSON, one per line (.jsonl, also .gz or .zst), or a .parquet file with the same fields.',
           event_rows),
    *DATA_SETS,
    kafka_format(Inputs()),
)}

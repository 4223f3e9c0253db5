"""The layout of a user's record, for compiled modules. An import of `stream.core.user` checks that it is the one of
`layout.py`."""
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t

cdef enum:
    TYPE_COUNT = 14


cdef packed struct Header:
    uint16_t format
    uint16_t events
    uint16_t days
    uint8_t alerting
    int8_t tier
    uint32_t outbox_bytes
    uint32_t generation
    int64_t step
    int64_t next_offset[2]
    uint32_t applied
    uint32_t duplicate
    uint32_t late
    int64_t first_seen_ms
    int64_t last_seen_ms
    uint32_t counts[TYPE_COUNT]
    double spend
    double refunds
    uint32_t orders
    uint32_t last_basket
    int64_t last_order_ms
    uint32_t gaps
    double gap_days
    double gap_days_squared
    int64_t due_ms
    uint8_t silence
    int32_t power_grid
    int64_t power_at_ms
    int64_t intent_at_ms
    int64_t churn_at_ms
    uint32_t decisions
    char decision_id[16]
    char model[8]
    char claims[32]


cdef packed struct Row:
    int64_t ts_ms
    uint32_t item
    uint32_t basket
    float amount
    uint16_t category
    uint8_t type
    uint8_t rating


cdef packed struct Day:
    uint16_t day
    uint16_t browses
    uint16_t carts
    uint16_t orders
    float spend

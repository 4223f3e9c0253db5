from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint32_t


cdef class User:
    cdef public str user_id
    cdef public uint32_t generation
    cdef public int64_t step
    cdef public uint32_t applied
    cdef public uint32_t duplicate
    cdef public uint32_t late
    cdef public int64_t first_seen_ms
    cdef public int64_t last_seen_ms
    cdef public double spend
    cdef public double refunds
    cdef public uint32_t orders
    cdef public uint32_t last_basket
    cdef public int64_t last_order_ms
    cdef public uint32_t gaps
    cdef public double gap_days
    cdef public double gap_days_squared
    cdef public int64_t due_ms
    cdef public int64_t stored_due_ms
    cdef public uint8_t silence
    cdef public uint8_t alerting
    cdef public int8_t tier
    cdef public int32_t power_grid
    cdef public int64_t power_at_ms
    cdef public int64_t intent_at_ms
    cdef public int64_t churn_at_ms
    cdef public uint32_t decisions
    cdef public bytes decision_id
    cdef public bytes model
    cdef public bytes claims
    cdef public bytearray days
    cdef public bytes outbox
    cdef public bytearray ids
    cdef public bytearray rows
    cdef Py_ssize_t _kept_bytes
    cdef int64_t _next_offset[2]
    cdef uint32_t _counts[14]


cdef class Change:
    cdef public bytes user_id
    cdef public bytes record
    cdef public int64_t due_before_ms
    cdef public int64_t due_ms
    cdef public bint new

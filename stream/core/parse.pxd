from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef class Event:
    cdef public str user_id
    cdef public str event_id
    cdef public uint64_t key
    cdef public int64_t ts_ms
    cdef public uint8_t type
    cdef public uint32_t item
    cdef public uint16_t category
    cdef public uint32_t basket
    cdef public double amount
    cdef public uint8_t rating
    cdef public uint8_t source
    cdef public int64_t offset

from libc.stdint cimport int64_t


cdef class Message:
    cdef readonly object kind
    cdef char id_hex[32]
    cdef readonly bytes key
    cdef readonly int64_t as_of_ms
    cdef readonly bytes value
    cdef readonly dict content

"""The memory of numpy arrays, for compiled modules.

A typed memoryview does the same, but it takes several times as long to get one, and a step of a few users needs thirty.

    cdef Buffers buffers
    buffers.count = 0
    try:
        array = numbers_of(&buffers, ...)
        ...                                 # valid until `release`
    finally:
        release(&buffers)
"""
from cpython.buffer cimport PyBUF_FORMAT, PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer

cdef enum:
    BUFFERS_MAX = 16


cdef struct Buffers:
    int count
    Py_buffer held[BUFFERS_MAX]


cdef inline void release(Buffers* buffers) noexcept:
    while buffers.count:
        buffers.count -= 1
        PyBuffer_Release(&buffers.held[buffers.count])


cdef inline Py_buffer* hold(Buffers* buffers, object array, int flags, int dimensions) except NULL:
    cdef Py_buffer* view = &buffers.held[buffers.count]
    if buffers.count == BUFFERS_MAX:
        raise AssertionError('too many arrays')
    PyObject_GetBuffer(array, view, PyBUF_STRIDES | flags)
    buffers.count += 1
    if view.ndim != dimensions:
        raise ValueError(f'an array of {view.ndim} dimensions, expected {dimensions}')
    return view


cdef inline Py_buffer* records_of(Buffers* buffers, object array, object dtype, Py_ssize_t size) except NULL:
    """A structured array [n] of this dtype. Its elements have `size` bytes and may lie anywhere."""
    cdef Py_buffer* view
    if array.dtype != dtype:
        raise TypeError(f'an array of {array.dtype}, expected {dtype}')
    view = hold(buffers, array, 0, 1)       # numpy would write a text about all fields if it were asked for the format
    if view.itemsize != size:
        raise TypeError(f'records of {view.itemsize} bytes, expected {size}')
    return view


cdef inline char code_of(const Py_buffer* view) noexcept:
    """The code of the elements' type as in Python's `struct`, in native byte order; 0 for any other. `q` is int64."""
    cdef const char* code = view.format
    if code[0] == b'=':     # numpy says so of an array that is not aligned
        code += 1
    if code[0] == 0 or code[1] != 0:
        return 0
    return b'q' if code[0] == b'l' and view.itemsize == 8 else code[0]


cdef inline Py_buffer* numbers_of(Buffers* buffers, object array, char code, int dimensions) except NULL:
    """An array of numbers of one type, with any strides."""
    cdef Py_buffer* view = hold(buffers, array, PyBUF_FORMAT, dimensions)
    if code_of(view) != code:
        raise TypeError(f'an array of {array.dtype}, expected {chr(code)}')
    return view


cdef inline void* filled_by(Buffers* buffers, object array, int dimensions) except NULL:
    """The memory of an array that numpy has just made, to be written."""
    return hold(buffers, array, PyBUF_WRITABLE, dimensions).buf

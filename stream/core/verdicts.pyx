# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""What follows from the model's answers, row by row: whether an answer is possible, its scores on the grid, and what
changes for the user. `stream.core.scores` and `stream.core.decide` say what the rules are.

This module is compiled because most steps have few users. For those, numpy's fixed cost per call would be nearly the
whole cost.
"""
cdef extern from *:
    const char* _SOURCE_HASH "SOURCE_HASH"

SOURCE_HASH = _SOURCE_HASH.decode()

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.buffer cimport PyBUF_FORMAT
from libc.math cimport INFINITY, fabs, rint
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memcmp, memcpy

from stream.core.buffers cimport Buffers, code_of, filled_by, hold, numbers_of, records_of, release
from stream.core.layout cimport Header

import numpy as np

from stream.core.layout import CHURN_RAISED, HEADER_DTYPE, INTENT_RAISED, NO_TIER
from stream.errors import ModelError

cdef enum:
    STEPS_PER_UNIT = 10000
    SPEND_STEPS_PER_UNIT = 100
    PADDING_ROW = -1

# `stream.core.scores` compares this with its own constants.
CONSTANTS = (STEPS_PER_UNIT, SPEND_STEPS_PER_UNIT, PADDING_ROW)

cdef double TIER_SUM_TOLERANCE = 1e-3
cdef int NONE = NO_TIER
cdef uint8_t INTENT = INTENT_RAISED, CHURN = CHURN_RAISED
cdef object zeros = np.zeros, array_equal = np.array_equal, as_array = np.asarray
cdef object BOOL = np.dtype(bool), INT64 = np.dtype(np.int64), FLOAT64 = np.dtype(np.float64)
cdef object HEADERS = HEADER_DTYPE


# ---- scores ---------------------------------------------------------------------------------------------------------

def judge(batches not None, outputs not None, Py_ssize_t rows):
    """The parts of `stream.core.scores.Scores`: see `stream.core.scores.collect`."""
    cdef Buffers made, held
    cdef uint8_t* usable
    cdef double* intent
    cdef double* power
    cdef double* churn
    cdef double* spend
    cdef double* tier
    cdef Py_ssize_t tiers = outputs[0].tier_probabilities.shape[1] if outputs else 1
    cdef Py_ssize_t at
    cdef int64_t row
    cdef Py_buffer* id_of
    cdef Py_buffer* intent_of
    cdef Py_buffer* churn_of
    cdef Py_buffer* spend_of
    cdef Py_buffer* tiers_of
    arrays = (zeros(rows, BOOL), zeros(rows, FLOAT64), zeros(rows, FLOAT64), zeros(rows, FLOAT64),
              zeros((rows, tiers), FLOAT64), zeros(rows, FLOAT64))
    made.count = held.count = 0
    try:
        usable = <uint8_t*> filled_by(&made, arrays[0], 1)
        intent = <double*> filled_by(&made, arrays[1], 1)
        churn = <double*> filled_by(&made, arrays[2], 1)
        power = <double*> filled_by(&made, arrays[3], 1)
        tier = <double*> filled_by(&made, arrays[4], 2)
        spend = <double*> filled_by(&made, arrays[5], 1)
        for batch, output in zip(batches, outputs, strict=True):
            id_of = numbers_of(&held, batch.row_id, b'q', 2)
            if not same_rows(&held, id_of, batch.row_id, output.row_id_out):
                raise ModelError('The model returned scores for other rows than the request had.',
                                 'check that the model passes row_id through, and that nothing reorders its batches.')
            intent_of = column_of(&held, output.purchase_intent, id_of.shape[0], 1)
            churn_of = column_of(&held, output.churn, id_of.shape[0], 1)
            spend_of = column_of(&held, output.expected_spend, id_of.shape[0], 1)
            tiers_of = column_of(&held, output.tier_probabilities, id_of.shape[0], tiers)
            for at in range(id_of.shape[0]):
                memcpy(&row, <const char*> id_of.buf + at * id_of.strides[0], sizeof(row))
                if row == PADDING_ROW:
                    continue
                if not 0 <= row < rows:
                    raise IndexError(f'row {row} of {rows}')
                usable[row] = judge_row(
                    number_at(intent_of, at, 0), number_at(churn_of, at, 0), number_at(spend_of, at, 0), tiers_of, at,
                    tiers, intent + row, churn + row, power + row, spend + row, tier + row * tiers)
            release(&held)
        return arrays
    finally:
        release(&held)
        release(&made)


cdef bint judge_row(double intent, double churn, double spend, const Py_buffer* tiers_of, Py_ssize_t at,
                    Py_ssize_t tiers, double* to_intent, double* to_churn, double* to_power, double* to_spend,
                    double* to_tiers) noexcept:
    """Write a row's scores. Returns whether they are possible; all scores are 0 if they are not."""
    cdef double total = 0.0, weighted = 0.0, probability
    cdef Py_ssize_t i
    # Comparisons with NaN are false, so a row with NaN is not possible.
    cdef bint possible = (0.0 <= intent and intent <= 1.0 and 0.0 <= churn and churn <= 1.0
                          and 0.0 <= spend and spend < INFINITY)
    for i in range(tiers):
        probability = number_at(tiers_of, at, i)
        possible = possible and 0.0 <= probability and probability <= 1.0
        total += probability
        weighted += probability * <double> i
        to_tiers[i] = on_grid(probability)
    if not (possible and fabs(total - 1.0) <= TIER_SUM_TOLERANCE):
        to_intent[0] = to_churn[0] = to_power[0] = to_spend[0] = 0.0
        for i in range(tiers):
            to_tiers[i] = 0.0
        return False
    weighted /= <double> (tiers - 1 if tiers > 1 else 1)
    to_intent[0], to_churn[0] = on_grid(intent), on_grid(churn)
    to_power[0] = on_grid(1.0 if weighted > 1.0 else weighted)
    to_spend[0] = rint(spend * SPEND_STEPS_PER_UNIT) / SPEND_STEPS_PER_UNIT
    return True


cdef inline double on_grid(double value) noexcept:
    return rint(value * STEPS_PER_UNIT) / STEPS_PER_UNIT


cdef bint same_rows(Buffers* held, const Py_buffer* asked, object row_id, object row_id_out) except -1:
    """Whether the ids are equal. Ids of another type are left to numpy."""
    cdef Py_buffer* answered
    cdef int64_t one, other
    cdef Py_ssize_t at
    if row_id_out.ndim != 2 or row_id_out.dtype != row_id.dtype:
        return array_equal(row_id, row_id_out)
    answered = numbers_of(held, row_id_out, b'q', 2)
    if asked.shape[0] != answered.shape[0] or asked.shape[1] != 1 or answered.shape[1] != 1:
        return False
    for at in range(asked.shape[0]):
        memcpy(&one, <const char*> asked.buf + at * asked.strides[0], sizeof(one))
        memcpy(&other, <const char*> answered.buf + at * answered.strides[0], sizeof(other))
        if one != other:
            return False
    return True


cdef Py_buffer* column_of(Buffers* held, object part, Py_ssize_t rows, Py_ssize_t width) except NULL:
    """An output of float32 or float64. Errors: ModelError for another shape."""
    cdef Py_buffer* view
    cdef char code
    if part.ndim != 2:
        raise misshapen(part, rows, width)
    view = hold(held, part, PyBUF_FORMAT, 2)
    if view.shape[0] != rows or view.shape[1] != width:
        raise misshapen(part, rows, width)
    code = code_of(view)
    if code != b'f' and code != b'd':
        view = numbers_of(held, as_array(part, FLOAT64), b'd', 2)
    return view


cdef misshapen(part, Py_ssize_t rows, Py_ssize_t width):
    return ModelError(f'The model returned an output of shape {part.shape}, expected {(rows, width)}.',
                      'serve the model that this version was exported for.')


cdef inline double number_at(const Py_buffer* array, Py_ssize_t row, Py_ssize_t column) noexcept:
    cdef const char* at = <const char*> array.buf + row * array.strides[0] + column * array.strides[1]
    cdef float single
    cdef double number
    if array.itemsize == sizeof(single):
        memcpy(&single, at, sizeof(single))     # an answer from the network need not be aligned
        return <double> single
    memcpy(&number, at, sizeof(number))
    return number


# ---- decisions ------------------------------------------------------------------------------------------------------

def changes(headers not None, as_of_ms not None, scores not None, policy not None, bytes model not None):
    """The decisions of `stream.core.decide.decide`, in order, as (row, kind, occasion, tier, previous tier).

    kind   0 power, 1 intent, 2 churn
    """
    cdef Buffers held
    cdef Py_buffer* header_of
    cdef Py_buffer* moment_of
    cdef Py_buffer* usable_of
    cdef Py_buffer* intent_of
    cdef Py_buffer* power_of
    cdef Py_buffer* churn_of
    cdef Py_buffer* tiers_of
    cdef const Header* header
    cdef Py_ssize_t rows, row, tiers
    cdef int64_t moment_ms, events_min = policy.tier_events_min, orders_min = policy.churn_orders_min
    cdef int64_t power_cooldown_ms = policy.power_cooldown_ms, intent_cooldown_ms = policy.intent_cooldown_ms
    cdef int64_t churn_cooldown_ms = policy.churn_cooldown_ms
    cdef double intent_raise = policy.intent_raise, intent_clear = policy.intent_clear, score
    cdef double churn_raise = policy.churn_raise, churn_clear = policy.churn_clear
    # Compare in whole grid steps: the difference of two floats may fall just short of a threshold that it meets.
    cdef double beyond_min = round((0.5 + policy.tier_margin) * STEPS_PER_UNIT)
    cdef double move_min = round(policy.power_move_min * STEPS_PER_UNIT)
    cdef int median, tier, at
    cdef bint first, remodelled
    cdef list found = []
    held.count = 0
    if as_of_ms.dtype != INT64:
        as_of_ms = as_of_ms.astype(INT64)
    try:
        header_of = records_of(&held, headers, HEADERS, sizeof(Header))
        moment_of = numbers_of(&held, as_of_ms, b'q', 1)
        usable_of = numbers_of(&held, scores.usable, b'?', 1)
        intent_of = numbers_of(&held, scores.intent, b'd', 1)
        churn_of = numbers_of(&held, scores.churn, b'd', 1)
        power_of = numbers_of(&held, scores.power, b'd', 1)
        tiers_of = numbers_of(&held, scores.tiers, b'd', 2)
        rows, tiers = usable_of.shape[0], tiers_of.shape[1]
        for at in range(held.count):
            if held.held[at].shape[0] != rows:
                raise ValueError(f'an array of {held.held[at].shape[0]} rows, for {rows} users')
        if not 1 <= tiers <= 127:
            raise ValueError(f'{tiers} tiers')
        if PyBytes_GET_SIZE(model) != sizeof(header.model):
            raise ValueError(f'a model is named by {sizeof(header.model)} bytes, not by {model!r}')
        for row in range(rows):
            if not (<const uint8_t*> usable_of.buf)[row * usable_of.strides[0]]:
                continue
            header = <const Header*> (<const char*> header_of.buf + row * header_of.strides[0])
            memcpy(&moment_ms, <const char*> moment_of.buf + row * moment_of.strides[0], sizeof(moment_ms))

            tier = header.tier
            median = median_of(tiers_of, row, tiers)
            first = tier == NONE and header.applied >= events_min
            remodelled = tier != NONE and memcmp(header.model, PyBytes_AS_STRING(model), sizeof(header.model)) != 0
            if first or remodelled or (
                    0 <= tier < tiers and median != tier
                    and beyond(tiers_of, row, tiers, tier, median) >= beyond_min
                    and fabs(rint(score_at(power_of, row) * STEPS_PER_UNIT) - header.power_grid) >= move_min
                    and cooled(header.power_at_ms, moment_ms, power_cooldown_ms)):
                found.append((row, 0, None if remodelled else 'power_first' if first
                              else 'power_up' if median > tier else 'power_down', median, tier))
                tier = median           # the alerts name the tier that this step sets

            score = score_at(intent_of, row)
            if header.alerting & INTENT:
                if score <= intent_clear:
                    found.append((row, 1, None, tier, tier))
            elif score >= intent_raise and cooled(header.intent_at_ms, moment_ms, intent_cooldown_ms):
                found.append((row, 1, 'intent', tier, tier))

            score = score_at(churn_of, row)
            if header.alerting & CHURN:
                if score <= churn_clear:
                    found.append((row, 2, 'churn_cleared', tier, tier))
            elif (score >= churn_raise and header.orders >= orders_min
                    and cooled(header.churn_at_ms, moment_ms, churn_cooldown_ms)):
                found.append((row, 2, 'churn_raised', tier, tier))
        return found
    finally:
        release(&held)


cdef inline double score_at(const Py_buffer* scores, Py_ssize_t row) noexcept:
    cdef double score
    memcpy(&score, <const char*> scores.buf + row * scores.strides[0], sizeof(score))
    return score


cdef double below(const Py_buffer* tiers_of, Py_ssize_t row, int tier) noexcept:
    """The probability at or below a tier, in grid steps."""
    cdef double total = 0.0
    cdef int i
    for i in range(tier + 1):
        total += number_at(tiers_of, row, i)
    return rint(total * STEPS_PER_UNIT)


cdef int median_of(const Py_buffer* tiers_of, Py_ssize_t row, Py_ssize_t tiers) noexcept:
    """The lowest tier at or below which half of the probability lies; the highest one if rounding leaves less."""
    cdef double total = 0.0
    cdef int i
    for i in range(<int> tiers - 1):
        total += number_at(tiers_of, row, i)
        if rint(total * STEPS_PER_UNIT) >= STEPS_PER_UNIT / 2:
            return i
    return <int> tiers - 1


cdef double beyond(const Py_buffer* tiers_of, Py_ssize_t row, Py_ssize_t tiers, int tier, int median) noexcept:
    """The probability above the published tier if the median is above it, otherwise below it, in grid steps."""
    if median > tier:
        return below(tiers_of, row, <int> tiers - 1) - below(tiers_of, row, tier)
    return below(tiers_of, row, tier - 1)


cdef inline bint cooled(int64_t at_ms, int64_t as_of_ms, int64_t cooldown_ms) noexcept:
    # Unsigned, because the times of a damaged record may be too far apart for 64 bits.
    return at_ms == 0 or <int64_t> (<uint64_t> as_of_ms - <uint64_t> at_ms) >= cooldown_ms

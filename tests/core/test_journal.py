import json
from typing import Any

import msgspec
import pytest

from stream.core.decide import ActionRule, Policy
from stream.core.events import EventRules, Source
from stream.core.journal import (
    Entry,
    EventsEntry,
    Kept,
    RecoveredEntry,
    TimersEntry,
    decode_entry,
    encode_entry,
    rules_digest,
    steps_of,
)
from stream.core.layout import WindowLimits
from stream.core.rules import StepRules
from stream.errors import InputError

MODEL, RULES = '9c' * 32, '5d' * 8


def events(step: int, start: int = 0, stop: int = 10) -> EventsEntry:
    return EventsEntry(3, step, Source.CARTS, start, stop, MODEL, RULES)


def timers(step: int, *users: str) -> TimersEntry:
    return TimersEntry(3, step, list(users), MODEL, RULES)


def recovered(step: int, *users: str) -> RecoveredEntry:
    """The entry of an owner that found these users of step `step`, or all of its users."""
    return RecoveredEntry(3, step, list(users) or None)


def test_entries_are_json_of_a_known_form():
    assert encode_entry(events(17, 4800, 5000)) == (
        b'{"kind":"events","lane":3,"step":17,"source":1,"start":4800,"stop":5000,"model":"' + MODEL.encode()
        + b'","rules":"' + RULES.encode() + b'"}')
    assert encode_entry(timers(21, 'u1', 'é"')) == (
        b'{"kind":"timers","lane":3,"step":21,"users":["u1","\xc3\xa9\\""],"model":"' + MODEL.encode()
        + b'","rules":"' + RULES.encode() + b'"}')
    assert encode_entry(recovered(20, 'u4')) == b'{"kind":"recovered","lane":3,"step":20,"users":["u4"]}'
    assert encode_entry(recovered(0)) == b'{"kind":"recovered","lane":3,"step":0,"users":null}'


@pytest.mark.parametrize('entry', [events(1), timers(5, 'a', 'b'), recovered(0), recovered(7, 'a')])
def test_an_entry_comes_back_and_a_field_of_a_later_version_is_ignored(entry: Entry):
    assert decode_entry(encode_entry(entry)) == entry
    assert decode_entry(encode_entry(entry)[:-1] + b',"later":[1,2]}') == entry


def test_an_entry_that_is_cut_or_wrong_is_refused():
    whole = encode_entry(events(1))
    for end in range(len(whole)):
        with pytest.raises(InputError, match=r'Do: .*journal_topic'):
            decode_entry(whole[:end])
    good = json.loads(whole)
    for wrong in ({'kind': 'naps'}, {'step': 0}, {'step': '1'}, {'lane': -1}, {'source': 2}, {'start': -1},
                  {'stop': 1.5}, {'model': None}):
        with pytest.raises(InputError):
            decode_entry(json.dumps(good | wrong).encode())
    for junk in (whole + b'x', b'\xff' + whole, b'[' * 100_000, b'{"event_id":"e1"}'):
        with pytest.raises(InputError):
            decode_entry(junk)


#   steps     1  2  3  4  5  6
#   first     [E1...][T4][E5..      the owner was killed in step 5, when only `a` was written
#   second                   [E6
def test_what_a_killed_owner_left_undone_is_cut():
    first = [events(1), timers(4, 'a'), events(5, 10, 20)]
    entries = [*first, recovered(5, 'a'), events(6, 10, 30)]
    kept = Kept(5, frozenset('a'))
    assert list(steps_of(entries)) == [(entry, kept) for entry in first] + [(events(6, 10, 30), None)]


def test_entries_that_never_happened_are_not_given():
    entries = [events(1), events(3), timers(5, 'a'), recovered(2, 'b'), timers(3, 'c')]
    assert list(steps_of(entries)) == [(events(1), Kept(2, frozenset('b'))), (timers(3, 'c'), None)]


def test_an_owner_that_found_nothing_begins_anew():
    assert list(steps_of([recovered(0), events(1), recovered(0), events(1)])) == [(events(1), None)]


def test_a_clean_restart_cuts_what_was_only_announced():
    entries = [events(1), timers(2, 'a'), events(3), recovered(2), events(3)]
    assert list(steps_of(entries)) == [(events(1), Kept(2, None)), (timers(2, 'a'), Kept(2, None)), (events(3), None)]


def test_an_owner_who_came_to_nothing_forgets_nothing_of_what_was_cut():
    for second in (recovered(2, 'a'), recovered(2)):
        assert list(steps_of([timers(2, 'a', 'b'), recovered(2, 'a'), second, events(3)])) == [
            (timers(2, 'a', 'b'), Kept(2, frozenset('a'))), (events(3), None)]


def test_a_step_that_was_not_found_stays_undone_when_its_number_comes_again():
    # The first step 6 had no effect. The next owner did another step 6, of which `a` was found.
    entries = [timers(5, 'b'), timers(6, 'a', 'b'), recovered(5), timers(6, 'a', 'c'), recovered(6, 'a'), events(7)]
    assert list(steps_of(entries)) == [
        (timers(5, 'b'), Kept(5, None)), (timers(6, 'a', 'c'), Kept(6, frozenset('a'))), (events(7), None)]


def test_of_a_step_of_which_nobody_was_found_nobody_is_kept():
    nobody = RecoveredEntry(3, 2, [])
    assert list(steps_of([events(1), timers(2, 'a'), nobody])) == [
        (events(1), Kept(2, frozenset())), (timers(2, 'a'), Kept(2, frozenset()))]


def test_a_run_of_both_inputs_is_given_as_one():
    clicks, carts = EventsEntry(3, 4, 0, 0, 7, MODEL, RULES), EventsEntry(3, 4, 1, 2, 9, MODEL, RULES)
    assert list(steps_of([events(1), clicks, carts, recovered(4)])) == [
        (entry, Kept(4, None)) for entry in (events(1), clicks, carts)]
    assert list(steps_of([events(1), clicks, carts, recovered(3)])) == [(events(1), Kept(3, None))]


def test_state_that_went_back_takes_earlier_owners_with_it():
    entries = [events(1), recovered(5, 'a'), events(6), recovered(3, 'b'), events(4)]
    assert list(steps_of(entries)) == [(events(1), Kept(3, frozenset('b'))), (events(4), None)]


def test_an_entry_in_parts_is_one():
    entries = [events(1), recovered(2, 'a'), recovered(2, 'b')]
    assert list(steps_of(entries)) == [(events(1), Kept(2, frozenset('ab')))]


def test_the_digest_of_the_rules_is_pinned():
    # Stored journals contain this digest. If it changes, none of them can be replayed.
    assert rules_digest(EventRules(), StepRules()) == 'd271d33b7117952b'


def test_every_rule_is_in_the_digest():
    def changed(struct: Any, name: str) -> Any:
        return msgspec.structs.replace(struct, **{name: {
            'currency': 'USD', 'rates': {'USD': 0.9}, 'silence_ms': (1,),
            'actions': (ActionRule('intent', 'coupon'),)}.get(name, 0.123)})

    events, steps = EventRules(), StepRules()
    digests = [rules_digest(events, steps), rules_digest(events, StepRules(publish='all')),
               rules_digest(events, StepRules(reasons_rows_max=2047))]
    digests += [rules_digest(changed(events, name), steps) for name in EventRules.__struct_fields__]
    digests += [rules_digest(events, StepRules(limits=changed(steps.limits, name)))
                for name in WindowLimits.__struct_fields__]
    digests += [rules_digest(events, StepRules(policy=changed(steps.policy, name)))
                for name in Policy.__struct_fields__]
    assert StepRules.__struct_fields__ == ('limits', 'policy', 'publish', 'reasons_rows_max')   # none is forgotten here
    assert len(set(digests)) == len(digests)


def test_the_order_in_which_rates_were_given_is_no_rule():
    one, two = (rules_digest(EventRules(rates={first: 0.5, second: 0.5}), StepRules())
                for first, second in (('USD', 'CHF'), ('CHF', 'USD')))
    assert one == two

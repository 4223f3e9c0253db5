import re

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from stream.core.events import Reason
from stream.core.layout import Fold
from stream.metrics import STAGES, Metrics

UNITS = ('_seconds', '_bytes', '_records', '_events', '_partitions', '_blocks', '_rows')
UNITLESS = {'stream_users', 'stream_scorer_holding', 'stream_scorer_breaker'}


def samples(metrics: Metrics) -> dict[str, float]:
    """What Prometheus would read: `name{label="value"}` to value, of the worker's own metrics."""
    text, _ = metrics.exposition()
    return {sample.name + ('{' + ','.join(f'{name}="{value}"' for name, value in sorted(sample.labels.items())) + '}'
                           if sample.labels else ''): sample.value
            for family in text_string_to_metric_families(text.decode()) for sample in family.samples
            if sample.name.startswith('stream_')}


def test_names_and_helps_follow_the_conventions():
    families = [family for family in Metrics().registry.collect() if not family.name.startswith('process_')]
    assert len(families) > 25
    for family in families:
        assert re.fullmatch('stream_[a-z_]+', family.name)
        assert family.documentation.endswith('.'), family.name
        if family.type == 'counter':        # the library takes `_total` off the family's name, and puts it on samples
            assert not family.name.endswith('_total')
        elif family.type != 'info' and family.name not in UNITLESS:
            assert family.name.endswith(UNITS), family.name


def test_memory_and_handles_of_the_process_are_among_them():
    text, _ = Metrics().exposition()
    assert b'process_resident_memory_bytes' in text
    assert b'process_open_fds' in text


def test_two_workers_of_one_process_have_metrics_of_their_own():
    one, two = Metrics(), Metrics(CollectorRegistry())
    one.events_read.inc(5)
    assert samples(one)['stream_events_read_total'] == 5
    assert samples(two)['stream_events_read_total'] == 0


def test_a_step_adds_up_by_what_became_of_its_events():
    metrics = Metrics()
    counts = [0] * len(Fold)
    counts[Fold.APPLIED], counts[Fold.DUPLICATE], counts[Fold.LATE], counts[Fold.SEEN] = 5, 3, 2, 1
    metrics.folded([counts])
    metrics.folded([counts])
    seen = samples(metrics)
    assert [seen[f'stream_events_{what}_total'] for what in ('applied', 'duplicate', 'late', 'redelivered')] == [
        10, 6, 4, 2]


def test_every_reason_and_stage_is_there_before_it_happens():
    seen = samples(Metrics())
    assert {f'stream_dead_letters_total{{reason="{reason}"}}' for reason in Reason} <= seen.keys()
    assert {f'stream_stage_seconds_count{{stage="{stage}"}}' for stage in STAGES} <= seen.keys()
    assert seen['stream_messages_total{type="churn.alert"}'] == 0


def test_a_stage_that_does_not_exist_is_a_defect():
    metrics = Metrics()
    metrics.stage('changelog', .02)
    assert samples(metrics)['stream_stage_seconds_bucket{le="0.025",stage="changelog"}'] == 1
    with pytest.raises(KeyError):
        metrics.stage('lunch', 1.0)     # pyright: ignore[reportArgumentType]


def test_the_series_of_a_revoked_partition_go_and_the_others_stay():
    metrics = Metrics()
    for partition in (1, 11):
        for topic in ('clicks', 'carts'):
            metrics.lag.labels(topic, partition).set(7)
        for gauge in (metrics.lane_clock_seconds, metrics.users, metrics.recovery_left, metrics.standby_lag):
            gauge.labels(partition).set(1)
    metrics.revoked(('clicks', 'carts'), 1)
    metrics.revoked(('clicks', 'carts'), 2)         # never assigned
    seen = samples(metrics)
    assert not [name for name in seen if 'partition="1"' in name]
    assert len([name for name in seen if 'partition="11"' in name]) == 6


def test_the_breaker_is_in_one_state_at_a_time():
    metrics = Metrics()
    metrics.scorer_breaker.state('open')
    seen = samples(metrics)
    assert [seen[f'stream_scorer_breaker{{stream_scorer_breaker="{state}"}}']
            for state in ('closed', 'half_open', 'open')] == [0, 0, 1]


def test_the_build_names_the_model():
    metrics = Metrics()
    metrics.built('0.1.0', 'shopper', '1', 'ab' * 32)
    assert samples(metrics)[
        f'stream_build_info{{model="shopper",model_version="1",sha256="{"ab" * 32}",version="0.1.0"}}'] == 1


def test_whoever_asks_for_openmetrics_gets_it():
    text, content_type = Metrics().exposition('application/openmetrics-text; version=1.0.0')
    assert content_type.startswith('application/openmetrics-text')
    assert text.endswith(b'# EOF\n')
    assert Metrics().exposition()[1].startswith('text/plain')


def test_no_label_can_hold_a_user():
    labels = {label for metric in vars(Metrics()).values() for label in getattr(metric, '_labelnames', ())}
    assert labels == {'reason', 'type', 'stage', 'partition', 'topic'}

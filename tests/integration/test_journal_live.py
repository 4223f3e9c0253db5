"""A worker's journal, recorded with its inputs and replayed: the same outputs, although it was killed in between."""
import json
from pathlib import Path

from typer.testing import CliRunner

from deploy.local.parts import Kafka
from stream.cli.main import app
from stream.simulator.shop import SimulatorOptions, simulate, write
from tests.integration.running import Shop, wait_for


def invoke(shop: Shop, *arguments: str) -> None:
    flags = [flag for name, value in shop.settings.items() for flag in ('--set', f'{name}={value}')]
    result = CliRunner().invoke(app, [*arguments, *flags])
    assert result.exit_code == 0, f'{result.output}{result.exception!r}'


def by_user(values: list[bytes]) -> dict[str, list[bytes]]:
    """The values of each user, in order, each once: one that was sent again has the same bytes."""
    found: dict[str, list[bytes]] = {}
    for value in dict.fromkeys(values):
        found.setdefault(json.loads(value)['user_id'], []).append(value)
    return found


def test_the_replay_of_a_journal_gives_the_same_outputs(kafka: Kafka, tmp_path: Path):
    recording = tmp_path / 'events.jsonl'
    write(simulate(SimulatorOptions(shoppers=60, days=40, seed=9, noise=0.0)), recording,
          recording.with_suffix('.truth.jsonl'))
    lines = recording.read_bytes().splitlines()
    with Shop(kafka.brokers, 'journaled', tmp_path, scorer='embedded', journal_topic='journaled.journal',
              publish='all', block_events_max=300) as shop:
        shop.make_topics()
        worker = shop.worker()
        shop.publish(lines[:len(lines) // 2])
        wait_for(lambda: worker.metric('stream_steps_total') > 20, 'some steps')
        worker.kill()
        worker = shop.worker()
        shop.publish(lines[len(lines) // 2:])
        shop.wait_done()
        assert worker.stop() == 0
        inputs, journal, out = tmp_path / 'inputs.jsonl', tmp_path / 'journal.jsonl', tmp_path / 'alerts.jsonl'
        invoke(shop, 'record', *shop.inputs, '--out', str(inputs))
        invoke(shop, 'record', 'journaled.journal', '--out', str(journal))
        invoke(shop, 'replay', str(inputs), '--format', 'kafka', '--journal', str(journal), '--out', str(out),
               '--no-report')
        replayed = by_user(out.read_bytes().splitlines())
        for topic, kinds in ((shop.settings['alerts_topic'], ('purchase', 'churn')),
                             (shop.settings['scores_topic'], ('scores',))):
            live = by_user([record.value for record in shop.read(topic)])
            again = {user_id: kept for user_id, values in replayed.items()
                     if (kept := [value for value in values if json.loads(value)['type'].startswith(kinds)])}
            assert len(live) > 50
            assert live == again

"""`stream predict`: one line for everybody who was seen before a time, from the served model alone."""
import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stream.cli.learn import time_ms, version_of
from stream.cli.main import app
from stream.errors import InputError, ModelError, UsageError
from stream.scoring.artefact import load_artefact

SHIPPED = Path(__file__).parents[2] / 'triton_models' / 'shopper' / '1'


@pytest.fixture(scope='module')
def recording(lines, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('recorded') / 'events.jsonl'
    path.write_bytes(b'\n'.join(lines) + b'\n')
    return path


def predicted(recording: Path, out: Path, *arguments: str) -> list[dict]:
    done = CliRunner().invoke(app, ['predict', str(recording), '--at', '2025-06-01', '--out', str(out), *arguments])
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in out.read_bytes().splitlines()]


def test_one_line_for_everybody_who_was_seen_before(recording, lines, tmp_path):
    found = predicted(recording, tmp_path / 'p.jsonl', '--model', str(SHIPPED))
    at_ms = time_ms('2025-06-01')
    before = {json.loads(line)['user_id'] for line in lines if json.loads(line)['ts'] < at_ms}
    assert [line['user_id'] for line in found] == sorted(before)
    manifest = load_artefact(SHIPPED).manifest
    for line in found:
        assert line['as_of_ms'] == at_ms and isinstance(line['active'], bool)
        chances = [line[f'purchase_{days}d'] for days in (1, 7, 30, 90)]
        assert 0 <= chances[0] <= chances[1] <= chances[2] <= chances[3] <= 1
        assert line['churn_30d'] == pytest.approx(1 - chances[2], abs=2e-6)
        assert line['churn_90d'] == pytest.approx(1 - chances[3], abs=2e-6)
        assert len(line['tier_probabilities']) == len(manifest.tier_names)
        assert line['tier'] == max(range(len(manifest.tier_names)), key=line['tier_probabilities'].__getitem__)
        assert line['expected_spend_90d'] >= 0
    assert len({line['purchase_7d'] for line in found}) > len(found) / 2


def test_nothing_after_the_time_is_looked_at(recording, lines, tmp_path):
    early = tmp_path / 'early.jsonl'
    early.write_bytes(b'\n'.join(line for line in lines if json.loads(line)['ts'] < time_ms('2025-06-01')) + b'\n')
    assert predicted(early, tmp_path / 'a.jsonl', '--model', str(SHIPPED)) == predicted(
        recording, tmp_path / 'b.jsonl', '--model', str(SHIPPED))


def test_without_prices_no_spend_is_told(tmp_path):
    recording = tmp_path / 'events.jsonl'
    recording.write_text('\n'.join(json.dumps({
        'event_id': f'e{number}', 'user_id': 'ann', 'ts': time_ms('2025-05-01') + number, 'type': 'purchase'})
        for number in range(3)))
    line, = predicted(recording, tmp_path / 'p.jsonl', '--model', str(SHIPPED))
    assert line['expected_spend_90d'] is None and line['active'] and line['tier'] >= 0


def test_it_needs_no_torch(recording, tmp_path):
    program = ("import sys; sys.modules['torch'] = None; from stream.cli.main import main; "
               f"sys.argv = ['stream', 'predict', {str(recording)!r}, '--at', '2025-06-01', '--out', "
               f"{str(tmp_path / 'p.jsonl')!r}]; main()")
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('text', ['yesterday', '2025-13-01', '2025-06-01T10:00:00'])
def test_what_is_no_time_is_told(text):
    with pytest.raises(UsageError, match='Do: '):
        time_ms(text)


def test_a_folder_without_a_model_is_told(tmp_path):
    with pytest.raises(UsageError, match='stream train'):
        version_of(tmp_path)
    assert version_of(SHIPPED) == version_of(SHIPPED.parent) == SHIPPED


def test_a_model_of_other_amounts_is_told(recording, tmp_path):
    done = CliRunner().invoke(app, ['predict', str(recording), '--at', '2025-06-01', '--out', str(tmp_path / 'p.jsonl'),
                                    '--set', 'currency=USD'])
    assert ('warning: The model was trained on amounts in EUR, but these are in USD: do not trust its scores'
            in done.output)


def test_files_of_another_format_are_told(tmp_path):
    (tmp_path / 'orders.csv').write_text('customer,item\n1,2\n')
    done = CliRunner().invoke(app, ['predict', str(tmp_path / 'orders.csv'), '--at', '2025-06-01'])
    assert isinstance(done.exception, UsageError)
    assert '2 records were refused. Do: check --format' in str(done.exception)


def test_what_train_writes_is_what_predict_takes(recording, tmp_path):
    pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')
    out = tmp_path / 'shop'
    done = trained(recording, out, '--until', '2025-06-01', '--fit', 'epochs=1', '--fit', 'rows_per_epoch=400', '--fit',
                   'cutoffs_per_user=4')
    assert done.exit_code == 0, done.output
    manifest = load_artefact(version_of(out)).manifest
    assert '--until 2025-06-01' in manifest.command and 'until 2025-06-01' in manifest.trained_on
    found = predicted(recording, tmp_path / 'p.jsonl', '--model', str(out), '--items', '3')
    assert len(found) > 30
    known = [json.loads(line) for line in recording.read_bytes().splitlines()]
    known = [event for event in known if event['ts'] < time_ms('2025-06-01')]
    for key, name in (('next_items', 'item_id'), ('next_categories', 'category')):
        names = {event[name] for event in known if event.get(name)}
        for line in found:
            ids, chances = [part['id'] for part in line[key]], [part['chance'] for part in line[key]]
            assert len(set(ids)) == 3 and set(ids) <= names
            assert 0 <= chances[2] <= chances[1] <= chances[0] and sum(chances) <= 1
    without = predicted(recording, tmp_path / 'q.jsonl', '--model', str(out))
    assert without == [{key: value for key, value in line.items() if not key.startswith('next_')} for line in found]
    # Among candidates: those alone, in the order and with the chances that they have among all.
    everything = predicted(recording, tmp_path / 'all.jsonl', '--model', str(out), '--items', '100000')
    ids = sorted({event['item_id'] for event in known if event.get('item_id')})[::7]
    candidates = tmp_path / 'candidates.txt'
    candidates.write_text('\n'.join([*ids, '', f' {ids[0]} ']) + '\n')
    among = predicted(recording, tmp_path / 'c.jsonl', '--model', str(out), '--items', '100000', '--candidates',
                      str(candidates))
    assert len(among) == len(found)
    for line, full in zip(among, everything, strict=True):
        assert sorted(part['id'] for part in line['next_items']) == ids
        chances = {part['id']: part['chance'] for part in full['next_items']}
        for part in line['next_items']:
            assert part['chance'] == pytest.approx(chances.get(part['id'], part['chance']), abs=2e-6)
        assert sum(part['id'] in chances for part in line['next_items']) > 0.9 * len(ids)
        assert line['next_categories'] == full['next_categories']
    # Those that no event names are left out, and told; where that leaves none nothing is written.
    arguments = ['predict', str(recording), '--at', '2025-06-01', '--model', str(out), '--candidates', str(candidates)]
    candidates.write_text('\n'.join([*ids, 'nowhere', 'neither']))
    done = CliRunner().invoke(app, [*arguments, '--out', str(tmp_path / 'd.jsonl'), '--items', '100000'])
    assert f'2 of {len(ids) + 2:,} candidates' in done.output and 'nowhere, neither' in done.output
    assert (tmp_path / 'd.jsonl').read_bytes() == (tmp_path / 'c.jsonl').read_bytes()
    candidates.write_text('nowhere')
    done = CliRunner().invoke(app, [*arguments, '--out', str(tmp_path / 'e.jsonl'), '--items', '3'])
    assert isinstance(done.exception, UsageError) and 'any of the 1 candidates' in str(done.exception)
    assert not (tmp_path / 'e.jsonl').exists()


def test_a_time_long_after_the_newest_event_is_told(recording, tmp_path):
    newest_ms = max(json.loads(line)['ts'] for line in recording.read_bytes().splitlines())
    for days, told in ((6, False), (60, True)):
        at = datetime.fromtimestamp(newest_ms / 1000 + days * 86_400, UTC).strftime('%Y-%m-%dT%H:%M:%SZ')
        done = CliRunner().invoke(app, ['predict', str(recording), '--at', at, '--out', str(tmp_path / 'p.jsonl'),
                                        '--model', str(SHIPPED)])
        assert done.exit_code == 0 and (f'is {days - 1} days older' in done.output or
                                        f'is {days} days older' in done.output) == told


@pytest.mark.parametrize(('content', 'arguments', 'error', 'says'), [
    (b'lamp', (), UsageError, 'add --items'),
    (b' \n\n', ('--items', '3'), UsageError, 'names no item'),
    (b'\xff\xfe\xff', ('--items', '3'), InputError, 'cannot be read'),
    (None, ('--items', '3'), InputError, 'cannot be read'),
])
def test_candidates_that_cannot_be_taken_are_told(content, arguments, error, says, recording, tmp_path):
    candidates = tmp_path / 'candidates.txt'
    if content is not None:
        candidates.write_bytes(content)
    done = CliRunner().invoke(app, ['predict', str(recording), '--at', '2025-06-01', '--out', str(tmp_path / 'p.jsonl'),
                                    '--model', str(SHIPPED), '--candidates', str(candidates), *arguments])
    assert isinstance(done.exception, error) and says in str(done.exception)


def test_the_candidates_are_not_written_over(recording, tmp_path):
    candidates = tmp_path / 'candidates.txt'
    candidates.write_text('lamp')
    done = CliRunner().invoke(app, ['predict', str(recording), '--at', '2025-06-01', '--out', str(candidates),
                                    '--model', str(SHIPPED), '--items', '3', '--candidates', str(candidates)])
    assert isinstance(done.exception, UsageError) and 'one of the files' in str(done.exception)
    assert candidates.read_text() == 'lamp'


def test_a_model_without_a_ranking_is_told(recording, tmp_path):
    version_dir = shutil.copytree(SHIPPED.parent, tmp_path / 'shopper') / '1'
    done = CliRunner().invoke(app, ['predict', str(recording), '--at', '2025-06-01', '--out', str(tmp_path / 'p.jsonl'),
                                    '--items', '3', '--model', str(version_dir)])
    assert isinstance(done.exception, ModelError) and 'no ranking' in str(done.exception)


def trained(recording: Path, out: Path, *arguments: str):
    return CliRunner().invoke(app, ['train', str(recording), '--out', str(out), '--seed', '3', *arguments])


def test_a_pretrained_backbone_by_its_flags(recording, lines, tmp_path):
    pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')
    from tests.learn.pretrained import save_tiny
    source = save_tiny('distilbert', tmp_path / 'tiny', positions=64)
    (tmp_path / 'items.jsonl').write_text(json.dumps({'item_id': 'lamp', 'text': 'a red lamp'}))
    flags = ('--backbone', 'distilbert', '--pretrained', str(source), '--tuning', 'ia3', '--catalogue',
             str(tmp_path / 'items.jsonl'), '--tiers', '6', '--no-refund-head', '--fit', 'epochs=1', '--fit',
             'rows_per_epoch=60', '--fit', 'cutoffs_per_user=2', '--fit', 'moments_per_user=1')
    done = trained(recording, tmp_path / 'shop', *flags)
    assert done.exit_code == 0, done.output
    manifest = load_artefact(version_of(tmp_path / 'shop')).manifest
    assert manifest.command == (
        'stream train --format events events.jsonl --seed 3 --backbone distilbert --pretrained tiny --tuning ia3 '
        '--catalogue items.jsonl --tiers 6 --no-refund-head --fit epochs=1 --fit rows_per_epoch=60 '
        '--fit cutoffs_per_user=2 --fit moments_per_user=1 --out DIR')
    config = (tmp_path / 'shop' / 'config.json').read_text()
    assert json.loads(config)['learning']['epochs'] == 1 and str(tmp_path) not in config
    found = predicted(recording, tmp_path / 'p.jsonl', '--model', str(tmp_path / 'shop'))
    assert {len(line['tier_probabilities']) for line in found} == {6}


@pytest.mark.parametrize(('flags', 'message'), [
    (('--fit', 'hiden=8'), 'did you mean hidden?'), (('--fit', 'epochs'), 'is not NAME=VALUE'),
    (('--fit', 'epochs=none'), 'epochs of training is wrong'), (('--backbone', 'lstm'), "no backbone 'lstm'"),
    (('--backbone', 'bert'), 'is pretrained'), (('--tuning', 'lora'), 'not pretrained'),
    (('--tiers', '1'), 'There cannot be 1 tiers'), (('--catalogue', 'absent.jsonl'), 'cannot be read'),
])
def test_flags_that_do_not_suit_are_told(recording, tmp_path, flags, message):
    pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')
    done = trained(recording, tmp_path / 'shop', *flags)
    assert isinstance(done.exception, UsageError | InputError) and message in str(done.exception)
    assert not (tmp_path / 'shop').exists()

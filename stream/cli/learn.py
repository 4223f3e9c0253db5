"""Commands of the model: train, export, compare, evaluate, predict."""
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import orjson
import typer
from rich.console import Console
from rich.table import Table

from stream.cli.shared import (
    ConfigFile,
    FormatName,
    Overrides,
    amounts_in,
    effective_settings,
    format_of,
    parsed,
    say,
    written,
)
from stream.config import Settings
from stream.core.events import parse_rfc3339_ms
from stream.errors import INSTALL_REPORT, INSTALL_TRAINING, UsageError, extra_module
from stream.scoring.artefact import MANIFEST, load_artefact

app = typer.Typer()

Clean = Annotated[str, typer.Option(
    '--clean', metavar='STEPS', help='Cleaning steps, separated by commas: duplicates, cancellations, outliers, '
                                     'wholesalers. They change what the model learns from, not what it is judged by.')]
Backbone = Annotated[str, typer.Option(
    '--backbone', metavar='NAME', help='The network that reads the window: [bold]events[/bold], a small encoder; or a '
                                       'pretrained text model: [bold]bert[/bold], [bold]distilbert[/bold], '
                                       '[bold]t5[/bold] (its encoder) or [bold]gpt2[/bold].')]
Pretrained = Annotated[str, typer.Option(
    '--pretrained', metavar='FOLDER|ID', help='The pretrained model: a folder, or a Hugging Face id.')]
Tuning = Annotated[str, typer.Option(
    '--tuning', metavar='HOW', help='Which pretrained weights to train: full, frozen, '
                                    'freeze:embeddings,layers=N, lora, ia3, prefix.')]
CatalogueFile = Annotated[Path | None, typer.Option(
    '--catalogue', metavar='FILE', help='An item catalogue: JSON lines or Parquet with item_id, text, '
                                        'embedding, category.')]
Pretrain = Annotated[str | None, typer.Option(
    '--pretrain', metavar='NAMES', help='First pretrain on windows without labels: any of masked, next, contrastive.')]
Fit = Annotated[list[str] | None, typer.Option(
    '--fit', metavar='NAME=VALUE', help='Set a training option, e.g. --fit hidden=96 --fit layers=3 --fit '
                                        'epochs=20 --fit backbone.learning_rate=1e-4 --fit pretrain.epochs=5. '
                                        'Repeatable. A wrong name lists them all.')]
ReportFolder = Annotated[Path, typer.Option(
    '--out', metavar='DIR', help='Folder for index.html and figures.json.')]
ModelFolder = Annotated[Path | None, typer.Option(
    '--model', metavar='DIR', help='The folder that `stream train` or `stream export` wrote. Default: the setting '
                                    '`model`.')]
Seed = Annotated[int, typer.Option(help='The same seed gives the same bytes.')]
TIME = 'a day (from 00:00 UTC) such as 2014-07-16, or a time such as 2014-07-16T12:00:00Z'
MODEL_REPOSITORY = 'triton_models'      # inside the folder that `stream train` writes


@app.command()
def train(
    files: Annotated[list[Path] | None, typer.Argument(
        metavar='[FILE]...', help='Recorded files to learn from.')] = None,
    format_name: FormatName = 'events',
    simulated: Annotated[int | None, typer.Option(
        '--simulate', min=10, metavar='SHOPPERS', help='Train on simulated shoppers instead of files.')] = None,
    days: Annotated[int, typer.Option(min=120, help='Days to simulate.')] = 730,
    until: Annotated[str | None, typer.Option(
        metavar='TIME', help=f'Ignore everything at or after this time: {TIME}.')] = None,
    backbone: Backbone = 'events',
    pretrained: Pretrained = '',
    tuning: Tuning = 'full',
    catalogue: CatalogueFile = None,
    tiers: Annotated[int, typer.Option(help='Number of spend tiers. The lowest means no spend.')] = 5,
    refund_head: Annotated[bool, typer.Option(
        help='Also predict refunds and cancelled orders: a hint for customer service, never for a credit '
             'decision.')] = True,
    how: Fit = None,
    pretrain: Pretrain = None,
    start_from: Annotated[Path | None, typer.Option(
        '--from', metavar='CHECKPOINT', help="Start from another shop's model: a folder written by `stream train`.")]
    = None,
    resume: Annotated[bool, typer.Option(
        '--resume', help='Continue an interrupted training. Give the same command; the result is the same.')] = False,
    tensorboard: Annotated[Path | None, typer.Option(
        metavar='DIR', help='Write the losses of each epoch there, for `tensorboard --logdir DIR`.')] = None,
    clean: Clean = '',
    trials: Annotated[int, typer.Option(
        '--search', min=0, metavar='TRIALS', help='Search hyper-parameters first with this many trainings, judged on '
                                                  'held-out users. 0: no search.')] = 0,
    seed: Seed = 7,
    out: Annotated[Path, typer.Option(metavar='DIR', help='Folder for the checkpoint and the exported model.')]
    = Path('build/shopper'),
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Train a model, judge it on users and days that it has not seen, and export it."""
    settings = effective_settings(config, **parsed(overrides))
    learning = _learning('stream.learn.train')
    if bool(files) == bool(simulated):
        raise UsageError('Give either recorded files or --simulate.', 'name recorded files, or --simulate SHOPPERS.')
    if simulated:
        options = learning.simulated(simulated, days, seed)
    else:
        names = [path.name for path in files or ()]
        options = learning.TrainOptions(
            recorded(files or [], format_name, settings), seed=seed,
            source=', '.join(names) + (f' until {until}' if until else ''),
            command=f'stream train --format {format_name} {" ".join(names)}' + (f' --until {until}' if until else '')
            + f' --seed {seed} --out DIR')
    fitting = replace(_fitting(options.fit, backbone, pretrained, tuning, catalogue, pretrain, clean), tiers=tiers,
                      refund=refund_head, start_from=start_from and str(start_from))
    given = _given(fitting) + ''.join(f' --fit {option}' for option in how or ()) + (
        f' --clean {clean}' if clean else '') + (f' --search {trials}' if trials else '')
    options = replace(
        options, limits=settings.window_limits(), trials=trials,
        rules=msgspec.structs.replace(settings.event_rules(), currency=amounts_in(format_name, settings)),
        until_ms=time_ms(until) if until else None, command=options.command.replace(' --out', f'{given} --out'),
        resume=resume, curves=tensorboard, fit=_changed(fitting, how))
    learning.train(options, out, Console(stderr=True, soft_wrap=True))
    version_dir = _learning('stream.learn.export').export(out, out / MODEL_REPOSITORY)
    say(f'model: {version_dir}. Next: stream predict FILE --at TIME --model {out}, or stream export {out} --name NAME')


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar='CHECKPOINT', help='Folder that `stream train` wrote.')],
    into: Annotated[Path, typer.Option(metavar='DIR', help='Model repository.')] = Path('triton_models'),
    name: Annotated[str, typer.Option(help="The model's name in the repository.")] = 'shopper',
    version: Annotated[int, typer.Option(min=1, help='Version number; a name holds one version.')] = 1,
    int8: Annotated[bool, typer.Option(
        '--int8', help='Quantize large weights and their inputs to 8 bits: a smaller file, for CPUs. Use a '
                       'different --name.')] = False,
) -> None:
    """Export a checkpoint into a model repository: an ONNX graph, checked against torch, and Triton's configuration."""
    precision = 'int8' if int8 else 'fp32'
    say(f'model: {_learning("stream.learn.export").export(checkpoint, into, name, version, precision)}')


@app.command()
def compare(
    files: Annotated[list[Path], typer.Argument(metavar='FILE...', help='Recorded files.')],
    format_name: FormatName = 'events',
    at: Annotated[list[str] | None, typer.Option(
        metavar='DAY', help='Cut-off, repeatable: models learn from the events before it and predict what '
                            'comes after. Default: of 273, 90 and 30 days before the last day, the two longest that '
                            f'leave enough events before. {TIME[0].upper()}{TIME[1:]}.')] = None,
    folds: Annotated[int, typer.Option(
        min=2, help='Folds of the users; each is scored by models trained on the others.')] = 3,
    pretrained_on: Annotated[Path | None, typer.Option(
        metavar='CHECKPOINT', help="Also measure the gain from starting with another shop's model, on 1, 5, 10 and "
                                   '100 % of the users: a folder written by `stream train`.')] = None,
    backbone: Backbone = 'events',
    pretrained: Pretrained = '',
    tuning: Tuning = 'full',
    catalogue: CatalogueFile = None,
    how: Fit = None,
    pretrain: Pretrain = None,
    clean: Clean = '',
    seed: Seed = 7,
    out: ReportFolder = Path('report'),
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Compare the model with simpler ones, all trained on the same events, on users and days that none has seen."""
    settings = effective_settings(config, **parsed(overrides))
    comparing, reporting = _learning('stream.learn.judging.compare'), _learning('stream.learn.judging.report')
    _refuse_a_file(out)
    times_ms = _times_ms(at)
    from stream.learn import dataset
    from stream.learn.judging.tasks import default_cutoffs
    fitting = _changed(_fitting(comparing.FitOptions(), backbone, pretrained, tuning, catalogue, pretrain, clean), how)
    _learning('stream.learn.fit').check_fit(fitting)
    history = dataset.read(recorded(files, format_name, settings), settings.event_rules())
    options = comparing.CompareOptions(seed=seed, folds=folds, processes=os.cpu_count() or 1,
                                       limits=settings.window_limits(), fit=fitting)
    transferring = _learning('stream.learn.judging.transfer')
    if pretrained_on:
        transferring.check_source(pretrained_on, options)
    cutoffs_ms = times_ms or default_cutoffs(history)
    figures = {'about': {'sources': [file.name for file in files], 'format': format_name,
                         'currency': amounts_in(format_name, settings)}}
    figures |= comparing.compare(history, cutoffs_ms, options, say)
    if pretrained_on:
        figures['transfer'] = transferring.transfer(history, cutoffs_ms[0], pretrained_on, options, say)
    _report(out, figures, reporting.comparison_page(figures))


@app.command()
def evaluate(
    files: Annotated[list[Path], typer.Argument(metavar='FILE...', help='Recorded files.')],
    format_name: FormatName = 'events',
    at: Annotated[list[str] | None, typer.Option(
        metavar='DAY', help='Cut-off, repeatable: the model knows the events before it and predicts what comes '
                            f'after. Default: as for `stream compare`. {TIME[0].upper()}{TIME[1:]}.')] = None,
    model: ModelFolder = None,
    threshold: Annotated[float, typer.Option(
        min=0, max=1, help='Probability that counts as positive, for accuracy, precision, recall and F1.')] = 0.5,
    seed: Seed = 7,
    out: ReportFolder = Path('report'),
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Judge an exported model on a recording, and compare it with rules that need no training. Trains nothing."""
    settings = effective_settings(config, **parsed(overrides))
    _refuse_a_file(out)
    times_ms = _times_ms(at)
    report = extra_module('stream.learn.judging.report', 'The report', INSTALL_REPORT)
    from stream.learn import dataset
    from stream.learn.judging import backtest
    from stream.learn.judging.tasks import default_cutoffs
    from stream.scoring.make import shipped
    version_dir = version_of(model) if model else shipped(settings.model)
    currency = amounts_in(format_name, settings)
    warnings = _warnings(version_dir, settings, currency)
    history = dataset.read(recorded(files, format_name, settings), settings.event_rules())
    options = backtest.BacktestOptions(seed=seed, threshold=threshold, limits=settings.window_limits())
    figures = {'about': {'sources': [file.name for file in files], 'format': format_name, 'currency': currency,
                         'warnings': warnings}}
    figures |= backtest.backtest(history, times_ms or default_cutoffs(history), version_dir, options, say)
    _report(out, figures, report.evaluation_page(figures))
    for line in (*warnings, *report.doubts(figures)):
        say(f'warning: {line}')


@app.command()
def predict(
    files: Annotated[list[Path], typer.Argument(metavar='FILE...', help='Recorded files.')],
    at: Annotated[str, typer.Option(metavar='TIME', help=f'Score as of this time, on earlier events: {TIME}.')],
    out: Annotated[Path, typer.Option(metavar='FILE', help='File for the predictions.')] = Path('predictions.jsonl'),
    format_name: FormatName = 'events',
    model: ModelFolder = None,
    items: Annotated[int, typer.Option(
        min=0, metavar='K', help='Also list the K items and categories of the files that are most likely to be bought '
                                 'next. Needs a model that ranks them.')] = 0,
    candidates: Annotated[Path | None, typer.Option(
        metavar='FILE', help='Rank only these items: one item id per line. Needs --items.')] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Score every user who was seen before a time. Writes one JSON line per user: purchase, churn, tier and spend."""
    from stream.learn import dataset
    from stream.learn.predict import predict as predicted
    from stream.learn.ranking.next_items import Texts, read_candidates
    from stream.scoring.make import shipped
    settings = effective_settings(config, **parsed(overrides))
    version_dir = version_of(model) if model else shipped(settings.model)
    if out.is_dir() or out.resolve() in {file.resolve() for file in (*files, candidates) if file}:
        raise UsageError(f'{out} is a folder, or one of the files.', 'name another file with --out.')
    if candidates and not items:
        raise UsageError('Candidates were given, but not how many to list.', 'add --items K.')
    ranked = read_candidates(candidates) if candidates else None
    at_ms = time_ms(at)
    texts, values = Texts(), recorded(files, format_name, settings)
    history = dataset.read(texts.remembered(values) if items else values, settings.event_rules())
    lines = 0
    with written(out) as file:
        for line in predicted(history, at_ms, version_dir, settings.window_limits(), items, texts, ranked, say):
            file.write(line + b'\n')
            lines += 1
    say(f'{lines:,} users as of {datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m-%d %H:%M} UTC: {out}')
    for line in _warnings(version_dir, settings, amounts_in(format_name, settings)):
        say(f'warning: {line}')


def _warnings(version_dir: Path, settings: Settings, currency: str) -> list[str]:
    """Warnings where these events differ in kind from those that the model was trained on."""
    from stream.scoring.make import mismatches
    return [f'{line[0].upper()}{line[1:]}: do not trust its scores.' for line in mismatches(
        load_artefact(version_dir).manifest, settings.model_copy(update={'currency': currency}))]


def _with_range(value: str = '', bounds: str = '') -> str:
    return f'{value} ({bounds})' if value else ''


def time_ms(text: str) -> int:
    """Unix ms of the start of a day, or of a time with a zone. Errors: UsageError where the text is neither."""
    found = parse_rfc3339_ms(f'{text}T00:00:00Z' if re.fullmatch(r'\d{4}-\d{2}-\d{2}', text) else text)
    if found is None:
        raise UsageError(f'{text} is not a time.', f'give {TIME}.')
    return found


def _times_ms(days: list[str] | None) -> list[int]:
    """The times of `--at`, sorted, without repeats."""
    return sorted({time_ms(text) for text in days or ()})


def version_of(folder: Path) -> Path:
    """The model version that a folder is or holds. Errors: UsageError where it does not hold exactly one."""
    if (folder / MANIFEST).is_file():
        return folder
    found = [*folder.glob(f'*/{MANIFEST}'), *folder.glob(f'{MODEL_REPOSITORY}/*/*/{MANIFEST}')]
    if len(found) != 1:
        raise UsageError(f'{folder} is not a model version, and holds {len(found) or "none"}.',
                         'name what `stream train --out` wrote, or <repository>/<name>, or its version.')
    return found[0].parent


def recorded(files: list[Path], format_name: str, settings: Settings) -> Iterator[bytes]:
    """The event JSON of recorded files, in the order in which the worker would read it."""
    from stream.replay.recording import Recording
    from stream.replay.topic_records import event_bytes
    recording = Recording(files, format_of(format_name, settings))
    recording.scan()
    for block in recording.chunks(10_000, 1 << 62):
        for index, value in enumerate(block.values):
            if index not in block.bad:
                yield value if recording.records is None else event_bytes(value)


def _fitting(fitting: Any, backbone: str, pretrained: str, tuning: str, catalogue: Path | None, pretrain: str | None,
             clean: str) -> Any:
    """The fit options, changed by these flags."""
    from stream.learn.clean import steps_named
    return replace(
        fitting, clean=steps_named(clean),
        pretrain=_learning('stream.learn.pretrain').PretrainOptions.of(pretrain) if pretrain else None,
        backbone=replace(fitting.backbone, name=backbone, source=pretrained, tuning=tuning,
                         catalogue=str(catalogue) if catalogue else None))


def _changed(fitting: Any, how: list[str] | None) -> Any:
    return _learning('stream.learn.options').changed(
        fitting, parsed(how, '--fit', 'give e.g. --fit epochs=20.'), _learning('stream.learn.fit').option_names())


def _given(fitting: Any) -> str:
    """The flags that are not at their default, to repeat a training. Files appear by name only."""
    backbone = fitting.backbone
    source = Path(backbone.source).name if Path(backbone.source).is_dir() else backbone.source
    flags = [f' --{name} {value}' for name, value, default in (
        ('backbone', backbone.name, 'events'), ('pretrained', source, ''), ('tuning', backbone.tuning, 'full'),
        ('catalogue', Path(backbone.catalogue or '').name, ''), ('tiers', fitting.tiers, 5),
        ('pretrain', ','.join(fitting.pretrain.objectives if fitting.pretrain else ()), ''),
        ('from', Path(fitting.start_from or '').name, '')) if value != default]
    return ''.join([*flags, '' if fitting.refund else ' --no-refund-head'])


def _learning(module: str) -> Any:
    return extra_module(module, 'Training', INSTALL_TRAINING)


def _refuse_a_file(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f'{out} is a file.', 'name a folder with --out.')


def _report(out: Path, figures: dict[str, Any], page: str) -> None:
    """Write the figures as JSON and as a page, and print a table."""
    out.mkdir(parents=True, exist_ok=True)
    for name, content in (('figures.json', orjson.dumps(figures, option=orjson.OPT_INDENT_2) + b'\n'),
                          ('index.html', page.encode())):
        with written(out / name) as file:
            file.write(content)
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    console.print(_standing(figures))
    if any(cutoff['spend'] for cutoff in figures['cutoffs']):
        console.print(_spending(figures))
    say(f'report: {out / "index.html"}')


def _standing(figures: dict[str, Any]) -> Table:
    """AUROC of each contender with its interval, question by question."""
    from stream.learn.judging import report as reporting
    table = Table(title='AUROC [95 % over users]: 0.5 is guessing, 1 is perfect', title_justify='left')
    for column in ('as of', 'a user…', 'who', 'AUROC', 'ours minus this', 'our model is'):
        figure = column in ('AUROC', 'ours minus this')
        table.add_column(column, justify='right' if figure else 'left', no_wrap=figure)
    for cutoff in figures['cutoffs']:
        for task in cutoff['tasks']:
            asked = [(reporting.day(cutoff['at_ms']), reporting.question(task)),
                     ('', f'true for {task["base_rate"]:.1%} of {task["rows"]:,}')]
            for place, name in enumerate(reporting.on_terminal(task)):
                at, about = asked[place] if place < len(asked) else ('', '')
                scored = task['contenders'][name]
                less = reporting.difference(scored['model_less']['auc']) if scored['model_less'] else ()
                table.add_row(at, about, name, _with_range(*reporting.interval(scored['metrics']['auc'])),
                              _with_range(*less), task['verdict'] if name == task['best_reference'] else '')
            table.add_section()
    return table


def _spending(figures: dict[str, Any]) -> Table:
    """Rank correlation and mean error of each spend forecast."""
    from stream.learn.judging import report as reporting
    table = Table(title='Spend [95 % over users]: rank correlation, and mean error', title_justify='left')
    compared = any(spend['error_ratio'] for cutoff in figures['cutoffs'] for spend in cutoff['spend'])
    over = [f'over that of {reporting.LEAST_ERROR}'] if compared else []
    for column in ('as of', 'spend…', 'who', 'Spearman', 'mean error', *over):
        figure = column not in ('as of', 'spend…', 'who')
        table.add_column(column, justify='right' if figure else 'left', no_wrap=figure)
    for cutoff in figures['cutoffs']:
        for spend in cutoff['spend']:
            asked = reporting.day(cutoff['at_ms']), reporting.within(spend['days'])
            for name, scored in spend['contenders'].items():
                error = scored['metrics'].get('mean_absolute_error')
                ratio = spend['error_ratio'].get(name)
                table.add_row(*asked, name, _with_range(*reporting.interval(scored['metrics']['spearman'])),
                              _with_range(*(reporting.interval(error, 2) if error else ())),
                              *([_with_range(*(reporting.interval(ratio) if ratio else ()))] if compared else []))
                asked = '', ''
            table.add_section()
    return table

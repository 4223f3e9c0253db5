"""The compose files and the images, as far as a machine without Docker can judge them."""
import asyncio
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml

from deploy.local.parts import Kafka, Triton, libpython
from deploy.local.processes import HOST, free_port
from stream.cli.main import app
from stream.config import Settings, load_settings
from stream.core.scores import OUTPUT_NAMES
from stream.engine.admin import PATHS
from stream.scoring.embedded import EmbeddedScorer
from stream.scoring.repository import ENGINE_CACHE
from stream.scoring.triton import TritonScorer
from tests.contract.test_scorers import SHIPPED, made_up_batch
from tests.integration.running import wait_for
from tests.skips import skip_without

ROOT = Path(__file__).parents[2]
COMPOSE_FILE, GPU_FILE = ROOT / 'docker-compose.yml', ROOT / 'deploy' / 'docker' / 'gpu.yml'
COMPOSE: dict[str, Any] = yaml.safe_load(COMPOSE_FILE.read_text())
GPU: dict[str, Any] = yaml.safe_load(GPU_FILE.read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE['services']
DOCKERFILE = (ROOT / 'deploy' / 'docker' / 'Dockerfile').read_text().replace('\\\n', ' ')
STREAM = {name: service for name, service in SERVICES.items() if service['image'] == 'stream:local'}
STAGES = {name: (base, text) for base, name, text in
          re.findall(r'^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM |\Z)', DOCKERFILE, re.MULTILINE | re.DOTALL)}


def instruction(stage: str, name: str) -> str:
    """What its only such instruction says."""
    found, = re.findall(rf'^{name} (.*)$', STAGES[stage][1], re.MULTILINE)
    return found


def test_the_services():
    assert set(SERVICES) == {'kafka', 'triton', 'worker', 'shoppers'}
    assert set(STREAM) == {'worker', 'shoppers'}
    assert not [name for name, service in SERVICES.items() if 'profiles' in service]     # `up` starts all of them
    assert set(GPU['services']) == {'triton'}       # in its place: never both
    device, = GPU['services']['triton']['deploy']['resources']['reservations']['devices']
    assert device['capabilities'] == ['gpu']


def test_each_image_has_its_stage():
    built = {name: service for name, service in SERVICES.items() if 'build' in service}
    assert set(built) == {'triton', 'worker', 'shoppers'}
    for service in built.values():
        assert service['build'] == {'context': '.', 'dockerfile': 'deploy/docker/Dockerfile',
                                    'target': service['image'].replace('stream-', '').removesuffix(':local')}
        assert service['build']['target'] in STAGES
    assert GPU['services']['triton']['image'] not in {service['image'] for service in SERVICES.values()}
    assert GPU['services']['triton']['build']['target'] in STAGES
    assert list(STAGES)[-1] == 'stream'     # what `docker build` makes
    assert DOCKERFILE.count('\nFROM ') == len(STAGES)


def test_images_are_pinned_name_no_host_and_are_those_of_the_local_parts():
    pom = (ROOT / 'deploy' / 'local' / 'pom.xml').read_text()
    kafka = re.search(r'<artifactId>kafka_2.13</artifactId>\s*<version>([\d.]+)', pom)
    assert kafka and SERVICES['kafka']['image'] == f'apache/kafka:{kafka[1]}'
    images = {service['image'] for service in SERVICES.values()} | {base for base, _ in STAGES.values()} - set(STAGES)
    images -= {'${TRITON_IMAGE}'}
    assert len(images) == 4
    for image in images:
        first, slash, _ = image.partition('/')
        assert ':' in image and not (slash and re.search(r'[.:]|^localhost$', first)), image
    bases = {base for base, _ in STAGES.values() if base.startswith('python:')}
    assert bases == {'python:3.11-slim-bookworm'}       # the server's wheel has backends for Python 3.11 and 3.12


def test_the_gpus_image_is_asked_for_in_words(monkeypatch: pytest.MonkeyPatch):
    name = re.search(r'\$\{(\w+):\?([^}]*)\}', GPU['services']['triton']['build']['args']['TRITON_IMAGE'])
    assert name and name[1] == 'TRITON_IMAGE' and STAGES['triton-gpu'][0] == '${TRITON_IMAGE}'
    tag, = re.findall(r'\d\d\.\d\d-py3', name[2])
    assert tag in COMPOSE_FILE.read_text()
    # Stages that are not built need a base too.
    assert re.search(r'^ARG TRITON_IMAGE=scratch$', DOCKERFILE.split('\nFROM ')[0], re.MULTILINE)
    assert ':?' not in COMPOSE_FILE.read_text()     # asked for even where the service does not start
    assert f'-f {GPU_FILE.relative_to(ROOT)} up --build' in COMPOSE_FILE.read_text()
    for text in (COMPOSE_FILE.read_text(), GPU_FILE.read_text(), DOCKERFILE):
        assert not re.search(r'https?://(?!127\.0\.0\.1)|\b[a-z]+\.(io|com|org)\b', text)


def test_nothing_is_open_to_other_machines():
    ports = [port for service in SERVICES.values() for port in service.get('ports', ())]
    assert len(ports) == 4 and all(port.startswith('127.0.0.1:') for port in ports)
    assert len({port.rsplit(':', 1)[0] for port in ports}) == len(ports)      # no two want the same


def test_each_waits_for_what_it_needs():
    assert set(SERVICES['worker']['depends_on']) == {'kafka', 'triton'}
    for service in SERVICES.values():
        for needed, how in service.get('depends_on', {}).items():
            assert how == {'condition': 'service_healthy'} and 'healthcheck' in SERVICES[needed]
    url, = re.findall(r'http://127\.0\.0\.1:(\d+)(/\w+)', ' '.join(SERVICES['worker']['healthcheck']['test']))
    assert url[0] == SERVICES['worker']['environment']['STREAM_ADMIN_PORT'] and url[1] in PATHS


def test_the_settings_exist_and_are_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    for service in STREAM.values():
        names = {name.removeprefix('STREAM_').lower() for name in service['environment']}
        assert names <= set(Settings.model_fields)
        for name, value in service['environment'].items():
            monkeypatch.setenv(name, value)
        settings = load_settings()
        assert (settings.brokers, settings.scorer, settings.triton) == ('kafka:19092', 'triton', 'triton:8001')
        assert f'{settings.state_dir}' in STAGES['stream'][1]
    assert 'INSIDE://kafka:19092' in SERVICES['kafka']['environment']['KAFKA_ADVERTISED_LISTENERS']


def test_the_commands_exist_with_their_options():
    script, = SERVICES['shoppers']['command']
    lines = [SERVICES['worker']['command'], *(shlex.split(part)[1:] for part in script.split('&&'))]
    assert [line[0] for line in lines] == ['worker', 'simulate', 'publish']
    commands = typer.main.get_command(app).commands     # pyright: ignore[reportAttributeAccessIssue]
    for name, *arguments in lines:
        commands[name].make_context(name, list(arguments), resilient_parsing=False)
    assert all(part.split()[0] == 'stream' for part in script.split('&&'))


def test_volumes():
    for compose in (COMPOSE, GPU):
        for service in compose['services'].values():
            for volume in service.get('volumes', ()):
                assert volume.split(':')[0] in compose['volumes']
    assert f'tensorrt:{ENGINE_CACHE}' in GPU['services']['triton']['volumes']


def test_the_images_get_what_they_copy():
    ignored = (ROOT / 'deploy' / 'docker' / 'Dockerfile.dockerignore').read_text().splitlines()
    assert ignored[0] == '*'
    copied = set()
    for line in re.findall(r'^COPY (.*)$', DOCKERFILE, re.MULTILINE):
        if found := re.fullmatch(r'--from=(\S+) (\S+) \S+', line):
            assert found[2] in STAGES[found[1]][1]
        else:
            copied.update(line.split()[:-1])
    for source in copied:
        assert (ROOT / source).exists()
        assert any(fnmatch.fnmatch(f'!{source}', pattern) for pattern in ignored[1:]), source
    build = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['hatch']['build']
    assert build['hooks']['custom']['path'] in copied
    assert {'stream', 'triton_models', 'deploy/local', 'pyproject.toml', 'README.md', 'LICENSE'} <= copied
    assert instruction('stream', 'USER') == 'stream' and instruction('triton', 'USER') == 'triton'


class ImagesTriton(Triton):
    """The image's command, with the folders and addresses of this machine."""

    def __init__(self, folder: Path, models: Path) -> None:
        super().__init__(folder)
        code, = re.findall(r"python -c '(.*?)'", STAGES['parts'][1])
        self._folders = {
            '/opt/triton': self._printed('-c', code), '/models': str(models), '/usr/local/lib': str(libpython())}

    @staticmethod
    def _printed(*arguments: str) -> str:
        return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True,
                              check=True, timeout=60).stdout.strip()

    def _here(self, text: str) -> str:
        return re.sub('|'.join(self._folders), lambda found: self._folders[found[0]], text)

    def _command(self) -> tuple[list[str], dict[str, str]]:
        command = [self._here(argument) for argument in json.loads(instruction('triton', 'CMD'))]
        command += [f'--{kind}-{what}' for kind, port in (
            ('grpc', self.port), ('http', self.http_port), ('metrics', self.metrics_port))
            for what in (f'address={HOST}', f'port={port}')]
        name, value = instruction('triton', 'ENV').split('=')
        shared_memory = f'--backend-config=python,shm-region-prefix-name={self._shared_memory()}'
        return [*command, shared_memory], {name: self._here(value)}


def test_the_images_triton_scores_as_the_embedded_model(tmp_path: Path):
    lines = [shlex.split(line) for line in instruction('models', 'RUN').split('&&')]
    for python, *arguments in lines:
        assert python == 'python'
        subprocess.run([sys.executable, *(a.replace('/models/', f'{tmp_path}/models/') for a in arguments)],
                       cwd=ROOT, check=True, timeout=60)
    assert 'tensorrt' in (tmp_path / 'models' / 'tensorrt' / 'shopper' / 'config.pbtxt').read_text()
    assert instruction('triton-gpu', 'COPY') == '--from=models /models/tensorrt /models'
    assert '--from=models /models/python /models' in re.findall(r'^COPY (.*)$', STAGES['triton'][1], re.MULTILINE)

    batches = [made_up_batch(rows, slots, seed=rows) for rows, slots in ((1, 8), (5, 64), (256, 16))]

    async def scores(address: str):
        scorer = TritonScorer(address, SHIPPED)
        try:
            return await scorer.score(batches), scorer.served_sha256
        finally:
            await scorer.close()

    with ImagesTriton(tmp_path / 'triton', tmp_path / 'models' / 'python') as triton:
        answers, sha256 = asyncio.run(scores(triton.address))
        check = SERVICES['triton']['healthcheck']['test'][-1]
        assert '127.0.0.1:8000/' in check
        subprocess.run([sys.executable, '-c', check.replace(':8000/', f':{triton.http_port}/')], check=True, timeout=20)
    embedded = EmbeddedScorer(SHIPPED)
    assert sha256 == embedded.model.sha256
    for answer, wanted in zip(answers, embedded.score_now(batches), strict=True):
        for name in OUTPUT_NAMES:
            np.testing.assert_allclose(getattr(answer, name), getattr(wanted, name), rtol=1e-5, atol=1e-6)


def test_the_brokers_settings_start_a_real_broker(tmp_path: Path):
    ports = {'19092': free_port(), '9092': free_port(), '9093': free_port()}
    properties = {}
    for name, value in SERVICES['kafka']['environment'].items():
        if name != 'KAFKA_HEAP_OPTS':
            value = re.sub(r'//(kafka)?:', '//127.0.0.1:', value).replace('@kafka:', '@127.0.0.1:')
            value = re.sub(r'(?<=:)(19092|9092|9093)\b', lambda port: str(ports[port[1]]), value)
            properties[name.removeprefix('KAFKA_').lower().replace('_', '.')] = value
    properties |= {'log.dirs': str(tmp_path / 'kafka' / 'data')}
    kafka = Kafka(tmp_path / 'kafka', properties=properties)
    kafka.port = ports['9092']
    with kafka:
        kafka.port = ports['19092']
        wait_for(kafka._answers, 'the second listener')


@pytest.fixture
def compose():
    found = shutil.which('docker-compose')
    if found is None:
        skip_without('docker-compose')      # the other tests judge

    def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(('STREAM_', 'TRITON_'))}
        return subprocess.run([found, *arguments, 'config'], cwd=ROOT, env=environment | variables,
                              capture_output=True, text=True, timeout=60, check=False)

    return run


def test_compose_accepts_it(compose):
    done = compose()
    assert done.returncode == 0, done.stderr
    assert set(yaml.safe_load(done.stdout)['services']) == set(SERVICES)


def test_the_gpu_takes_the_cpus_place(compose):
    files = ['-f', COMPOSE_FILE, '-f', GPU_FILE]
    refused = compose(*files)
    assert refused.returncode and 'with the tag 24.10-py3' in refused.stderr
    done = compose(*files, TRITON_IMAGE='triton:24.10-py3')
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)['services']
    assert set(services) == set(SERVICES)
    build = services['triton']['build']
    assert (build['target'], build['args'], build['context']) == (
        'triton-gpu', {'TRITON_IMAGE': 'triton:24.10-py3'}, str(ROOT))
    assert services['triton']['healthcheck']['test'] == SERVICES['triton']['healthcheck']['test']

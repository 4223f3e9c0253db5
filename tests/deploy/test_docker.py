"""The compose file and the image, as far as a machine without Docker can judge them."""
import fnmatch
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from parts import Kafka, free_port

from stream.cli import app
from stream.config import Settings, load_settings
from stream.engine.admin import PATHS
from stream.scoring.repository import ENGINE_CACHE

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / 'docker-compose.yml').read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE['services']
DOCKERFILE = (ROOT / 'deploy' / 'docker' / 'Dockerfile').read_text()
OURS = {name: service for name, service in SERVICES.items() if 'build' in service}


def test_the_services():
    assert set(SERVICES) == {'kafka', 'triton', 'triton-gpu', 'worker', 'shoppers'}
    assert set(OURS) == {'worker', 'shoppers'}
    assert [name for name, service in SERVICES.items() if 'profiles' in service] == ['triton-gpu']
    device, = SERVICES['triton-gpu']['deploy']['resources']['reservations']['devices']
    assert device['capabilities'] == ['gpu']


def test_images_are_pinned_and_those_of_the_local_parts():
    pom = (ROOT / 'deploy' / 'local' / 'pom.xml').read_text()
    kafka = re.search(r'<artifactId>kafka_2.13</artifactId>\s*<version>([\d.]+)', pom)
    assert kafka and SERVICES['kafka']['image'] == f'apache/kafka:{kafka[1]}'
    for name in ('triton', 'triton-gpu'):
        assert re.fullmatch(r'nvcr\.io/nvidia/tritonserver:\d\d\.\d\d-py3', SERVICES[name]['image'])


def test_nothing_is_open_to_other_machines():
    ports = [port for service in SERVICES.values() for port in service.get('ports', ())]
    assert len(ports) == 6 and all(port.startswith('127.0.0.1:') for port in ports)
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
    monkeypatch.delenv('STREAM_TRITON', raising=False)
    for service in OURS.values():
        names = {name.removeprefix('STREAM_').lower() for name in service['environment']}
        assert names <= set(Settings.model_fields)
        for name, value in service['environment'].items():
            monkeypatch.setenv(name, re.sub(r'\$\{\w+:-(.*)\}', r'\1', value))
        settings = load_settings()
        assert (settings.brokers, settings.scorer, settings.triton) == ('kafka:19092', 'triton', 'triton:8001')
        assert f'{settings.state_dir}' in DOCKERFILE
    assert 'INSIDE://kafka:19092' in SERVICES['kafka']['environment']['KAFKA_ADVERTISED_LISTENERS']


def test_the_commands_exist_with_their_options():
    script, = SERVICES['shoppers']['command']
    lines = [SERVICES['worker']['command'], *(shlex.split(part)[1:] for part in script.split('&&'))]
    assert [line[0] for line in lines] == ['worker', 'simulate', 'publish']
    commands = typer.main.get_command(app).commands     # pyright: ignore[reportAttributeAccessIssue]
    for name, *arguments in lines:
        commands[name].make_context(name, list(arguments), resilient_parsing=False)
    assert all(part.split()[0] == 'stream' for part in script.split('&&'))


def test_volumes_and_folders():
    for service in SERVICES.values():
        for volume in service.get('volumes', ()):
            source = volume.split(':')[0]
            assert source in COMPOSE['volumes'] or source.startswith('./')
    assert (ROOT / SERVICES['triton']['volumes'][0].split(':')[0]).is_dir()
    assert f'tensorrt:{ENGINE_CACHE}' in SERVICES['triton-gpu']['volumes']
    variant = SERVICES['triton-gpu']['volumes'][0].split(':')[0].removeprefix('./')
    assert f'stack.py models tensorrt {variant}' in (ROOT / 'docker-compose.yml').read_text()


def test_the_image_gets_what_it_copies():
    copied = [source for line in re.findall(r'^COPY (.*)$', DOCKERFILE, re.MULTILINE) for source in line.split()[:-1]]
    ignored = (ROOT / 'deploy' / 'docker' / 'Dockerfile.dockerignore').read_text().splitlines()
    assert ignored[0] == '*'
    for source in copied:
        assert (ROOT / source).exists()
        assert any(fnmatch.fnmatch(f'!{source}', pattern) for pattern in ignored), source
    assert {'stream', 'triton_models', 'pyproject.toml', 'README.md', 'LICENSE'} <= set(copied)
    assert re.search(r'^USER stream$', DOCKERFILE, re.MULTILINE)
    assert all(service['build'] == {'context': '.', 'dockerfile': 'deploy/docker/Dockerfile'}
               for service in OURS.values())


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
        assert kafka._answers()


def test_compose_accepts_it():
    compose = shutil.which('docker-compose')
    if compose is None:
        pytest.skip('docker-compose is not installed (Debian: apt-get install docker-compose); the other tests judge')
    environment = {name: value for name, value in os.environ.items() if not name.startswith('STREAM_')}
    done = subprocess.run([compose, 'config', '--services'], cwd=ROOT, env=environment, capture_output=True, text=True,
                          timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == set(SERVICES)

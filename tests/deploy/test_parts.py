"""The local parts: what they promise to a caller, on the real servers."""
import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from deploy.local import install, parts
from deploy.local.parts import Kafka, Part, Triton
from deploy.local.processes import PartError, free_port, recorded, started_at, stop_process

ROOT = Path(__file__).parents[2]


class Sleeper(Part):
    """A part that is `sh`: what every part does, without a server."""

    name = 'sleeper'

    def __init__(self, folder: Path, script: str = 'sleep 60', ready: bool = True, tied: bool = True) -> None:
        super().__init__(folder, tied)
        self.script, self.ready, self.port = script, ready, 1

    def _choose_ports(self) -> None:
        self.port += 1

    def _command(self):
        return ['sh', '-c', self.script, str(self.port)], {}

    def _answers(self) -> bool:
        return self.ready


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while started_at(pid) is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    return started_at(pid) is None


def stopped(pid: int) -> bool:
    """Every thread of it has taken the signal: until then one may still answer."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if all(stat.read_text().rpartition(') ')[2][0] == 'T' for stat in Path(f'/proc/{pid}/task').glob('*/stat')):
            return True
        time.sleep(0.02)
    return False


def test_a_part_starts_stops_and_leaves_nothing(tmp_path: Path):
    part = Sleeper(tmp_path / 'part')
    with part:
        pid = part.pid
        assert recorded(part.pid_file) == (pid, part.started)
        assert part.start().pid == pid      # up already
        assert part.restart().pid != pid and gone(pid)
        pid = part.pid
    assert gone(pid) and not part.folder.exists() and not part.running
    part.stop()


def test_one_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path):
    script = 'trap "" TERM; sleep 60 & echo $!; while :; do sleep 0.1; done'
    with Sleeper(tmp_path / 'part', script) as part:
        pid, started = part.pid, part.started
        deadline = time.monotonic() + 10
        while not part.log.read_text().strip() and time.monotonic() < deadline:
            time.sleep(0.02)
        child = int(part.log.read_text())
        assert stop_process(pid, started, seconds_max=0.3)
        assert gone(pid) and gone(child)
        assert not stop_process(pid, started)


def test_another_process_with_the_same_pid_is_left_alone(tmp_path: Path):
    with Sleeper(tmp_path / 'part') as part:
        assert not stop_process(part.pid, part.started + 1)
        assert part.running
        part.pid_file.write_text(f'{part.pid} {part.started + 1}\n')
        assert recorded(part.pid_file) is None
    assert recorded(part.pid_file) is None


def test_a_paused_one_is_stopped_all_the_same(tmp_path: Path):
    with Sleeper(tmp_path / 'part') as part:
        pid = part.pid
        part.pause()
        part.stop()
        assert gone(pid)


def test_a_start_that_fails_says_why_and_leaves_no_process(tmp_path: Path):
    part = Sleeper(tmp_path / 'part', 'echo the disk is upside down; exit 3', ready=False)
    with pytest.raises(PartError, match=r'(?s)ended with 3.*the disk is upside down.*Do: .*docker compose up'):
        part.start()
    assert not part.running and not part.pid_file.exists()


def test_a_start_that_hangs_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parts, 'START_SECONDS_MAX', 0.2)
    part = Sleeper(tmp_path / 'part', ready=False)
    with pytest.raises(PartError, match='does not answer within'):
        part.start()
    assert not part.running


def test_a_port_that_was_taken_meanwhile_is_chosen_anew(tmp_path: Path):
    part = Sleeper(tmp_path / 'part', '[ $0 = 3 ] && exec sleep 60; echo bind: Address already in use; exit 1',
                   ready=False)
    part._answers = lambda: part.port == 3
    with part:
        assert part.port == 3
        part.script = 'echo Address already in use; exit 1'
        part._answers = lambda: False
        with pytest.raises(PartError, match='already in use'):      # clients know the port by now
            part.restart()


def test_it_dies_with_the_process_that_started_it(tmp_path: Path):
    code = (f'import sys, time, pathlib; sys.path[:0] = {[str(Path(__file__).parent), str(ROOT)]!r}\n'
            f'from test_parts import Sleeper\n'
            f'print(Sleeper(pathlib.Path({str(tmp_path / "part")!r})).start().pid, flush=True); time.sleep(60)')
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        assert started_at(pid)
        parent.kill()
    assert gone(pid)
    deadline = time.monotonic() + 10
    while (tmp_path / 'part').exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not (tmp_path / 'part').exists()


def test_free_ports_are_not_those_of_outgoing_connections():
    first = int(Path('/proc/sys/net/ipv4/ip_local_port_range').read_text().split()[0])
    assert all(10_000 <= free_port() < first for _ in range(50))


@pytest.mark.parametrize(('missing', 'package'), [('java', 'openjdk-17-jre-headless'), ('mvn', 'maven')])
def test_without_java_or_maven_it_says_what_to_install(tmp_path, monkeypatch, missing: str, package: str):
    monkeypatch.setattr(install, 'PARTS', tmp_path)
    which = install.shutil.which
    monkeypatch.setattr(install.shutil, 'which', lambda name, **options: None if name == missing else which(name))
    with pytest.raises(PartError, match=f'apt-get install .*{package}.*docker compose up'):
        install.install_kafka()
    assert not list(tmp_path.glob('kafka-*'))


def test_an_old_java_is_refused(tmp_path, monkeypatch):
    java = tmp_path / 'java'
    java.write_text('#!/bin/sh\necho \'openjdk version "11.0.2" 2019-01-15\' >&2\n')
    java.chmod(0o755)
    monkeypatch.setattr(install, 'PARTS', tmp_path / 'parts')
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    with pytest.raises(PartError, match='Java 17 or newer'):
        install.install_kafka()


def test_a_failing_install_shows_its_output_and_is_tried_again(tmp_path, monkeypatch):
    maven = tmp_path / 'mvn'
    monkeypatch.setattr(install, 'PARTS', tmp_path / 'parts')
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    maven.write_text('#!/bin/sh\necho no route to the repository; exit 1\n')
    maven.chmod(0o755)
    with pytest.raises(PartError, match=r'(?s)no route to the repository.*Do: '):
        install.install_kafka()
    maven.write_text('#!/bin/sh\nfor last; do :; done; touch "${last#-DoutputDirectory=}/kafka.jar"\n')
    assert [path.name for path in install.install_kafka().iterdir()] == ['kafka.jar']
    maven.write_text('#!/bin/sh\nexit 1\n')
    assert install.install_kafka().exists()


def test_two_callers_fetch_once(tmp_path, monkeypatch):
    monkeypatch.setattr(install, 'PARTS', tmp_path)
    calls = []

    def fetch(target: Path) -> None:
        calls.append(target)
        time.sleep(0.2)
        (target / 'file').write_text('whole')

    threads = [threading.Thread(target=install._installed, args=('thing', b'1', fetch)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert [path.name for path in tmp_path.glob('thing-*/*')] == ['file']
    assert install._installed('thing', b'2', fetch) != install._installed('thing', b'1', fetch)


def test_the_pins_are_names_and_versions():
    for line in (ROOT / 'deploy/local/triton-constraints.txt').read_text().splitlines():
        assert re.fullmatch(r'#.*|[a-z0-9-]+==[0-9.]+', line), line
    assert '://' not in (ROOT / 'deploy/local/pom.xml').read_text()


def test_a_killed_broker_comes_back_with_its_records_on_its_port(tmp_path: Path):
    async def fill(brokers: str) -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=brokers)
        await admin.start()
        await admin.create_topics([NewTopic('kept', 1, 1)])
        await admin.close()
        async with AIOKafkaProducer(bootstrap_servers=brokers) as producer:
            for number in range(100):
                await producer.send_and_wait('kept', str(number).encode())

    async def kept(brokers: str) -> list[bytes]:
        async with AIOKafkaConsumer(bootstrap_servers=brokers, auto_offset_reset='earliest') as consumer:
            consumer.assign([TopicPartition('kept', 0)])
            return [(await asyncio.wait_for(consumer.getone(), 20)).value for _ in range(100)]

    with Kafka(tmp_path / 'kafka') as kafka:
        asyncio.run(fill(kafka.brokers))
        port, pid = kafka.port, kafka.pid
        kafka.kill()
        assert gone(pid)
        with socket.socket() as probe:
            assert probe.connect_ex(('127.0.0.1', port))
        kafka.start()
        assert (kafka.port, asyncio.run(kept(kafka.brokers))) == (port, [str(n).encode() for n in range(100)])
        pid = kafka.pid
    assert gone(pid) and not kafka.folder.exists()


def test_triton_comes_back_on_its_port_and_leaves_no_shared_memory(tmp_path: Path):
    with Triton(tmp_path / 'triton') as triton:
        port, pid = triton.port, triton.pid
        assert list(Path('/dev/shm').glob(f'stream-triton-{port}-*'))
        triton.kill()
        assert gone(pid) and not list(Path('/dev/shm').glob(f'stream-triton-{port}-*'))
        assert triton.start().port == port
        os.kill(triton.pid, signal.SIGSTOP)
        assert stopped(triton.pid) and not triton._answers()
    assert not triton.folder.exists()
    assert not list(Path('/dev/shm').glob(f'stream-triton-{port}-*'))


def test_a_triton_whose_port_is_taken_chooses_another(tmp_path: Path):
    triton = Triton(tmp_path / 'triton')
    with socket.socket() as other:
        other.bind(('127.0.0.1', triton.port))
        other.listen()
        with triton:
            assert triton.port != other.getsockname()[1]


def test_triton_refuses_a_model_that_is_not_the_exported_one(tmp_path: Path):
    triton = Triton(tmp_path / 'triton')
    command = triton._command

    def tampered():
        made = command()
        (triton.folder / 'models' / 'shopper' / '1' / 'model.onnx').write_bytes(b'another graph')
        return made

    triton._command = tampered
    with pytest.raises(PartError, match=r'model\.onnx is not the one'):
        triton.start()
    triton.remove()

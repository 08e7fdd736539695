"""A RabbitMQ cluster of the tests' own: nodes with MQTT over TLS alone, client certificates required.

Debian's package `rabbitmq-server` has the programs; the service that it may have started, its folders and its epmd
are left alone. Every node is a process whose end is its own: it may be killed and started again.

The settings are those that docs/upstream.md gives an operator.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.ports import HOST, steady_port
from support.programs import lacks, program

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from support.pki import Pki

READY = "Server startup complete"
START_TIMEOUT_S = 180
SETTINGS = """\
listeners.tcp = none
mqtt.listeners.tcp = none
mqtt.listeners.ssl.default = {host}:{port}

ssl_options.cacertfile = {credentials}/root.pem
ssl_options.certfile = {credentials}/server.pem
ssl_options.keyfile = {credentials}/server.pem
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = true
ssl_options.depth = 2

mqtt.allow_anonymous = false
mqtt.ssl_cert_login = true
ssl_cert_login_from = common_name

mqtt.durable_queue_type = quorum
mqtt.subscription_ttl = infinity
mqtt.prefetch = 500
"""
"""What an operator has to set, and no more."""
_OF_TESTS = """\
load_definitions = {definitions}
log.console = true
log.file = false
"""
_JOINS_THE_FIRST = """\
cluster_formation.peer_discovery_backend = classic_config
cluster_formation.classic_config.nodes.1 = rabbit1@localhost
cluster_formation.classic_config.nodes.2 = {name}
"""
# One scheduler each: three nodes share a small machine with what they are tested with.
_EMULATOR = "+S 1:1 +SDcpu 1:1 +SDio 2 -kernel inet_dist_use_interface {127,0,0,1}"


@dataclass(frozen=True)
class User:
    """Whom the cluster lets in by the CN of a certificate.

    Args:
        name: the CN, and the client id.
        suffix: of its client ids, as a regular expression.
        write: topics that it may publish to, as a regular expression with dots for slashes.
        read: topics that it may subscribe to, likewise.
    """

    name: str
    suffix: str = ""
    write: str = ".*"
    read: str = ".*"

    def permission(self) -> dict[str, str]:
        """Rights to its own session's queues and to the exchange of all MQTT messages."""
        queues = rf"mqtt-subscription-{self.name}{self.suffix}qos[01]"
        own, both = f"^{queues}$", rf"^({queues}|amq\.topic)$"
        return {"user": self.name, "vhost": "/", "configure": own, "write": both, "read": both}

    def topic_permission(self) -> dict[str, str]:
        return {"user": self.name, "vhost": "/", "exchange": "amq.topic", "write": self.write, "read": self.read}


def definitions(users: Iterable[User]) -> dict[str, Any]:
    """The cluster's definitions: nobody has a password, and so nobody comes in without a certificate."""
    named = list(users)
    return {
        "vhosts": [{"name": "/"}],
        "users": [
            {
                "name": user.name,
                "password_hash": "",
                "hashing_algorithm": "rabbit_password_hashing_sha256",
                "tags": "",
            }
            for user in named
        ],
        "permissions": [user.permission() for user in named],
        "topic_permissions": [user.topic_permission() for user in named],
    }


def server_program() -> Path:
    """Return the server's own script; Debian's wrapper runs as the service's user, in its folder."""
    installed = sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server"))
    return installed[-1] if installed else lacks("RabbitMQ", "rabbitmq-server")


@dataclass
class Node:
    """One node: what it is started with, and its process."""

    name: str
    folder: Path
    script: Path
    environment: dict[str, str]
    port: int = field(default_factory=steady_port)
    said: list[str] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None
    _reader: threading.Thread | None = None
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _is_ready: bool = False

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def launch(self) -> None:
        """Start the process; `wait` returns when it takes connections."""
        assert not self.is_running
        self._is_ready = False
        # So the script becomes the node itself, and its end is that of the node.
        environment = self.environment | {"RUNNING_UNDER_SYSTEMD": "true"}
        self.process = subprocess.Popen(
            [self.script],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(self.process,), name=self.name)
        self._reader.start()

    def wait(self) -> None:
        assert self.process is not None
        with self._changed:
            told = self._changed.wait_for(lambda: self._is_ready or not self.is_running, START_TIMEOUT_S)
        assert told, f"{self.name} is not ready: {''.join(self.said[-30:])}"
        assert self._is_ready, f"{self.name} ended: {''.join(self.said[-30:])}"

    def start(self) -> None:
        self.launch()
        self.wait()

    def kill(self) -> None:
        """Kill it at once, as a power cut would."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)
        assert self._reader is not None
        self._reader.join(20)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process = None

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with self._changed:
                self.said.append(line)
                self._is_ready |= READY in line
                self._changed.notify_all()
        process.wait()
        with self._changed:
            self._changed.notify_all()


@dataclass
class Cluster:
    """Nodes that know each other, and the epmd that they find each other by."""

    folder: Path
    nodes: list[Node]
    epmd: subprocess.Popen[bytes]

    @property
    def ports(self) -> list[int]:
        return [node.port for node in self.nodes]

    @property
    def said(self) -> str:
        return "".join(line for node in self.nodes for line in node.said)

    def restore(self) -> None:
        """Start again the nodes that were killed."""
        down = [node for node in self.nodes if not node.is_running]
        for node in down:
            node.launch()
        for node in down:
            node.wait()

    def close(self) -> None:
        for node in self.nodes:
            node.kill()
        self.epmd.kill()
        self.epmd.wait(20)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def cluster(folder: Path, pki: Pki, users: Sequence[User]) -> Iterator[Cluster]:
    """Run a cluster of three in a folder of its own; sessions of QoS 1 have quorum queues.

    Args:
        folder: is made, and removed at the end.
        pki: its root is trusted, and its issuing CA signs the nodes' certificate.
        users: who may connect.
    """
    script = server_program()
    folder.mkdir()
    pki.issuing.server("localhost", HOST).write(folder / "server.pem")
    (folder / "root.pem").write_bytes(pki.root.pem)
    (folder / "definitions.json").write_text(json.dumps(definitions(users)))
    cookie = folder / ".erlang.cookie"
    cookie.touch(mode=0o600)
    cookie.write_text(secrets.token_hex(20))
    cookie.chmod(0o400)
    epmd_port = str(steady_port())
    started = Cluster(
        folder,
        [_node(folder, script, number, {"ERL_EPMD_PORT": epmd_port}) for number in (1, 2, 3)],
        subprocess.Popen([program("epmd", "erlang-base"), "-port", epmd_port, "-address", HOST]),
    )
    try:
        # One after the other: the plug-in's nodes agree on who has which client id, and some that first meet in
        # the middle of that wait for each other for ever.
        for node in started.nodes:
            node.start()
        yield started
    finally:
        started.close()


def _node(folder: Path, script: Path, number: int, environment: dict[str, str]) -> Node:
    name = f"rabbit{number}@localhost"
    own = folder / str(number)
    own.mkdir()
    files = {
        "CONFIG_FILE": "rabbitmq.conf",
        "ADVANCED_CONFIG_FILE": "advanced.config",
        "GENERATED_CONFIG_DIR": "generated",
        "ENABLED_PLUGINS_FILE": "plugins",
        "MNESIA_BASE": "mnesia",
        "LOG_BASE": "log",
        "FEATURE_FLAGS_FILE": "feature-flags",
        "PID_FILE": "pid",
        "CONF_ENV_FILE": "environment",
    }
    node = Node(
        name,
        own,
        script,
        environment
        | {f"RABBITMQ_{key}": str(own / value) for key, value in files.items()}
        | {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(folder),
            "ERL_EPMD_ADDRESS": HOST,
            "ERL_CRASH_DUMP": str(own / "erl_crash.dump"),
            "RABBITMQ_NODENAME": name,
            "RABBITMQ_DIST_PORT": str(steady_port()),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": _EMULATOR,
        },
    )
    (own / "rabbitmq.conf").write_text(
        SETTINGS.format(host=HOST, port=node.port, credentials=folder)
        + _OF_TESTS.format(definitions=folder / "definitions.json")
        + (_JOINS_THE_FIRST.format(name=name) if number > 1 else "")
    )
    (own / "plugins").write_text("[rabbitmq_mqtt,rabbitmq_auth_mechanism_ssl].\n")
    return node

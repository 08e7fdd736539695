"""A PostgreSQL of the tests' own: a cluster in a folder of theirs, reached by a socket in it.

Debian's package `postgresql` has the programs; the cluster that it makes and may have started is left alone.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from support.patience import PATIENCE_S
from support.programs import lacks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PORT = 5432
"""Of the socket's name only: nothing listens on the network."""
USER = "birthmark"


def programs() -> Path | None:
    """Return the folder of the newest server that is installed."""
    installed = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    if installed:
        return max(installed, key=lambda path: int(path.parts[4]))
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


def required() -> Path:
    """Return the programs' folder; skip the test without, but fail where everything must be there."""
    return programs() or lacks("PostgreSQL", "postgresql")


class Server:
    """A cluster, and its process.

    Args:
        durable: whether it writes to disk before it says that it has; without, it is faster.
    """

    def __init__(self, *, durable: bool = False) -> None:
        self._programs = required()
        # A short path: a socket's name has 107 octets at most.
        self.folder = Path(tempfile.mkdtemp(prefix="birthmark-pg-"))
        self._as = _somebody()
        self._schemas = 0
        self._durable = durable
        self._is_up = False
        if os.geteuid() == 0:
            os.chown(self.folder, self._as.pw_uid, self._as.pw_gid)
        self._run("initdb", "-D", self._data, "-U", USER, "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
        self.start()

    @property
    def _data(self) -> str:
        return str(self.folder / "data")

    def start(self) -> None:
        """Start the server, and return when it takes connections."""
        settings = [f"-c unix_socket_directories={self.folder}", "-c listen_addresses=''", "-c max_connections=50"]
        settings += ["-c shared_buffers=16MB", "-c fsync=" + ("on" if self._durable else "off")]
        log = str(self.folder / "log")
        self._run("pg_ctl", "-D", self._data, "-w", "-s", "-l", log, "-o", " ".join(settings), "start")
        self._is_up = True

    def stop(self, mode: str = "immediate") -> None:
        """Stop the server, as a crash does or (`fast`) as its service does."""
        self._is_up = False
        self._run("pg_ctl", "-D", self._data, "-w", "-s", "-m", mode, "stop")

    def restart(self, mode: str = "immediate") -> None:
        """Stop and start the server: every connection breaks."""
        self.stop(mode)
        self.start()

    def new_schema(self) -> str:
        """Make a schema, which costs less than a database of its own, and return the URL of a registry in it."""
        self._schemas += 1
        self.psql(f"CREATE SCHEMA s{self._schemas}")
        return f"postgresql://{USER}@/postgres?host={self.folder}&options=-csearch_path%3Ds{self._schemas}"

    def psql(self, *statements: str) -> str:
        """Run statements as the database's owner; return what they answer."""
        words = [word for statement in statements for word in ("-c", statement)]
        return self._run("psql", "-h", str(self.folder), "-U", USER, "-d", "postgres", "-qXAt", *words)

    def close(self) -> None:
        if self._is_up:
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> str:
        command: Sequence[str] = [str(self._programs / program), *arguments]
        who = {"user": self._as.pw_uid, "group": self._as.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
        done = subprocess.run(  # type: ignore[call-overload]
            command, capture_output=True, text=True, cwd=self.folder, timeout=PATIENCE_S, check=False, **who
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return str(done.stdout)


def _somebody() -> pwd.struct_passwd:
    """Return who runs the server: this user, or, because root may not, the package's or anybody else."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid())
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    return next(one for one in pwd.getpwall() if one.pw_uid != 0)


@contextlib.contextmanager
def running(*, durable: bool = False) -> Iterator[Server]:
    """A server for the block."""
    server = Server(durable=durable)
    try:
        yield server
    finally:
        server.close()

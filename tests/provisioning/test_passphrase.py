"""Where the passphrase comes from: a descriptor, the environment, a terminal; never an argument."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
from textwrap import indent
from typing import TYPE_CHECKING

import pytest
from support.patience import PATIENCE_S

from birthmark.device.errors import AuthorityError
from birthmark.provisioning.cli import parser
from birthmark.provisioning.passphrase import PassphraseSource

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for descriptor in (reader, writer):
        try:
            os.close(descriptor)
        except OSError:
            continue


@pytest.mark.parametrize(
    ("written", "read"),
    [(b"secret\n", b"secret"), (b"secret", b"secret"), (b"a b\r\nmore\n", b"a b"), (b" x \n", b" x ")],
)
def test_the_first_line_of_a_descriptor(pipe: tuple[int, int], written: bytes, read: bytes) -> None:
    os.write(pipe[1], written)
    os.close(pipe[1])
    assert PassphraseSource(descriptor=pipe[0]).read() == read


def test_a_descriptor_comes_before_the_environment(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIRTHMARK_PASSPHRASE", "environment")
    assert PassphraseSource().is_given
    assert PassphraseSource().read() == b"environment"
    os.write(pipe[1], b"descriptor\n")
    assert PassphraseSource(descriptor=pipe[0]).read() == b"descriptor"


@pytest.mark.parametrize("content", [b"", b"\n", b"x" * 5000])
def test_what_is_no_passphrase(pipe: tuple[int, int], content: bytes) -> None:
    os.write(pipe[1], content)
    os.close(pipe[1])
    with pytest.raises(AuthorityError, match="passphrase"):
        PassphraseSource(descriptor=pipe[0]).read()


def test_a_descriptor_that_is_not_open(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    with pytest.raises(AuthorityError, match="Bad file descriptor"):
        PassphraseSource(descriptor=pipe[0]).read()
    with pytest.raises(AuthorityError, match="no such descriptor"):
        PassphraseSource(descriptor=1 << 64).read()


SCRIPT = (
    "from birthmark.provisioning.passphrase import PassphraseSource\n"
    "from birthmark.device.errors import AuthorityError\n"
    "try: print('read:', PassphraseSource(confirm=True).read().decode())\n"
    "except AuthorityError as error: print(error.message)\n"
)


IN_A_SERVICE = (
    "from birthmark.device.stopping import stopping_on_signals\n"
    f"with stopping_on_signals():\n{indent(SCRIPT, ' ')}"
)
IN_A_THREAD = (
    f"import threading\ndef work():\n{indent(SCRIPT, ' ')}\n"
    "thread = threading.Thread(target=work)\nthread.start()\nthread.join()\n"
)


def asked(*answers: bytes, script: str = SCRIPT) -> tuple[str, bytes]:
    """Answer at a terminal's prompts; return what came of it, and what the terminal has shown."""
    leader, follower = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "BIRTHMARK_PASSPHRASE"}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=follower,
        stdout=subprocess.PIPE,
        stderr=follower,
        env=environment | {"PYTHONUTF8": "1"},
        start_new_session=True,
    )
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody is there any more
        prompts = (b"Passphrase of the CA: ", b"The same again: ")
        for prompt, answer in zip(prompts[: len(answers)], answers, strict=True):
            while prompt not in shown:
                shown += os.read(leader, 1024)
            os.write(leader, answer)
        while chunk := os.read(leader, 1024):
            shown += chunk
            if chunk.endswith(b": "):  # one more than was expected
                os.write(leader, b"\x04")
    assert process.stdout is not None
    told = process.stdout.read().decode()
    assert process.wait(timeout=PATIENCE_S) == 0, shown
    process.stdout.close()
    os.close(leader)
    return told, shown


@pytest.mark.parametrize(
    ("typed", "ends"),
    [((b"horse\n", b"horse\n"), "read: horse"), ((b"horse\n", b"house\n"), "differ"), ((b"\n", b"\n"), "empty")],
)
def test_a_terminal_is_asked_twice_and_echoes_nothing(typed: tuple[bytes, bytes], ends: str) -> None:
    told, shown = asked(*typed)
    assert ends in told
    assert b"horse" not in shown


@pytest.mark.parametrize("script", [IN_A_SERVICE, IN_A_THREAD], ids=["service", "thread"])
def test_nobody_is_asked_who_could_not_leave_by_ctrl_c(script: str) -> None:
    told, shown = asked(script=script)
    assert "asks nobody" in told
    assert b"Passphrase" not in shown


def test_a_prompt_that_is_left() -> None:
    assert "without an answer" in asked(b"\x04", b"\x04")[0]


def test_what_is_typed_in_another_encoding_is_quoted_nowhere() -> None:
    told, shown = asked(*["café\n".encode("latin-1")] * 2)
    assert "another encoding" in told
    assert b"0xe9" not in told.encode() + shown


def test_nobody_is_asked_without_an_input() -> None:
    command = ["/bin/sh", "-c", 'exec "$0" -c "$1" <&-', sys.executable, SCRIPT]
    environment = {name: value for name, value in os.environ.items() if name != "BIRTHMARK_PASSPHRASE"}
    assert b"there is no terminal" in subprocess.check_output(command, env=environment, timeout=PATIENCE_S)


def test_no_command_takes_it_as_an_argument() -> None:
    for words in (["init"], ["crl"], ["revoke", "x", "--reason", "lost"], ["issue-operator", "x"]):
        parsed = parser().parse_args(words)
        taken = {name for name in vars(parsed) if "pass" in name}
        assert taken <= {"passphrase_fd", "root_passphrase_fd"}
        assert taken

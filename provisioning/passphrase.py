"""Where a passphrase or a PIN comes from: a descriptor, the environment, a file, or a prompt. Never an argument.

Arguments show in the process list and in the shell's history. A file is one that the settings name, and that
others cannot read. A prompt is for who waits for the command, and can leave it with Ctrl-C: no service at work,
and no slot of a line, asks anybody.
"""

from __future__ import annotations

import getpass
import os
import signal
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from birthmark.device.errors import AuthorityError
from birthmark.provisioning.places import PASSPHRASE_VARIABLE

if TYPE_CHECKING:
    from pathlib import Path

ROOT_VARIABLE: Final = "BIRTHMARK_ROOT_PASSPHRASE"
ROOT_PROMPT: Final = "Passphrase of the root CA: "
NEW_VARIABLE: Final = "BIRTHMARK_NEW_PASSPHRASE"
PIN_VARIABLE: Final = "BIRTHMARK_TOKEN_PIN"
_WHAT, _OPTION = "passphrase", "--passphrase-fd"
_OTHERS: Final = 0o077
_MAX_OCTETS: Final = 4096


@dataclass(frozen=True, slots=True)
class PassphraseSource:
    """How to ask for a passphrase, once it is needed.

    Args:
        descriptor: read its first line, if given; else the environment `variable`; else the file; else prompt.
        variable: the environment variable.
        path: a file whose first line it is; None if there is none.
        what: what it is.
        prompt: what a person is asked.
        confirm: ask a person twice.
        option: the command's option for the descriptor, for hints.
    """

    descriptor: int | None = None
    variable: str = PASSPHRASE_VARIABLE
    prompt: str = "Passphrase of the CA: "
    confirm: bool = False
    option: str = _OPTION
    path: Path | None = None
    what: str = _WHAT

    @property
    def is_given(self) -> bool:
        """Whether nobody needs to be asked."""
        return self.descriptor is not None or self.variable in os.environ or self.path is not None

    def read(self) -> bytes:
        """Return the passphrase.

        Raises:
            AuthorityError: there is none, it is empty, or two entries differ.
        """
        if self.descriptor is not None:
            early = _early.pop(self.descriptor, None)
            passphrase = early.line() if early else _first_line(self.descriptor, self.what, self.option)
        elif self.variable in os.environ:
            passphrase = os.environb[self.variable.encode()]
        elif self.path is not None:
            passphrase = self._from_file(self.path)
        else:
            passphrase = self._prompted()
        if not passphrase:
            raise AuthorityError(
                f"could not use the {self.what}: it is empty",
                hint=f"give it by {self.variable}, by {self.option}, or at the prompt",
            )
        return passphrase

    def _prompted(self) -> bytes:
        if sys.stdin is None or not sys.stdin.isatty():  # None: it was closed, as a daemon's may be
            raise AuthorityError(
                f"could not ask for the {self.what}: there is no terminal",
                hint=f"set {self.variable}, or give {self.option} N",
            )
        if not may_ask():
            raise AuthorityError(
                f"could not ask for the {self.what}: what is at work asks nobody",
                hint=f"start it again, with {self.variable} or {self.option} N",
            )
        first = self._typed(self.prompt)
        if self.confirm and self._typed("The same again: ") != first:
            raise AuthorityError(f"could not use the {self.what}: the two entries differ", hint="try again")
        return first

    def _typed(self, prompt: str) -> bytes:
        """Ask a person. Of what cannot be read nothing is said: the system's word for it quotes octets of it."""
        try:
            return getpass.getpass(prompt).encode()
        except EOFError:
            cause, hint = "the prompt was left without an answer", "type it"
        except UnicodeError:
            cause, hint = "it was typed in another encoding than this locale's", "set the terminal to UTF-8"
        raise AuthorityError(
            f"could not read the {self.what}: {cause}",
            hint=f"{hint}; or set {self.variable}, or give {self.option} N",
        )

    def _from_file(self, path: Path) -> bytes:
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_mode & _OTHERS:
                    raise AuthorityError(
                        f"could not use the {self.what} in {path}: other users have access to it",
                        hint=f"chmod 400 {path}",
                    )
                return _first_line(file.fileno(), self.what, str(path))
        except OSError as error:
            raise AuthorityError(
                f"could not read the {self.what} from {path}: {error.strerror}",
                hint=f"run this as the user whose file it is, set {self.variable}, or give {self.option} N",
            ) from error


def may_ask() -> bool:
    """Whether Ctrl-C would end the command at a prompt: not in a thread of it, nor where it only notes signals."""
    is_noted = callable(handler := signal.getsignal(signal.SIGINT)) and handler is not signal.default_int_handler
    return threading.current_thread() is threading.main_thread() and not is_noted


class EarlyPassphrase(threading.Thread):
    """Reads the passphrase from a descriptor before it is asked for; who asks then gets this one, or its error.

    A thread that dies with the process: whatever feeds the descriptor may take its time.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(name="passphrase", daemon=True)
        self._descriptor = descriptor
        self._line = b""
        self._error: AuthorityError | None = None
        self.start()
        _early[descriptor] = self

    def run(self) -> None:
        """Read it."""
        try:
            self._line = _first_line(self._descriptor, _WHAT, _OPTION)
        except AuthorityError as error:
            self._error = error

    def line(self) -> bytes:
        """Return it once it is there; raises `AuthorityError` if it cannot be read."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._line


_early: Final[dict[int, EarlyPassphrase]] = {}
"""By descriptor: what is there to be read only once."""


def _first_line(descriptor: int, what: str, option: str) -> bytes:
    received = b""
    try:
        while b"\n" not in received and len(received) <= _MAX_OCTETS:
            chunk = os.read(descriptor, _MAX_OCTETS)
            if not chunk:
                break
            received += chunk
    except (OSError, OverflowError) as error:
        cause = error.strerror if isinstance(error, OSError) else "there is no such descriptor"
        raise AuthorityError(
            f"could not read the {what} from descriptor {descriptor}: {cause}",
            hint=f"for example: {option} 3 3< {what}-file",
        ) from error
    if len(received) > _MAX_OCTETS:
        raise AuthorityError(f"could not use the {what}: it is longer than 4096 bytes")
    return received.partition(b"\n")[0].removesuffix(b"\r")

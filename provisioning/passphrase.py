"""Where the CA's passphrase comes from: a file descriptor, the environment, or a prompt. Never an argument.

Arguments show in the process list and in the shell's history.
"""

from __future__ import annotations

import getpass
import os
import sys
from dataclasses import dataclass
from typing import Final

from birthmark.device.errors import AuthorityError

VARIABLE: Final = "BIRTHMARK_PASSPHRASE"
ROOT_VARIABLE: Final = "BIRTHMARK_ROOT_PASSPHRASE"
_MAX_OCTETS: Final = 4096


@dataclass(frozen=True, slots=True)
class PassphraseSource:
    """How to ask for a passphrase, once it is needed.

    Args:
        descriptor: read its first line, if given; else the environment `variable`; else prompt.
        variable: the environment variable.
        prompt: what a person is asked.
        confirm: ask a person twice.
        option: the command's option for the descriptor, for hints.
    """

    descriptor: int | None = None
    variable: str = VARIABLE
    prompt: str = "Passphrase of the CA: "
    confirm: bool = False
    option: str = "--passphrase-fd"

    @property
    def is_given(self) -> bool:
        """Whether nobody needs to be asked."""
        return self.descriptor is not None or self.variable in os.environ

    def read(self) -> bytes:
        """Return the passphrase.

        Raises:
            AuthorityError: there is none, it is empty, or two entries differ.
        """
        if self.descriptor is not None:
            passphrase = _first_line(self.descriptor)
        elif self.variable in os.environ:
            passphrase = os.environb[self.variable.encode()]
        else:
            passphrase = self._prompted()
        if not passphrase:
            raise AuthorityError("could not use the passphrase: it is empty", hint="choose a long one")
        return passphrase

    def _prompted(self) -> bytes:
        if not sys.stdin.isatty():
            raise AuthorityError(
                "could not ask for the passphrase: there is no terminal",
                hint=f"set {self.variable}, or give {self.option} N",
            )
        first = getpass.getpass(self.prompt)
        if self.confirm and getpass.getpass("The same again: ") != first:
            raise AuthorityError("could not use the passphrase: the two entries differ", hint="try again")
        return first.encode()


def _first_line(descriptor: int) -> bytes:
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
            f"could not read the passphrase from descriptor {descriptor}: {cause}",
            hint="for example: --passphrase-fd 3 3< passphrase-file",
        ) from error
    if len(received) > _MAX_OCTETS:
        raise AuthorityError("could not use the passphrase: it is longer than 4096 bytes")
    return received.partition(b"\n")[0].removesuffix(b"\r")

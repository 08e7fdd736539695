"""SoftHSM 2 for tests: tokens in a folder of their own, taken out and put back like a device."""

from __future__ import annotations

import contextlib
import os
import shutil
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.programs import lacks

from birthmark.provisioning.tokens.modules import PROCESS, library, unload
from birthmark.provisioning.tokens.pkcs11 import Pin, Token
from birthmark.provisioning.tokens.uri import TokenUri

if TYPE_CHECKING:
    from collections.abc import Iterator

PIN, SO_PIN, WRONG_PIN = b"135790", b"97531097", b"000000"
LABEL = "birthmark"
CONF_VARIABLE = "SOFTHSM2_CONF"
PLACES = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/*/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
    "/usr/local/lib/softhsm/libsofthsm2.so",
)


def module_path() -> Path:
    """Where SoftHSM's module is; without one the test is skipped, but not in CI."""
    return found_module() or lacks("softhsm2-util", "softhsm2")


def found_module() -> Path | None:
    """Where SoftHSM's module is; None if it is not installed."""
    found = [path for place in PLACES for path in Path("/").glob(place.lstrip("/"))]
    return found[0] if found and shutil.which("softhsm2-util") else None


@dataclass(frozen=True)
class SoftHsm:
    """A set of tokens; the environment says where it is."""

    folder: Path
    module: Path

    @property
    def tokens(self) -> Path:
        return self.folder / "tokens"

    def start(self) -> SoftHsm:
        """Make it the one that the environment names."""
        self.tokens.mkdir(parents=True, exist_ok=True)
        conf = self.folder / "softhsm2.conf"
        conf.write_text(f"directories.tokendir = {self.tokens}\nobjectstore.backend = file\nlog.level = ERROR\n")
        os.environ[CONF_VARIABLE] = str(conf)
        self.forget()
        return self

    def forget(self) -> None:
        """Be a new process, as far as tokens go."""
        with PROCESS.lock:
            PROCESS.run(lambda: unload(str(self.module)))
            PROCESS.refused.clear()

    def new_token(self, label: str) -> TokenUri:
        command = ["softhsm2-util", "--init-token", "--free", "--label", label, "--pin", PIN.decode()]
        subprocess.run([*command, "--so-pin", SO_PIN.decode()], check=True, capture_output=True, timeout=30)
        self.forget()
        return TokenUri(token=label)

    def take_out(self) -> None:
        """Take every token away."""
        self.tokens.rename(self.folder / "away")

    def put_back(self) -> None:
        (self.folder / "away").rename(self.tokens)

    def token(self, uri: TokenUri, pin: bytes = PIN, *, by_person: bool = False) -> Token:
        return Token(uri, self.module, Pin(lambda: pin, by_person=by_person))

    def key_uri(self, label: str) -> str:
        """What a command is told: token, key and module."""
        return f"pkcs11:token={label};object=issuing?module-path={self.module}"

    def raw_session(self, label: str) -> Any:
        """A session of python-pkcs11's own, for what birthmark would not do."""
        self.forget()
        return library().lib(str(self.module)).get_token(token_label=label).open(rw=True, user_pin=PIN.decode())


def clear_openssl_errors() -> None:
    """Empty OpenSSL's queue of this thread's errors.

    SoftHSM leaves "no such engine" in it, and Python's next TLS context would take that for its own. birthmark
    calls modules in a thread of their own for that reason; tests call them in theirs.
    """
    with contextlib.suppress(ssl.SSLError):
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).set_ciphers("none that there is")


def running(folder: Path, like: SoftHsm | None = None) -> Iterator[SoftHsm]:
    """SoftHSM in a folder, with copies of another one's tokens; the environment as it was, afterwards."""
    before = os.environ.get(CONF_VARIABLE)
    hsm = SoftHsm(folder, module_path())
    if like is not None:
        shutil.copytree(like.tokens, hsm.tokens)
    yield hsm.start()
    hsm.forget()
    clear_openssl_errors()
    if before is None:
        del os.environ[CONF_VARIABLE]
    else:
        os.environ[CONF_VARIABLE] = before


def with_a_token(folder: Path) -> SoftHsm:
    """Tokens to copy: an empty one, LABEL. Making one takes longer than anything that is done with it."""
    for hsm in running(folder):
        hsm.new_token(LABEL)
    return hsm

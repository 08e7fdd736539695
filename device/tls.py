"""TLS as a device speaks it: mutual, resumed where possible, and with the reason of every refusal kept.

Rules:

- TLS 1.2 at least. The broker's certificate must lead to one of the anchors in the bundle and to nothing else: the
  system's CAs are never loaded. Its name or address must be the one asked for, and RFC 5280 is held to strictly
  (VERIFY_X509_STRICT, the default of newer Pythons, on all of them).
- The validity of every certificate in the broker's chain is checked after each handshake, before the first byte of
  MQTT: OpenSSL does not check it when a session is resumed. Where this machine's clock is certainly wrong
  (`clock`), OpenSSL is told to leave validity alone, and this is the only check.
- An anchor is an anchor even if it is no root (partial chains): a device may be given an issuing CA to trust.
- TCP_NODELAY: MQTT's small packets must not wait for the acknowledgement of the one before.
- The session of the last good connection to a host is offered to the next one in this process (RFC 8446 §2.2).
  With TLS 1.3 its ticket comes after the handshake, so it is taken when the connection closes. A refusal forgets
  it: the next attempt is a full handshake, with a fresh verdict. Where Python leaks what it is taken from, it is
  taken from full handshakes alone, and offered for as long as the broker takes it.
- With TLS 1.3 the broker judges our certificate after our side of the handshake is done, so its alert arrives in a
  later read, where an MQTT library sees nothing but "connection lost". The socket keeps it.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import sys
from typing import TYPE_CHECKING, Any, Final, Self, cast

from birthmark.device.certificate_facts import certificate_facts
from birthmark.device.clock import Clock, Moment, out_of_time
from birthmark.device.errors import CredentialError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from birthmark.device.certificate_facts import CertificateFacts
    from birthmark.device.credentials import Credentials

HEAD_BYTES = 4
"""The length of a CONNACK, the first packet a broker sends (MQTT 3.1.1 §3.2)."""
X509_V_FLAG_NO_CHECK_TIME = 0x200000
"""OpenSSL's x509_vfy.h."""
_UNSPECIFIED = 1
"""X509_V_ERR_UNSPECIFIED, of the same header."""
_ENCODING_DER = 2


class OutOfTimeError(ssl.SSLCertVerificationError):
    """A certificate of the broker's chain is not valid at the moment that we know.

    Args:
        certificate: the first of them.
        moment: as far as we know the time.
    """

    def __init__(self, certificate: CertificateFacts, moment: Moment) -> None:
        super().__init__(1, "a certificate of the broker is out of time")
        self.certificate = certificate
        self.moment = moment


def is_alert(error: OSError) -> bool:
    """Whether `error` is the other side's TLS alert (RFC 8446 §6): its word on why it ended the connection."""
    return isinstance(error, ssl.SSLError) and "ALERT_" in (error.reason or "")


SESSION_LEAKS: Final = sys.version_info < (3, 12, 8) or (3, 13) <= sys.version_info < (3, 13, 1)
"""Whether `SSLSocket.session` leaks the session of the connection, 7 KB, once asked (CPython's gh-116810). Then a
device on a network that drops it all day would grow with every drop; to offer one ticket more than once is what
RFC 8446 C.4 advises against for the sake of those whom it would make recognisable: not a device at its gateway."""


class DeviceSocket(ssl.SSLSocket):
    """A TLS socket that remembers how it ended.

    Attributes:
        failure: what a read or a write failed with after the handshake; None while none did. An alert from the
            other side takes the place of a mere broken pipe.
        head: the first bytes that were read, at most `HEAD_BYTES`.
        ended: whether the other side closed the connection.
        chain: the broker's certificates, from the leaf to the anchor, after the handshake.
        moment: the time that they were checked by.
    """

    failure: OSError | None = None
    head: bytes = b""
    ended: bool = False
    chain: tuple[CertificateFacts, ...] = ()
    moment: Moment | None = None
    _usable: bool = False

    def do_handshake(self, block: bool = False) -> None:
        """Do the handshake and check the broker's validity; a socket whose handshake failed is closed.

        Raises:
            OutOfTimeError: a certificate of the broker is not valid.
        """
        try:
            super().do_handshake(block)
            self._check_time()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except BaseException:
            self._forget_session()
            self.close()
            raise
        self._usable = True

    def read(self, len: int = 1024, buffer: Any = None) -> Any:  # noqa: A002 - the standard library's name
        """Read, and keep what went wrong."""
        try:
            data = super().read(len, buffer)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except OSError as error:
            self._note(error)
            raise
        if isinstance(data, bytes):
            self.ended = self.ended or not data
            self.head = (self.head + data[:HEAD_BYTES])[:HEAD_BYTES]
        return data

    def send(self, data: Buffer, flags: int = 0) -> int:
        """Send, and keep what went wrong.

        A refused connection is often noticed by a write that fails; why it was refused is then still to be read.
        """
        try:
            return super().send(data, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except OSError as error:
            self._note(error)
            with contextlib.suppress(OSError, ValueError):
                while not self.ended:
                    self.read(HEAD_BYTES)
            raise

    def close(self) -> None:
        """Close, and keep the session for the next connection if this one was sound."""
        if self._usable:
            self._usable = False
            if self.failure is not None and is_alert(self.failure):
                self._forget_session()
            else:
                with contextlib.suppress(OSError, ValueError):
                    self._keep_session()
        super().close()

    def forget_session(self) -> None:
        """Let the next connection start with a full handshake: this one was refused above TLS."""
        self._usable = False
        self._forget_session()

    def _check_time(self) -> None:
        context = self.context
        if not isinstance(context, DeviceContext):
            return
        name, leaf_der = str(self.server_hostname), self.getpeercert(binary_form=True)
        if not self.session_reused:
            context.chains[name] = self._verified_chain()
        chain_der = context.chains.get(name, ())
        if not chain_der or chain_der[0] != leaf_der:
            raise ssl.SSLError(1, "the chain of the broker's certificate is not known")
        try:
            self.chain, self.moment = tuple(map(certificate_facts, chain_der)), context.moment
        except CredentialError as error:
            unreadable = ssl.SSLCertVerificationError(1, error.message)
            unreadable.verify_code, unreadable.verify_message = _UNSPECIFIED, error.message
            raise unreadable from error
        wrong = out_of_time(self.chain, self.moment)
        if wrong is not None:
            raise OutOfTimeError(wrong, self.moment)

    def _verified_chain(self) -> tuple[bytes, ...]:
        # Python 3.13 has it as a method of its own; before, it is one of the object beneath.
        found = cast("Any", self)._sslobj.get_verified_chain() or ()
        return tuple(certificate.public_bytes(_ENCODING_DER) for certificate in found)

    def _note(self, error: OSError) -> None:
        if self.failure is None or is_alert(error):
            self.failure = error

    def _keep_session(self) -> None:
        context, name = self.context, str(self.server_hostname)
        if not isinstance(context, DeviceContext):
            return
        if SESSION_LEAKS and self.session_reused and name in context.sessions:
            return
        session = self.session
        if session is not None and session.has_ticket:
            context.sessions[name] = session

    def _forget_session(self) -> None:
        context = self.context
        if isinstance(context, DeviceContext):
            context.sessions.pop(str(self.server_hostname), None)


class DeviceContext(ssl.SSLContext):
    """The TLS settings of one identity; keeps one session for each broker name."""

    sslsocket_class = DeviceSocket
    sessions: dict[str, ssl.SSLSession]
    chains: dict[str, tuple[bytes, ...]]
    """Of the last full handshake with each broker: OpenSSL does not show them again when a session is resumed."""
    clock: Clock
    moment: Moment
    """The time that the connection being made is checked by."""
    successor: DeviceContext | None = None
    """The one to use in this one's place: an MQTT library takes a context once, and credentials are renewed."""

    def __new__(cls) -> Self:
        """Make a client's context that trusts nobody yet."""
        context = super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)
        context.sessions, context.chains = {}, {}
        context.clock = Clock()
        context.moment = context.clock.moment()
        return context

    def wrap_socket(  # noqa: D102, PLR0917 - the standard library's method
        self,
        sock: socket.socket,
        server_side: bool = False,
        do_handshake_on_connect: bool = True,
        suppress_ragged_eofs: bool = True,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> DeviceSocket:
        if self.successor is not None:
            return self.successor.wrap_socket(
                sock, server_side, do_handshake_on_connect, suppress_ragged_eofs, server_hostname, session
            )
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.moment = self.clock.moment()
        if self.moment.or_later:
            self.verify_flags |= X509_V_FLAG_NO_CHECK_TIME
        else:
            self.verify_flags &= ~X509_V_FLAG_NO_CHECK_TIME
        wrapped = super().wrap_socket(
            sock,
            server_side=server_side,
            do_handshake_on_connect=do_handshake_on_connect,
            suppress_ragged_eofs=suppress_ragged_eofs,
            server_hostname=server_hostname,
            session=session or self.sessions.get(str(server_hostname)),
        )
        return cast(DeviceSocket, wrapped)


def device_context(credentials: Credentials, clock: Clock | None = None) -> DeviceContext:
    """Return the TLS settings of `credentials`.

    Args:
        credentials: who we are, and whom we trust.
        clock: what is known of the time; by default the system's clock.

    Raises:
        CredentialError: the key does not fit the certificate, or either cannot be used.
    """
    context = DeviceContext()
    if clock is not None:
        context.clock = clock
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        # As PEM: with DER, Python takes an error that OpenSSL still has from another connection for one of these.
        context.load_verify_locations(cadata="".join(map(ssl.DER_cert_to_PEM_cert, credentials.anchors_der)))
    except ssl.SSLError as error:
        raise CredentialError(
            f"could not use the trust anchors of {credentials.device_id}: {_reason(error)}",
            hint="the bundle or the CA's file is damaged: enrol again, or export the CA again",
        ) from error
    try:
        context.load_cert_chain(credentials.pem_path, password=_no_passphrase)
    except ssl.SSLError as error:
        raise CredentialError(
            f"could not use the key and certificate in {credentials.pem_path}: {_reason(error)}",
            hint="the file is damaged, or its key belongs to another certificate",
        ) from error
    except OSError as error:
        raise CredentialError(f"could not read {credentials.pem_path}: {error.strerror}") from error
    return context


def _no_passphrase() -> str:
    # Without this, OpenSSL asks for one on the terminal and waits.
    raise CredentialError(
        "could not use a private key: it is encrypted", hint="decrypt it into a file of mode 0600"
    )


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "unusable").replace("_", " ").lower()

"""A client that tries what it must not, packet by packet, and reports what it got; one process of the demo.

    prober.py BROKER --state DIR                 as an enrolled board
    prober.py BROKER --identity PEM --ca PEM     as a service, or as somebody of another CA
    prober.py BROKER --nobody --ca PEM           without any certificate

It reads a command a line on standard input and answers each with one JSON line:

    connect 1.2|1.3     a full handshake and an MQTT CONNECT; the TLS session is kept
    resume 1.2|1.3      the same with the kept session
    subscribe FILTER    publish TOPIC TEXT    leave

A refusal is an answer, not a failure: `{"accepted": false, "reason": ...}`. MQTT 3.1.1, sections 3.1 to 3.9.
"""

from __future__ import annotations

import argparse
import json
import socket
import ssl
import struct
import sys
from typing import TYPE_CHECKING, Any

from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.pem import read_blocks
from birthmark.device.tls import DeviceContext, device_context

if TYPE_CHECKING:
    from collections.abc import Sequence

_TIMEOUT_S = 5.0
_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK, DISCONNECT = 0x10, 0x20, 0x32, 0x40, 0x82, 0x90, 0xE0


def text(value: str) -> bytes:
    """Encode a string with its length before it (§1.5.3)."""
    data = value.encode()
    return struct.pack("!H", len(data)) + data


def packet(head: int, body: bytes) -> bytes:
    """Put a fixed header before a body of at most 16383 bytes (§2.2)."""
    length = len(body)
    size = bytes([length]) if length < 128 else bytes([length % 128 | 0x80, length // 128])
    return bytes([head]) + size + body


class Prober:
    """One identity's attempts at one broker.

    Args:
        broker: where to connect.
        credentials: who to be; None for nobody, without a certificate.
        anchors_der: what nobody trusts.
        client_id: what to say in CONNECT.
    """

    def __init__(self, broker: BrokerAddress, credentials: Credentials | None, anchors_der: bytes, client_id: str):
        self._broker = broker
        self._credentials = credentials
        self._anchors_der = anchors_der
        self._client_id = client_id
        self._contexts: dict[str, DeviceContext] = {}
        self._sessions: dict[str, ssl.SSLSession] = {}
        self._socket: ssl.SSLSocket | None = None

    def connect(self, version: str) -> dict[str, Any]:
        """Connect with a full handshake."""
        context = self._contexts[version] = self._context(version)
        return self._attempt(context, version, None)

    def resume(self, version: str) -> dict[str, Any]:
        """Connect with the session that `connect` got; a session belongs to its context, so that one again."""
        return self._attempt(self._contexts[version], version, self._sessions[version])

    def subscribe(self, topic_filter: str) -> dict[str, Any]:
        """Subscribe, and report the SUBACK's return code (128: refused)."""
        return self._exchange(
            packet(SUBSCRIBE, struct.pack("!H", 1) + text(topic_filter) + b"\x01"), SUBACK, topic_filter
        )

    def publish(self, topic: str, message: str) -> dict[str, Any]:
        """Publish at QoS 1, and report whether it was acknowledged."""
        return self._exchange(
            packet(PUBLISH, text(topic) + struct.pack("!H", 2) + message.encode()), PUBACK, topic
        )

    def leave(self) -> dict[str, Any]:
        """Disconnect as a client should, and keep the TLS session."""
        if self._socket is not None:
            self._socket.sendall(packet(DISCONNECT, b""))
            self._socket.close()
            self._socket = None
        return {"left": True}

    def _attempt(self, context: ssl.SSLContext, version: str, session: ssl.SSLSession | None) -> dict[str, Any]:
        answer: dict[str, Any] = {
            "tls": version,
            "resumed": False,
            "accepted": False,
            "connack": None,
            "reason": "",
        }
        try:
            raw = socket.create_connection((self._broker.host, self._broker.port), _TIMEOUT_S)
            with raw:
                tls = context.wrap_socket(raw, server_hostname=self._broker.host, session=session)
            self._socket = tls
            answer["resumed"] = bool(tls.session_reused)
            flags = b"\x02\x00\x3c"  # a clean session, 60 s
            tls.sendall(packet(CONNECT, text("MQTT") + b"\x04" + flags + text(self._client_id)))
            code = self._receive(CONNACK)[1]
            answer.update(connack=code, accepted=code == 0, reason="" if code == 0 else f"CONNACK {code}")
            if code == 0 and tls.session is not None:
                self._sessions[version] = tls.session
        except (OSError, EOFError) as error:
            answer["reason"] = getattr(error, "reason", None) or str(error) or type(error).__name__
        if not answer["accepted"] and self._socket is not None:
            self._socket.close()
            self._socket = None
        return answer

    def _exchange(self, request: bytes, wanted: int, topic: str) -> dict[str, Any]:
        if self._socket is None:
            return {"topic": topic, "reason": "not connected"}
        try:
            self._socket.sendall(request)
            body = self._receive(wanted)
        except (OSError, EOFError) as error:
            return {"topic": topic, "acknowledged": False, "reason": str(error) or type(error).__name__}
        return {"topic": topic, "acknowledged": True, "code": body[2] if wanted == SUBACK else 0}

    def _receive(self, wanted: int) -> bytes:
        """Return the body of the next packet of one kind; others are skipped."""
        while True:
            head = self._exactly(1)[0]
            length, shift = 0, 0
            while True:
                byte = self._exactly(1)[0]
                length |= (byte & 0x7F) << shift
                shift += 7
                if byte < 128:
                    break
            body = self._exactly(length)
            if head & 0xF0 == wanted & 0xF0:
                return body

    def _exactly(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            part = self._socket.recv(length - len(data)) if self._socket is not None else b""
            if not part:
                raise EOFError("the broker closed the connection")
            data += part
        return data

    def _context(self, version: str) -> DeviceContext:
        if self._credentials is not None:
            context = device_context(self._credentials)
        else:
            context = DeviceContext()
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            context.load_verify_locations(cadata=self._anchors_der)
        context.minimum_version = context.maximum_version = _VERSIONS[version]
        return context


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer commands until standard input ends."""
    parser = argparse.ArgumentParser(description="Try what a client must not.")
    parser.add_argument("broker", type=BrokerAddress.parse)
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--state")
    who.add_argument("--identity")
    who.add_argument("--nobody", action="store_true")
    parser.add_argument("--ca", help="the CA that the broker's certificate must lead to")
    chosen = parser.parse_args(arguments)

    credentials, anchors_der = None, b""
    if chosen.state:
        credentials = Credentials.from_folder(chosen.state, broker=chosen.broker)
    elif chosen.identity:
        credentials = Credentials.from_files(chosen.identity, chosen.ca, chosen.broker)
    else:
        with open(chosen.ca, "rb") as file:  # noqa: PTH123 - one line, as everywhere in the standard library
            anchors_der = b"".join(der for _, der in read_blocks(file.read()))
    client_id = str(credentials.device_id) if credentials else "nobody"
    prober = Prober(chosen.broker, credentials, anchors_der, client_id)
    actions = {name: getattr(prober, name) for name in ("connect", "resume", "subscribe", "publish", "leave")}
    for line in sys.stdin:
        name, *words = line.split(maxsplit=2)
        print(json.dumps({"did": name, **actions[name](*words)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

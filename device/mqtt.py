"""The one place that knows paho-mqtt: MQTT 3.1.1 over one TLS connection at a time.

Rules:

- Everything but `wake` belongs to one thread, the one that calls `open` and `turn`. paho's own threads, its
  reconnecting and its downgrade to MQTT 3.1 are not used: they cannot be told to wait, nor why they failed.
- A QoS 1 message is acknowledged by `acknowledge`, after its callback ran, not when it arrives.
- How a connection ended is read from our own socket (`Ending`): paho reports everything as one error.
"""

from __future__ import annotations

import contextlib
import select
import socket
from typing import TYPE_CHECKING, Any, Protocol

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion

from birthmark.device.dialling import dial
from birthmark.device.frozen import Frozen
from birthmark.device.received import Message
from birthmark.device.tls import DeviceSocket

if TYPE_CHECKING:
    from collections.abc import Sequence

    from birthmark.device.credentials import BrokerAddress
    from birthmark.device.publication import Outgoing
    from birthmark.device.tls import DeviceContext

MAX_PACKETS_PER_TURN = 64
MAX_TURN_S = 5.0

topic_matches = paho.topic_matches_sub


class Listener(Protocol):
    """Who is told what the broker says; called on the thread that calls `turn`."""

    def mqtt_connected(self, *, session_present: bool) -> None:
        """CONNACK 0 came."""

    def mqtt_message(self, packet_id: int, message: Message) -> None:
        """A message came; with QoS 1 it must be acknowledged by its packet id."""

    def mqtt_published(self, packet_id: int) -> None:
        """A message of ours was acknowledged (QoS 1) or written (QoS 0)."""

    def mqtt_subscribed(self, packet_id: int, granted: Sequence[bool]) -> None:
        """A SUBSCRIBE of ours was answered, filter by filter."""


class Ending(Frozen):
    """How a connection ended."""

    connected: bool
    """Whether CONNACK 0 had come."""
    failure: OSError | None
    """What the socket failed with; None if it was closed in order."""
    answer: bytes
    """The first bytes the broker sent."""
    fell_silent: bool
    """Whether the keepalive ran out."""
    broke_mqtt: bool = False
    """Whether the broker sent what MQTT does not know."""

    @property
    def connack_code(self) -> int | None:
        """The return code of the CONNACK, if the first packet was one."""
        return self.answer[3] if len(self.answer) >= 4 and self.answer[:2] == b"\x20\x02" else None


class _Paho(paho.Client):
    """paho, with a connection that does not wait for one address after the other."""

    def _create_socket_connection(self) -> socket.socket:
        return dial(self._host, self._port, timeout_s=self._connect_timeout)


class MqttLink:
    """MQTT 3.1.1 on paho, one connection after the other.

    Args:
        client_id: as the broker binds it to the certificate.
        clean_session: whether the broker forgets subscriptions and queued messages between connections.
        context: the TLS settings.
        connect_timeout_s: for TCP and TLS each.
        listener: is told what the broker says.
    """

    def __init__(
        self,
        *,
        client_id: str,
        clean_session: bool,
        context: DeviceContext,
        connect_timeout_s: float,
        listener: Listener,
    ) -> None:
        self._keepalive_s = 0
        self._context = context
        self._listener = listener
        self._socket: DeviceSocket | None = None
        self._connected = False
        self._fell_silent = False
        self._broke_mqtt = False
        self._is_cut = False
        self._wake_reader: socket.socket | None = None
        self._wake_writer: socket.socket | None = None
        self._paho = client = _Paho(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=clean_session,
            protocol=MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.tls_set_context(context)
        client.connect_timeout = connect_timeout_s
        client.on_connect = self._on_connect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        # With this set, paho queues what it has to write instead of writing it at once: `turn` writes.
        client.on_socket_register_write = _leave_writing_to_turn

    def prepare(self) -> None:
        """Take what the link needs as long as it lives; `release` gives it back."""
        reader, writer = socket.socketpair()
        reader.settimeout(0)
        writer.settimeout(0)
        self._wake_reader, self._wake_writer = reader, writer

    def use(self, context: DeviceContext) -> None:
        """Take other TLS settings from the next connection on."""
        self._context.successor = context

    def open(self, broker: BrokerAddress, *, keepalive_s: int, will: Outgoing | None) -> DeviceSocket:
        """Connect, do the TLS handshake and queue CONNECT; blocks for name resolution and the two time-outs.

        Args:
            broker: where; its certificate must be for this host.
            keepalive_s: the longest silence.
            will: what the broker says when we are lost.

        Raises:
            OSError, UnicodeError: as the name resolution, the socket or TLS failed.
        """
        self._connected = self._fell_silent = self._broke_mqtt = self._is_cut = False
        self._socket = None
        if will is not None:
            self._paho.will_set(will.topic, will.payload, will.qos, will.retain)
        self._keepalive_s = keepalive_s
        self._paho.connect_async(broker.host, broker.port, keepalive_s)
        self._paho.reconnect()
        opened = self._paho.socket()
        if not isinstance(opened, DeviceSocket):
            raise TypeError("paho did not use our TLS context")
        self._socket = opened
        return opened

    def turn(self, timeout_s: float, *, reading: bool = True) -> bool:
        """Wait for something to do, do it, and return whether the connection is still there.

        Args:
            timeout_s: the longest wait; `wake` ends it.
            reading: whether to read what the broker sends; pings are sent and answers waited for in any case.
        """
        current, waker = self._socket, self._wake_reader
        if current is None or waker is None or not self._is_open:
            return False
        poll = select.poll()
        poll.register(waker, select.POLLIN)
        interest = (select.POLLIN if reading else 0) | (select.POLLOUT if self._paho.want_write() else 0)
        poll.register(current, interest)
        buffered = reading and current.pending() > 0
        longest_s = 0.0 if buffered else min(timeout_s, MAX_TURN_S, self._keepalive_s / 4)
        ready = dict(poll.poll(longest_s * 1000))
        if waker.fileno() in ready:
            _drain(waker)
        if buffered or ready.get(current.fileno(), 0) & ~select.POLLOUT:
            self._read(current)
        if self._is_open and self._paho.want_write():
            self._paho.loop_write()
        if self._is_open:
            self._paho.loop_misc()
            self._fell_silent = not self._is_open
        return self._is_open

    @property
    def _is_open(self) -> bool:
        return not self._is_cut and self._paho.socket() is not None

    def wake(self) -> None:
        """End the wait of `turn`; from any thread."""
        writer = self._wake_writer
        if writer is not None:
            # It fails when the wakes before this one were not yet seen, or when the link is released: never mind.
            with contextlib.suppress(OSError):
                writer.send(b"\0")

    def publish(self, outgoing: Outgoing) -> int:
        """Queue a PUBLISH and return its packet id; with QoS 1 it goes out again after a reconnect."""
        return self._paho.publish(outgoing.topic, outgoing.payload, outgoing.qos, outgoing.retain).mid

    def subscribe(self, filters: Sequence[tuple[str, int]]) -> int:
        """Queue a SUBSCRIBE for (filter, QoS) pairs and return its packet id."""
        _, packet_id = self._paho.subscribe(list(filters))
        return packet_id or 0

    def unsubscribe(self, topic_filter: str) -> None:
        """Queue an UNSUBSCRIBE."""
        self._paho.unsubscribe(topic_filter)

    def acknowledge(self, packet_id: int) -> None:
        """Queue the PUBACK of a message with QoS 1."""
        self._paho.ack(packet_id, 1)

    def leave(self) -> None:
        """Queue DISCONNECT; `turn` writes it and then closes."""
        self._paho.disconnect()

    def cut(self, *, refused: bool = False) -> None:
        """Close the connection at once, without a word; after a refusal its TLS session is not used again."""
        if self._socket is not None:
            if refused:
                self._socket.forget_session()
            self._socket.close()
        self._is_cut = True  # paho lets go of the closed socket when it opens the next

    def ending(self) -> Ending:
        """Say how the last connection ended, once `turn` has returned False or `cut` was called."""
        current = self._socket
        return Ending(
            connected=self._connected,
            failure=current.failure if current else None,
            answer=current.head if current else b"",
            fell_silent=self._fell_silent,
            broke_mqtt=self._broke_mqtt,
        )

    def release(self) -> None:
        """Close what is open; the link is done."""
        self.cut()
        for end in (self._wake_reader, self._wake_writer):
            if end is not None:
                end.close()

    def _read(self, current: DeviceSocket) -> None:
        try:
            for _ in range(MAX_PACKETS_PER_TURN):
                result = self._paho.loop_read()
                self._broke_mqtt = result == MQTTErrorCode.MQTT_ERR_PROTOCOL
                if self._paho.socket() is None or current.pending() == 0:
                    return
        except Exception:  # noqa: BLE001 - bytes that are no MQTT end in any exception inside paho
            self._broke_mqtt = True
            self.cut()

    def _on_connect(self, _client: Any, _data: Any, flags: paho.ConnectFlags, reason: Any, _more: Any) -> None:
        if not reason.is_failure:
            self._connected = True
            self._listener.mqtt_connected(session_present=bool(flags.session_present))

    def _on_message(self, _client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        self._listener.mqtt_message(
            message.mid, Message(message.topic, bytes(message.payload), message.qos, message.retain)
        )

    def _on_publish(self, _client: Any, _data: Any, packet_id: int, _reason: Any, _more: Any) -> None:
        self._listener.mqtt_published(packet_id)

    def _on_subscribe(self, _client: Any, _data: Any, packet_id: int, reasons: Any, _more: Any) -> None:
        self._listener.mqtt_subscribed(packet_id, [not reason.is_failure for reason in reasons])


def _drain(waker: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while waker.recv(4096):
            pass


def _leave_writing_to_turn(_client: Any, _data: Any, _socket: Any) -> None:
    """Nothing: `turn` asks paho whether it wants to write."""

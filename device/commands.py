"""What a device does with a command: its handler, at most once, in time, and with a reply.

Rules (docs/device-library.md):

- A request (`requests`) is begun at most once, however often it arrives: QoS 1 may deliver it again, and a device
  that reboots on command finds it waiting when it is back. Its id is on disk before its handler runs, if there is
  a state folder, and is remembered until the request has expired.
- One that has expired is not begun. Neither is one that expires more than `MAX_AHEAD_S` from now: its id could not
  be remembered for as long as that.
- Every request gets a reply. A repetition gets the same one again; if there was none yet, because the device
  stopped before it was over, `interrupted`.
- A plain command runs as often as it arrives, and is answered if its handler returns something.
- A retained request is nobody's: it is left alone.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, NamedTuple

from birthmark.device import requests, topics
from birthmark.device.durable import write_durably
from birthmark.device.errors import BirthmarkError, LocalProtocolError, RemoteProtocolError
from birthmark.device.escape import escaped, quoted
from birthmark.device.publication import Outgoing, as_bytes
from birthmark.device.received import Command

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from pathlib import Path

    from birthmark.device.identity import DeviceId
    from birthmark.device.publication import Payload
    from birthmark.device.received import Message
    from birthmark.device.requests import Request

    CommandHandler = Callable[[Command], Payload | None]

MAX_AHEAD_S = 86_400.0
MAX_KEPT_REPLY_BYTES = 4096
"""A longer one is sent once; a repetition of its request is only told how it ended."""
MAX_REMEMBERED = 256
"""Requests that have not expired; one more is answered `busy`."""
BEGUN_NAME = "requests.json"

_log = logging.getLogger("birthmark.device")


class CommandFailedError(BirthmarkError):
    """A command was not carried out. A handler raises it with words that whoever asked may read."""


class _Begun(NamedTuple):
    expires: float
    reply: tuple[str, bytes] | None = None
    """Outcome and payload; None while it runs, and for ever if the device stopped meanwhile."""


class Commands:
    """A device's handlers of commands.

    Args:
        device_id: whose.
        publish: sends a reply: topic and payload.
        failed: is told of a handler that raised: the topic of its command, and what it raised.
        now: the clock.
        folder: where what was begun is remembered across restarts; None: only as long as this process lives.
    """

    def __init__(
        self,
        device_id: DeviceId,
        *,
        publish: Callable[[str, bytes], object],
        failed: Callable[[str, Exception], object],
        now: Callable[[], datetime],
        folder: Path | None,
    ) -> None:
        self._device_id = device_id
        self._publish = publish
        self._failed = failed
        self._now = now
        self._path = folder / BEGUN_NAME if folder else None
        self._handlers: dict[str, CommandHandler] = {}
        self._begun: dict[str, _Begun] | None = None

    def add(self, name: str, handler: CommandHandler) -> None:
        """Have `handler` carry out the command `name`; `#`: every command that has no other.

        Raises:
            LocalProtocolError: a command cannot have that name.
        """
        if name != "#":
            Outgoing(topics.command(self._device_id, name), b"")  # a name that is part of a topic
            if not name or name.rpartition("/")[2].startswith("?"):
                raise LocalProtocolError(f"could not name a command {quoted(name)}: it is empty or a request")
        self._handlers[name] = handler

    def take(self, message: Message) -> None:
        """Carry out what a message on `devices/{id}/commands/#` asks for."""
        text = message.topic.removeprefix(topics.command(self._device_id, ""))
        try:
            name, request = requests.split(text)
        except RemoteProtocolError as error:
            _log.warning("a command was left alone: %s", error.message)
            return
        if request is None:
            self._run_plain(name, message)
        elif message.retained:
            _log.warning("a request of %s was left alone: it is retained", escaped(name))
        else:
            self._run_request(name, request, message)

    def _run_plain(self, name: str, message: Message) -> None:
        handler = self._handler(name)
        if handler is not None:
            answer = handler(_command(message, name, None))
            if answer is not None:
                self._publish(topics.reply(self._device_id, name), as_bytes(answer))

    def _run_request(self, name: str, request: Request, message: Message) -> None:
        outcome, payload = self._outcome(name, request, message)
        self._publish(topics.reply(self._device_id, requests.reply_name(name, request.id, outcome)), payload)

    def _outcome(self, name: str, request: Request, message: Message) -> tuple[str, bytes]:
        now = self._now().timestamp()
        if not now < request.expires <= now + MAX_AHEAD_S:
            when = "has expired" if request.expires <= now else "expires too far ahead"
            return requests.EXPIRED, _told(f"it {when}, by the device's clock", clock=now, expires=request.expires)
        begun = self._remembered(now)
        before = begun.get(request.id)
        if before is not None:
            again = _told("it was begun before, and the device stopped before it was over; it is not begun again")
            return before.reply or (requests.INTERRUPTED, again)
        handler = self._handler(name)
        if handler is None:
            return requests.UNKNOWN, _told("no such command", commands=sorted(self._handlers))
        if len(begun) >= MAX_REMEMBERED:
            return requests.BUSY, _told(f"{len(begun)} requests have not expired yet")
        begun[request.id] = _Begun(request.expires)
        try:
            self._remember(begun)
        except OSError as error:
            del begun[request.id]
            _log.error("a request of %s was not begun: could not note it: %s", escaped(name), error.strerror)
            return requests.BUSY, _told("the device could not note that it began")
        reply = self._carried_out(handler, _command(message, name, request), request)
        outcome, payload = reply
        kept = payload if len(payload) <= MAX_KEPT_REPLY_BYTES else _told("it was sent before, and is not kept")
        begun[request.id] = _Begun(request.expires, (outcome, kept))
        return reply

    def _carried_out(self, handler: CommandHandler, command: Command, request: Request) -> tuple[str, bytes]:
        try:
            answer = handler(command)
            payload = b"" if answer is None else as_bytes(answer)
        except CommandFailedError as error:
            return requests.FAILED, _told(error.message)
        except Exception as error:  # noqa: BLE001 - it is somebody else's code; it is reported
            _log.exception("the command %s failed", escaped(command.name))
            self._failed(command.topic, error)
            # What cannot be read, its sender is told. Any other text is for the log: nobody wrote it to be read by
            # others.
            told = error.message if isinstance(error, RemoteProtocolError) else type(error).__name__
            return requests.FAILED, _told(told)
        is_late = self._now().timestamp() > request.expires
        return requests.LATE if is_late else requests.DONE, payload

    def _handler(self, name: str) -> CommandHandler | None:
        return self._handlers.get(name) or self._handlers.get("#")

    def _remembered(self, now: float) -> dict[str, _Begun]:
        """Return what was begun and has not expired."""
        if self._begun is None:
            self._begun = self._read()
        self._begun = {key: one for key, one in self._begun.items() if one.expires > now}
        return self._begun

    def _read(self) -> dict[str, _Begun]:
        if self._path is None:
            return {}
        try:
            noted = json.loads(self._path.read_bytes())
            return {str(key): _Begun(float(expires)) for key, expires in noted.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            _log.warning("could not read what was begun before, in %s: %s", self._path, type(error).__name__)
            return {}

    def _remember(self, begun: dict[str, _Begun]) -> None:
        if self._path is not None:
            write_durably(self._path, json.dumps({key: one.expires for key, one in begun.items()}).encode())


def _command(message: Message, name: str, request: Request | None) -> Command:
    return Command(
        topic=message.topic,
        payload=message.payload,
        qos=message.qos,
        retained=message.retained,
        name=name,
        request_id=request.id if request else None,
        expires=request.expires if request else None,
    )


def _told(error: str, **facts: object) -> bytes:
    return json.dumps({"error": error, **facts}).encode()

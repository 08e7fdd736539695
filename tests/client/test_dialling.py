"""One address that leads nowhere does not keep a device from the next, of either family."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING

import pytest
from support.ports import steady_port

from birthmark.device.dialling import MAX_ADDRESSES, dial, in_turn

if TYPE_CHECKING:
    from collections.abc import Iterator

V4, V6 = socket.AF_INET, socket.AF_INET6


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[str, int]]]:
    """What the resolver says, to be filled."""
    addresses: list[tuple[int, tuple[str, int]]] = []

    def answer(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        assert (host, port) == ("gw.example.com", 8883)
        return [(family, socket.SOCK_STREAM, 6, "", address) for family, address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return addresses


@contextlib.contextmanager
def listening(host: str = "127.0.0.1", backlog: int = 5) -> Iterator[int]:
    family = V6 if ":" in host else V4
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen(backlog)
        yield listener.getsockname()[1]


@contextlib.contextmanager
def answering_nobody() -> Iterator[int]:
    """A port whose queue is full: the kernel drops what comes, as a firewall does."""
    with listening(backlog=0) as port, contextlib.ExitStack() as queue:
        for _ in range(3):
            waiting = queue.enter_context(socket.socket())
            waiting.settimeout(0)
            waiting.connect_ex(("127.0.0.1", port))
        yield port


def peer_of(host: str = "gw.example.com", timeout_s: float = 5.0) -> tuple[str, int]:
    with dial(host, 8883, timeout_s=timeout_s) as connected:
        assert connected.gettimeout() == timeout_s
        name, port, *_ = connected.getpeername()
        return name, port


def test_an_address_that_refuses_costs_nothing(resolved: list[tuple[int, tuple[str, int]]]) -> None:
    with listening() as port:
        resolved += [(V4, ("127.0.0.1", steady_port())), (V4, ("127.0.0.1", port))]
        assert peer_of() == ("127.0.0.1", port)


def test_one_that_does_not_answer_is_not_waited_for(resolved: list[tuple[int, tuple[str, int]]]) -> None:
    with answering_nobody() as silent, listening() as port:
        resolved += [(V4, ("127.0.0.1", silent)), (V4, ("127.0.0.1", port))]
        assert peer_of(timeout_s=60) == ("127.0.0.1", port)  # a test that waited for the first would time out


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_both_families(resolved: list[tuple[int, tuple[str, int]]]) -> None:
    with contextlib.ExitStack() as stack:
        try:
            six = stack.enter_context(listening("::1"))
        except OSError:
            pytest.skip("no IPv6 on loopback")
        four = stack.enter_context(listening())
        resolved += [(V6, ("::1", six)), (V4, ("127.0.0.1", four))]
        assert peer_of() == ("::1", six)
        resolved[0] = (V6, ("::1", steady_port()))
        assert peer_of() == ("127.0.0.1", four)


def test_the_last_word_of_those_that_failed(resolved: list[tuple[int, tuple[str, int]]]) -> None:
    with answering_nobody() as silent:
        resolved.append((V4, ("127.0.0.1", silent)))
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            dial("gw.example.com", 8883, timeout_s=0.3)
        assert time.monotonic() - begun >= 0.3
        resolved.append((V4, ("127.0.0.1", steady_port())))
        with pytest.raises(ConnectionRefusedError):
            dial("gw.example.com", 8883, timeout_s=2)


def test_no_socket_is_left_open(resolved: list[tuple[int, tuple[str, int]]]) -> None:
    with answering_nobody() as silent, listening() as port:
        resolved += [(V4, ("127.0.0.1", silent)), (V4, ("127.0.0.1", port))]
        peer_of()  # a socket that was forgotten is a ResourceWarning, and a warning is an error


def test_the_families_take_turns() -> None:
    four = [(V4, (f"192.0.2.{number}", 1)) for number in range(9)]
    six = [(V6, ("2001:db8::1", 1, 0, 0))]
    assert in_turn([*four, *six, *four]) == [four[0], six[0], *four[1 : MAX_ADDRESSES - 1]]

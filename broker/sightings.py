"""Who connected, when and from where: what a gateway remembers of each identity, for `birthmark doctor`.

Rules:

- A connect costs a look at one entry. What is to be said is said by the gateway's own round, once a second, a few
  hundred identities at most at a time: ten thousand devices that come back at once are told of within a minute.
- Said as retained messages of the broker's own on `gateway/{name}/seen/{id}`, which survive a restart as all
  retained messages do: at once when an identity, its certificate or its address is new, at most once a minute for
  one identity, and else once a day. A crash loses at most what was not yet said.
- Addresses are those of the certificate in use; a new certificate begins with none. The last few are kept. Who is
  let in to renew what has expired does not count: that certificate is not in use.
- Whoever did not come for `FORGOTTEN_AFTER_S` is forgotten.
- In a fleet each is said with its visit (`fleet/visits.py`), and a new visit as the client is let in, however
  short a time ago it was told of: other gateways go by it. Of a crowd, who is beyond a round's count waits for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from birthmark.broker.fleet.visits import Visit
from birthmark.device.errors import RemoteProtocolError
from birthmark.device.messages import AddressSeen, Sighting
from birthmark.device.topics import gateway_seen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from birthmark.broker.fleet.visits import Visits
    from birthmark.broker.peer import Peer
    from birthmark.device.identity import BrokerName

MAX_ADDRESSES: Final = 8
MIN_INTERVAL_S: Final = 60.0
DAY_S: Final = 86_400.0
FORGOTTEN_AFTER_S: Final = 400 * DAY_S
"""Longer than a certificate that is renewed once a year goes unused."""
MAX_TOLD_AT_ONCE: Final = 250


class _Known:
    """What is known of one identity. `addresses` is in the order of their last use."""

    __slots__ = ("addresses", "cert_serial", "first_s", "last_s", "name", "said_s")

    def __init__(self, name: str, cert_serial: str, seen_s: float) -> None:
        self.name = name
        self.cert_serial = cert_serial
        self.first_s = self.last_s = seen_s
        self.said_s: float | None = None
        """When it was last said; None: not yet."""
        self.addresses: dict[str, tuple[float, float]] = {}

    def saw(self, cert_serial: str, host: str, now_s: float) -> bool:
        """Take note of a connection; return whether certificate or address differ from the last one's."""
        self.last_s = now_s
        if cert_serial != self.cert_serial:
            self.cert_serial = cert_serial
            self.addresses = {}
        is_last = bool(self.addresses) and next(reversed(self.addresses)) == host
        first_s, _ = self.addresses.pop(host, (now_s, now_s))
        self.addresses[host] = (first_s, now_s)
        if len(self.addresses) > MAX_ADDRESSES:
            del self.addresses[next(iter(self.addresses))]
        return not is_last

    def message(self, visit: Visit) -> Sighting:
        addresses = tuple(AddressSeen(host, *times) for host, times in self.addresses.items())
        return Sighting(self.name, self.cert_serial, self.first_s, self.last_s, addresses, *visit)


class Sightings:
    """Everybody that a gateway has seen.

    Args:
        gateway: its name.
        publish: retains a message of the broker's own.
        visits: where identities are in a fleet; None where there is no fleet.
    """

    def __init__(
        self, gateway: BrokerName, publish: Callable[[str, bytes], None], visits: Visits | None = None
    ) -> None:
        self._gateway = gateway
        self._publish = publish
        self._visits = visits
        self._known: dict[str, _Known] = {}
        self._due: dict[str, bool] = {}
        """Whom to tell of, and whether however short a time ago that was done."""
        self._told_since_round = 0

    def take_up(self, payloads: Iterable[bytes]) -> None:
        """Begin with what was said before a restart; what cannot be read is left out."""
        for payload in payloads:
            try:
                told = Sighting.from_bytes(payload)
            except RemoteProtocolError:
                continue
            known = _Known(told.id, told.cert_serial, told.first_seen)
            known.last_s = known.said_s = told.last_seen
            for seen in told.addresses[-MAX_ADDRESSES:]:
                known.addresses[seen.address] = (seen.first_seen, seen.last_seen)
            self._known[told.id.lower()] = known
            if self._visits is not None:
                self._visits.take_up(told.id.lower(), Visit(told.visit, told.moved_to))

    def saw(self, peer: Peer, address: str, now_s: float) -> None:
        """Take note of a client that was let in.

        Args:
            peer: who it is.
            address: `host:port`, an IPv6 host in brackets.
            now_s: seconds since 1970.
        """
        key, cert_serial = peer.device_id.folded, f"{peer.cert_serial:x}"
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = _Known(str(peer.device_id), cert_serial, now_s)
        has_changed = known.saw(cert_serial, address.rpartition(":")[0].strip("[]"), now_s)
        # A clock that went back says it again, rather than never.
        if has_changed or known.said_s is None or not 0 <= now_s - known.said_s < DAY_S:
            self._due.setdefault(key, False)
        if self._visits is not None and not peer.is_service and self._visits.arrived(key):
            self._due[key] = True
            if self._told_since_round < MAX_TOLD_AT_ONCE:
                self._told_since_round += 1
                self._tell(key, now_s)

    def say_again(self, identity: str) -> None:
        """Have an identity told of at once, by its folded name: its visit has changed, or was not heard."""
        if identity in self._known:
            self._due[identity] = True

    def tell(self, now_s: float, *, at_once: bool = False) -> None:
        """Say what is due.

        Args:
            now_s: seconds since 1970.
            at_once: everything that has changed, however short a time ago it was said: the gateway stops.
        """
        told = self._told_since_round = 0
        for key in list(self._due):
            known = self._known[key]
            if not at_once:
                if told >= MAX_TOLD_AT_ONCE:
                    return
                is_recent = known.said_s is not None and 0 <= now_s - known.said_s < MIN_INTERVAL_S
                if is_recent and not self._due[key]:
                    continue
            self._tell(key, now_s)
            told += 1

    def _tell(self, key: str, now_s: float) -> None:
        del self._due[key]
        known = self._known[key]
        known.said_s = now_s
        visit = self._visits.of(key) if self._visits is not None else Visit(0)
        self._publish(gateway_seen(self._gateway, known.name), known.message(visit).to_bytes())

    def forget(self, now_s: float) -> int:
        """Forget whoever has not come for long, and take back what was said; return how many."""
        gone = [key for key, known in self._known.items() if now_s - known.last_s > FORGOTTEN_AFTER_S]
        for key in gone:
            known = self._known.pop(key)
            self._due.pop(key, None)
            if self._visits is not None:
                self._visits.forget(key)
            self._publish(gateway_seen(self._gateway, known.name), b"")
        return len(gone)

"""A station's registry, CA and journal in a folder, without the costly passphrase."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from cryptography.hazmat.primitives.asymmetric import ec

from birthmark.device.identity import DeviceId, Role
from birthmark.provisioning import profile
from birthmark.provisioning.authority import Authority
from birthmark.provisioning.enrollment.bundles import BrokerAddress
from birthmark.provisioning.enrollment.enrol import Enrolment
from birthmark.provisioning.enrollment.exchange import Line
from birthmark.provisioning.enrollment.journal import Wish
from birthmark.provisioning.enrollment.transitions import Transitions
from birthmark.provisioning.registry.tiny import TinyRegistry
from birthmark.provisioning.settings import Lifetimes

if TYPE_CHECKING:
    from pathlib import Path

    from support.board_line import VirtualLine

    from birthmark.provisioning.registry.model import KeyMode, Row, State

T = TypeVar("T")


class CountingAuthority(Authority):
    """An issuing CA that remembers under which serial numbers it signed."""

    signed: list[int]

    def issue_device(self, row: Row, *, now: datetime) -> bytes:
        certificate_der = super().issue_device(row, now=now)
        assert row.cert_serial is not None
        self.signed.append(row.cert_serial)
        return certificate_der


@dataclass
class Desk:
    """What one station has, apart from its ports."""

    registry: TinyRegistry
    authority: CountingAuthority
    journal: Transitions

    def rows(self) -> list[Row]:
        with self.registry.view() as view:
            return view.rows()

    def states(self) -> list[State]:
        return [row.state for row in self.rows()]

    def machine(
        self,
        line: VirtualLine,
        device_id: str = "sensor-17",
        *,
        keys: KeyMode | None = None,
        role: str | None = None,
        is_local: bool = True,
        sid: int | None = None,
    ) -> Enrolment:
        """One enrollment over `line`, as on a port opened just now."""
        session = Line(clock=line.clock, sid=secrets.randbits(32) if sid is None else sid, baud=line.baud)
        wish = Wish(DeviceId(device_id), Role(role) if role else None, keys)
        return Enrolment(session, self.journal, wish, random_bytes=secrets.token_bytes, is_local=is_local)

    def enrol(self, line: VirtualLine, device_id: str = "sensor-17", **how: Any) -> Row:
        """Run one enrollment to its end."""
        watch = how.pop("watch", None)
        return line.run(self.machine(line, device_id, **how).run(), watch)


def now() -> datetime:
    return datetime.now(UTC)


def open_desk(folder: Path) -> Desk:
    """Make a registry in `folder` and a CA for it in memory."""
    registry = TinyRegistry.create(folder, clock=now, actor="tester@bench")
    root_key, issuing_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    serials = [profile.new_cert_serial(secrets.token_bytes) for _ in range(2)]
    root = profile.Issuer(
        profile.root_certificate(root_key, organization="Acme", cert_serial=serials[0], now=now()), root_key
    )
    issuing = profile.issuing_certificate(
        root, issuing_key.public_key(), organization="Acme", cert_serial=serials[1], now=now()
    )
    authority = CountingAuthority(
        profile.Issuer(issuing, issuing_key),
        [root.certificate],
        organization="Acme",
        lifetimes=Lifetimes(),
        registry=registry,
    )
    authority.signed = []
    journal = Transitions(
        registry,
        lambda _key_id: authority,
        broker=BrokerAddress("gateway-1.example.com", 8883, 60),
        default_role=Role("sensor"),
        clock=now,
        random_bytes=secrets.token_bytes,
    )
    return Desk(registry, authority, journal)

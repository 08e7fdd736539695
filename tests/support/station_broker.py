"""A real gateway process of a test's own station."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from support.broker_process import BrokerProcess

from birthmark.provisioning.issuing import issue_broker

if TYPE_CHECKING:
    from pathlib import Path

    from support.pki import Pki

    from birthmark.provisioning.station import Station


class _StationFiles:
    """Gives a broker its files from a station, where others have them from a test's own CA."""

    def __init__(self, station: Station) -> None:
        self._station = station

    def write_broker_files(self, folder: Path, *hosts: str) -> None:
        issue_broker(self._station, hosts, folder)


def station_broker(folder: Path, station: Station) -> BrokerProcess:
    """A gateway named `localhost`, with a certificate of this station; it watches `crl.pem` in its folder."""
    return BrokerProcess(folder, cast("Pki", _StationFiles(station)), name="localhost")

"""The renewal service of a station whose issuing CA's key is in a PKCS#11 token, as it is run."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import pytest
from support import renewal_stand
from support.renewal_stand import Stand
from support.renewing_client import Renewing, client
from support.softhsm import LABEL, PIN, module_path, running, with_a_token
from support.station import CHEAP, PASSPHRASE

from birthmark.provisioning.ca_keys import TokenPlace
from birthmark.provisioning.founding import found_station
from birthmark.provisioning.settings import Settings, TokenSettings
from birthmark.provisioning.tokens.uri import TokenUri

if TYPE_CHECKING:
    from pathlib import Path

    from birthmark.provisioning.station import Station


@pytest.mark.proof
def test_it_signs_by_the_token_has_devices_wait_while_that_is_away_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIRTHMARK_TOKEN_PIN", PIN.decode())

    def with_token(folder: Path, clock: Any) -> Station:
        return found_station(
            folder,
            Settings("Acme", token=TokenSettings(module_path())),
            passphrase=PASSPHRASE,
            clock=clock,
            derivation=CHEAP,
            place=TokenPlace(TokenUri(LABEL, object="issuing")),
            pin=PIN,
        )

    for softhsm in running(tmp_path / "softhsm", with_a_token(tmp_path / "made")):
        monkeypatch.setattr(renewal_stand, "new_station", with_token)
        with Stand(tmp_path / "stand") as stand:
            states = [stand.device(name) for name in ("first", "second", "third")]
            assert stand.station.cas.for_clients.key_uri
            with stand.renewd() as renewd:
                with client(states[0], watching := Renewing()) as device:
                    device.renew()
                    watching.wait_for_state("renewed")
                softhsm.take_out()
                try:
                    with client(states[1], Renewing()) as device:
                        device.renew()
                        renewd.wait_for("trouble")
                        renewd.wait_for("refused")
                finally:
                    softhsm.put_back()
                with client(states[2], watching := Renewing()) as device:
                    device.renew()
                    watching.wait_for_state("renewed")
                assert renewd.kill(signal.SIGTERM) == 0
        assert [row.certificate_der for row in stand.rows("second")[1:]] in ([], [None])

"""Where a client's identity comes from, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.device_folder import enrolled
from support.pki import Pki, key_pem, new_key, pem_of

from birthmark.device.credentials import BrokerAddress, Credentials
from birthmark.device.errors import ConfigurationError, CredentialError, IdentityError
from birthmark.device.pem import BUNDLE, block
from birthmark.device.tls import device_context

if TYPE_CHECKING:
    from pathlib import Path

GATEWAY = BrokerAddress("gateway-1.example.com", 8883)


def test_an_enrolled_device(tmp_path: Path, pki: Pki) -> None:
    leaf = pki.device("sensor-1")
    state = enrolled(tmp_path / "state", pki, leaf, host="gw.example", port=1234, keepalive_s=30)
    credentials = Credentials.from_folder(state)
    assert str(credentials.device_id) == "sensor-1"
    assert str(credentials.role) == "device"
    assert credentials.broker == BrokerAddress("gw.example", 1234)
    assert credentials.keepalive_s == 30
    assert credentials.pem_path == state / "active"
    assert credentials.anchors_der == (pki.root.der,)
    assert credentials.leaf_der == leaf.der
    assert credentials.facts.cert_serial == leaf.cert_serial
    device_context(credentials)  # OpenSSL reads the slot as it is


def test_another_broker_and_no_keepalive(tmp_path: Path, pki: Pki) -> None:
    state = enrolled(tmp_path / "state", pki)
    credentials = Credentials.from_folder(state, broker=GATEWAY)
    assert (credentials.broker, credentials.keepalive_s) == (GATEWAY, 60)


def test_a_renewed_identity_is_preferred(tmp_path: Path, pki: Pki) -> None:
    state = enrolled(tmp_path / "state", pki)
    newer = pki.device("sensor-1")
    enrolled(state, pki, newer, slot="renewed")
    assert Credentials.from_folder(state).leaf_der == newer.der


def test_a_renewal_of_the_identity_before_counts_no_more(tmp_path: Path, pki: Pki) -> None:
    # The power went between the rename that committed a new identity and the removal of what was renewed before.
    newer = pki.device("sensor-1")
    state = enrolled(tmp_path / "state", pki, newer, txn=bytes([1]) * 16)
    enrolled(state, pki, slot="renewed")
    assert Credentials.from_folder(state).leaf_der == newer.der


def test_a_renewal_alone_is_no_identity(tmp_path: Path, pki: Pki) -> None:
    state = enrolled(tmp_path / "state", pki, slot="renewed")
    with pytest.raises(CredentialError, match="there is no `active` slot"):
        Credentials.from_folder(state)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o666])
def test_a_key_that_others_may_read(tmp_path: Path, pki: Pki, mode: int) -> None:
    state = enrolled(tmp_path / "state", pki)
    (state / "active").chmod(mode)
    with pytest.raises(CredentialError, match="others than its owner may read it") as refused:
        Credentials.from_folder(state)
    assert refused.value.hint == f"chmod 600 {state / 'active'}"


def test_a_folder_without_an_identity(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CredentialError, match="there is no `active` slot") as refused:
            Credentials.from_folder(folder)
        assert "birthmark flash" in refused.value.hint


def test_every_way_a_slot_can_be_cut_is_a_clear_error(tmp_path: Path, pki: Pki) -> None:
    state = enrolled(tmp_path / "state", pki)
    whole = (state / "active").read_bytes()
    end_of_bundle = whole.index(b"-----BEGIN BIRTHMARK TRANSACTION")
    for length in range(0, end_of_bundle - 2, 37):
        (state / "active").write_bytes(whole[:length])
        with pytest.raises(CredentialError, match="could not use the credentials in") as refused:
            Credentials.from_folder(state)
        assert refused.value.hint
        assert "PRIVATE" not in str(refused.value)


def test_a_slot_whose_parts_do_not_belong_together(tmp_path: Path, pki: Pki) -> None:
    state = enrolled(tmp_path / "state", pki)
    other = enrolled(tmp_path / "other", pki)
    bundle = (other / "active").read_bytes().split(b"-----BEGIN BIRTHMARK BUNDLE")[1]
    mine = (state / "active").read_bytes().split(b"-----BEGIN BIRTHMARK BUNDLE")[0]
    (state / "active").write_bytes(mine + b"-----BEGIN BIRTHMARK BUNDLE" + bundle)
    with pytest.raises(CredentialError, match="its certificates are not those of its bundle"):
        Credentials.from_folder(state)


def test_a_bundle_that_is_none(tmp_path: Path, pki: Pki) -> None:
    state = enrolled(tmp_path / "state", pki)
    mine = (state / "active").read_bytes().split(b"-----BEGIN BIRTHMARK BUNDLE")[0]
    (state / "active").write_bytes(mine + block(BUNDLE, b"\xa0"))
    with pytest.raises(CredentialError, match="could not use the credentials"):
        Credentials.from_folder(state)


def test_a_damaged_renewal_says_how_to_go_back(tmp_path: Path, pki: Pki) -> None:
    state = enrolled(tmp_path / "state", pki)
    enrolled(state, pki, slot="renewed").joinpath("renewed").write_bytes(b"")
    with pytest.raises(CredentialError) as refused:
        Credentials.from_folder(state)
    assert "go back" in refused.value.hint


def test_a_key_of_another_certificate(tmp_path: Path, pki: Pki) -> None:
    state = enrolled(tmp_path / "state", pki)
    slot = state / "active"
    text = slot.read_bytes()
    slot.write_bytes(key_pem(new_key()) + text[text.index(b"-----BEGIN CERTIFICATE") :])
    with pytest.raises(CredentialError, match="key values mismatch"):
        device_context(Credentials.from_folder(state))


def test_an_operator(tmp_path: Path, pki: Pki) -> None:
    identity = pki.operator("alice").write(tmp_path / "alice.pem")
    anchors = tmp_path / "ca.pem"
    anchors.write_bytes(pki.root.pem)
    credentials = Credentials.from_files(identity, anchors, GATEWAY)
    assert (str(credentials.device_id), str(credentials.role)) == ("alice", "operator")
    assert credentials.role.is_reserved
    assert credentials.anchors_der == (pki.root.der,)
    device_context(credentials)


def test_files_that_will_not_do(tmp_path: Path, pki: Pki) -> None:
    good = pki.operator("alice").write(tmp_path / "alice.pem")
    anchors = tmp_path / "ca.pem"
    anchors.write_bytes(pki.root.pem)
    empty = tmp_path / "empty.pem"
    empty.write_bytes(b"")
    empty.chmod(0o600)
    two_names = pki.issuing.issue(cns=["a", "b"]).write(tmp_path / "two.pem")
    certificate_only = tmp_path / "certificate.pem"
    certificate_only.write_bytes(pem_of(pki.device().der))
    certificate_only.chmod(0o600)
    for identity, ca, cause in [
        (tmp_path / "missing.pem", anchors, "No such file"),
        (good, tmp_path / "missing.pem", "No such file"),
        (empty, anchors, "0 private keys"),
        (certificate_only, anchors, "0 private keys"),
        (good, empty, "holds no certificate"),
        (two_names, anchors, "does not name one identity and one role"),
    ]:
        with pytest.raises(CredentialError, match=cause) as refused:
            Credentials.from_files(identity, ca, GATEWAY)
        assert refused.value.hint


def test_a_name_outside_the_grammar(tmp_path: Path, pki: Pki) -> None:
    anchors = tmp_path / "ca.pem"
    anchors.write_bytes(pki.root.pem)
    identity = pki.issuing.issue(cns=["a/b"]).write(tmp_path / "evil.pem")
    with pytest.raises(IdentityError):
        Credentials.from_files(identity, anchors, GATEWAY)


def test_an_encrypted_key_does_not_ask_the_terminal(tmp_path: Path, pki: Pki) -> None:
    identity = tmp_path / "alice.pem"
    identity.write_bytes(block("ENCRYPTED PRIVATE KEY", b"x") + pem_of(pki.operator().der))
    identity.chmod(0o600)
    with pytest.raises(CredentialError, match="it is encrypted"):
        Credentials.from_files(identity, identity, GATEWAY)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("gw", "gw", 8883),
        ("gw:1", "gw", 1),
        ("10.0.0.1:65535", "10.0.0.1", 65535),
        ("::1", "::1", 8883),
        ("[::1]:99", "::1", 99),
        ("[fe80::1]", "fe80::1", 8883),
    ],
)
def test_addresses(text: str, host: str, port: int) -> None:
    assert BrokerAddress.parse(text) == BrokerAddress(host, port)
    assert BrokerAddress.parse(str(BrokerAddress(host, port))) == BrokerAddress(host, port)


@pytest.mark.parametrize(
    "text", ["", ":1", "gw:", "gw:x", "gw:0", "gw:65536", "gw:999999", "[::1", "[::1]x", "a b:1", "g\u00e4:1"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigurationError):
        BrokerAddress.parse(text)

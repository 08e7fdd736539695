"""Which CRLs take hold, which are refused, and that a broker never goes back."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import hashlib
import os
import secrets
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st
from support.pki import Authority, Pki, crl_pem, new_key, now, pem_of

from birthmark.broker.config import RevocationSettings
from birthmark.broker.crl import CrlRefusedError, read_crl
from birthmark.broker.peer import Peer, PeerRefusedError, Trust, check_peer
from birthmark.broker.revocation import Installation, Revocations
from birthmark.device.errors import ConfigurationError
from birthmark.device.pem import CRL, block

if TYPE_CHECKING:
    from pathlib import Path

DAY = dt.timedelta(days=1)


@functools.cache
def pki() -> Pki:
    return Pki.create()


@functools.cache
def trust() -> Trust:
    return Trust.from_pem(pki().issuing.pem)


@functools.cache
def peer() -> Peer:
    return check_peer(pki().device().der, trust(), now())


def opened(folder: Path, **settings: float) -> Revocations:
    return Revocations.open(trust(), folder, dataclasses.replace(RevocationSettings(), **settings))  # type: ignore[arg-type]


def install(revocations: Revocations, content: bytes, when: dt.datetime | None = None) -> Installation:
    (answer,) = revocations.install(content, when or now())
    return answer


@pytest.fixture
def revocations(tmp_path: Path) -> Revocations:
    """With CRL number 5 in force, which revokes nobody."""
    revocations = opened(tmp_path)
    assert install(revocations, pki().issuing.crl(number=5)).outcome == "installed"
    return revocations


def test_a_newer_crl_takes_hold(revocations: Revocations) -> None:
    revocations.check(peer(), now())
    crl_der = pki().issuing.crl([peer().cert_serial], number=6)
    answer = install(revocations, crl_der)
    assert answer == Installation("installed", pki().issuing.issuer_id, 6, hashlib.sha256(crl_der).hexdigest(), 1)
    assert revocations.is_revoked(peer())
    with pytest.raises(PeerRefusedError, match="is revoked") as caught:
        revocations.check(peer(), now())
    assert caught.value.reason == "revoked"


def test_pem_is_as_good_as_der(revocations: Revocations) -> None:
    crl_der = pki().issuing.crl([peer().cert_serial], number=6)
    assert install(revocations, b"text before\n" + crl_pem(crl_der)).sha256 == hashlib.sha256(crl_der).hexdigest()
    assert revocations.is_revoked(peer())
    assert install(revocations, pki().issuing.crl(number=7)).outcome == "installed"
    assert not revocations.is_revoked(peer())


def test_the_same_crl_again_is_current(revocations: Revocations) -> None:
    crl_der = pki().issuing.crl([1], number=6)
    assert install(revocations, crl_der).outcome == "installed"
    again = install(revocations, crl_pem(crl_der))
    assert (again.outcome, again.number, again.revoked_count) == ("current", 6, 1)


def test_two_crls_of_one_second_are_told_apart_by_their_number(revocations: Revocations) -> None:
    second = now()
    assert install(revocations, pki().issuing.crl([1], number=6, this_update=second)).outcome == "installed"
    assert install(revocations, pki().issuing.crl([1, 2], number=7, this_update=second)).revoked_count == 2


def _refused_crls() -> dict[str, tuple[str, bytes]]:
    ours, name = pki().issuing, [x509.UniformResourceIdentifier("http://crl.example/ca.crl")]
    good = ours.crl([1], number=9)
    idp = functools.partial(
        x509.IssuingDistributionPoint,
        full_name=name,
        relative_name=None,
        only_contains_user_certs=False,
        only_some_reasons=None,
        only_contains_attribute_certs=False,
    )
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.55555.1"), b"\5\0")
    damaged = bytearray(good)
    damaged[-1] ^= 1
    return {
        "older number": ("older", ours.crl([1], number=4)),
        "same number": ("conflict", ours.crl([1], number=5)),
        "older date": ("older", ours.crl([1], number=9, this_update=now() - DAY)),
        "not yet valid": ("not-yet-valid", ours.crl([1], number=9, this_update=now() + DAY)),
        "another CA of the same name": ("issuer", pki().stranger.crl([1], number=9)),
        "its CRL with our key identifier": (
            "signature",
            pki().stranger.crl([1], number=9, authority_key_id=ours.ski),
        ),
        "the root": ("issuer", pki().root.crl([1], number=9)),
        "another signer": ("signature", ours.crl([1], number=9, signer=new_key())),
        "an RSA signature": ("signature", ours.crl([1], number=9, signer=new_key("rsa"))),
        "damaged signature": ("signature", bytes(damaged)),
        "another issuer's name": (
            "issuer",
            ours.crl([1], number=9, issuer=pki().root.certificate.subject),
        ),
        "no key identifier": ("issuer", ours.crl([1], number=9, authority_key_id=None)),
        "no number": ("malformed", ours.crl([1], number=None)),
        "due before it is written": ("malformed", _due_before_written()),
        "delta": ("incomplete", ours.crl([1], number=9, extra=[(x509.DeltaCRLIndicator(5), True)])),
        "indirect": (
            "incomplete",
            ours.crl(number=9, extra=[(idp(only_contains_ca_certs=False, indirect_crl=True), True)]),
        ),
        "CA certificates only": (
            "incomplete",
            ours.crl(number=9, extra=[(idp(only_contains_ca_certs=True, indirect_crl=False), True)]),
        ),
        "unknown critical extension": ("extension", ours.crl([1], number=9, extra=[(unknown, True)])),
        "critical extension in an entry": ("extension", ours.crl([1], number=9, entry_extra=[(unknown, True)])),
        "an entry of another issuer": (
            "extension",
            ours.crl(
                [1],
                number=9,
                entry_extra=[(x509.CertificateIssuer([x509.DirectoryName(pki().root.certificate.subject)]), True)],
            ),
        ),
        "empty": ("unreadable", b""),
        "blank": ("unreadable", b"\n \n"),
        "garbage": ("unreadable", b"\x00\xff" * 500),
        "DER garbage": ("malformed", b"0" * 500),
        "truncated": ("malformed", good[:-1]),
        "trailing byte": ("malformed", good + b"\0"),
        "truncated PEM": ("unreadable", crl_pem(good)[:-40]),
        "PEM of something else": ("unreadable", pem_of(ours.der)),
        "PEM of garbage": ("malformed", b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"),
        "a certificate": ("malformed", ours.der),
        "a good and a broken one": ("malformed", crl_pem(good) + block(CRL, good[:-1])),
        "too many": ("unreadable", crl_pem(good) * 17),
    }


def _due_before_written() -> bytes:
    # The builder refuses it, so the two times change places in the DER and the list is signed again.
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256
    from support.pki import der, der_children, der_content

    tbs, algorithm, _ = der_children(der_content(_past_crl()))
    fields = der_children(der_content(tbs))
    fields[3], fields[4] = fields[4], fields[3]
    tbs = der(0x30, b"".join(fields))
    key = pki().issuing.key
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return der(0x30, tbs + algorithm + der(0x03, b"\0" + key.sign(tbs, ec.ECDSA(SHA256()))))


def _past_crl() -> bytes:
    hour = dt.timedelta(hours=1)
    return pki().issuing.crl([1], number=9, this_update=now() - 2 * hour, next_update=now() - hour / 2)


@functools.cache
def refused_crls() -> dict[str, tuple[str, bytes]]:
    return _refused_crls()


@pytest.mark.parametrize(
    "what",
    [
        "older number",
        "same number",
        "older date",
        "not yet valid",
        "another CA of the same name",
        "its CRL with our key identifier",
        "the root",
        "another signer",
        "an RSA signature",
        "damaged signature",
        "another issuer's name",
        "no key identifier",
        "no number",
        "due before it is written",
        "delta",
        "indirect",
        "CA certificates only",
        "unknown critical extension",
        "critical extension in an entry",
        "an entry of another issuer",
        "empty",
        "blank",
        "garbage",
        "DER garbage",
        "truncated",
        "trailing byte",
        "truncated PEM",
        "PEM of something else",
        "PEM of garbage",
        "a certificate",
        "a good and a broken one",
        "too many",
    ],
)
def test_a_crl_that_is_refused_changes_nothing(revocations: Revocations, tmp_path: Path, what: str) -> None:
    reason, content = refused_crls()[what]
    before = revocations.crls
    kept = {path.name: path.read_bytes() for path in (tmp_path / "crl").iterdir()}
    answer = install(revocations, content)
    assert answer.reason.split(":")[0] == reason
    assert answer.outcome == "refused"
    assert answer.reason.isascii()
    assert answer.hint
    assert revocations.crls == before
    assert {path.name: path.read_bytes() for path in (tmp_path / "crl").iterdir()} == kept
    if answer.issuer:
        assert (answer.issuer, answer.number) == (pki().issuing.issuer_id, 5)


def test_every_case_is_tested() -> None:
    marks = [mark for mark in test_a_crl_that_is_refused_changes_nothing.pytestmark if mark.name == "parametrize"]  # type: ignore[attr-defined]
    assert set(marks[0].args[1]) == set(refused_crls())


def test_a_crl_larger_than_the_limit(tmp_path: Path) -> None:
    revocations = opened(tmp_path, max_crl_bytes=1_024)
    answer = install(revocations, pki().issuing.crl(range(1, 200)))
    assert answer.outcome == "refused"
    assert "1024 bytes" in answer.reason


def test_a_list_of_user_certificates_with_a_distribution_point_is_complete(revocations: Revocations) -> None:
    scope = x509.IssuingDistributionPoint(
        full_name=[x509.UniformResourceIdentifier("http://crl.example/ca.crl")],
        relative_name=None,
        only_contains_user_certs=True,
        only_contains_ca_certs=False,
        only_some_reasons=None,
        indirect_crl=False,
        only_contains_attribute_certs=False,
    )
    assert install(revocations, pki().issuing.crl([1], number=6, extra=[(scope, True)])).outcome == "installed"


def test_reasons_of_entries_are_no_obstacle(revocations: Revocations) -> None:
    reason = x509.CRLReason(x509.ReasonFlags.key_compromise)
    answer = install(revocations, pki().issuing.crl([peer().cert_serial], number=6, entry_extra=[(reason, False)]))
    assert answer.outcome == "installed"
    assert revocations.is_revoked(peer())


def test_the_roots_crl_beside_ours_is_passed_over(revocations: Revocations) -> None:
    both = crl_pem(pki().root.crl(number=1)) + crl_pem(pki().issuing.crl([1], number=6))
    assert install(revocations, both).number == 6


def test_two_issuing_cas_have_a_crl_each(tmp_path: Path) -> None:
    second = Authority.create("Second Issuing CA", parent=pki().root)
    both = Trust.from_pem(pki().issuing.pem + second.pem)
    revocations = Revocations.open(both, tmp_path, RevocationSettings())
    assert install(revocations, pki().issuing.crl(number=5)).outcome == "installed"
    with pytest.raises(ConfigurationError, match="Second Issuing CA") as caught:
        revocations.require_complete()
    assert "birthmark crl" in caught.value.hint
    file = crl_pem(pki().issuing.crl([1], number=4)) + crl_pem(second.crl([1], number=1))
    answers = revocations.install(file, now())
    assert [answer.outcome for answer in answers] == ["refused", "installed"]
    revocations.require_complete()
    # One number in two lists is two certificates.
    other = check_peer(second.issue(cert_serial=77).der, both, now())
    revocations.install(pki().issuing.crl([77], number=6), now())
    assert not revocations.is_revoked(other)


def test_without_a_crl_nobody_gets_in(tmp_path: Path) -> None:
    revocations = opened(tmp_path)
    with pytest.raises(ConfigurationError):
        revocations.require_complete()
    with pytest.raises(PeerRefusedError) as caught:
        revocations.check(peer(), now())
    assert caught.value.reason == "no-crl"


def test_a_restart_does_not_go_back(revocations: Revocations, tmp_path: Path) -> None:
    old = pki().issuing.crl(number=5)
    install(revocations, pki().issuing.crl([peer().cert_serial], number=6))
    again = opened(tmp_path)
    again.require_complete()
    assert again.is_revoked(peer())
    assert install(again, old).outcome == "refused"
    assert again.is_revoked(peer())


def test_a_damaged_copy_stops_the_start(revocations: Revocations, tmp_path: Path) -> None:
    (copy,) = (tmp_path / "crl").iterdir()
    copy.write_bytes(copy.read_bytes()[:-1])
    with pytest.raises(ConfigurationError, match="could not use the CRL kept in") as caught:
        opened(tmp_path)
    assert str(copy) in caught.value.hint


def test_a_copy_under_another_cas_name_stops_the_start(tmp_path: Path) -> None:
    second = Authority.create("Second Issuing CA", parent=pki().root)
    both = Trust.from_pem(pki().issuing.pem + second.pem)
    folder = tmp_path / "crl"
    folder.mkdir(mode=0o700)
    (folder / f"{second.issuer_id}.crl").write_bytes(pki().issuing.crl())
    with pytest.raises(ConfigurationError, match="it is another CA's"):
        Revocations.open(both, tmp_path, RevocationSettings())


def test_a_copy_in_force_is_taken_up_whatever_the_clock_says(tmp_path: Path) -> None:
    revocations = opened(tmp_path)
    install(revocations, pki().issuing.crl([peer().cert_serial], this_update=now() + 3 * DAY), now() + 4 * DAY)
    assert opened(tmp_path).is_revoked(peer())


def test_leftovers_of_a_crash_are_cleared(revocations: Revocations, tmp_path: Path) -> None:
    leftover = tmp_path / "crl" / ".x.crl.0123.part"
    leftover.write_bytes(b"half")
    assert opened(tmp_path).crls
    assert not leftover.exists()


def test_a_copy_that_cannot_be_written_changes_nothing(revocations: Revocations, tmp_path: Path) -> None:
    folder = tmp_path / "crl"
    (copy,) = folder.iterdir()
    copy.rename(tmp_path / "aside")
    copy.mkdir()
    (copy / "in the way").touch()
    answer = install(revocations, pki().issuing.crl([peer().cert_serial], number=6))
    assert (answer.outcome, answer.number) == ("refused", 5)
    assert answer.reason.startswith("storage: ")
    assert not revocations.is_revoked(peer())


def expiring(folder: Path, *, fail_closed: bool = False) -> tuple[Revocations, dt.datetime]:
    revocations = opened(folder, fail_closed=fail_closed, grace_days=2)
    next_update = now() + 10 * DAY
    install(revocations, pki().issuing.crl([1], this_update=now() - 10 * DAY, next_update=next_update))
    return revocations, next_update


def test_an_expired_crl_is_an_alarm_first_and_an_outage_only_after_the_grace(tmp_path: Path) -> None:
    revocations, end = expiring(tmp_path)
    revoked = dataclasses.replace(peer(), cert_serial=1)
    for when in (end, end + DAY, end + 2 * DAY):
        revocations.check(peer(), when)
        with pytest.raises(PeerRefusedError, match="is revoked"):
            revocations.check(revoked, when)
    with pytest.raises(PeerRefusedError) as caught:
        revocations.check(peer(), end + 2 * DAY + dt.timedelta(seconds=1))
    assert caught.value.reason == "crl-expired"


def test_a_crl_and_a_certificate_without_an_end(tmp_path: Path) -> None:
    revocations = opened(tmp_path)
    end = dt.datetime(9999, 12, 31, 23, 59, 59, tzinfo=dt.UTC)
    assert install(revocations, pki().issuing.crl([1], next_update=end)).outcome == "installed"
    revocations.check(dataclasses.replace(peer(), not_after=end), now(), expired_by=30 * DAY)
    assert revocations.alarms(now()) == []
    assert revocations.refusing(now()) == frozenset()


def test_a_clock_that_went_back_lets_in_nobody_who_has_expired(tmp_path: Path) -> None:
    """What was revoked leaves the CRL after its end: by then the CRL says itself what time it is."""
    revocations = opened(tmp_path)
    ended = dataclasses.replace(peer(), not_before=now() - 400 * DAY, not_after=now() - 100 * DAY)
    grace = 60 * DAY
    install(revocations, pki().issuing.crl([], this_update=now() - 110 * DAY, next_update=now() - 80 * DAY))
    revocations.check(ended, now() - 105 * DAY)  # the control: by that CRL it may have been valid
    install(revocations, pki().issuing.crl([], number=6, this_update=now() - 50 * DAY))
    revocations.check(ended, now() - 105 * DAY, expired_by=grace)
    with pytest.raises(PeerRefusedError, match="CLOCK") as caught:
        revocations.check(ended, now() - 105 * DAY)
    assert caught.value.reason == "expired"
    install(revocations, pki().issuing.crl([], number=7, this_update=now() - DAY))
    with pytest.raises(PeerRefusedError, match="here it is"):
        revocations.check(ended, now() - 105 * DAY, expired_by=grace)
    revocations.check(peer(), now() - 105 * DAY)


def test_fail_closed_refuses_everyone_at_once(tmp_path: Path) -> None:
    revocations, end = expiring(tmp_path, fail_closed=True)
    revocations.check(peer(), end)
    with pytest.raises(PeerRefusedError) as caught:
        revocations.check(peer(), end + dt.timedelta(seconds=1))
    assert caught.value.reason == "crl-expired"


@pytest.mark.parametrize(
    ("days", "code"), [(-9, None), (1, "crl-due"), (10.5, "crl-expired"), (12.5, "crl-refusing")]
)
def test_alarms(tmp_path: Path, days: float, code: str | None) -> None:
    revocations, _ = expiring(tmp_path)
    alarms = revocations.alarms(now() + days * DAY)
    assert [alarm.code for alarm in alarms] == ([code] if code else [])
    assert all("birthmark crl" in alarm.hint for alarm in alarms)


def test_an_expired_crl_that_is_newer_still_refuses_whom_it_lists(revocations: Revocations) -> None:
    late = pki().issuing.crl([peer().cert_serial], number=6, next_update=now() - dt.timedelta(minutes=1))
    assert install(revocations, late).outcome == "installed"
    assert revocations.is_revoked(peer())
    assert [alarm.code for alarm in revocations.alarms(now())] == ["crl-expired"]


def test_200_000_entries(revocations: Revocations, tmp_path: Path) -> None:
    serials = [(1 << 152) | secrets.randbits(151) for _ in range(199_999)]
    answer = install(revocations, pki().issuing.crl([*serials, peer().cert_serial], number=6))
    assert (answer.outcome, answer.revoked_count) == ("installed", 200_000)
    assert revocations.is_revoked(peer())
    assert opened(tmp_path).is_revoked(peer())


@given(st.binary(max_size=400))
def test_any_bytes_are_refused_with_our_own_error(content: bytes) -> None:
    with pytest.raises(CrlRefusedError):
        read_crl(content, trust(), now())


@functools.cache
def _small_crl() -> bytes:
    return pki().issuing.crl([1, 2, 3], number=9)


def test_a_crl_cut_short_anywhere() -> None:
    for end in range(len(_small_crl())):
        with pytest.raises(CrlRefusedError):
            read_crl(_small_crl()[:end], trust(), now())


def test_a_signature_with_unused_bits_is_refused() -> None:
    # One whose last bit is 0 could be said to be one bit shorter, which changes nothing that is signed.
    crl = next(crl for _ in range(100) if not (crl := pki().issuing.crl([1], number=9))[-1] & 1)
    signature = x509.load_der_x509_crl(crl).signature
    shorter = crl[: -len(signature) - 1] + b"\1" + signature
    assert x509.load_der_x509_crl(shorter).signature == signature
    with pytest.raises(CrlRefusedError, match="damaged"):
        read_crl(shorter, trust(), now())


@given(st.integers(0, 2_000), st.integers(1, 255))
def test_a_damaged_crl_is_refused(at: int, flip: int) -> None:
    damaged = bytearray(_small_crl())
    damaged[at % len(damaged)] ^= flip
    with pytest.raises(CrlRefusedError):
        read_crl(bytes(damaged), trust(), now())


_INSTALLER = """
import sys
from pathlib import Path
from birthmark.broker.config import RevocationSettings
from birthmark.broker.peer import Trust
from birthmark.broker.revocation import Revocations
from datetime import UTC, datetime
folder, crls = Path(sys.argv[1]), sorted(Path(sys.argv[2]).glob("*.crl"), key=lambda path: int(path.stem))
revocations = Revocations.open(Trust.from_pem((folder / "ca.pem").read_bytes()), folder, RevocationSettings())
print("ready", flush=True)
for path in crls:
    for answer in revocations.install(path.read_bytes(), datetime.now(UTC)):
        print(answer.outcome, answer.number, flush=True)
print("done", flush=True)
"""


def test_killed_while_installing_it_holds_the_last_or_the_next(tmp_path: Path) -> None:
    """`kill -9` at twelve moments: what was said to be installed is there afterwards, whole."""
    (tmp_path / "ca.pem").write_bytes(pki().issuing.pem)
    crls = tmp_path / "crls"
    crls.mkdir()
    for number in range(1, 61):
        (crls / f"{number}.crl").write_bytes(pki().issuing.crl(range(1, 500 + number), number=number))
    said = 0
    for round_number in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", _INSTALLER, str(tmp_path), str(crls)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(round_number * 5):
            process.stdout.readline()
        time.sleep(0.0007 * (round_number % 4))  # to be cut off at various moments of the next one
        os.kill(process.pid, signal.SIGKILL)
        lines = process.stdout.read().splitlines()
        process.stdout.close()
        process.wait()
        said = max([said, *(int(line.split()[1]) for line in lines if line.startswith("installed"))])
        reopened = Revocations.open(trust(), tmp_path, RevocationSettings())
        for crl in reopened.crls.values():
            assert crl.number >= said
            assert len(crl.serials) == 499 + crl.number
            said = crl.number
    assert said > 5

"""Certificates read without a cryptography library, against one."""

from __future__ import annotations

import contextlib
import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.pki import BMP_STRING, PRINTABLE_STRING, T61_STRING, Authority, Pki

from birthmark.device.certificate_facts import certificate_facts
from birthmark.device.errors import CredentialError

PKI = Pki.create()
SAMPLE = PKI.device("sensor-17", "thermometer")


def test_names_dates_and_serial_number_are_those_that_cryptography_reads() -> None:
    facts = certificate_facts(SAMPLE.der)
    expected = SAMPLE.certificate
    assert facts.common_names == ("sensor-17",)
    assert facts.organizational_units == ("thermometer",)
    assert facts.cert_serial == expected.serial_number
    assert facts.not_before == expected.not_valid_before_utc
    assert facts.not_after == expected.not_valid_after_utc


def test_generalized_time_from_2050_on() -> None:
    late = PKI.issuing.issue(not_after=dt.datetime(2051, 2, 3, 4, 5, 6, tzinfo=dt.UTC))
    assert certificate_facts(late.der).not_after == dt.datetime(2051, 2, 3, 4, 5, 6, tzinfo=dt.UTC)


def test_a_year_before_2000() -> None:
    early = PKI.issuing.issue(not_before=dt.datetime(1970, 1, 1, tzinfo=dt.UTC))
    assert certificate_facts(early.der).not_before == dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


@pytest.mark.parametrize("tag", [PRINTABLE_STRING, T61_STRING])
def test_other_types_of_text(tag: int) -> None:
    assert certificate_facts(PKI.issuing.issue(cns=[(tag, b"abc")]).der).common_names == ("abc",)


def test_two_byte_text() -> None:
    assert certificate_facts(
        PKI.issuing.issue(cns=[(BMP_STRING, "abc".encode("utf-16-be"))]).der
    ).common_names == ("abc",)


def test_every_name_is_told() -> None:
    facts = certificate_facts(PKI.issuing.issue(cns=["a", "b"], ous=[]).der)
    assert (facts.common_names, facts.organizational_units) == (("a", "b"), ())


def test_a_ca_too() -> None:
    assert certificate_facts(Authority.create("Some CA").der).common_names == ("Some CA",)


def test_what_the_clock_says_of_it() -> None:
    facts = certificate_facts(SAMPLE.der)
    second = dt.timedelta(seconds=1)
    assert facts.out_of_time_at(facts.not_before - second) == "not yet valid"
    assert facts.out_of_time_at(facts.not_before) == facts.out_of_time_at(facts.not_after) == ""
    assert facts.out_of_time_at(facts.not_after + second) == "expired"


@given(st.binary(max_size=600))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with pytest.raises(CredentialError, match="could not read a certificate"):
        certificate_facts(data)


@given(st.data())
def test_a_damaged_certificate_is_read_or_refused(data: st.DataObject) -> None:
    damaged = bytearray(SAMPLE.der)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CredentialError):
        certificate_facts(bytes(damaged))


def test_one_cut_short_anywhere_in_what_is_read_is_refused() -> None:
    for length in range(200):
        with pytest.raises(CredentialError):
            certificate_facts(SAMPLE.der[:length])

"""PKCS#11 URIs (RFC 7512): what is taken, what is refused, and that no PIN is ever repeated."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from birthmark.device.errors import BirthmarkError, ConfigurationError
from birthmark.provisioning.tokens.uri import TokenUri

MODULE = Path("/usr/lib/softhsm/libsofthsm2.so")


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("pkcs11:token=birthmark", TokenUri("birthmark")),
        ("PKCS11:token=birthmark;object=issuing", TokenUri("birthmark", object="issuing")),
        ("pkcs11:serial=ab12;id=%01%fF;type=private", TokenUri(serial="ab12", id=b"\x01\xff")),
        (
            "pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;manufacturer=Snake%20Oil,%20Inc.;model=1.0",
            TokenUri("The Software PKCS#11 Softtoken", manufacturer="Snake Oil, Inc.", model="1.0"),
        ),
        ("pkcs11:token=%C3%A4;object=a%3Bb", TokenUri("ä", object="a;b")),
        (f"pkcs11:token=a?module-path={MODULE}", TokenUri("a", module_path=MODULE)),
        ("pkcs11:token=a?pin-source=file:/etc/pin", TokenUri("a", pin_path=Path("/etc/pin"))),
        ("pkcs11:token=a?pin-source=/etc/pin", TokenUri("a", pin_path=Path("/etc/pin"))),
    ],
)
def test_what_names_a_key_is_read(text: str, uri: TokenUri) -> None:
    assert TokenUri.parse(text) == uri
    assert TokenUri.parse(str(uri)) == uri


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("token=birthmark", "it is no PKCS#11 URI"),
        ("pkcs11:", "it names no token"),
        ("pkcs11:object=issuing", "it names no token"),
        ("pkcs11:token=a;token=b", "token comes twice"),
        ("pkcs11:token=a;slot-id=3", "the attribute slot-id is not taken here"),
        ("pkcs11:token=a;module-path=/x", "the attribute module-path is not taken here"),
        ("pkcs11:token=a;object", "'object' is no attribute"),
        ("pkcs11:token=a b", "'token=a b' is no attribute"),
        ("pkcs11:token=%4", "'token=%4' is no attribute"),
        ("pkcs11:token=%FF", "token is not UTF-8"),
        ("pkcs11:token=a%0Ab", "token is not printable"),
        (f"pkcs11:token={'a' * 33}", "token is longer than 32 bytes"),
        (f"pkcs11:token=a;object={'a' * 3000}", "it is no PKCS#11 URI"),
        ("pkcs11:token=a;type=public", "it does not name a private key"),
        ("pkcs11:token=a?module-path=lib.so", "module-path is no absolute path"),
        ("pkcs11:token=a?pin-source=|pinentry", "pin-source is no absolute path"),
        ("pkcs11:token=a?module-name=opensc", "the attribute module-name is not taken here"),
        ("pkcs11:token=ä", "it is no PKCS#11 URI"),
    ],
)
def test_what_does_not_is_refused(text: str, cause: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        TokenUri.parse(text)
    assert cause in refused.value.message


@pytest.mark.parametrize(
    "text",
    [
        "pkcs11:token=a?pin-value=135790",
        "pkcs11:token=a&pin-value=135790",
        "pkcs11:token=a;pin-value=135790",
        "pkcs11:token=a?PIN-VALUE=135790",
        "pkcs11:token=a?pin%2Dvalue=135790",
        "pkcs11:pin-value=135790",
        "pkcs11:token=a?module-path=/x&pin-value=135790&",
        "pin-value=135790",
        "pkcs11:token=\udcff?pin-value=135790",
    ],
)
def test_a_pin_in_it_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        TokenUri.parse(text)
    assert "it has a PIN in it" in refused.value.message
    assert "135790" not in refused.value.message + refused.value.hint


def test_what_is_a_matter_of_the_machine_is_not_what_names_the_key() -> None:
    uri = TokenUri.parse(f"pkcs11:token=a;object=b?module-path={MODULE}&pin-source=/etc/pin")

    assert str(uri.key) == "pkcs11:token=a;object=b"


@given(
    st.builds(
        TokenUri,
        token=st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=8),
        object=st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=30),
        id=st.binary(max_size=20),
        module_path=st.none() | st.just(Path("/usr/lib/a b&c;d.so")),
    )
)
def test_every_name_is_read_as_it_is_written(uri: TokenUri) -> None:
    assume("pin-value" not in f"{uri.token}{uri.object}{uri.id!r}".lower())  # refused wherever it stands
    assert TokenUri.parse(str(uri)) == uri


@given(st.text(max_size=40) | st.text(max_size=40).map("pkcs11:token=a;".__add__))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        uri = TokenUri.parse(text)
    except BirthmarkError:
        return
    assert TokenUri.parse(str(uri)) == uri

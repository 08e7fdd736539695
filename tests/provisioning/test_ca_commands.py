"""`birthmark ca`: which CAs there are, and where their keys are."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from support.station import Command

    from birthmark.provisioning.station import Station


def test_show_says_which_cas_there_are_and_where_their_keys_are(birthmark: Command, living: Station) -> None:
    root, issuing = birthmark("ca", "show", "--json").records

    assert (root["kind"], root["phase"], root["key"]) == ("root", "trusted", "here")
    assert (issuing["kind"], issuing["phase"], issuing["key"]) == ("issuing", "current", "here")
    assert issuing["root"] == root["key_id"] == living.cas.for_clients.root
    assert 3600 < issuing["days_left"] < 3660 < root["days_left"]


def test_show_says_that_a_key_is_away(birthmark: Command, living: Station) -> None:
    living.key_path(living.cas.roots[0]).unlink()

    keys = [record["key"] for record in birthmark("ca", "show", "--json").records]

    assert keys == ["away", "here"]
    assert "away" in birthmark("ca", "show").stdout

"""Addresses at which only this process can answer."""

import pytest

from kvrelay.network import own_places
from kvrelay.network.listening import ANY_HOST
from kvrelay.network.own_places import OwnPlaces
from tests.support.ipv6 import needs_ipv6


@pytest.mark.parametrize("place", ["127.0.0.1:7", "[::ffff:127.0.0.1]:7", "worker.example:8"])
def test_where_a_process_listens_and_is_advertised_is_its_own(place: str) -> None:
    assert place in OwnPlaces("127.0.0.1", 7, "worker.example:8")


@pytest.mark.parametrize(
    "place",
    [
        *("127.0.0.2:7", "[::1]:7", "127.0.0.1:8", "127.0.0.1", "localhost:7", "worker.example:7", "192.0.2.1:7"),
        *("unix:/tmp/socket", "", ":7", "[:7", "127.0.0.1:x"),
    ],
)
def test_an_address_that_another_process_may_have_is_not_own(place: str) -> None:
    assert place not in OwnPlaces("127.0.0.1", 7, "worker.example:8")


@pytest.mark.parametrize("host", ANY_HOST)
def test_who_listens_everywhere_has_all_addresses_of_the_machine(host: str) -> None:
    places = OwnPlaces(host, 7, "127.0.0.1:7")
    assert "127.0.0.2:7" in places
    assert "192.0.2.1:7" not in places
    assert "127.0.0.2:8" not in places


@needs_ipv6
def test_who_listens_everywhere_has_ipv6_too() -> None:
    assert "[::1]:7" in OwnPlaces("0.0.0.0", 7, "127.0.0.1:7")


def test_without_ipv6_nobody_listens_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_places, "addresses_of", lambda host: [(2, "0.0.0.0")])
    monkeypatch.setattr(own_places, "is_own", lambda address: True)
    places = OwnPlaces("0.0.0.0", 7, "127.0.0.1:7")
    assert "10.0.0.1:7" in places
    assert "[::1]:7" not in places

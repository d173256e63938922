"""The gateway's own page and programs may send prompts over HTTP; other pages may not."""

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from gateway.page.page_guard import check_sender
from gateway.page.page_json import HttpRefusal
from kvrelay.network.http_bounds import HostNames

NAMES = HostNames({"gateway.example"})
TYPE = ("Content-Type", "application/json")
HOST = ("Host", "127.0.0.1:50080")

Headers = tuple[tuple[str, str], ...]


def check(*headers: tuple[str, str]) -> None:
    check_sender(CIMultiDictProxy(CIMultiDict(headers)), NAMES)


@pytest.mark.parametrize(
    "headers",
    [
        (HOST, TYPE),
        (HOST, ("content-type", "Application/JSON; charset=utf-8")),
        (HOST, TYPE, ("Origin", "http://127.0.0.1:50080"), ("Sec-Fetch-Site", "same-origin")),
        (HOST, TYPE, ("Sec-Fetch-Site", "none")),
        (("Host", "localhost:50080"), TYPE, ("Origin", "http://LOCALHOST:50080")),
        (("Host", "localhost"), TYPE, ("Origin", "http://localhost")),
        (("Host", "[::1]:50080"), TYPE, ("Origin", "http://[::1]:50080")),
        (("Host", "192.168.7.4:50080"), TYPE),
        (("Host", "Gateway.Example"), TYPE, ("Origin", "https://gateway.example")),
    ],
)
def test_the_gateways_own_page_and_programs_may_send(headers: Headers) -> None:
    check(*headers)


@pytest.mark.parametrize(
    "headers",
    [
        (TYPE,),
        (("Host", ""), TYPE),
        (("Host", "http://127.0.0.1"), TYPE),
        (HOST, ("Host", "localhost"), TYPE),
        (("Host", "rebound.example:50080"), TYPE),
        (
            ("Host", "rebound.example:50080"),
            TYPE,
            ("Origin", "http://rebound.example:50080"),
            ("Sec-Fetch-Site", "same-origin"),
        ),
        (("Host", "127.0.0.1.rebound.example"), TYPE),
        (("Host", "localhost.rebound.example"), TYPE),
        (HOST, TYPE, ("Origin", "http://elsewhere.example")),
        (HOST, TYPE, ("Origin", "http://127.0.0.1:8000")),
        (HOST, TYPE, ("Origin", "http://127.0.0.1")),
        (HOST, TYPE, ("Origin", "null")),
        (HOST, TYPE, ("Origin", "")),
        (HOST, TYPE, ("Origin", "http://127.0.0.1:50080"), ("Origin", "http://elsewhere.example")),
        (HOST, TYPE, ("Sec-Fetch-Site", "cross-site")),
        (HOST, TYPE, ("Sec-Fetch-Site", "same-site")),
        (HOST, TYPE, ("Origin", "http://127.0.0.1:50080"), ("Sec-Fetch-Site", "cross-site")),
    ],
)
def test_other_pages_and_foreign_host_names_are_refused(headers: Headers) -> None:
    with pytest.raises(HttpRefusal) as refusal:
        check(*headers)
    assert (refusal.value.status, refusal.value.fields["reason"]) == (403, "PAGE_REFUSED")


@pytest.mark.parametrize("given", [(), (("Content-Type", "text/plain"),), (("Content-Type", "application/jsonp"),)])
def test_bodies_that_html_forms_can_send_are_refused(given: Headers) -> None:
    with pytest.raises(HttpRefusal) as refusal:
        check(HOST, *given)
    assert refusal.value.status == 415
    assert "application/json" in refusal.value.fields["error"]

"""Guards a gateway's HTTP port against other web pages, by headers that no page can set.

JSON of other pages needs a preflight request, which gets no answer. `Origin` and
`Sec-Fetch-Site` name the sending page. `Host` shows DNS rebinding.
"""

from __future__ import annotations  # multidict's classes are named for type checkers only

from typing import TYPE_CHECKING

from gateway.page.page_json import HttpRefusal
from kvrelay.core.quoting import quoted
from kvrelay.network.http_bounds import HostNames

if TYPE_CHECKING:
    from multidict import CIMultiDictProxy

JSON_TYPE = "application/json"
OWN_SITES = ("same-origin", "none")


def check_sender(headers: CIMultiDictProxy[str], names: HostNames) -> None:
    """Raises HttpRefusal unless the gateway's own page or a program sent it."""
    if problem := names.problem(headers.getall("Host", [])):
        raise _refusal(problem)
    _check_page(headers)
    given = headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if given != JSON_TYPE:
        raise HttpRefusal(415, f"the body's type is {quoted(given)}; send JSON, with Content-Type: {JSON_TYPE}")


def _check_page(headers: CIMultiDictProxy[str]) -> None:
    sites, origins = headers.getall("Sec-Fetch-Site", []), headers.getall("Origin", [])
    _, _, place = origins[0].lower().partition("://") if origins else ("", "", "")
    is_own = len(origins) == 1 and place == headers["Host"].lower()
    if any(site not in OWN_SITES for site in sites) or (origins and not is_own):
        raise _refusal("another page sent this; a prompt is taken from the gateway's own page, or from a program")


def _refusal(message: str) -> HttpRefusal:
    return HttpRefusal(403, message, "PERMISSION_DENIED", "PAGE_REFUSED")

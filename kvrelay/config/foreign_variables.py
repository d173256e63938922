"""Finds KVRELAY_* variables that are not settings. Does not read the environment.

Kubernetes gives every pod variables for each Service of its namespace (`enableServiceLinks`,
default on). Variables of a Service named kvrelay, or kvrelay-anything, look like settings:

    KVRELAY_SERVICE_HOST=10.96.0.17    KVRELAY_SERVICE_PORT=50050    KVRELAY_SERVICE_PORT_GRPC=50050
    KVRELAY_PORT=tcp://10.96.0.17:50050
    KVRELAY_PORT_50050_TCP=tcp://10.96.0.17:50050    ..._TCP_PROTO=tcp    ..._TCP_PORT=50050
"""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping

_LINK_NAME = re.compile(
    r"[A-Z0-9_]+_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://\S+")
_PORT_SUFFIX = "_PORT"

_USED_BY_COMPOSE = {"KVRELAY_GRAFANA_PORT", "KVRELAY_PROMETHEUS_PORT"}  # by docker-compose.yml only

_CLOSE = 0.75  # of the two names, one or two letters differ


def is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes, not a person, set the variable."""
    if _LINK_NAME.fullmatch(name):
        return True
    return name.endswith(_PORT_SUFFIX) and _LINK_VALUE.fullmatch(value) is not None


def notes_on_variables(variables: Mapping[str, str], known: Collection[str]) -> tuple[str, ...]:
    """One sentence per ignored variable that its owner should hear of."""
    return tuple(note for name in sorted(variables) if (note := _note(name, variables[name], known)))


def _note(name: str, value: str, known: Collection[str]) -> str:
    if is_service_link(name, value):
        if name not in known:
            return ""
        return (
            f"environment {name}={value} is a link to a Kubernetes Service and no setting: it is ignored;"
            " enableServiceLinks: false in the pod's spec keeps such variables away"
        )
    if name in known or name in _USED_BY_COMPOSE or not value:
        return ""
    nearest = nearest_name(name, known)
    return f"environment {name} is no setting: it is ignored{f'; did you mean {nearest}?' if nearest else ''}"


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    names = {_core(each): each for each in sorted(known)}
    close = difflib.get_close_matches(_core(name), names, n=1, cutoff=_CLOSE)
    return names[close[0]] if close else None


def _core(name: str) -> str:
    return name.removeprefix("KVRELAY_").lower().replace("-", "_")

"""States of a request, and the allowed moves. Pure: a table.

    QUEUED ─► RESERVING ─► PREFILLING ─► TRANSFERRING ─► DECODING ─► SUCCEEDED
    PREFILLING ─► DECODING                        nothing to transfer
    PREFILLING | TRANSFERRING ─► SUCCEEDED        ended with token 0
    any active ─► FAILED | CANCELLED | EXPIRED    same attempt
    any active ─► QUEUED                          attempt + 1: retry or takeover

QUEUED to DECODING are active; nothing leaves the others.
"""

import functools
from collections.abc import Set
from enum import Enum


class RequestState(Enum):
    QUEUED = "QUEUED"
    RESERVING = "RESERVING"
    PREFILLING = "PREFILLING"
    TRANSFERRING = "TRANSFERRING"
    DECODING = "DECODING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    EXPIRED = "EXPIRED"


TERMINAL_STATES = frozenset({RequestState.SUCCEEDED, RequestState.FAILED, RequestState.CANCELLED, RequestState.EXPIRED})
ACTIVE_STATES = frozenset(RequestState) - TERMINAL_STATES

_FORWARD_EDGES = {
    (RequestState.QUEUED, RequestState.RESERVING),
    (RequestState.RESERVING, RequestState.PREFILLING),
    (RequestState.PREFILLING, RequestState.TRANSFERRING),
    (RequestState.PREFILLING, RequestState.DECODING),
    (RequestState.TRANSFERRING, RequestState.DECODING),
    (RequestState.PREFILLING, RequestState.SUCCEEDED),
    (RequestState.TRANSFERRING, RequestState.SUCCEEDED),
    (RequestState.DECODING, RequestState.SUCCEEDED),
}
_ENDING_EDGES = {
    (state, end)
    for state in ACTIVE_STATES
    for end in (RequestState.FAILED, RequestState.CANCELLED, RequestState.EXPIRED)
}
EDGES = frozenset(_FORWARD_EDGES | _ENDING_EDGES)
"""Moves within one attempt."""


def is_terminal(state: RequestState) -> bool:
    return state in TERMINAL_STATES


def check_edge(from_state: RequestState, from_attempt: int, to_state: RequestState, to_attempt: int) -> bool:
    if to_attempt == from_attempt:
        return (from_state, to_state) in EDGES
    return to_attempt == from_attempt + 1 and to_state is RequestState.QUEUED and from_state in ACTIVE_STATES


def reachable_states(from_state: RequestState) -> frozenset[RequestState]:
    found = {target for source, target in EDGES if source is from_state}
    return frozenset(found.union(*(reachable_states(state) for state in found)))


@functools.cache
def edges_argument() -> str:
    """For Lua: `,QUEUED>RESERVING,...,`, to be searched for `,FROM>TO,`."""
    return _pairs_argument(EDGES)


@functools.cache
def paths_argument() -> str:
    return _pairs_argument({(source, target) for source in RequestState for target in reachable_states(source)})


@functools.cache
def terminal_argument() -> str:
    return "," + "".join(sorted(f"{state.value}," for state in TERMINAL_STATES))


def _pairs_argument(pairs: Set[tuple[RequestState, RequestState]]) -> str:
    return "," + "".join(sorted(f"{source.value}>{target.value}," for source, target in pairs))

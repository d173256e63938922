"""Where a request is in its life, and which moves are allowed. A table: no clock, no Redis, no task.

    QUEUED ──► RESERVING ──► PREFILLING ──► TRANSFERRING ──► DECODING ──► SUCCEEDED
       ▲                          │  │            │              ▲            ▲
       │                          │  └────────────┼──────────────┘            │      nothing to transfer, or the decode
       │                          └───────────────┴───────────────────────────┘      worker computed the prompt itself;
       │                                                                             ended with token 0
       │   any active ──► FAILED | CANCELLED | EXPIRED        same attempt
       └── any active                                         attempt + 1: tried again, or taken over

QUEUED to DECODING are active, the others final: nothing leaves them. `kvrelay/lua` gets the table from here as arguments.
"""

import functools
from collections.abc import Set
from enum import Enum


class RequestState(Enum):
    """State of a request; the same names as in the proto."""

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
    (state, end) for state in ACTIVE_STATES for end in (RequestState.FAILED, RequestState.CANCELLED, RequestState.EXPIRED)
}
EDGES = frozenset(_FORWARD_EDGES | _ENDING_EDGES)
"""Moves within one attempt. The only move to a further attempt is from any active state to QUEUED."""


def is_terminal(state: RequestState) -> bool:
    """Whether nothing leaves the state."""
    return state in TERMINAL_STATES


def check_edge(from_state: RequestState, from_attempt: int, to_state: RequestState, to_attempt: int) -> bool:
    """Whether a request may move from one state and attempt to another. Staying where it is is no move."""
    if to_attempt == from_attempt:
        return (from_state, to_state) in EDGES
    return to_attempt == from_attempt + 1 and to_state is RequestState.QUEUED and from_state in ACTIVE_STATES


def reachable_states(from_state: RequestState) -> frozenset[RequestState]:
    """States that one or more edges lead to, within one attempt."""
    found = {target for source, target in EDGES if source is from_state}
    return frozenset(found.union(*(reachable_states(state) for state in found)))


@functools.cache
def edges_argument() -> str:
    """`EDGES` for a Lua script: `,QUEUED>RESERVING,...,`, to be searched for `,FROM>TO,`."""
    return _pairs_argument(EDGES)


@functools.cache
def paths_argument() -> str:
    """All (state, state it can reach) for a Lua script, in the same form as `edges_argument`."""
    return _pairs_argument({(source, target) for source in RequestState for target in reachable_states(source)})


@functools.cache
def terminal_argument() -> str:
    """`TERMINAL_STATES` for a Lua script: `,SUCCEEDED,...,`, to be searched for `,STATE,`."""
    return "," + "".join(sorted(f"{state.value}," for state in TERMINAL_STATES))


def _pairs_argument(pairs: Set[tuple[RequestState, RequestState]]) -> str:
    return "," + "".join(sorted(f"{source.value}>{target.value}," for source, target in pairs))

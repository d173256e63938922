"""The table of states: what the docstring draws, and that the scripts' arguments say the same."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from kvrelay.core.request_state import (
    ACTIVE_STATES,
    EDGES,
    TERMINAL_STATES,
    RequestState,
    check_edge,
    edges_argument,
    is_terminal,
    paths_argument,
    reachable_states,
    terminal_argument,
)

STATES = st.sampled_from(list(RequestState))
CHAIN = [
    RequestState.QUEUED,
    RequestState.RESERVING,
    RequestState.PREFILLING,
    RequestState.TRANSFERRING,
    RequestState.DECODING,
    RequestState.SUCCEEDED,
]


def test_the_chain_of_a_request_is_allowed() -> None:
    assert all(check_edge(source, 1, target, 1) for source, target in itertools.pairwise(CHAIN))


def test_a_prompt_computed_on_the_decode_worker_skips_the_transfer() -> None:
    assert check_edge(RequestState.PREFILLING, 1, RequestState.DECODING, 1)


def test_only_states_with_a_token_succeed() -> None:
    sources = {source for source, target in EDGES if target is RequestState.SUCCEEDED}
    assert sources == {RequestState.PREFILLING, RequestState.TRANSFERRING, RequestState.DECODING}


def test_every_active_state_can_end_in_every_way_without_success() -> None:
    ends = TERMINAL_STATES - {RequestState.SUCCEEDED}
    assert all(check_edge(state, 3, end, 3) for state in ACTIVE_STATES for end in ends)


def test_the_sets_of_states_are_a_partition() -> None:
    assert frozenset(RequestState) == ACTIVE_STATES | TERMINAL_STATES
    assert not ACTIVE_STATES & TERMINAL_STATES


@given(source=STATES, target=STATES, attempt=st.integers(1, 100), step=st.integers(-3, 3))
def test_an_attempt_rises_by_one_to_queued_and_never_falls(
    source: RequestState, target: RequestState, attempt: int, step: int
) -> None:
    allowed = check_edge(source, attempt, target, attempt + step)
    if step == 0:
        assert allowed == ((source, target) in EDGES)
    else:
        assert allowed == (step == 1 and target is RequestState.QUEUED and not is_terminal(source))


@given(
    source=st.sampled_from(sorted(TERMINAL_STATES, key=str)),
    target=STATES,
    attempts=st.tuples(st.integers(1), st.integers(1)),
)
def test_nothing_leaves_a_terminal_state(source: RequestState, target: RequestState, attempts: tuple[int, int]) -> None:
    assert not check_edge(source, attempts[0], target, attempts[1])


@given(moves=st.lists(st.tuples(STATES, st.booleans()), max_size=60))
def test_walks_end_at_most_once_and_within_an_attempt_never_repeat_a_state(
    moves: list[tuple[RequestState, bool]],
) -> None:
    state, attempt = RequestState.QUEUED, 1
    seen = {state}
    for target, retried in moves:
        target_attempt = attempt + retried
        if not check_edge(state, attempt, target, target_attempt):
            continue
        assert not is_terminal(state)
        assert retried or target not in seen
        seen = {target} if retried else seen | {target}
        state, attempt = target, target_attempt


@given(source=STATES, target=STATES)
def test_reachable_means_that_a_path_of_edges_exists(source: RequestState, target: RequestState) -> None:
    through = {middle for start, middle in EDGES if start is source}
    expected = target in through or any(target in reachable_states(middle) for middle in through)
    assert (target in reachable_states(source)) == expected
    assert source not in reachable_states(source)


@given(source=STATES, target=STATES)
def test_the_scripts_get_the_same_table(source: RequestState, target: RequestState) -> None:
    move = f",{source.value}>{target.value},"
    assert (move in edges_argument()) == check_edge(source, 1, target, 1)
    assert (move in paths_argument()) == (target in reachable_states(source))
    assert (f",{source.value}," in terminal_argument()) == is_terminal(source)

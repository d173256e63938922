"""Bookkeeping of one push: complete exactly when every cell came once; nothing twice, nothing
outside.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode_worker.receiving.kv_reassembly import MAX_REFUSALS, KVReassembly
from kvrelay.core.model_spec import KVLayout
from kvrelay.errors import TransferError
from kvrelay.kv_transfer.layout import KVSpan, split_span

LAYOUT = KVLayout(3, 2, 4, "float32")
BEGIN, END = 8, 20


def size(span: KVSpan) -> int:
    return span.num_bytes(LAYOUT)


@given(st.integers(1, 2000), st.randoms(use_true_random=False))
def test_any_cut_in_any_order_completes_with_the_last_part(max_bytes: int, random: object) -> None:
    parts = split_span(KVSpan(0, 3, BEGIN, END), LAYOUT, max_bytes)
    random.shuffle(parts)  # type: ignore[attr-defined]
    assembly = KVReassembly(LAYOUT, BEGIN, END)
    for part in parts:
        assert not assembly.is_complete
        assert assembly.problem_with(part, size(part)) is None
        assembly.add(part)
        assert assembly.problem_with(part, size(part)) is not None
    assert assembly.is_complete
    assembly.check_end(len(parts))
    assert assembly.kv_bytes == LAYOUT.bytes_per_token * (END - BEGIN)


spans = st.builds(KVSpan, st.integers(0, 4), st.integers(0, 4), st.integers(5, 23), st.integers(5, 23))


@given(st.lists(spans, max_size=30))
def test_whatever_comes_each_cell_of_the_reservation_is_taken_at_most_once(arriving: list[KVSpan]) -> None:
    assembly = KVReassembly(LAYOUT, BEGIN, END)
    taken: set[tuple[int, int]] = set()
    for span in arriving:
        cells = {
            (layer, token)
            for layer in range(span.layer_begin, span.layer_end)
            for token in range(span.token_begin, span.token_end)
        }
        is_inside = bool(cells) and all(layer < 3 and BEGIN <= token < END for layer, token in cells)
        is_acceptable = is_inside and cells.isdisjoint(taken)
        assert (assembly.problem_with(span, size(span)) is None) == is_acceptable
        if is_acceptable:
            assembly.add(span)
            taken |= cells
    assert assembly.is_complete == (len(taken) == 3 * (END - BEGIN))
    assert assembly.kv_bytes == len(taken) * LAYOUT.bytes_per_layer_token


@pytest.mark.parametrize("num_bytes", [0, 1, 31, 33])
def test_a_payload_of_another_size_is_a_problem(num_bytes: int) -> None:
    span = KVSpan(0, 1, 8, 9)
    assert size(span) == 64
    assert KVReassembly(LAYOUT, BEGIN, END).problem_with(span, num_bytes) is not None


def test_the_same_chunk_may_be_refused_once() -> None:
    assembly = KVReassembly(LAYOUT, BEGIN, END)
    assembly.refuse(KVSpan(0, 1, 8, 9), "digest")
    assembly.refuse(KVSpan(1, 2, 8, 9), "digest")
    with pytest.raises(TransferError):
        assembly.refuse(KVSpan(0, 1, 8, 9), "digest")


def test_refusals_are_bounded() -> None:
    assembly = KVReassembly(LAYOUT, BEGIN, END)
    for token in range(MAX_REFUSALS):
        assembly.refuse(KVSpan(0, 1, token, token + 1), "range")
    with pytest.raises(TransferError):
        assembly.refuse(KVSpan(0, 1, 100, 101), "range")


def test_an_end_before_the_last_part_or_with_another_count_is_an_error() -> None:
    assembly = KVReassembly(LAYOUT, BEGIN, END)
    assembly.add(KVSpan(0, 3, BEGIN, END - 1))
    with pytest.raises(TransferError, match=r"33 of 36"):
        assembly.check_end(1)
    assembly.add(KVSpan(0, 3, END - 1, END))
    with pytest.raises(TransferError, match="counted 3"):
        assembly.check_end(3)
    assembly.check_end(2)

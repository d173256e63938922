"""Spans: every cell of the cache goes into exactly one message, and no message is too large."""

from collections import Counter, deque

from hypothesis import given
from hypothesis import strategies as st

from kvrelay.core.model_spec import KVLayout
from kvrelay.kv_transfer.layout import KVSpan, SpanCoalescer, split_span, take_chunk

layouts = st.builds(
    KVLayout,
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 16),
    st.sampled_from(["float32", "bfloat16", "float16", "int8"]),
)


def cells(spans: list[KVSpan]) -> Counter[tuple[int, int]]:
    return Counter(
        (layer, token)
        for span in spans
        for layer in range(span.layer_begin, span.layer_end)
        for token in range(span.token_begin, span.token_end)
    )


@given(layouts, st.integers(0, 40), st.integers(0, 40), st.integers(1, 4096))
def test_a_split_covers_the_span_once_and_no_part_is_larger_than_a_message(
    layout: KVLayout, token_begin: int, num_tokens: int, max_bytes: int
) -> None:
    span = KVSpan(0, layout.num_layers, token_begin, token_begin + num_tokens)
    parts = split_span(span, layout, max_bytes)
    assert cells(parts) == cells([span])
    assert sum(part.num_bytes(layout) for part in parts) == num_tokens * layout.bytes_per_token
    assert all(part.num_bytes(layout) <= max(max_bytes, layout.bytes_per_layer_token) for part in parts)


@given(
    layouts,
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(1, 4096),
)
def test_chunks_of_coalesced_layers_cover_every_token_from_the_first_to_be_sent_once(
    layout: KVLayout, chunks: list[int], num_cached: int, first_token: int, max_bytes: int
) -> None:
    coalescer = SpanCoalescer(layout, max_bytes, first_token)
    spans = deque(coalescer.add_all_layers(0, num_cached))
    token = num_cached
    for num_tokens in chunks:
        for layer in range(layout.num_layers):
            spans += coalescer.add_layer(layer, token, token + num_tokens)
        token += num_tokens
    taken = []
    while spans:
        taken.append(take_chunk(spans, layout, max_bytes))
    assert cells(taken) == cells([KVSpan(0, layout.num_layers, min(first_token, token), token)])
    assert all(span.num_bytes(layout) <= max(max_bytes, layout.bytes_per_layer_token) for span in taken)


def test_a_chunk_takes_what_waits_behind_it_as_far_as_it_fits() -> None:
    layout = KVLayout(4, 1, 8, "float32")
    spans = deque([KVSpan(0, 1, 0, 10), KVSpan(1, 2, 0, 10), KVSpan(2, 4, 0, 10), KVSpan(0, 1, 10, 20)])
    assert take_chunk(spans, layout, 3 * 10 * layout.bytes_per_layer_token) == KVSpan(0, 2, 0, 10)
    assert take_chunk(spans, layout, 10 * layout.bytes_per_layer_token) == KVSpan(2, 3, 0, 10)
    assert list(spans) == [KVSpan(3, 4, 0, 10), KVSpan(0, 1, 10, 20)]


def test_tokens_are_cut_at_whole_blocks() -> None:
    layout = KVLayout(1, 1, 8, "float32")
    parts = split_span(KVSpan(0, 1, 0, 300), layout, 100 * layout.bytes_per_layer_token)
    assert [part.token_begin for part in parts] == [0, 64, 128, 192, 256]


def test_layers_that_fit_one_message_go_together() -> None:
    layout = KVLayout(4, 1, 8, "float32")
    coalescer = SpanCoalescer(layout, 2 * 10 * layout.bytes_per_layer_token, 0)
    assert coalescer.add_layer(0, 0, 10) == []
    assert coalescer.add_layer(1, 0, 10) == [KVSpan(0, 2, 0, 10)]
    assert coalescer.add_layer(2, 0, 10) == []
    assert coalescer.add_layer(3, 0, 10) == [KVSpan(2, 4, 0, 10)]


def test_the_last_layer_goes_at_once_even_if_more_would_fit() -> None:
    layout = KVLayout(2, 1, 8, "float32")
    coalescer = SpanCoalescer(layout, 1 << 20, 0)
    assert coalescer.add_layer(0, 0, 3) == []
    assert coalescer.add_layer(1, 0, 3) == [KVSpan(0, 2, 0, 3)]

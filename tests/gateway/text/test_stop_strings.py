"""Stop strings in text that comes in pieces."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.text.stop_strings import StopStringFinder

TEXT = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """By definition: looks after every character."""
    for end in range(1, len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)], True
    return text, False


@given(text=TEXT, stops=STOPS, data=st.data())
def test_any_cut_gives_the_text_before_the_first_stop_string(text: str, stops: list[str], data: st.DataObject) -> None:
    finder = StopStringFinder(stops)
    shown, position = "", 0
    while position < len(text) and not finder.found:
        length = data.draw(st.integers(1, 5))
        shown += finder.add(text[position : position + length])
        position += length
        assert expected(text, stops)[0].startswith(shown)
    found = finder.found
    shown += finder.flush()
    assert (shown, found) == expected(text, stops)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    finder = StopStringFinder(["\n\nUser:"])
    assert finder.add("Hello\n") == "Hello"
    assert finder.add("world") == "\nworld"
    assert finder.add("\n\nUs") == ""
    assert finder.flush() == "\n\nUs"


def test_nothing_comes_after_a_stop_string() -> None:
    finder = StopStringFinder(["x"])
    assert (finder.add("axb"), finder.found, finder.add("c"), finder.flush()) == ("a", True, "", "")

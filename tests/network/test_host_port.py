"""host:port as people write it: taken apart, put together, and refused with a sentence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.network.host_port import MAX_PORT, join_host_port, split_host_port

HOSTS = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
    st.from_regex(r"[a-z][a-z0-9-]{0,20}(\.[a-z]{1,9})?", fullmatch=True),
)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:50050", "127.0.0.1", 50050),
        ("gateway.example", "gateway.example", None),
        ("my_service:1", "my_service", 1),
        ("[::1]:50050", "::1", 50050),
        ("[::1]", "::1", None),
        ("::1", "::1", None),
        ("fe80::1%eth0", "fe80::1%eth0", None),
        ("host:65535", "host", MAX_PORT),
    ],
)
def test_host_and_port_are_taken_apart(text: str, host: str, port: int | None) -> None:
    assert split_host_port(text) == (host, port)


@given(HOSTS, st.integers(1, MAX_PORT))
def test_what_was_put_together_is_taken_apart_again(host: str, port: int) -> None:
    assert split_host_port(join_host_port(host, port)) == (host, port)
    assert split_host_port(host) == (host, None)
    assert join_host_port(f"[{host}]", port) == join_host_port(host, port)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "names no host"),
        (":50050", "names no host"),
        ("host:", "names no port"),
        ("host:abc", "names no port"),
        ("host:0", "names no port"),
        ("host:65536", "names no port"),
        ("host:99999999999999999999", "names no port"),
        ("host:5\u0660", "names no port"),
        ("host:-1", "names no port"),
        ("::1:50050", r"did you mean \[::1\]:50050"),
        ("a:b:c", "nor an IPv6 address"),
        ("[::1", "in brackets"),
        ("[::1]50050", "in brackets"),
        ("[127.0.0.1]:1", "in brackets"),
        ("a b:1", "letters, digits"),
        ("ho\nst:1", r"'ho\\nst:1'"),
        ("x" * 5000 + ":0", r"x\.\.\.' names no port"),
    ],
)
def test_what_is_none_is_quoted_in_part_with_what_is_wrong(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as error:
        split_host_port(text)
    assert len(str(error.value)) < 250

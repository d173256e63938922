"""Whose an HTTP request is, by the id that smg passes on."""

import pytest

from kvrelay.openai_frontend.open_requests import FRONT_ITSELF, Client, OpenRequests

ALICE, BOB = Client("alice", "a"), Client("bob", "b")


@pytest.mark.parametrize(
    ("endpoint", "prefix"),
    [
        ("chat/completions", "chatcmpl-"),
        ("completions", "cmpl-"),
        ("responses", "resp-"),
        ("messages", "msg-"),
        ("embeddings", "req-"),
        ("responses/resp_1/cancel", "req-"),
    ],
)
def test_smgs_ids_for_a_request_are_the_clients(endpoint: str, prefix: str) -> None:
    requests = OpenRequests()
    with requests.of(ALICE, endpoint) as first, requests.of(BOB, endpoint) as second, requests.of(FRONT_ITSELF, "x"):
        assert first.startswith(prefix)
        for suffix in ("", "-0198f6a0-aaaa", "-p3-0198f6a0-aaaa"):
            assert requests.client_of(first + suffix) is ALICE
            assert requests.client_of(second + suffix) is BOB
        assert requests.client_of(first + "0-1") is None
        assert len(first + "-p127-" + "0" * 36) <= 128, "gateways take no longer id"
    assert requests.client_of(first) is None


def test_an_id_ends_with_its_request_when_that_fails() -> None:
    requests = OpenRequests()
    with pytest.raises(RuntimeError), requests.of(ALICE, "completions") as request_id:
        raise RuntimeError
    assert requests.client_of(request_id) is None


def test_no_key_is_shown() -> None:
    assert "secret" not in repr(Client("alice", "secret"))

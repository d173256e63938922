"""The protocol between runner and adapters, with an adapter of a real process and an engine that
computes nothing.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.peers.adapters.adapter_loop import Options, Request
from benchmarks.peers.peer_process import PeerError, PeerProcess

OPTIONS = Options(model_folder="", converted_folder="", weights="f32", cores=[0, 1], chunk_tokens=None)


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[PeerProcess]:
    with PeerProcess([sys.executable, "-m", "tests.benchmarks.peers.fake_adapter"], {}, tmp_path / "log") as process:
        yield process


def adapter_process() -> psutil.Process:
    """That of the one running adapter. Other children of this process end whenever they do, and
    have no command line then.
    """
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "tests.benchmarks.peers.fake_adapter" in child.cmdline():
                return child
    raise AssertionError("no adapter is running")


def test_each_request_comes_back_with_all_its_tokens_and_their_times(peer: PeerProcess) -> None:
    assert peer.load(OPTIONS)["version"] == "fake on 2 threads"
    first, second = sorted(
        peer.run([Request(0, [5], 3), Request(1, [5], 2, at_s=0.01)]), key=lambda each: each.request_id
    )
    assert (first.token_ids, second.token_ids) == ([0, 1, 2], [0, 1])
    times_s = [first.submitted_s, *first.token_times_s]
    assert times_s == sorted(times_s)
    assert second.submitted_s - first.submitted_s >= 0.005


def test_background_requests_do_not_arrive_after_the_others_have_ended(peer: PeerProcess) -> None:
    peer.load(OPTIONS)
    responses = peer.run([Request(0, [5], 2), Request(1, [5], 1, at_s=600.0, background=True)])
    assert [response.request_id for response in responses] == [0]


def test_what_an_engine_refuses_is_an_error_with_its_words_and_the_adapter_goes_on(peer: PeerProcess) -> None:
    with pytest.raises(PeerError, match="ValueError: only f32"):
        peer.load(Options(model_folder="", converted_folder="", weights="int8", cores=[0], chunk_tokens=None))
    assert peer.load(OPTIONS)["version"] == "fake on 2 threads"


def test_an_engine_that_ends_is_an_error_that_shows_what_it_wrote(peer: PeerProcess) -> None:
    peer.load(OPTIONS)
    with pytest.raises(PeerError, match=r"(?s)has ended.*the engine crashed"):
        peer.run([Request(0, [5], 666)])


def test_a_paused_peer_is_stopped_and_goes_on_when_resumed(peer: PeerProcess) -> None:
    peer.load(OPTIONS)
    child = adapter_process()
    peer.pause()
    # a process on another core takes the signal a moment later
    while child.status() != psutil.STATUS_STOPPED:
        os.sched_yield()
    peer.resume()
    assert [len(each.token_ids) for each in peer.run([Request(0, [5], 4)])] == [4]


def test_closing_a_paused_peer_ends_it(peer: PeerProcess) -> None:
    peer.load(OPTIONS)
    child = adapter_process()
    child.send_signal(signal.SIGSTOP)
    peer.close()
    assert not child.is_running()

"""Fuzzing that is led by which branches were reached, with atheris where it is installed.

    python -m tests.fuzz.coverage_guided TARGET [-runs=N | -max_total_time=SECONDS] [FOLDER ...]

TARGET is one of `TARGETS`; the rest are libFuzzer's own arguments: the first folder takes new
inputs, and all are begun with. A target raises for what must not be; libFuzzer writes the input
that did it to a file `crash-...` in the working folder.
"""

import contextlib
import logging
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import atheris
import structlog

with atheris.instrument_imports(
    include=[
        "kvrelay.kv_transfer.codec",
        "kvrelay.state.request_record",
        "kvrelay.state.member_registry",
        "kvrelay.state.request_list",
        "gateway",
    ]
):
    from gateway.requests.request_validation import parse_messages, parse_sampling
    from gateway.streaming.frames import decode_frame
    from kvrelay.errors import InvalidRequestError, TransferError, UnreadableStateError
    from kvrelay.kv_transfer.codec import decode_request
    from kvrelay.state import member_registry, request_record
    from kvrelay.v1 import inference_pb2


def decode_push(data: bytes) -> None:
    """A message of a KV push."""
    with contextlib.suppress(TransferError):
        decode_request(data)


def validate_request(data: bytes) -> None:
    """A client's Generate request, as far as it is checked before a model is asked for."""
    try:
        request = inference_pb2.GenerateRequest.FromString(data)
    except Exception:  # protobuf's; the interceptor answers it
        return
    with contextlib.suppress(InvalidRequestError):
        parse_sampling(request.sampling)
        parse_messages(request.chat.messages, "messages")


def read_record(data: bytes) -> None:
    """A hash of Redis: fields and values by turns, with NUL between."""
    parts = data.split(b"\0")
    stored = dict(zip(parts[::2], parts[1::2], strict=False))
    with contextlib.suppress(UnreadableStateError):
        request_record.decode_record(stored, 0)


def read_member(data: bytes) -> None:
    """A member of the registry."""
    member_registry._decode(data)


def read_frame(data: bytes) -> None:
    """A frame of a request's log."""
    with contextlib.suppress(UnreadableStateError):
        decode_frame(data)


SPARE_ADDRESS_SPACE_BYTES = 512 << 20
"""What inputs may have the process ask for beyond what it has at the beginning."""

TARGETS: dict[str, Callable[[bytes], None]] = {
    "push": decode_push,
    "request": validate_request,
    "record": read_record,
    "member": read_member,
    "frame": read_frame,
}


def main() -> None:
    target = TARGETS.get(sys.argv[1] if len(sys.argv) > 1 else "")
    if target is None:
        raise SystemExit(f"name a target: {', '.join(TARGETS)}")
    # Not libFuzzer's own limit: that counts what the process was at its fork, when it was still the
    # one that starts it.
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + SPARE_ADDRESS_SPACE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

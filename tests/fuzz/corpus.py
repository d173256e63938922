"""Messages in `corpus/` that mutations begin with, one file each; and how they are made: `python -m
tests.fuzz.corpus`.

They are kept in git, so that what was once found stays tried, whatever the code that makes messages
becomes.
"""

from pathlib import Path

FOLDER = Path(__file__).with_name("corpus")


def load(name: str) -> list[bytes]:
    """All messages of a folder of the corpus, by name."""
    files = sorted((FOLDER / name).iterdir())
    assert files, f"no corpus {name}"
    return [file.read_bytes() for file in files]


def _push_messages() -> dict[str, bytes]:
    from kvrelay.kv_transfer.codec import Chunk, SharedChunk, SharedSlice, encode_chunk, encode_shared_chunk
    from kvrelay.kv_transfer.layout import KVSpan
    from kvrelay.v1 import kv_transfer_pb2 as pb
    from kvrelay.v1 import session_pb2

    span, digest, payload = KVSpan(1, 3, 16, 300), bytes(range(16)), bytes(range(64))
    job_id = session_pb2.JobId(request_id="a" * 32, attempt=2)
    header = pb.PushHeader(job_id=job_id, ticket=digest, fingerprint="f" * 32, wire_version=1, token_end=300)
    token = session_pb2.Token(token_id=7, logprob=-0.5, top_logprobs=[session_pb2.TopLogprob(token_id=8, logprob=-1.5)])
    tokens = [session_pb2.SequenceToken(job_id=job_id, token=token, finish_reason=session_pb2.FINISH_REASON_STOP)]
    chunk = encode_chunk(Chunk(span, payload, digest))
    middle = pb.KVChunk(layer_end=1, token_end=8, payload=payload, digest=digest)
    return {
        "header": pb.PushRequest(header=header).SerializeToString(),
        "chunk": chunk,
        "chunk_without_payload": encode_chunk(Chunk(span, b"", digest)),
        "shared_chunk": encode_shared_chunk(SharedChunk(span, SharedSlice(4096, 64), digest)),
        "payload_in_the_middle": pb.PushRequest(chunk=middle).SerializeToString(),
        "end": pb.PushRequest(end=pb.PushEnd(num_chunks=3, tokens=tokens, digest=digest)).SerializeToString(),
        "empty": b"",
        "two_messages": chunk + pb.PushRequest(header=header).SerializeToString(),
        "unknown_field": chunk + b"\xfa\x07\x03abc",
        "claims_2_gib": b"\x12\xff\xff\xff\xff\x07" + chunk[2:],
        "claims_2_to_the_63": b"\x12" + b"\xff" * 9 + b"\x01",
        "payload_claims_2_gib": b"\x12\x0a\x08\x01\x10\x02\x2a\xff\xff\xff\xff\x07",
        "endless_number": b"\x12" + b"\x80" * 12,
        "long_tag": b"\x92\x80\x80\x80\x00" + chunk[1:],
        "long_payload_tag": b"\x12\x09\x08\x00\xaa\x80\x80\x80\x80\x80\x00\x01x",
        "group": b"\x12\x04\x0b\x08\x01\x0c",
        "field_number_0": b"\x12\x02\x00\x01",
        "no_utf_8": b"\x0a\x06\x0a\x04\x0a\x02\xff\xfe",
        "deep": b"\x1a\x7e" + b"\x12\x7c" * 60,
    }


def _requests() -> dict[str, bytes]:
    from kvrelay.v1 import inference_pb2 as pb
    from kvrelay.v1 import session_pb2

    sampling = session_pb2.SamplingParams(
        temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5,
        logit_bias={7: 1.0}, seed=2**64 - 1, stop=[b"end", "\u00e9".encode()], stop_token_ids=[3], min_tokens=1, max_tokens=4,
        ignore_eos=True, logprobs=2, n=2,
    )  # fmt: skip
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])
    return {
        "text": pb.GenerateRequest(
            text="hello", sampling=sampling, tenant="t", idempotency_key="k"
        ).SerializeToString(),
        "chat": pb.GenerateRequest(chat=chat, sampling=sampling, resumable=True).SerializeToString(),
        "token_ids": pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2, 3]), coalesce_ms=5).SerializeToString(),
    }


def _records() -> dict[str, bytes]:
    """Fields and values by turns, with NUL between; its token ids have none."""
    from tests.state.test_request_record import as_stored
    from tests.support.redis_fixtures import make_record

    stored = as_stored(make_record(prompt_token_ids=(0x01010101, 0x02020202, 0x03030303)))
    return {"record": b"\0".join(part for field in stored.items() for part in field)}


def _members() -> dict[str, bytes]:
    from kvrelay.core.member import Member, MemberRole
    from kvrelay.state.member_registry import _encode

    return {"decode": _encode(Member("w", MemberRole.DECODE, "127.0.0.1:1", "m", "f")).encode()}


def _frames() -> dict[str, bytes]:
    from kvrelay.v1 import inference_pb2 as pb
    from kvrelay.v1 import session_pb2

    token = session_pb2.Token(token_id=3, logprob=-1.0)
    return {
        "accepted": pb.GenerateResponse(accepted=pb.Accepted(request_id="a" * 32, model="m")).SerializeToString(),
        "delta": pb.GenerateResponse(delta=pb.Delta(index=4, tokens=[token], text="\u00e9")).SerializeToString(),
        "finished": pb.GenerateResponse(finished=pb.Finished(usage=pb.Usage(num_prompt_tokens=3))).SerializeToString(),
    }


MAKERS = {"push": _push_messages, "request": _requests, "record": _records, "member": _members, "frame": _frames}


def main() -> None:
    """Writes what the code makes; files that were added by hand stay."""
    for folder, make in MAKERS.items():
        (FOLDER / folder).mkdir(parents=True, exist_ok=True)
        for name, message in make().items():
            (FOLDER / folder / f"{name}.bin").write_bytes(message)


if __name__ == "__main__":
    main()

"""A model's tokenizer files as VllmEngine.GetTokenizer sends them: a zip archive in pieces, the last with its SHA-256."""

import hashlib
import io
import zipfile
from collections.abc import Iterator, Mapping

from kvrelay.vllm_engine.messages import Message, common_pb

PIECE_BYTES = 64 * 1024


def bundle(files: Mapping[str, bytes]) -> bytes:
    """The archive: content by file name, compressed. Takes some 100 ms for a large vocabulary: call it off the event loop."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            archive.writestr(name, content)
    return buffer.getvalue()


def pieces(archive: bytes) -> Iterator[Message]:
    """GetTokenizer's messages."""
    digest = hashlib.sha256(archive).hexdigest()
    for begin in range(0, len(archive), PIECE_BYTES):
        end = begin + PIECE_BYTES
        yield common_pb.GetTokenizerChunk(data=archive[begin:end], sha256=digest if end >= len(archive) else "")

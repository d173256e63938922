"""A model's tokenizer files for VllmEngine.GetTokenizer: a zip archive in pieces."""

import hashlib
import io
import zipfile
from collections.abc import Iterator, Mapping

from kvrelay.vllm_engine.messages import Message, common_pb

PIECE_BYTES = 64 * 1024


def bundle(files: Mapping[str, bytes]) -> bytes:
    """Zips contents by file name. Takes about 100 ms, so call it off the event loop."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            archive.writestr(name, content)
    return buffer.getvalue()


def pieces(archive: bytes) -> Iterator[Message]:
    """The last piece carries the archive's SHA-256."""
    digest = hashlib.sha256(archive).hexdigest()
    for begin in range(0, len(archive), PIECE_BYTES):
        end = begin + PIECE_BYTES
        yield common_pb.GetTokenizerChunk(data=archive[begin:end], sha256=digest if end >= len(archive) else "")

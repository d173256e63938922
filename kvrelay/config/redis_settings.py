"""Settings of the way to Redis. Secrets come as files."""

from pydantic import Field

from kvrelay.config.base import Settings
from kvrelay.errors import ConfigError
from kvrelay.state.redis_url import TLS_SETTINGS, with_password_of, with_sentinel_password_of, with_tls_of


class RedisSettings(Settings):
    redis_url: str | None = Field(
        default=None,
        description="Redis or Valkey, such as redis://HOST:6379/0. A cluster's scheme is redis+cluster, with some of its "
        "nodes as HOST:PORT,HOST:PORT; behind Sentinels redis+sentinel, with these and /SERVICE. Every process needs it.",
    )
    redis_password_file: str | None = Field(
        default=None,
        description="File with the password of --redis-url, which then needs none: flags are seen by other users.",
    )
    sentinel_pass_file: str | None = Field(
        default=None,
        description="File with the password of the Sentinels of a redis+sentinel:// url, if they have one.",
    )
    redis_tls_ca: str | None = Field(
        default=None,
        description="PEM file with the CAs of Redis's certificate, for rediss:// urls. Default: the system's CAs.",
    )
    redis_tls_cert: str | None = Field(
        default=None,
        description="PEM file with this process's certificate for Redis; read again when it changes, as all three are.",
    )
    redis_tls_key: str | None = Field(default=None, description="PEM file with the private key of --redis-tls-cert.")
    redis_timeout_ms: int = Field(default=200, ge=1, description="Most time for one Redis operation.")

    def required_redis_url(self) -> str:
        """With the password and the certificates of the other settings. ConfigError without --redis-url."""
        if self.redis_url is None:
            raise ConfigError(
                "redis_url is missing: give --redis-url, or use `kvrelay serve all`, which starts a Valkey of its own"
            )
        url = with_tls_of(self.redis_url, {name: getattr(self, name) for name in TLS_SETTINGS})
        if self.redis_password_file is not None:
            url = with_password_of(url, self.redis_password_file)
        if self.sentinel_pass_file is not None:
            url = with_sentinel_password_of(url, self.sentinel_pass_file)
        return url


IN_THE_URL = ("redis_password_file", "sentinel_pass_file", *TLS_SETTINGS)
"""What `required_redis_url` has in it."""

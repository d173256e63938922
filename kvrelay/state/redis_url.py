"""Parses Redis urls, and shows them without secrets. Connects to nothing.

    redis://USER:PASSWORD@HOST:PORT/DATABASE             over TCP; [::1] for an IPv6 address
    rediss://...?ssl_ca_certs=FILE                       over TLS
    unix:///PATH?db=DATABASE                             through a Unix socket
    redis+cluster://USER:PASSWORD@HOST:PORT,HOST:PORT    nodes of a cluster; rediss+cluster://
    redis+sentinel://USER:PASSWORD@HOST:PORT,HOST:PORT/SERVICE/DATABASE
                                                         Sentinels; rediss+sentinel://

Errors quote only parts of a url that cannot belong to a mistyped password.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

from kvrelay.errors import ConfigError

DEFAULT_PORT, DEFAULT_SENTINEL_PORT = 6379, 26379
MAX_DATABASE = 2**31 - 1
MAX_HOSTS = 64
SCHEMES = (
    *("redis", "rediss", "redis+cluster", "rediss+cluster"),
    *("redis+sentinel", "rediss+sentinel", "unix"),
)

CERTIFICATE_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
TLS_OPTIONS = (
    *CERTIFICATE_FILES,
    "ssl_ca_path",
    "ssl_ca_data",
    "ssl_password",
    "ssl_ciphers",
    "ssl_cert_reqs",
    "ssl_check_hostname",
)
TLS_SETTINGS = dict(zip(("redis_tls_ca", "redis_tls_cert", "redis_tls_key"), CERTIFICATE_FILES, strict=True))
"""The option of a url that each setting stands for."""

_CREDENTIALS = ("username", "password")
_SENTINEL_CREDENTIALS = ("sentinel_username", "sentinel_password")
_OPTIONS = ("db", *_CREDENTIALS, *_SENTINEL_CREDENTIALS, "client_name", *TLS_OPTIONS)
_OWN_OPTIONS = {
    **dict.fromkeys(
        ("socket_timeout", "socket_connect_timeout", "timeout"), "--redis-timeout-ms bounds every operation"
    ),
    **dict.fromkeys(("max_connections", "protocol", "decode_responses", "retry_on_timeout"), "kvrelay has its own"),
    "ssl": "write rediss:// instead",
}
"""Options of other clients' urls, and what to do instead."""
_CERTIFICATE_CHECKS = ("none", "optional", "required")
_SWITCHES = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]{0,30})://")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+(?:%[\w.\-]+)?\]|[\w.\-]*)(?::(\d{1,5}))?")
_SERVICE = re.compile(r"[\w.\-]{1,128}")
_OPTION_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")
_ENCODE = (
    "characters of a user or password such as / ? # @ : [ ] must be percent-encoded (/ is %2F, # is %23, @ is %40)"
)


class RedisKind(StrEnum):
    SINGLE = ""
    CLUSTER = "cluster"
    SENTINEL = "sentinel"


@dataclass(frozen=True, slots=True)
class RedisTarget:
    address: str
    """host:port, several with commas, or the socket's path: for logs."""
    scheme: str
    """redis, rediss or unix."""
    location: Mapping[str, Any]
    """`host` and `port`, the first of several, or `path`."""
    database: int
    username: str | None
    password: str | None = field(repr=False)
    options: Mapping[str, Any] = field(repr=False)
    """Further arguments of redis-py's connection."""
    kind: RedisKind = RedisKind.SINGLE
    hosts: tuple[tuple[str, int], ...] = ()
    service: str = ""
    """What the Sentinels call the primary and its replicas."""
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)

    @property
    def uses_tls(self) -> bool:
        return self.scheme == "rediss"


def parse_redis_url(url: str) -> RedisTarget:
    """Raises ConfigError, without secrets, for a wrong url or an unknown option."""
    full_scheme, authority, path, query = _split(url)
    scheme, _, kind_name = full_scheme.partition("+")
    kind = RedisKind(kind_name)
    options = _parse_query(url, scheme, kind, query)
    userinfo, _, host = authority.rpartition("@")
    user, _, secret = userinfo.partition(":")
    given = {name: options.pop(name, None) for name in (*_CREDENTIALS, *_SENTINEL_CREDENTIALS)}
    hosts: tuple[tuple[str, int], ...] = ()
    service, database = "", options.pop("db", None)
    if scheme == "unix":
        location, address = _socket(url, host, path)
    else:
        hosts, address = _hosts(url, kind, host)
        location = dict(zip(("host", "port"), hosts[0], strict=True))
        if kind is RedisKind.SENTINEL:
            service, path = _service(url, path)
        database = database or unquote(path).strip("/")
    number = _database(url, database or "0")
    if kind is RedisKind.CLUSTER and number:
        raise _error(url, "a Redis Cluster has database 0 only: leave the number out")
    return RedisTarget(
        address,
        scheme,
        location,
        number,
        unquote(user) or given["username"],
        unquote(secret) or given["password"],
        options,
        kind,
        hosts,
        service,
        given["sentinel_username"],
        given["sentinel_password"],
    )


def with_password_of(url: str, file: str) -> str:
    """Raises ConfigError if the file has no password, or the url has one already."""
    if parse_redis_url(url).password is not None:
        raise _error(url, "it has a password, and so has --redis-password-file: leave one of them out")
    return _with_options(url, {"password": _read_password("redis_password_file", file)})


def with_sentinel_password_of(url: str, file: str) -> str:
    """Raises ConfigError as `with_password_of`, and where the url names no Sentinels."""
    target = parse_redis_url(url)
    if target.kind is not RedisKind.SENTINEL:
        raise _error(url, "it names no Sentinels: write redis+sentinel://, or leave sentinel_pass_file out")
    if target.sentinel_password is not None:
        raise _error(url, "it has sentinel_password, and there is --sentinel-pass-file: leave one out")
    return _with_options(url, {"sentinel_password": _read_password("sentinel_pass_file", file)})


def _read_password(setting: str, file: str) -> str:
    try:
        password = Path(file).read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{setting} is {file!r}, which cannot be read: {reason}") from None
    if not password:
        raise ConfigError(f"{setting} is {file!r}, which is empty: write the password into it")
    return password


def with_tls_of(url: str, files: Mapping[str, str | None]) -> str:
    """`files` by TLS_SETTINGS. Raises ConfigError where they do not fit."""
    given = {name: file for name, file in files.items() if file is not None}
    if not given:
        return url
    target = parse_redis_url(url)
    if not target.uses_tls:
        raise _error(
            url, f"write rediss{target.kind and f'+{target.kind}'}:// for TLS, or leave {' and '.join(given)} out"
        )
    if ("redis_tls_cert" in given) != ("redis_tls_key" in given):
        raise ConfigError("redis_tls_cert and redis_tls_key go together: give both or none")
    for name, file in given.items():
        if TLS_SETTINGS[name] in target.options:
            raise _error(url, f"it has {TLS_SETTINGS[name]}, which is {name} too: leave one of them out")
        if not Path(file).is_file():
            raise ConfigError(f"{name} is {file!r}, which is no file; `kvrelay certs dev` makes files")
    return _with_options(url, {TLS_SETTINGS[name]: file for name, file in given.items()})


def shown(url: str) -> str:
    """Without anything that may be a secret."""
    scheme_match = _SCHEME.match(url)
    scheme = scheme_match[0] if scheme_match else ""
    secret, at, rest = url[len(scheme) :].rpartition("@")
    hidden = "***@" if at else ""
    place, question_mark, query = rest.partition("?")
    authority, slash, path = place.partition("/")
    if not all(_HOST.fullmatch(each) for each in authority.split(",")) or (at and "?" in secret):
        return f"{scheme}{hidden}***"
    path = path if scheme == "unix://" or re.fullmatch(r"[\w.\-/]{0,32}", path) else "***"
    names = [name if _OPTION_NAME.fullmatch(name) else "***" for name, _ in parse_qsl(query, keep_blank_values=True)]
    return f"{scheme}{hidden}{authority}{slash}{path}" + question_mark + "&".join(f"{name}=***" for name in names)


def _split(url: str) -> tuple[str, str, str, str]:
    match = _SCHEME.match(url)
    scheme = match[1].lower() if match else ""
    if match is None or scheme not in SCHEMES:
        raise _error(url, f"it must begin with {', '.join(f'{name}://' for name in SCHEMES[:-1])} or {SCHEMES[-1]}://")
    place, _, query = url[match.end() :].partition("?")
    authority, slash, path = place.partition("/")
    if "#" in url or "@" in path or (scheme != "unix" and "@" in query.partition("=")[0]):
        raise _error(url, _ENCODE)
    return scheme, authority, slash + path, query


def _parse_query(url: str, scheme: str, kind: RedisKind, query: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _OPTIONS:
            raise _error(url, _unknown_option(name))
        if name in TLS_OPTIONS and scheme != "rediss":
            raise _error(url, f"the option {name} is for TLS: write rediss{kind and f'+{kind}'}://")
        if name in _SENTINEL_CREDENTIALS and kind is not RedisKind.SENTINEL:
            raise _error(url, f"the option {name} is for Sentinels: write redis+sentinel://")
        if name in options:
            raise _error(url, f"the option {name} is given twice")
        options[name] = value
    _check_tls_options(url, options)
    return options


def _unknown_option(name: str) -> str:
    if name in _OWN_OPTIONS:
        return f"the option {name} cannot be given in it: {_OWN_OPTIONS[name]}"
    if _OPTION_NAME.fullmatch(name) is None:
        return f"what follows the question mark is no option; {_ENCODE}"
    return f"{name} is no option of it; there are {', '.join(_OPTIONS)}"


def _check_tls_options(url: str, options: dict[str, Any]) -> None:
    checks = options.get("ssl_cert_reqs")
    if checks is not None and checks not in _CERTIFICATE_CHECKS:
        raise _error(url, f"ssl_cert_reqs must be one of {', '.join(_CERTIFICATE_CHECKS)}")
    check_hostname = options.get("ssl_check_hostname")
    if check_hostname is not None:
        if check_hostname.lower() not in _SWITCHES:
            raise _error(url, "ssl_check_hostname must be true or false")
        options["ssl_check_hostname"] = _SWITCHES[check_hostname.lower()]
    for name in CERTIFICATE_FILES:
        if name in options and not Path(options[name]).is_file():
            raise _error(url, f"{name} names no file that can be found: {options[name]}")


def _socket(url: str, host: str, path: str) -> tuple[dict[str, Any], str]:
    if host or not path.strip("/"):
        raise _error(url, "a socket is written unix:///path/of/the.sock, with three slashes")
    return {"path": unquote(path)}, unquote(path)


def _hosts(url: str, kind: RedisKind, authority: str) -> tuple[tuple[tuple[str, int], ...], str]:
    places = authority.split(",")
    if kind is RedisKind.SINGLE and len(places) > 1:
        raise _error(
            url,
            "it names several hosts: write redis+cluster:// for nodes of a Redis Cluster, or "
            "redis+sentinel://HOST:PORT,HOST:PORT/SERVICE for Sentinels",
        )
    if len(places) > MAX_HOSTS:
        raise _error(url, f"it names more than {MAX_HOSTS} hosts: a few are enough, the others are found through them")
    if len(places) > 1 and not all(places):
        raise _error(url, "a host is missing before or after a comma")
    default = DEFAULT_SENTINEL_PORT if kind is RedisKind.SENTINEL else DEFAULT_PORT
    hosts, addresses = zip(*(_host_and_port(url, place, default) for place in places), strict=True)
    return hosts, ",".join(addresses)


def _service(url: str, path: str) -> tuple[str, str]:
    """The service's name, and the rest of the path."""
    service, _, rest = path.strip("/").partition("/")
    service = unquote(service)
    if _SERVICE.fullmatch(service) is None:
        raise _error(
            url,
            "after the Sentinels comes the name under which they watch the primary, such as the mymaster of "
            "redis+sentinel://127.0.0.1:26379/mymaster/0",
        )
    return service, rest


def _host_and_port(url: str, authority: str, default_port: int) -> tuple[tuple[str, int], str]:
    match = _HOST.fullmatch(authority)
    if match is None and authority.count(":") > 1 and re.fullmatch(r"[0-9A-Fa-f:.]+", authority):
        raise _error(url, "an IPv6 address is written in brackets, such as redis://[::1]:6379")
    if match is None or (match[2] is not None and not 0 < int(match[2]) < 65536):
        raise _error(
            url, f"after the host comes a port between 1 and 65535, such as redis://127.0.0.1:6379/0; {_ENCODE}"
        )
    host, port = match[1].strip("[]") or "localhost", int(match[2] or default_port)
    return (host, port), f"{match[1] or host}:{port}"


def _database(url: str, text: str) -> int:
    if re.fullmatch(r"[0-9]{1,10}", text) is None or int(text) > MAX_DATABASE:
        raise _error(url, "the database is a number, such as the 0 of redis://127.0.0.1:6379/0")
    return int(text)


def _with_options(url: str, options: Mapping[str, str]) -> str:
    added = "&".join(f"{name}={quote(value, safe='')}" for name, value in options.items())
    return f"{url}{'&' if '?' in url else '?'}{added}"


def _error(url: str, problem: str) -> ConfigError:
    return ConfigError(f"redis_url is {shown(url)!r}: {problem}")

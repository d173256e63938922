"""Parses Redis urls, and shows them without secrets. Connects to nothing.

    redis://USER:PASSWORD@HOST:PORT/DATABASE     over TCP; [::1] for an IPv6 address
    rediss://...?ssl_ca_certs=FILE               over TLS
    unix:///PATH?db=DATABASE                     through a Unix socket

Errors quote only parts of a url that cannot belong to a mistyped password.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

from kvrelay.errors import ConfigError

DEFAULT_PORT = 6379
MAX_DATABASE = 2**31 - 1
SCHEMES = ("redis", "rediss", "unix")

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
_OPTIONS = ("db", *_CREDENTIALS, "client_name", *TLS_OPTIONS)
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
_OPTION_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")
_ENCODE = (
    "characters of a user or password such as / ? # @ : [ ] must be percent-encoded (/ is %2F, # is %23, @ is %40)"
)


@dataclass(frozen=True, slots=True)
class RedisTarget:
    address: str
    """host:port, or the socket's path: for logs."""
    scheme: str
    location: Mapping[str, Any]
    """`host` and `port`, or `path`."""
    database: int
    username: str | None
    password: str | None = field(repr=False)
    options: Mapping[str, Any] = field(repr=False)
    """Further arguments of redis-py's connection."""

    @property
    def uses_tls(self) -> bool:
        return self.scheme == "rediss"


def parse_redis_url(url: str) -> RedisTarget:
    """Raises ConfigError, without secrets, for a wrong url or an unknown option."""
    scheme, authority, path, query = _split(url)
    options = _parse_query(url, scheme, query)
    userinfo, _, host = authority.rpartition("@")
    user, _, secret = userinfo.partition(":")
    username = unquote(user) or options.pop("username", None)
    password = unquote(secret) or options.pop("password", None)
    options.pop("username", None)
    options.pop("password", None)
    if scheme == "unix":
        location, address = _socket(url, host, path)
        database = options.pop("db", "0")
    else:
        location, address = _host_and_port(url, host)
        database = options.pop("db", None) or unquote(path).strip("/") or "0"
    return RedisTarget(address, scheme, location, _database(url, database), username, password, options)


def with_password_of(url: str, file: str) -> str:
    """Raises ConfigError if the file has no password, or the url has one already."""
    target = parse_redis_url(url)
    if target.password is not None:
        raise _error(url, "it has a password, and so has --redis-password-file: leave one of them out")
    try:
        password = Path(file).read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"redis_password_file is {file!r}, which cannot be read: {reason}") from None
    if not password:
        raise ConfigError(f"redis_password_file is {file!r}, which is empty: write the password into it")
    return _with_options(url, {"password": password})


def with_tls_of(url: str, files: Mapping[str, str | None]) -> str:
    """`files` by TLS_SETTINGS. Raises ConfigError where they do not fit."""
    given = {name: file for name, file in files.items() if file is not None}
    if not given:
        return url
    target = parse_redis_url(url)
    if not target.uses_tls:
        raise _error(url, f"write rediss:// for TLS, or leave {' and '.join(given)} out")
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
    if _HOST.fullmatch(authority) is None or (at and "?" in secret):
        return f"{scheme}{hidden}***"
    path = path if scheme == "unix://" or re.fullmatch(r"[\w\-/]{0,32}", path) else "***"
    names = [name if _OPTION_NAME.fullmatch(name) else "***" for name, _ in parse_qsl(query, keep_blank_values=True)]
    return f"{scheme}{hidden}{authority}{slash}{path}" + question_mark + "&".join(f"{name}=***" for name in names)


def _split(url: str) -> tuple[str, str, str, str]:
    match = _SCHEME.match(url)
    scheme = match[1].lower() if match else ""
    if "sentinel" in scheme:
        raise _error(url, "Sentinel is not supported; give the address of the primary itself")
    if "cluster" in scheme:
        raise _error(url, "a Redis Cluster is not supported; give the address of a Redis that is none")
    if match is None or scheme not in SCHEMES:
        raise _error(url, f"it must begin with {', '.join(f'{name}://' for name in SCHEMES[:-1])} or {SCHEMES[-1]}://")
    place, _, query = url[match.end() :].partition("?")
    authority, slash, path = place.partition("/")
    if "#" in url or "@" in path or (scheme != "unix" and "@" in query.partition("=")[0]):
        raise _error(url, _ENCODE)
    return scheme, authority, slash + path, query


def _parse_query(url: str, scheme: str, query: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _OPTIONS:
            raise _error(url, _unknown_option(name))
        if name in TLS_OPTIONS and scheme != "rediss":
            raise _error(url, f"the option {name} is for TLS: write rediss://")
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


def _host_and_port(url: str, authority: str) -> tuple[dict[str, Any], str]:
    match = _HOST.fullmatch(authority)
    if match is None and authority.count(":") > 1 and re.fullmatch(r"[0-9A-Fa-f:.]+", authority):
        raise _error(url, "an IPv6 address is written in brackets, such as redis://[::1]:6379")
    if match is None or (match[2] is not None and not 0 < int(match[2]) < 65536):
        raise _error(
            url, f"after the host comes a port between 1 and 65535, such as redis://127.0.0.1:6379/0; {_ENCODE}"
        )
    host, port = match[1].strip("[]") or "localhost", int(match[2] or DEFAULT_PORT)
    return {"host": host, "port": port}, f"{match[1] or host}:{port}"


def _database(url: str, text: str) -> int:
    if re.fullmatch(r"[0-9]{1,10}", text) is None or int(text) > MAX_DATABASE:
        raise _error(url, "the database is a number, such as the 0 of redis://127.0.0.1:6379/0")
    return int(text)


def _with_options(url: str, options: Mapping[str, str]) -> str:
    added = "&".join(f"{name}={quote(value, safe='')}" for name, value in options.items())
    return f"{url}{'&' if '?' in url else '?'}{added}"


def _error(url: str, problem: str) -> ConfigError:
    return ConfigError(f"redis_url is {shown(url)!r}: {problem}")

"""What Redis urls name, and that an error about one quotes no secret."""

from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.errors import ConfigError
from kvrelay.state.redis_url import (
    RedisKind,
    parse_redis_url,
    shown,
    with_password_of,
    with_sentinel_password_of,
    with_tls_of,
)

SECRET = "S3cretPw"


@pytest.mark.parametrize(
    ("url", "location", "database", "user", "password"),
    [
        ("redis://127.0.0.1:6380/3", {"host": "127.0.0.1", "port": 6380}, 3, None, None),
        ("redis://", {"host": "localhost", "port": 6379}, 0, None, None),
        ("redis://h/", {"host": "h", "port": 6379}, 0, None, None),
        ("redis://h?db=5", {"host": "h", "port": 6379}, 5, None, None),
        ("rediss://:p%40%2F%23%3F@h/1", {"host": "h", "port": 6379}, 1, None, "p@/#?"),
        ("redis://us%3Aer:p@ss:word@h", {"host": "h", "port": 6379}, 0, "us:er", "p@ss:word"),
        ("redis://h?username=u&password=a%26b%3D", {"host": "h", "port": 6379}, 0, "u", "a&b="),
        ("redis://[::1]:7000/2", {"host": "::1", "port": 7000}, 2, None, None),
        ("redis://u:p@[2001:db8::7]", {"host": "2001:db8::7", "port": 6379}, 0, "u", "p"),
        ("unix:///run/redis/a%20b.sock?db=3", {"path": "/run/redis/a b.sock"}, 3, None, None),
        ("unix://u:p@/s.sock", {"path": "/s.sock"}, 0, "u", "p"),
    ],
)
def test_a_url_names_where_redis_is_and_how_to_get_in(
    url: str, location: dict[str, object], database: int, user: str | None, password: str | None
) -> None:
    target = parse_redis_url(url)
    assert (target.location, target.database, target.username, target.password) == (location, database, user, password)


@pytest.mark.parametrize(
    ("url", "kind", "hosts", "service", "database"),
    [
        ("redis+cluster://h:7000", RedisKind.CLUSTER, (("h", 7000),), "", 0),
        (
            "redis+cluster://h:7000,[::1]:7001,h3/0",
            RedisKind.CLUSTER,
            (("h", 7000), ("::1", 7001), ("h3", 6379)),
            "",
            0,
        ),
        ("rediss+cluster://u:p@h1,h2/", RedisKind.CLUSTER, (("h1", 6379), ("h2", 6379)), "", 0),
        ("redis+sentinel://h/mymaster", RedisKind.SENTINEL, (("h", 26379),), "mymaster", 0),
        (
            "rediss+sentinel://u:p@h1:1,h2/my.master-2/3",
            RedisKind.SENTINEL,
            (("h1", 1), ("h2", 26379)),
            "my.master-2",
            3,
        ),
        ("redis+sentinel://h/m?db=4&sentinel_password=s", RedisKind.SENTINEL, (("h", 26379),), "m", 4),
    ],
)
def test_a_url_names_a_cluster_or_sentinels(
    url: str, kind: RedisKind, hosts: tuple[tuple[str, int], ...], service: str, database: int
) -> None:
    target = parse_redis_url(url)
    assert (target.kind, target.hosts, target.service, target.database) == (kind, hosts, service, database)
    assert target.uses_tls == url.startswith("rediss")
    assert (target.username, target.password) == (("u", "p") if "u:p@" in url else (None, None))
    assert target.sentinel_password == ("s" if "sentinel_password" in url else None)


def test_sentinels_have_a_user_and_a_password_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "password").write_text(f"{SECRET}&=\n", "utf-8")
    url = with_sentinel_password_of("redis+sentinel://u:p@h1,h2/m/2?sentinel_username=watcher", f"{tmp_path}/password")
    target = parse_redis_url(url)
    assert (target.sentinel_username, target.sentinel_password) == ("watcher", f"{SECRET}&=")
    assert (target.username, target.password, target.service, target.database) == ("u", "p", "m", 2)
    assert SECRET not in shown(url)
    assert SECRET not in repr(target)


@pytest.mark.parametrize(
    ("url", "content", "problem"),
    [
        ("redis://h", "x", "names no Sentinels"),
        ("redis+cluster://h", "x", "names no Sentinels"),
        (f"redis+sentinel://h/m?sentinel_password={SECRET}", "x", "leave one out"),
        ("redis+sentinel://h/m", "", "is empty"),
    ],
)
def test_a_password_file_of_sentinels_that_does_not_fit_is_refused(
    url: str, content: str, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text(content, "utf-8")
    with pytest.raises(ConfigError, match=problem) as refusal:
        with_sentinel_password_of(url, f"{tmp_path}/password")
    assert SECRET not in refusal.value.message


def test_options_of_tls_are_taken_over(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("")
    target = parse_redis_url(f"rediss://h?ssl_cert_reqs=none&ssl_check_hostname=False&ssl_ca_certs={tmp_path}/ca.pem")
    assert target.options == {
        "ssl_cert_reqs": "none",
        "ssl_check_hostname": False,
        "ssl_ca_certs": f"{tmp_path}/ca.pem",
    }
    assert target.uses_tls


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("127.0.0.1:6379", "must begin with redis://"),
        ("http://h", "must begin with redis://"),
        ("", "must begin with redis://"),
        ("sentinel://h:26379", "redis+sentinel://"),
        ("redis+bogus://h:26379", "redis+cluster://"),
        ("unix+cluster:///s.sock", "must begin with redis://"),
        ("redis+cluster://h:7000/1", "database 0 only"),
        ("redis+cluster://h:7000?db=1", "database 0 only"),
        ("redis+cluster://h1,,h2", "a host is missing"),
        ("redis+cluster://" + ",".join(["h"] * 65), "more than 64 hosts"),
        ("redis+cluster://h1:1,h2:x", "a port between 1 and 65535"),
        ("redis+cluster://h?sentinel_password=x", "is for Sentinels"),
        ("redis://h?sentinel_username=x", "is for Sentinels"),
        ("redis+sentinel://h:26379", "the name under which they watch the primary"),
        ("redis+sentinel://h:26379/", "the name under which they watch the primary"),
        ("redis+sentinel://h/my%20master", "the name under which they watch the primary"),
        ("redis+sentinel://h/mymaster/x", "the database is a number"),
        ("redis+cluster://h?ssl_ca_certs=/x", "rediss+cluster://"),
        ("redis://h/abc", "the database is a number"),
        ("redis://h/-1", "the database is a number"),
        ("redis://h/0/1", "the database is a number"),
        ("redis://h?db=x", "the database is a number"),
        ("redis://h:99999", "a port between 1 and 65535"),
        ("redis://h:0", "a port between 1 and 65535"),
        ("redis://h:63x9", "a port between 1 and 65535"),
        ("redis://h1:6379,h2:6379", "redis+cluster:// for nodes"),
        ("redis://::1:6379", "in brackets"),
        ("redis://h?nonsense=1", "nonsense is no option"),
        ("redis://h?ssl_ca_certs=/x", "rediss://"),
        ("redis://h?ssl=true", "rediss://"),
        ("redis://h?socket_timeout=5", "--redis-timeout-ms"),
        ("redis://h?protocol=3", "protocol cannot be given"),
        ("redis://h?db=1&db=2", "given twice"),
        ("rediss://h?ssl_cert_reqs=bogus", "none, optional, required"),
        ("rediss://h?ssl_check_hostname=perhaps", "true or false"),
        ("rediss://h?ssl_ca_certs=/no/such/file", "/no/such/file"),
        ("unix://run/redis.sock", "three slashes"),
        ("unix://", "three slashes"),
        ("redis://u:p#w@h", "percent-encoded"),
        ("redis://u:p/w@h", "percent-encoded"),
        ("redis://u:p?w@h", "percent-encoded"),
        ("redis://u:123?4@h", "percent-encoded"),
    ],
)
def test_a_url_that_is_none_is_refused_and_says_why(url: str, problem: str) -> None:
    with pytest.raises(ConfigError, match="redis_url is ") as refusal:
        parse_redis_url(url)
    assert problem in refusal.value.message


@pytest.mark.parametrize(
    "url",
    [
        f"reddis://kv:{SECRET}@127.0.0.1:6379/0",
        f"kv:{SECRET}@127.0.0.1:6379",
        f"redis:/kv:{SECRET}@h",
        f"redis://kv:{SECRET}@127.0.0.1:63x9/0",
        f"redis://:{SECRET}",
        f"redis://:{SECRET}/0",
        f"redis://:{SECRET}@h/abc",
        f"redis://kv:{SECRET}@h?nonsense=1",
        f"redis://kv:{SECRET}@h?ssl_cert_reqs=bogus",
        f"redis://h?passwd={SECRET}",
        f"redis://h?password={SECRET}&nonsense=1",
        f"redis://h?password={SECRET}@x&nonsense=1",
        f"redis://h?{SECRET}",
        f"redis://u:a?{SECRET}@h",
        f"redis://u:12?{SECRET}@h",
        f"redis://u:a/{SECRET}@h",
        f"redis://u:a#{SECRET}@h",
        f"redis://u:{SECRET}@a@h/x",
        f"unix://u:{SECRET}@x/s.sock",
        f"redis+sentinel://u:{SECRET}@h/",
        f"redis+sentinel://u:{SECRET}@h1,h2/m/x",
        f"redis+sentinel://h/m?sentinel_password={SECRET}&nonsense=1",
        f"redis+cluster://u:{SECRET}@h1,h2/1",
        f"redis://u:{SECRET}@h1,h2",
        f"redis+cluster://:{SECRET},h2",
    ],
)
def test_an_error_about_a_url_quotes_no_secret(url: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_redis_url(url)
    assert SECRET not in str(refusal.value)


CHARACTERS = st.characters(codec="ascii", categories=("L", "N", "P", "S"))
PASSWORDS = st.text(CHARACTERS, max_size=12).map(lambda text: f"{text}{SECRET}")


@given(PASSWORDS)
def test_any_password_gets_through_percent_encoded(password: str) -> None:
    target = parse_redis_url(f"redis://user:{quote(password, safe='')}@h:1/0")
    assert target.password == password
    assert SECRET not in repr(target)


@given(PASSWORDS)
def test_any_password_that_is_not_encoded_is_used_or_refused_and_never_shown(password: str) -> None:
    url = f"redis://user:{password}@h:1/0"
    assert SECRET not in shown(url)
    problem, target = None, None
    try:
        target = parse_redis_url(url)
    except ConfigError as error:
        problem = error.message
    assert SECRET not in (problem or "")
    assert target is None or target.location == {"host": "h", "port": 1}


@pytest.mark.parametrize("url", ["redis://h", "redis://h?db=5", "rediss://u@h:1/2", "unix:///s.sock", "redis://u:@h/"])
def test_a_password_file_completes_a_url(url: str, tmp_path: Path) -> None:
    password = "p@ss:/?#[]w%rd &+\u00e9"
    (tmp_path / "password").write_text(password + "\n", "utf-8")
    before, after = parse_redis_url(url), parse_redis_url(with_password_of(url, f"{tmp_path}/password"))
    assert after.password == password
    assert (after.location, after.database, after.username) == (before.location, before.database, before.username)


@pytest.mark.parametrize(
    ("url", "content", "problem"),
    [
        ("redis://h", None, "cannot be read: No such file"),
        ("redis://h", b"\xff", "cannot be read: it is not UTF-8"),
        ("redis://h", b" \n", "is empty"),
        (f"redis://:{SECRET}@h", b"other", "leave one of them out"),
        (f"redis://h?password={SECRET}", b"other", "leave one of them out"),
    ],
)
def test_a_password_file_that_does_not_fit_is_refused(
    url: str, content: bytes | None, problem: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "password").write_bytes(content)
    with pytest.raises(ConfigError, match=problem) as refusal:
        with_password_of(url, f"{tmp_path}/password")
    assert SECRET not in refusal.value.message
    assert "other" not in refusal.value.message


@pytest.mark.parametrize("url", ["rediss://h", "rediss://u@h:1/2?client_name=x", f"rediss://:{SECRET}@h/1"])
def test_files_of_tls_complete_a_url(url: str, tmp_path: Path) -> None:
    files = {f"redis_tls_{kind}": f"{tmp_path}/a &?#{kind}" for kind in ("ca", "cert", "key")}
    for file in files.values():
        Path(file).touch()
    before, after = parse_redis_url(url), parse_redis_url(with_tls_of(url, files))
    added = dict(zip(("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"), files.values(), strict=True))
    assert after.options == {**before.options, **added}
    assert (after.location, after.database, after.password) == (before.location, before.database, before.password)
    assert with_tls_of(url, dict.fromkeys(files)) == url


@pytest.mark.parametrize(
    ("url", "given", "problem"),
    [
        (f"redis://:{SECRET}@h", ("ca",), "write rediss:// for TLS, or leave redis_tls_ca out"),
        ("unix:///s.sock", ("cert", "key"), "leave redis_tls_cert and redis_tls_key out"),
        (f"rediss://:{SECRET}@h", ("ca", "cert"), "go together"),
        ("rediss://h", ("key",), "go together"),
        (f"rediss://:{SECRET}@h?ssl_ca_certs={__file__}", ("ca",), "leave one of them out"),
        ("rediss://h", ("ca", "missing"), "which is no file; `kvrelay certs dev`"),
    ],
)
def test_files_of_tls_that_do_not_fit_are_refused(url: str, given: tuple[str, ...], problem: str) -> None:
    files = {f"redis_tls_{kind}": __file__ for kind in given if kind != "missing"}
    if "missing" in given:
        files["redis_tls_ca"] = f"{__file__}.none"
    with pytest.raises(ConfigError, match=problem) as refusal:
        with_tls_of(url, files)
    assert SECRET not in refusal.value.message

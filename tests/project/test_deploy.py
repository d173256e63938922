"""What docker-compose.yml and deploy/ say fits together, and fits the metrics that the processes
export.
"""

import datetime
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
import redis.exceptions
import yaml
from cryptography import x509

from decode_worker import metrics as decode_metrics
from gateway.telemetry import metrics as gateway_metrics
from kvrelay.config.security_settings import SecuritySettings
from kvrelay.config.sources import SECTIONS, setting_fields
from kvrelay.core.member import Member, MemberRole
from kvrelay.observability.metrics.exposition import BUILD_INFO, create_registry
from kvrelay.observability.metrics.families import Family
from kvrelay.security import certificates
from kvrelay.security.certificates import CertificatePlan
from kvrelay.security.principal import Role
from kvrelay.security.process_security import ProcessSecurity
from kvrelay.state.embedded_valkey import EmbeddedValkey
from kvrelay.state.member_registry import MemberRegistry
from kvrelay.state.redis_connection import RedisConnection
from kvrelay.state.redis_url import with_password_of
from kvrelay.state.request_owners import RequestOwners
from kvrelay.state.state_store import StateStore
from kvrelay.worker import metrics
from prefill_worker import metrics as prefill_metrics
from tests.support.redis_fixtures import make_record

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
SCRAPING: dict[str, Any] = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text("utf-8"))
PROVISIONING = ROOT / "deploy/grafana/provisioning"
DATASOURCES: dict[str, Any] = yaml.safe_load((PROVISIONING / "datasources/prometheus.yml").read_text("utf-8"))
PROVIDERS: dict[str, Any] = yaml.safe_load((PROVISIONING / "dashboards/kvrelay.yml").read_text("utf-8"))
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana/dashboards/kvrelay.json").read_text("utf-8"))
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

ROLES = ("gateway", "prefill", "decode")
SERVICES_OF_CLUSTER = ("gateway", "prefill", "decode", "prefill-gpu", "decode-gpu")
WITHOUT_SECRETS = ("model", "grafana")
SECRETS = ("authority", "redis", "gateway", "prefill", "decode", "front", "metrics")
FILES = {"ca": "ca.pem", "cert": "certificate.pem", "key": "certificate.key"}
EXPORTED: tuple[Family, ...] = (
    *gateway_metrics.FAMILIES,
    *metrics.FAMILIES,
    *prefill_metrics.FAMILIES,
    *decode_metrics.FAMILIES,
    BUILD_INFO,
)
OF_PROMETHEUS = {"job", "instance"}
NO_METRICS = {"by", "rate", "sum", "min", "max", "histogram_quantile"}
"""What else stands in expressions, and would have to be added here when used."""


def exported_samples() -> dict[str, set[str]]:
    """Names of samples, as Prometheus stores them, and the labels of each."""
    samples: dict[str, set[str]] = {}
    for family in EXPORTED:
        labels = {*family.labels, *OF_PROMETHEUS}
        if family.kind == "histogram":
            samples |= {
                f"{family.name}_bucket": labels | {"le"},
                f"{family.name}_sum": labels,
                f"{family.name}_count": labels,
            }
        else:
            samples[family.name] = labels
    of_process = create_registry("gateway", ()).collect()
    return samples | {
        sample.name: OF_PROMETHEUS for metric in of_process for sample in metric.samples if sample.name not in samples
    }


def expressions() -> list[tuple[str, str]]:
    """(panel's title, PromQL)."""
    return [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]


def names_in(expression: str) -> set[str]:
    """Metrics that an expression names."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\bby \([^)]*\)", " ", expression)
    return set(re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*", bare)) - NO_METRICS


def labels_in(expression: str) -> set[str]:
    """Labels that an expression selects or groups by."""
    selected = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\"", " ".join(re.findall(r"\{([^}]*)\}", expression)))
    grouped = re.findall(r"\w+", " ".join(re.findall(r"\bby \(([^)]*)\)", expression)))
    return {*selected, *grouped}


def mounts(service: str) -> Iterator[tuple[Path, str]]:
    """What a service has of this folder, and where it sees it."""
    for volume in SERVICES[service]["volumes"]:
        source, target, *_ = volume.split(":")
        if source.startswith("."):
            yield ROOT / source, target


def make_credentials(folder: Path) -> None:
    make = [sys.executable, str(ROOT / "deploy/compose/make_credentials.py"), str(folder)]
    subprocess.run(make, check=True, timeout=120)


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """Volumes as the container `credentials` leaves them, which sees folders that are there."""
    for role in SECRETS:
        (tmp_path / role).mkdir()
    make_credentials(tmp_path)
    return tmp_path


def names_of(certificate: Path) -> list[str]:
    found = x509.load_pem_x509_certificate(certificate.read_bytes())
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.DNSName)


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- compose --------------------------------------------------------------------------------------


def test_the_profile_has_prometheus_and_grafana_with_their_files() -> None:
    assert {name for name, service in SERVICES.items() if "observability" in service.get("profiles", ())} == {
        "prometheus",
        "grafana",
    }
    seen = {target: source for service in ("prometheus", "grafana") for source, target in mounts(service)}
    assert [source for source in seen.values() if not source.exists()] == []
    assert seen["/etc/prometheus/prometheus.yml"] == ROOT / "deploy/prometheus/prometheus.yml"
    assert seen["/etc/grafana/provisioning"] == PROVISIONING
    assert seen[PROVIDERS["providers"][0]["options"]["path"]] == ROOT / "deploy/grafana/dashboards"


def test_images_are_pinned() -> None:
    images = [
        service["image"]
        for service in SERVICES.values()
        if "build" not in service and not service["image"].startswith("kvrelay-")
    ]
    assert len(images) == 3
    assert [image for image in images if not re.fullmatch(r"[a-z/]+:v?\d+(\.\d+)*(@sha256:[0-9a-f]{64})?", image)] == []


def test_ports_are_published_on_the_loopback_only() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert len(published) >= 5
    assert [port for port in published if not port.startswith("127.0.0.1:")] == []


def test_containers_have_no_capabilities_no_writable_root_and_limits() -> None:
    for name, service in SERVICES.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"] is True, name
        assert service["pids_limit"], name
        assert service["mem_limit"], name


def test_only_gateways_and_workers_share_a_network_with_redis() -> None:
    networks = {name: set(service.get("networks", ())) for name, service in SERVICES.items()}
    assert networks["redis"] == {"cluster"}
    assert COMPOSE["networks"]["cluster"] == {"internal": True}
    with_redis = {name for name, names in networks.items() if "cluster" in names}
    assert with_redis == {"redis", "gateway", "prefill", "decode", "prefill-gpu", "decode-gpu"}
    assert networks["openai"] == {"clients"}


def test_nothing_runs_insecure_and_redis_has_no_plain_port() -> None:
    assert "INSECURE" not in (ROOT / "docker-compose.yml").read_text("utf-8").upper()
    command = SERVICES["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert (options["--port"], options["--tls-port"], options["--tls-auth-clients"]) == ("0", "6379", "yes")
    for name in SERVICES_OF_CLUSTER:
        variables = SERVICES[name]["environment"]
        assert variables["KVRELAY_REDIS_URL"].startswith("rediss://")
        assert {f"KVRELAY_REDIS_TLS_{kind}" for kind in ("CA", "CERT", "KEY")} <= variables.keys()
    assert [name for name in SERVICES if "KVRELAY_LOCAL_CLIENTS" in SERVICES[name].get("environment", ())] == [
        "gateway",
        "openai",
    ]


def test_each_container_sees_the_secrets_of_its_own_role_only() -> None:
    for name, service in SERVICES.items():
        mounted = [volume for volume in service.get("volumes", ()) if "/secrets" in volume]
        if name in WITHOUT_SECRETS:
            assert mounted == [], name
        elif name in SERVICES_OF_CLUSTER or name == "redis":
            assert mounted == [f"{name.removesuffix('-gpu')}-secrets:/secrets/own:ro"], name
    assert SERVICES["openai"]["volumes"] == ["front-secrets:/secrets/own:ro"]
    assert [volume for volume in SERVICES["prometheus"]["volumes"] if "secrets" in volume] == [
        "metrics-secrets:/secrets/own:ro"
    ]
    # Only the container that makes them, and has no network, sees the CA's key.
    assert [name for name, service in SERVICES.items() if "authority" in str(service.get("volumes"))] == ["credentials"]
    assert SERVICES["credentials"]["network_mode"] == "none"
    made = {volume.split(":")[1] for volume in SERVICES["credentials"]["volumes"] if "/secrets/" in volume}
    assert made == {f"/secrets/{role}" for role in SECRETS}
    folders = re.search(r"mkdir -p (.+?) \\\n.*for role in ([a-z ]+);", (ROOT / "Dockerfile").read_text("utf-8"), re.S)
    assert folders is not None
    assert made <= {*folders[1].split(), *(f"/secrets/{role}" for role in folders[2].split())}


def test_names_that_are_dialled_stand_in_certificates(secrets: Path) -> None:
    (alias,) = SERVICES["redis"]["networks"]["cluster"]["aliases"]
    assert alias in names_of(secrets / "redis/certificate.pem")
    for name in SERVICES_OF_CLUSTER:
        assert f"@{alias}:6379/" in SERVICES[name]["environment"]["KVRELAY_REDIS_URL"]
    for name in ("prefill", "decode", "prefill-gpu", "decode-gpu"):
        role = name.removesuffix("-gpu")
        assert SERVICES[name]["environment"]["KVRELAY_TLS_SERVER_NAME"] in names_of(secrets / role / "certificate.pem")


def test_passwords_keys_and_certificates_fit_together_and_stay(secrets: Path) -> None:
    passwords = {role: (secrets / role / "redis-password").read_text() for role in ROLES}
    rules = (secrets / "redis/users.acl").read_text()
    assert passwords["prefill"] == passwords["decode"] != passwords["gateway"]
    assert "user default off" in rules
    assert not any(password in rules for password in passwords.values())
    for role in ROLES:
        files = {f"tls_{kind}": str(secrets / role / file) for kind, file in FILES.items()}
        security = ProcessSecurity.of(SecuritySettings(**files), Role(role))  # it reads and checks them
        assert security.danger is None
    before = contents_of(secrets)
    make_credentials(secrets)
    assert contents_of(secrets) == before
    modes = {
        str(path.relative_to(secrets)): path.stat().st_mode & 0o777 for path in secrets.rglob("*") if path.is_file()
    }
    assert {name for name, mode in modes.items() if mode & 0o077} == {
        *("metrics/ca.pem", "metrics/certificate.pem", "metrics/certificate.key", "authority/ca.pem"),
        *(name for name in modes if name.startswith("authority/") and name.endswith(".pem")),
    }


def test_what_is_missing_is_made_again_and_old_certificates_are_renewed(
    secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents_of(secrets)
    (secrets / "decode/redis-password").unlink()
    (secrets / "prefill/certificate.key").unlink()
    make_credentials(secrets)
    after = contents_of(secrets)
    assert before.keys() == after.keys()
    assert after["prefill/certificate.key"] == before["prefill/certificate.key"]
    assert after["redis/users.acl"] != before["redis/users.acl"]
    monkeypatch.setattr(certificates, "CLOCK_DIFFERENCE", datetime.timedelta(days=300))  # made at that time
    certificates.renew_certificates(secrets / "authority", CertificatePlan("kvrelay.local", num_days=100))
    make_credentials(secrets)
    renewed = contents_of(secrets)
    assert renewed["gateway/ca.pem"] == before["gateway/ca.pem"]
    assert renewed["gateway/certificate.pem"] != before["gateway/certificate.pem"]
    expiry = x509.load_pem_x509_certificate(renewed["gateway/certificate.pem"]).not_valid_after_utc
    assert expiry > datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=300)


async def test_a_worker_registers_with_its_user_and_reads_no_requests(secrets: Path) -> None:
    async with EmbeddedValkey(on_tcp=True) as server:
        client: Any = redis.asyncio.Redis.from_url(server.url)
        async with client:
            for line in (secrets / "redis/users.acl").read_text().splitlines():
                if not line.startswith("user default"):  # it makes the others
                    await client.execute_command("ACL", "SETUSER", *line.split()[1:])
        urls = {
            user: with_password_of(f"redis://{user}@127.0.0.1:{server.port}/0", str(secrets / role / "redis-password"))
            for user, role in (("gateway", "gateway"), ("worker", "decode"))
        }
        async with (
            RedisConnection(urls["gateway"], 5000) as of_gateway,
            RedisConnection(urls["worker"], 5000) as of_worker,
        ):
            await of_gateway.check()
            await of_worker.check()
            member = Member("decode-1", MemberRole.DECODE, "127.0.0.1:1", "m", "f")
            async with MemberRegistry(of_worker).lease(member):
                assert await MemberRegistry(of_gateway).read_members() == (member,)
            store = StateStore(of_gateway, "g1")
            assert await store.create(make_record())
            assert await store.get("r1") is not None
            assert await RequestOwners(of_worker).owner_of("r1") == "g1"
        for command in (
            ("HGETALL", "kvrelay:{r1}:request"),
            ("HSET", "kvrelay:{r1}:owner", "gateway_id", "x"),
            ("FLUSHALL",),
            ("CONFIG", "GET", "*"),
            ("KEYS", "*"),
        ):
            client = redis.asyncio.Redis.from_url(urls["worker"])
            async with client:
                with pytest.raises(redis.exceptions.NoPermissionError):
                    await client.execute_command(*command)


def test_variables_of_services_are_settings() -> None:
    known = {field.variable for settings in SECTIONS.values() for field in setting_fields(settings).values()}
    given = {
        name for service in SERVICES.values() for name in service.get("environment", ()) if name.startswith("KVRELAY_")
    }
    assert {"KVRELAY_HTTP_PORT", "KVRELAY_OTLP_ENDPOINT", "KVRELAY_TRACE_RATIO"} <= given <= known


def test_images_have_what_spans_and_the_openai_front_need() -> None:
    """Both begin with what this file has."""
    locked = (ROOT / "requirements/gateway.txt").read_text("utf-8")
    assert all(
        f"\n{name}==" in locked for name in ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http", "smg")
    )


# --- scraping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_every_replica_of_a_role_is_scraped_where_it_listens(role: str) -> None:
    (job,) = (job for job in SCRAPING["scrape_configs"] if job["job_name"] == role)
    (discovery,) = job["dns_sd_configs"]
    of_role = {name for name in SERVICES if name.partition("-")[0] == role}
    # Callers of the gateway's port are users of this machine; workers ask for a certificate.
    encrypted = {f"{kind}_file": f"/secrets/own/{file}" for kind, file in FILES.items()}
    asked = None if role == "gateway" else {**encrypted, "server_name": f"{role}.kvrelay.local"}
    assert (job.get("tls_config"), job.get("scheme")) == (asked, asked and "https")
    assert set(discovery["names"]) == of_role
    assert discovery["type"] == "A"
    assert {SERVICES[name]["environment"]["KVRELAY_HTTP_PORT"] for name in of_role} == {str(discovery["port"])}


def test_commands_of_services_listen_for_others() -> None:
    """The image of the gateway does so by itself."""
    workers = [name for name in SERVICES if name.partition("-")[0] in ("prefill", "decode")]
    assert [name for name in workers if "0.0.0.0" not in SERVICES[name]["command"]] == []
    assert '"serve", "gateway", "--host", "0.0.0.0"' in (ROOT / "Dockerfile").read_text("utf-8")


# --- dashboard ------------------------------------------------------------------------------------


def test_panels_ask_the_datasource_that_is_provisioned() -> None:
    (datasource,) = DATASOURCES["datasources"]
    asked = {panel["datasource"]["uid"] for panel in PANELS}
    asked |= {target["datasource"]["uid"] for panel in PANELS for target in panel["targets"]}
    asked |= {variable["datasource"]["uid"] for variable in DASHBOARD["templating"]["list"]}
    assert asked == {datasource["uid"]}
    assert datasource["url"] == "http://prometheus:9090"
    assert SCRAPING["global"]["scrape_interval"] == datasource["jsonData"]["timeInterval"]


def test_expressions_name_metrics_and_labels_that_are_exported() -> None:
    exported = exported_samples()
    asked = [(title, expression, names_in(expression)) for title, expression in expressions()]
    assert [(title, names - exported.keys()) for title, _, names in asked if not names or names - exported.keys()] == []
    unknown = [
        (title, labels_in(expression) - set().union(*(exported[name] for name in names)))
        for title, expression, names in asked
    ]
    assert [(title, labels) for title, labels in unknown if labels] == []


def test_legends_show_labels_that_their_expressions_keep() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            kept = labels_in(target["expr"]) if " by (" in target["expr"] else OF_PROMETHEUS
            assert shown <= kept, target


def test_roles_in_expressions_are_jobs() -> None:
    asked = {
        name
        for _, expression in expressions()
        for each in re.findall(r'job=~?"([^"]+)"', expression)
        for name in each.split("|")
    }
    assert asked == set(ROLES)


@pytest.mark.parametrize(
    "subject",
    [
        "kvrelay_requests_running",
        "kvrelay_requests_waiting",
        "kvrelay_requests_refused_total",
        "kvrelay_time_to_first_token_seconds_bucket",
        "kvrelay_inter_token_latency_seconds_bucket",
        "kvrelay_time_per_output_token_seconds_bucket",
        "kvrelay_request_phase_seconds_bucket",
        "kvrelay_worker_kv_blocks",
        "kvrelay_worker_prefix_hit_tokens_total",
        "kvrelay_transfer_bytes_total",
        "kvrelay_transfer_wire_seconds_total",
        "kvrelay_transfer_exposed_seconds_bucket",
        "kvrelay_attempts_total",
        "kvrelay_worker_preemptions_total",
        "kvrelay_session_losses_total",
        "kvrelay_output_tokens_total",
        "kvrelay_worker_engine_busy_seconds_total",
    ],
)
def test_the_dashboard_shows(subject: str) -> None:
    assert any(subject in names_in(expression) for _, expression in expressions())


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells)
        taken |= cells

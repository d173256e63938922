"""What docker-compose.yml and deploy/ say fits together, and fits the metrics that the processes
export.
"""

import asyncio
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

from decode_worker import metrics as decode_metrics
from gateway.telemetry import metrics as gateway_metrics
from kvrelay.config.sources import SECTIONS, setting_fields
from kvrelay.core.member import Member, MemberRole
from kvrelay.observability.metrics.exposition import BUILD_INFO, create_registry
from kvrelay.observability.metrics.families import Family
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
WITHOUT_SECRETS = ("model", "openai", "prometheus", "grafana", "credentials")
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
    assert [image for image in images if not re.fullmatch(r"[a-z/]+:v?\d+(\.\d+)*", image)] == []


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


def test_each_process_sees_the_password_of_its_own_role_only(tmp_path: Path) -> None:
    for name in SERVICES:
        volumes = [volume for volume in SERVICES[name].get("volumes", ()) if "-secrets:" in volume]
        role = "gateway" if name == "gateway" else "redis" if name == "redis" else "worker"
        expected = {f"{role}-secrets:/secrets/{role}:ro"} if name not in WITHOUT_SECRETS else set()
        assert name == "credentials" or set(volumes) == expected, name
    for folder in ("redis", "gateway", "worker"):
        (tmp_path / folder).mkdir()
    make = [sys.executable, str(ROOT / "deploy/redis/make_users.py"), str(tmp_path)]
    subprocess.run(make, check=True)
    passwords = [(tmp_path / role / "redis-password").read_text() for role in ("gateway", "worker")]
    rules = (tmp_path / "redis/users.acl").read_text()
    assert len({*passwords}) == 2
    assert "user default off" in rules
    assert not any(password in rules for password in passwords)
    subprocess.run(make, check=True)
    assert (tmp_path / "redis/users.acl").read_text() == rules


async def test_a_worker_registers_with_its_user_and_reads_no_requests(tmp_path: Path) -> None:
    for folder in ("redis", "gateway", "worker"):
        (tmp_path / folder).mkdir()
    await asyncio.to_thread(
        subprocess.run, [sys.executable, str(ROOT / "deploy/redis/make_users.py"), str(tmp_path)], check=True
    )
    async with EmbeddedValkey(on_tcp=True) as server:
        client: Any = redis.asyncio.Redis.from_url(server.url)
        async with client:
            for line in (tmp_path / "redis/users.acl").read_text().splitlines():
                if not line.startswith("user default"):  # it makes the others
                    await client.execute_command("ACL", "SETUSER", *line.split()[1:])
        urls = {
            role: with_password_of(f"redis://{role}@127.0.0.1:{server.port}/0", str(tmp_path / role / "redis-password"))
            for role in ("gateway", "worker")
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

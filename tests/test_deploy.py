"""What docker-compose.yml and deploy/ say fits together, and fits the metrics that the processes export."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from decode_worker import metrics as decode_metrics
from gateway import metrics as gateway_metrics
from kvrelay.metrics import worker_metrics
from kvrelay.metrics.exposition import BUILD_INFO, create_registry
from kvrelay.metrics.families import Family
from kvrelay.settings_sources import SECTIONS, setting_fields
from prefill_worker import metrics as prefill_metrics

ROOT = Path(__file__).parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
SCRAPING: dict[str, Any] = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text("utf-8"))
PROVISIONING = ROOT / "deploy/grafana/provisioning"
DATASOURCES: dict[str, Any] = yaml.safe_load((PROVISIONING / "datasources/prometheus.yml").read_text("utf-8"))
PROVIDERS: dict[str, Any] = yaml.safe_load((PROVISIONING / "dashboards/kvrelay.yml").read_text("utf-8"))
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana/dashboards/kvrelay.json").read_text("utf-8"))
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

ROLES = ("gateway", "prefill", "decode")
EXPORTED: tuple[Family, ...] = (
    *gateway_metrics.FAMILIES,
    *worker_metrics.FAMILIES,
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
            samples |= {f"{family.name}_bucket": labels | {"le"}, f"{family.name}_sum": labels, f"{family.name}_count": labels}
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


# --- compose -----------------------------------------------------------------------------------------------------------------


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


def test_variables_of_services_are_settings() -> None:
    known = {field.variable for settings in SECTIONS.values() for field in setting_fields(settings).values()}
    given = {name for service in SERVICES.values() for name in service.get("environment", ()) if name.startswith("KVRELAY_")}
    assert {"KVRELAY_HTTP_PORT", "KVRELAY_OTLP_ENDPOINT", "KVRELAY_TRACE_RATIO"} <= given <= known


def test_images_have_what_spans_need() -> None:
    extras = re.findall(r'"\.\[([a-z,]+)\]"', (ROOT / "Dockerfile").read_text("utf-8"))
    assert len(extras) == 2
    assert ["otel" in each.split(",") for each in extras] == [True, True]


# --- scraping ----------------------------------------------------------------------------------------------------------------


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


# --- dashboard ---------------------------------------------------------------------------------------------------------------


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
        (title, labels_in(expression) - set().union(*(exported[name] for name in names))) for title, expression, names in asked
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
        name for _, expression in expressions() for each in re.findall(r'job=~?"([^"]+)"', expression) for name in each.split("|")
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
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells)
        taken |= cells

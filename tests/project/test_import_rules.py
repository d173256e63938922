"""Who may import whom, read from the sources themselves; docs/architecture/index.md has the rules
in words.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("gateway", "prefill_worker", "decode_worker")
PACKAGES = ("kvrelay", *SERVICES)

# What only the extra `worker` installs: the gateway's image has none of it.
WORKER_ONLY_LIBRARIES = {"torch", "transformers", "safetensors", "accelerate", "gguf", "numpy"}

# Pure modules are functions of the events given to them: no tensors, no network, no clock, no
# tasks, no chance. A module whose docstring says "Pure" is one.
PURE_MODULES = {
    "decode_worker.scheduling.events",
    "prefill_worker.scheduling.events",
    "decode_worker.vllm_engine.continuation",
    "decode_worker.scheduling.drafting",
    "decode_worker.scheduling.fair_admission",
    "decode_worker.scheduling.prompt_turns",
    "decode_worker.scheduling.share_holdings",
    "decode_worker.scheduling.prompt_lookup",
    "decode_worker.scheduling.reservations",
    "decode_worker.scheduling.running_batch",
    "decode_worker.scheduling.scheduler",
    "decode_worker.scheduling.speculation",
    "decode_worker.receiving.kv_reassembly",
    "decode_worker.scheduling.running_sequence",
    "gateway.requests.admission",
    "gateway.requests.key_limits",
    "gateway.requests.key_usage",
    "gateway.requests.place_queue",
    "gateway.requests.reported_usage",
    "gateway.requests.token_bucket",
    "gateway.text.template_breaker",
    "gateway.workers.worker_trust",
    "kvrelay.core.fair_turns",
    "kvrelay.core.fair_waiting",
    "kvrelay.core.limit_names",
    "gateway.lifecycle.attempt",
    "gateway.lifecycle.generation_request",
    "gateway.lifecycle.events",
    "gateway.telemetry.phase_clock",
    "gateway.routing.conditional_disaggregation",
    "gateway.routing.handoff_costs",
    "gateway.lifecycle.lifecycle",
    "gateway.telemetry.request_timeline",
    "gateway.routing.retry_budget",
    "gateway.lifecycle.retry_policy",
    "gateway.routing.router",
    "gateway.routing.cache_hits",
    "gateway.routing.candidates",
    "gateway.routing.prefix_index",
    "gateway.routing.routing",
    "gateway.routing.strategies",
    "gateway.routing.strategies.load",
    "gateway.routing.strategies.prefix_affinity",
    "gateway.routing.strategies.round_robin",
    "gateway.routing.strategies.session_affinity",
    "gateway.routing.strategies.two_choices",
    "gateway.lifecycle.sequence_outputs",
    "gateway.text.stop_strings",
    "gateway.lifecycle.poison_detector",
    "gateway.telemetry.timeline_spans",
    "gateway.lifecycle.token_order",
    "gateway.lifecycle.job_progress",
    "gateway.routing.circuit_breaker",
    "kvrelay.core.backoff",
    "kvrelay.core.bounds",
    "kvrelay.core.chunk_times",
    "kvrelay.core.finish_rules",
    "kvrelay.structured_output.json_schema",
    "kvrelay.structured_output.schema_source",
    "kvrelay.kv_cache.block_manager",
    "kvrelay.kv_cache.cache_feed",
    "kvrelay.kv_cache.pending_changes",
    "kvrelay.kv_cache.memory_planning",
    "kvrelay.kv_cache.prefix_hash",
    "kvrelay.core.member",
    "kvrelay.core.prompt_pace",
    "kvrelay.openai_frontend.request_fields",
    "kvrelay.openai_frontend.shared_bound",
    "kvrelay.openai_frontend.smg_arguments",
    "kvrelay.openai_frontend.token_bytes",
    "kvrelay.core.request_state",
    "kvrelay.core.sampling_params",
    "kvrelay.structured_output.schema_instances",
    "kvrelay.worker.sequence",
    "kvrelay.worker.step",
    "kvrelay.worker.verification",
    "kvrelay.core.timeline",
    "kvrelay.core.trace_context",
    "kvrelay.vllm_engine.answers",
    "kvrelay.vllm_engine.sampling",
    "kvrelay.core.job",
    "kvrelay.core.job_validation",
    "prefill_worker.scheduling.prompt_queue",
    "prefill_worker.scheduling.scheduler",
}
IMPURE_LIBRARIES = {
    *WORKER_ONLY_LIBRARIES,
    *("grpc", "grpc_status", "redis", "socket", "ssl", "subprocess", "signal", "os", "select"),
    *("asyncio", "threading", "concurrent", "multiprocessing", "queue", "time", "random", "secrets", "uuid"),
}

# Where messages become dataclasses and the other way round. Schedulers, lifecycle and engine are
# not here and may never be.
GENERATED_PACKAGES = ("kvrelay.v1", "kvrelay.kserve")
EDGE_PACKAGES = ("kvrelay.client", "gateway.protocols.kserve")
EDGE_MODULES = {
    "kvrelay.wire.convert",
    "kvrelay.kv_transfer.codec",
    "kvrelay.kv_transfer.transports",
    "kvrelay.worker.tokenizer_service",
    "kvrelay.wire.timeline",
    "kvrelay.worker.process",
    "kvrelay.worker.gateway_session",
    "kvrelay.worker.gateway_sessions",
    "gateway.resume.cancellation",
    "gateway.resume.forwarded_output",
    "gateway.views.cluster_view",
    "gateway.api.conversation_stream",
    "gateway.page.try_box",
    "gateway.api.generation",
    "gateway.api.idempotency",
    "gateway.requests.known_requests",
    "gateway.main",
    "gateway.state.other_gateways",
    "gateway.requests.prompt_preparation",
    "gateway.streaming.frames",
    "gateway.state.failure_detector",
    "gateway.requests.request_validation",
    "gateway.service",
    "gateway.workers.session_messages",
    "gateway.resume.timeline_view",
    "gateway.workers.tokenizer_cache",
    "gateway.protocols.vllm_engine.service",
    "gateway.workers.session",
    "prefill_worker.main",
    "prefill_worker.service",
    "prefill_worker.vllm_engine",
    "decode_worker.kv_receiver",
    "decode_worker.main",
    "decode_worker.vllm_engine.remote_prefill",
    "decode_worker.service",
    "decode_worker.vllm_engine.service",
}


# Folders of one process, from the top to the bottom: each imports only from lines below its own.
# A module at the top stands for itself. The generated code is below all.
LAYERS = {
    "gateway": (
        ("__main__",),
        ("main",),
        ("service", "page"),
        ("protocols", "views"),
        ("gateway",),
        ("api",),
        ("resume",),
        ("requests",),
        ("workers",),
        ("telemetry", "state"),
        ("lifecycle",),
        ("routing", "streaming", "text"),
    ),
    "prefill_worker": (
        ("__main__",),
        ("main",),
        ("vllm_engine",),
        ("service",),
        ("engine_loop", "metrics"),
        ("scheduling", "commands", "kv_sender"),
    ),
    "decode_worker": (
        ("__main__",),
        ("main",),
        ("vllm_engine",),
        ("service",),
        ("engine_loop", "kv_receiver", "metrics", "reservation_watch"),
        ("scheduling", "receiving", "commands"),
    ),
    "kvrelay": (
        ("testing",),
        ("cli", "vllm_engine"),
        ("cluster", "worker"),
        ("openai_frontend", "engine"),
        ("client", "kv_transfer", "process"),
        ("config", "observability"),
        ("network",),
        ("state", "models", "structured_output", "security"),
        ("runtime", "wire", "kv_cache"),
        ("core", "run_module"),
        ("errors", "own_packages"),
    ),
}


@cache
def modules() -> dict[str, Path]:
    """All modules of the product by dotted name, without the generated ones."""
    found = {}
    for package in PACKAGES:
        for path in sorted((REPO_ROOT / package).rglob("*.py")):
            parts = path.relative_to(REPO_ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if not name.startswith(GENERATED_PACKAGES):
                found[name] = path
    return found


def imports_in(node: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names that the code imports, inside functions too, but not those for type checkers
    only.
    """
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = absolute_name(node, module, is_package)
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)
    else:
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in node.orelse if isinstance(node, ast.If) and for_types else ast.iter_child_nodes(node):
            yield from imports_in(child, module, is_package)


def absolute_name(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """What stands between `from` and `import`, without leading dots."""
    if not node.level:
        return node.module or ""
    num_dropped = node.level - is_package
    package = module.split(".")[:-num_dropped] if num_dropped else module.split(".")
    return ".".join([*package, *filter(None, [node.module])])


@cache
def imports_of(module: str) -> frozenset[str]:
    """Everything the module names in imports: `from a import b` gives both `a` and `a.b`, since `b`
    may be a module.
    """
    path = modules()[module]
    return frozenset(imports_in(ast.parse(path.read_text("utf-8")), module, path.name == "__init__.py"))


@cache
def closure(module: str) -> frozenset[str]:
    """The modules of the product that are loaded when `module` is, itself and the packages around
    them included.
    """
    reached: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in reached or name not in modules():
            continue
        reached.add(name)
        waiting += [name.rpartition(".")[0], *imports_of(name)]
    return frozenset(reached)


def roots(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imports_of(module)}


def generated_imports(module: str) -> set[str]:
    return {name for name in imports_of(module) if name.startswith(GENERATED_PACKAGES)}


def test_the_rules_see_imports_of_every_form() -> None:
    source = "import a.b\nfrom c import d\nfrom . import e\nfrom ..f import g\ndef h():\n    import i\n"
    source += "if TYPE_CHECKING:\n    import j\nelse:\n    import k\n"
    names = set(imports_in(ast.parse(source), "x.y.z", is_package=False))
    assert names == {"a.b", "c", "c.d", "x.y", "x.y.e", "x.f", "x.f.g", "i", "k"}
    assert "x.y.e" in set(imports_in(ast.parse("from . import e"), "x.y", is_package=True))


def test_the_rules_see_all_packages() -> None:
    assert {name.partition(".")[0] for name in modules()} == set(PACKAGES)
    assert "kvrelay.errors" in closure("gateway.lifecycle.lifecycle") | closure("kvrelay.wire.convert")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_service_imports_kvrelay_and_no_other_service(package: str) -> None:
    forbidden = set(SERVICES) - {package}
    offenders = {
        name: hits for name in modules() if name.partition(".")[0] == package and (hits := roots(name) & forbidden)
    }
    assert not offenders


def test_only_the_engine_imports_torch_and_what_comes_with_it() -> None:
    offenders = {
        name: hits
        for name in modules()
        if not name.startswith("kvrelay.engine") and (hits := roots(name) & (WORKER_ONLY_LIBRARIES - {"numpy"}))
    }
    # It writes a tiny model's weights, for which it needs no torch.
    assert offenders == {"kvrelay.testing.tiny_model": {"safetensors"}}


def test_nothing_the_gateway_imports_imports_torch() -> None:
    reached = {name for module in modules() if module.partition(".")[0] == "gateway" for name in closure(module)}
    offenders = {name: hits for name in reached if (hits := roots(name) & WORKER_ONLY_LIBRARIES)}
    assert not offenders
    assert not {name for name in reached if name.startswith("kvrelay.engine")}


def test_a_module_that_calls_itself_pure_is_held_to_it() -> None:
    docstrings = {name: ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "" for name, path in modules().items()}
    pure = {name for name, docstring in docstrings.items() if re.search(r"\bPure\b", docstring)}
    in_pure_folders = {name for name in modules() if name.rpartition(".")[0] in pure}
    assert {name for name in pure | in_pure_folders if not is_folder(name)} <= PURE_MODULES


def is_folder(module: str) -> bool:
    return modules()[module].name == "__init__.py"


@pytest.mark.parametrize("module", sorted(PURE_MODULES))
def test_a_pure_module_and_all_it_loads_know_no_tensor_network_or_clock(module: str) -> None:
    assert module in modules(), f"{module} is gone; keep PURE_MODULES true"
    offenders = {name: hits for name in closure(module) if (hits := roots(name) & IMPURE_LIBRARIES)}
    assert not offenders
    assert not any(generated_imports(name) for name in closure(module))
    assert not {
        name for name in closure(module) if re.search(r"\b(now|utcnow|today)\(", modules()[name].read_text("utf-8"))
    }


def test_generated_code_stays_at_the_edges() -> None:
    users = {name for name in modules() if generated_imports(name) and not name.startswith(EDGE_PACKAGES)}
    assert users - EDGE_MODULES == set(), "no edge: convert to dataclasses in kvrelay.wire.convert or in the service"
    assert EDGE_MODULES - users == set(), "these need the generated code no more; take them off the list"


def test_what_is_for_tests_is_imported_by_nothing_that_serves() -> None:
    offenders = {
        name
        for name in modules()
        if not name.startswith("kvrelay.testing") and "kvrelay.testing" in closure(name) - {name}
    }
    assert not offenders


def test_the_pytest_plugin_loads_nothing_before_it_is_used() -> None:
    code = (
        "import sys, kvrelay.testing.pytest_plugin; print([name for name in sys.modules if name.startswith('kvrelay')])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO_ROOT, capture_output=True, text=True, check=True)
    assert sorted(ast.literal_eval(result.stdout)) == ["kvrelay", "kvrelay.testing", "kvrelay.testing.pytest_plugin"]


def test_tests_and_tools_are_not_imported_by_the_product() -> None:
    offenders = {name: hits for name in modules() if (hits := roots(name) & {"tests", "tools", "benchmarks"})}
    assert not offenders


@pytest.mark.parametrize("module", ["gateway.main", "kvrelay.client", "kvrelay.cli", "kvrelay.models.store"])
def test_module_loads_where_torch_is_not_installed(module: str) -> None:
    blocked = sorted(WORKER_ONLY_LIBRARIES)
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import {module}"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO_ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def layer_of(module: str) -> tuple[int, str] | None:
    """(layer, folder) of a module of the product; None for the root of a package."""
    root, _, rest = module.partition(".")
    folder = rest.partition(".")[0]
    for number, folders in enumerate(LAYERS[root]):
        if folder in folders:
            return number, folder
    return None


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_between_the_folders_of_a_process_run_down_only(package: str) -> None:
    members = [name for name in modules() if name.partition(".")[0] == package]
    assert {name for name in members if layer_of(name) is None} <= {package}, "give the folder a layer"
    offenders = set()
    for name in members:
        for imported in imports_of(name) & set(members):
            here, there = layer_of(name), layer_of(imported)
            if here and there and there[1] != here[1] and there[0] <= here[0]:
                offenders.add(f"{name} imports {imported}")
    assert offenders == set()

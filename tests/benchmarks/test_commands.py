"""Each benchmark once, with the smallest model and the fewest tokens: it runs and writes its document."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kv_cache
from tests.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model("llama", tmp_path_factory.mktemp("models")))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """As many as before, whatever the benchmark sets."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def document(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def test_kv_cache_gives_the_same_tokens_with_and_without_the_cache(llama: str, tmp_path: Path) -> None:
    path = tmp_path / "kv-cache.json"
    kv_cache.command(tokens=5, model=[llama], rounds=1, threads=1, json=path)
    results = document(path)["results"]
    variants = {(result["engine"], result["has_cache"]) for result in results}
    assert variants == {(engine, has_cache) for engine in ("kvrelay", "transformers") for has_cache in (True, False)}
    assert all(result["num_equal_tokens"] == len(result["token_ms"]) == 5 for result in results)
    assert "32.1 ± 0.7 s" in document(path)["notes"][0]

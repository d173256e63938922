from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvrelay.engine.mapped_weights import release_weight_pages
from tests.support import left_out

NUM_BYTES = 8 * 1024 * 1024


def resident_bytes(path: Path) -> int:
    """Pages of a mapped file that are in this process's memory."""
    sections = Path("/proc/self/smaps").read_text().split(" " + str(path) + "\n")[1:]
    return sum(int(section.split("Rss:")[1].split()[0]) * 1024 for section in sections)


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A mapped file and its one tensor, which was read."""
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.arange(NUM_BYTES // 4, dtype=torch.float32)}, path)
    tensor = load_file(path)["weight"]
    assert tensor.sum() > 0
    if not Path("/proc/self/smaps").exists() or resident_bytes(path) < NUM_BYTES:
        pytest.skip(left_out.not_for("systems that do not map files"))
    return path, tensor


def test_pages_of_weights_are_given_back_and_come_back_when_they_are_read(weights: tuple[Path, torch.Tensor]) -> None:
    path, tensor = weights
    assert release_weight_pages() >= NUM_BYTES
    assert resident_bytes(path) == 0
    assert torch.equal(tensor, torch.arange(NUM_BYTES // 4, dtype=torch.float32))


def test_weights_that_were_changed_in_memory_stay_as_they_are(weights: tuple[Path, torch.Tensor]) -> None:
    _, tensor = weights
    tensor[5] = -1.0
    release_weight_pages()
    assert tensor[5] == -1.0

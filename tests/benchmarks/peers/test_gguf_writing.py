"""How weights are laid out in GGUF."""

import numpy as np

from benchmarks.peers.gguf_writing import interleave_halves


def test_rows_of_a_head_are_interleaved() -> None:
    weight = np.arange(8, dtype=np.float32).reshape(8, 1)  # two heads of four rows
    assert interleave_halves(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]

"""Mixtures of experts on compiled kernels: which experts a row takes, and checkpoints in MXFP4."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvrelay.engine.kernel_backend import use_native_kernels
from kvrelay.engine.kernel_batch import SequenceInput
from kvrelay.engine.model_loader import load_model
from kvrelay.engine.model_runner import ModelRunner
from kvrelay.engine.native import load_library
from kvrelay.engine.paged_kv_cache import PagedKVCache
from tests.engine.test_native_decoder import load, run_in_chunks, tokens
from tests.support import left_out
from tests.support.tiny_models import make_tiny_model

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
BLOCK = 32  # numbers that share an exponent

pytestmark = pytest.mark.skipif(load_library() is None, reason=left_out.C_COMPILER)


def test_of_equally_likely_experts_the_first_are_taken(tiny_models: Path) -> None:
    model = load(tiny_models, "mixtral")
    mlp = model.module.model.layers[0].mlp
    mlp.experts.gate_up_proj.data[2:] = torch.nan  # two of four are taken, and these must not be
    mlp.gate.weight.data.zero_()
    with pytest.MonkeyPatch.context() as patch:
        # The comparison at load lets each token take all experts, which would show.
        patch.setattr("kvrelay.engine.kernel_backend.least_cosine", lambda computed, expected: 1.0)
        fused = use_native_kernels(model)
    assert fused.decoder is not None
    assert run_in_chunks(fused, tokens(1), [90]).isfinite().all()


def test_a_row_that_is_no_number_spoils_no_other(tiny_models: Path) -> None:
    fused = use_native_kernels(load(tiny_models, "mixtral"))
    runner = ModelRunner(fused, PagedKVCache(fused.spec.kv_layout, 8, 4))
    alone = runner.run([SequenceInput(tokens(1, 5), 0, [0, 1], num_logits=5)])
    spoiled = PagedKVCache(fused.spec.kv_layout, 8, 4)
    runner = ModelRunner(fused, spoiled)
    runner.run([SequenceInput(tokens(2, 5), 0, [4, 5], num_logits=0)])
    layer = torch.full((1, 2, 16), torch.nan)
    spoiled.write(1, torch.tensor([16]), layer, layer)
    steps = [
        SequenceInput(tokens(3, 3), 5, [4, 5], num_logits=3),
        SequenceInput(tokens(1, 5), 0, [0, 1], num_logits=5),
    ]
    together = runner.run(steps)
    assert together[:3].isnan().all()
    assert torch.equal(together[3:], alone)


def test_one_expert_may_have_all_rows_and_another_none(tiny_models: Path) -> None:
    model = load(tiny_models, "gpt_oss")
    for layer in model.module.model.layers:
        layer.mlp.router.bias.data.copy_(torch.tensor([0.0, 90.0, 80.0, 0.0]))
    expected = run_in_chunks(model, tokens(1), [70, 20])
    computed = run_in_chunks(use_native_kernels(model), tokens(1), [70, 20])
    torch.testing.assert_close(computed, expected, rtol=2e-4, atol=2e-4)


def to_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight: [num_experts, k, n]. Returns blocks, scales and what they stand for."""
    grouped = weight.float().transpose(1, 2).reshape(len(weight), weight.shape[2], -1, BLOCK)
    exponents = (grouped.abs().amax(dim=-1) / 6).log2().ceil().clamp(-20, 20)
    scaled = grouped / exponents.exp2().unsqueeze(-1)
    codes = (scaled.unsqueeze(-1) - FP4).abs().argmin(dim=-1)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    rounded = (FP4[codes] * exponents.exp2().unsqueeze(-1)).flatten(2).transpose(1, 2)
    return blocks.contiguous(), (exponents + 127).to(torch.uint8), rounded.contiguous()


def save_in_mxfp4(source: Path, folder: Path) -> dict[str, Tensor]:
    """Returns the weights as float32."""
    folder.mkdir()
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    dense, stored = load_file(source / "model.safetensors"), {}
    for name, weight in dense.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[f"{name}_blocks"], stored[f"{name}_scales"], dense[name] = to_mxfp4(weight)
        else:
            stored[name] = weight
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return dense


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_in_mxfp4_are_served_as_dense_ones(tiny_models: Path, tmp_path: Path, dtype: str) -> None:
    dense = save_in_mxfp4(make_tiny_model("gpt_oss", tiny_models), tmp_path / "mxfp4")
    expected = load(tiny_models, "gpt_oss")
    expected.module.load_state_dict(dense)
    if dtype == "bfloat16":
        for tensor in expected.module.state_dict().values():
            tensor.data.copy_(tensor.bfloat16())
    fused = use_native_kernels(load_model(tmp_path / "mxfp4", "mxfp4", dtype, "cpu"))
    assert fused.decoder is not None
    logits = run_in_chunks(expected, tokens(1), [70, 20])
    computed = run_in_chunks(fused, tokens(1), [70, 20])
    if dtype == "float32":
        torch.testing.assert_close(computed, logits, rtol=2e-4, atol=2e-4)
    else:  # KV is in bfloat16, too
        assert torch.cosine_similarity(computed, logits, dim=-1).median() > 0.99

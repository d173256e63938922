"""Settings that are stray, off or rare: both ways to compute a model give what transformers gives,
beyond every window.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kvrelay.engine.kernel_backend import use_native_kernels
from kvrelay.engine.kernel_batch import SequenceInput
from kvrelay.engine.model_loader import load_model
from kvrelay.engine.model_probe import short_windows
from kvrelay.engine.model_runner import LoadedModel, ModelRunner
from kvrelay.engine.native import load_library
from kvrelay.engine.paged_kv_cache import PagedKVCache
from kvrelay.errors import ModelLoadError
from tests.support.tiny_models import tiny_config

WINDOW = 20
TOKENS = [(7 * number + 3) % 320 for number in range(60)]
SLIDING, FULL = "sliding_attention", "full_attention"

CASES: list[tuple[str, dict[str, Any]]] = [
    # Windows that the architecture does not know: left over from the model that this one was made
    # from.
    ("llama", {"sliding_window": WINDOW}),
    ("llama", {"sliding_window": 8}),
    ("llama", {"sliding_window": 4096}),
    ("llama", {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 0}),
    ("llama", {"sliding_window": WINDOW, "layer_types": [SLIDING, FULL]}),
    ("olmo2", {"sliding_window": WINDOW}),
    ("granite", {"sliding_window": WINDOW}),
    ("cohere", {"sliding_window": WINDOW}),
    ("gpt_neox", {"sliding_window": WINDOW}),
    ("glm4", {"sliding_window": WINDOW}),
    # Windows on, off, and in some layers only.
    ("mistral", {"sliding_window": WINDOW}),
    ("mistral", {"sliding_window": None}),
    ("mixtral", {"sliding_window": WINDOW}),
    ("phi3", {"sliding_window": WINDOW}),
    ("starcoder2", {"sliding_window": WINDOW}),
    ("starcoder2", {"sliding_window": None}),
    ("qwen2", {"sliding_window": WINDOW, "use_sliding_window": False}),
    ("qwen2", {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    ("qwen2", {"sliding_window": WINDOW, "use_sliding_window": True, "layer_types": [SLIDING, FULL]}),
    ("qwen3", {"sliding_window": WINDOW, "use_sliding_window": False}),
    ("qwen3", {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 0}),
    ("smollm3", {"sliding_window": WINDOW, "use_sliding_window": True, "layer_types": [FULL, SLIDING]}),
    ("smollm3", {"sliding_window": WINDOW, "use_sliding_window": False}),
    ("gemma2", {"sliding_window": WINDOW}),
    ("gemma3_text", {"sliding_window": WINDOW, "layer_types": [FULL, SLIDING]}),
    ("gpt_oss", {"sliding_window": WINDOW}),
    # Experts.
    ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 3}),
    ("mixtral", {"num_local_experts": 37, "num_experts_per_tok": 1}),
    ("mixtral", {"num_local_experts": 1, "num_experts_per_tok": 1}),
    ("qwen3_moe", {"norm_topk_prob": False, "num_experts": 20, "num_experts_per_tok": 7}),
    ("qwen3_moe", {"norm_topk_prob": True, "num_experts": 20, "num_experts_per_tok": 7}),
    ("qwen3_moe", {"mlp_only_layers": [0]}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "intermediate_size": 208}),
    ("olmoe", {"norm_topk_prob": True}),
    ("olmoe", {"clip_qkv": 0.5}),
    ("gpt_oss", {"attention_bias": False, "num_local_experts": 5, "num_experts_per_tok": 3}),
    ("gpt_oss", {"layer_types": [FULL, FULL], "rms_norm_eps": 0.1}),
    ("gpt_oss", {"swiglu_limit": 0.5, "swiglu_alpha": 1.0}),
    ("exaone4", {"sliding_window": WINDOW}),
    # Other settings that some architectures read and others do not.
    ("llama", {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    (
        "llama",
        {"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1, "query_pre_attn_scalar": 4},
    ),
    ("llama", {"no_rope_layers": [0, 0], "use_rope": False}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("qwen3", {"attention_bias": True}),
    ("llama", {"head_dim": 32, "num_key_value_heads": 1}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"rms_norm_eps": 0.1}),
    ("gpt2", {"n_inner": 48, "layer_norm_epsilon": 0.1}),
    ("gpt2", {"scale_attn_weights": False, "tie_word_embeddings": True}),
    ("gpt2", {"activation_function": "gelu_pytorch_tanh"}),
    ("gpt2", {"activation_function": "relu"}),
    ("gemma3_text", {"sliding_window": WINDOW, "layer_types": [FULL, FULL], "rms_norm_eps": 0.1}),
    ("gemma3_text", {"final_logit_softcapping": 3.0}),
    ("olmo2", {"attention_bias": True, "rms_norm_eps": 0.1, "num_key_value_heads": 4}),
    ("phi3", {"partial_rotary_factor": 0.5}),
    ("smollm3", {"no_rope_layers": [0, 1]}),
    # Rope.
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    (
        "llama",
        {
            "rope_parameters": {
                **{
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                },
                "original_max_position_embeddings": 32,
            }
        },
    ),
    (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
]


def save_model(kind: str, change: dict[str, Any], folder: Path) -> Any:
    """The model in transformers, as it is in the folder."""
    config = AutoConfig.for_model(kind, **tiny_config(kind) | change)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.2) if parameter.ndim > 1 else parameter.data.add_(
                torch.randn_like(parameter) * 0.2
            )
    model.save_pretrained(folder)
    return model.eval()


def computed(model: LoadedModel) -> Tensor:
    """Logits of the tokens from the 38th on, in two chunks and a token."""
    runner = ModelRunner(model, PagedKVCache(model.spec.kv_layout, 8, 8, model.device, model.kernels))
    table = (3, 0, 7, 1, 6, 2, 5, 4)
    chunks = [(0, 37), (37, 59), (59, 60)]
    return torch.cat(
        [runner.run([SequenceInput(TOKENS[a:b], a, table, num_logits=0 if a == 0 else b - a)]) for a, b in chunks]
    )


@pytest.mark.parametrize(("kind", "change"), CASES, ids=[f"{kind} {sorted(change)}" for kind, change in CASES])
def test_torch_and_kernels_compute_what_transformers_computes(
    kind: str, change: dict[str, Any], tmp_path: Path
) -> None:
    reference = save_model(kind, change, tmp_path)
    with torch.inference_mode():
        expected = reference(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0, 37:]
    model = load_model(tmp_path, kind, "float32", "cpu")
    torch.testing.assert_close(computed(model), expected, rtol=1e-3, atol=1e-3)
    if load_library() is not None:
        fused = use_native_kernels(model)
        assert fused.kernels is not None
        torch.testing.assert_close(computed(fused), expected, rtol=1e-3, atol=1e-3)


def test_a_window_of_the_kernels_alone_is_seen_at_load_however_long_it_is(tmp_path: Path) -> None:
    save_model("llama", {"sliding_window": 4096}, tmp_path)
    model = load_model(tmp_path, "llama", "float32", "cpu")
    assert model.windows == (None, None)
    if load_library() is not None:
        with pytest.raises(ModelLoadError, match="compiled kernels compute something else than transformers"):
            use_native_kernels(replace(model, windows=(4096, None)))


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_a_window_of_transformers_alone_is_seen_at_load_however_long_it_is(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(kind, {"sliding_window": 4096}, tmp_path)
    monkeypatch.setattr("kvrelay.engine.paged_attention.window_of", lambda module, arguments: None)
    with pytest.raises(ModelLoadError, match="with paged attention it computes something else than alone"):
        load_model(tmp_path, kind, "float32", "cpu")


def test_windows_are_short_for_the_comparison_only_and_differ_where_they_differed() -> None:
    config = AutoConfig.for_model(
        "qwen2", **tiny_config("qwen2") | {"sliding_window": 4096, "use_sliding_window": True}
    )
    model: Any = AutoModelForCausalLM.from_config(config)
    first, second = (layer.self_attn for layer in model.model.layers)
    first.sliding_window, second.sliding_window = 1024, None
    with short_windows(model) as shortened:
        assert shortened == {1024: 3, 4096: 5}
        assert (config.sliding_window, first.sliding_window, second.sliding_window) == (5, 3, None)
    assert (config.sliding_window, first.sliding_window, second.sliding_window) == (4096, 1024, None)

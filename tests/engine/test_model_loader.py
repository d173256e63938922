import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from kvrelay.core.model_spec import KVLayout
from kvrelay.engine.model_loader import load_model
from kvrelay.engine.weights_digest import _stretches
from kvrelay.errors import ModelLoadError
from tests.support import left_out
from tests.support.tiny_models import MAX_CONTEXT_TOKENS, REFUSED_KINDS, SPECIAL_TOKENS, VOCAB_SIZE, make_tiny_model


def load(path: Path, dtype: str = "auto", device: str = "cpu") -> Any:
    return load_model(path, "tiny", dtype, device)


def copy_of(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def change_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.fixture
def llama(tiny_models: Path, tmp_path: Path) -> Path:
    """A tiny llama that a test may damage."""
    return copy_of(make_tiny_model("llama", tiny_models), tmp_path / "llama")


class TestSpec:
    def test_says_what_the_model_is(self, llama: Path) -> None:
        loaded = load(llama)
        spec = loaded.spec
        assert spec.name == "tiny"
        assert spec.architecture == "llama"
        assert spec.kv_layout == KVLayout(2, 2, 16, "float32")
        assert spec.vocab_size == VOCAB_SIZE
        assert spec.max_context_tokens == MAX_CONTEXT_TOKENS
        assert spec.eos_token_ids == (0,)
        assert len(spec.fingerprint) == 32
        assert loaded.dtype == torch.float32
        assert loaded.weight_bytes == (llama / "model.safetensors").stat().st_size // 4 * 4 - _header_bytes(llama)
        assert not loaded.module.training
        assert not any(parameter.requires_grad for parameter in loaded.module.parameters())

    @pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_bigcode"])
    def test_context_of_learned_positions_is_their_number(self, kind: str, tiny_models: Path) -> None:
        assert load(make_tiny_model(kind, tiny_models)).spec.max_context_tokens == MAX_CONTEXT_TOKENS

    def test_needs_no_tokenizer(self, llama: Path) -> None:
        for file in llama.glob("*token*"):
            file.unlink()
        assert load(llama).spec.vocab_size == VOCAB_SIZE

    def test_end_tokens_are_those_of_generation_config_config_and_tokenizer_together(self, llama: Path) -> None:
        (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, VOCAB_SIZE - 1, VOCAB_SIZE]}))
        change_config(llama, eos_token_id=5)
        settings = json.loads((llama / "tokenizer_config.json").read_text()) | {"eos_token": {"content": "<|im_end|>"}}
        (llama / "tokenizer_config.json").write_text(json.dumps(settings))
        assert load(llama).spec.eos_token_ids == (SPECIAL_TOKENS.index("<|im_end|>"), 5, 7, VOCAB_SIZE - 1)

    def test_a_folder_that_declares_no_end_token_has_its_architecture_s(self, llama: Path) -> None:
        for name in ("generation_config.json", "tokenizer_config.json"):
            (llama / name).unlink()
        config = json.loads((llama / "config.json").read_text())
        del config["eos_token_id"]
        (llama / "config.json").write_text(json.dumps(config))
        assert load(llama).spec.eos_token_ids == (2,)

    def test_rope_that_depends_on_the_longest_sequence_stays_in_its_original_range(self, llama: Path) -> None:
        rope = {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 128,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
        }
        change_config(llama, rope_parameters=rope)
        assert load(llama).spec.max_context_tokens == 128

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_dtype_is_the_checkpoint_s_or_the_one_asked_for(self, llama: Path, dtype: str, tmp_path: Path) -> None:
        assert load(llama, dtype).spec.kv_layout.dtype == dtype
        model: Any = AutoModelForCausalLM.from_pretrained(llama, dtype=getattr(torch, dtype))
        model.save_pretrained(tmp_path / "half")
        assert load(tmp_path / "half").dtype == getattr(torch, dtype)
        assert load(tmp_path / "half", "float32").dtype == torch.float32


def _header_bytes(folder: Path) -> int:
    """The safetensors file's length and header, which are no weights."""
    return 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")


class TestFingerprint:
    def test_is_the_same_for_the_same_model(self, llama: Path, tiny_models: Path) -> None:
        assert load(llama).spec.fingerprint == load(tiny_models / "llama").spec.fingerprint

    def test_does_not_depend_on_how_the_weights_are_cut_into_files(self, llama: Path, tmp_path: Path) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(llama)
        model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
        assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
        assert load(tmp_path / "sharded").spec.fingerprint == load(llama).spec.fingerprint

    def test_differs_by_dtype(self, llama: Path) -> None:
        assert load(llama, "bfloat16").spec.fingerprint != load(llama, "float32").spec.fingerprint

    def test_differs_by_one_weight(self, llama: Path) -> None:
        before = load(llama).spec.fingerprint
        file = llama / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-2] ^= 1
        file.write_bytes(content)
        assert load(llama).spec.fingerprint != before

    @pytest.mark.parametrize(
        "change",
        [
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
            {"rms_norm_eps": 1e-3},
            {"hidden_act": "gelu"},
        ],
    )
    def test_differs_by_settings_that_change_kv(self, llama: Path, change: dict[str, object]) -> None:
        before = load(llama).spec.fingerprint
        change_config(llama, **change)
        assert load(llama).spec.fingerprint != before

    def test_large_tensors_are_sampled_from_first_to_last_byte(self) -> None:
        assert _stretches(10**9, sample=False) == [(0, 10**9)]
        sampled = _stretches(10**9, sample=True)
        assert sampled[0][0] == 0
        assert sampled[-1][1] >= 10**9 - 8
        assert all(begin < end for begin, end in sampled)
        assert len(sampled) == 8
        assert _stretches(100, sample=True) == [(0, 100)]


class TestRefusals:
    @pytest.mark.parametrize("kind", REFUSED_KINDS)
    def test_architectures_whose_attention_does_not_reach_ours(self, kind: str, tiny_models: Path) -> None:
        with pytest.raises(ModelLoadError, match=f"models of type {kind} cannot be served: .*Choose a model"):
            load(make_tiny_model(kind, tiny_models))

    def test_encoder_decoder(self, tmp_path: Path) -> None:
        config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
        with pytest.raises(ModelLoadError, match="encoder-decoder"):
            load(tmp_path / "t5")

    def test_state_outside_of_kv(self, tmp_path: Path) -> None:
        from transformers import MambaConfig, MambaForCausalLM

        config = MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1)
        MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
        with pytest.raises(ModelLoadError, match="mamba cannot be served"):
            load(tmp_path / "mamba")

    def test_attention_beside_a_state_that_is_not_kept(self, tmp_path: Path) -> None:
        """Every layer calls our attention, yet a second path beside it forgets what came before:
        only running it shows that.
        """
        from transformers import FalconH1Config, FalconH1ForCausalLM

        config = FalconH1Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            mamba_d_ssm=32,
            mamba_n_heads=4,
            mamba_d_head=8,
            mamba_n_groups=1,
            mamba_d_state=8,
            mamba_chunk_size=8,
            initializer_range=0.3,
            pad_token_id=0,
        )
        torch.manual_seed(0)
        FalconH1ForCausalLM(config).save_pretrained(tmp_path / "falcon_h1")
        with pytest.raises(
            ModelLoadError, match="falcon_h1 cannot be served: with paged attention it computes something else"
        ):
            load(tmp_path / "falcon_h1")

    def test_attention_in_chunks(self, llama: Path) -> None:
        change_config(llama, attention_chunk_size=64)
        with pytest.raises(ModelLoadError, match="attention_chunk_size"):
            load(llama)

    def test_attention_that_looks_ahead(self, llama: Path) -> None:
        change_config(llama, is_causal=False)
        with pytest.raises(ModelLoadError, match="not a causal model"):
            load(llama)

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ModelLoadError, match="no model folder"):
            load(tmp_path / "nowhere")

    def test_missing_config(self, llama: Path) -> None:
        (llama / "config.json").unlink()
        with pytest.raises(ModelLoadError, match=r"no config\.json"):
            load(llama)

    def test_config_that_is_no_json(self, llama: Path) -> None:
        (llama / "config.json").write_text("{")
        with pytest.raises(ModelLoadError, match="configuration"):
            load(llama)

    def test_unknown_architecture(self, llama: Path) -> None:
        change_config(llama, model_type="not_yet_invented")
        with pytest.raises(ModelLoadError, match="not_yet_invented"):
            load(llama)

    def test_missing_weights(self, llama: Path) -> None:
        (llama / "model.safetensors").unlink()
        with pytest.raises(ModelLoadError, match="safetensors"):
            load(llama)

    def test_pickled_weights_are_not_read(self, llama: Path) -> None:
        torch.save({}, llama / "pytorch_model.bin")
        (llama / "model.safetensors").unlink()
        with pytest.raises(ModelLoadError, match="safetensors"):
            load(llama)

    @pytest.mark.parametrize("num_bytes", [4, 1000, -1000])
    def test_truncated_weights(self, llama: Path, num_bytes: int) -> None:
        file = llama / "model.safetensors"
        file.write_bytes(file.read_bytes()[:num_bytes])
        with pytest.raises(ModelLoadError, match="cut short"):
            load(llama)

    def test_weights_of_fewer_layers_than_the_config_says(self, llama: Path) -> None:
        change_config(llama, num_hidden_layers=3)
        with pytest.raises(ModelLoadError, match="lacks 9 weights"):
            load(llama)

    def test_weights_of_another_shape(self, llama: Path) -> None:
        change_config(llama, intermediate_size=100)
        with pytest.raises(ModelLoadError):
            load(llama)

    def test_missing_gguf(self, tmp_path: Path) -> None:
        with pytest.raises(ModelLoadError, match=r"\.gguf"):
            load(tmp_path / "model.gguf")

    def test_broken_gguf(self, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
        with pytest.raises(ModelLoadError):
            load(tmp_path / "model.gguf")

    @pytest.mark.parametrize(("dtype", "device", "word"), [("int8", "cpu", "dtype"), ("auto", "tpu", "device")])
    def test_unknown_dtype_and_device(self, llama: Path, dtype: str, device: str, word: str) -> None:
        with pytest.raises(ModelLoadError, match=word):
            load(llama, dtype, device)

    @pytest.mark.skipif(torch.cuda.is_available(), reason=left_out.not_for("machines with CUDA"))
    def test_cuda_where_there_is_none(self, llama: Path) -> None:
        assert load(llama, device="auto").device == torch.device("cpu")
        with pytest.raises(ModelLoadError, match="no CUDA device"):
            load(llama, device="cuda")

"""Each in a process of its own: what is imported stays imported."""

import os
import subprocess
import sys

import pytest

FIRST_LINE = (
    "import sys; from kvrelay.engine.fast_transformers_import import light_imports, transformers; import torch\n"
)


def run(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", FIRST_LINE + code], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


NAMES = "len(transformers.models.__all__), sorted(transformers.models.__all__)[::500]"


@pytest.fixture(scope="module")
def worker_output() -> list[str]:
    """What a process said that loaded a model as a worker does: which modules it has then, and
    models' names.
    """
    code = f"""
import kvrelay.worker.engine_setup
config = transformers.LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
with light_imports():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
model = transformers.AutoModelForCausalLM.from_config(config)
assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 64)
print([name for name in ("torch._dynamo", "sympy", "torch.distributed.tensor", "scipy", "sklearn") if name in sys.modules])
print({NAMES})
"""
    return run(code).splitlines()


def test_a_worker_loads_a_model_without_the_compiler_symbolic_algebra_or_distributed_tensors(
    worker_output: list[str],
) -> None:
    assert worker_output[0] == "[]"


def test_afterwards_torch_is_as_it_was_and_gives_its_compiler_to_whoever_asks() -> None:
    code = """
from torch.nn import init
assert torch.distributed.is_available() and init.normal_.__module__ == "torch.nn.init"
assert torch.arange(3, device="meta").is_meta
with torch.device("meta"):
    assert torch.arange(3).is_meta
assert torch.compiler.disable(lambda: 1)() == 1
assert "torch._dynamo" in sys.modules and torch._dynamo.config is sys.modules["torch._dynamo.config"]
"""
    run(code)


def test_a_stand_in_that_is_asked_for_more_than_decorators_gives_way_to_the_compiler() -> None:
    code = """
with light_imports():
    import torch._dynamo
    stand_in = sys.modules["torch._dynamo"]
    assert stand_in.disable(abs) is abs and stand_in.disable(recursive=False)(abs) is abs
    assert stand_in.is_compiling() is False
    assert sys.modules["torch._dynamo"] is not stand_in
    assert torch.compiler.disable(abs) is not abs
"""
    run(code)


def test_the_names_of_models_are_those_of_a_plain_import(worker_output: list[str]) -> None:
    plain = f"import transformers.models; print({NAMES})"
    result = subprocess.run([sys.executable, "-c", plain], capture_output=True, text=True, check=True)
    assert worker_output[1:] == result.stdout.splitlines()

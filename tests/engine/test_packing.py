"""Packed products against plain arithmetic, for shapes that leave remainders, and for the largest numbers int8 can meet."""

import pytest
import torch
from torch import Tensor

from kvrelay.engine.native import load_library
from kvrelay.engine.native.library import NativeLibrary
from kvrelay.engine.native.packing import MAX_WEIGHT, WeightArena, interleave_panels, pack_matrix

GROUP = 64
LIBRARY = load_library()

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no C compiler")


def multiply(weight: Tensor, bias: Tensor | None, inputs: Tensor, *, int8: bool) -> Tensor:
    assert isinstance(LIBRARY, NativeLibrary)
    packed = pack_matrix(weight, bias, WeightArena(1 << 16), int8=int8)
    outputs = torch.empty(inputs.shape[0], weight.shape[0])
    LIBRARY.run_linear(packed.matrix, inputs.shape[0], inputs.data_ptr(), outputs.data_ptr())
    return outputs


def quantized(values: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Whole numbers float64 [rows, groups, GROUP] and scales float64 [rows, groups, 1]."""
    groups = values.view(values.shape[0], values.shape[1] // GROUP, GROUP)
    scales = groups.abs().amax(dim=-1, keepdim=True) / largest
    return (groups * (1 / scales)).round().double(), scales.double()


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 4, 5, 6, 7, 16, 300])
@pytest.mark.parametrize(("n", "k"), [(16, 64), (40, 96), (130, 192)])
def test_float32_products(num_rows: int, n: int, k: int) -> None:
    weight, bias, inputs = random(n, k), random(n), random(num_rows, k)
    expected = inputs.double() @ weight.double().t() + bias.double()
    torch.testing.assert_close(multiply(weight, bias, inputs, int8=False).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 4, 5, 6, 7, 16, 300])
@pytest.mark.parametrize(("n", "k"), [(16, 64), (40, 128), (130, 192)])
def test_int8_products_are_those_of_the_quantized_numbers(num_rows: int, n: int, k: int) -> None:
    weight, bias, inputs = random(n, k), random(n), random(num_rows, k)
    (w, w_scales), (x, x_scales) = quantized(weight, MAX_WEIGHT), quantized(inputs, 127)
    expected = torch.einsum("rgi,ngi->rng", x, w) * x_scales.squeeze(-1)[:, None] * w_scales.squeeze(-1)[None]
    torch.testing.assert_close(
        multiply(weight, bias, inputs, int8=True).double(), expected.sum(-1) + bias.double(), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_int8_numbers_do_not_overflow(sign: int) -> None:
    weight, inputs = torch.full((16, 128), 0.5 * sign), torch.full((3, 128), 2.0)
    torch.testing.assert_close(multiply(weight, None, inputs, int8=True), torch.full((3, 16), 128.0 * sign))


def test_rows_of_zeros_stay_zero_in_int8() -> None:
    weight = random(16, 64)
    weight[3] = 0
    outputs = multiply(weight, None, torch.cat((torch.zeros(1, 64), random(1, 64))), int8=True)
    assert not outputs[0].any()
    assert outputs[1, 3] == 0


def test_widths_that_have_no_whole_groups_stay_in_float32() -> None:
    weight, inputs = random(16, 96), random(2, 96)
    assert torch.equal(multiply(weight, None, inputs, int8=True), multiply(weight, None, inputs, int8=False))


def test_panels_of_gate_and_up_take_turns() -> None:
    gate, up = torch.arange(32.0), torch.arange(100.0, 132.0)
    assert interleave_panels(gate, up).tolist() == [*range(16), *range(100, 116), *range(16, 32), *range(116, 132)]

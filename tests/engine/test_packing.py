"""Packed products against plain arithmetic, for shapes that leave remainders, and for the largest
numbers int8 can meet.
"""

import pytest
import torch
from torch import Tensor

from kvrelay.engine.native import load_library
from kvrelay.engine.native.library import MatrixKind, NativeLibrary
from kvrelay.engine.native.packing import PackedMatrix, WeightArena, interleave_panels, pack_matrix
from tests.support import left_out

GROUP = 64
LARGEST_SUM = 128
"""Times 255 it is less than 2^15."""
LIBRARY = load_library()

pytestmark = pytest.mark.skipif(LIBRARY is None, reason=left_out.C_COMPILER)


def pack(weight: Tensor, bias: Tensor | None = None, *, int8: bool, plain_rows: bool = False) -> PackedMatrix:
    assert isinstance(LIBRARY, NativeLibrary)
    bfloat16 = MatrixKind.BF16_PLAIN if plain_rows else MatrixKind.BF16
    kind = MatrixKind.INT8 if int8 else bfloat16 if weight.dtype == torch.bfloat16 else MatrixKind.F32
    return pack_matrix(weight, bias, WeightArena(1 << 16), LIBRARY, kind)


def multiply_packed(packed: PackedMatrix, inputs: Tensor) -> Tensor:
    assert isinstance(LIBRARY, NativeLibrary)
    outputs = torch.empty(inputs.shape[0], packed.matrix.n)
    LIBRARY.run_linear(packed.matrix, inputs.shape[0], inputs.data_ptr(), outputs.data_ptr())
    return outputs


def multiply(weight: Tensor, bias: Tensor | None, inputs: Tensor, *, int8: bool) -> Tensor:
    return multiply_packed(pack(weight, bias, int8=int8), inputs)


def quantized_weight(packed: PackedMatrix) -> tuple[Tensor, Tensor]:
    """Whole numbers float64 [n, groups, GROUP] and scales float64 [n, groups, 1]."""
    n, k = packed.matrix.n, packed.matrix.k
    data, scales = packed.tensors[:2]  # [panels, k / 4, PANEL, 4], [panels, groups, PANEL]
    return (
        data.transpose(1, 2).reshape(-1, k // GROUP, GROUP)[:n].double(),
        scales.transpose(1, 2).reshape(-1, k // GROUP, 1)[:n].double(),
    )


def quantized_inputs(values: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers float64 [rows, groups, GROUP] and scales float64 [rows, groups, 1]."""
    groups = values.view(values.shape[0], values.shape[1] // GROUP, GROUP)
    scales = groups.abs().amax(dim=-1, keepdim=True) / 127
    return (groups * (1 / scales)).round().double(), scales.double()


def sums_of_four(numbers: Tensor) -> Tensor:
    """Of numbers [n, groups, GROUP], those that are added up in 16 bits: [n, groups, GROUP / 4]."""
    n, groups, _ = numbers.shape
    # Each of two fours gives two neighbours to either sum.
    return numbers.view(n, groups, GROUP // 8, 2, 2, 2).sum(dim=(3, 5)).flatten(2)


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
    packed = pack(weight, bias, int8=True)
    (w, w_scales), (x, x_scales) = quantized_weight(packed), quantized_inputs(inputs)
    expected = torch.einsum("rgi,ngi->rng", x, w) * x_scales.squeeze(-1)[:, None] * w_scales.squeeze(-1)[None]
    torch.testing.assert_close(
        multiply_packed(packed, inputs).double(), expected.sum(-1) + bias.double(), rtol=1e-5, atol=1e-4
    )


def products_of_tiles(weight: Tensor, inputs: Tensor) -> Tensor:
    """Of bfloat16 [n, k] and [rows, k], in float32, in the order of AMX's instruction."""
    w, x = weight.double(), inputs.double()
    sums = torch.zeros(len(x), len(w))
    for begin in range(0, w.shape[1], 32):
        parts = [torch.zeros_like(sums), torch.zeros_like(sums)]
        for i in range(begin, begin + 32):
            parts[i % 2] = (parts[i % 2].double() + x[:, i, None] * w[None, :, i]).float()
        sums += parts[0] + parts[1]
    return sums


@pytest.mark.parametrize("num_rows", [1, 8, 9, 33])
@pytest.mark.parametrize(("n", "k"), [(16, 32), (40, 96), (130, 192)])
def test_bfloat16_products_are_summed_in_the_order_of_tiles(num_rows: int, n: int, k: int) -> None:
    weight, inputs = random(n, k).bfloat16(), random(num_rows, k)
    rounded = inputs.bfloat16()
    expected = products_of_tiles(weight, rounded)
    assert torch.equal(multiply_packed(pack(weight, int8=False, plain_rows=True), inputs), expected)
    expected += products_of_tiles(weight, (inputs - rounded).bfloat16())
    assert torch.equal(multiply_packed(pack(weight, int8=False), inputs), expected)


def test_inputs_in_two_parts_lose_little_beside_bfloat16_weights() -> None:
    weight, inputs = random(130, 576).bfloat16(), random(16, 576)
    exact = inputs.double() @ weight.double().t()

    def error(*, plain_rows: bool) -> float:
        computed = multiply_packed(pack(weight, int8=False, plain_rows=plain_rows), inputs)
        return float((computed - exact).norm() / exact.norm())

    assert error(plain_rows=False) < 1e-5
    assert error(plain_rows=True) > 1e-3


def test_the_largest_inputs_stay_finite_beside_bfloat16_weights() -> None:
    inputs = torch.full((1, 32), 0.0)
    inputs[0, 3] = torch.finfo(torch.float32).max
    computed = multiply_packed(pack(torch.full((16, 32), 0.5).bfloat16(), int8=False), inputs)
    torch.testing.assert_close(computed, inputs[0, 3].expand(1, 16) / 2, rtol=1e-4, atol=0)


def test_bfloat16_weights_take_half_the_bytes_and_lose_nothing() -> None:
    weight = random(130, 192).bfloat16()
    packed = pack(weight, int8=False)
    assert 2 * packed.tensors[0].nbytes == pack(weight.float(), int8=False).tensors[0].nbytes
    # [panels, k / 2, PANEL, 2]
    assert torch.equal(packed.tensors[0].transpose(1, 2).reshape(-1, 192)[:130], weight)


def test_bfloat16_widths_that_have_no_whole_tiles_become_float32() -> None:
    weight, inputs = random(16, 80).bfloat16(), random(2, 80)
    assert torch.equal(multiply(weight, None, inputs, int8=False), multiply(weight.float(), None, inputs, int8=False))


def with_outliers(weight: Tensor) -> Tensor:
    weight = weight.clone()
    weight[:, ::GROUP] = 30
    return weight


@pytest.mark.parametrize(
    "weight", [random(40, 256), random(40, 256).abs(), -torch.ones(16, 128), with_outliers(random(40, 256))]
)
def test_sums_of_four_products_fit_into_16_bits(weight: Tensor) -> None:
    numbers, scales = quantized_weight(pack(weight, int8=True))
    assert sums_of_four(numbers.clamp(min=0)).max() <= LARGEST_SUM
    assert sums_of_four(numbers.clamp(max=0)).min() >= -LARGEST_SUM
    half_a_step = (scales / 2).expand_as(numbers) * (1 + 1e-5)
    assert ((numbers * scales).flatten(1) - weight.double()).abs().le(half_a_step.flatten(1)).all()


def test_int8_weights_lose_less_than_with_seven_bits() -> None:
    weight = random(64, 576)
    numbers, scales = quantized_weight(pack(weight, int8=True))
    groups = weight.view(64, 576 // GROUP, GROUP)
    seven_bit_scales = groups.abs().amax(dim=-1, keepdim=True) / 63
    seven_bit_error = ((groups / seven_bit_scales).round() * seven_bit_scales - groups).norm()
    assert (numbers * scales - groups).norm() < seven_bit_error


def test_a_large_weight_does_not_coarsen_the_others_to_seven_bits() -> None:
    numbers, _ = quantized_weight(pack(with_outliers(random(16, 128)), int8=True))
    assert numbers.abs().amax(dim=-1).gt(90).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_int8_numbers_do_not_overflow(sign: int) -> None:
    weight, inputs = torch.full((16, 128), 0.5 * sign), torch.full((3, 128), 2.0)
    torch.testing.assert_close(multiply(weight, None, inputs, int8=True), torch.full((3, 16), 128.0 * sign))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_worst_inputs_for_a_weight_do_not_overflow(sign: int) -> None:
    packed = pack(random(16, 192), int8=True)
    numbers, scales = quantized_weight(packed)
    # row r is the worst of output r
    inputs = torch.where(sign * numbers.flatten(1) > 0, 127.0, -127.0)
    expected = torch.einsum("rgi,ngi->rng", inputs.view_as(numbers).double(), numbers) * scales.squeeze(-1)[None]
    torch.testing.assert_close(multiply_packed(packed, inputs.float()).double(), expected.sum(-1), rtol=1e-5, atol=1e-3)


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

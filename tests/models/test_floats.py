"""The formats computed from their bits equal torch's; of the small ones, every number."""

import math

import pytest

from posttrain.models.floats import BF16, E4M3, E5M2, FORMATS, FP16, FP32, TF32

torch = pytest.importorskip("torch")
IN_TORCH = {
    FP32: torch.float32, BF16: torch.bfloat16, FP16: torch.float16, E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2,
}  # fmt: skip
SMALL = [f for f in IN_TORCH if f.bits <= 16]
names = {"ids": lambda f: f.name}


def all_numbers(fmt):
    """Every positive finite number of a format of 8 or 16 bits, ascending, from its bit patterns."""
    whole = {8: torch.uint8, 16: torch.int16}[fmt.bits]
    values = torch.arange(2 ** (fmt.bits - 1), dtype=torch.int32).to(whole).view(IN_TORCH[fmt]).double()
    return values[values.isfinite() & (values > 0)]


@pytest.mark.parametrize("fmt", IN_TORCH, **names)
def test_largest_and_smallest_numbers_match_torch(fmt):
    info = torch.finfo(IN_TORCH[fmt])
    assert (fmt.bits, fmt.largest, fmt.smallest_normal) == (info.bits, info.max, info.smallest_normal)
    assert fmt.spacing_at(1.0) == info.eps


@pytest.mark.parametrize("fmt", SMALL, **names)
def test_spacing_and_range_match_an_enumeration_of_all_numbers(fmt):
    numbers = all_numbers(fmt)
    assert (numbers[0], numbers[-1]) == (fmt.smallest_subnormal, fmt.largest)
    gaps = (numbers[1:] - numbers[:-1]).tolist()
    assert [fmt.spacing_at(x) for x in numbers[:-1].tolist()] == gaps
    integers = set(numbers[numbers == numbers.floor()].tolist())
    first_missing = next(i for i in range(1, 10**6) if float(i) not in integers)
    assert fmt.exact_integers == first_missing - 1


def test_exact_integers_of_fp32():
    assert torch.tensor(float(FP32.exact_integers)).item() == 2**24
    assert torch.tensor(2**24 + 1.0, dtype=torch.float64).float().item() == 2**24


@pytest.mark.parametrize("fmt", IN_TORCH, **names)
def test_rounding_matches_torch(fmt):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.empty(4000).uniform_(-150, 130, generator=generator).double()
    spread = torch.randn(4000, generator=generator).double() * 2.0**exponents
    near = torch.linspace(-3, 3, 1201, dtype=torch.float64) * fmt.largest / 2
    ends = torch.tensor([math.inf, -math.inf, 0.0, 0.9 * fmt.smallest_subnormal], dtype=torch.float64)
    xs = torch.cat([spread, near, ends])
    if fmt in SMALL:
        numbers = all_numbers(fmt)
        xs = torch.cat([xs, (numbers[1:] + numbers[:-1]) / 2]).float().double()  # ties; torch rounds from fp32
    expected = xs.float().to(IN_TORCH[fmt]).double()
    got = torch.tensor([fmt.round(x) for x in xs.tolist()], dtype=torch.float64)
    assert torch.equal(got, expected)
    assert math.isnan(fmt.round(math.nan))


def test_tf32_is_fp32_with_the_lowest_13_bits_rounded():
    xs = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 1e3
    bits = xs.view(torch.int32)
    to_even = bits + 0xFFF + ((bits >> 13) & 1)
    expected = (to_even & ~0x1FFF).view(torch.float32)
    assert [TF32.round(x) for x in xs.tolist()] == expected.tolist()
    assert (TF32.smallest_normal, TF32.exact_integers) == (FP32.smallest_normal, FP16.exact_integers)


@pytest.mark.parametrize("fmt", FORMATS, **names)
def test_lost_beside_one_is_the_largest_x_that_1_plus_x_loses(fmt):
    assert fmt.round(1 + fmt.lost_beside_one) == 1
    assert fmt.round(1 + fmt.lost_beside_one * 1.001) > 1
    assert math.isnan(fmt.spacing_at(2 * fmt.largest))

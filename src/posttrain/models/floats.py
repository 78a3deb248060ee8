"""Floating-point formats: their range and spacing, and how they round, computed from their bits.

A format has one sign bit, exponent bits and mantissa bits; everything else follows from these. Computed in Python's own
floats, which represent all of these formats exactly. Imports no torch.

Sources: IEEE 754 (fp32, fp16), bfloat16 and TF32 (Kalamkar et al., 2019, arXiv 1905.12322; NVIDIA's A100 white paper),
FP8 (Micikevicius et al., 2022, arXiv 2209.05433).
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class FloatFormat:
    """One format. `has_infinity` is False for e4m3, which has numbers where other formats have infinity and NaNs."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    has_infinity: bool = True

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def _bias(self) -> int:
        return int(2 ** (self.exponent_bits - 1) - 1)

    @property
    def largest(self) -> float:
        if self.has_infinity:
            return (2 - 2.0**-self.mantissa_bits) * 2.0**self._bias
        return (2 - 2 * 2.0**-self.mantissa_bits) * 2.0 ** (self._bias + 1)  # all ones is its only NaN

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self._bias)

    @property
    def smallest_subnormal(self) -> float:
        return self.smallest_normal * 2.0**-self.mantissa_bits

    @property
    def lost_beside_one(self) -> float:
        """The largest x for which 1 + x rounds to 1: half of the spacing above 1, since ties round to even."""
        return self.spacing_at(1.0) / 2

    @property
    def exact_integers(self) -> int:
        """Every integer up to this one is exact; the next one is not."""
        return int(2 ** (self.mantissa_bits + 1))

    def spacing_at(self, x: float) -> float:
        """The distance from |x| to the next larger number; NaN beyond the largest."""
        if abs(x) > self.largest:
            return math.nan
        exponent = math.frexp(max(abs(x), self.smallest_normal))[1] - 1
        return 2.0 ** (exponent - self.mantissa_bits)

    def round(self, x: float) -> float:
        """The nearest number of this format, ties to even. Beyond the largest: infinity, or the largest number in a
        format without infinity, as in torch 2.13.
        """
        if not math.isfinite(x):
            return x if self.has_infinity or math.isnan(x) else math.copysign(self.largest, x)
        exponent = math.frexp(max(abs(x), self.smallest_normal))[1] - 1
        step = 2.0 ** (exponent - self.mantissa_bits)
        rounded = round(x / step) * step  # exact except for Python's round, which rounds ties to even
        if abs(rounded) > self.largest:
            return math.copysign(math.inf if self.has_infinity else self.largest, x)
        return math.copysign(rounded, x)


FP32 = FloatFormat("fp32", 8, 23)
TF32 = FloatFormat("tf32", 8, 10)  # fp32's range, fp16's precision: tensor cores multiply fp32 matrices in it
BF16 = FloatFormat("bf16", 8, 7)
FP16 = FloatFormat("fp16", 5, 10)
E4M3 = FloatFormat("fp8 e4m3", 4, 3, has_infinity=False)
E5M2 = FloatFormat("fp8 e5m2", 5, 2)
FORMATS = (FP32, TF32, BF16, FP16, E4M3, E5M2)

"""Correctly rounded arithmetic with the same bits in machine code and in Triton's interpreter."""

import torch
import triton
import triton.language as tl

from flatops import reference

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

if INTERPRETED:
    from triton._C.libtriton import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fma(builder, x, y, z):
        a, b, c = (torch.tensor(handle.data) for handle in (x, y, z))
        return TensorHandle(reference.fma(a, b, c).numpy(), z.dtype.scalar)

    if not hasattr(interpreter, "fma_fp32"):  # up to Triton 3.6 the interpreter rounds twice
        InterpreterBuilder.create_fma = fma


@triton.jit
def widen(x):
    """To the dtype that kernels compute in: float64 for float64, float32 for the others."""
    if x.dtype == tl.bfloat16:  # by its bits: the interpreter's conversion of subnormals is wrong
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.float16:
        x = x.to(tl.float32)
    return x


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """To `dtype`, rounded to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter truncates
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        x = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        x = x.to(dtype)
    return x

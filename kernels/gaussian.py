"""Box-Muller in fma, mul, sub and correctly rounded sqrt; csrc/gaussian.h explains each step."""

import triton
import triton.language as tl

from .philox import philox

SQRT_HALF = tl.constexpr(0x3F3504F3)


@triton.jit
def box_muller(radius, angle):
    """Two uint32 words become two float32 normals."""
    u = ((radius >> 1) | 1).to(tl.int32, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
    t = u - (SQRT_HALF + (31 << 23))
    e = (t >> 23).to(tl.float32)
    f = ((t & 0x007FFFFF) + SQRT_HALF).to(tl.float32, bitcast=True) - 1.0
    q = tl.fma(f, 0.20116034, -0.32527755)
    q = tl.fma(q, f, 0.34573421)
    q = tl.fma(q, f, -0.39793965)
    q = tl.fma(q, f, 0.49932399)
    q = tl.fma(q, f, -0.66670003)
    q = tl.fma(q, f, 1.0000091)
    q = tl.fma(q, f, -2.0)
    r = tl.sqrt_rn(tl.fma(e, -1.3862944, q * f))
    r = (r.to(tl.uint32, bitcast=True) ^ ((angle & 2) << 30)).to(tl.float32, bitcast=True)

    x = angle.to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10  # 2^-31
    y = x * x
    s = tl.fma(y, -3.5877224e-05, 0.0024898719)
    s = tl.fma(s, y, -0.080745367)
    s = tl.fma(s, y, 0.78539815) * x
    c = tl.fma(y, -0.00031888014, 0.015849915)
    c = tl.fma(c, y, -0.30842425)
    c = tl.fma(c, y, 0.99999997)
    odd = (angle & 1) != 0
    return r * tl.where(odd, s, c), r * tl.where(odd, c, s)


@triton.jit
def normals(block, filter, tensor, draw, k0, k1):
    """The noise of offsets 4 block + (0, 1, 2, 3): float32 [rows, 4 n] from blocks [rows, n] and filters [rows, 1]."""
    x0, x1, x2, x3 = philox(block, filter, tensor, draw, k0, k1)
    z0, z1 = box_muller(x0, x1)
    z2, z3 = box_muller(x2, x3)
    z = tl.join(tl.join(z0, z2), tl.join(z1, z3))
    return tl.reshape(z, [block.shape[0], 4 * block.shape[1]])

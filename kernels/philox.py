"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)."""

import triton
import triton.language as tl

M0, M1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
W0, W1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four uint32 words from the counter (block, filter, tensor, draw) and the two words of the key.

    Words of the counter may differ in shape: those shared by a whole filter then stay scalars through the first rounds.
    Load the two words of the key separately: with halves of one number the compiler does the xors in 64 bits, which
    takes a sixth more instructions.
    """
    for _ in tl.static_range(10):
        # A 64-bit product is one instruction, its two halves would be two.
        p0, p1 = c0.to(tl.uint64) * M0, c2.to(tl.uint64) * M1
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0, k1 = k0 + W0, k1 + W1
    return c0, c1, c2, c3

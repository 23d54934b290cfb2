// Compiles the file that includes it once per instruction set, each copy in its own namespace, and chooses among them.
//
// A kernel file is laid out as
//     #define FLATOPS_FILE "cpu/perturb.cpp"
//     #include "cpu/each_level.h"
//     #ifdef FLATOPS_LEVEL
//       ... the kernels, once, in terms of lanes.h ...
//     #else
//       ... the operators, which call FLATOPS_BEST(kernel)(arguments) ...
//     #endif
// One binary serves every machine: the choice is made at run time (level.h), without a -march flag.
#ifndef FLATOPS_LEVEL
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include "cpu/level.h"
#include "ops.h"

#define FLATOPS_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define FLATOPS_UNROLL _Pragma("clang loop unroll(full)")
#else
#define FLATOPS_UNROLL _Pragma("GCC unroll 16")
// Interleaves independent chains of a loop body before register allocation; GCC's default for x86 does not.
#pragma GCC optimize("schedule-insns", "sched-pressure")
#endif

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#endif
#define FLATOPS_LEVEL 512
namespace flatops::cpu::avx512 {
#include "cpu/kernel_parts.h"
#include FLATOPS_FILE
}
#undef FLATOPS_LEVEL
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif
#define FLATOPS_LEVEL 256
namespace flatops::cpu::avx2 {
#include "cpu/kernel_parts.h"
#include FLATOPS_FILE
}
#undef FLATOPS_LEVEL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define FLATOPS_BEST(kernel)                                                                 \
  (::flatops::cpu::level() == ::flatops::cpu::Level::avx512 ? ::flatops::cpu::avx512::kernel \
   : ::flatops::cpu::level() == ::flatops::cpu::Level::avx2 ? ::flatops::cpu::avx2::kernel   \
                                                            : ::flatops::cpu::portable::kernel)
#else
#define FLATOPS_BEST(kernel) ::flatops::cpu::portable::kernel
#endif

#define FLATOPS_LEVEL 128
namespace flatops::cpu::portable {
#include "cpu/kernel_parts.h"
#include FLATOPS_FILE
}
#undef FLATOPS_LEVEL
#endif

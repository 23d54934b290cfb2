// The SIMD level: the best of the machine, or that of the environment variable FLATOPS_SIMD.
#pragma once
namespace flatops::cpu {

enum class Level { portable,
                   avx2,
                   avx512 };

Level level();             // chosen at the first call
const char* level_name(Level);  // "portable", "avx2", "avx512"
bool supports(Level);      // whether this machine can run it
void set_level(Level);     // for tests and benchmarks; requires supports()

}  // namespace flatops::cpu

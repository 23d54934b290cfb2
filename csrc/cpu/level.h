// The SIMD level: the best that the machine has, or what the environment variable FLATOPS_SIMD asks for.
#pragma once
namespace flatops::cpu {

enum class Level { portable,
                   avx2,
                   avx512 };

Level level();             // chosen at the first call
const char* level_name(Level);  // "portable", "avx2", "avx512"
bool supports(Level);      // whether this machine can run it
void set_level(Level);     // for tests and benchmarks; the caller has asked supports()

}  // namespace flatops::cpu

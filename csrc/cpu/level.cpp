#include "cpu/level.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace flatops::cpu {
namespace {

constexpr const char* NAMES[] = {"portable", "avx2", "avx512"};

Level choose() {
  if (const char* wish = std::getenv("FLATOPS_SIMD"); wish && *wish) {
    for (Level l : {Level::portable, Level::avx2, Level::avx512})
      if (!std::strcmp(wish, NAMES[int(l)])) {
        if (!supports(l)) throw std::invalid_argument(std::string("FLATOPS_SIMD=") + wish + ": this machine cannot run it");
        return l;
      }
    throw std::invalid_argument(std::string("FLATOPS_SIMD=") + wish + ": expected portable, avx2 or avx512");
  }
  return supports(Level::avx512) ? Level::avx512 : supports(Level::avx2) ? Level::avx2
                                                                         : Level::portable;
}

Level& chosen() {
  static Level l = choose();
  return l;
}

}  // namespace

bool supports(Level l) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi2");
  if (l == Level::avx2) return avx2;
  if (l == Level::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return l == Level::portable;
}

Level level() { return chosen(); }
void set_level(Level l) { chosen() = l; }
const char* level_name(Level l) { return NAMES[int(l)]; }

}  // namespace flatops::cpu

// The parts of the kernels of one SIMD level, in dependency order. Included only by each_level.h.
#include "cpu/lanes.h"
#include "philox.h"
#include "gaussian.h"
#include "cpu/noise.h"
#include "cpu/tile.h"
#include "cpu/sum.h"

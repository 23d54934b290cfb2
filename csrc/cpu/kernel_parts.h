// What the kernels of one SIMD level are made of, in the order of their use. Included by each_level.h alone.
#include "cpu/lanes.h"
#include "philox.h"
#include "gaussian.h"
#include "cpu/noise.h"
#include "cpu/tile.h"
#include "cpu/sum.h"

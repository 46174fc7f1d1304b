#include "variants.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#if defined(NSDS_X86)
#include <immintrin.h>

#define NSDS_AVX2 1
// after the standard headers: their functions must not use these instructions
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace avx2 {
#include "lanes.h"
#include "formats.h"
#include "search.h"
#include "tiles.h"
#include "rounding.h"
#include "nearest.h"

bool round(const char* type, const float* rows, int n_rows, int64_t n, const float* upper, const float* variances,
           int n_descents, const Output& out) {
    return round_named(type, rows, n_rows, n, upper, variances, n_descents, out);
}

bool nearest(const char* type, const float* rows, int n_rows, int64_t n, const float* columns, const Output& out) {
    return nearest_named(type, rows, n_rows, n, columns, out);
}
}  // namespace avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

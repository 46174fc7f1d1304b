#include "variants.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#if defined(__aarch64__) && defined(__GNUC__)
#include <arm_neon.h>
#endif

namespace plain {
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
}  // namespace plain

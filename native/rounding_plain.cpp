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
#include "rounding.h"

bool round(const char* type, const float* rows, int n_rows, int64_t n, const float* upper, const float* variances,
           int n_descents, const Output& out) {
    return round_named(type, rows, n_rows, n, upper, variances, n_descents, out);
}
}  // namespace plain

// The kernel, compiled once per instruction set. The program chooses when it runs, so one binary serves every processor.

#pragma once

#include <cstdint>

// Where the results of a call go; rows are contiguous.
struct Output {
    uint8_t* codes;      // (n_rows, n_cols)
    int16_t *s, *m;      // (n_rows, n_blocks, n_sub)
    float *d, *dmin;     // (n_rows, n_blocks)
    double* errors;      // (n_rows,)
    int64_t n_blocks, n_scales;  // how many d and s there are
};


// Round rows, (n_rows, n) float32, to `type`, with Hessian factors `upper`, (n, n), and `variances`, (n,). Returns whether
// there is such a type. Throws std::bad_alloc.
typedef bool Round(const char* type, const float* rows, int n_rows, int64_t n, const float* upper, const float* variances,
                   int n_descents, const Output& out);

// Round rows to nearest in `type`, a K-quant, with weights of columns, (n,). Returns whether there is such a type.
typedef bool Nearest(const char* type, const float* rows, int n_rows, int64_t n, const float* columns, const Output& out);

namespace avx512 {
Round round;
Nearest nearest;
}
namespace avx2 {
Round round;
Nearest nearest;
}
namespace plain {
Round round;
Nearest nearest;
}

#if defined(__GNUC__) && defined(__x86_64__)
#define NSDS_X86 1
#endif

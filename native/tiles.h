// What all ways to round share: rows to tiles of STRIDE rows, columns first, and scales of tiles to results.

// Rows of a matrix with `n` columns become columns: column j of row r goes to columns[j * STRIDE + r]. The lanes beyond
// the last row are 0.
inline void transpose(const float* rows, int64_t n, int n_rows, int n_cols, float* columns) {
    for (int r = 0; r < (n_rows + LANES - 1) / LANES * LANES; ++r)
        for (int j = 0; j < n_cols; ++j) columns[j * STRIDE + r] = r < n_rows ? rows[r * n + j] : 0.0f;
}

// The results of the rows from `first` on; rows have `n` columns.
template <class T>
Output results_from(const Output& out, int64_t first, int64_t n) {
    const int64_t block = first * (n / T::BLOCK), scale = block * T::N_SUB;
    return {out.codes + first * n, out.s + scale, out.m + scale, out.d + block, out.dmin + block, out.errors + first, 0, 0};
}

// The scales of one block of up to STRIDE rows: s and m of a sub-block, d and dmin are STRIDE apart.
struct Scales {
    const float *s, *m, *d, *dmin;
};

// Keep the scales of block `index` of the rows, which have `n_blocks`.
template <class T>
void keep_scales(const Scales& scales, int n_rows, int64_t n_blocks, int64_t index, const Output& out) {
    for (int r = 0; r < n_rows; ++r) {
        const int64_t place = r * n_blocks + index;
        out.d[place] = scales.d[r];
        out.dmin[place] = scales.dmin[r];
        for (int sub = 0; sub < T::N_SUB; ++sub) {
            out.s[place * T::N_SUB + sub] = int16_t(scales.s[sub * STRIDE + r]);
            out.m[place * T::N_SUB + sub] = int16_t(scales.m[sub * STRIDE + r]);
        }
    }
}

// Round to nearest in K-quants: the codes and scales of ggml's reference quantizers with column weights (ggml-quants.c,
// quantize_row_q*_K_impl), lane by lane. Where a scale comes out 0, ggml keeps codes of an earlier step, which these are
// not; the caller finds such rows by their scales.

// One block of up to STRIDE rows.
template <class T>
class NearestBlock {
  public:
    NearestBlock() : x_(T::BLOCK * STRIDE), s_(T::N_SUB * STRIDE), m_(T::N_SUB * STRIDE), d_(STRIDE), dmin_(STRIDE) {}

    // `rows` are those of the matrix, from the block's first column on; `columns` the weights of its columns.
    void round(const float* rows, int64_t n, int n_rows, const float* columns, int64_t index, const Output& out) {
        transpose(rows, n, n_rows, T::BLOCK, x_.data());
        for (int first = 0; first < n_rows; first += LANES) {
            search<T>(&x_[first], columns, &s_[first], &m_[first], &d_[first], &dmin_[first]);
            const Lanes sum = round_lanes(first, columns);
            for (int lane = 0; lane < LANES && first + lane < n_rows; ++lane) out.errors[first + lane] += sum[lane];
        }
        keep_scales<T>({s_.data(), m_.data(), d_.data(), dmin_.data()}, n_rows, n / T::BLOCK, index, out);
        for (int r = 0; r < n_rows; ++r) {
            uint8_t* codes = out.codes + r * n + index * T::BLOCK;
            for (int j = 0; j < T::BLOCK; ++j) codes[j] = uint8_t(int32_t(x_[j * STRIDE + r]));
        }
    }

  private:
    Floats x_, s_, m_, d_, dmin_;

    // Replace the values of some rows by their codes; return the weighted squared errors.
    NSDS_INLINE Lanes round_lanes(int first, const float* columns) {
        const Lanes d = load(&d_[first]), dmin = load(&dmin_[first]);
        Lanes sum = all(0);
        for (int sub = 0; sub < T::N_SUB; ++sub) {
            const Lanes scale = d * load(&s_[sub * STRIDE + first]), offset = dmin * load(&m_[sub * STRIDE + first]);
            for (int j = sub * T::SUB; j < (sub + 1) * T::SUB; ++j) {
                const Lanes x = load(&x_[j * STRIDE + first]), level = to_levels<T>((x + offset) / scale);
                const Lanes wrong = x - (level * scale - offset);
                sum = fma(all(columns[j]) * wrong, wrong, sum);
                store(&x_[j * STRIDE + first], to_codes<T>(level));
            }
        }
        return sum;
    }
};

template <class T>
void nearest_rows(const float* rows, int n_rows, int64_t n, const float* columns, const Output& out) {
    NearestBlock<T> block;
    const int64_t n_blocks = n / T::BLOCK;
    for (int64_t first = 0; first < n_rows; first += STRIDE) {
        const Output part = results_from<T>(out, first, n);
        for (int64_t index = 0; index < n_blocks; ++index)
            block.round(rows + first * n + index * T::BLOCK, n, int(std::min<int64_t>(n_rows - first, STRIDE)),
                        columns + index * T::BLOCK, index, part);
    }
}

inline bool nearest_named(const char* type, const float* rows, int n_rows, int64_t n, const float* columns,
                          const Output& out) {
#define NSDS_NEAREST(name)                                           \
    if (std::strcmp(type, #name) == 0) {                             \
        if (!name::matches(n_rows, n, out)) return false;            \
        nearest_rows<name>(rows, n_rows, n, columns, out);           \
        return true;                                                 \
    }
    NSDS_NEAREST(Q2_K) NSDS_NEAREST(Q3_K) NSDS_NEAREST(Q4_K) NSDS_NEAREST(Q5_K) NSDS_NEAREST(Q6_K)
    NSDS_NEAREST(Q2_0)
#undef NSDS_NEAREST
    return false;
}

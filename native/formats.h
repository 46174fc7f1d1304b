// The formats of nsds_gguf/quantize/formats.py, as far as rounding needs them. A weight is
//
//     d * s * level - dmin * m
//
// with integers s and m of its sub-block, float16 scales d and dmin of its block.

enum class Search { affine, symmetric_in_blocks, symmetric, curve, largest, few };

template <int BLOCK_, int SUB_, int LOW_, int HIGH_, int S_LOW_, int S_HIGH_, int M_MAX_, Search SEARCH_>
struct Format {
    static constexpr int BLOCK = BLOCK_, SUB = SUB_, N_SUB = BLOCK_ / SUB_;  // weights, weights, sub-blocks per block
    static constexpr int LOW = LOW_, HIGH = HIGH_;                          // levels, 1 apart
    static constexpr int S_LOW = S_LOW_, S_HIGH = S_HIGH_, M_MAX = M_MAX_;
    static constexpr bool HAS_S = S_LOW_ < S_HIGH_, HAS_M = M_MAX_ > 0;
    static constexpr Search SEARCH = SEARCH_;
    static constexpr bool IS_CURVE = SEARCH_ == Search::curve;

    // Whether the arrays of results have the sizes of this format.
    static bool matches(int64_t n_rows, int64_t n, const Output& out) {
        return n % BLOCK == 0 && out.n_blocks == n_rows * (n / BLOCK) && out.n_scales == out.n_blocks * N_SUB;
    }
};

typedef Format<256, 16, 0, 3, 0, 15, 15, Search::affine> Q2_K;
typedef Format<256, 16, -4, 3, -32, 31, 0, Search::symmetric_in_blocks> Q3_K;
typedef Format<256, 32, 0, 15, 0, 63, 63, Search::affine> Q4_K;
typedef Format<256, 32, 0, 31, 0, 63, 63, Search::affine> Q5_K;
typedef Format<256, 16, -32, 31, -128, 127, 0, Search::symmetric_in_blocks> Q6_K;
typedef Format<32, 32, -8, 7, 1, 1, 0, Search::symmetric> Q4_0;
typedef Format<32, 32, -127, 113, 1, 1, 0, Search::curve> IQ4_NL;
typedef Format<32, 32, -16, 15, 1, 1, 0, Search::symmetric> Q5_0;
typedef Format<32, 32, 0, 31, 1, 1, 1, Search::affine> Q5_1;
typedef Format<32, 32, -128, 127, 1, 1, 0, Search::largest> Q8_0;
typedef Format<64, 64, -1, 2, 1, 1, 0, Search::few> Q2_0;

// The levels of IQ4_NL: kvalues_iq4nl of ggml-common.h.
constexpr int N_CURVE = 16;
constexpr float CURVE[N_CURVE] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// The nearest level of the curve.
NSDS_INLINE Lanes on_curve(Lanes x) {
    Lanes level = all(CURVE[0]);
    for (int i = 1; i < N_CURVE; ++i)
        level += select(x > all((CURVE[i] + CURVE[i - 1]) / 2), all(CURVE[i] - CURVE[i - 1]), all(0));
    return level;
}

// The code of each level of the curve.
NSDS_INLINE Lanes curve_codes(Lanes level) {
    Lanes code = all(0);
    for (int i = 1; i < N_CURVE; ++i) code += select(level >= all(CURVE[i]), all(1), all(0));
    return code;
}

// The nearest level. NaN becomes the lowest.
template <class T>
NSDS_INLINE Lanes to_levels(Lanes x) {
    if constexpr (T::IS_CURVE) return on_curve(x);
    return nearest(lower(higher(x, all(float(T::LOW))), all(float(T::HIGH))));
}

template <class T>
NSDS_INLINE Lanes to_codes(Lanes level) {
    if constexpr (T::IS_CURVE) return curve_codes(level);
    return level - all(float(T::LOW));
}

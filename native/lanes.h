// Lanes: one value of several rows, side by side in a vector register. Every operation is lane by lane, so a row's result
// depends neither on its lane nor on the other rows. Sums of products use fused multiply-add where `fma` says so and
// nowhere else (build with -ffp-contract=off).
//
// Included once per instruction set, in a namespace of its own; see rounding_*.cpp.

#if defined(NSDS_AVX512)
constexpr int LANES = 16;
#elif defined(NSDS_AVX2)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

#if defined(__GNUC__)
#define NSDS_INLINE inline __attribute__((always_inline))
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Mask __attribute__((vector_size(4 * LANES)));

NSDS_INLINE Lanes select(Mask mask, Lanes a, Lanes b) { return mask ? a : b; }
NSDS_INLINE Lanes all(float x) { return x - Lanes{}; }  // compilers drop the 0
NSDS_INLINE Mask bits_of(Lanes x) { return (Mask)x; }
NSDS_INLINE Lanes lanes_of(Mask bits) { return (Lanes)bits; }
#else  // the same by loops, which the compiler may vectorize
#define NSDS_INLINE inline
template <class T>
struct Array {
    T value[LANES];
    T& operator[](int i) { return value[i]; }
    const T& operator[](int i) const { return value[i]; }
};
typedef Array<float> Lanes;
typedef Array<int32_t> Mask;

#define NSDS_BINARY(type, result, op, expression)                \
    inline result operator op(const type& a, const type& b) {    \
        result out;                                              \
        for (int i = 0; i < LANES; ++i) out[i] = (expression);   \
        return out;                                              \
    }
NSDS_BINARY(Lanes, Lanes, +, a[i] + b[i])
NSDS_BINARY(Lanes, Lanes, -, a[i] - b[i])
NSDS_BINARY(Lanes, Lanes, *, a[i] * b[i])
NSDS_BINARY(Lanes, Lanes, /, a[i] / b[i])
NSDS_BINARY(Lanes, Mask, <, a[i] < b[i] ? -1 : 0)
NSDS_BINARY(Lanes, Mask, >, a[i] > b[i] ? -1 : 0)
NSDS_BINARY(Lanes, Mask, <=, a[i] <= b[i] ? -1 : 0)
NSDS_BINARY(Lanes, Mask, >=, a[i] >= b[i] ? -1 : 0)
NSDS_BINARY(Lanes, Mask, !=, a[i] != b[i] ? -1 : 0)
NSDS_BINARY(Mask, Mask, &, a[i] & b[i])
NSDS_BINARY(Mask, Mask, |, a[i] | b[i])
NSDS_BINARY(Mask, Mask, +, a[i] + b[i])
NSDS_BINARY(Mask, Mask, >>, a[i] >> b[i])
NSDS_BINARY(Mask, Mask, >, a[i] > b[i] ? -1 : 0)
#undef NSDS_BINARY
inline Lanes operator-(const Lanes& a) {
    Lanes out;
    for (int i = 0; i < LANES; ++i) out[i] = -a[i];
    return out;
}
inline Lanes& operator+=(Lanes& a, const Lanes& b) { return a = a + b; }
inline Lanes& operator-=(Lanes& a, const Lanes& b) { return a = a - b; }

inline Lanes select(const Mask& mask, const Lanes& a, const Lanes& b) {
    Lanes out;
    for (int i = 0; i < LANES; ++i) out[i] = mask[i] ? a[i] : b[i];
    return out;
}
inline Lanes all(float x) {
    Lanes out;
    for (int i = 0; i < LANES; ++i) out[i] = x;
    return out;
}
inline Mask bits_of(const Lanes& x) {
    Mask out;
    std::memcpy(&out, &x, sizeof out);
    return out;
}
inline Lanes lanes_of(const Mask& bits) {
    Lanes out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}
#endif

NSDS_INLINE Mask all_bits(int32_t x) {
    Mask out;
    for (int i = 0; i < LANES; ++i) out[i] = x;
    return out;
}

// lower and higher return b where one is NaN
#if defined(NSDS_AVX512)
NSDS_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return (Lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
NSDS_INLINE Lanes lower(Lanes a, Lanes b) { return (Lanes)_mm512_min_ps((__m512)a, (__m512)b); }
NSDS_INLINE Lanes higher(Lanes a, Lanes b) { return (Lanes)_mm512_max_ps((__m512)a, (__m512)b); }
NSDS_INLINE Lanes root(Lanes a) { return (Lanes)_mm512_sqrt_ps((__m512)a); }
#elif defined(NSDS_AVX2)
NSDS_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return (Lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
NSDS_INLINE Lanes lower(Lanes a, Lanes b) { return (Lanes)_mm256_min_ps((__m256)a, (__m256)b); }
NSDS_INLINE Lanes higher(Lanes a, Lanes b) { return (Lanes)_mm256_max_ps((__m256)a, (__m256)b); }
NSDS_INLINE Lanes root(Lanes a) { return (Lanes)_mm256_sqrt_ps((__m256)a); }
#else
NSDS_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) {
#if defined(__ARM_NEON) && defined(__aarch64__)
    return (Lanes)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}
NSDS_INLINE Lanes lower(Lanes a, Lanes b) { return select(a < b, a, b); }
NSDS_INLINE Lanes higher(Lanes a, Lanes b) { return select(a > b, a, b); }
NSDS_INLINE Lanes root(Lanes a) {
    for (int i = 0; i < LANES; ++i) a[i] = std::sqrt(a[i]);
    return a;
}
#endif

NSDS_INLINE Lanes load(const float* from) {
    Lanes out;
    std::memcpy(&out, from, sizeof out);
    return out;
}
NSDS_INLINE void store(float* to, Lanes x) { std::memcpy(to, &x, sizeof x); }

NSDS_INLINE Lanes magnitude(Lanes x) { return lanes_of(bits_of(x) & all_bits(0x7fffffff)); }

// The nearest integer, halves to even, of |x| < 2^22.
NSDS_INLINE Lanes nearest(Lanes x) {
    const Lanes shift = all(12582912.0f);  // 1.5 * 2^23: the last bit of a sum with it is 1
    return (x + shift) - shift;
}

// 1 / x, and 0 where x is 0.
NSDS_INLINE Lanes inverse(Lanes x) { return select(x != all(0), all(1) / x, all(0)); }

NSDS_INLINE bool any(Mask mask) {
    int32_t found = 0;
    for (int i = 0; i < LANES; ++i) found |= mask[i];
    return found != 0;
}

// The nearest value of float16, halves to even; infinite from 65520 on, as IEEE 754 rounds.
NSDS_INLINE Lanes to_float16(Lanes x) {
    const Mask bits = bits_of(x);
    const Lanes size = magnitude(x);
    const Mask odd = (bits >> all_bits(13)) & all_bits(1);
    const Lanes normal = lanes_of((bits + all_bits(0xfff) + odd) & all_bits(~0x1fff));
    const Lanes small = lanes_of(bits_of((size + all(0.5f)) - all(0.5f)) | (bits & all_bits(INT32_MIN)));
    const Lanes infinite = lanes_of((bits & all_bits(INT32_MIN)) | all_bits(0x7f800000));
    Lanes rounded = select(size < all(6.103515625e-05f), small, normal);
    rounded = select(size >= all(65520.0f), infinite, rounded);
    return select(x != x, x, rounded);
}

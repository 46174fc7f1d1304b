// The search for the scales of a block, with column weights: the result of ggml's reference quantizers (ggml-quants.c),
// lane by lane. Sums have their order, so scales are equal to the last bit where they were built without contraction.
//
// x and w are columns of values and weights, STRIDE floats apart.

constexpr int STRIDE = 64;        // rows of a tile, floats between columns
constexpr float NOTHING = 1e-15f;  // values below it count as 0

// make_qkx3_quants: scale and offset >= 0 (subtracted) of one sub-block, levels 0 to `top`.
struct Affine {
    Lanes scale, offset;
};

template <int N>
NSDS_INLINE Affine search_affine(const float* x, const Lanes* w, float top) {
    Lanes low = load(x), high = low, sum_w = w[0], sum_x = sum_w * low;
    for (int i = 1; i < N; ++i) {
        const Lanes xi = load(x + i * STRIDE);
        low = lower(xi, low);
        high = higher(xi, high);
        sum_w += w[i];
        sum_x += w[i] * xi;
    }
    low = lower(low, all(0));
    const Mask flat = high <= low;
    const Lanes negative = -low;
    Lanes over = all(top) / (high - low), scale = all(1) / over, best = all(0);
    for (int i = 0; i < N; ++i) {
        const Lanes xi = load(x + i * STRIDE), l = lower(higher(nearest(over * (xi - low)), all(0)), all(top));
        const Lanes wrong = (scale * l + low) - xi;
        best += w[i] * (wrong * wrong);
    }
    for (int step = 0; step <= 36; ++step) {
        over = all(-0.9f + 0.05f * float(step) + top) / (high - low);  // low moves to the best so far
        Lanes l[N], sum_l = all(0), sum_ll = all(0), sum_xl = all(0);
        for (int i = 0; i < N; ++i) {
            const Lanes xi = load(x + i * STRIDE);
            l[i] = lower(higher(nearest(over * (xi - low)), all(0)), all(top));
            const Lanes wl = w[i] * l[i];
            sum_l += wl;
            sum_ll += wl * l[i];
            sum_xl += wl * xi;
        }
        const Lanes determinant = sum_w * sum_ll - sum_l * sum_l;
        Lanes a = (sum_w * sum_xl - sum_x * sum_l) / determinant, b = (sum_ll * sum_x - sum_l * sum_xl) / determinant;
        const Mask positive = b > all(0);
        a = select(positive, sum_xl / sum_ll, a);
        b = select(positive, all(0), b);
        Lanes error = all(0);
        for (int i = 0; i < N; ++i) {
            const Lanes wrong = (a * l[i] + b) - load(x + i * STRIDE);
            error += w[i] * (wrong * wrong);
        }
        const Mask better = (determinant > all(0)) & (error < best);
        best = select(better, error, best);
        scale = select(better, a, scale);
        low = select(better, b, low);
    }
    return {select(flat, all(0), scale), select(flat, negative, -low)};
}

// make_qp_quants: integers 0 to `top` for n values >= 0, in place of them; returns their scale.
NSDS_INLINE Lanes search_positive(float* x, const Lanes* w, int n, float top) {
    Lanes high = all(0);
    for (int i = 0; i < n; ++i) high = higher(high, load(x + i * STRIDE));
    Lanes over = all(top) / high, best = all(0);
    Lanes scale = all(1) / over;
    for (int i = 0; i < n; ++i) {
        const Lanes xi = load(x + i * STRIDE), wrong = xi - scale * nearest(over * xi);
        best += w[i] * wrong * wrong;
    }
    for (int step = -4; step <= 4; ++step) {
        if (step == 0) continue;
        const Lanes other = all(0.1f * float(step) + top) / high;
        scale = all(1) / other;
        Lanes error = all(0);
        for (int i = 0; i < n; ++i) {
            const Lanes xi = load(x + i * STRIDE), wrong = xi - scale * lower(nearest(other * xi), all(top));
            error += w[i] * wrong * wrong;
        }
        over = select(error < best, other, over);
        best = select(error < best, error, best);
    }
    Lanes l[16], sum_lx = all(0), sum_ll = all(0);
    for (int i = 0; i < n; ++i) {
        const Lanes xi = load(x + i * STRIDE);
        l[i] = lower(nearest(over * xi), all(top));
        sum_lx += w[i] * xi * l[i];
        sum_ll += w[i] * l[i] * l[i];
    }
    Mask changed = all_bits(-1);
    for (int pass = 0; pass < 5 && any(changed); ++pass) {
        changed = all_bits(0);
        for (int i = 0; i < n; ++i) {
            const Lanes wx = w[i] * load(x + i * STRIDE);
            Lanes lx = sum_lx - wx * l[i], ll = sum_ll - w[i] * l[i] * l[i];
            const Lanes other = lower(nearest(load(x + i * STRIDE) * ll / lx), all(top));
            const Mask open = (lx > all(0)) & (ll > all(0)) & (other != l[i]);
            lx += wx * other;
            ll += w[i] * other * other;
            const Mask better = open & (lx * lx * sum_ll > sum_lx * sum_lx * ll);
            l[i] = select(better, other, l[i]);
            sum_lx = select(better, lx, sum_lx);
            sum_ll = select(better, ll, sum_ll);
            changed = changed | better;
        }
    }
    const Mask nothing = high < all(NOTHING);
    for (int i = 0; i < n; ++i) store(x + i * STRIDE, select(nothing, all(0), higher(l[i], all(0))));
    return select(nothing, all(0), select(sum_ll > all(0), sum_lx / sum_ll, all(0)));
}

// The value of largest magnitude, the first of equals.
NSDS_INLINE Lanes largest_of(const float* x, int n) {
    Lanes largest = all(0), size = all(0);
    for (int i = 0; i < n; ++i) {
        const Lanes xi = load(x + i * STRIDE);
        largest = select(magnitude(xi) > size, xi, largest);
        size = higher(magnitude(xi), size);
    }
    return largest;
}

// make_qx_quants with rmse_type 1: the scale of n values, levels -top to top - 1; `levels` receives those that n values
// get, or is null.
NSDS_INLINE Lanes search_symmetric(const float* x, const Lanes* w, int n, float top, float* levels) {
    const Lanes largest = largest_of(x, n), low = all(-top), high = all(top - 1);
    Lanes wx[32], scale = all(0), best = all(0), taken = all(0);
    for (int i = 0; i < n; ++i) wx[i] = w[i] * load(x + i * STRIDE);
    for (int step = -10; step <= 9; ++step) {
        if (step == 0) continue;
        const bool first = step == -10;  // the scale that reaches the largest value
        const Lanes over = (first ? all(-top) : -all(top + 0.1f * float(step))) / largest;
        Lanes sum_lx = all(0), sum_ll = all(0);
        for (int i = 0; i < n; ++i) {
            const Lanes l = lower(higher(nearest(over * load(x + i * STRIDE)), low), high);
            sum_lx += wx[i] * l;
            sum_ll += w[i] * l * l;
        }
        const Lanes found = sum_lx / sum_ll;
        const Mask better = first ? sum_ll != all(0) : (sum_ll > all(0)) & (sum_lx * sum_lx > best * sum_ll);
        scale = select(better, found, scale);
        best = select(better, found * sum_lx, best);
        taken = first ? over : select(better, over, taken);
    }
    const Mask nothing = magnitude(largest) < all(NOTHING);
    if (levels != nullptr)
        for (int i = 0; i < n; ++i) {
            const Lanes l = lower(higher(nearest(taken * load(x + i * STRIDE)), low), high);
            store(levels + i * STRIDE, select(nothing, low, l));
        }
    return select(nothing, all(0), scale);
}

// quantize_row_iq4_nl_impl: the scale of the 32 values of a block of IQ4_NL.
NSDS_INLINE Lanes search_curve(const float* x, const Lanes* w) {
    const Lanes largest = largest_of(x, 32);
    Lanes scale = all(0), best = all(0);
    for (int step = -8; step <= 7; ++step) {
        const bool first = step == -8;
        const Lanes over = first ? all(1) / (-largest / all(CURVE[0])) : all(float(step) + CURVE[0]) / largest;
        Lanes sum_lx = all(0), sum_ll = all(0);
        for (int i = 0; i < 32; ++i) {
            const Lanes xi = load(x + i * STRIDE), l = on_curve(over * xi), wl = w[i] * l;
            sum_lx += wl * xi;
            sum_ll += wl * l;
        }
        const Lanes found = sum_lx / sum_ll;
        const Mask better = (sum_ll > all(0)) & (first ? all_bits(-1) : sum_lx * sum_lx > best * sum_ll);
        scale = select(better, found, scale);
        best = select(better, found * sum_lx, best);
    }
    return select(magnitude(largest) < all(NOTHING), all(0), scale);
}

// The scale of a block of Q2_0, levels -1 to 2, of either sign. ggml's quantizer takes the largest magnitude, which
// leaves most weights 0; this one tries the scales that give it 0.6 to 2.6 times a level, and fits each to its levels.
NSDS_INLINE Lanes search_few(const float* x, const Lanes* w, int n) {
    const Lanes largest = largest_of(x, n), low = all(-1), high = all(2);
    Lanes scale = all(0), best = all(0);
    for (int step = -26; step <= 26; ++step) {
        if (step > -6 && step < 6) continue;
        const Lanes over = all(0.1f * float(step)) / largest;
        Lanes sum_lx = all(0), sum_ll = all(0);
        for (int i = 0; i < n; ++i) {
            const Lanes xi = load(x + i * STRIDE), l = lower(higher(nearest(over * xi), low), high), wl = w[i] * l;
            sum_lx += wl * xi;
            sum_ll += wl * l;
        }
        const Lanes found = sum_lx / sum_ll;
        const Mask better = (sum_ll > all(0)) & (sum_lx * sum_lx > best * sum_ll);
        scale = select(better, found, scale);
        best = select(better, found * sum_lx, best);
    }
    return select(magnitude(largest) < all(NOTHING), all(0), scale);
}

// Weights of a sub-block: those of columns, times a magnitude that ggml takes for the values' own.
template <int N>
NSDS_INLINE void weigh(const float* x, const float* columns, Lanes mean_square, Lanes* w) {
    for (int i = 0; i < N; ++i) {
        const Lanes xi = load(x + i * STRIDE);
        w[i] = all(columns[i]) * root(mean_square + xi * xi);
    }
}

NSDS_INLINE Lanes sum_of(const Lanes* w, int n) {
    Lanes sum = all(0);
    for (int i = 0; i < n; ++i) sum += w[i];
    return sum;
}

// The scales of one block in ggml's reference quantizer: x its targets, `columns` their weights; s, m, d and dmin receive
// them, s and m STRIDE floats apart.
template <class T>
NSDS_INLINE void search(const float* x, const float* columns, float* s, float* m, float* d, float* dmin) {
    Lanes squares = all(0), w[T::SUB], sums[T::N_SUB];
    for (int i = 0; i < T::BLOCK; ++i) squares += load(x + i * STRIDE) * load(x + i * STRIDE);
    store(dmin, all(0));
    if constexpr (!T::HAS_S) {
        const Lanes mean = squares / all(float(T::BLOCK));
        store(s, all(1));
        store(m, all(float(T::M_MAX)));
        if constexpr (T::SEARCH == Search::largest) {
            store(d, to_float16(magnitude(largest_of(x, 32)) / all(127)));
        } else if constexpr (T::SEARCH == Search::curve) {
            weigh<32>(x, columns, squares * all(2.0f / 32), w);
            store(d, to_float16(search_curve(x, w)));
        } else if constexpr (T::SEARCH == Search::few) {
            for (int i = 0; i < T::BLOCK; ++i) w[i] = all(columns[i]);
            store(d, to_float16(search_few(x, w, T::BLOCK)));
        } else if constexpr (T::SEARCH == Search::symmetric) {
            weigh<32>(x, columns, mean, w);
            store(d, to_float16(search_symmetric(x, w, 32, float(-T::LOW), nullptr)));
        } else {
            weigh<32>(x, columns, mean, w);
            const Affine found = search_affine<32>(x, w, float(T::HIGH));
            store(d, to_float16(found.scale));
            store(dmin, to_float16(found.offset));
        }
        return;
    }
    const bool is_q2 = T::HIGH == 3 && T::HAS_M, is_q6 = T::HIGH == 31 && !T::HAS_M;
    const Lanes mean = (is_q2 ? squares : all(2) * squares) / all(256);
    for (int sub = 0; sub < T::N_SUB; ++sub) {
        const float* values = x + sub * T::SUB * STRIDE;
        if (is_q6)
            for (int i = 0; i < T::SUB; ++i) w[i] = all(columns[sub * T::SUB + i]);
        else
            weigh<T::SUB>(values, columns + sub * T::SUB, mean, w);
        sums[sub] = sum_of(w, T::SUB);
        if constexpr (T::HAS_M) {
            const Affine found = search_affine<T::SUB>(values, w, float(T::HIGH));
            store(s + sub * STRIDE, found.scale);
            store(m + sub * STRIDE, found.offset);
        } else {
            store(s + sub * STRIDE, search_symmetric(values, w, T::SUB, float(-T::LOW), nullptr));
            store(m + sub * STRIDE, all(0));
        }
    }
    if constexpr (T::HAS_M) {
        store(d, to_float16(search_positive(s, sums, T::N_SUB, float(T::S_HIGH))));
        store(dmin, to_float16(search_positive(m, sums, T::N_SUB, float(T::M_MAX))));
    } else if (is_q6) {
        const Lanes largest = largest_of(s, T::N_SUB), over = all(-128) / largest;
        const Mask nothing = magnitude(largest) < all(NOTHING);
        store(d, select(nothing, all(0), to_float16(all(1) / over)));
        for (int sub = 0; sub < T::N_SUB; ++sub) {
            const Lanes integer = lower(nearest(over * load(s + sub * STRIDE)), all(127));
            store(s + sub * STRIDE, select(nothing, all(0), higher(integer, all(-128))));
        }
    } else {
        store(d, to_float16(search_symmetric(s, sums, T::N_SUB, 32, s)));
    }
}

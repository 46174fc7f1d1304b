// GPTQ rounding of rows into block formats. See nsds_gguf/quantize/gptq.py for the method.
//
// Rows lie in tiles of STRIDE rows, columns first: a tile's values of one column are contiguous, a row is a lane. Columns
// go by panels of PANEL; a panel's part of U is packed once for all tiles of a call.
//
// With the residuals r_j = t_j - q_j, which are U^T e plus what earlier blocks pull, e^T H e is sum_j v_j r_j^2. The
// descent works on r: a change c of the errors changes r by U^T c, and half the gradient of the sum is U (v r).

constexpr int PANEL = 256, CHUNK = 128, GROUP = 4;  // columns; columns of one packed chunk; columns of one product
constexpr int PAD = 16;  // floats between packed groups: at multiples of 1 KiB they would share few sets of the cache
constexpr int CHUNK_GROUP = CHUNK * GROUP + PAD, PANEL_GROUP = PANEL * GROUP + PAD;
#if defined(NSDS_AVX512) || defined(__aarch64__)
constexpr int WIDE = 4;  // vectors of rows in one product: GROUP * WIDE sums stay in registers
#else
constexpr int WIDE = 2;
#endif

typedef std::vector<float> Floats;

// c[j] += sign * sum_k a[k][j] x[k], for GROUP columns j and N vectors of rows; a is packed, GROUP floats per k.
template <int N>
NSDS_INLINE void multiply_vectors(const float* a, const float* x, int n, float* c, bool minus) {
    Lanes sum[GROUP][N];
    for (int j = 0; j < GROUP; ++j)
        for (int v = 0; v < N; ++v) sum[j][v] = all(0);
    for (int k = 0; k < n; ++k) {
        Lanes row[N];
        for (int v = 0; v < N; ++v) row[v] = load(x + k * STRIDE + v * LANES);
        for (int j = 0; j < GROUP; ++j) {
            const Lanes factor = all(a[k * GROUP + j]);
            for (int v = 0; v < N; ++v) sum[j][v] = fma(factor, row[v], sum[j][v]);
        }
    }
    for (int j = 0; j < GROUP; ++j)
        for (int v = 0; v < N; ++v) {
            float* to = c + j * STRIDE + v * LANES;
            store(to, minus ? load(to) - sum[j][v] : load(to) + sum[j][v]);
        }
}

void multiply(const float* a, const float* x, int n, float* c, int n_vectors, bool minus = false) {
    int v = 0;
    for (; v + WIDE <= n_vectors; v += WIDE) multiply_vectors<WIDE>(a, x + v * LANES, n, c + v * LANES, minus);
    for (; v < n_vectors; ++v) multiply_vectors<1>(a, x + v * LANES, n, c + v * LANES, minus);
}

// The part of U in the columns of one panel, and what follows from it. `at` is column j of output group i / GROUP.
struct Triangle {
    int n_cols = 0;
    Floats down, up;        // U_ji for output i, v_i U_ji for output j: packed in groups of outputs, PANEL factors each
    Floats sums;            // of U's rows by sub-block, for output i
    Floats within, rows;    // U v U^T inside each sub-block, and sums of its rows
    Floats over_diagonal;   // 1 / diagonal of U v U^T
    Floats variances;

    Triangle()
        : down(PANEL / GROUP * PANEL_GROUP), up(PANEL / GROUP * PANEL_GROUP), sums(PANEL * 16), within(PANEL * STRIDE), rows(PANEL),
          over_diagonal(PANEL), variances(PANEL) {}

    const float* down_at(int i, int j) const { return down.data() + i / GROUP * PANEL_GROUP + j * GROUP; }
    const float* up_at(int j, int i) const { return up.data() + j / GROUP * PANEL_GROUP + i * GROUP; }
    const float* sums_at(int i) const { return sums.data() + i / GROUP * 16 * GROUP; }

    template <class T>
    void pack(const float* upper, const float* v, int64_t n, int start, int width) {
        n_cols = width;
        variances.assign(v + start, v + start + width);
        std::fill(sums.begin(), sums.end(), 0.0f);
        Floats four(GROUP * PANEL);
        for (int j = 0; j < width; j += GROUP) {
            // products reach no further to the left than the sub-block of row j
            const int first = j / T::SUB * T::SUB, end = j / T::BLOCK * T::BLOCK + T::BLOCK;
            for (int k = 0; k < GROUP; ++k) {
                float* row = four.data() + k * PANEL;
                std::fill(row + first, row + j + k, 0.0f);
                std::copy(upper + (start + j + k) * n + start + j + k, upper + (start + j + k) * n + start + width, row + j + k);
            }
            pack_rows(four.data(), j, first);
            if (T::HAS_M) add_to_sums(four.data(), j % T::BLOCK / T::SUB, first, end);
        }
        Floats columns(PANEL * STRIDE);
        for (int first = 0; first < width; first += T::SUB) multiply_within<T>(first, columns.data());
    }

  private:
    // Rows j to j + GROUP of U, PANEL floats each, from column `first` on.
    void pack_rows(const float* rows, int j, int first) {
        for (int k = 0; k < GROUP; ++k)
            for (int i = first; i < n_cols; i += GROUP)
                std::memcpy(&down[i / GROUP * PANEL_GROUP + (j + k) * GROUP], rows + k * PANEL + i, sizeof(float) * GROUP);
        float* to = &up[j / GROUP * PANEL_GROUP];
        for (int i = first; i < n_cols; ++i)
            for (int k = 0; k < GROUP; ++k) to[i * GROUP + k] = rows[k * PANEL + i] * variances[i];
    }

    void add_to_sums(const float* rows, int sub, int first, int end) {
        for (int i = first; i < end; ++i) {
            float& sum = sums[(i / GROUP * 16 + sub) * GROUP + i % GROUP];
            for (int k = 0; k < GROUP; ++k) sum += rows[k * PANEL + i];
        }
    }

    // The form U v U^T inside a sub-block; sums over columns end with the block.
    template <class T>
    void multiply_within(int first, float* columns) {
        const int end = first / T::BLOCK * T::BLOCK + T::BLOCK;
        for (int i = first; i < end; ++i)
            for (int k = 0; k < T::SUB; ++k) columns[i * STRIDE + k] = down_at(i, first + k)[i % GROUP];
        float* form = within.data() + first * STRIDE;
        std::fill(form, form + T::SUB * STRIDE, 0.0f);
        for (int j = 0; j < T::SUB; j += GROUP)
            multiply(up_at(first + j, first), columns + first * STRIDE, end - first, form + j * STRIDE, T::SUB / LANES);
        for (int j = 0; j < T::SUB; ++j) {
            float sum = 0;
            for (int k = 0; k < T::SUB; ++k) sum += form[j * STRIDE + k];
            rows[first + j] = sum;
            over_diagonal[first + j] = 1 / form[j * STRIDE + j];
        }
    }
};

// One panel of one tile while it is rounded. Arrays are (columns, STRIDE).
template <class T>
class Tile {
  public:
    Tile()
        : weights_(PANEL * STRIDE), targets_(PANEL * STRIDE), residuals_(PANEL * STRIDE), levels_(PANEL * STRIDE),
          a_(PANEL * STRIDE), ra_(PANEL * STRIDE), rb_(PANEL * STRIDE), changes_(STRIDE * STRIDE), gradient_(STRIDE * STRIDE),
          s_(16 * STRIDE), m_(16 * STRIDE), d_(STRIDE), dmin_(STRIDE), codes_(PANEL * STRIDE) {}

    // Round columns `start` and following of `n_rows` rows. `pull` is U^T e of the columns before the panel; `errors`, from
    // the panel's first column on, receives e.
    void round(const Triangle& u, const float* rows, int64_t n, int n_rows, int start, float* pull, float* errors,
               int n_descents, const Output& out) {
        u_ = &u;
        n_vectors_ = (n_rows + LANES - 1) / LANES;
        pull_ = pull;
        errors_ = errors;
        transpose(rows, n, n_rows, u.n_cols, weights_.data());
        for (int block = 0; block < u.n_cols; block += T::BLOCK) {
            block_ = block;
            round_block(start == 0 && block == 0);
            for (int i = 0; i < n_descents; ++i) descend();
            finish(out, n, n_rows, start);
        }
        give(out.codes + start, n, n_rows);
    }

  private:
    static constexpr int BLOCK = T::BLOCK, SUB = T::SUB;
    const Triangle* u_ = nullptr;
    int n_vectors_ = 0, block_ = 0;
    float *pull_ = nullptr, *errors_ = nullptr;
    Floats weights_, targets_, residuals_, levels_, a_, ra_, rb_, changes_, gradient_, s_, m_, d_, dmin_;
    std::vector<uint8_t> codes_;

    static float* at(Floats& array, int column, int vector = 0) { return array.data() + column * STRIDE + vector * LANES; }

    void give(uint8_t* codes, int64_t n, int n_rows) {
        for (int r = 0; r < n_rows; ++r)
            for (int j = 0; j < u_->n_cols; ++j) codes[r * n + j] = codes_[j * STRIDE + r];
    }

    void round_block(bool is_first) {
        const int end = block_ + BLOCK;
        for (int i = block_; i < end && block_ > 0; i += GROUP)
            multiply(u_->down_at(i, 0), errors_, block_, pull_ + i * STRIDE, n_vectors_);
        find_targets(is_first);
        for (int v = 0; v < n_vectors_; ++v) {
            const float* x = at(targets_, block_, v);
            search<T>(x, u_->variances.data() + block_, at(s_, 0, v), at(m_, 0, v), at(d_, 0, v), at(dmin_, 0, v));
        }
        for (int first = block_; first < end; first += SUB) {
            for (int i = first; i < first + SUB && first > block_; i += GROUP)
                multiply(u_->down_at(i, block_), errors_ + block_ * STRIDE, first - block_, pull_ + i * STRIDE, n_vectors_);
            for (int v = 0; v < n_vectors_; ++v) round_sub_block(first, v);
        }
    }

    // Solve for the targets of the search: weights + U_bb^-T pull.
    void find_targets(bool is_first) {
        const int end = block_ + BLOCK;
        for (int i = block_; i < end; ++i) std::memcpy(at(targets_, i), pull_ + i * STRIDE, sizeof(float) * STRIDE);
        for (int first = block_; first < end && !is_first; first += SUB) {
            for (int i = first; i < first + SUB && first > block_; i += GROUP)
                multiply(u_->down_at(i, block_), at(targets_, block_), first - block_, at(targets_, i), n_vectors_, true);
            for (int v = 0; v < n_vectors_; ++v)
                for (int j = first + 1; j < first + SUB; ++j)
                    store(at(targets_, j, v), load(at(targets_, j, v)) - product_before(first, j, targets_.data(), v));
        }
        for (int i = block_; i < end; ++i)
            for (int v = 0; v < n_vectors_; ++v)
                store(at(targets_, i, v), load(at(targets_, i, v)) + load(at(weights_, i, v)));
    }

    // sum of U_kj x_k over columns k from `first` to j.
    NSDS_INLINE Lanes product_before(int first, int j, const float* x, int v) const {
        const float* factors = u_->down_at(j, 0) + j % GROUP;
        Lanes even = all(0), odd = all(0);
        int k = first;
        for (; k + 1 < j; k += 2) {
            even = fma(all(factors[k * GROUP]), load(x + k * STRIDE + v * LANES), even);
            odd = fma(all(factors[(k + 1) * GROUP]), load(x + (k + 1) * STRIDE + v * LANES), odd);
        }
        if (k < j) even = fma(all(factors[k * GROUP]), load(x + k * STRIDE + v * LANES), even);
        return even + odd;
    }

    NSDS_INLINE Lanes scale(int sub, int v) { return load(at(d_, 0, v)) * load(at(s_, sub, v)); }
    NSDS_INLINE Lanes offset(int sub, int v) { return load(at(dmin_, 0, v)) * load(at(m_, sub, v)); }

    void round_sub_block(int first, int v) {
        const int sub = (first - block_) / SUB;
        const Lanes size = scale(sub, v), shift = offset(sub, v), over = inverse(size);
        for (int j = first; j < first + SUB; ++j) {
            const Lanes weight = load(at(weights_, j, v));
            const Lanes target = weight + load(pull_ + j * STRIDE + v * LANES) + product_before(first, j, errors_, v);
            const Lanes level = to_levels<T>((target + shift) * over), value = level * size - shift;
            store(at(levels_, j, v), level);
            store(at(residuals_, j, v), target - value);
            store(errors_ + j * STRIDE + v * LANES, weight - value);
        }
    }

    void descend() {
        for (int i = block_; i < block_ + BLOCK; ++i)
            for (int v = 0; v < n_vectors_; ++v)
                store(at(a_, i, v), load(at(s_, (i - block_) / SUB, v)) * load(at(levels_, i, v)));
        multiply_by_triangle(a_, ra_);
        if (T::HAS_M) add_offsets();
        for (int v = 0; v < n_vectors_; ++v) move_block_scales(v);
        for (int first = block_; first < block_ + BLOCK; first += SUB) descend_sub_block(first);
    }

    // out = U_bb^T x
    void multiply_by_triangle(Floats& x, Floats& out) {
        for (int i = block_; i < block_ + BLOCK; i += GROUP) {
            std::memset(at(out, i), 0, sizeof(float) * GROUP * STRIDE);
            multiply(u_->down_at(i, block_), at(x, block_), i + GROUP - block_, at(out, i), n_vectors_);
        }
    }

    // rb = U_bb^T b, b = -m of each sub-block.
    void add_offsets() {
        for (int i = block_; i < block_ + BLOCK; i += GROUP) {
            std::memset(at(rb_, i), 0, sizeof(float) * GROUP * STRIDE);
            multiply(u_->sums_at(i), m_.data(), (i - block_) / SUB + 1, at(rb_, i), n_vectors_, true);
        }
    }

    // Fit d and dmin by least squares, all else fixed; keep float16 values that are better.
    NSDS_INLINE void move_block_scales(int v) {
        Lanes aa = all(0), ab = all(0), bb = all(0), ae = all(0), be = all(0);
        for (int i = block_; i < block_ + BLOCK; ++i) {
            const Lanes a = load(at(ra_, i, v)), r = load(at(residuals_, i, v)), va = all(u_->variances[i]) * a;
            aa = fma(va, a, aa);
            ae = fma(va, r, ae);
            if (T::HAS_M) {
                const Lanes b = load(at(rb_, i, v)), vb = all(u_->variances[i]) * b;
                ab = fma(va, b, ab);
                bb = fma(vb, b, bb);
                be = fma(vb, r, be);
            }
        }
        Lanes determinant = aa * bb - ab * ab;
        determinant = select(determinant > all(1e-6f) * aa * bb, determinant, all(0));
        const Lanes over = inverse(determinant), d = load(at(d_, 0, v)), dmin = load(at(dmin_, 0, v));
        Lanes x = select(over > all(0), (ae * bb - be * ab) * over, ae * inverse(aa));
        Lanes y = (be * aa - ae * ab) * over;
        x = to_float16(d + x) - d;
        y = to_float16(dmin + y) - dmin;
        const Lanes two = all(2), gain = x * (two * ae - x * aa) + y * (two * be - y * bb) - two * x * y * ab;
        x = select(gain > all(0), x, all(0));
        y = select(gain > all(0), y, all(0));
        store(at(d_, 0, v), d + x);
        store(at(dmin_, 0, v), dmin + y);
        for (int i = block_; i < block_ + BLOCK; ++i) {
            Lanes r = load(at(residuals_, i, v)) - x * load(at(ra_, i, v));
            if (T::HAS_M) r -= y * load(at(rb_, i, v));
            store(at(residuals_, i, v), r);
        }
    }

    // Move s and m of a sub-block, then its codes, one after the other.
    void descend_sub_block(int first) {
        const int end = block_ + BLOCK;
        std::memset(gradient_.data(), 0, sizeof(float) * SUB * STRIDE);
        for (int j = first; j < first + SUB; j += GROUP)
            multiply(u_->up_at(j, first), at(residuals_, first), end - first, at(gradient_, j - first), n_vectors_);
        for (int v = 0; v < n_vectors_; ++v) move_codes(first, v);
        for (int i = first; i < end; i += GROUP)
            multiply(u_->down_at(i, first), changes_.data(), SUB, at(residuals_, i), n_vectors_);
    }

    NSDS_INLINE void move_codes(int first, int v) {
        const int sub = (first - block_) / SUB;
        Lanes before[SUB];
        for (int j = 0; j < SUB; ++j) before[j] = load(at(levels_, first + j, v)) * scale(sub, v) - offset(sub, v);
        if (T::HAS_S) move_sub_scales(first, v);
        const Lanes size = scale(sub, v), shift = offset(sub, v), over = inverse(size);
        Lanes moves[SUB];
        for (int j = 0; j < SUB; ++j) {
            const float* form = u_->within.data() + (first + j) * STRIDE;
            Lanes gradient = load(at(gradient_, j, v)), odd = all(0);
            int k = 0;
            for (; k + 1 < j; k += 2) {
                gradient = fma(all(form[k]), moves[k], gradient);
                odd = fma(all(form[k + 1]), moves[k + 1], odd);
            }
            if (k < j) gradient = fma(all(form[k]), moves[k], gradient);
            const Lanes level = load(at(levels_, first + j, v)), value = level * size - shift;
            const Lanes target = value + (gradient + odd) * all(u_->over_diagonal[first + j]);
            const Lanes other = to_levels<T>((target + shift) * over), moved = other * size - shift;
            moves[j] = value - moved;
            store(at(levels_, first + j, v), other);
            store(at(changes_, j, v), before[j] - moved);
        }
    }

    // Move s and m of a sub-block to the best integers nearby, all else fixed.
    NSDS_INLINE void move_sub_scales(int first, int v) {
        const int sub = (first - block_) / SUB;
        const Lanes d = load(at(d_, 0, v)), b = load(at(dmin_, 0, v));
        const Lanes s = load(at(s_, sub, v)), m = load(at(m_, sub, v));
        // raising s by 1 subtracts a from the errors, raising m by 1 adds b
        Lanes a[SUB], fa[SUB], aa = all(0), ab = all(0), ae = all(0), be = all(0);
        float form_sum = 0;
        for (int j = 0; j < SUB; ++j) a[j] = d * load(at(levels_, first + j, v));
        for (int j = 0; j < SUB; ++j) {
            const float* form = u_->within.data() + (first + j) * STRIDE;
            Lanes even = all(0), odd = all(0);
            for (int k = 0; k < SUB; k += 2) {
                even = fma(all(form[k]), a[k], even);
                odd = fma(all(form[k + 1]), a[k + 1], odd);
            }
            fa[j] = even + odd;
            aa = fma(fa[j], a[j], aa);
            ab += fa[j];
            ae = fma(load(at(gradient_, j, v)), a[j], ae);
            be += load(at(gradient_, j, v));
            form_sum += u_->rows[first + j];
        }
        ab = b * ab;
        be = b * be;
        const Lanes bb = b * b * all(form_sum), over = inverse(bb), two = all(2);
        Lanes best = all(0), best_x = all(0), best_y = all(0);
        for (int step = -3; step <= 3; ++step) {
            const Lanes x = lower(higher(s + all(float(step)), all(float(T::S_LOW))), all(float(T::S_HIGH))) - s;
            Lanes y = all(0);
            if (T::HAS_M) y = lower(higher(nearest(m + (x * ab - be) * over), all(0)), all(float(T::M_MAX))) - m;
            const Lanes gain = x * (two * ae - x * aa) - y * (two * be + y * bb - two * x * ab);
            const Mask better = gain > best;
            best = select(better, gain, best);
            best_x = select(better, x, best_x);
            best_y = select(better, y, best_y);
        }
        store(at(s_, sub, v), s + best_x);
        store(at(m_, sub, v), m + best_y);
        for (int j = 0; j < SUB; ++j) {
            const Lanes change = best_y * b * all(u_->rows[first + j]) - best_x * fa[j];
            store(at(gradient_, j, v), load(at(gradient_, j, v)) + change);
        }
    }

    // Keep the errors of a block, its codes and its scales.
    void finish(const Output& out, int64_t n, int n_rows, int start) {
        for (int v = 0; v < n_vectors_; ++v) keep(v, n_rows, out.errors);
        const int64_t index = (start + block_) / BLOCK;
        keep_scales<T>({s_.data(), m_.data(), d_.data(), dmin_.data()}, n_rows, n / BLOCK, index, out);
    }

    NSDS_INLINE void keep(int v, int n_rows, double* errors) {
        Lanes sum = all(0);
        for (int i = block_; i < block_ + BLOCK; ++i) {
            const int sub = (i - block_) / SUB;
            const Lanes level = load(at(levels_, i, v)), r = load(at(residuals_, i, v));
            store(errors_ + i * STRIDE + v * LANES, load(at(weights_, i, v)) - (level * scale(sub, v) - offset(sub, v)));
            sum = fma(all(u_->variances[i]) * r, r, sum);
            const Lanes code = to_codes<T>(level);
            uint8_t* to = codes_.data() + i * STRIDE + v * LANES;
            for (int lane = 0; lane < LANES; ++lane) to[lane] = uint8_t(int32_t(code[lane]));
        }
        for (int lane = 0; lane < LANES && v * LANES + lane < n_rows; ++lane) errors[v * LANES + lane] += sum[lane];
    }
};

// pull of every tile += U^T e of the columns before the panel; chunks of U are packed once for all tiles.
inline void pull_panel(const float* upper, int64_t n, int start, int width, const float* errors, int n_rows, float* pull,
                       Floats& chunk) {
    for (int from = 0; from < start; from += CHUNK) {
        for (int k = 0; k < CHUNK; ++k) {
            const float* row = upper + (from + k) * n + start;
            for (int i = 0; i < width; i += GROUP)
                std::memcpy(&chunk[i / GROUP * CHUNK_GROUP + k * GROUP], row + i, sizeof(float) * GROUP);
        }
        for (int tile = 0; tile * STRIDE < n_rows; ++tile) {
            const int rows = std::min(n_rows - tile * STRIDE, STRIDE), n_vectors = (rows + LANES - 1) / LANES;
            const float* x = errors + (tile * n + from) * STRIDE;
            float* c = pull + tile * PANEL * STRIDE;
            for (int i = 0; i < width; i += GROUP)
                multiply(&chunk[i / GROUP * CHUNK_GROUP], x, CHUNK, c + i * STRIDE, n_vectors);
        }
    }
}

template <class T>
void round_rows(const float* rows, int n_rows, int64_t n, const float* upper, const float* variances, int n_descents,
                const Output& out) {
    const int n_tiles = (n_rows + STRIDE - 1) / STRIDE;
    Floats errors(n_tiles * n * STRIDE), pull(n_tiles * PANEL * STRIDE), chunk(PANEL / GROUP * CHUNK_GROUP);
    Triangle triangle;
    Tile<T> work;
    for (int start = 0; start < n; start += PANEL) {
        const int width = int(std::min<int64_t>(PANEL, n - start));
        triangle.pack<T>(upper, variances, n, start, width);
        std::fill(pull.begin(), pull.end(), 0.0f);
        pull_panel(upper, n, start, width, errors.data(), n_rows, pull.data(), chunk);
        for (int tile = 0; tile < n_tiles; ++tile) {
            const int64_t first = tile * STRIDE;
            const Output part = results_from<T>(out, first, n);
            work.round(triangle, rows + first * n + start, n, std::min<int>(n_rows - int(first), STRIDE), start,
                       pull.data() + tile * PANEL * STRIDE, errors.data() + (tile * n + start) * STRIDE, n_descents, part);
        }
    }
}

inline bool round_named(const char* type, const float* rows, int n_rows, int64_t n, const float* upper,
                        const float* variances, int n_descents, const Output& out) {
#define NSDS_ROUND(name)                                                               \
    if (std::strcmp(type, #name) == 0) {                                               \
        if (!name::matches(n_rows, n, out)) return false;                              \
        round_rows<name>(rows, n_rows, n, upper, variances, n_descents, out);          \
        return true;                                                                   \
    }
    NSDS_ROUND(Q2_K) NSDS_ROUND(Q3_K) NSDS_ROUND(Q4_K) NSDS_ROUND(Q5_K) NSDS_ROUND(Q6_K)
    NSDS_ROUND(Q4_0) NSDS_ROUND(IQ4_NL) NSDS_ROUND(Q5_0) NSDS_ROUND(Q5_1) NSDS_ROUND(Q8_0)
    NSDS_ROUND(Q2_0)
#undef NSDS_ROUND
    return false;
}

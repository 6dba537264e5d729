// The kernels themselves, written once over a vector class S. A tier's source file selects its instruction set
// (#pragma GCC target), defines S and includes this header last.
//
// Everything lies in an unnamed namespace, and no standard library template may be used in here: the linker
// would merge an instance that was compiled for AVX-512 into code that runs everywhere.
//
// S provides
//   width                      floats in a vector, 8 or 16
//   row_tile, batch_tile       rows x batch computed together, as far as the registers reach
//   vec, zero, load, store, fma, sum, sum4
//   Coder<BITS>                Part (what turns codes into weights: a table), Raw (a loaded segment),
//                              uniform(scale, zero), lut(table), load(codes, half), weight(part, raw, j)
//   half_to_float, float_to_half (scalars), widen_half, widen_bfloat, narrow_half, narrow_bfloat
#pragma once

#define REQUANT_INLINE inline __attribute__((always_inline))

namespace requant {
namespace {

// ---- conversions -------------------------------------------------------------------------------------------

REQUANT_INLINE float bits_to_float(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

REQUANT_INLINE uint32_t float_to_bits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}

REQUANT_INLINE float bfloat_to_float(uint16_t value) { return bits_to_float(uint32_t(value) << 16); }

REQUANT_INLINE uint16_t float_to_bfloat(float value) {
    const uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

template <class S>
REQUANT_INLINE void put(void* y, int64_t index, int dtype, float value) {
    if (dtype == F32)
        static_cast<float*>(y)[index] = value;
    else if (dtype == BF16)
        static_cast<uint16_t*>(y)[index] = float_to_bfloat(value);
    else
        static_cast<uint16_t*>(y)[index] = S::float_to_half(value);
}

template <class S>
void widen(int dtype, const void* in, float* out, int64_t count) {
    if (dtype == F32)
        __builtin_memcpy(out, in, size_t(count) * 4);
    else if (dtype == BF16)
        S::widen_bfloat(static_cast<const uint16_t*>(in), out, count);
    else
        S::widen_half(static_cast<const uint16_t*>(in), out, count);
}

template <class S>
void narrow(int dtype, const float* in, void* out, int64_t count) {
    if (dtype == F32)
        __builtin_memcpy(out, in, size_t(count) * 4);
    else if (dtype == BF16)
        S::narrow_bfloat(in, static_cast<uint16_t*>(out), count);
    else
        S::narrow_half(in, static_cast<uint16_t*>(out), count);
}

// ---- quantization parameters of a tile of rows -------------------------------------------------------------

// Scales and zero points of `rows` rows as floats: a broadcast from memory is then one operand of one
// instruction, where a broadcast of a half or a byte takes several.
template <class S>
REQUANT_INLINE void load_groups(const Weights& w, int64_t groups, int64_t row, int rows, float* scales,
                                float* zeros) {
    S::widen_half(w.scales + row * groups, scales, rows * groups);
    const uint8_t* in = w.zeros + row * groups;
    for (int64_t i = 0; i < rows * groups; ++i) zeros[i] = float(in[i]);
}

// ---- linear ------------------------------------------------------------------------------------------------

template <class S, int M, class Index>
REQUANT_INLINE void sparse_dot(const Weights& w, const Input& in, int64_t row, int64_t batch, float* sums) {
    const Index* columns = static_cast<const Index*>(w.indices);
    const float* x = in.x + batch * in.stride;
    float part[M] = {};
    for (int64_t e = w.indptr[row]; e < w.indptr[row + 1]; ++e) {
        const float value = S::half_to_float(w.values[e]);
        const float* column = x + columns[e];
        for (int m = 0; m < M; ++m) part[m] += value * column[m * in.stride];
    }
    for (int m = 0; m < M; ++m) sums[m] += part[m];
}

// R rows times M activations. The weights of a vector are decoded once and used M times; the activations of a
// vector are loaded once and used R times. PARTS is 0 for LUT (one table a row), else groups in a segment.
template <class S, int BITS, int PARTS, int R, int M>
void linear_tile(const Weights& w, const Plan& plan, const Input& in, int64_t row, int64_t batch,
                 const float* scales, const float* zeros, int dtype, void* y, int64_t y_stride) {
    using Coder = typename S::template Coder<BITS>;
    using vec = typename S::vec;
    constexpr int P = PARTS == 0 ? 1 : PARTS;
    constexpr int PER_PART = CODES / P;
    constexpr int64_t SEGMENT_BYTES = BLOCK * BITS / 8;

    vec acc[R][M];
    typename Coder::Part part[R];
    const uint8_t* codes[R];
    for (int r = 0; r < R; ++r) {
        codes[r] = w.codes + (row + r) * plan.row_bytes;
        if (PARTS == 0) part[r] = Coder::lut(w.scales + ((row + r) << BITS));
        for (int m = 0; m < M; ++m) acc[r][m] = S::zero();
    }
    const int64_t ahead = R * plan.row_bytes;  // the same place in the next tile of rows
    const int32_t* group = plan.group_of_part;

    const int64_t segments = plan.full + plan.tails;
    for (int64_t s = 0; s < segments; ++s) {
        const bool full = s < plan.full;
        const int64_t offset = full ? s * SEGMENT_BYTES : plan.tail[s - plan.full].offset;
        const int64_t stride = full ? in.stride : in.tail_stride;
        const float* x = full ? in.x + batch * in.stride + s * BLOCK
                              : in.tail + batch * in.tail_stride + (s - plan.full) * BLOCK;
#pragma GCC unroll 2
        for (int h = 0; h < LANES / S::width; ++h) {
            typename Coder::Raw raw[R];
            for (int r = 0; r < R; ++r) {
                __builtin_prefetch(codes[r] + offset + ahead + 64 * h);
                raw[r] = Coder::load(codes[r] + offset, h);
            }
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) {
                if (PARTS != 0)
                    for (int r = 0; r < R; ++r) {
                        const int64_t g = r * plan.groups + group[p];
                        part[r] = Coder::uniform(scales[g], zeros[g]);
                    }
#pragma GCC unroll 8
                for (int jj = 0; jj < PER_PART; ++jj) {
                    const int j = p * PER_PART + jj;
                    vec weight[R];
                    for (int r = 0; r < R; ++r) weight[r] = Coder::weight(part[r], raw[r], j);
                    for (int m = 0; m < M; ++m) {
                        const vec value = S::load(x + m * stride + j * LANES + h * S::width);
                        for (int r = 0; r < R; ++r) acc[r][m] = S::fma(weight[r], value, acc[r][m]);
                    }
                }
            }
        }
        group += P;
    }

    float sums[R][M];
    for (int m = 0; m < M; ++m) {
        if (R == 4) {
            float four[4];
            S::sum4(acc[0][m], acc[1 % R][m], acc[2 % R][m], acc[3 % R][m], four);
            for (int r = 0; r < R; ++r) sums[r][m] = four[r];
        } else {
            for (int r = 0; r < R; ++r) sums[r][m] = S::sum(acc[r][m]);
        }
    }
    for (int r = 0; r < R; ++r) {
        if (w.indptr) {
            if (w.wide_indices)
                sparse_dot<S, M, int32_t>(w, in, row + r, batch, sums[r]);
            else
                sparse_dot<S, M, uint16_t>(w, in, row + r, batch, sums[r]);
        }
        for (int m = 0; m < M; ++m) put<S>(y, (batch + m) * y_stride + row + r, dtype, sums[r][m]);
    }
}

template <class S, int BITS, int PARTS, int R>
void linear_row_tile(const Weights& w, const Plan& plan, const Input& in, int64_t row, int dtype, void* y,
                     int64_t y_stride, float* scratch) {
    float* zeros = scratch + R * plan.groups;
    if (PARTS != 0) load_groups<S>(w, plan.groups, row, R, scratch, zeros);
    int64_t m = 0;
    if constexpr (S::batch_tile >= 4)
        for (; m + 4 <= in.batch; m += 4)
            linear_tile<S, BITS, PARTS, R, 4>(w, plan, in, row, m, scratch, zeros, dtype, y, y_stride);
    for (; m + 2 <= in.batch; m += 2)
        linear_tile<S, BITS, PARTS, R, 2>(w, plan, in, row, m, scratch, zeros, dtype, y, y_stride);
    for (; m < in.batch; ++m)
        linear_tile<S, BITS, PARTS, R, 1>(w, plan, in, row, m, scratch, zeros, dtype, y, y_stride);
}

template <class S, int BITS, int PARTS>
void linear_rows(const Weights& w, const Plan& plan, const Input& in, int64_t begin, int64_t end, int dtype,
                 void* y, int64_t y_stride, float* scratch) {
    int64_t row = begin;
    for (; row + S::row_tile <= end; row += S::row_tile)
        linear_row_tile<S, BITS, PARTS, S::row_tile>(w, plan, in, row, dtype, y, y_stride, scratch);
    for (; row < end; ++row)
        linear_row_tile<S, BITS, PARTS, 1>(w, plan, in, row, dtype, y, y_stride, scratch);
}

// ---- dequantize --------------------------------------------------------------------------------------------

template <class S, int BITS, int PARTS>
void dequantize_row(const Weights& w, const Plan& plan, int64_t row, float* out, float* scratch) {
    using Coder = typename S::template Coder<BITS>;
    constexpr int P = PARTS == 0 ? 1 : PARTS;
    constexpr int PER_PART = CODES / P;
    float* zeros = scratch + plan.groups;
    typename Coder::Part part;
    if (PARTS == 0)
        part = Coder::lut(w.scales + (row << BITS));
    else
        load_groups<S>(w, plan.groups, row, 1, scratch, zeros);
    const uint8_t* codes = w.codes + row * plan.row_bytes;
    const int32_t* group = plan.group_of_part;
    float spread[BLOCK] = {};
    for (int64_t s = 0; s < plan.full + plan.tails; ++s, group += P) {
        const bool full = s < plan.full;
        const Tail* tail = full ? nullptr : &plan.tail[s - plan.full];
        const int64_t offset = full ? s * (BLOCK * BITS / 8) : tail->offset;
        float* to = full ? out + s * BLOCK : spread;
#pragma GCC unroll 2
        for (int h = 0; h < LANES / S::width; ++h) {
            const typename Coder::Raw raw = Coder::load(codes + offset, h);
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) {
                if (PARTS != 0) part = Coder::uniform(scratch[group[p]], zeros[group[p]]);
#pragma GCC unroll 8
                for (int jj = 0; jj < PER_PART; ++jj) {
                    const int j = p * PER_PART + jj;
                    S::store(to + j * LANES + h * S::width, Coder::weight(part, raw, j));
                }
            }
        }
        if (!full)
            for (int j = 0; j < CODES; ++j)
                for (int i = 0; i < tail->lanes; ++i) {
                    const int64_t column = tail->start + j * tail->lanes + i;
                    if (column < w.columns) out[column] = spread[j * LANES + i];
                }
    }
}

template <class S, class Index>
void add_sparse(const Weights& w, int64_t row, float* out) {
    const Index* columns = static_cast<const Index*>(w.indices);
    for (int64_t e = w.indptr[row]; e < w.indptr[row + 1]; ++e) out[columns[e]] += S::half_to_float(w.values[e]);
}

template <class S, int BITS, int PARTS>
void dequantize_rows(const Weights& w, const Plan& plan, const int64_t* ids, int64_t first, int64_t begin,
                     int64_t end, int dtype, void* out, float* scratch) {
    float* line = scratch + 2 * plan.groups;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t row = ids ? ids[i] : i;
        const int64_t at = (i - first) * w.columns;
        float* to = dtype == F32 ? static_cast<float*>(out) + at : line;
        dequantize_row<S, BITS, PARTS>(w, plan, row, to, scratch);
        if (w.indptr) {
            if (w.wide_indices)
                add_sparse<S, int32_t>(w, row, to);
            else
                add_sparse<S, uint16_t>(w, row, to);
        }
        if (dtype != F32) narrow<S>(dtype, to, static_cast<uint16_t*>(out) + at, w.columns);
    }
}

// ---- dispatch on kind, bits and group size -----------------------------------------------------------------

// Calls RUN<S, BITS, PARTS>(...) for the weight `w`; bits and kind were checked by the caller.
#define REQUANT_SELECT_PARTS(RUN, BITS, ...)                    \
    switch (plan.parts) {                                       \
        case 1: return RUN<S, BITS, 1>(__VA_ARGS__);            \
        case 2: return RUN<S, BITS, 2>(__VA_ARGS__);            \
        default: return RUN<S, BITS, 4>(__VA_ARGS__);           \
    }
#define REQUANT_SELECT(RUN, ...)                                \
    if (w.kind == LUT) switch (w.bits) {                        \
            case 2: return RUN<S, 2, 0>(__VA_ARGS__);           \
            case 3: return RUN<S, 3, 0>(__VA_ARGS__);           \
            default: return RUN<S, 4, 0>(__VA_ARGS__);          \
        }                                                       \
    switch (w.bits) {                                           \
        case 2: REQUANT_SELECT_PARTS(RUN, 2, __VA_ARGS__)       \
        case 3: REQUANT_SELECT_PARTS(RUN, 3, __VA_ARGS__)       \
        case 4: REQUANT_SELECT_PARTS(RUN, 4, __VA_ARGS__)       \
        default: REQUANT_SELECT_PARTS(RUN, 8, __VA_ARGS__)      \
    }

template <class S>
void linear(const Weights& w, const Plan& plan, const Input& in, int64_t begin, int64_t end, int dtype, void* y,
            int64_t y_stride, float* scratch) {
    REQUANT_SELECT(linear_rows, w, plan, in, begin, end, dtype, y, y_stride, scratch)
}

template <class S>
void dequantize(const Weights& w, const Plan& plan, const int64_t* ids, int64_t first, int64_t begin, int64_t end,
                int dtype, void* out, float* scratch) {
    REQUANT_SELECT(dequantize_rows, w, plan, ids, first, begin, end, dtype, out, scratch)
}

#undef REQUANT_SELECT
#undef REQUANT_SELECT_PARTS

template <class S>
constexpr Tier make_tier(const char* name) {
    return Tier{name, S::row_tile, &linear<S>, &dequantize<S>, &widen<S>};
}

}  // namespace
}  // namespace requant

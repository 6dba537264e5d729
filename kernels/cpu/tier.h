// The kernels themselves, written once over a vector class S. A tier's source file selects its instruction set
// (#pragma GCC target), defines S and includes this header last.
//
// Everything lies in an unnamed namespace, and no standard library template may be used in here: the linker
// would merge an instance that was compiled for AVX-512 into code that runs everywhere.
//
// S provides
//   rows                            rows of a vector: 1, 2 or 4
//   Bytes, Ints, Floats             16, 4 and 4 lanes a row; & and | work on Bytes, << and >> on Shorts
//   Shorts                          Bytes as 16-bit lanes
//   load, repeat, widen, lookup     codes; 16 bytes of activations for every row; 8 bytes a row to 16-bit lanes; entries
//   Dot<MAX>                        sums of the products of a block's weights up to MAX and activations
//   splits_bytes                    whether weights of 8 bits have to come as two of 4
//   words                           whether entries of tables, and weights whose bytes would be split, are multiplied
//                                   with activations of two bytes as words of 16 bits; then interleave_low,
//                                   interleave_high: the first or last 8 bytes of every row of two vectors by turns;
//                                   dot_words: a sum plus the products of words; join: bytes of 7 bits, upper and lower,
//                                   to those of a word less 2^13
//   word_lookup_bits                codes of up to so many bits are looked up as words; then lookup_words, in tables of 8
//                                   words a row: for the even and for the odd columns
//   held                            registers for weights that several activations meet
//   shifted_plus                    of Ints: the first 8 bits up, plus the second
//   floats, splat                   of Ints; of a number
//   Tile, tile_halves, tile_bytes   16 floats, one a row, from float16 or bytes; default: zeros
//   tile_mul, tile_fma              with a float; with two tiles
//   tile_load, tile_store           from and to 16 floats
//   tiles                           tiles that fit the registers, beside what changes them
//   spread                          those of the n-th vector of rows, in all lanes of a row
//   mul, fma, totals                the sum of the lanes of every row
//   sparse_step                     16 sums plus the products of as many sparse weights
//   affine                          16 codes less a zero point, times a scale
//   entries<BITS>                   16 entries of a table of 16 floats
//   half_to_float, float_to_half, widen_half, widen_bfloat, narrow_half, narrow_bfloat
#pragma once

#define REQUANT_INLINE inline __attribute__((always_inline))
#define REQUANT_PRAGMA(text) _Pragma(#text)
#ifndef REQUANT_UNROLL
#define REQUANT_UNROLL(times) REQUANT_PRAGMA(GCC unroll times)
#endif

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

// Rows first ... first + count - 1 of all m to y [batch, rows]; sums are `stride` apart.
template <class S>
void store_rows(int64_t rows, int64_t first, int64_t count, int64_t batch, const float* sums, int64_t stride, int dtype,
                void* y) {
    for (int64_t m = 0; m < batch; ++m)
        narrow<S>(dtype, sums + m * stride, static_cast<char*>(y) + (m * rows + first) * size_of(dtype), count);
}

// ---- activations -------------------------------------------------------------------------------------------

// What makes integers of up to `top` of values. A NaN or an infinity among them makes the scale NaN, and with it the
// whole row of the result.
struct Steps {
    float scale, factor;
    bool finite;

    // of `count` values, a multiple of STEP
    REQUANT_INLINE Steps(const float* values, int64_t count, float top) {
        float largest[STEP] = {}, poison[STEP] = {};
        for (int64_t i = 0; i < count; i += STEP)
            for (int64_t j = 0; j < STEP; ++j) {
                const float magnitude = __builtin_fabsf(values[i + j]);
                largest[j] = magnitude > largest[j] ? magnitude : largest[j];
                poison[j] += values[i + j] * 0.0f;
            }
        for (int64_t j = 1; j < STEP; ++j) {
            largest[0] = largest[j] > largest[0] ? largest[j] : largest[0];
            poison[0] += poison[j];
        }
        finite = poison[0] == 0.0f;
        scale = finite ? largest[0] / top : bits_to_float(0x7fc00000u);
        // a quotient of two small numbers may be infinite where the smaller one is subnormal
        const float inverse = top / largest[0];
        factor = finite && inverse < 3e38f ? inverse : 0.0f;
    }

    REQUANT_INLINE int32_t whole(float value) const {
        return int32_t(__builtin_nearbyintf(finite ? value * factor : 0.0f));
    }
};

// The chunk's values against the largest of them, in `planes` bytes; the most significant ends at 127, so that no
// byte leaves [-128, 127]; or, if there are two, as words in `order`.
template <class S>
void quantize(const float* x, int64_t batch, int64_t columns, int planes, Order order, int parts, int8_t* bytes,
              float* scales, float* sums) {
    const int64_t chunks = chunks_of(columns);
    const float top = planes == 1 ? 127.0f : planes == 2 ? 127.0f * 256 : 127.0f * 65536;
    for (int64_t c = 0; c < chunks; ++c)
        for (int64_t m = 0; m < batch; ++m) {
            const int64_t here = c * batch + m;
            float values[CHUNK];
            const int64_t count = columns - c * CHUNK < CHUNK ? columns - c * CHUNK : CHUNK;
            __builtin_memcpy(values, x + m * columns + c * CHUNK, size_t(count) * 4);
            if (count < CHUNK) __builtin_memset(values + count, 0, size_t(CHUNK - count) * 4);

            const Steps steps(values, CHUNK, top);
            scales[here] = steps.scale;
            int32_t whole[CHUNK];
            for (int64_t i = 0; i < CHUNK; ++i) whole[i] = steps.whole(values[i]);
            for (int part = 0; part < parts; ++part) {
                int32_t total = 0;
                for (int64_t i = part * CHUNK / parts; i < (part + 1) * CHUNK / parts; ++i) total -= whole[i];
                sums[here * parts + part] = float(total);
            }
            if (order != BYTES) {
                int16_t narrow[CHUNK];
                for (int64_t i = 0; i < CHUNK; ++i) {
                    const int64_t within = order == WORDS ? i % STEP : i % 2 * (STEP / 2) + i % STEP / 2;
                    narrow[i / STEP * STEP + within] = int16_t(whole[i]);
                }
                __builtin_memcpy(bytes + here * sizeof narrow, narrow, sizeof narrow);
                continue;
            }
            for (int plane = planes - 1; plane >= 0; --plane) {
                int8_t* out = bytes + (here * planes + plane) * CHUNK;
                for (int64_t i = 0; i < CHUNK; ++i) {
                    out[i] = int8_t(whole[i]);
                    whole[i] = (whole[i] - out[i]) >> 8;
                }
            }
        }
}

// ---- codes -------------------------------------------------------------------------------------------------

// The codes of a vector in the four steps of a block. V is a vector type of `rows` rows.
template <class V, int BITS, int ROWS>
struct Block;

template <class V, int ROWS>
struct Block<V, 2, ROWS> {
    typename V::Shorts line;
    REQUANT_INLINE Block(const uint8_t* p, int v) : line(V::shorts(V::load(p + v * 16 * ROWS))) {}
    template <int C>
    REQUANT_INLINE typename V::Bytes step() const {
        return V::bytes(line >> (2 * C)) & V::splat_byte(3);
    }
};

template <class V, int ROWS>
struct Block<V, 3, ROWS> {
    typename V::Shorts line, rest;
    REQUANT_INLINE Block(const uint8_t* p, int v) : line(V::shorts(V::load(p + v * 16 * ROWS))) {
        const typename V::Shorts halves = V::shorts(V::widen(p + 64 + v * 8 * ROWS));
        rest = halves | halves << 4;
    }
    template <int C>
    REQUANT_INLINE typename V::Bytes step() const {
        if constexpr (C < 2) return V::bytes(line >> (3 * C)) & V::splat_byte(7);
        if constexpr (C == 2) return V::bytes(rest) & V::splat_byte(7);
        return (V::bytes(line >> 6) & V::splat_byte(3)) | (V::bytes(rest >> 1) & V::splat_byte(4));
    }
};

template <class V, int ROWS>
struct Block<V, 4, ROWS> {
    typename V::Shorts line[2];
    REQUANT_INLINE Block(const uint8_t* p, int v)
        : line{V::shorts(V::load(p + v * 16 * ROWS)), V::shorts(V::load(p + 64 + v * 16 * ROWS))} {}
    template <int C>
    REQUANT_INLINE typename V::Bytes step() const {
        return V::bytes(C % 2 ? line[C / 2] >> 4 : line[C / 2]) & V::splat_byte(15);
    }
};

template <class V, int ROWS>
struct Block<V, 8, ROWS> {
    const uint8_t* at;
    REQUANT_INLINE Block(const uint8_t* p, int v) : at(p + v * 16 * ROWS) {}
    template <int C>
    REQUANT_INLINE typename V::Bytes step() const {
        return V::load(at + 64 * C);
    }
};

// ---- products ----------------------------------------------------------------------------------------------

// bytes from a load to what is fetched for later: of codes and of the sparse part
constexpr int64_t AHEAD = 8192, SLICES_AHEAD = 4096;

// Entries have PLANES bytes of 7 bits. Of `depth` bytes the lower ones are cut off: what they stood for is half a unit
// on average.
constexpr float table_unit(int depth) { return depth == PLANES ? 1.0f : 1 << (TABLE_SHIFT * (PLANES - depth)); }
constexpr float table_middle(int depth) {
    return (1 << (TABLE_SHIFT * depth - 1)) - (depth == PLANES ? 0.0f : 0.5f);
}

template <class S>
constexpr Order order_of(int kind, int bits, int planes) {
    if (!S::words || planes != 2) return BYTES;
    if (kind == LUT) return bits <= S::word_lookup_bits ? EVEN_FIRST : WORDS;
    return bits == 8 && S::splits_bytes ? WORDS : BYTES;
}

// What a weight is made of: bytes whose sum, each times its factor, is the integer that is multiplied; or one word, the
// halves of a step's 16 columns apart.
template <class S, int KIND, int BITS, int DEPTH, int P>
struct Form {
    static constexpr Order order = order_of<S>(KIND, BITS, P);
    static constexpr bool words = order != BYTES;
    static constexpr bool split = KIND == UNIFORM && BITS == 8 && S::splits_bytes && !words;
    static constexpr int count = KIND == LUT ? DEPTH : split || words ? 2 : 1;
    static constexpr int most = KIND == LUT ? 127 : BITS == 8 && !split ? 255 : 15;
    static constexpr float factor = KIND == LUT ? 1 << TABLE_SHIFT : 16;  // of a part, in terms of the next
    // of the range of entries; a word has its sign already, up to the half unit of what is cut off
    static constexpr float middle = words ? -0.5f : table_middle(DEPTH);
};

template <class S, class Made, int KIND, int BITS, int C>
REQUANT_INLINE void weight_step(const Block<S, BITS, S::rows>& codes, const typename S::Bytes* table,
                                typename S::Bytes (*out)[STEPS]) {
    const typename S::Bytes code = codes.template step<C>();
    if constexpr (Made::order == EVEN_FIRST) {
        S::lookup_words(table[0], code, out[0][C], out[1][C]);
    } else if constexpr (Made::words) {
        const typename S::Bytes low = KIND == LUT ? S::lookup(table[1], code) : code;
        const typename S::Bytes high = KIND == LUT ? S::lookup(table[0], code) : S::splat_byte(0);
        out[0][C] = S::interleave_low(low, high);
        out[1][C] = S::interleave_high(low, high);
    } else if constexpr (KIND == LUT) {
        for (int d = 0; d < Made::count; ++d) out[d][C] = S::lookup(table[d], code);
    } else if constexpr (Made::split) {
        out[0][C] = S::bytes(S::shorts(code) >> 4) & S::splat_byte(15);
        out[1][C] = code & S::splat_byte(15);
    } else {
        out[0][C] = code;
    }
}

// 16 bytes of every step of a chunk of activations, for every row.
template <class S, int P>
struct Inputs {
    typename S::Bytes of[P * STEPS];
    REQUANT_INLINE void load(const int8_t* x) {
        for (int i = 0; i < P * STEPS; ++i) of[i] = S::repeat(x + i * STEP);
    }
};

// Sums of what the steps begin ... end - 1 of a block and of the activations make.
template <class S, class Made, int P>
REQUANT_INLINE typename S::Floats products(const typename S::Bytes (*weight)[STEPS], const Inputs<S, P>& x, int begin,
                                           int end) {
    if constexpr (Made::words) {
        // of 8 columns each, so that they fit: 8 * 2^13 * 127 * 2^8 < 2^31
        typename S::Ints low{}, high{};
        REQUANT_UNROLL(4)
        for (int s = begin; s < end; ++s) {
            low = S::dot_words(low, weight[0][s], x.of[2 * s]);
            high = S::dot_words(high, weight[1][s], x.of[2 * s + 1]);
        }
        return S::floats(low) + S::floats(high);
    } else {
        using Dot = typename S::template Dot<Made::most>;
        typename S::Floats total{};
        for (int d = 0; d < Made::count; ++d) {
            typename S::Ints dots[P];
            for (int p = 0; p < P; ++p) {
                typename Dot::Sums dot = Dot::none();
                REQUANT_UNROLL(4)
                for (int s = begin; s < end; ++s) dot = Dot::add(dot, weight[d][s], x.of[p * STEPS + s]);
                dots[p] = Dot::of(dot);
            }
            // two planes fit an integer: 64 * 255 * 128 * 257 < 2^30
            typename S::Floats across = S::floats(P == 1 ? dots[0] : S::shifted_plus(dots[0], dots[P > 1]));
            if constexpr (P == 3) across = S::fma(across, S::splat(256.0f), S::floats(dots[2]));
            total = d == 0 ? across : S::fma(total, S::splat(Made::factor), across);
        }
        return total;
    }
}

// What is summed of a tile: the products, [TILE_ROWS / S::rows, batch], and what the zero points take off, [batch].
template <class S>
struct Sums {
    typename S::Floats products[TILE_ROWS / S::rows * MAX_BATCH];
    typename S::Tile offsets[MAX_BATCH];
};

// Adds what a chunk makes of the rows of a tile. M: the batch, or 0 if it is known at run time only.
template <class S, int KIND, int BITS, int DEPTH, int P, int PARTS, int M>
REQUANT_INLINE void tile_chunk(const Weights& w, const Activations& in, int64_t tile, int64_t c,
                               GroupWalk& groups, const typename S::Bytes (*tables)[PLANES], Sums<S>& sums) {
    using Made = Form<S, KIND, BITS, DEPTH, P>;
    using Bytes = typename S::Bytes;
    using Floats = typename S::Floats;
    constexpr int VECTORS = BLOCK_ROWS / S::rows, COUNT = TILE_ROWS / S::rows, RUN = STEPS / PARTS;
    // of one activation, weights are used once; of several, as many as registers hold meet one after the other
    constexpr int TOGETHER = M != 1 && Made::count * STEPS < S::held ? S::held / (Made::count * STEPS) : 1;
    const int64_t chunks = w.chunks(), batch = M ? M : in.batch;
    const uint8_t* codes = w.codes + (tile * chunks + c) * tile_chunk_bytes(BITS);
    const int8_t* x = in.bytes + c * batch * P * CHUNK;
    const float* scales = in.scales + c * batch;

    typename S::Tile tile_scales[PARTS];
    [[maybe_unused]] const int64_t first_group = tile * groups.count();
    if constexpr (KIND == UNIFORM)
        REQUANT_UNROLL(2)
        for (int part = 0; part < PARTS; ++part) {
            const int64_t group = first_group + groups.at(c * CHUNK + part * (CHUNK / PARTS));
            tile_scales[part] = S::tile_halves(w.scales + group * TILE_ROWS);
            const typename S::Tile zeros = S::tile_bytes(w.zeros + group * TILE_ROWS);
            for (int64_t m = 0; m < batch; ++m) {
                const float less = scales[m] * in.sums[(c * batch + m) * PARTS + part];
                sums.offsets[m] = S::tile_fma(S::tile_mul(tile_scales[part], less), zeros, sums.offsets[m]);
            }
        }
    Inputs<S, P> inputs;
    if constexpr (M == 1) inputs.load(x);
    REQUANT_UNROLL(8)
    for (int first = 0; first < COUNT; first += TOGETHER) {
        Bytes weight[TOGETHER][Made::count][STEPS];
        REQUANT_UNROLL(4)
        for (int n = first; n < first + TOGETHER; ++n) {
            const int v = n % VECTORS;
            const uint8_t* block = codes + n / VECTORS * (32 * BITS);
            for (int o = 64 * v; o < 32 * BITS; o += 64 * VECTORS) __builtin_prefetch(block + AHEAD + o);
            const Block<S, BITS, S::rows> raw(block, v);
            weight_step<S, Made, KIND, BITS, 0>(raw, tables[n], weight[n - first]);
            weight_step<S, Made, KIND, BITS, 1>(raw, tables[n], weight[n - first]);
            weight_step<S, Made, KIND, BITS, 2>(raw, tables[n], weight[n - first]);
            weight_step<S, Made, KIND, BITS, 3>(raw, tables[n], weight[n - first]);
        }
        for (int64_t m = 0; m < batch; ++m) {
            if constexpr (M != 1) inputs.load(x + m * P * CHUNK);
            const Floats x_scale = S::splat(scales[m]);
            REQUANT_UNROLL(4)
            for (int n = first; n < first + TOGETHER; ++n) {
                Floats& sum = sums.products[n * batch + m];
                REQUANT_UNROLL(2)
                for (int part = 0; part < PARTS; ++part) {
                    Floats product = products<S, Made, P>(weight[n - first], inputs, part * RUN, (part + 1) * RUN);
                    if constexpr (KIND == UNIFORM) product = S::mul(product, S::spread(tile_scales[part], n));
                    sum = S::fma(product, x_scale, sum);
                }
            }
        }
    }
}

template <class Index>
struct Slice {
    const uint8_t* at;
    const SliceHead& head() const { return *reinterpret_cast<const SliceHead*>(at); }
    const SliceStep<Index>* begin() const { return reinterpret_cast<const SliceStep<Index>*>(at + sizeof(SliceHead)); }
    const SliceStep<Index>* end() const { return begin() + head().length; }
    Slice next() const { return {reinterpret_cast<const uint8_t*>(end())}; }
};

inline const uint8_t* slices_of(const Sparse& sparse, int64_t window) {
    return sparse.slices + sparse.windows[window] * SLICE_UNIT;
}

template <class S, class Index>
void sparse_rows(const Sparse& sparse, int64_t begin, int64_t end, const float* x, const uint8_t* soon, int64_t line,
                 float* sums) {
    for (int64_t window = begin; window < end; ++window, sums += WINDOW) {
        const uint8_t* behind = slices_of(sparse, window + 1);
        for (Slice<Index> slice{slices_of(sparse, window)}; slice.at < behind; slice = slice.next()) {
            typename S::Tile sum = S::tile_splat(0.0f);
            for (const SliceStep<Index>& step : slice) {
                sum = S::sparse_step(sum, step.columns, step.values, x);
                __builtin_prefetch(reinterpret_cast<const uint8_t*>(&step) + SLICES_AHEAD);
                __builtin_prefetch(soon);
                soon += line;
            }
            float lanes[STEP];
            S::tile_store(sum, lanes);
            for (int l = 0; l < STEP; ++l) sums[slice.head().rows[l]] += lanes[l];
        }
    }
}

// The same of STEP activations, side by side in x [columns, STEP] and sums [rows, STEP]: an element and what goes with it
// are read once for all of them. Every sum is made and rounded as above.
template <class S, class Index>
void sparse_rows_of_all(const Sparse& sparse, int64_t begin, int64_t end, const float* x, float* sums) {
    for (int64_t window = begin; window < end; ++window, sums += WINDOW * STEP) {
        const uint8_t* behind = slices_of(sparse, window + 1);
        for (Slice<Index> slice{slices_of(sparse, window)}; slice.at < behind; slice = slice.next())
            for (int first = 0; first < STEP; first += S::tiles) {
                typename S::Tile lanes[S::tiles];
                for (typename S::Tile& lane : lanes) lane = S::tile_splat(0.0f);
                for (const SliceStep<Index>& step : slice) {
                    float values[STEP];
                    S::tile_store(S::tile_halves(step.values), values);
                    REQUANT_UNROLL(16)
                    for (int l = 0; l < S::tiles; ++l) {
                        const typename S::Tile inputs = S::tile_load(x + int64_t(step.columns[first + l]) * STEP);
                        lanes[l] = S::tile_fma(inputs, S::tile_splat(values[first + l]), lanes[l]);
                    }
                    __builtin_prefetch(reinterpret_cast<const uint8_t*>(&step) + SLICES_AHEAD);
                }
                for (int l = 0; l < S::tiles; ++l) {
                    float* to = sums + slice.head().rows[first + l] * STEP;
                    S::tile_store(S::tile_fma(lanes[l], S::tile_splat(1.0f), S::tile_load(to)), to);
                }
            }
    }
}

// 4 x 4 floats, of rows `from` apart up to the `last` and then that one again, transposed into rows `to` apart.
REQUANT_INLINE void transpose_four(const float* in, int64_t from, int64_t last, float* out, int64_t to) {
    typedef float Four __attribute__((vector_size(16)));
    typedef int32_t Lanes __attribute__((vector_size(16)));
    const Lanes low{0, 4, 1, 5}, high{2, 6, 3, 7}, firsts{0, 1, 4, 5}, lasts{2, 3, 6, 7};
    Four rows[4];
    REQUANT_UNROLL(4)
    for (int i = 0; i < 4; ++i) __builtin_memcpy(&rows[i], in + (i < last ? i : last) * from, sizeof rows[i]);
    const Four a = __builtin_shuffle(rows[0], rows[1], low), b = __builtin_shuffle(rows[2], rows[3], low);
    const Four c = __builtin_shuffle(rows[0], rows[1], high), d = __builtin_shuffle(rows[2], rows[3], high);
    const Four columns[4] = {__builtin_shuffle(a, b, firsts), __builtin_shuffle(a, b, lasts),
                             __builtin_shuffle(c, d, firsts), __builtin_shuffle(c, d, lasts)};
    REQUANT_UNROLL(4)
    for (int i = 0; i < 4; ++i) __builtin_memcpy(out + i * to, &columns[i], sizeof columns[i]);
}

// out [columns, STEP]: x [batch, columns] transposed; what is behind the batch there is of no meaning.
inline void side_by_side(const float* x, int64_t batch, int64_t columns, float* out) {
    const int64_t whole = columns / 4 * 4;
    for (int64_t first = 0; first < whole; first += STEP)  // a line of every row: rows may meet in the cache
        for (int64_t m = 0; m < batch; m += 4)
            for (int64_t c = first; c < first + STEP && c < whole; c += 4)
                transpose_four(x + m * columns + c, columns, batch - 1 - m, out + c * STEP + m, STEP);
    for (int64_t c = whole; c < columns; ++c)
        for (int64_t m = 0; m < batch; ++m) out[c * STEP + m] = x[m * columns + c];
}

// The residual of the windows up to `end`, of a stretch of windows at a time: while codes run through the first cache, they
// drive out the activations, and to get a line of those back takes as long as a line of codes. Apart from the dense sums,
// so that both are rounded alike in every batch.
template <class S>
class Residual {
  public:
    Residual(const Sparse& sparse, int64_t end, const SparseActivations& in, float* scratch)
        : sparse_(sparse), end_(end), in_(in), sums_(scratch) {}

    // Before the dense sums from `window` on, whose codes are `soon` wanted.
    void prepare(int64_t window, const uint8_t* soon) {
        if (!sparse_.windows || window < until_) return;
        begin_ = window;
        until_ = window + stretch_ < end_ ? window + stretch_ : end_;
        if (sparse_.wide)
            multiply<int32_t>(soon);
        else
            multiply<uint16_t>(soon);
    }

    // to[m * stride + i] += that of `count` rows from the first of `window` on
    void add(int64_t window, int64_t count, float* to, int64_t stride) const {
        if (!sparse_.windows) return;
        for (int64_t m = 0; m < in_.batch; ++m) {
            const float* from = sums_ + m * stride_ + (window - begin_) * WINDOW;
            for (int64_t i = 0; i < count; ++i) to[m * stride + i] += from[i];
        }
    }

  private:
    template <class Index>
    void multiply(const uint8_t* soon) {
        const int64_t rows = (until_ - begin_) * WINDOW;
        if (in_.side_by_side) {
            float* sums = sums_ + STEP * stride_;
            __builtin_memset(sums, 0, size_t(rows * STEP) * sizeof(float));
            sparse_rows_of_all<S, Index>(sparse_, begin_, until_, in_.side_by_side, sums);
            for (int64_t i = 0; i < rows; i += 4)
                for (int64_t m = 0; m < in_.batch; m += 4)
                    transpose_four(sums + i * STEP + m, STEP, 3, sums_ + m * stride_ + i, stride_);
            return;
        }
        for (int64_t m = 0; m < in_.batch; ++m) {
            float* sums = sums_ + m * stride_;
            __builtin_memset(sums, 0, size_t(rows) * sizeof(float));
            const int64_t line = m || !soon ? 0 : 64;  // the codes are to be fetched once
            sparse_rows<S, Index>(sparse_, begin_, until_, in_.x + m * in_.columns, line ? soon : nullptr, line, sums);
        }
    }

    const Sparse& sparse_;
    const int64_t end_;
    const SparseActivations in_;
    float* const sums_;  // [activations, stride_]; behind them those of activations side by side, [stride_, STEP]
    const int64_t stretch_ = stretch_of(in_.side_by_side ? STEP : in_.batch), stride_ = stretch_ * WINDOW;
    int64_t begin_ = 0, until_ = 0;
};

// sums[m, row] += sparse part of the first `rows` rows times activation m, the columns of a row of sums being `stride` apart
template <class S>
void sparse(const Sparse& sparse, int64_t rows, const SparseActivations& in, float* sums, int64_t stride, float* scratch) {
    Residual<S> residual(sparse, windows_of(rows), in, scratch);
    for (int64_t window = 0; window < windows_of(rows); ++window) {
        const int64_t first = window * WINDOW;
        residual.prepare(window, nullptr);
        residual.add(window, rows - first < WINDOW ? rows - first : WINDOW, sums + first, stride);
    }
}

// What the middle of the tables' range takes off the products with a row of activations.
template <class S, class Made>
float table_offset(const Activations& in, int64_t chunks, int64_t m) {
    float total = 0;
    for (int64_t c = 0; c < chunks; ++c) total += in.scales[c * in.batch + m] * in.sums[c * in.batch + m];
    return Made::middle * total;
}

template <class S, int KIND, int BITS, int DEPTH, int P, int PARTS, int M>
void linear_windows(const Weights& w, const Activations& in, int64_t begin, int64_t end, int dtype, void* y,
                    float* out) {
    using Made = Form<S, KIND, BITS, DEPTH, P>;
    constexpr int COUNT = TILE_ROWS / S::rows;
    const int64_t chunks = w.chunks(), tiles = w.tiles(), batch = M ? M : in.batch;
    Residual<S> residual(w.sparse, end, in.sparse, out + batch * WINDOW);
    float offsets[MAX_BATCH];
    for (int64_t m = 0; m < batch; ++m) offsets[m] = KIND == LUT ? table_offset<S, Made>(in, chunks, m) : 0.0f;
    for (int64_t window = begin; window < end; ++window) {
        const int64_t first = window * (WINDOW / TILE_ROWS);
        const int64_t last = first + WINDOW / TILE_ROWS < tiles ? first + WINDOW / TILE_ROWS : tiles;
        residual.prepare(window, w.codes + first * chunks * tile_chunk_bytes(BITS));
        for (int64_t tile = first; tile < last; ++tile) {
            typename S::Bytes tables[COUNT][PLANES];
            if constexpr (KIND == LUT)
                for (int n = 0; n < COUNT; ++n) {
                    for (int d = 0; d < DEPTH; ++d)
                        tables[n][d] = S::load(w.zeros + ((tile * PLANES + d) * TILE_ROWS + n * S::rows) * ENTRIES);
                    if constexpr (Made::words) S::join(tables[n][0], tables[n][1]);
                    if constexpr (Made::order == EVEN_FIRST)
                        tables[n][0] = S::interleave_low(tables[n][1], tables[n][0]);
                }
            Sums<S> sums;
            for (int64_t n = 0; n < COUNT * batch; ++n) sums.products[n] = typename S::Floats{};
            for (int64_t m = 0; m < batch; ++m) sums.offsets[m] = S::tile_splat(offsets[m]);
            GroupWalk groups(w);
            for (int64_t c = 0; c < chunks; ++c)
                tile_chunk<S, KIND, BITS, DEPTH, P, PARTS, M>(w, in, tile, c, groups, tables, sums);
            for (int64_t m = 0; m < batch; ++m) {
                float totals[TILE_ROWS], rows[TILE_ROWS];
                S::tile_store(sums.offsets[m], rows);
                for (int n = 0; n < COUNT; ++n) S::totals(sums.products[n * batch + m], totals + n * S::rows);
                float* to = out + m * WINDOW + (tile - first) * TILE_ROWS;
                for (int r = 0; r < TILE_ROWS; ++r) {
                    float dense = totals[r] + rows[r];
                    if constexpr (KIND == LUT) dense *= w.units[tile * TILE_ROWS + r] * table_unit(DEPTH);
                    to[r] = dense;
                }
            }
        }
        residual.add(window, WINDOW, out, WINDOW);
        const int64_t rows = w.rows - window * WINDOW < WINDOW ? w.rows - window * WINDOW : WINDOW;
        store_rows<S>(w.rows, window * WINDOW, rows, batch, out, WINDOW, dtype, y);
    }
}

// ---- dequantize --------------------------------------------------------------------------------------------

// 16 bytes of one row, for the same on every instruction set.
struct Row {
    typedef uint8_t Bytes __attribute__((vector_size(16)));
    typedef uint16_t Shorts __attribute__((vector_size(16)));
    static REQUANT_INLINE Shorts shorts(Bytes v) { return Shorts(v); }
    static REQUANT_INLINE Bytes bytes(Shorts v) { return Bytes(v); }
    static REQUANT_INLINE Bytes load(const uint8_t* p) {
        Bytes out;
        __builtin_memcpy(&out, p, 16);
        return out;
    }
    static REQUANT_INLINE Bytes widen(const uint8_t* p) {
        Shorts out;
        for (int i = 0; i < 8; ++i) out[i] = p[i];
        return Bytes(out);
    }
    static REQUANT_INLINE Bytes splat_byte(uint8_t v) { return Bytes{} + v; }
};

template <int BITS, int C>
REQUANT_INLINE void row_step(const Block<Row, BITS, 1>& codes, uint8_t* out) {
    const Row::Bytes step = codes.template step<C>();
    __builtin_memcpy(out + C * STEP, &step, STEP);
}

template <class S, int KIND, int BITS>
void dequantize_row(const Weights& w, int64_t row, float* out) {
    const int64_t chunks = w.chunks();
    const int64_t tile = row / TILE_ROWS, r = row % TILE_ROWS;
    [[maybe_unused]] const int64_t first_group = tile * w.groups();
    GroupWalk groups(w);
    float table[ENTRIES] = {};
    if constexpr (KIND == LUT) S::widen_half(w.scales + (row << BITS), table, 1 << BITS);
    for (int64_t c = 0; c < chunks; ++c) {
        const uint8_t* block = w.codes + (tile * chunks + c) * tile_chunk_bytes(BITS) + r / BLOCK_ROWS * (32 * BITS);
        const Block<Row, BITS, 1> raw(block, r % BLOCK_ROWS);
        uint8_t codes[CHUNK];
        row_step<BITS, 0>(raw, codes);
        row_step<BITS, 1>(raw, codes);
        row_step<BITS, 2>(raw, codes);
        row_step<BITS, 3>(raw, codes);
        const int64_t count = w.columns - c * CHUNK < CHUNK ? w.columns - c * CHUNK : CHUNK;
        float last[CHUNK];
        float* weights = count == CHUNK ? out + c * CHUNK : last;
        REQUANT_UNROLL(2)
        for (int64_t half = 0; half < 2; ++half) {
            [[maybe_unused]] float scale = 0, zero = 0;
            if constexpr (KIND == UNIFORM) {
                const int64_t group = first_group + groups.at(c * CHUNK + half * (CHUNK / 2));
                const int64_t place = group * TILE_ROWS + r;
                scale = S::half_to_float(w.scales[place]), zero = float(w.zeros[place]);
            }
            REQUANT_UNROLL(2)
            for (int64_t at = half * (CHUNK / 2); at < (half + 1) * (CHUNK / 2); at += STEP) {
                if constexpr (KIND == LUT)
                    S::template entries<BITS>(codes + at, table, weights + at);
                else
                    S::affine(codes + at, zero, scale, weights + at);
            }
        }
        if (count < CHUNK) __builtin_memcpy(out + c * CHUNK, last, size_t(count) * 4);
    }
}

template <class S, class Index>
void add_sparse(const Sparse& sparse, int64_t row, float* out) {
    const uint8_t* end = slices_of(sparse, row / WINDOW + 1);
    typedef int8_t Lanes __attribute__((vector_size(STEP)));
    typedef int64_t Halves __attribute__((vector_size(STEP)));
    for (Slice<Index> slice{slices_of(sparse, row / WINDOW)}; slice.at < end; slice = slice.next()) {
        Lanes rows, wanted;
        __builtin_memcpy(&rows, slice.head().rows, sizeof rows);
        __builtin_memset(&wanted, int(row % WINDOW), sizeof wanted);
        const Halves found = Halves(rows == wanted);
        if (!(found[0] | found[1])) continue;
        for (int l = 0; l < STEP; ++l) {
            if (slice.head().rows[l] != row % WINDOW) continue;
            // padding adds 0 to column 0
            for (const SliceStep<Index>& step : slice) out[step.columns[l]] += S::half_to_float(step.values[l]);
        }
    }
}

template <class S, int KIND, int BITS>
void dequantize_rows(const Weights& w, const int64_t* ids, int64_t first, int64_t begin, int64_t end, int dtype,
                     void* out, float* line) {
    for (int64_t i = begin; i < end; ++i) {
        const int64_t row = ids ? ids[i] : i;
        const int64_t at = (i - first) * w.columns;
        float* to = dtype == F32 ? static_cast<float*>(out) + at : line;
        dequantize_row<S, KIND, BITS>(w, row, to);
        if (w.sparse.windows) {
            if (w.sparse.wide)
                add_sparse<S, int32_t>(w.sparse, row, to);
            else
                add_sparse<S, uint16_t>(w.sparse, row, to);
        }
        if (dtype != F32) narrow<S>(dtype, to, static_cast<uint16_t*>(out) + at, w.columns);
    }
}

// ---- the yardstick -----------------------------------------------------------------------------------------

template <class S>
uint64_t read(const uint8_t* data, int64_t bytes) {
    constexpr int64_t SIZE = sizeof(typename S::Bytes);
    typename S::Bytes sums[256 / SIZE] = {};
    for (int64_t at = 0; at < bytes; at += 256)
        REQUANT_UNROLL(16)
        for (int64_t i = 0; i < 256 / SIZE; ++i) {
            if (i * SIZE % 64 == 0) __builtin_prefetch(data + at + AHEAD + i * SIZE);
            sums[i] ^= S::load(data + at + i * SIZE);
        }
    uint64_t words[32], total = 0;
    __builtin_memcpy(words, sums, sizeof words);
    for (uint64_t word : words) total ^= word;
    return total;
}

// ---- dispatch; kind, bits and planes were checked by the caller --------------------------------------------

template <class S, int KIND, int BITS, int DEPTH, int P>
void linear_parts(const Weights& w, const Activations& in, int64_t begin, int64_t end, int dtype, void* y,
                  float* sums) {
    constexpr int PARTS = KIND == UNIFORM ? 2 : 1;
    const bool two = in.parts == 2;
    if constexpr (S::rows > 1)  // one vector after the other, a loop over a single row costs as much as what it does
        if (in.batch == 1) {
            if (two) return linear_windows<S, KIND, BITS, DEPTH, P, PARTS, 1>(w, in, begin, end, dtype, y, sums);
            return linear_windows<S, KIND, BITS, DEPTH, P, 1, 1>(w, in, begin, end, dtype, y, sums);
        }
    if (two) return linear_windows<S, KIND, BITS, DEPTH, P, PARTS, 0>(w, in, begin, end, dtype, y, sums);
    linear_windows<S, KIND, BITS, DEPTH, P, 1, 0>(w, in, begin, end, dtype, y, sums);
}

template <class S, int KIND, int BITS>
void linear_planes(const Weights& w, const Activations& in, int64_t begin, int64_t end, int dtype, void* y,
                   float* sums) {
    switch (in.planes) {
        case 1: return linear_parts<S, KIND, BITS, 2, 1>(w, in, begin, end, dtype, y, sums);
        case 2: return linear_parts<S, KIND, BITS, 2, 2>(w, in, begin, end, dtype, y, sums);
        default: return linear_parts<S, KIND, BITS, 3, 3>(w, in, begin, end, dtype, y, sums);
    }
}

// Calls RUN<S, KIND, BITS>(...) for the weight `w`.
#define REQUANT_SELECT(RUN, ...)                            \
    if (w.kind == LUT) switch (w.bits) {                    \
            case 2: return RUN<S, LUT, 2>(__VA_ARGS__);     \
            case 3: return RUN<S, LUT, 3>(__VA_ARGS__);     \
            default: return RUN<S, LUT, 4>(__VA_ARGS__);    \
        }                                                   \
    switch (w.bits) {                                       \
        case 2: return RUN<S, UNIFORM, 2>(__VA_ARGS__);     \
        case 3: return RUN<S, UNIFORM, 3>(__VA_ARGS__);     \
        case 4: return RUN<S, UNIFORM, 4>(__VA_ARGS__);     \
        default: return RUN<S, UNIFORM, 8>(__VA_ARGS__);    \
    }

template <class S>
void linear(const Weights& w, const Activations& in, int64_t begin, int64_t end, int dtype, void* y, float* sums) {
    REQUANT_SELECT(linear_planes, w, in, begin, end, dtype, y, sums)
}

template <class S>
void dequantize(const Weights& w, const int64_t* ids, int64_t first, int64_t begin, int64_t end, int dtype,
                void* out, float* line) {
    REQUANT_SELECT(dequantize_rows, w, ids, first, begin, end, dtype, out, line)
}

#undef REQUANT_SELECT

}  // namespace
}  // namespace requant

// The trellis kind: weights are windows of L bits in circular strings of 128 K bits, in coordinates rotated by block
// Hadamard transforms (format/SPEC.md, section 4). Written once over a tier, like tier.h, and under the same rules.
//
// A string has as many rows as an output block and runs down its columns, so that 16 consecutive windows are 16 output
// rows, one lane each, and meet one broadcast activation. The code is a sum of bytes, of which a lane holds two, those of
// neighbouring columns: one instruction multiplies both by 16-bit integers, so that 16 bits of an activation cost no more
// than 8.
//
// The tier S provides
//   lanes               windows of a vector, a divisor of 16
//   Lanes               32 bits in each
//   windows<K>(p, v)    lane i holds the 32 bits from bit (v lanes + i) K of the bytes on, of which the lowest L are the
//                       window; reads 16 bytes
//   hashed(windows, mask)  their L bits times 0x83DCD12D: the byte sum, less 510, is the value of a state
//   byte_sums(words, other)  the sum of the four bytes of a lane, plus 2^16 times `other`
//   joined_from         words of activations from which on that is worth while; for fewer:
//   dot_alone(sum, words, x)  sum + the sum of a lane's four bytes times x
//   dot(sum, pairs, x)  sum + the lower times the lower 16 bits of x, signed, + the upper times the upper
//   chains, plus        sums that should grow side by side, since the next addition to one waits; of two of them
//   word_sums           words of activations whose sums stay in registers, a power of 2
//   add_scaled(to, sum, less, factor)  to[i] += (sum[i] - less) * factor
#pragma once

namespace requant {
namespace {

constexpr int WIDTH = 16;

// The states of a vector of windows from p on, plus 2^16 times `other`.
template <class S, int K>
REQUANT_INLINE typename S::Lanes decoded(const uint8_t* p, int v, uint32_t mask, typename S::Lanes other) {
    return S::byte_sums(S::hashed(S::template windows<K>(p, v), mask), other);
}

typedef float Sixteen __attribute__((vector_size(64)));
typedef int32_t Places __attribute__((vector_size(64)));

// The butterflies of a vector's lanes that are APART places apart.
template <int APART>
REQUANT_INLINE Sixteen butterflies(Sixteen v) {
    Places other;
    Sixteen sign;
    for (int i = 0; i < 16; ++i) other[i] = i ^ APART, sign[i] = i & APART ? -1.0f : 1.0f;
    return __builtin_shuffle(v, other) + v * sign;
}

// Orthogonal up to a factor that the signs carry.
template <int VECTORS>
REQUANT_INLINE void hadamard_of(float* x) {
    Sixteen v[VECTORS];
    __builtin_memcpy(v, x, sizeof v);
    REQUANT_UNROLL(8)
    for (int n = 0; n < VECTORS; ++n) v[n] = butterflies<8>(butterflies<4>(butterflies<2>(butterflies<1>(v[n]))));
    REQUANT_UNROLL(3)
    for (int width = 1; width < VECTORS; width *= 2)
        REQUANT_UNROLL(8)
        for (int n = 0; n < VECTORS; ++n)
            if (!(n & width)) {
                const Sixteen a = v[n], b = v[n + width];
                v[n] = a + b;
                v[n + width] = a - b;
            }
    __builtin_memcpy(x, v, sizeof v);
}

REQUANT_INLINE void hadamard(float* x, int64_t block) {
    switch (block) {
        case 128: return hadamard_of<8>(x);
        case 64: return hadamard_of<4>(x);
        case 32: return hadamard_of<2>(x);
        default: return hadamard_of<1>(x);
    }
}

// Rows [count, columns] times signs and through the transform of every block, or BACK: the other way round; in place.
template <class S, bool BACK>
void rotate(int64_t count, int64_t columns, int64_t block, const float* signs, float* x) {
    for (int64_t m = 0; m < count; ++m)
        for (int64_t at = 0; at < columns; at += block) {
            float* here = x + m * columns + at;
            if (BACK) hadamard(here, block);
            for (int64_t i = 0; i < block; ++i) here[i] *= signs[at + i];
            if (!BACK) hadamard(here, block);
        }
}

// Rotated activations as integers of `words` times 15 bits and a sign, against the largest of their block.
template <class S>
void quantize_words(const float* x, int64_t batch, int64_t columns, int64_t block, int words, int16_t* out,
                    float* scales, int32_t* sums) {
    // 128 weights of up to 510 times this fit an int32
    const float top = words == 1 ? 32512.0f : 32512.0f * 32768;
    const int64_t blocks = columns / block;
    for (int64_t g = 0; g < blocks; ++g)
        for (int64_t m = 0; m < batch; ++m) {
            const float* from = x + m * columns + g * block;
            const int64_t here = g * batch + m;
            const Steps steps(from, block, top);
            scales[here] = steps.scale;
            for (int word = 0; word < words; ++word) sums[here * words + word] = 0;
            for (int64_t i = 0; i < block; ++i) {
                const int32_t whole = steps.whole(from[i]);
                const int32_t part[2] = {words == 1 ? whole : whole >> 15, whole & 32767};
                for (int word = 0; word < words; ++word) {
                    out[(here * words + word) * block + i] = int16_t(part[word]);
                    sums[here * words + word] += 510 * part[word];
                }
            }
        }
}

// 16 rows of a block of columns times M activations: to[m * stride] += scale * x_scales[m] * sums. Strings of COLUMNS
// columns each; `codes` is where the rows begin in the first one.
template <class S, int K, int W, int M, int COLUMNS>
REQUANT_INLINE void trellis_group(const uint8_t* codes, uint32_t mask, const int16_t* x, int64_t block,
                                  const int32_t* x_sums, const float* x_scales, float scale, float* to,
                                  int64_t stride) {
    constexpr int VECTORS = WIDTH / S::lanes, STRINGS = 8 / COLUMNS;
    constexpr int CHAINS = M * W < S::chains ? S::chains / (M * W) : 1;
    static_assert(STRINGS * COLUMNS / 2 % CHAINS == 0, "every chain takes its turn");
    typename S::Lanes sums[CHAINS][M * W][VECTORS];
    for (int chain = 0; chain < CHAINS; ++chain)
        for (int m = 0; m < M * W; ++m)
            for (int v = 0; v < VECTORS; ++v) sums[chain][m][v] = typename S::Lanes{};
    for (int64_t first = 0; first < block; first += STRINGS * COLUMNS, codes += STRINGS * trellis_stride(K))
        REQUANT_UNROLL(4)
        for (int i = 0; i < STRINGS * COLUMNS; i += 2) {
            const uint8_t* p[2];
            for (int n = 0; n < 2; ++n)
                p[n] = codes + (i + n) / COLUMNS * trellis_stride(K) + (i + n) % COLUMNS * (TILE / COLUMNS * K / 8);
            REQUANT_UNROLL(4)
            for (int v = 0; v < VECTORS; ++v) {
                typename S::Lanes(&chain)[M * W][VECTORS] = sums[i / 2 % CHAINS];
                if constexpr (M * W < S::joined_from) {
                    for (int n = 0; n < 2; ++n) {
                        const typename S::Lanes words = S::hashed(S::template windows<K>(p[n], v), mask);
                        REQUANT_UNROLL(16)
                        for (int m = 0; m < M * W; ++m)
                            chain[m][v] = S::dot_alone(chain[m][v], words, x[m * block + first + i + n]);
                    }
                } else {
                    const typename S::Lanes upper = decoded<S, K>(p[1], v, mask, typename S::Lanes{});
                    const typename S::Lanes pairs = decoded<S, K>(p[0], v, mask, upper);
                    REQUANT_UNROLL(16)
                    for (int m = 0; m < M * W; ++m) {
                        int32_t both;
                        __builtin_memcpy(&both, x + m * block + first + i, sizeof both);
                        chain[m][v] = S::dot(chain[m][v], pairs, both);
                    }
                }
            }
        }
    for (int m = 0; m < M * W; ++m) {
        const float factor = scale * x_scales[m / W] * (m % W + 1 < W ? 32768.0f : 1.0f);
        for (int v = 0; v < VECTORS; ++v) {
            typename S::Lanes sum = sums[0][m][v];
            for (int chain = 1; chain < CHAINS; ++chain) sum = S::plus(sum, sums[chain][m][v]);
            S::add_scaled(to + m / W * stride + v * S::lanes, sum, x_sums[m], factor);
        }
    }
}

// The same for the activations from m on, M at a time while there are as many, then half of it.
template <class S, int K, int W, int M, int COLUMNS>
REQUANT_INLINE void trellis_groups(const uint8_t* codes, uint32_t mask, const TrellisActivations& in, int64_t g,
                                   int64_t m, int64_t block, float scale, float* to, int64_t stride) {
    for (; m + M <= in.batch; m += M) {
        const int64_t at = g * in.batch + m;
        trellis_group<S, K, W, M, COLUMNS>(codes, mask, in.words + at * W * block, block, in.sums + at * W,
                                           in.scales + at, scale, to + m * stride, stride);
    }
    if constexpr (M > 1)
        trellis_groups<S, K, W, M / 2, COLUMNS>(codes, mask, in, g, m, block, scale, to, stride);
}

// sums [batch, rows of a unit], rotated back, of the row blocks begin ... end - 1, which have TILE / COLUMNS rows.
template <class S, int K, int W, int COLUMNS>
void trellis_blocks(const Trellis& w, const TrellisActivations& in, int64_t begin, int64_t end, float* sums,
                    int64_t stride) {
    constexpr int64_t SIZE = TILE / COLUMNS;
    constexpr int MOST = S::word_sums / W;
    const uint32_t mask = (1u << w.state_bits) - 1;
    const int64_t block = w.block_in, groups = w.columns / block, group_bytes = block / COLUMNS * trellis_stride(K);
    for (int64_t row_block = begin; row_block < end; ++row_block) {
        float* to = sums + (row_block - begin) * SIZE;
        for (int64_t m = 0; m < in.batch; ++m) __builtin_memset(to + m * stride, 0, size_t(SIZE) * 4);
        for (int64_t g = 0; g < groups; ++g) {
            const float scale = S::half_to_float(w.scales[row_block * groups + g]);
            const uint8_t* codes = w.codes + (row_block * groups + g) * group_bytes;
            for (int64_t row = 0; row < SIZE; row += WIDTH) {
                const uint8_t* here = codes + row * K / 8;
                trellis_groups<S, K, W, MOST, COLUMNS>(here, mask, in, g, 0, block, scale, to + row, stride);
            }
        }
        for (int64_t m = 0; m < in.batch; ++m)
            rotate<S, true>(1, SIZE, SIZE, w.signs_out + row_block * SIZE, to + m * stride);
    }
}

template <class S, int K, int W>
void trellis_sizes(const Trellis& w, const TrellisActivations& in, int64_t begin, int64_t end, float* sums,
                   int64_t stride) {
    switch (w.block_out) {
        case 128: return trellis_blocks<S, K, W, 1>(w, in, begin, end, sums, stride);
        case 64: return trellis_blocks<S, K, W, 2>(w, in, begin, end, sums, stride);
        case 32: return trellis_blocks<S, K, W, 4>(w, in, begin, end, sums, stride);
        default: return trellis_blocks<S, K, W, 8>(w, in, begin, end, sums, stride);
    }
}

template <class S, int K>
void trellis_words(const Trellis& w, const TrellisActivations& in, int64_t begin, int64_t end, float* sums,
                   int64_t stride) {
    if (in.count == 1) return trellis_sizes<S, K, 1>(w, in, begin, end, sums, stride);
    trellis_sizes<S, K, 2>(w, in, begin, end, sums, stride);
}

// y [batch, rows] of the units begin ... end - 1 (trellis_unit rows each), residual included.
template <class S>
void trellis_linear(const Trellis& w, const TrellisActivations& in, int64_t begin, int64_t end, int dtype, void* y,
                    float* sums) {
    const int64_t unit = trellis_unit(w.block_out), last = end * unit < w.rows ? end * unit : w.rows;
    Residual<S> residual(w.sparse, windows_of(last), in.sparse, sums + in.batch * unit);
    for (int64_t u = begin; u < end; ++u) {
        const int64_t first = u * unit, rows = w.rows - first < unit ? w.rows - first : unit;
        const int64_t from = first / w.block_out, to = (first + rows) / w.block_out;
        residual.prepare(first / WINDOW, nullptr);
        switch (w.bits) {
            case 1: trellis_words<S, 1>(w, in, from, to, sums, unit); break;
            case 2: trellis_words<S, 2>(w, in, from, to, sums, unit); break;
            case 3: trellis_words<S, 3>(w, in, from, to, sums, unit); break;
            case 4: trellis_words<S, 4>(w, in, from, to, sums, unit); break;
            case 5: trellis_words<S, 5>(w, in, from, to, sums, unit); break;
            default: trellis_words<S, 6>(w, in, from, to, sums, unit); break;
        }
        residual.add(first / WINDOW, rows, sums, unit);
        store_rows<S>(w.rows, first, rows, in.batch, sums, unit, dtype, y);
    }
}

// Rotated weights of the row blocks begin ... end - 1, transposed: out [columns, stride] of type DTYPE, from row block
// `begin` on. A string runs down a column; rows of weights would be written a float a cache line.
template <class S, int K, int DTYPE>
void trellis_columns(const Trellis& w, int64_t begin, int64_t end, char* out, int64_t stride) {
    const uint32_t mask = (1u << w.state_bits) - 1;
    const int64_t size = w.block_out, tile_columns = TILE / size;
    const int64_t tiles = w.columns / tile_columns, groups = w.columns / w.block_in;
    for (int64_t block = begin; block < end; ++block)
        for (int64_t t = 0; t < tiles; ++t) {
            const uint8_t* tile = w.codes + (block * tiles + t) * trellis_stride(K);
            const float scale = S::half_to_float(w.scales[block * groups + t * tile_columns / w.block_in]);
            float weights[TILE] = {};
            REQUANT_UNROLL(16)
            for (int v = 0; v < TILE / S::lanes; ++v) {
                const int window = v * S::lanes / WIDTH, part = v % (WIDTH / S::lanes);
                const typename S::Lanes states = decoded<S, K>(tile + window * 2 * K, part, mask, typename S::Lanes{});
                S::add_scaled(weights + v * S::lanes, states, 510, scale);
            }
            for (int64_t c = 0; c < tile_columns; ++c) {
                const int64_t at = (t * tile_columns + c) * stride + (block - begin) * size;
                narrow<S>(DTYPE, weights + c * size, out + at * size_of(DTYPE), size);
            }
        }
}

template <class S, int K>
void trellis_rows(const Trellis& w, int64_t begin, int64_t end, int dtype, void* out, int64_t stride) {
    char* to = static_cast<char*>(out);
    switch (dtype) {
        case F32: return trellis_columns<S, K, F32>(w, begin, end, to, stride);
        case BF16: return trellis_columns<S, K, BF16>(w, begin, end, to, stride);
        default: return trellis_columns<S, K, F16>(w, begin, end, to, stride);
    }
}

template <class S>
void trellis_dequantize(const Trellis& w, int64_t begin, int64_t end, int dtype, void* out, int64_t stride) {
    switch (w.bits) {
        case 1: return trellis_rows<S, 1>(w, begin, end, dtype, out, stride);
        case 2: return trellis_rows<S, 2>(w, begin, end, dtype, out, stride);
        case 3: return trellis_rows<S, 3>(w, begin, end, dtype, out, stride);
        case 4: return trellis_rows<S, 4>(w, begin, end, dtype, out, stride);
        case 5: return trellis_rows<S, 5>(w, begin, end, dtype, out, stride);
        default: return trellis_rows<S, 6>(w, begin, end, dtype, out, stride);
    }
}

template <class S>
constexpr Tier make_tier(const char* name) {
    return Tier{name,
                &quantize<S>,
                &order_of<S>,
                &linear<S>,
                &dequantize<S>,
                &widen<S>,
                &side_by_side,
                &sparse<S>,
                &rotate<S, false>,
                &rotate<S, true>,
                &quantize_words<S>,
                &trellis_linear<S>,
                &trellis_dequantize<S>,
                &read<S>};
}

}  // namespace
}  // namespace requant

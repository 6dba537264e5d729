// The trellis kind: weights are windows of L bits in circular strings of 128 K bits, in coordinates rotated by block
// Hadamard transforms (format/SPEC.md, section 4). Written once over a tier, like tier.h, and under the same rules.
//
// A tile is 16 K bytes, has as many rows as an output block and runs down its columns, so that 16 consecutive windows
// are 16 output rows, one lane each, and meet one broadcast activation.
//
// The tier S provides windows<K>(bytes): lane i holds the 32 bits from bit i K of the bytes on, of which the lowest L
// are the window; it reads 16 bytes.
#pragma once

namespace requant {
namespace {

constexpr int WIDTH = 16;
typedef float Floats __attribute__((vector_size(64), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4)));

REQUANT_INLINE Floats load16(const float* p) {
    Floats out;
    __builtin_memcpy(&out, p, sizeof out);
    return out;
}

REQUANT_INLINE void store16(float* p, const Floats& value) { __builtin_memcpy(p, &value, sizeof value); }

// ---- decoding ------------------------------------------------------------------------------------------------

// 16 values: the byte sums of state * 0x83DCD12D, less their mean.
REQUANT_INLINE Floats decode(const Words& windows, uint32_t mask) {
    const Words product = (windows & mask) * 0x83DCD12Du;
    const Words pairs = (product & 0x00ff00ffu) + ((product >> 8) & 0x00ff00ffu);
    const Ints sum = Ints((pairs & 0xffffu) + (pairs >> 16)) - 510;
    return __builtin_convertvector(sum, Floats);
}

// A tile, then its first bytes once more: the last windows run over the end.
struct Unrolled {
    uint8_t bytes[TILE * 6 / 8 + WIDTH];
};

template <int K>
REQUANT_INLINE void unroll(const uint8_t* tile, Unrolled& out) {
    __builtin_memcpy(out.bytes, tile, 16 * K);
    __builtin_memcpy(out.bytes + 16 * K, tile, WIDTH);
}

// Orthogonal up to a factor that the signs carry.
REQUANT_INLINE void hadamard(float* x, int64_t block) {
    for (int64_t width = 1; width < block; width *= 2)
        for (int64_t at = 0; at < block; at += 2 * width)
            for (int64_t i = at; i < at + width; ++i) {
                const float a = x[i], b = x[i + width];
                x[i] = a + b;
                x[i + width] = a - b;
            }
}

template <class S, class Index>
REQUANT_INLINE float trellis_sparse_dot(const Trellis& w, int64_t row, const float* x) {
    const Index* columns = static_cast<const Index*>(w.indices);
    float sum = 0;
    for (int64_t e = w.indptr[row]; e < w.indptr[row + 1]; ++e) sum += S::half_to_float(w.values[e]) * x[columns[e]];
    return sum;
}

// out [batch, rows] of row blocks begin ... end - 1: rotated back, residual included. x is as given, rotated is
// x · signs through the Hadamard transform; both [batch, columns]. sums: [batch][2][block_out] of scratch.
template <class S, int K>
void trellis_linear(const Trellis& w, const float* x, const float* rotated, int64_t batch, int64_t begin,
                          int64_t end, float* out, float* sums) {
    const uint32_t mask = (1u << w.state_bits) - 1;
    const int64_t size = w.block_out, tile_columns = TILE / size;
    const int64_t tiles = w.columns / tile_columns, groups = w.columns / w.block_in;
    const int64_t tiles_in_group = w.block_in / tile_columns;
    for (int64_t block = begin; block < end; ++block) {
        __builtin_memset(sums, 0, sizeof(float) * size_t(2 * batch * size));
        const uint8_t* tile = w.codes + block * tiles * 16 * K;
        for (int64_t g = 0; g < groups; ++g) {
            const float scale = S::half_to_float(w.scales[block * groups + g]);
            float* part = sums + batch * size;
            for (int64_t t = 0; t < tiles_in_group; ++t, tile += 16 * K) {
                __builtin_prefetch(tile + 1024);
                Unrolled string;
                unroll<K>(tile, string);
                const int64_t first = g * w.block_in + t * tile_columns;
#pragma GCC unroll 8
                for (int v = 0; v < TILE / WIDTH; ++v) {
                    const Floats value = decode(S::template windows<K>(string.bytes + v * 2 * K), mask);
                    const int64_t column = v * WIDTH / size, row = v * WIDTH % size;
                    for (int64_t m = 0; m < batch; ++m) {
                        float* to = part + m * size + row;
                        store16(to, load16(to) + value * rotated[m * w.columns + first + column]);
                    }
                }
            }
            for (int64_t i = 0; i < batch * size; i += WIDTH) {
                store16(sums + i, load16(sums + i) + load16(part + i) * scale);
                store16(part + i, Floats{});
            }
        }
        for (int64_t m = 0; m < batch; ++m) {
            float* sum = sums + m * size;
            hadamard(sum, size);
            for (int64_t r = 0; r < size; ++r) {
                const int64_t row = block * size + r;
                float y = sum[r] * w.signs_out[row];
                if (w.indptr)
                    y += w.wide_indices ? trellis_sparse_dot<S, int32_t>(w, row, x + m * w.columns)
                                        : trellis_sparse_dot<S, uint16_t>(w, row, x + m * w.columns);
                out[m * w.rows + row] = y;
            }
        }
    }
}

// Rotated weights, rows of the blocks begin ... end - 1: out float32 [.., columns], from row block `begin` on.
template <class S, int K>
void trellis_dequantize(const Trellis& w, int64_t begin, int64_t end, float* out) {
    const uint32_t mask = (1u << w.state_bits) - 1;
    const int64_t size = w.block_out, tile_columns = TILE / size;
    const int64_t tiles = w.columns / tile_columns, groups = w.columns / w.block_in;
    for (int64_t block = begin; block < end; ++block)
        for (int64_t t = 0; t < tiles; ++t) {
            Unrolled string;
            unroll<K>(w.codes + (block * tiles + t) * 16 * K, string);
            const float scale = S::half_to_float(w.scales[block * groups + t * tile_columns / w.block_in]);
            for (int v = 0; v < TILE / WIDTH; ++v) {
                float values[WIDTH];
                store16(values, decode(S::template windows<K>(string.bytes + v * 2 * K), mask) * scale);
                const int64_t column = t * tile_columns + v * WIDTH / size;
                const int64_t row = (block - begin) * size + v * WIDTH % size;
                for (int i = 0; i < WIDTH; ++i) out[(row + i) * w.columns + column] = values[i];
            }
        }
}

template <class S>
constexpr TrellisTier make_trellis_tier() {
    return TrellisTier{{&trellis_linear<S, 1>, &trellis_linear<S, 2>, &trellis_linear<S, 3>, &trellis_linear<S, 4>,
                        &trellis_linear<S, 5>, &trellis_linear<S, 6>},
                       {&trellis_dequantize<S, 1>, &trellis_dequantize<S, 2>, &trellis_dequantize<S, 3>,
                        &trellis_dequantize<S, 4>, &trellis_dequantize<S, 5>, &trellis_dequantize<S, 6>}};
}

}  // namespace
}  // namespace requant

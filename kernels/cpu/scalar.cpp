// The portable tier: no intrinsics. Fixed-size loops that the compiler turns into whatever vectors the base
// instruction set has.
#include <cstddef>

#define REQUANT_UNROLL(times)  // without vectors to keep busy the code would only grow

#include "kernels.h"
#include "tier.h"
#include "trellis.h"

namespace requant {
namespace {

struct Scalar {
    static constexpr int rows = 1;
    static constexpr bool splits_bytes = false;
    static constexpr bool words = false;
    static constexpr int word_lookup_bits = 0;
    typedef uint8_t Bytes __attribute__((vector_size(16)));
    typedef uint16_t Shorts __attribute__((vector_size(16)));
    typedef int32_t Ints __attribute__((vector_size(16)));
    typedef float Floats __attribute__((vector_size(16)));

    static REQUANT_INLINE Shorts shorts(Bytes v) { return Shorts(v); }
    static REQUANT_INLINE Bytes bytes(Shorts v) { return Bytes(v); }
    static REQUANT_INLINE Bytes splat_byte(uint8_t v) { return Bytes{} + v; }
    static REQUANT_INLINE Bytes load(const uint8_t* p) {
        Bytes out;
        __builtin_memcpy(&out, p, sizeof out);
        return out;
    }
    static REQUANT_INLINE Bytes repeat(const int8_t* p) { return load(reinterpret_cast<const uint8_t*>(p)); }
    static REQUANT_INLINE Bytes widen(const uint8_t* p) { return Row::widen(p); }
    static REQUANT_INLINE Bytes lookup(Bytes table, Bytes code) { return __builtin_shuffle(table, code); }

    template <int MAX>
    struct Dot {
        using Sums = Ints;
        static REQUANT_INLINE Sums none() { return Ints{}; }
        static REQUANT_INLINE Sums add(Sums sum, Bytes weight, Bytes x) {
            for (int i = 0; i < 16; ++i) sum[i / 4] += int32_t(weight[i]) * int8_t(x[i]);
            return sum;
        }
        static REQUANT_INLINE Ints of(Sums sum) { return sum; }
    };

    static constexpr int held = 4;
    static REQUANT_INLINE Ints shifted_plus(Ints a, Ints b) { return a * 256 + b; }
    static REQUANT_INLINE Floats floats(Ints v) { return __builtin_convertvector(v, Floats); }
    static REQUANT_INLINE Floats splat(float v) { return Floats{v, v, v, v}; }
    struct Tile {
        float row[TILE_ROWS];
    };
    static REQUANT_INLINE Tile tile_halves(const uint16_t* p) {
        Tile out;
        for (int r = 0; r < TILE_ROWS; ++r) out.row[r] = half_to_float(p[r]);
        return out;
    }
    static REQUANT_INLINE Tile tile_bytes(const uint8_t* p) {
        Tile out;
        for (int r = 0; r < TILE_ROWS; ++r) out.row[r] = float(p[r]);
        return out;
    }
    static REQUANT_INLINE Tile tile_splat(float v) {
        Tile out;
        for (float& row : out.row) row = v;
        return out;
    }
    static REQUANT_INLINE Tile tile_mul(Tile a, float b) {
        for (float& row : a.row) row *= b;
        return a;
    }
    static REQUANT_INLINE Tile tile_fma(const Tile& a, const Tile& b, Tile c) {
        for (int r = 0; r < TILE_ROWS; ++r) c.row[r] += a.row[r] * b.row[r];
        return c;
    }
    static constexpr int tiles = 16;
    static REQUANT_INLINE Tile tile_load(const float* p) {
        Tile out;
        __builtin_memcpy(out.row, p, sizeof out);
        return out;
    }
    static REQUANT_INLINE void tile_store(const Tile& tile, float* out) { __builtin_memcpy(out, tile.row, sizeof tile); }
    static REQUANT_INLINE Floats spread(const Tile& tile, int n) { return splat(tile.row[n]); }
    static REQUANT_INLINE Floats mul(Floats a, Floats b) { return a * b; }
    static REQUANT_INLINE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
    static REQUANT_INLINE void totals(Floats v, float* out) { *out = (v[0] + v[1]) + (v[2] + v[3]); }
    template <class Index>
    static REQUANT_INLINE Tile sparse_step(Tile sum, const Index* columns, const uint16_t* values, const float* x) {
        for (int l = 0; l < STEP; ++l) sum.row[l] += half_to_float(values[l]) * x[columns[l]];
        return sum;
    }

    static constexpr int lanes = 4;
    typedef uint32_t Lanes __attribute__((vector_size(16)));
    template <int K>
    static REQUANT_INLINE Lanes windows(const uint8_t* p, int v) {
        Lanes out;
        for (int i = 0; i < lanes; ++i) {
            const int bit = (v * lanes + i) * K;
            uint32_t word;
            __builtin_memcpy(&word, p + bit / 8, 4);
            out[i] = word >> (bit % 8);
        }
        return out;
    }
    static REQUANT_INLINE Lanes hashed(Lanes windows, uint32_t mask) { return (windows & mask) * 0x83DCD12Du; }
    static REQUANT_INLINE Lanes byte_sums(Lanes words, Lanes other) {
        const Lanes pairs = (words & 0x00ff00ffu) + (words >> 8 & 0x00ff00ffu);
        return (pairs & 0xffffu) + (pairs >> 16) + (other << 16);
    }
    // two products for one: nothing is gained
    static constexpr int joined_from = 1 << 30;
    static REQUANT_INLINE Lanes dot_alone(Lanes sum, Lanes words, int16_t x) {
        return sum + byte_sums(words, Lanes{}) * uint32_t(x);
    }
    static constexpr int chains = 1, word_sums = 4;
    static REQUANT_INLINE Lanes plus(Lanes a, Lanes b) { return a + b; }
    static REQUANT_INLINE void add_scaled(float* to, Lanes sum, int32_t less, float factor) {
        for (int i = 0; i < lanes; ++i) to[i] += float(int32_t(sum[i] - uint32_t(less))) * factor;
    }

    static REQUANT_INLINE void affine(const uint8_t* codes, float zero, float scale, float* out) {
        for (int i = 0; i < STEP; ++i) out[i] = (float(codes[i]) - zero) * scale;
    }
    template <int BITS>
    static REQUANT_INLINE void entries(const uint8_t* codes, const float* table, float* out) {
        for (int i = 0; i < STEP; ++i) out[i] = table[codes[i]];
    }

    static REQUANT_INLINE float half_to_float(uint16_t half) {
        const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
        if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
        // the exponent is re-biased by a product with 2^112, which also normalises subnormal halves
        const float value = bits_to_float(magnitude << 13) * bits_to_float((254 - 15) << 23);
        return bits_to_float(sign | float_to_bits(value));
    }
    static REQUANT_INLINE uint16_t float_to_half(float value) {
        const uint32_t bits = float_to_bits(value), magnitude = bits & 0x7fffffffu;
        const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
        if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
        if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // 65520 and more round to infinity
        if (magnitude < 0x38800000u) {
            // below 2^-14: adding 1/2 leaves the subnormal half, rounded to even, in the lowest bits
            const float shifted = bits_to_float(magnitude) + 0.5f;
            return uint16_t(sign | (float_to_bits(shifted) - 0x3f000000u));
        }
        const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
        return uint16_t(sign | ((rounded - 0x38000000u) >> 13));
    }
    static void widen_half(const uint16_t* in, float* out, int64_t n) {
        for (int64_t i = 0; i < n; ++i) out[i] = half_to_float(in[i]);
    }
    static void widen_bfloat(const uint16_t* in, float* out, int64_t n) {
        for (int64_t i = 0; i < n; ++i) out[i] = bfloat_to_float(in[i]);
    }
    static void narrow_half(const float* in, uint16_t* out, int64_t n) {
        for (int64_t i = 0; i < n; ++i) out[i] = float_to_half(in[i]);
    }
    static void narrow_bfloat(const float* in, uint16_t* out, int64_t n) {
        for (int64_t i = 0; i < n; ++i) out[i] = float_to_bfloat(in[i]);
    }
};

}  // namespace

extern const Tier SCALAR_TIER = make_tier<Scalar>("scalar");

}  // namespace requant

// The AVX2 tier (with FMA and F16C).
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>

#pragma GCC target("avx2,fma,f16c")

#include "tier.h"
#include "trellis.h"

namespace requant {
namespace {

struct Avx2 {
    static constexpr int rows = 2;
    static constexpr bool splits_bytes = true;  // products of two weights of 8 bits leave 16 bits
    static constexpr bool words = true;         // cheaper than products of bytes that have to be widened one by one
    static constexpr int word_lookup_bits = 0;
    using Bytes = __m256i;
    using Ints = __m256i;
    using Floats = __m256;
    typedef uint16_t Shorts __attribute__((vector_size(32)));

    static REQUANT_INLINE Shorts shorts(Bytes v) { return Shorts(v); }
    static REQUANT_INLINE Bytes bytes(Shorts v) { return Bytes(v); }
    static REQUANT_INLINE Bytes splat_byte(uint8_t v) { return _mm256_set1_epi8(char(v)); }
    static REQUANT_INLINE Bytes load(const uint8_t* p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    static REQUANT_INLINE Bytes repeat(const int8_t* p) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static REQUANT_INLINE Bytes widen(const uint8_t* p) {
        return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static REQUANT_INLINE Bytes lookup(Bytes table, Bytes code) { return _mm256_shuffle_epi8(table, code); }

    // Two neighbouring products in 16 bits: of 4-bit weights, all steps of a block fit there.
    template <int MAX>
    struct Dot {
        using Sums = __m256i;
        static REQUANT_INLINE Sums none() { return _mm256_setzero_si256(); }
        static REQUANT_INLINE Ints pairs(Sums v) { return _mm256_madd_epi16(v, _mm256_set1_epi16(1)); }
        static REQUANT_INLINE Sums add(Sums sum, Bytes weight, Bytes x) {
            static_assert(MAX <= 127, "products would saturate");
            const __m256i products = _mm256_maddubs_epi16(weight, x);
            return MAX <= 15 ? _mm256_add_epi16(sum, products) : _mm256_add_epi32(sum, pairs(products));
        }
        static REQUANT_INLINE Ints of(Sums sum) { return MAX <= 15 ? pairs(sum) : sum; }
    };

    static REQUANT_INLINE Bytes interleave_low(Bytes a, Bytes b) { return _mm256_unpacklo_epi8(a, b); }
    static REQUANT_INLINE Bytes interleave_high(Bytes a, Bytes b) { return _mm256_unpackhi_epi8(a, b); }
    static REQUANT_INLINE Ints dot_words(Ints sum, Bytes weight, Bytes x) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(weight, x));
    }
    static REQUANT_INLINE void join(Bytes& upper, Bytes& lower) {
        const __m256i bit = _mm256_and_si256(_mm256_slli_epi16(upper, 7), _mm256_set1_epi8(-128));
        const __m256i rest = _mm256_and_si256(_mm256_srli_epi16(upper, 1), _mm256_set1_epi8(63));
        lower = _mm256_or_si256(lower, bit);
        upper = _mm256_sub_epi8(rest, _mm256_set1_epi8(32));
    }

    static constexpr int held = 4;
    static REQUANT_INLINE Ints shifted_plus(Ints a, Ints b) { return _mm256_add_epi32(_mm256_slli_epi32(a, 8), b); }
    static REQUANT_INLINE Floats floats(Ints v) { return _mm256_cvtepi32_ps(v); }
    static REQUANT_INLINE Floats splat(float v) { return _mm256_set1_ps(v); }
    struct Tile {
        __m256 half[2];
    };
    static REQUANT_INLINE Tile tile_halves(const uint16_t* p) {
        const __m128i* eight = reinterpret_cast<const __m128i*>(p);
        return {{_mm256_cvtph_ps(_mm_loadu_si128(eight)), _mm256_cvtph_ps(_mm_loadu_si128(eight + 1))}};
    }
    static REQUANT_INLINE Tile tile_bytes(const uint8_t* p) {
        const auto eight = [](const uint8_t* from) {
            const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
            return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
        };
        return {{eight(p), eight(p + 8)}};
    }
    static REQUANT_INLINE Tile tile_splat(float v) { return {{splat(v), splat(v)}}; }
    static REQUANT_INLINE Tile tile_mul(const Tile& a, float b) {
        return {{_mm256_mul_ps(a.half[0], splat(b)), _mm256_mul_ps(a.half[1], splat(b))}};
    }
    static REQUANT_INLINE Tile tile_fma(const Tile& a, const Tile& b, const Tile& c) {
        return {{fma(a.half[0], b.half[0], c.half[0]), fma(a.half[1], b.half[1], c.half[1])}};
    }
    static constexpr int tiles = 4;
    static REQUANT_INLINE Tile tile_load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
    static REQUANT_INLINE void tile_store(const Tile& tile, float* out) {
        _mm256_storeu_ps(out, tile.half[0]);
        _mm256_storeu_ps(out + 8, tile.half[1]);
    }
    static REQUANT_INLINE Floats spread(const Tile& tile, int n) {
        const int first = n % 4 * 2;
        const __m256i rows = _mm256_set_m128i(_mm_set1_epi32(first + 1), _mm_set1_epi32(first));
        return _mm256_permutevar8x32_ps(tile.half[n / 4], rows);
    }
    static REQUANT_INLINE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static REQUANT_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static REQUANT_INLINE void totals(Floats v, float* out) {
        const __m256 pairs = _mm256_hadd_ps(v, v), all = _mm256_hadd_ps(pairs, pairs);
        out[0] = _mm256_cvtss_f32(all);
        out[1] = _mm_cvtss_f32(_mm256_extractf128_ps(all, 1));
    }
    template <class Index>
    static REQUANT_INLINE Tile sparse_step(const Tile& sum, const Index* columns, const uint16_t* values,
                                           const float* x) {
        return {{eight(columns, values, x, sum.half[0]), eight(columns + 8, values + 8, x, sum.half[1])}};
    }
    template <class Index>
    static REQUANT_INLINE Floats eight(const Index* columns, const uint16_t* values, const float* x, Floats sum) {
        const __m256 value = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
        return _mm256_fmadd_ps(_mm256_set_m128(four(columns + 4, x), four(columns, x)), value, sum);
    }
    // a gather takes longer than single loads, many times as long with a microcode against Downfall
    template <class Index>
    static REQUANT_INLINE __m128 four(const Index* at, const float* x) {
        return _mm_set_ps(x[at[3]], x[at[2]], x[at[1]], x[at[0]]);
    }

    static constexpr int lanes = 8;
    using Lanes = __m256i;
    // byte j of a lane comes from byte i K / 8 + j, i being the window of the lane
    template <int K>
    static REQUANT_INLINE Lanes windows(const uint8_t* p, int v) {
        const __m256i bytes = repeat(reinterpret_cast<const int8_t*>(p));
        const __m256i lane = _mm256_add_epi32(_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0), _mm256_set1_epi32(lanes * v));
        const __m256i bit = _mm256_mullo_epi32(lane, _mm256_set1_epi32(K));
        const __m256i first = _mm256_mullo_epi32(_mm256_srli_epi32(bit, 3), _mm256_set1_epi32(0x01010101));
        const __m256i from = _mm256_add_epi8(first, _mm256_set1_epi32(0x03020100));
        const __m256i shift = _mm256_and_si256(bit, _mm256_set1_epi32(7));
        return _mm256_srlv_epi32(_mm256_shuffle_epi8(bytes, from), shift);
    }
    static REQUANT_INLINE Lanes hashed(Lanes windows, uint32_t mask) {
        return _mm256_mullo_epi32(_mm256_and_si256(windows, _mm256_set1_epi32(int(mask))),
                                  _mm256_set1_epi32(int(0x83DCD12Du)));
    }
    static REQUANT_INLINE Lanes byte_pairs(Lanes words) { return _mm256_maddubs_epi16(words, _mm256_set1_epi8(1)); }
    static REQUANT_INLINE Lanes byte_sums(Lanes words, Lanes other) {
        const __m256i sums = _mm256_madd_epi16(byte_pairs(words), _mm256_set1_epi16(1));
        return _mm256_add_epi32(_mm256_slli_epi32(other, 16), sums);
    }
    static constexpr int joined_from = 2;
    static REQUANT_INLINE Lanes dot_alone(Lanes sum, Lanes words, int16_t x) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(byte_pairs(words), _mm256_set1_epi16(x)));
    }
    static REQUANT_INLINE Lanes dot(Lanes sum, Lanes pairs, int32_t x) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi32(x)));
    }
    static constexpr int chains = 1, word_sums = 4;
    static REQUANT_INLINE Lanes plus(Lanes a, Lanes b) { return _mm256_add_epi32(a, b); }
    static REQUANT_INLINE void add_scaled(float* to, Lanes sum, int32_t less, float factor) {
        const __m256 total = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, _mm256_set1_epi32(less)));
        _mm256_storeu_ps(to, _mm256_fmadd_ps(total, _mm256_set1_ps(factor), _mm256_loadu_ps(to)));
    }

    static REQUANT_INLINE __m256i eight_codes(const uint8_t* codes) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    }
    static REQUANT_INLINE void affine(const uint8_t* codes, float zero, float scale, float* out) {
        for (int i = 0; i < STEP; i += 8) {
            const __m256 steps = _mm256_sub_ps(_mm256_cvtepi32_ps(eight_codes(codes + i)), splat(zero));
            _mm256_storeu_ps(out + i, _mm256_mul_ps(steps, splat(scale)));
        }
    }
    template <int BITS>
    static REQUANT_INLINE void entries(const uint8_t* codes, const float* table, float* out) {
        for (int i = 0; i < STEP; i += 8) {
            const __m256i code = eight_codes(codes + i);
            __m256 entry = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), code);
            if (BITS > 3) {
                const __m256 upper = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), code);
                entry = _mm256_blendv_ps(entry, upper, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
            }
            _mm256_storeu_ps(out + i, entry);
        }
    }

    static REQUANT_INLINE float half_to_float(uint16_t v) { return _cvtsh_ss(v); }
    static REQUANT_INLINE uint16_t float_to_half(float v) { return _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT); }

    static REQUANT_INLINE void widen_half(const uint16_t* in, float* out, int64_t n) {
        int64_t i = 0;
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
        for (; i < n; ++i) out[i] = half_to_float(in[i]);
    }
    static REQUANT_INLINE void widen_bfloat(const uint16_t* in, float* out, int64_t n) {
        for (int64_t i = 0; i < n; ++i) out[i] = bfloat_to_float(in[i]);
    }
    static REQUANT_INLINE void narrow_half(const float* in, uint16_t* out, int64_t n) {
        int64_t i = 0;
        for (; i + 8 <= n; i += 8)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                             _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
        for (; i < n; ++i) out[i] = float_to_half(in[i]);
    }
    // a NaN is quiet and has no payload here, so that rounding needs no care for it (and the loop vectorises)
    static REQUANT_INLINE void narrow_bfloat(const float* in, uint16_t* out, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t bits = float_to_bits(in[i]);
            out[i] = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
        }
    }
};

}  // namespace

extern const Tier AVX2_TIER = make_tier<Avx2>("avx2");

}  // namespace requant
#endif

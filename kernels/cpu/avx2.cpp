// The AVX2 tier (with FMA and F16C). One vector is 8 columns; a segment is read in two halves of 8 lanes. A
// permutation reaches 8 table entries, so that 4-bit codes take two of them and a blend on the fourth bit.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>

#pragma GCC target("avx2,fma,f16c")

#include "tier.h"
#include "trellis.h"

namespace requant {
namespace {

template <int BITS>
struct Coder256;

struct Avx2 {
    static constexpr int width = 8, row_tile = 2, batch_tile = 2;
    using vec = __m256;
    template <int BITS>
    using Coder = Coder256<BITS>;

    // byte j of lane i comes from byte i K / 8 + j
    template <int K>
    static REQUANT_INLINE Words windows(const uint8_t* p) {
        const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        Words out;
        for (int half = 0; half < 2; ++half) {
            const __m256i lane = _mm256_add_epi32(_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0), _mm256_set1_epi32(8 * half));
            const __m256i bit = _mm256_mullo_epi32(lane, _mm256_set1_epi32(K));
            const __m256i first = _mm256_mullo_epi32(_mm256_srli_epi32(bit, 3), _mm256_set1_epi32(0x01010101));
            const __m256i from = _mm256_add_epi8(first, _mm256_set1_epi32(0x03020100));
            const __m256i shift = _mm256_and_si256(bit, _mm256_set1_epi32(7));
            const __m256i words = _mm256_srlv_epi32(_mm256_shuffle_epi8(bytes, from), shift);
            __builtin_memcpy(reinterpret_cast<char*>(&out) + 32 * half, &words, 32);
        }
        return out;
    }

    static REQUANT_INLINE vec zero() { return _mm256_setzero_ps(); }
    static REQUANT_INLINE vec load(const float* p) { return _mm256_loadu_ps(p); }
    static REQUANT_INLINE void store(float* p, vec v) { _mm256_storeu_ps(p, v); }
    static REQUANT_INLINE vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
    static REQUANT_INLINE float sum(vec v) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 two = _mm_hadd_ps(four, four);
        return _mm_cvtss_f32(_mm_hadd_ps(two, two));
    }
    static REQUANT_INLINE void sum4(vec a, vec b, vec c, vec d, float* out) {
        out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
    }

    static REQUANT_INLINE float half_to_float(uint16_t v) { return _cvtsh_ss(v); }
    static REQUANT_INLINE uint16_t float_to_half(float v) { return _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT); }

    static REQUANT_INLINE void widen_half(const uint16_t* in, float* out, int64_t n) {
        int64_t i = 0;
        for (; i + 8 <= n; i += 8)
            store(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
        for (; i < n; ++i) out[i] = half_to_float(in[i]);
    }
    static REQUANT_INLINE void widen_bfloat(const uint16_t* in, float* out, int64_t n) {
        for (int64_t i = 0; i < n; ++i) out[i] = bfloat_to_float(in[i]);
    }
    static REQUANT_INLINE void narrow_half(const float* in, uint16_t* out, int64_t n) {
        int64_t i = 0;
        for (; i + 8 <= n; i += 8)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                             _mm256_cvtps_ph(load(in + i), _MM_FROUND_TO_NEAREST_INT));
        for (; i < n; ++i) out[i] = float_to_half(in[i]);
    }
    // weights are finite, so that rounding needs no care for NaN (and the loop vectorises)
    static REQUANT_INLINE void narrow_bfloat(const float* in, uint16_t* out, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t bits = float_to_bits(in[i]);
            out[i] = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
        }
    }
};

template <int BITS>
struct Coder256 {
    struct Part {
        __m256 low, high;  // entries 0-7 and, for 4 bits, 8-15; repeated where 2^BITS is less than 8
    };
    using Raw = __m256i;

    static REQUANT_INLINE Part uniform(float scale, float zero) {
        constexpr int m = (1 << BITS) - 1;
        const __m256 s = _mm256_set1_ps(scale), z = _mm256_set1_ps(zero);
        const __m256 low = _mm256_setr_ps(0, 1, 2, 3, 4 & m, 5 & m, 6 & m, 7 & m);
        Part part;
        part.low = _mm256_mul_ps(_mm256_sub_ps(low, z), s);
        if constexpr (BITS == 4)
            part.high = _mm256_mul_ps(_mm256_sub_ps(_mm256_setr_ps(8, 9, 10, 11, 12, 13, 14, 15), z), s);
        else
            part.high = part.low;
        return part;
    }
    static REQUANT_INLINE Part lut(const uint16_t* table) {
        if constexpr (BITS == 2) {
            int64_t four;
            __builtin_memcpy(&four, table, 8);
            const __m256 all = _mm256_cvtph_ps(_mm_set1_epi64x(four));
            return {all, all};
        } else {
            const __m128i* halves = reinterpret_cast<const __m128i*>(table);
            const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128(halves));
            if constexpr (BITS == 4) return {low, _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
            return {low, low};
        }
    }
    static REQUANT_INLINE Raw load(const uint8_t* p, int half) {
        const __m256i* at = reinterpret_cast<const __m256i*>(p + half * 8 * BITS);
        if constexpr (BITS == 4) {
            return _mm256_loadu_si256(at);
        } else if constexpr (BITS == 3) {
            const __m256i quarter = _mm256_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5);
            const __m256i apart = _mm256_broadcastsi128_si256(
                _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
            return _mm256_shuffle_epi8(_mm256_permutevar8x32_epi32(_mm256_loadu_si256(at), quarter), apart);
        } else {
            return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
        }
    }
    static REQUANT_INLINE __m256 weight(Part part, Raw raw, int j) {
        const __m256i index = __m256i((__v8su)raw >> (BITS * j));
        const __m256 low = _mm256_permutevar8x32_ps(part.low, index);
        if constexpr (BITS != 4) return low;
        const __m256 high = _mm256_permutevar8x32_ps(part.high, index);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    }
};

template <>
struct Coder256<8> {
    struct Part {
        __m256 scale, zero;
    };
    struct Raw {
        const uint8_t* p;
    };

    static REQUANT_INLINE Part uniform(float scale, float zero) {
        return {_mm256_set1_ps(scale), _mm256_set1_ps(zero)};
    }
    static REQUANT_INLINE Part lut(const uint16_t*) { return Part{}; }
    static REQUANT_INLINE Raw load(const uint8_t* p, int half) { return {p + half * 8}; }
    static REQUANT_INLINE __m256 weight(Part part, Raw raw, int j) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(raw.p + j * LANES));
        const __m256 code = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
        return _mm256_mul_ps(_mm256_sub_ps(code, part.zero), part.scale);
    }
};

}  // namespace

extern const Tier AVX2_TIER = make_tier<Avx2>("avx2");
extern const TrellisTier AVX2_TRELLIS = make_trellis_tier<Avx2>();

}  // namespace requant
#endif

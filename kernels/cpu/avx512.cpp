// The AVX-512 tier: F, BW, DQ and VL, with F16C for half conversions. One vector is 16 columns of one row, and
// a permutation of a 16-entry table turns 4-bit indices into float32 weights; it ignores the index bits above
// the fourth, so that codes need no mask.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "tier.h"
#include "trellis.h"

namespace requant {
namespace {

template <int BITS>
struct Coder512;

struct Avx512 {
    static constexpr int width = 16, row_tile = 4, batch_tile = 4;
    using vec = __m512;
    template <int BITS>
    using Coder = Coder512<BITS>;

    // byte j of lane i comes from byte i K / 8 + j
    template <int K>
    static REQUANT_INLINE Words windows(const uint8_t* p) {
        const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i bit = _mm512_mullo_epi32(lane, _mm512_set1_epi32(K));
        const __m512i first = _mm512_mullo_epi32(_mm512_srli_epi32(bit, 3), _mm512_set1_epi32(0x01010101));
        const __m512i from = _mm512_add_epi8(first, _mm512_set1_epi32(0x03020100));
        const __m512i shift = _mm512_and_si512(bit, _mm512_set1_epi32(7));
        return Words(_mm512_srlv_epi32(_mm512_shuffle_epi8(bytes, from), shift));
    }

    static REQUANT_INLINE vec zero() { return _mm512_setzero_ps(); }
    static REQUANT_INLINE vec load(const float* p) { return _mm512_loadu_ps(p); }
    static REQUANT_INLINE void store(float* p, vec v) { _mm512_storeu_ps(p, v); }
    static REQUANT_INLINE vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }

    static REQUANT_INLINE __m256 fold(vec v) {
        return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    }
    // one tree of additions for sum and sum4, so that a row's result does not depend on its tile
    static REQUANT_INLINE void sum4(vec a, vec b, vec c, vec d, float* out) {
        const __m256 ab = _mm256_hadd_ps(fold(a), fold(b)), cd = _mm256_hadd_ps(fold(c), fold(d));
        const __m256 abcd = _mm256_hadd_ps(ab, cd);
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
    }
    static REQUANT_INLINE float sum(vec v) {
        float out[4];
        sum4(v, v, v, v, out);
        return out[0];
    }

    static REQUANT_INLINE float half_to_float(uint16_t v) { return _cvtsh_ss(v); }
    static REQUANT_INLINE uint16_t float_to_half(float v) { return _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT); }
    static REQUANT_INLINE __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : __mmask16((1u << n) - 1); }

    static REQUANT_INLINE void widen_half(const uint16_t* in, float* out, int64_t n) {
        for (int64_t i = 0; i < n; i += 16) {
            const __mmask16 mask = first(n - i);
            _mm512_mask_storeu_ps(out + i, mask, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, in + i)));
        }
    }
    static REQUANT_INLINE void widen_bfloat(const uint16_t* in, float* out, int64_t n) {
        for (int64_t i = 0; i < n; i += 16) {
            const __mmask16 mask = first(n - i);
            const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, in + i));
            _mm512_mask_storeu_ps(out + i, mask, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
        }
    }
    static REQUANT_INLINE void narrow_half(const float* in, uint16_t* out, int64_t n) {
        for (int64_t i = 0; i < n; i += 16) {
            const __mmask16 mask = first(n - i);
            const __m512 v = _mm512_maskz_loadu_ps(mask, in + i);
            _mm256_mask_storeu_epi16(out + i, mask, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
        }
    }
    // weights are finite, so that rounding needs no care for NaN
    static REQUANT_INLINE void narrow_bfloat(const float* in, uint16_t* out, int64_t n) {
        for (int64_t i = 0; i < n; i += 16) {
            const __mmask16 mask = first(n - i);
            const __m512i v = _mm512_castps_si512(_mm512_maskz_loadu_ps(mask, in + i));
            const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(v, 16), _mm512_set1_epi32(1));
            const __m512i up = _mm512_add_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(0x7fff)), odd);
            _mm256_mask_storeu_epi16(out + i, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
        }
    }
};

template <int BITS>
struct Coder512 {
    using Part = __m512;  // entry i belongs to code i mod 2^BITS
    using Raw = __m512i;  // the eight codes of a lane in its lowest 8 * BITS bits

    static REQUANT_INLINE Part uniform(float scale, float zero) {
        constexpr int m = (1 << BITS) - 1;
        const __m512 code = _mm512_setr_ps(0 & m, 1 & m, 2 & m, 3 & m, 4 & m, 5 & m, 6 & m, 7 & m, 8 & m, 9 & m,
                                           10 & m, 11 & m, 12 & m, 13 & m, 14 & m, 15 & m);
        return _mm512_mul_ps(_mm512_sub_ps(code, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
    }
    static REQUANT_INLINE Part lut(const uint16_t* table) {
        if constexpr (BITS == 4) {
            return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
        } else if constexpr (BITS == 3) {
            const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
            return _mm512_cvtph_ps(_mm256_broadcastsi128_si256(half));
        } else {
            int64_t four;
            __builtin_memcpy(&four, table, 8);
            return _mm512_cvtph_ps(_mm256_set1_epi64x(four));
        }
    }
    static REQUANT_INLINE Raw load(const uint8_t* p, int) {
        if constexpr (BITS == 4) {
            return _mm512_loadu_si512(p);
        } else if constexpr (BITS == 3) {
            // three bytes a lane: twelve to each 128-bit quarter, then apart
            const __m512i quarter = _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
            const __m512i apart = _mm512_broadcast_i32x4(
                _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
            return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(quarter, _mm512_loadu_si512(p)), apart);
        } else {
            return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        }
    }
    static REQUANT_INLINE __m512 weight(Part part, Raw raw, int j) {
        const __m512i index = __m512i((__v16su)raw >> (BITS * j));
        return _mm512_permutexvar_ps(index, part);
    }
};

template <>
struct Coder512<8> {
    struct Part {
        __m512 scale, zero;
    };
    using Raw = const uint8_t*;

    static REQUANT_INLINE Part uniform(float scale, float zero) {
        return {_mm512_set1_ps(scale), _mm512_set1_ps(zero)};
    }
    static REQUANT_INLINE Part lut(const uint16_t*) { return Part{}; }
    static REQUANT_INLINE Raw load(const uint8_t* p, int) { return p; }
    static REQUANT_INLINE __m512 weight(Part part, Raw raw, int j) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(raw + j * LANES));
        const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
        return _mm512_mul_ps(_mm512_sub_ps(code, part.zero), part.scale);
    }
};

}  // namespace

extern const Tier AVX512_TIER = make_tier<Avx512>("avx512");
extern const TrellisTier AVX512_TRELLIS = make_trellis_tier<Avx512>();

}  // namespace requant
#endif

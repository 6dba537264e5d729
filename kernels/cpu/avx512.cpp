// The AVX-512 tier: F, BW, DQ, VL and VNNI, with F16C for half conversions.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")

#include "tier.h"
#include "trellis.h"

namespace requant {
namespace {

struct Avx512 {
    static constexpr int rows = 4;
    static constexpr bool splits_bytes = false;
    static constexpr bool words = true;  // two products of words for four of bytes
    static constexpr int word_lookup_bits = 3;
    using Bytes = __m512i;
    using Ints = __m512i;
    using Floats = __m512;
    typedef uint16_t Shorts __attribute__((vector_size(64)));

    static REQUANT_INLINE Shorts shorts(Bytes v) { return Shorts(v); }
    static REQUANT_INLINE Bytes bytes(Shorts v) { return Bytes(v); }
    static REQUANT_INLINE Bytes splat_byte(uint8_t v) { return _mm512_set1_epi8(char(v)); }
    static REQUANT_INLINE Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static REQUANT_INLINE Bytes repeat(const int8_t* p) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static REQUANT_INLINE Bytes widen(const uint8_t* p) {
        return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static REQUANT_INLINE Bytes lookup(Bytes table, Bytes code) { return _mm512_shuffle_epi8(table, code); }

    template <int MAX>
    struct Dot {
        using Sums = __m512i;
        static REQUANT_INLINE Sums none() { return _mm512_setzero_si512(); }
        static REQUANT_INLINE Sums add(Sums sum, Bytes weight, Bytes x) {
            return _mm512_dpbusd_epi32(sum, weight, x);
        }
        static REQUANT_INLINE Ints of(Sums sum) { return sum; }
    };

    static REQUANT_INLINE Bytes interleave_low(Bytes a, Bytes b) { return _mm512_unpacklo_epi8(a, b); }
    static REQUANT_INLINE Bytes interleave_high(Bytes a, Bytes b) { return _mm512_unpackhi_epi8(a, b); }
    // words 8 r + i of a table are the entries of row r
    static REQUANT_INLINE void lookup_words(Bytes table, Bytes code, Bytes& even, Bytes& odd) {
        const __m512i row = _mm512_set_epi64(0x1818181818181818, 0x1818181818181818, 0x1010101010101010,
                                             0x1010101010101010, 0x0808080808080808, 0x0808080808080808, 0, 0);
        const __m512i at = _mm512_or_si512(code, row);  // of a word, the lower byte
        even = _mm512_permutexvar_epi16(at, table);
        odd = _mm512_permutexvar_epi16(_mm512_srli_epi16(at, 8), table);
    }
    static REQUANT_INLINE Ints dot_words(Ints sum, Bytes weight, Bytes x) { return _mm512_dpwssd_epi32(sum, weight, x); }
    static REQUANT_INLINE void join(Bytes& upper, Bytes& lower) {
        const __m512i bit = _mm512_and_si512(_mm512_slli_epi16(upper, 7), _mm512_set1_epi8(-128));
        const __m512i rest = _mm512_and_si512(_mm512_srli_epi16(upper, 1), _mm512_set1_epi8(63));
        lower = _mm512_or_si512(lower, bit);
        upper = _mm512_sub_epi8(rest, _mm512_set1_epi8(32));
    }

    static constexpr int held = 16;
    static REQUANT_INLINE Ints shifted_plus(Ints a, Ints b) { return _mm512_add_epi32(_mm512_slli_epi32(a, 8), b); }
    static REQUANT_INLINE Floats floats(Ints v) { return _mm512_cvtepi32_ps(v); }
    static REQUANT_INLINE Floats splat(float v) { return _mm512_set1_ps(v); }
    using Tile = __m512;
    static REQUANT_INLINE Tile tile_halves(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static REQUANT_INLINE Tile tile_bytes(const uint8_t* p) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    }
    static REQUANT_INLINE Tile tile_splat(float v) { return splat(v); }
    static REQUANT_INLINE Tile tile_mul(Tile a, float b) { return mul(a, splat(b)); }
    static REQUANT_INLINE Tile tile_fma(Tile a, Tile b, Tile c) { return fma(a, b, c); }
    static constexpr int tiles = 16;
    static REQUANT_INLINE Tile tile_load(const float* p) { return _mm512_loadu_ps(p); }
    static REQUANT_INLINE void tile_store(Tile tile, float* out) { _mm512_storeu_ps(out, tile); }
    static REQUANT_INLINE Floats spread(Tile tile, int n) {
        const __m512i row = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
        return _mm512_permutexvar_ps(_mm512_add_epi32(row, _mm512_set1_epi32(4 * n)), tile);
    }
    static REQUANT_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static REQUANT_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static REQUANT_INLINE void totals(Floats v, float* out) {
        const __m512 pairs = _mm512_add_ps(v, _mm512_permute_ps(v, 0xb1));
        const __m512 all = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0x4e));
        const __m512i firsts = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
        _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, all)));
    }
    template <class Index>
    static REQUANT_INLINE Tile sparse_step(Tile sum, const Index* columns, const uint16_t* values, const float* x) {
        __m512 inputs = _mm512_castps128_ps512(four(columns, x));
        inputs = _mm512_insertf32x4(inputs, four(columns + 4, x), 1);
        inputs = _mm512_insertf32x4(inputs, four(columns + 8, x), 2);
        inputs = _mm512_insertf32x4(inputs, four(columns + 12, x), 3);
        return _mm512_fmadd_ps(inputs, tile_halves(values), sum);
    }
    // a gather takes longer than single loads, many times as long with a microcode against Downfall
    template <class Index>
    static REQUANT_INLINE __m128 four(const Index* at, const float* x) {
        return _mm_set_ps(x[at[3]], x[at[2]], x[at[1]], x[at[0]]);
    }

    static constexpr int lanes = 16;
    using Lanes = __m512i;
    // byte j of a lane comes from byte i K / 8 + j, i being the window of the lane
    template <int K>
    static REQUANT_INLINE Lanes windows(const uint8_t* p, int) {
        const __m512i bytes = repeat(reinterpret_cast<const int8_t*>(p));
        const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i bit = _mm512_mullo_epi32(lane, _mm512_set1_epi32(K));
        const __m512i first = _mm512_mullo_epi32(_mm512_srli_epi32(bit, 3), _mm512_set1_epi32(0x01010101));
        const __m512i from = _mm512_add_epi8(first, _mm512_set1_epi32(0x03020100));
        const __m512i shift = _mm512_and_si512(bit, _mm512_set1_epi32(7));
        return _mm512_srlv_epi32(_mm512_shuffle_epi8(bytes, from), shift);
    }
    static REQUANT_INLINE Lanes hashed(Lanes windows, uint32_t mask) {
        return _mm512_mullo_epi32(_mm512_and_si512(windows, _mm512_set1_epi32(int(mask))),
                                  _mm512_set1_epi32(int(0x83DCD12Du)));
    }
    static constexpr int joined_from = 1;
    static REQUANT_INLINE Lanes byte_sums(Lanes words, Lanes other) {
        return _mm512_dpbusd_epi32(_mm512_slli_epi32(other, 16), words, _mm512_set1_epi8(1));
    }
    static REQUANT_INLINE Lanes dot(Lanes sum, Lanes pairs, int32_t x) {
        return _mm512_dpwssd_epi32(sum, pairs, _mm512_set1_epi32(x));
    }
    static constexpr int chains = 4, word_sums = 16;
    static REQUANT_INLINE Lanes plus(Lanes a, Lanes b) { return _mm512_add_epi32(a, b); }
    static REQUANT_INLINE void add_scaled(float* to, Lanes sum, int32_t less, float factor) {
        const __m512 total = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(less)));
        _mm512_storeu_ps(to, _mm512_fmadd_ps(total, _mm512_set1_ps(factor), _mm512_loadu_ps(to)));
    }

    static REQUANT_INLINE __m512i sixteen(const uint8_t* codes) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    }
    static REQUANT_INLINE void affine(const uint8_t* codes, float zero, float scale, float* out) {
        const __m512 steps = _mm512_sub_ps(_mm512_cvtepi32_ps(sixteen(codes)), splat(zero));
        _mm512_storeu_ps(out, _mm512_mul_ps(steps, splat(scale)));
    }
    template <int BITS>
    static REQUANT_INLINE void entries(const uint8_t* codes, const float* table, float* out) {
        _mm512_storeu_ps(out, _mm512_permutexvar_ps(sixteen(codes), _mm512_loadu_ps(table)));
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
    // a NaN is quiet and has no payload here, so that rounding needs no care for it
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

}  // namespace

extern const Tier AVX512_TIER = make_tier<Avx512>("avx512");

}  // namespace requant
#endif

// The portable tier: no intrinsics. Fixed-size loops that the compiler turns into whatever vectors the base
// instruction set has.
#include <cstddef>

#include "kernels.h"
#include "tier.h"
#include "trellis.h"

namespace requant {
namespace {

typedef float Vector16 __attribute__((vector_size(64)));

template <int BITS>
struct CoderScalar;

struct Scalar {
    static constexpr int width = 16, row_tile = 1, batch_tile = 2;
    using vec = Vector16;
    template <int BITS>
    using Coder = CoderScalar<BITS>;

    template <int K>
    static REQUANT_INLINE Words windows(const uint8_t* p) {
        Words out;
        for (int i = 0; i < WIDTH; ++i) {
            uint32_t word;
            __builtin_memcpy(&word, p + i * K / 8, 4);
            out[i] = word >> (i * K % 8);
        }
        return out;
    }

    static REQUANT_INLINE vec zero() { return vec{}; }
    static REQUANT_INLINE vec load(const float* p) {
        vec out;
        __builtin_memcpy(&out, p, sizeof out);
        return out;
    }
    static REQUANT_INLINE void store(float* p, const vec& value) { __builtin_memcpy(p, &value, sizeof value); }
    static REQUANT_INLINE vec fma(const vec& a, const vec& b, const vec& c) { return c + a * b; }
    static float sum(const vec& in) {
        vec value = in;
        for (int half = 8; half; half /= 2)
            for (int i = 0; i < half; ++i) value[i] += value[i + half];
        return value[0];
    }
    static REQUANT_INLINE void sum4(const vec& a, const vec& b, const vec& c, const vec& d, float* out) {
        out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
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

template <int BITS>
struct CoderScalar {
    struct Part {
        float entry[1 << BITS];
    };
    struct Raw {
        uint32_t lane[16];
    };

    static REQUANT_INLINE Part uniform(float scale, float zero) {
        Part part;
        for (int i = 0; i < 1 << BITS; ++i) part.entry[i] = (float(i) - zero) * scale;
        return part;
    }
    static REQUANT_INLINE Part lut(const uint16_t* table) {
        Part part;
        for (int i = 0; i < 1 << BITS; ++i) part.entry[i] = Scalar::half_to_float(table[i]);
        return part;
    }
    static __attribute__((noinline)) Raw load(const uint8_t* p, int) {
        Raw raw;
        for (int i = 0; i < 16; ++i) {
            raw.lane[i] = 0;
            for (int b = 0; b < BITS; ++b) raw.lane[i] |= uint32_t(p[i * BITS + b]) << (8 * b);
        }
        return raw;
    }
    // one copy: the unrolled callers would multiply sixteen table look-ups by some hundred
    static __attribute__((noinline)) Vector16 weight(const Part& part, const Raw& raw, int j) {
        Vector16 out;
        for (int i = 0; i < 16; ++i) out[i] = part.entry[raw.lane[i] >> (BITS * j) & ((1 << BITS) - 1)];
        return out;
    }
};

template <>
struct CoderScalar<8> {
    struct Part {
        float scale, zero;
    };
    using Raw = const uint8_t*;

    static REQUANT_INLINE Part uniform(float scale, float zero) { return {scale, zero}; }
    static REQUANT_INLINE Part lut(const uint16_t*) { return Part{}; }
    static REQUANT_INLINE Raw load(const uint8_t* p, int) { return p; }
    static __attribute__((noinline)) Vector16 weight(Part part, Raw raw, int j) {
        Vector16 out;
        for (int i = 0; i < 16; ++i) out[i] = (float(raw[j * LANES + i]) - part.zero) * part.scale;
        return out;
    }
};

}  // namespace

extern const Tier SCALAR_TIER = make_tier<Scalar>("scalar");
extern const TrellisTier SCALAR_TRELLIS = make_trellis_tier<Scalar>();

}  // namespace requant

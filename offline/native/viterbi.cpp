// Trellis-coded quantization: the best closed path through a bitshift trellis, for many sequences at once.
//
// A sequence of n values is coded as a circular string of n K bits. State i is the window of L bits that starts at bit
// i K, least significant first, and stands for the value code[state]; hence state i + 1 = state i >> K | new << (L - K)
// with `new` the K bits that enter at the top. The circle closes: the last windows run over the end into the first
// bits, so nothing is stored but K bits a value (arXiv 2406.11235, tail-biting).
//
// The circle is closed as the paper does it, approximately: Viterbi on the sequence rotated by half finds good bits for
// the seam, and a second pass takes them as given. Several rotations can be tried; the best result is kept.
//
// Plain C ABI, no dependency; threads come from the OpenMP runtime that the process already uses.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#define INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define WITH_AVX2 __attribute__((target("avx2,fma")))
#endif

namespace {

constexpr int LANES = 16;
constexpr float UNREACHABLE = 1e30f;
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4)));

INLINE Floats load(const float* p) {
    Floats out;
    std::memcpy(&out, p, sizeof out);
    return out;
}

INLINE void store(float* p, const Floats& value) { std::memcpy(p, &value, sizeof value); }

INLINE Ints smaller(const Ints& a, const Ints& b) { return a < b ? a : b; }

// Minima of neighbours: 32 numbers in, 16 out.
INLINE Ints pairwise(const Ints& a, const Ints& b) {
    const Ints even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    return smaller(__builtin_shuffle(a, b, even), __builtin_shuffle(a, b, even + 1));
}

// Minima of 16 runs of 2^LEVELS numbers.
template <int LEVELS>
INLINE Ints run_minima(const float* cost) {
    if constexpr (LEVELS == 0) {
        Ints out;
        std::memcpy(&out, cost, sizeof out);
        return out;
    } else {
        return pairwise(run_minima<LEVELS - 1>(cost), run_minima<LEVELS - 1>(cost + (LANES << (LEVELS - 1))));
    }
}

// Costs are non-negative floats, which order like integers. The lowest K bits of cost[s] hold s mod 2^K: a minimum over
// the predecessors t << K | j then says by itself which j it was. The cost is off by 2^(K - 23) of itself at most.
template <int K>
INLINE void advance(float* cost, float* best, uint8_t* from, const float* code, float x, int groups) {
    constexpr int MASK = (1 << K) - 1;
    const Ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int t = 0; t < groups; t += LANES) {
        const Ints low = run_minima<K>(cost + (t << K));
        store(best + t, (Floats)low);
        const Ints arg = low & MASK;
        for (int i = 0; i < LANES; ++i) from[t + i] = uint8_t(arg[i]);
    }
    for (int b = 0; b < (1 << K); ++b) {
        const float* values = code + int64_t(b) * groups;
        float* out = cost + int64_t(b) * groups;
        for (int t = 0; t < groups; t += LANES) {
            const Floats d = x - load(values + t);
            const Ints total = (Ints)(load(best + t) + d * d);
            store(out + t, (Floats)((total & ~MASK) | ((lanes + t) & MASK)));
        }
    }
}

using Advance = void (*)(float*, float*, uint8_t*, const float*, float, int);

#define DEFINE_TIER(NAME, TARGET)                                                                                  \
    template <int K>                                                                                               \
    TARGET void NAME(float* cost, float* best, uint8_t* from, const float* code, float x, int groups) {            \
        advance<K>(cost, best, from, code, x, groups);                                                             \
    }                                                                                                              \
    Advance select_##NAME(int width) {                                                                             \
        constexpr Advance by_width[] = {&NAME<1>, &NAME<2>, &NAME<3>, &NAME<4>, &NAME<5>, &NAME<6>};               \
        return by_width[width - 1];                                                                                \
    }

DEFINE_TIER(portable, )
#if defined(__x86_64__)
DEFINE_TIER(avx2, WITH_AVX2)
DEFINE_TIER(avx512, WITH_AVX512)
#endif

Advance select_advance(int width) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return select_avx512(width);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return select_avx2(width);
#endif
    return select_portable(width);
}

class Coder {
public:
    Coder(int bits, int width, int length, const float* code)
        : bits(bits), width(width), length(length), groups(1 << (bits - width)), code(code),
          step(select_advance(width)), cost(size_t(1) << bits), best(size_t(groups)),
          from(size_t(length) * size_t(groups)), rotated(size_t(length)), trial(size_t(length)) {}

    // The best path of which nothing is demanded but that it is one.
    float open(const float* x, int32_t* states) {
        start(x, -1);
        return finish(0, 1 << bits, states);
    }

    // The best of the closed paths that `rotations` tries find.
    float closed(const float* x, int rotations, int32_t* states) {
        float least = UNREACHABLE;
        for (int r = 0; r < rotations; ++r) {
            const int offset = length * r / rotations / 2;
            // the seam, at `offset`, is in the middle of the first pass and at both ends of the second
            rotate(x, offset + length / 2);
            open(rotated.data(), trial.data());
            const int seam = trial[size_t(length) - size_t(length / 2)] & (groups - 1);
            rotate(x, offset);
            start(rotated.data(), seam);
            const float total = finish(seam << width, (seam + 1) << width, trial.data());
            if (total < least) {
                least = total;
                for (int i = 0; i < length; ++i) states[(i + offset) % length] = trial[size_t(i)];
            }
        }
        return least;
    }

private:
    const int bits, width, length, groups;  // L, K, values, 2^(L - K)
    const float* code;
    const Advance step;
    std::vector<float> cost, best;
    std::vector<uint8_t> from;  // [length][groups]: the j of the best predecessor t << K | j
    std::vector<float> rotated;
    std::vector<int32_t> trial;

    void rotate(const float* x, int offset) {
        for (int i = 0; i < length; ++i) rotated[size_t(i)] = x[(i + offset) % length];
    }

    // Runs over all values, from states whose lower L - K bits are `seam`, or from any.
    void start(const float* x, int seam) {
        const int mask = (1 << width) - 1;
        for (int s = 0; s < 1 << bits; ++s) {
            const float d = x[0] - code[s];
            const float value = seam < 0 || (s & (groups - 1)) == seam ? d * d : UNREACHABLE;
            int32_t tagged;
            std::memcpy(&tagged, &value, 4);
            tagged = (tagged & ~mask) | (s & mask);
            std::memcpy(&cost[size_t(s)], &tagged, 4);
        }
        for (int i = 1; i < length; ++i)
            step(cost.data(), best.data(), from.data() + int64_t(i) * groups, code, x[i], groups);
    }

    // The best path that ends in one of the states first ... last - 1; returns its cost.
    float finish(int first, int last, int32_t* states) {
        int state = int(std::min_element(cost.begin() + first, cost.begin() + last) - cost.begin());
        const float total = cost[size_t(state)];
        for (int i = length - 1; i >= 0; --i) {
            states[i] = state;
            const int low = state & (groups - 1);
            if (i > 0) state = low << width | from[size_t(i) * size_t(groups) + size_t(low)];
        }
        return total;
    }
};

}  // namespace

// x: float32 [sequences, length]; code: float32 [2^bits], the value of every state; states: int32 [sequences, length].
// rotations: tries to close the circle; 0 leaves it open. Requires 1 <= width <= 6, bits <= 16, bits at least
// width + 4 and 2 width, and length >= 2; returns 0, or -1 for other arguments.
extern "C" int requant_viterbi(const float* x, int64_t sequences, int64_t length, int32_t bits, int32_t width,
                               const float* code, int32_t rotations, int32_t* states) {
    if (width < 1 || width > 6 || bits < width + 4 || bits < 2 * width || bits > 16) return -1;
    if (length < 2 || length > 1 << 20) return -1;
#pragma omp parallel
    {
        Coder coder(bits, width, int(length), code);
#pragma omp for schedule(dynamic, 1)
        for (int64_t s = 0; s < sequences; ++s) {
            if (rotations > 0)
                coder.closed(x + s * length, rotations, states + s * length);
            else
                coder.open(x + s * length, states + s * length);
        }
    }
    return 0;
}

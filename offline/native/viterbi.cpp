// Trellis-coded quantization: the best path through a bitshift trellis, for many sequences of 256 values at once.
//
// A sequence is coded as a circular string of 256 K bits. State i is the window of L bits that starts at bit i K, least
// significant first, and stands for the value code[state]; hence state i + 1 = state i >> K | new << (L - K), where
// `new` are the K bits that enter at the top. The circle closes: the last states' windows run over the end into the
// first bits, so nothing is stored but K bits a value (arXiv 2406.11235, "tail-biting").
//
// The circle is closed as the paper does it, approximately: Viterbi on the sequence rotated by half finds good bits for
// the seam, and a second pass takes the seam as given.
//
// Plain C ABI, no dependency; threads come from the OpenMP runtime that the process already uses.

#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__x86_64__) && defined(__gnu_linux__)
#define REQUANT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define REQUANT_CLONES
#endif

namespace {

constexpr int LENGTH = 256;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

// best[t] = min over j of cost[t << K | j]; from[t] = the j that has it.
template <int K>
inline __attribute__((always_inline)) void step_min(const float* __restrict cost, float* __restrict best,
                                                    uint8_t* __restrict from, int groups) {
    for (int t = 0; t < groups; ++t) {
        float low = cost[t << K];
        int arg = 0;
        for (int j = 1; j < (1 << K); ++j) {
            const float value = cost[(t << K) + j];
            arg = value < low ? j : arg;
            low = value < low ? value : low;
        }
        best[t] = low;
        from[t] = uint8_t(arg);
    }
}

// One step from value to value: cost in and out, indexed by state.
template <int K>
inline __attribute__((always_inline)) void step(float* __restrict cost, float* __restrict best,
                                                uint8_t* __restrict from, const float* __restrict code, float x,
                                                int bits) {
    const int groups = 1 << (bits - K);
    step_min<K>(cost, best, from, groups);
    for (int b = 0; b < (1 << K); ++b) {
        const float* __restrict values = code + int64_t(b) * groups;
        float* __restrict out = cost + int64_t(b) * groups;
        for (int t = 0; t < groups; ++t) {
            const float d = x - values[t];
            out[t] = best[t] + d * d;
        }
    }
}

REQUANT_CLONES void step2(float* cost, float* best, uint8_t* from, const float* code, float x, int bits) {
    step<2>(cost, best, from, code, x, bits);
}
REQUANT_CLONES void step3(float* cost, float* best, uint8_t* from, const float* code, float x, int bits) {
    step<3>(cost, best, from, code, x, bits);
}
REQUANT_CLONES void step4(float* cost, float* best, uint8_t* from, const float* code, float x, int bits) {
    step<4>(cost, best, from, code, x, bits);
}

struct Coder {
    const int bits, width, groups;  // L, K, 2^(L - K)
    const float* code;
    std::vector<float> cost, best;
    std::vector<uint8_t> from;  // [LENGTH][groups]

    Coder(int bits, int width, const float* code)
        : bits(bits), width(width), groups(1 << (bits - width)), code(code), cost(size_t(1) << bits),
          best(groups), from(size_t(LENGTH) * groups) {}

    // The best path; with seam >= 0 only one whose first state ends, and whose last state begins, with these
    // L - K bits. states[i] is the state at value i.
    void path(const float* x, int seam, int32_t* states) {
        const int count = 1 << bits;
        for (int s = 0; s < count; ++s) {
            const float d = x[0] - code[s];
            cost[s] = seam < 0 || (s & (groups - 1)) == seam ? d * d : INFINITE;
        }
        const auto advance = width == 2 ? step2 : width == 3 ? step3 : step4;
        for (int i = 1; i < LENGTH; ++i)
            advance(cost.data(), best.data(), from.data() + int64_t(i) * groups, code, x[i], bits);
        int state = seam < 0 ? 0 : seam << width;
        const int stop = seam < 0 ? count : state + (1 << width);
        for (int s = state; s < stop; ++s)
            if (cost[s] < cost[state]) state = s;
        for (int i = LENGTH - 1; i >= 0; --i) {
            states[i] = state;
            const int low = state & (groups - 1);
            if (i > 0) state = low << width | from[int64_t(i) * groups + low];
        }
    }

    void tail_biting(const float* x, int32_t* states) {
        float rotated[LENGTH];
        constexpr int HALF = LENGTH / 2;
        std::memcpy(rotated, x + HALF, sizeof(float) * HALF);
        std::memcpy(rotated + HALF, x, sizeof(float) * HALF);
        path(rotated, -1, states);
        path(x, states[HALF] & (groups - 1), states);
    }
};

}  // namespace

// x: float32 [sequences, 256]; code: float32 [2^bits], the value of every state; states: int32 [sequences, 256].
// Requires 2 <= width <= 4 and 2 width <= bits <= 16. With closed = 0 the last window need not run into the first.
// Returns 0, or -1 for other arguments.
extern "C" int requant_viterbi(const float* x, int64_t sequences, int32_t bits, int32_t width, const float* code,
                               int32_t closed, int32_t* states) {
    if (width < 2 || width > 4 || bits < 2 * width || bits > 16) return -1;
#pragma omp parallel
    {
        Coder coder(bits, width, code);
#pragma omp for schedule(dynamic, 1)
        for (int64_t s = 0; s < sequences; ++s) {
            if (closed)
                coder.tail_biting(x + s * LENGTH, states + s * LENGTH);
            else
                coder.path(x + s * LENGTH, -1, states + s * LENGTH);
        }
    }
    return 0;
}

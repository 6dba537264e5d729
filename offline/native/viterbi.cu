// The best path through a bitshift trellis on a GPU, a block for a sequence: what viterbi.cpp does on a CPU, one pass of it.
//
// State s is a window of STATE_BITS bits, its value the sum of the bytes of s * 0x83DCD12D less 510. What it costs to come
// to s depends on the state before it only through the bits that both share: of all states that lead to the same low bits
// the cheapest counts, so that GROUPS costs are kept, not 2^STATE_BITS, and a step reads BITS bits of the way back.
//
// Macros: STATE_BITS, BITS, THREADS.
struct Arguments {
    const float* x;    // [sequences, length]
    const int* seam;   // [sequences], or null: low bits of the first state, and high bits of the last
    uint8_t* came;     // [sequences, length, GROUPS], for the way back
    int* states;       // [sequences, length]
    int length;
};

constexpr int FAN = 1 << BITS, GROUPS = 1 << (STATE_BITS - BITS);
constexpr float UNREACHABLE = 1e30f;

DEVICE float value_of(uint32_t state) { return float(int(__dp4a(state * 0x83DCD12Du, 0x01010101u, 0u)) - 510); }

DEVICE float off_by(float x, uint32_t state) {
    const float off = x - value_of(state);
    return off * off;
}

DEVICE void best_path(const Arguments& in) {
    extern __shared__ __align__(16) char shared[];
    float* const least = reinterpret_cast<float*>(shared);  // two of [GROUPS]
    const int thread = threadIdx.x;
    const float* const x = in.x + int64_t(blockIdx.x) * in.length;
    uint8_t* const came = in.came + int64_t(blockIdx.x) * in.length * GROUPS;
    const int seam = in.seam == nullptr ? -1 : in.seam[blockIdx.x];

    for (int i = 1; i < in.length; ++i) {
        const float* const before = least + (i & 1) * GROUPS;
        float* const after = least + (i & 1 ^ 1) * GROUPS;
        const float here = x[i - 1];
        for (int group = thread; group < GROUPS; group += THREADS) {
            const uint32_t first = uint32_t(group) << BITS;
            float best = 0;
            int which = 0;
#pragma unroll
            for (int f = 0; f < FAN; ++f) {
                const uint32_t low = (first + f) & (GROUPS - 1);
                float cost = off_by(here, first + f);
                if (i > 1)
                    cost += before[low];
                else if (seam >= 0 && int(low) != seam)
                    cost = UNREACHABLE;
                if (f == 0 || cost < best) {
                    best = cost;
                    which = f;
                }
            }
            after[group] = best;
            came[int64_t(i) * GROUPS + group] = uint8_t(which);
        }
        __syncthreads();
    }

    // the last state: of all, or of those that end in the seam
    const float* const before = least + (in.length & 1) * GROUPS;
    const float here = x[in.length - 1];
    float best = UNREACHABLE * 2;
    uint32_t last = 0;
    const uint32_t from = seam < 0 ? 0 : uint32_t(seam) << BITS, count = seam < 0 ? uint32_t(GROUPS) << BITS : FAN;
    for (uint32_t s = from + thread; s < from + count; s += THREADS) {
        const float cost = before[s & (GROUPS - 1)] + off_by(here, s);
        if (cost < best) {
            best = cost;
            last = s;
        }
    }
    __syncthreads();  // the costs have been read: their place is taken for the search
    float* const costs = least;
    uint32_t* const of = reinterpret_cast<uint32_t*>(least + THREADS);
    costs[thread] = best;
    of[thread] = last;
    for (int step = THREADS / 2; step > 0; step /= 2) {
        __syncthreads();
        if (thread < step) {
            const float other = costs[thread + step];
            if (other < costs[thread] || (other == costs[thread] && of[thread + step] < of[thread])) {
                costs[thread] = other;
                of[thread] = of[thread + step];
            }
        }
    }
    if (thread != 0) return;
    last = of[0];
    int* const states = in.states + int64_t(blockIdx.x) * in.length;
    for (int i = in.length - 1; i >= 0; --i) {
        states[i] = int(last);
        const uint32_t low = last & (GROUPS - 1);
        if (i > 0) last = low << BITS | came[int64_t(i) * GROUPS + low];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) viterbi(const __grid_constant__ Arguments in) { best_path(in); }

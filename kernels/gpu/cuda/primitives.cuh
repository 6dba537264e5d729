// What the kernels share: PTX instructions by name, reductions and the residual. Compile-time settings come as macros:
// BF16 (activations are bfloat16, else float16) and WIDE (columns of the residual take 32 bits).

// ---- numbers ----------------------------------------------------------------------------------------------

DEVICE float half_to_float(uint32_t bits) {
    float out;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(out) : "r"(bits));
    return out;
}

DEVICE float to_float(uint32_t bits) {  // of an activation
    return BF16 ? __uint_as_float(bits << 16) : half_to_float(bits);
}

DEVICE uint16_t from_float(float value) {
    uint16_t out;
    if (BF16)
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(value));
    else
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
    return out;
}

DEVICE uint32_t pair_from_floats(float low, float high) {
    uint32_t out;
    if (BF16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

DEVICE uint32_t half_pair(float low, float high) {
    uint32_t out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

DEVICE uint32_t half_add2(uint32_t a, uint32_t b) {
    uint32_t out;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}

DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

// (a & mask) | bits in one instruction
template <uint32_t MASK>
DEVICE uint32_t mask_or(uint32_t a, uint32_t bits) {
    uint32_t out;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(out) : "r"(a), "n"(MASK), "r"(bits));
    return out;
}

// ---- memory -----------------------------------------------------------------------------------------------

// Weights are read once: they must not push the activations out of the first-level cache.
DEVICE void load(uint32_t (&to)[4], const uint32_t* from) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "l"(from));
}

DEVICE void load2(uint32_t& a, uint32_t& b, const uint32_t* from) {
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "l"(from));
}

DEVICE uint32_t load1(const uint32_t* from) {
    uint32_t out;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(out) : "l"(from));
    return out;
}

// Words of a lane in a block of 32 * W words: as wide loads as W allows, each of them contiguous over the warp. `from` is
// the block and words_before(lane).
template <int W>
DEVICE int words_before(int lane) {
    return lane * (W % 4 == 0 ? 4 : 2);
}

template <int W>
DEVICE void load_words(uint32_t (&to)[W], const uint32_t* from, int lane) {
    if constexpr (W == 2) {
        load2(to[0], to[1], from);
    } else if constexpr (W == 3) {
        load2(to[0], to[1], from);
        to[2] = load1(from + 64 - lane);
    } else {
        static_assert(W % 4 == 0, "words of a lane");
#pragma unroll
        for (int i = 0; i < W; i += 4) {
            uint32_t four[4];
            load(four, from + i * 32);
#pragma unroll
            for (int j = 0; j < 4; ++j) to[i + j] = four[j];
        }
    }
}

// Shared memory by its 32-bit address; volatile, for barriers order what the compiler does not see to be memory.
DEVICE uint32_t shared_address(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }

template <int OFFSET>
DEVICE uint32_t shared_load(uint32_t address) {
    uint32_t out;
    asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(out) : "r"(address), "n"(OFFSET));
    return out;
}

DEVICE void shared_load4(uint4& to, uint32_t address) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
                 : "r"(address));
}

DEVICE void shared_load4(float4& to, uint32_t address) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(to.x), "=f"(to.y), "=f"(to.z), "=f"(to.w)
                 : "r"(address));
}

DEVICE void shared_load2(float& a, float& b, uint32_t address) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(a), "=f"(b) : "r"(address));
}

DEVICE uint32_t shared_load_half(uint32_t address) {
    uint16_t out;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(out) : "r"(address));
    return out;
}

// Words of a lane in a block of 32 * W words, which load_words would read from memory.
template <int W>
DEVICE void shared_words(uint32_t (&to)[W], uint32_t block, int lane) {
    const uint32_t at = block + words_before<W>(lane) * 4;
    if constexpr (W % 4 != 0) asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(at));
    if constexpr (W == 3) to[2] = shared_load<256>(block + lane * 4);
    if constexpr (W % 4 == 0)
#pragma unroll
        for (int i = 0; i < W; i += 4) {
            uint4 four;
            shared_load4(four, at + i * 128);
            to[i] = four.x;
            to[i + 1] = four.y;
            to[i + 2] = four.z;
            to[i + 3] = four.w;
        }
}

// 16 bytes from global to shared memory while the thread goes on. Copies are counted by the groups that copies_asked ends;
// await_copies<N> waits for all but the last N groups of the thread.
DEVICE void copy_async(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

DEVICE void copies_asked() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
DEVICE void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

DEVICE float load_coherent(const float* from) {
    float out;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(out) : "l"(from));
    return out;
}

DEVICE float4 load_coherent4(const float* from) {
    float4 out;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(out.x), "=f"(out.y), "=f"(out.z), "=f"(out.w)
                 : "l"(from));
    return out;
}

// A launch may begin before the one before it has ended: weights can be read at once, anything else, activations,
// results and locks, after launched_before_is_done.
DEVICE void next_may_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

DEVICE void launched_before_is_done() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- tensor cores -----------------------------------------------------------------------------------------

// c[16 x 8] += a[16 x 16] * b[16 x 8], float16, in float32
DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c[16 x 8] += a[16 x 32] * b[32 x 8], unsigned times signed bytes
DEVICE void multiply_bytes(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---- synchronization --------------------------------------------------------------------------------------

// A barrier for THREADS threads of whole warps.
template <int ID, int THREADS>
DEVICE void some_warps() {
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}

// Counts arrivals in phases: await_arrivals returns when the phase of that parity is complete, that before the first
// counting as one of parity 1. What was written before an arrival is seen after the wait.
DEVICE void arrivals_begin(uint64_t* at, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(at)), "r"(count) : "memory");
}

DEVICE void arrive(uint64_t* at) {
    asm volatile("{.reg .b64 s; mbarrier.arrive.shared.b64 s, [%0];}" ::"r"(shared_address(at)) : "memory");
}

DEVICE void await_arrivals(uint64_t* at, int parity) {
    uint32_t done;
    do {
#if __CUDA_ARCH__ >= 900
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(shared_address(at)), "r"(parity)
                     : "memory");
#else
        asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(shared_address(at)), "r"(parity)
                     : "memory");
#endif
    } while (!done);
}

// ---- reductions -------------------------------------------------------------------------------------------

DEVICE uint32_t largest_of_warp(uint32_t value) {
    uint32_t out;
    asm volatile("redux.sync.max.u32 %0, %1, 0xFFFFFFFF;" : "=r"(out) : "r"(value));
    return out;
}

// ---- residual ---------------------------------------------------------------------------------------------

#if WIDE
typedef uint64_t Entry;  // column in the low half, value (float16) in the high one
DEVICE uint32_t entry_column(Entry e) { return uint32_t(e); }
DEVICE float entry_value(Entry e) { return half_to_float(uint32_t(e >> 32)); }
#else
typedef uint32_t Entry;
DEVICE uint32_t entry_column(Entry e) { return e & 0xFFFF; }
DEVICE float entry_value(Entry e) { return half_to_float(e >> 16); }
#endif

// The part of a row's residual that one of LANES threads walks: its entries first, first + LANES ... The first AHEAD of
// them are asked for before the dense loop, which hides how long they take.
template <int LANES, int AHEAD>
struct Residual {
    int next, end;
    Entry entry[AHEAD];

    DEVICE void begin(const int* indptr, int row, int rows, int lane) {
        next = end = 0;
        if (indptr != nullptr && row < rows) {
            next = indptr[row] + lane;
            end = indptr[row + 1];
        }
    }

    DEVICE void ask(const Entry* entries) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            entry[i] = 0;  // value 0 of column 0
            if (next + i * LANES < end) entry[i] = entries[next + i * LANES];
        }
    }

    // add(column, value) for each of this thread's entries
    template <class Add>
    DEVICE void walk(const Entry* entries, const Add& add) const {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (next + i * LANES < end) add(entry_column(entry[i]), entry_value(entry[i]));
        for (int at = next + AHEAD * LANES; at < end; at += 4 * LANES) {
            Entry more[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) more[i] = entries[min(at + i * LANES, end - 1)];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (at + i * LANES < end) add(entry_column(more[i]), entry_value(more[i]));
        }
    }

    // take(entries) for them four at a time; where there are fewer they have the value 0. AHEAD is a multiple of four.
    template <class Take>
    DEVICE void walk_fours(const Entry* entries, const Take& take) const {
#pragma unroll
        for (int i = 0; i < AHEAD; i += 4)
            if (next + i * LANES < end) {
                const Entry four[4] = {entry[i], entry[i + 1], entry[i + 2], entry[i + 3]};
                take(four);
            }
        for (int at = next + AHEAD * LANES; at < end; at += 4 * LANES) {
            Entry four[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) four[i] = at + i * LANES < end ? entries[at + i * LANES] : 0;
            take(four);
        }
    }
};

template <int LANES>
DEVICE float sum_over_lanes(float value) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
    return value;
}

// Whether this block is the last of `count` to arrive; it then sees what the others wrote. The lock goes back to zero.
DEVICE bool last_to_arrive(int* lock, int count) {
    __shared__ int arrived;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) arrived = atomicAdd(lock, 1);
    __syncthreads();
    if (arrived != count - 1) return false;
    if (threadIdx.x == 0) *lock = 0;
    __threadfence();
    return true;
}

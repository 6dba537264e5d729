// CUDA C++ on threads: enough of the language and of primitives.cuh to run the kernels on a CPU, a thread for each of a
// block's, block after block. Slow, and checks what only a GPU could otherwise: that the kernels compute what they
// should. What it cannot show: launches that overlap, the memory model, instructions behind the primitives.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <barrier>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define DEVICE inline
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(x) alignas(x)
#define __shared__ static
struct uint2 { uint32_t x, y; }; struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; }; struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(uint32_t a, uint32_t b) { return {a, b}; }
inline uint4 make_uint4(uint32_t a, uint32_t b, uint32_t c, uint32_t d) { return {a, b, c, d}; }
inline float2 make_float2(float a, float b) { return {a, b}; }
inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }
struct Dim { int x, y, z; };
inline thread_local Dim threadIdx, blockIdx;
inline Dim gridDim;
inline char* shared_memory;
inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::vector<std::unique_ptr<std::barrier<>>> warp_barrier;
inline uint32_t warp_words[64][32][8];
inline int W() { return threadIdx.x >> 5; } inline int L() { return threadIdx.x & 31; }
inline void __syncthreads() { block_barrier->arrive_and_wait(); }
inline std::unique_ptr<std::barrier<>> named_barrier[16];
inline std::mutex of_named_barriers;
template <int ID, int COUNT> void some_warps() {
    {
        std::lock_guard<std::mutex> guard(of_named_barriers);
        if (!named_barrier[ID]) named_barrier[ID] = std::make_unique<std::barrier<>>(COUNT);
    }
    named_barrier[ID]->arrive_and_wait();
}
// count, of it left, phase
inline void arrivals_begin(uint64_t* at, int count) { *at = uint64_t(count) << 48 | uint64_t(count) << 32; }
inline void arrive(uint64_t* at) {
    uint64_t old = __atomic_load_n(at, 5), now;
    do {
        now = old - (1ull << 32);
        if ((now >> 32 & 0xFFFF) == 0) now += (old >> 48 << 32) + 1;
    } while (!__atomic_compare_exchange_n(at, &old, now, false, 5, 5));
}
inline void await_arrivals(uint64_t* at, int parity) {
    while ((__atomic_load_n(at, 5) & 1) == uint64_t(parity)) std::this_thread::yield();
}
inline void __syncwarp() { warp_barrier[W()]->arrive_and_wait(); }
template <class T> T exchange(T v, int from) {
    static_assert(sizeof(T) == 4);
    memcpy(&warp_words[W()][L()][0], &v, 4);
    __syncwarp();
    T out;
    memcpy(&out, &warp_words[W()][from][0], 4);
    __syncwarp();
    return out;
}
template <class T> T __shfl_xor_sync(uint32_t m, T v, int s) {
    if (m != 0xFFFFFFFFu) abort();
    return exchange(v, L() ^ s);
}
template <class T> T __shfl_sync(uint32_t, T v, int s) { return exchange(v, s); }
using std::min;
using std::max;
inline int min(int a, unsigned b) { return a < int(b) ? a : int(b); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t s) {
    uint64_t both = uint64_t(b) << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) {
        if (s >> (4 * i) & 8) abort();
        out |= uint32_t(both >> (8 * (s >> (4 * i) & 7)) & 0xFF) << (8 * i);
    }
    return out;
}
inline uint32_t __funnelshift_r(uint32_t lo, uint32_t hi, uint32_t s) {
    return uint32_t((uint64_t(hi) << 32 | lo) >> (s & 31));
}
inline uint32_t __vmaxu2(uint32_t a, uint32_t b) {
    return std::max(a & 0xFFFF, b & 0xFFFF) | std::max(a >> 16, b >> 16) << 16;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint64_t(a) * b >> 32; }
inline int __popc(uint32_t a) { return __builtin_popcount(a); }
inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t c) {
    for (int i = 0; i < 4; ++i) c += (a >> 8 * i & 255) * (b >> 8 * i & 255);
    return c;
}
inline uint32_t __float_as_uint(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
inline float __uint_as_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
inline int __float2int_rn(float f) { return int(nearbyintf(f)); }
inline int atomicAdd(int* p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
inline uint32_t atomicMax(uint32_t* p, uint32_t v) {
    uint32_t o = __atomic_load_n(p, 5);
    while (o < v && !__atomic_compare_exchange_n(p, &o, v, false, 5, 5)) {} return o;
}
inline void __threadfence() {}
inline float h2f(uint16_t b) { _Float16 h; memcpy(&h, &b, 2); return float(h); }
inline uint16_t f2h(float f) { _Float16 h = _Float16(f); uint16_t b; memcpy(&b, &h, 2); return b; }
inline uint16_t f2b(float f) {
    uint32_t u = __float_as_uint(f);
    u += 0x7FFF + (u >> 16 & 1);
    return u >> 16;
}
inline float half_to_float(uint32_t b) { return h2f(b & 0xFFFF); }
inline float to_float(uint32_t b) { return BF16 ? __uint_as_float(b << 16) : h2f(b); }
inline uint16_t from_float(float f) { return BF16 ? f2b(f) : f2h(f); }
inline uint32_t pair_from_floats(float a, float b) {
    return from_float(a) | uint32_t(from_float(b)) << 16;
}
inline uint32_t half_pair(float a, float b) { return f2h(a) | uint32_t(f2h(b)) << 16; }
inline uint32_t half_add2(uint32_t a, uint32_t b) {
    return half_pair(h2f(a) + h2f(b), h2f(a >> 16) + h2f(b >> 16));
}
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t s) { return __byte_perm(a, b, s); }
template <uint32_t M> uint32_t mask_or(uint32_t a, uint32_t b) { return (a & M) | b; }
template <int W_> int words_before(int lane) { return lane * (W_ % 4 == 0 ? 4 : 2); }
template <int N> void load_words(uint32_t (&to)[N], const uint32_t* from, int lane) {
    if constexpr (N == 2) { to[0] = from[0]; to[1] = from[1]; }
    else if constexpr (N == 3) { to[0] = from[0]; to[1] = from[1]; to[2] = from[64 - lane]; }
    else for (int i = 0; i < N; i += 4) for (int j = 0; j < 4; ++j) to[i + j] = from[i * 32 + j];
}
inline uint32_t load1(const uint32_t* p) { return *p; }
inline uint32_t shared_address(const void* p) {
    return uint32_t((const char*)p - shared_memory) + 1040;
}
template <int O> uint32_t shared_load(uint32_t a) {
    uint32_t o;
    memcpy(&o, shared_memory + a + O - 1040, 4);
    return o;
}
template <class T> void shared_load4(T& to, uint32_t a) {
    if (a % 16) abort();
    memcpy(&to, shared_memory + a - 1040, 16);
}
inline void shared_load2(float& a, float& b, uint32_t at) {
    memcpy(&a, shared_memory + at - 1040, 4);
    memcpy(&b, shared_memory + at + 4 - 1040, 4);
}
inline uint32_t shared_load_half(uint32_t a) {
    uint16_t o;
    memcpy(&o, shared_memory + a - 1040, 2);
    return o;
}
template <int N> void shared_words(uint32_t (&to)[N], uint32_t block, int lane) {
    load_words<N>(to, (const uint32_t*)(shared_memory + block - 1040) + words_before<N>(lane), lane);
}
// asked for, and there only when awaited: what is read too early shows
inline thread_local std::vector<std::vector<std::pair<uint32_t, const void*>>> copies(1);
inline void copy_async(uint32_t to, const void* from) {
    if (to % 16 || uintptr_t(from) % 16) abort();
    copies.back().emplace_back(to, from);
}
inline void copies_asked() { copies.emplace_back(); }
template <int N> void await_copies() {
    while (copies.size() > N + 1) {
        for (auto [to, from] : copies.front()) memcpy(shared_memory + to - 1040, from, 16);
        copies.erase(copies.begin());
    }
}
inline uint32_t largest_of_warp(uint32_t v) {
    for (int s = 16; s; s /= 2) v = std::max(v, __shfl_xor_sync(0xFFFFFFFFu, v, s));
    return v;
}
inline float load_coherent(const float* p) { return *p; }
inline float4 load_coherent4(const float* p) { return *(const float4*)p; }
inline void next_may_launch() {} inline void launched_before_is_done() {}
inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    auto& w = warp_words[W()];
    for (int i = 0; i < 4; ++i) w[L()][i] = a[i];
    w[L()][4] = b0;
    w[L()][5] = b1;
    __syncwarp();
    int g = L() >> 2, t = L() & 3;
    for (int i = 0; i < 4; ++i) {
        int r = g + (i >> 1) * 8, n = 2 * t + (i & 1);
        float s = c[i];
        for (int k = 0; k < 16; ++k) {
            uint32_t av = w[(r & 7) * 4 + (k & 7) / 2][(r >> 3) + (k >> 3) * 2] >> (k & 1) * 16,
                     bv = w[n * 4 + (k & 7) / 2][4 + (k >> 3)] >> (k & 1) * 16;
            s += h2f(av) * h2f(bv);
        }
        c[i] = s;
    }
    __syncwarp();
}
inline void multiply_bytes(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    auto& w = warp_words[W()]; uint32_t v[6] = {a0, a1, a2, a3, b0, b1}; memcpy(w[L()], v, 24); __syncwarp();
    int g = L() >> 2, t = L() & 3;
    for (int i = 0; i < 4; ++i) {
        int r = g + (i >> 1) * 8, n = 2 * t + (i & 1);
        int s = c[i];
        for (int k = 0; k < 32; ++k) {
            uint8_t av = w[(r & 7) * 4 + (k & 15) / 4][(r >> 3) + (k >> 4) * 2] >> (k & 3) * 8;
            int8_t bv = int8_t(w[n * 4 + (k & 15) / 4][4 + (k >> 4)] >> (k & 3) * 8);
            s += int(av) * bv;
        }
        c[i] = s;
    }
    __syncwarp();
}

template <class F> void run(F f, int gx, int gy, int gz, int threads, int shared_bytes) {
    gridDim = {gx, gy, gz};
    std::vector<char> mem(shared_bytes + 64); 
    for (int z = 0; z < gz; ++z) for (int y = 0; y < gy; ++y) for (int x = 0; x < gx; ++x) {
        memset(mem.data(), 0xFF, mem.size());
        shared_memory = (char*)((uintptr_t(mem.data()) + 63) / 16 * 16);
        block_barrier = std::make_unique<std::barrier<>>(threads);
        warp_barrier.clear();
        for (auto& b : named_barrier) b.reset();
        for (int w = 0; w < threads / 32; ++w) warp_barrier.push_back(std::make_unique<std::barrier<>>(32));
        std::vector<std::thread> all;
        for (int t = 0; t < threads; ++t) all.emplace_back([=] { threadIdx = {t, 0, 0}; blockIdx = {x, y, z}; f(); });
        for (auto& t : all) t.join();
    }
}

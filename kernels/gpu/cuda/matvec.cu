// y = x * (dense + sparse)^T for the uniform and lut kinds and up to 64 activations: weights are one operand of the tensor
// cores, eight activations at a time the other.
//
// A block takes 16 * WR rows at a time, a warp 16 of these; WK warps share the columns, 64 at a time, and gridDim.y blocks
// share them again. A block stays for several such stretches, gridDim.x apart: the activations lie in shared memory, in
// the order of the operand, and the weights of the next stretch are on their way when one ends. Sums are float32, in an
// order that depends on nothing but the launch.
//
// Activations become float16 exactly, times a power of two of their own, except for elements of less than 2^-29 of the
// largest. What codes.cuh adds to the weights adds to the sums the same for every row: it is known from the activations,
// and is where the sums begin; the zero point, times the sum of activations, is taken off last.
// What the sums of an activation begin with, and the sum of its elements; of a tile, or of half a tile.
typedef float2 Sums;

// Activations in shared memory: [tiles][2 halves][PLACES][4 lanes][2 runs of 16 columns][4], float16, so that a lane reads
// 16 bytes of half a tile; nothing is in the places of activations that there are not. [tiles, or halves][PLACES] sums,
// twice for a single activation. `factors` are the powers of two that bring the elements back.
template <int THREADS, int PLACES>
DEVICE void take_activations(const Arguments& in, char* x_shared, Sums* tile_sums, float* factors, int begin, int stop,
                             int batch) {
    constexpr bool ONE = PLACES == 1;
    constexpr int WARPS = THREADS / 32, DEEP = 8;  // reads in flight
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, columns = min(stop * 64, in.columns) - begin * 64;
    uint32_t* const largest = reinterpret_cast<uint32_t*>(factors);
    for (int m = threadIdx.x; m < batch; m += THREADS) largest[m] = 0;
    __syncthreads();

    // a task: a part of one activation, two tiles at a time, half a warp for either
    const int pairs = (stop - begin + 1) / 2, parts = max(1, WARPS / batch), each = (pairs + parts - 1) / parts;
    const int q = lane & 15, f = q >> 2, t = q & 3;
    uint2 four[DEEP];
    const auto read = [&](int m, int pair, int end) {
        const uint2* const from = reinterpret_cast<const uint2*>(in.x + m * in.x_stride + begin * 64);
#pragma unroll
        for (int i = 0; i < DEEP; ++i) {
            const int column = (2 * (pair + i) + (lane >> 4)) * 64 + q * 4;
            four[i] = make_uint2(0, 0);
            if (pair + i < end && column < columns) four[i] = from[column / 4];
        }
    };
    for (int task = warp; task < batch * parts; task += WARPS) {
        const int m = task % batch, first = task / batch * each, end = min(pairs, first + each);
        uint32_t most = 0;  // without its sign a 16-bit float is ordered as an integer
        for (int pair = first; pair < end; pair += DEEP) {
            read(m, pair, end);
#pragma unroll
            for (int i = 0; i < DEEP; ++i)
                most = __vmaxu2(most, __vmaxu2(four[i].x & 0x7FFF7FFFu, four[i].y & 0x7FFF7FFFu));
        }
        most = max(most & 0xFFFF, most >> 16);
#pragma unroll
        for (int step = 16; step > 0; step /= 2) most = max(most, __shfl_xor_sync(0xFFFFFFFFu, most, step));
        if (lane == 0) atomicMax(largest + m, most);
    }
    __syncthreads();

    // the power of two that leaves the largest below 2^15; a float's range holds it, whatever is largest
    const auto exponent_up = [&](int m) {
        const int exponent = int((__float_as_uint(to_float(largest[m])) >> 23) & 0xFF) - 127;
        return min(max(14 - exponent, -126), 126);
    };
    const bool kept = batch * parts <= WARPS && each <= DEEP;  // one task a warp, still in registers
    for (int task = warp; task < batch * parts; task += WARPS) {
        const int m = task % batch, first = task / batch * each, end = min(pairs, first + each);
        const float factor = __uint_as_float(uint32_t(exponent_up(m) + 127) << 23);
        for (int pair = first; pair < end; pair += DEEP) {
            if (!kept) read(m, pair, end);
#pragma unroll
            for (int i = 0; i < DEEP; ++i) {
                const int tile = 2 * (pair + i) + (lane >> 4);
                const bool inside = pair + i < end && tile < stop - begin;
                const uint32_t low2 = half_pair(to_float(four[i].x & 0xFFFF) * factor, to_float(four[i].x >> 16) * factor);
                const uint32_t high2 = half_pair(to_float(four[i].y & 0xFFFF) * factor, to_float(four[i].y >> 16) * factor);
                if (inside)
                    *reinterpret_cast<uint2*>(x_shared + tile * PLACES * 128 + ((f >> 1) * PLACES + m) * 64 + t * 16 +
                                              (f & 1) * 8) = make_uint2(low2, high2);
                if (LUT) continue;
                const float low = half_to_float(low2 & 0xFFFF) + half_to_float(low2 >> 16);
                const float high = half_to_float(high2 & 0xFFFF) + half_to_float(high2 >> 16);
                float raised = 0, plain = low + high;
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    if (f == j) raised = raised_by(2 * j) * low + raised_by(2 * j + 1) * high;
#pragma unroll
                for (int step = HALVES ? 4 : 8; step > 0; step /= 2) {
                    raised += __shfl_xor_sync(0xFFFFFFFFu, raised, step);
                    plain += __shfl_xor_sync(0xFFFFFFFFu, plain, step);
                }
                const int of = HALVES ? tile * 2 + q / 8 : tile;
                if (inside && q % (HALVES ? 8 : 16) == 0) {
                    if (ONE) tile_sums[2 * of] = tile_sums[2 * of + 1] = make_float2(-raised, plain);
                    if (!ONE) tile_sums[of * PLACES + m] = make_float2(-raised, plain);
                }
            }
        }
    }
    __syncthreads();
    for (int m = threadIdx.x; m < batch; m += THREADS) {
        const int up = exponent_up(m);
        factors[m] = __uint_as_float(uint32_t(127 - up) << 23);
    }
    __syncthreads();
}

// NT times eight activations; with ONE a single one.
template <int NT, bool ONE, int WR, int WK, int AHEAD>
DEVICE void matvec(const Arguments& in) {
    constexpr int THREADS = 32 * WR * WK, ROWS = 16 * WR, LANES = THREADS / ROWS, PITCH = ROWS + 4;
    constexpr int HALF_COUNT = HALVES ? 2 : 1;
    extern __shared__ __align__(16) char shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, wr = warp % WR, wk = warp / WR;
    const int g = lane >> 2, t = lane & 3;
    const int batch = ONE ? 1 : in.batch, row_tiles = (in.rows + 15) / 16;
    const int row = threadIdx.x / LANES, lane_of_row = threadIdx.x % LANES;  // for the residual
    next_may_launch();

    // columns of this block, in tiles, and how many of them this warp reads
    const int share = (in.tiles + gridDim.y - 1) / gridDim.y;
    const int begin = min(in.tiles, int(blockIdx.y) * share), stop = min(in.tiles, begin + share);
    const int count = max(0, (stop - begin - wk + WK - 1) / WK);

    // two of tables; activations; their sums; [batch] factors; two of [WK + 1][batch][PITCH] sums
    constexpr int PLACES = ONE ? 1 : 8 * NT, TILE_BYTES = PLACES * 128, SUMS_BYTES = ONE ? 16 : PLACES * 8;
    constexpr int TABLE_BYTES = LUT ? WR * Tables<WR>::WORDS_A_TILE * 4 : 0;
    uint32_t table_at = shared_address(shared);
    if (LUT) table_at = (table_at + Tables<WR>::ALIGNMENT - 1) / Tables<WR>::ALIGNMENT * Tables<WR>::ALIGNMENT;
    char* const tables = shared + (table_at - shared_address(shared));
    char* const x_shared = tables + 2 * TABLE_BYTES;
    Sums* const tile_sums = reinterpret_cast<Sums*>(x_shared + share * TILE_BYTES);
    float* const factors =
        reinterpret_cast<float*>(x_shared + share * (TILE_BYTES + (LUT ? 0 : HALF_COUNT * SUMS_BYTES)));
    float* const reduced = factors + (batch + 3) / 4 * 4;
    const int reduced_size = (WK + 1) * batch * PITCH;

    uint32_t words[AHEAD][WORDS];
    Meta meta[AHEAD][HALF_COUNT];
    // of the tile that is asked for into slot 0
    const uint32_t* codes;
    const uint32_t* scales;
    const uint16_t* zeros;
    uint32_t four_tiles;
    const auto go_to = [&](int stretch) {
        const int64_t row_tile = min(stretch * WR + wr, row_tiles - 1);
        codes = in.codes + (row_tile * in.tiles + begin + wk) * (32 * WORDS) + words_before<WORDS>(lane);
        scales = in.params + row_tile * in.groups * 8 + g;
        zeros = in.zeros + row_tile * in.groups * 8 + g;
        four_tiles = 4 * (begin + wk);
    };
    const auto ask = [&](int slot) {
        load_words<WORDS>(words[slot], codes + slot * (WK * 32 * WORDS), lane);
        if (!LUT)
#pragma unroll
            for (int half = 0; half < HALF_COUNT; ++half) {
                uint32_t group = __umulhi(four_tiles + 4 * slot * WK + 2 * half, in.group_factor);
                if (HALVES) group = min(int(group), in.groups - 1);  // the second half may lie behind the last column
                meta[slot][half].scales = load1(scales + group * 8);
                meta[slot][half].zeros = zeros[group * 8];
            }
    };
    int stretch = blockIdx.x;
    go_to(stretch);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        if (i < count) ask(i);
    Residual<LANES, 2> residual;
    residual.begin(in.indptr, stretch * ROWS + row, in.rows, lane_of_row);
#if LUT
    using T = Tables<WR>;
    NextTables<WR, THREADS> next_tables;
    next_tables.ask(reinterpret_cast<const uint16_t*>(in.params), stretch * ROWS, in.rows);
    next_tables.store(reinterpret_cast<uint32_t*>(tables));
    uint32_t base = table_at + wr * T::WORDS_A_TILE * 4 + lane / (4 / T::COPIES) * 4;
#else
    const uint32_t base = 0;
#endif
    residual.ask(in.entries);

    launched_before_is_done();
    take_activations<THREADS, PLACES>(in, x_shared, tile_sums, factors, begin, stop, batch);
    const uint32_t first_x = shared_address(x_shared) + wk * TILE_BYTES + (ONE ? 0 : g * 64) + t * 16;
    const uint32_t first_sums = shared_address(tile_sums) + wk * HALF_COUNT * SUMS_BYTES + (ONE ? 0 : t * 16);

    for (int parity = 0; stretch * WR < row_tiles; parity ^= 1) {
        const int next_stretch = stretch + gridDim.x;
        const bool more = next_stretch * WR < row_tiles;
        Residual<LANES, 2> next_residual;
        next_residual.begin(in.indptr, next_stretch * ROWS + row, in.rows, lane_of_row);
#if LUT
        next_tables.ask(reinterpret_cast<const uint16_t*>(in.params), next_stretch * ROWS, in.rows);
#endif
        float sums[NT][4] = {};
        uint32_t x_at = first_x, sums_at = first_sums;
        for (int left = count; left > 0; left -= AHEAD) {
            int wanted = left - AHEAD;
            if (wanted > 0) {
                codes += AHEAD * WK * 32 * WORDS;
                four_tiles += 4 * AHEAD * WK;
            } else {
                go_to(next_stretch);
                wanted = more ? count : 0;
            }
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                if (i < left) {
                    float part[NT][4];
                    float plain[NT][2];
                    const auto start = [&](int half) {
#pragma unroll
                        for (int n = 0; n < NT; ++n) {
                            float4 two;
                            shared_load4(two, sums_at + ((i * WK * HALF_COUNT + half) * SUMS_BYTES + n * 64));
                            // of a single activation columns 1, 3 ... of the result mean nothing
                            part[n][0] = two.x;
                            part[n][1] = ONE ? two.y : two.z;
                            part[n][2] = ONE ? two.z : two.x;
                            part[n][3] = ONE ? two.w : two.z;
                            plain[n][0] = two.y;
                            plain[n][1] = two.w;
                        }
                    };
                    const auto finish = [&](const Meta& of) {
                        const float s0 = half_to_float(of.scales & 0xFFFF), s1 = half_to_float(of.scales >> 16);
                        const float z0 = float(of.zeros & 0xFF), z1 = float(of.zeros >> 8);
#pragma unroll
                        for (int n = 0; n < NT; ++n) {
                            sums[n][0] += s0 * (part[n][0] - z0 * plain[n][0]);
                            sums[n][2] += s1 * (part[n][2] - z1 * plain[n][0]);
                            if (ONE) continue;
                            sums[n][1] += s0 * (part[n][1] - z0 * plain[n][1]);
                            sums[n][3] += s1 * (part[n][3] - z1 * plain[n][1]);
                        }
                    };
                    const auto half_tile = [&](int half, const uint32_t (&a0)[4], const uint32_t (&a1)[4]) {
#pragma unroll
                        for (int n = 0; n < NT; ++n) {
                            uint4 b;
                            shared_load4(b, x_at + (i * WK * TILE_BYTES + half * PLACES * 64 + n * 512));
                            multiply(LUT ? sums[n] : part[n], a0, b.x, b.y);
                            multiply(LUT ? sums[n] : part[n], a1, b.z, b.w);
                        }
                    };
                    uint32_t a[4][4];
                    if (!LUT) start(0);
                    fragment<0, WR>(a[0], words[i], base);
                    fragment<1, WR>(a[1], words[i], base);
                    half_tile(0, a[0], a[1]);
                    if (HALVES && !LUT) {
                        finish(meta[i][0]);
                        start(1);
                    }
                    fragment<2, WR>(a[2], words[i], base);
                    fragment<3, WR>(a[3], words[i], base);
                    half_tile(1, a[2], a[3]);
                    if (!LUT) finish(meta[i][HALF_COUNT - 1]);
                }
                if (i < wanted) ask(i);
            }
            x_at += AHEAD * WK * TILE_BYTES;
            sums_at += AHEAD * WK * HALF_COUNT * SUMS_BYTES;
        }

        // the warps' sums and the residual's, then one barrier: the other parity's were read before it
        float* const here = reduced + parity * reduced_size;
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int m = n * 8 + t * 2 + j;
                if (ONE ? m == 0 : m < batch) {
                    float* const mine = here + (wk * batch + m) * PITCH + wr * 16 + g;
                    mine[0] = sums[n][j];
                    mine[8] = sums[n][j + 2];
                }
            }
        if (in.indptr != nullptr) {
            const int columns = (stop - begin) * 64;
#pragma unroll 1
            for (int first = 0; first < batch; first += 8) {
                float extra[8] = {};
                residual.walk(in.entries, [&](uint32_t column, float value) {
                    const int at = int(column) - begin * 64;
                    if (at < 0 || at >= columns) return;
                    const int f = at >> 4 & 3;
                    const char* from = x_shared + (at >> 6) * TILE_BYTES + ((f >> 1) * PLACES + first) * 64 +
                                       (at >> 2 & 3) * 16 + (f & 1) * 8 + (at & 3) * 2;
#pragma unroll
                    for (int m = 0; m < (ONE ? 1 : 8); ++m)
                        if (ONE || first + m < batch)
                            extra[m] += value * half_to_float(*reinterpret_cast<const uint16_t*>(from + m * 64));
                });
#pragma unroll
                for (int m = 0; m < (ONE ? 1 : 8); ++m)
                    if (ONE || first + m < batch) {
                        const float sum = sum_over_lanes<LANES>(extra[m]);
                        if (lane_of_row == m % LANES) here[(WK * batch + first + m) * PITCH + row] = sum;
                    }
            }
            residual = next_residual;
            residual.ask(in.entries);
        }
#if LUT
        next_tables.store(reinterpret_cast<uint32_t*>(tables + (parity ^ 1) * TABLE_BYTES));
        base += parity ? -TABLE_BYTES : TABLE_BYTES;
#endif
        __syncthreads();
        for (int i = threadIdx.x; i < ROWS * batch; i += THREADS) {
            const int m = i / ROWS, r = i % ROWS;
            if (stretch * ROWS + r >= in.rows) continue;
            float sum = in.indptr != nullptr ? here[(WK * batch + m) * PITCH + r] : 0.0f;
#pragma unroll
            for (int k = 0; k < WK; ++k) sum += here[(k * batch + m) * PITCH + r];
            sum *= factors[m];
            const int64_t at = int64_t(m) * in.rows + stretch * ROWS + r;
            if (gridDim.y == 1)
                in.y[at] = from_float(sum);
            else
                in.partial[int64_t(blockIdx.y) * batch * in.rows + at] = sum;
        }
        stretch = next_stretch;
    }
    if (gridDim.y == 1 || !last_to_arrive(in.locks + blockIdx.x, gridDim.y)) return;
    for (stretch = blockIdx.x; stretch * WR < row_tiles; stretch += gridDim.x)
        for (int i = threadIdx.x; i < ROWS * batch; i += THREADS) {
            const int m = i / ROWS, r = stretch * ROWS + i % ROWS;
            if (r >= in.rows) continue;
            const int64_t at = int64_t(m) * in.rows + r;
            float sum = 0;
            for (int k = 0; k < int(gridDim.y); ++k) sum += load_coherent(in.partial + int64_t(k) * batch * in.rows + at);
            in.y[at] = from_float(sum);
        }
}

#define MATVEC(NT, ONE, WR, WK, AHEAD, BLOCKS)                                                                       \
    extern "C" __global__ void __launch_bounds__(32 * WR * WK, BLOCKS)                                               \
        matvec_##NT##_##ONE##_##WR##_##WK##_##AHEAD##_##BLOCKS(const __grid_constant__ Arguments in) {               \
        matvec<NT, ONE, WR, WK, AHEAD>(in);                                                                          \
    }

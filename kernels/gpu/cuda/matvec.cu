// y = x * (dense + sparse)^T for the uniform and lut kinds and up to 64 activations: weights are the 16 x 16 operand of
// the tensor cores, decoded in registers from the layout of layout.py; up to eight activations are the other operand.
//
// A block takes 16 * WR rows at a time, a warp 16 of these; WK warps share the columns, 64 at a time, and gridDim.y blocks
// share them again. A block stays for several such stretches, gridDim.x apart: the activations lie in shared memory, in
// the order of the operand, and the weights of the next stretch are on their way when one ends. Sums are float32, in an
// order that depends on nothing but the launch.
//
// Operands are float16. Activations become so exactly, times a power of two of their own, except for elements of less
// than 2^-29 of the largest. A code of the uniform kind at bit s of the mantissa, under the exponent of 2^(10 - s), is
// 2^(10 - s) plus the code: one instruction for two weights. What that adds to the sums, the same for every row, is known
// from the activations and is where the sums begin; the zero point, times the sum of activations, is taken off last.
//
// Macros beside those of primitives.cuh: LUT (else uniform), BITS, HALVES (a tile of 64 columns holds two groups, else
// one or a part of one), TAIL (columns are no multiple of 64).
struct Arguments {
    const uint32_t* codes;    // [row tiles, column tiles, 32 lanes, words]
    const uint32_t* params;   // uniform: float16 scales [row tiles, groups, 8, 2]; lut: float16 tables [rows, entries]
    const uint16_t* zeros;    // uniform: uint8 zero points [row tiles, groups, 8, 2]
    const int* indptr;        // [rows + 1], or null
    const Entry* entries;     // [nnz]
    const uint16_t* x;        // [batch, columns], rows x_stride apart
    uint16_t* y;              // [batch, rows]
    float* partial;           // [gridDim.y, batch, rows] where gridDim.y > 1
    int* locks;               // [gridDim.x], zero
    int64_t x_stride;
    int batch, rows, columns, tiles, groups;
    uint32_t group_factor;    // (4 * tile + 2 * half) * this >> 32 is the group
};

constexpr int WORDS = BITS;  // 32 codes a lane

// ---- uniform ----------------------------------------------------------------------------------------------

// Pairs of columns are numbered c = 2 * (column / 16) + column % 4 / 2 in a tile; those of c have their codes at bit
// position(c) of the mantissa.
DEVICE constexpr int position(int c) {
    return BITS == 8 ? 0 : BITS == 4 ? 2 + 4 * (c % 2) : BITS == 2 ? 2 + 2 * (c % 4) : c < 3 ? 1 : c < 6 ? 4 : 7;
}

DEVICE constexpr float raised_by(int c) { return float(1 << (10 - position(c))); }

template <int POSITION>
DEVICE uint32_t field(uint32_t word) {
    constexpr uint32_t mask = ((1u << BITS) - 1) << POSITION, exponent = (25u - POSITION) << 10;
    return mask_or<mask * 0x00010001u>(word, exponent * 0x00010001u);
}

DEVICE uint32_t rotate_right(uint32_t word, int count) { return __funnelshift_r(word, word, count); }

// Weights of row half H and pair of columns C, raised by raised_by(C).
template <int C, int H>
DEVICE uint32_t uniform_pair(const uint32_t (&words)[WORDS]) {
    constexpr int at = position(C);
    if constexpr (BITS == 8) {
        return permute(words[C], 0x64646464u, H ? 0x4342 : 0x4140);
    } else if constexpr (BITS == 4) {
        return field<at>(H ? rotate_right(words[C / 2], 8) : words[C / 2]);
    } else if constexpr (BITS == 2) {
        return field<at>(C < 4 ? words[H] : rotate_right(words[H], 8));
    } else if constexpr (C < 6) {
        return field<at>(H ? rotate_right(words[C % 3], 9) : words[C % 3]);
    } else if constexpr (2 * C + H < 15) {
        return field<at>(words[2 * C + H - 12]);
    } else {  // what is left over in three words
        uint32_t out = mask_or<0x00800080u>(rotate_right(words[0], 9), ((25u - at) << 10) * 0x00010001u);
        out = mask_or<0x01000100u>(rotate_right(words[1], 8), out);
        return mask_or<0x02000200u>(rotate_right(words[2], 7), out);
    }
}

// ---- lut --------------------------------------------------------------------------------------------------

// A table of pairs of codes for each row, so that one read of shared memory gives two weights. [half][pair][slot] words;
// with 32 slots every lane has a bank of its own, with 8 the four lanes of a row share a table, with 16 two do.
template <int WR>
struct Tables {
    static constexpr int SLOTS = BITS == 2 || (BITS == 3 && WR == 1) ? 32 : BITS == 4 && WR == 1 ? 16 : 8;
    static constexpr int COPIES = SLOTS / 8;
    static constexpr int PAIRS = 1 << (2 * BITS);
    static constexpr int WORDS_A_HALF = PAIRS * SLOTS;
    static constexpr int WORDS_A_TILE = 2 * WORDS_A_HALF;
    static constexpr int SHIFT = SLOTS == 32 ? 7 : SLOTS == 16 ? 6 : 5;  // pair to byte offset
};

// The next stretch's tables, a part for each thread: asked for, then stored.
template <int WR, int THREADS>
struct NextTables {
    using T = Tables<WR>;
    static constexpr int ENTRIES = 1 << BITS;
    static constexpr int JOBS = WR * 2 * T::SLOTS * ENTRIES;  // a job: the pairs that begin with one code, in one slot
    static constexpr int COUNT = (JOBS + THREADS - 1) / THREADS;
    uint32_t table[COUNT][ENTRIES / 2];
    uint16_t first[COUNT];

    DEVICE void ask(const uint16_t* source, int first_row, int rows) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int job = threadIdx.x + i * THREADS, slot = job % T::SLOTS;
            const int row = first_row + job / (T::SLOTS * ENTRIES) * 8 + slot / T::COPIES;
            first[i] = 0;
#pragma unroll
            for (int j = 0; j < ENTRIES / 2; ++j) table[i][j] = 0;
            if (row < rows && (JOBS % THREADS == 0 || job < JOBS)) {
                const uint16_t* from = source + (int64_t(row) << BITS);
                first[i] = from[job / T::SLOTS % ENTRIES];
#pragma unroll
                for (int j = 0; j < ENTRIES / 2; j += 2) {
                    const uint2 two = *reinterpret_cast<const uint2*>(from + 2 * j);
                    table[i][j] = two.x;
                    table[i][j + 1] = two.y;
                }
            }
        }
    }

    DEVICE void store(uint32_t* to) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int job = threadIdx.x + i * THREADS;
            if (JOBS % THREADS && job >= JOBS) continue;
            const uint32_t low = first[i];
            uint32_t* const here = to + job / (T::SLOTS * ENTRIES) * T::WORDS_A_HALF + job % (T::SLOTS * ENTRIES);
#pragma unroll
            for (int j = 0; j < ENTRIES / 2; ++j) {
                const uint32_t two = table[i][j];
                here[2 * j * (T::SLOTS * ENTRIES)] = permute(low, two, 0x5410);
                here[(2 * j + 1) * (T::SLOTS * ENTRIES)] = permute(low, two, 0x7610);
            }
        }
    }
};

template <int WR, int P>
DEVICE uint32_t lut_pair(const uint32_t (&words)[WORDS], const char* tables, uint32_t base) {
    using T = Tables<WR>;
    constexpr int field = 2 * BITS, count = 32 / field;
    constexpr uint32_t mask = uint32_t(T::PAIRS - 1) << T::SHIFT;
    uint32_t offset;
    if constexpr (P < count * WORDS) {
        constexpr int at = P % count * field - T::SHIFT;
        const uint32_t word = words[P / count];
        offset = mask_or<mask>(at >= 0 ? word >> (at & 31) : word << (-at & 31), base);
    } else {  // the pair whose bits are what 3-bit fields left over
        const uint32_t pair = words[0] >> 30 | (words[1] >> 30) << 2 | (words[2] >> 30) << 4;
        offset = pair << T::SHIFT | base;
    }
    return *reinterpret_cast<const uint32_t*>(tables + (P & 1) * T::WORDS_A_HALF * 4 + offset);
}

// ---- the product ------------------------------------------------------------------------------------------

struct Meta {  // of a group
    uint32_t scales;
    uint16_t zeros;
};

// The operand of the 16 columns F: registers of rows g and g + 8, twice.
template <int F, int WR>
DEVICE void fragment(uint32_t (&a)[4], const uint32_t (&words)[WORDS], const char* tables, uint32_t base) {
#if LUT
    a[0] = lut_pair<WR, 4 * F>(words, tables, base);
    a[1] = lut_pair<WR, 4 * F + 1>(words, tables, base);
    a[2] = lut_pair<WR, 4 * F + 2>(words, tables, base);
    a[3] = lut_pair<WR, 4 * F + 3>(words, tables, base);
#else
    a[0] = uniform_pair<2 * F, 0>(words);
    a[1] = uniform_pair<2 * F, 1>(words);
    a[2] = uniform_pair<2 * F + 1, 0>(words);
    a[3] = uniform_pair<2 * F + 1, 1>(words);
#endif
}

// What the sums of an activation begin with, and the sum of its elements; of a tile, or of half a tile.
typedef float2 Sums;

// Activations in shared memory: [tiles][2 halves][batch][4 lanes][2 runs of 16 columns][4], float16, so that a lane reads
// 16 bytes of half a tile. `factors` are the powers of two that bring the elements back.
template <int THREADS, bool ONE>
DEVICE void take_activations(const Arguments& in, char* x_shared, Sums* tile_sums, float* factors, int begin, int stop,
                             int batch, int pitch) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, columns = min(stop * 64, in.columns) - begin * 64;
    uint32_t* const largest = reinterpret_cast<uint32_t*>(factors);
    for (int m = threadIdx.x; m < batch; m += THREADS) largest[m] = 0;
    __syncthreads();
    // without its sign a 16-bit float is ordered as an integer
    const int parts = max(1, THREADS / 32 / batch), each = (columns / 4 + parts - 1) / parts;
    for (int task = warp; task < batch * parts; task += THREADS / 32) {
        const int m = task % batch, first = task / batch * each, end = min(columns / 4, first + each);
        const uint2* const from = reinterpret_cast<const uint2*>(in.x + m * in.x_stride + begin * 64);
        uint32_t most = 0;
#pragma unroll 4
        for (int i = first + lane; i < end; i += 32) {
            const uint2 four = from[i];
            most = __vmaxu2(most, __vmaxu2(four.x & 0x7FFF7FFFu, four.y & 0x7FFF7FFFu));
        }
        most = max(most & 0xFFFF, most >> 16);
#pragma unroll
        for (int step = 16; step > 0; step /= 2) most = max(most, __shfl_xor_sync(0xFFFFFFFFu, most, step));
        if (lane == 0) atomicMax(largest + m, most);
    }
    __syncthreads();
    const int tiles = stop - begin;
    for (int i = threadIdx.x; i < tiles * batch * 16; i += THREADS) {
        const int q = i & 15, m = ONE ? 0 : (i >> 4) % batch, tile = ONE ? i >> 4 : (i >> 4) / batch;
        const int column = tile * 64 + q * 4;
        float v[4] = {};
        if (!TAIL || column < columns) {
            const uint2 four = *reinterpret_cast<const uint2*>(in.x + m * in.x_stride + begin * 64 + column);
            v[0] = to_float(four.x & 0xFFFF);
            v[1] = to_float(four.x >> 16);
            v[2] = to_float(four.y & 0xFFFF);
            v[3] = to_float(four.y >> 16);
        }
        // the exponent that leaves the largest below 2^15; a float's range holds it, whatever is largest
        const int exponent = int((__float_as_uint(to_float(largest[m])) >> 23) & 0xFF) - 127;
        const int up = min(max(14 - exponent, -126), 126);
        const float factor = __uint_as_float(uint32_t(up + 127) << 23);
        uint2 halves;
        halves.x = half_pair(v[0] * factor, v[1] * factor);
        halves.y = half_pair(v[2] * factor, v[3] * factor);
        const int f = q >> 2, t = q & 3;
        *reinterpret_cast<uint2*>(x_shared + tile * batch * 128 + ((f >> 1) * batch + m) * 64 + t * 16 + (f & 1) * 8) =
            halves;
        if (!LUT) {
            const float low = half_to_float(halves.x & 0xFFFF) + half_to_float(halves.x >> 16);
            const float high = half_to_float(halves.y & 0xFFFF) + half_to_float(halves.y >> 16);
            float raised = 0, plain = low + high;
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (f == j) raised = raised_by(2 * j) * low + raised_by(2 * j + 1) * high;
#pragma unroll
            for (int step = HALVES ? 4 : 8; step > 0; step /= 2) {
                raised += __shfl_xor_sync(0xFFFFFFFFu, raised, step);
                plain += __shfl_xor_sync(0xFFFFFFFFu, plain, step);
            }
            if (q % (HALVES ? 8 : 16) == 0)
                tile_sums[(HALVES ? tile * 2 + q / 8 : tile) * pitch + m] = make_float2(-raised, plain);
        }
    }
    __syncthreads();
    for (int m = threadIdx.x; m < batch; m += THREADS) {
        const int exponent = int((__float_as_uint(to_float(largest[m])) >> 23) & 0xFF) - 127;
        const int up = min(max(14 - exponent, -126), 126);
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
    const int count = max(0, (stop - begin - wk + WK - 1) / WK), padded = (count + AHEAD - 1) / AHEAD * AHEAD;

    // activations; [tiles, or halves][pitch] of their sums; [batch] factors; two of tables; two of [WK + 1][batch][PITCH]
    const int pitch = ONE ? 1 : (batch + 1) / 2 * 2;
    char* const x_shared = shared;
    Sums* const tile_sums = reinterpret_cast<Sums*>(x_shared + share * batch * 128);
    float* const factors = reinterpret_cast<float*>(tile_sums + (LUT ? 0 : share * HALF_COUNT * pitch));
    char* const tables = reinterpret_cast<char*>(factors + (batch + 3) / 4 * 4);
    float* const reduced =
        reinterpret_cast<float*>(tables + (LUT ? 2 * WR * Tables<WR>::WORDS_A_TILE * 4 : 0));
    const int reduced_size = (WK + 1) * batch * PITCH;

    uint32_t words[AHEAD][WORDS];
    Meta meta[AHEAD][HALF_COUNT];
    // where the stretch that is asked for begins
    const uint32_t* codes;
    const uint32_t* scales;
    const uint16_t* zeros;
    const auto go_to = [&](int stretch) {
        const int64_t row_tile = min(stretch * WR + wr, row_tiles - 1);
        codes = in.codes + (row_tile * in.tiles + begin + wk) * (32 * WORDS);
        scales = in.params + row_tile * in.groups * 8 + g;
        zeros = in.zeros + row_tile * in.groups * 8 + g;
    };
    const auto ask = [&](int slot, int index) {
        load_words<WORDS>(words[slot], codes + index * (WK * 32 * WORDS), lane);
        if (!LUT)
#pragma unroll
            for (int half = 0; half < HALF_COUNT; ++half) {
                int group = __umulhi(uint32_t((begin + wk + index * WK) * 2 + half) * 2, in.group_factor);
                if (HALVES) group = min(group, in.groups - 1);  // the second half may lie behind the last column
                meta[slot][half].scales = load1(scales + group * 8);
                meta[slot][half].zeros = zeros[group * 8];
            }
    };
    int stretch = blockIdx.x;
    go_to(stretch);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        if (i < count) ask(i, i);
    Residual<LANES, 2> residual;
    residual.begin(in.indptr, stretch * ROWS + row, in.rows, lane_of_row);
#if LUT
    using T = Tables<WR>;
    NextTables<WR, THREADS> next_tables;
    next_tables.ask(reinterpret_cast<const uint16_t*>(in.params), stretch * ROWS, in.rows);
    next_tables.store(reinterpret_cast<uint32_t*>(tables));
    const uint32_t base = wr * T::WORDS_A_TILE * 4 + lane / (4 / T::COPIES) * 4;
#else
    const uint32_t base = 0;
#endif
    residual.ask(in.entries);

    launched_before_is_done();
    take_activations<THREADS, ONE>(in, x_shared, tile_sums, factors, begin, stop, batch, pitch);

    int x_lane[NT];  // bytes
#pragma unroll
    for (int n = 0; n < NT; ++n) x_lane[n] = (ONE ? 0 : min(n * 8 + g, batch - 1) * 64) + t * 16;

    for (int parity = 0; stretch * WR < row_tiles; parity ^= 1) {
        const int next_stretch = stretch + gridDim.x;
        const bool more = next_stretch * WR < row_tiles;
        Residual<LANES, 2> next_residual;
        next_residual.begin(in.indptr, next_stretch * ROWS + row, in.rows, lane_of_row);
#if LUT
        next_tables.ask(reinterpret_cast<const uint16_t*>(in.params), next_stretch * ROWS, in.rows);
        const char* const tables_now = tables + parity * WR * T::WORDS_A_TILE * 4;
#else
        const char* const tables_now = nullptr;
#endif
        float sums[NT][4] = {};
        for (int first = 0; first < padded; first += AHEAD) {
            const bool last = first + AHEAD >= padded;
            if (last) go_to(next_stretch);
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                const int index = first + i;
                uint32_t now[WORDS];
                Meta meta_now[HALF_COUNT];
#pragma unroll
                for (int w = 0; w < WORDS; ++w) now[w] = words[i][w];
#pragma unroll
                for (int half = 0; half < HALF_COUNT; ++half) meta_now[half] = meta[i][half];
                const int next = last ? i : index + AHEAD;
                if (next < count && (!last || more)) ask(i, next);
                if (index >= count) continue;

                const int tile = wk + index * WK;
                const char* const x_tile = x_shared + tile * batch * 128;
                float part[NT][4];
                float plain[NT][2];
                const auto start = [&](int half) {
#pragma unroll
                    for (int n = 0; n < NT; ++n) {
                        const Sums* const at = tile_sums + (HALVES ? tile * 2 + half : tile) * pitch;
                        if (ONE) {
                            const Sums one = *at;
                            part[n][0] = part[n][1] = part[n][2] = part[n][3] = one.x;
                            plain[n][0] = plain[n][1] = one.y;
                        } else {
                            const float4 two =
                                *reinterpret_cast<const float4*>(at + min(n * 8 + t * 2, pitch - 2));
                            part[n][0] = part[n][2] = two.x;
                            part[n][1] = part[n][3] = two.z;
                            plain[n][0] = two.y;
                            plain[n][1] = two.w;
                        }
                    }
                };
                const auto finish = [&](const Meta& of) {
                    const float s0 = half_to_float(of.scales & 0xFFFF), s1 = half_to_float(of.scales >> 16);
                    const float z0 = float(of.zeros & 0xFF), z1 = float(of.zeros >> 8);
#pragma unroll
                    for (int n = 0; n < NT; ++n) {
                        sums[n][0] += s0 * (part[n][0] - z0 * plain[n][0]);
                        sums[n][1] += s0 * (part[n][1] - z0 * plain[n][1]);
                        sums[n][2] += s1 * (part[n][2] - z1 * plain[n][0]);
                        sums[n][3] += s1 * (part[n][3] - z1 * plain[n][1]);
                    }
                };
                uint32_t a[2][4];
                const auto product = [&](int half) {
#pragma unroll
                    for (int n = 0; n < NT; ++n) {
                        const uint4 b = *reinterpret_cast<const uint4*>(x_tile + half * batch * 64 + x_lane[n]);
                        multiply(LUT ? sums[n] : part[n], a[0], b.x, b.y);
                        multiply(LUT ? sums[n] : part[n], a[1], b.z, b.w);
                    }
                };
                if (!LUT) start(0);
                fragment<0, WR>(a[0], now, tables_now, base);
                fragment<1, WR>(a[1], now, tables_now, base);
                product(0);
                if (HALVES && !LUT) {
                    finish(meta_now[0]);
                    start(1);
                }
                fragment<2, WR>(a[0], now, tables_now, base);
                fragment<3, WR>(a[1], now, tables_now, base);
                product(1);
                if (!LUT) finish(meta_now[HALF_COUNT - 1]);
            }
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
                    const char* from = x_shared + (at >> 6) * batch * 128 + ((f >> 1) * batch + first) * 64 +
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
        next_tables.store(reinterpret_cast<uint32_t*>(tables + (parity ^ 1) * WR * T::WORDS_A_TILE * 4));
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

// ---- weights -----------------------------------------------------------------------------------------------

// y [rows from first_row on, columns] = dense + sparse, rounded (where there is a residual, also before it is added). A
// block for a row tile and a part of the columns; in.rows ends the part that is wanted.
template <int AHEAD>
DEVICE void expand(const Arguments& in, int first_row) {
    constexpr int WARPS = 8, THREADS = 32 * WARPS, LANES = THREADS / 16;
    extern __shared__ __align__(16) char shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int row_tile = first_row / 16 + blockIdx.x;
    const int share = (in.tiles + gridDim.y - 1) / gridDim.y;
    const int begin = blockIdx.y * share, stop = min(in.tiles, begin + share);
    const uint32_t* codes = in.codes + int64_t(row_tile) * in.tiles * (32 * WORDS);

    uint32_t words[AHEAD][WORDS];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        if (begin + warp + i * WARPS < stop)
            load_words<WORDS>(words[i], codes + int64_t(begin + warp + i * WARPS) * (32 * WORDS), lane);
    Residual<LANES, 2> residual;
    residual.begin(in.indptr, row_tile * 16 + threadIdx.x / LANES, in.rows, threadIdx.x % LANES);
    uint32_t base = 0;
#if LUT
    NextTables<1, THREADS> tables;
    tables.ask(reinterpret_cast<const uint16_t*>(in.params), row_tile * 16, in.rows);
    tables.store(reinterpret_cast<uint32_t*>(shared));
    base = lane / (4 / Tables<1>::COPIES) * 4;
    __syncthreads();
#endif
    residual.ask(in.entries);
    uint16_t* const out = in.y + int64_t(blockIdx.x) * 16 * in.columns;
    const bool upper = row_tile * 16 + g < in.rows, lower = row_tile * 16 + g + 8 < in.rows;

    for (int first = begin + warp; first < stop; first += AHEAD * WARPS) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int tile = first + i * WARPS;
            if (tile >= stop) break;
            uint32_t now[WORDS];
#pragma unroll
            for (int w = 0; w < WORDS; ++w) now[w] = words[i][w];
            if (tile + AHEAD * WARPS < stop)
                load_words<WORDS>(words[i], codes + int64_t(tile + AHEAD * WARPS) * (32 * WORDS), lane);
            float scale[2], less[2][8];  // by row half: the scale, and it times what is to be taken off
            const auto group_of = [&](int half) {
                int group = __umulhi(uint32_t(tile * 2 + half) * 2, in.group_factor);
                if (HALVES) group = min(group, in.groups - 1);
                const int64_t at = (int64_t(row_tile) * in.groups + group) * 8 + g;
                const uint32_t two = in.params[at], zeros = in.zeros[at];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    scale[h] = half_to_float(h ? two >> 16 : two & 0xFFFF);
#pragma unroll
                    for (int c = 0; c < 8; ++c) less[h][c] = raised_by(c) + float(h ? zeros >> 8 : zeros & 0xFF);
                }
            };
            const auto scaled = [&](uint32_t two, int h, int c) {
                const float low = half_to_float(two & 0xFFFF), high = half_to_float(two >> 16);
                if (LUT) return BF16 ? pair_from_floats(low, high) : two;
                return pair_from_floats((low - less[h][c]) * scale[h], (high - less[h][c]) * scale[h]);
            };
            const auto store = [&](int f, const uint32_t (&a)[4]) {
                const int column = tile * 64 + f * 16 + t * 4;
                if (TAIL && column >= in.columns) return;
                if (upper)
                    *reinterpret_cast<uint2*>(out + int64_t(g) * in.columns + column) =
                        make_uint2(scaled(a[0], 0, 2 * f), scaled(a[2], 0, 2 * f + 1));
                if (lower)
                    *reinterpret_cast<uint2*>(out + int64_t(g + 8) * in.columns + column) =
                        make_uint2(scaled(a[1], 1, 2 * f), scaled(a[3], 1, 2 * f + 1));
            };
            uint32_t a[4];
            if (!LUT) group_of(0);
            fragment<0, 1>(a, now, shared, base);
            store(0, a);
            fragment<1, 1>(a, now, shared, base);
            store(1, a);
            if (HALVES && !LUT) group_of(1);
            fragment<2, 1>(a, now, shared, base);
            store(2, a);
            fragment<3, 1>(a, now, shared, base);
            store(3, a);
        }
    }
    if (in.indptr == nullptr) return;
    __syncthreads();
    uint16_t* const mine = out + int64_t(threadIdx.x / LANES) * in.columns;
    residual.walk(in.entries, [&](uint32_t column, float value) {
        if (int(column) < begin * 64 || int(column) >= stop * 64) return;
        mine[column] = from_float(to_float(mine[column]) + value);
    });
}

extern "C" __global__ void __launch_bounds__(256) expand_rows(const __grid_constant__ Arguments in) {
    expand<2>(in, in.batch);  // the first row
}

#define MATVEC(NT, ONE, WR, WK, AHEAD, BLOCKS)                                                                       \
    extern "C" __global__ void __launch_bounds__(32 * WR * WK, BLOCKS)                                               \
        matvec_##NT##_##ONE##_##WR##_##WK##_##AHEAD##_##BLOCKS(const __grid_constant__ Arguments in) {               \
        matvec<NT, ONE, WR, WK, AHEAD>(in);                                                                          \
    }

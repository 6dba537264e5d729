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
    static constexpr int ALIGNMENT = WORDS_A_HALF * 4;  // the bits of a pair are zero in an address
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

// `base` is the shared address of the row tile's tables and the lane's slot.
template <int WR, int P>
DEVICE uint32_t lut_pair(const uint32_t (&words)[WORDS], uint32_t base) {
    using T = Tables<WR>;
    constexpr int field = 2 * BITS, count = 32 / field;
    constexpr uint32_t mask = uint32_t(T::PAIRS - 1) << T::SHIFT;
    uint32_t address;
    if constexpr (P < count * WORDS) {
        constexpr int at = P % count * field - T::SHIFT;
        const uint32_t word = words[P / count];
        address = mask_or<mask>(at >= 0 ? word >> (at & 31) : word << (-at & 31), base);
    } else {  // the pair whose bits are what 3-bit fields left over
        const uint32_t pair = words[0] >> 30 | (words[1] >> 30) << 2 | (words[2] >> 30) << 4;
        address = pair << T::SHIFT | base;
    }
    return shared_load<(P & 1) * T::WORDS_A_HALF * 4>(address);
}

// ---- the product ------------------------------------------------------------------------------------------

struct Meta {  // of a group
    uint32_t scales, zeros;
};

// The operand of the 16 columns F: registers of rows g and g + 8, twice.
template <int F, int WR>
DEVICE void fragment(uint32_t (&a)[4], const uint32_t (&words)[WORDS], uint32_t base) {
#if LUT
    a[0] = lut_pair<WR, 4 * F>(words, base);
    a[1] = lut_pair<WR, 4 * F + 1>(words, base);
    a[2] = lut_pair<WR, 4 * F + 2>(words, base);
    a[3] = lut_pair<WR, 4 * F + 3>(words, base);
#else
    a[0] = uniform_pair<2 * F, 0>(words);
    a[1] = uniform_pair<2 * F, 1>(words);
    a[2] = uniform_pair<2 * F + 1, 0>(words);
    a[3] = uniform_pair<2 * F + 1, 1>(words);
#endif
}

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

// ---- weights -----------------------------------------------------------------------------------------------

// y [rows from first_row on, columns] = dense + sparse, rounded (where there is a residual, also before it is added). A
// block for a row tile and a part of the columns; in.rows ends the part that is wanted. Through shared memory, so that a
// warp writes whole lines of 128 bytes: the second-level cache takes few requests, not few bytes.
DEVICE void expand(const Arguments& in, int first_row) {
    constexpr int WARPS = 8, THREADS = 32 * WARPS, LANES = THREADS / 16, AHEAD = 2, LINE = 144;
    extern __shared__ __align__(16) char shared[];
    __shared__ __align__(16) char lines[WARPS][16 * LINE];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int row_tile = first_row / 16 + blockIdx.x;
    const int share = (in.tiles + gridDim.y - 1) / gridDim.y;
    const int begin = blockIdx.y * share, stop = min(in.tiles, begin + share);
    const uint32_t* const codes = in.codes + int64_t(row_tile) * in.tiles * (32 * WORDS) + words_before<WORDS>(lane);

    uint32_t words[AHEAD][WORDS];
    Meta meta[AHEAD][2];
    const auto ask = [&](int slot, int tile) {
        if (tile >= stop) return;
        load_words<WORDS>(words[slot], codes + int64_t(tile) * (32 * WORDS), lane);
        if (!LUT)
#pragma unroll
            for (int half = 0; half < (HALVES ? 2 : 1); ++half) {
                uint32_t group = __umulhi(uint32_t(4 * tile + 2 * half), in.group_factor);
                if (HALVES) group = min(int(group), in.groups - 1);
                const int64_t at = (int64_t(row_tile) * in.groups + group) * 8 + g;
                meta[slot][half].scales = in.params[at];
                meta[slot][half].zeros = in.zeros[at];
            }
    };
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) ask(i, begin + warp + i * WARPS);
    Residual<LANES, 2> residual;
    residual.begin(in.indptr, row_tile * 16 + threadIdx.x / LANES, in.rows, threadIdx.x % LANES);
    uint32_t base = 0;
#if LUT
    base = (shared_address(shared) + Tables<1>::ALIGNMENT - 1) / Tables<1>::ALIGNMENT * Tables<1>::ALIGNMENT;
    NextTables<1, THREADS> tables;
    tables.ask(reinterpret_cast<const uint16_t*>(in.params), row_tile * 16, in.rows);
    tables.store(reinterpret_cast<uint32_t*>(shared + (base - shared_address(shared))));
    base += lane / (4 / Tables<1>::COPIES) * 4;
    __syncthreads();
#endif
    residual.ask(in.entries);
    uint16_t* const out = in.y + int64_t(blockIdx.x) * 16 * in.columns;
    char* const line = lines[warp];

    for (int first = begin + warp; first < stop; first += AHEAD * WARPS) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int tile = first + i * WARPS;
            if (tile >= stop) break;
            uint32_t a[4][4];
            fragment<0, 1>(a[0], words[i], base);
            fragment<1, 1>(a[1], words[i], base);
            fragment<2, 1>(a[2], words[i], base);
            fragment<3, 1>(a[3], words[i], base);
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int f = 0; f < 4; ++f) {
                    const Meta& of = meta[i][HALVES ? f / 2 : 0];
                    const float scale = half_to_float(h ? of.scales >> 16 : of.scales & 0xFFFF);
                    const float zero = float(h ? of.zeros >> 8 : of.zeros & 0xFF);
                    const auto value = [&](uint32_t two, int c) {
                        const float low = half_to_float(two & 0xFFFF), high = half_to_float(two >> 16);
                        if (LUT) return BF16 ? pair_from_floats(low, high) : two;
                        const float less = raised_by(c) + zero;
                        return pair_from_floats((low - less) * scale, (high - less) * scale);
                    };
                    *reinterpret_cast<uint2*>(line + (g + 8 * h) * LINE + f * 32 + t * 8) =
                        make_uint2(value(a[f][h], 2 * f), value(a[f][2 + h], 2 * f + 1));
                }
            ask(i, tile + AHEAD * WARPS);
            __syncwarp();
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int r = j * 4 + lane / 8, column = tile * 64 + lane % 8 * 8;
                if (row_tile * 16 + r >= in.rows) continue;
                const uint4 eight = *reinterpret_cast<const uint4*>(line + r * LINE + lane % 8 * 16);
                uint16_t* const to = out + int64_t(r) * in.columns + column;
                if (!TAIL) {
                    *reinterpret_cast<uint4*>(to) = eight;
                } else {  // rows begin at multiples of 8 bytes
                    if (column < in.columns) *reinterpret_cast<uint2*>(to) = make_uint2(eight.x, eight.y);
                    if (column + 4 < in.columns) *reinterpret_cast<uint2*>(to + 4) = make_uint2(eight.z, eight.w);
                }
            }
            __syncwarp();
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
    expand(in, in.batch);  // the first row
}

#define MATVEC(NT, ONE, WR, WK, AHEAD, BLOCKS)                                                                       \
    extern "C" __global__ void __launch_bounds__(32 * WR * WK, BLOCKS)                                               \
        matvec_##NT##_##ONE##_##WR##_##WK##_##AHEAD##_##BLOCKS(const __grid_constant__ Arguments in) {               \
        matvec<NT, ONE, WR, WK, AHEAD>(in);                                                                          \
    }

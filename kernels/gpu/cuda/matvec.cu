// y = x * (dense + sparse)^T for the uniform and lut kinds and up to 64 activations: weights are the 16 x 16 operand of
// the tensor cores, decoded in registers from the layout of layout.py; up to eight activations are the other operand.
//
// A block takes 16 * WR rows at a time, a warp 16 of these; WK warps share the columns, 64 at a time, and gridDim.y blocks
// share them again. A block stays for several such stretches, gridDim.x apart: the activations lie in shared memory, in
// the order of the operand, and the weights of the next stretch are on their way when one ends. Sums are float32, in an
// order that depends on nothing but the launch.
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
constexpr uint32_t MAGIC = BF16 ? 0x43004300u : 0x64006400u;  // 128 or 1024: adding a code sets its lowest bits

// ---- uniform ----------------------------------------------------------------------------------------------

// -(magic + zero point) over 2^shift, where the code lies that much higher, and the factor that brings it down
struct Offset {
    uint32_t value[2];  // of the two rows of a lane
};

DEVICE void offsets(uint32_t zeros, int shift, Offset& out) {
    // 1024 + z, or 128 + z for z < 128, is z in the lowest bits of the magic number
    const uint32_t high = BF16 ? 0xC3C3C3C3u : 0xE4E4E4E4u;  // with the sign set
    out.value[0] = permute(zeros, high, 0x4040);
    out.value[1] = permute(zeros, high, 0x4141);
    if (shift) {
        // -(1024 / 2^shift + z) = -(1024 + z) + (1024 - 1024 / 2^shift), exact
        const float whole = BF16 ? 128.0f : 1024.0f;
        const float rest = whole - whole / float(1 << shift);
        const uint32_t more = pair_from_floats(rest, rest), one = pair_from_floats(1.0f, 1.0f);
        out.value[0] = fma2(out.value[0], one, more);
        out.value[1] = fma2(out.value[1], one, more);
    }
}

// Two codes at bits AT and AT + 16, less their zero point, as activations.
template <uint32_t MASK, int AT>
DEVICE uint32_t centred(uint32_t word, uint32_t offset) {
    const float down = 1.0f / float(1 << AT);
    return fma2(mask_or<(MASK << AT) * 0x00010001u>(word, MAGIC), pair_from_floats(down, down), offset);
}

constexpr int MANTISSA = BF16 ? 7 : 10;
constexpr int STEP = MANTISSA / BITS * BITS;  // fields that lie in the mantissa need no shift

// Field number FIELD of the word, for row half `h`.
template <int FIELD>
DEVICE uint32_t field(uint32_t word, const Offset (&offset)[BITS == 2 ? 5 : 3], int h) {
    constexpr int at = FIELD * BITS, shift = at / STEP * STEP, rest = at - shift;
    return centred<(1u << BITS) - 1, rest>(shift ? word >> shift : word, offset[rest / BITS].value[h]);
}

DEVICE uint32_t eight_bit_pair(uint32_t word, int first, uint32_t offset) {
    // float16 holds a code less a zero point exactly, and so does bfloat16, but not the magic number's way there
    const uint32_t magic = permute(word, 0x64646464u, first ? 0x4342 : 0x4140);
    const uint32_t half = half_add2(magic, offset);
    if (!BF16) return half;
    return pair_from_floats(half_to_float(half & 0xFFFF), half_to_float(half >> 16));
}

// Pair p of a lane: fragment p / 4 (16 columns), register p % 4 of the operand; odd registers belong to row g + 8.
template <int P>
DEVICE uint32_t uniform_pair(const uint32_t (&words)[WORDS], const Offset (&offset)[BITS == 2 ? 5 : 3]) {
    constexpr int h = P & 1;
    if constexpr (BITS == 8) {
        return eight_bit_pair(words[P / 2], P & 1, offset[0].value[h]);
    } else if constexpr (BITS == 4) {
        return field<P % 4>(words[P / 4], offset, h);
    } else if constexpr (BITS == 2) {
        return field<P % 8>(words[P / 8], offset, h);
    } else if constexpr (P < 15) {
        return field<P % 5>(words[P / 5], offset, h);
    } else {
        uint32_t code = mask_or<0x00010001u>(words[0] >> 15, MAGIC);
        code = mask_or<0x00020002u>(words[1] >> 14, code);
        code = mask_or<0x00040004u>(words[2] >> 13, code);
        const uint32_t one = pair_from_floats(1.0f, 1.0f);
        return fma2(code, one, offset[0].value[h]);
    }
}

// ---- lut --------------------------------------------------------------------------------------------------

// A table of pairs of codes for each row, so that one read of shared memory gives two weights. [half][pair][slot] words;
// with 32 slots every lane has a bank of its own, with 8 the four lanes of a row share a table.
template <int WR>
struct Tables {
    static constexpr int SLOTS = BITS == 2 || (BITS == 3 && WR == 1) ? 32 : 8;
    static constexpr int PAIRS = 1 << (2 * BITS);
    static constexpr int WORDS_A_HALF = PAIRS * SLOTS;
    static constexpr int WORDS_A_TILE = 2 * WORDS_A_HALF;
    static constexpr int SHIFT = SLOTS == 32 ? 7 : 5;  // pair to byte offset
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
            const int row = first_row + job / (T::SLOTS * ENTRIES) * 8 + (T::SLOTS == 32 ? slot / 4 : slot);
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
            const uint32_t low = BF16 ? from_float(half_to_float(first[i])) : first[i];
            uint32_t* const here = to + job / (T::SLOTS * ENTRIES) * T::WORDS_A_HALF + job % (T::SLOTS * ENTRIES);
#pragma unroll
            for (int j = 0; j < ENTRIES / 2; ++j) {
                uint32_t two = table[i][j];
                if (BF16) two = pair_from_floats(half_to_float(two & 0xFFFF), half_to_float(two >> 16));
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

template <int P0, int WR>
DEVICE void fragment(uint32_t (&a)[4], const uint32_t (&words)[WORDS], const Offset (&offset)[BITS == 2 ? 5 : 3],
                     const char* tables, uint32_t base) {
#if LUT
    a[0] = lut_pair<WR, P0>(words, tables, base);
    a[1] = lut_pair<WR, P0 + 1>(words, tables, base);
    a[2] = lut_pair<WR, P0 + 2>(words, tables, base);
    a[3] = lut_pair<WR, P0 + 3>(words, tables, base);
#else
    a[0] = uniform_pair<P0>(words, offset);
    a[1] = uniform_pair<P0 + 1>(words, offset);
    a[2] = uniform_pair<P0 + 2>(words, offset);
    a[3] = uniform_pair<P0 + 3>(words, offset);
#endif
}

DEVICE void all_offsets(Offset (&offset)[BITS == 2 ? 5 : 3], uint32_t zeros) {
    if constexpr (BITS == 8) {
        offset[0].value[0] = permute(zeros, 0xE4E4E4E4u, 0x4040);
        offset[0].value[1] = permute(zeros, 0xE4E4E4E4u, 0x4141);
    } else {
#pragma unroll
        for (int i = 0; i < STEP / BITS; ++i) offsets(zeros, i * BITS, offset[i]);
    }
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
    const int begin = blockIdx.y * share, stop = min(in.tiles, begin + share);
    const int count = max(0, (stop - begin - wk + WK - 1) / WK), padded = (count + AHEAD - 1) / AHEAD * AHEAD;

    // [share * 4 runs of 16 columns][batch][16]; two of tables; two of [WK + 1][batch][PITCH] sums
    char* const x_shared = shared;
    char* const tables = x_shared + share * batch * 128;
    float* const reduced =
        reinterpret_cast<float*>(tables + (LUT ? 2 * WR * Tables<WR>::WORDS_A_TILE * 4 : 0));
    const int reduced_size = (WK + 1) * batch * PITCH;

    uint32_t words[AHEAD][WORDS];
    Meta meta[AHEAD][HALF_COUNT];
    const auto ask = [&](int slot, int stretch, int index) {
        if (index < count && stretch * WR < row_tiles) {
            const int row_tile = min(stretch * WR + wr, row_tiles - 1), tile = begin + wk + index * WK;
            load_words<WORDS>(words[slot], in.codes + (int64_t(row_tile) * in.tiles + tile) * (32 * WORDS), lane);
            if (!LUT)
#pragma unroll
                for (int half = 0; half < HALF_COUNT; ++half) {
                    int group = __umulhi(uint32_t(tile * 2 + half) * 2, in.group_factor);
                    if (HALVES) group = min(group, in.groups - 1);  // the second half may lie behind the last column
                    const int64_t at = (int64_t(row_tile) * in.groups + group) * 8 + g;
                    meta[slot][half].scales = load1(in.params + at);
                    meta[slot][half].zeros = in.zeros[at];
                }
        }
    };
    int stretch = blockIdx.x;
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) ask(i, stretch, i);
    Residual<LANES, 2> residual;
    residual.begin(in.indptr, stretch * ROWS + row, in.rows, lane_of_row);
#if LUT
    NextTables<WR, THREADS> next_tables;
    next_tables.ask(reinterpret_cast<const uint16_t*>(in.params), stretch * ROWS, in.rows);
    next_tables.store(reinterpret_cast<uint32_t*>(tables));
#endif
    residual.ask(in.entries);

    launched_before_is_done();
    for (int i = threadIdx.x; i < (stop - begin) * batch * 16; i += THREADS) {
        const int four = i & 3, m = ONE ? 0 : (i >> 2) % batch, column = (begin * 4 + (i >> 2) / batch) * 16 + four * 4;
        const bool there = !TAIL || column < in.columns;
        copy_async(x_shared + i * 8, in.x + m * in.x_stride + (there ? column : 0), there);
    }
    copies_arrived();
    __syncthreads();

    int x_lane[NT];  // bytes
#pragma unroll
    for (int n = 0; n < NT; ++n) x_lane[n] = (ONE ? 0 : min(n * 8 + g, batch - 1) * 32) + t * 8;

    for (int parity = 0; stretch * WR < row_tiles; parity ^= 1) {
        const int next_stretch = stretch + gridDim.x;
        Residual<LANES, 2> next_residual;
        next_residual.begin(in.indptr, next_stretch * ROWS + row, in.rows, lane_of_row);
#if LUT
        next_tables.ask(reinterpret_cast<const uint16_t*>(in.params), next_stretch * ROWS, in.rows);
        using T = Tables<WR>;
        const uint32_t base = wr * T::WORDS_A_TILE * 4 + (T::SLOTS == 32 ? lane : g) * 4;
        const char* const tables_now = tables + parity * WR * T::WORDS_A_TILE * 4;
#else
        const uint32_t base = 0;
        const char* const tables_now = nullptr;
#endif
        float sums[NT][4] = {};
        for (int first = 0; first < padded; first += AHEAD) {
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                const int index = first + i;
                uint32_t now[WORDS];
                Meta meta_now[HALF_COUNT];
#pragma unroll
                for (int w = 0; w < WORDS; ++w) now[w] = words[i][w];
#pragma unroll
                for (int half = 0; half < HALF_COUNT; ++half) meta_now[half] = meta[i][half];
                const bool same = index + AHEAD < padded;
                ask(i, same ? stretch : next_stretch, same ? index + AHEAD : i);
                if (index >= count) continue;

                const char* const x_tile = x_shared + (wk + index * WK) * batch * 128;
                float part[NT][4] = {};
                Offset offset[BITS == 2 ? 5 : 3];
                uint32_t a[4];
                const auto product = [&](int f) {
#pragma unroll
                    for (int n = 0; n < NT; ++n) {
                        const uint2 b = *reinterpret_cast<const uint2*>(x_tile + f * batch * 32 + x_lane[n]);
                        multiply(LUT ? sums[n] : part[n], a, b.x, b.y);
                    }
                };
                const auto finish = [&](uint32_t two) {
                    const float s0 = half_to_float(two & 0xFFFF), s1 = half_to_float(two >> 16);
#pragma unroll
                    for (int n = 0; n < NT; ++n) {
                        sums[n][0] += s0 * part[n][0];
                        sums[n][1] += s0 * part[n][1];
                        sums[n][2] += s1 * part[n][2];
                        sums[n][3] += s1 * part[n][3];
#pragma unroll
                        for (int j = 0; j < 4; ++j) part[n][j] = 0;
                    }
                };
                if (!LUT) all_offsets(offset, meta_now[0].zeros);
                fragment<0, WR>(a, now, offset, tables_now, base);
                product(0);
                fragment<4, WR>(a, now, offset, tables_now, base);
                product(1);
                if (HALVES && !LUT) {
                    finish(meta_now[0].scales);
                    all_offsets(offset, meta_now[HALF_COUNT - 1].zeros);
                }
                fragment<8, WR>(a, now, offset, tables_now, base);
                product(2);
                fragment<12, WR>(a, now, offset, tables_now, base);
                product(3);
                if (!LUT) finish(meta_now[HALF_COUNT - 1].scales);
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
                    const char* from = x_shared + ((at >> 4) * batch + first) * 32 + (at & 15) * 2;
#pragma unroll
                    for (int m = 0; m < (ONE ? 1 : 8); ++m)
                        if (ONE || first + m < batch)
                            extra[m] += value * to_float(*reinterpret_cast<const uint16_t*>(from + m * 32));
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
    base = (Tables<1>::SLOTS == 32 ? lane : g) * 4;
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
            Offset offset[BITS == 2 ? 5 : 3];
            float scale[2] = {};
            const auto group_of = [&](int half) {
                int group = __umulhi(uint32_t(tile * 2 + half) * 2, in.group_factor);
                if (HALVES) group = min(group, in.groups - 1);
                const int64_t at = (int64_t(row_tile) * in.groups + group) * 8 + g;
                const uint32_t two = in.params[at];
                scale[0] = half_to_float(two & 0xFFFF);
                scale[1] = half_to_float(two >> 16);
                all_offsets(offset, in.zeros[at]);
            };
            const auto scaled = [&](uint32_t two, int h) {
                if (LUT) return two;
                return pair_from_floats(to_float(two & 0xFFFF) * scale[h], to_float(two >> 16) * scale[h]);
            };
            const auto store = [&](int f, const uint32_t (&a)[4]) {
                const int column = tile * 64 + f * 16 + t * 4;
                if (TAIL && column >= in.columns) return;
                if (upper)
                    *reinterpret_cast<uint2*>(out + int64_t(g) * in.columns + column) =
                        make_uint2(scaled(a[0], 0), scaled(a[2], 0));
                if (lower)
                    *reinterpret_cast<uint2*>(out + int64_t(g + 8) * in.columns + column) =
                        make_uint2(scaled(a[1], 1), scaled(a[3], 1));
            };
            uint32_t a[4];
            if (!LUT) group_of(0);
            fragment<0, 1>(a, now, offset, shared, base);
            store(0, a);
            fragment<4, 1>(a, now, offset, shared, base);
            store(1, a);
            if (HALVES && !LUT) group_of(1);
            fragment<8, 1>(a, now, offset, shared, base);
            store(2, a);
            fragment<12, 1>(a, now, offset, shared, base);
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

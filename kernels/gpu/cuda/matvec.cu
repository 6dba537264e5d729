// y = x * (dense + sparse)^T for the uniform and lut kinds and up to 64 activations: weights are the 16 x 16 operand of
// the tensor cores, decoded in registers from the layout of layout.py; up to eight activations are the other operand.
//
// A block owns 16 * WR rows, of which a warp takes 16; WK warps share the columns of a row tile, 64 at a time, and
// gridDim.y blocks share them again. Sums are float32, in an order that depends on nothing but the launch.
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

template <int WR, int THREADS>
DEVICE void build_tables(uint32_t* tables, const uint16_t* source, int first_row, int rows) {
    using T = Tables<WR>;
    for (int i = threadIdx.x; i < WR * T::WORDS_A_TILE; i += THREADS) {
        const int slot = i % T::SLOTS, pair = i / T::SLOTS % T::PAIRS, half = i / T::WORDS_A_HALF % 2;
        const int row = i / T::WORDS_A_TILE * 16 + half * 8 + (T::SLOTS == 32 ? slot / 4 : slot);
        uint32_t out = 0;
        if (first_row + row < rows) {
            const uint16_t* table = source + (int64_t(first_row + row) << BITS);
            const uint32_t low = table[pair & ((1 << BITS) - 1)], high = table[pair >> BITS];
            out = BF16 ? pair_from_floats(half_to_float(low), half_to_float(high)) : low | high << 16;
        }
        tables[i] = out;
    }
}

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

// ONE: a single activation, kept in shared memory. Otherwise NT times eight of them, read where they are.
template <int NT, bool ONE, int WR, int WK, int AHEAD>
DEVICE void matvec(const Arguments& in) {
    constexpr int THREADS = 32 * WR * WK, ROWS = 16 * WR, LANES = THREADS / ROWS, BATCH = ONE ? 1 : 8 * NT;
    constexpr int HALF_COUNT = HALVES ? 2 : 1;
    extern __shared__ __align__(16) char shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, wr = warp % WR, wk = warp / WR;
    const int g = lane >> 2, t = lane & 3;
    const int first_row = blockIdx.x * ROWS, row_tiles = (in.rows + 15) / 16;
    const int row_tile = min(int(blockIdx.x) * WR + wr, row_tiles - 1);

    Residual<LANES, 2> residual;
    const bool has_residual = in.indptr != nullptr && blockIdx.y == 0;
    residual.begin(has_residual ? in.indptr : nullptr, first_row + threadIdx.x / LANES, in.rows, threadIdx.x % LANES);

    // columns of this block and of this warp
    const int share = (in.tiles + gridDim.y - 1) / gridDim.y;
    const int stop = min(in.tiles, int(blockIdx.y + 1) * share);
    const uint32_t* codes = in.codes + int64_t(row_tile) * in.tiles * (32 * WORDS);
    const uint32_t* scales = in.params + int64_t(row_tile) * in.groups * 8 + g;
    const uint16_t* zeros = in.zeros + int64_t(row_tile) * in.groups * 8 + g;

    uint32_t words[AHEAD][WORDS];
    Meta meta[AHEAD][HALF_COUNT];
    const auto ask = [&](int slot, int tile) {
        if (tile < stop) {
            load_words<WORDS>(words[slot], codes + int64_t(tile) * (32 * WORDS), lane);
            if (!LUT)
#pragma unroll
                for (int half = 0; half < HALF_COUNT; ++half) {
                    int group = __umulhi(uint32_t(tile * 2 + half) * 2, in.group_factor);
                    if (HALVES) group = min(group, in.groups - 1);  // the second half may lie behind the last column
                    meta[slot][half].scales = load1(scales + group * 8);
                    meta[slot][half].zeros = zeros[group * 8];
                }
        }
    };
    int tile = blockIdx.y * share + wk;
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) ask(i, tile + i * WK);

    char* const x_shared = shared;
    char* const tables = shared + (ONE ? in.tiles * 128 : 0);
    if (ONE)
        for (int i = threadIdx.x; i < in.tiles * 16; i += THREADS) {
            uint64_t four = 0;
            if (!TAIL || i * 4 < in.columns) four = *reinterpret_cast<const uint64_t*>(in.x + i * 4);
            reinterpret_cast<uint64_t*>(x_shared)[i] = four;
        }
#if LUT
    build_tables<WR, THREADS>(reinterpret_cast<uint32_t*>(tables), reinterpret_cast<const uint16_t*>(in.params),
                              first_row, in.rows);
    using T = Tables<WR>;
    const uint32_t base = wr * T::WORDS_A_TILE * 4 + (T::SLOTS == 32 ? lane : g) * 4;
#else
    const uint32_t base = 0;
#endif
    if (ONE || LUT) __syncthreads();
    residual.ask(in.entries);

    const uint16_t* x_lane[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n) x_lane[n] = in.x + min(n * 8 + g, in.batch - 1) * in.x_stride + t * 4;
    uint2 ahead[ONE ? 1 : NT][4];
    const auto ask_x = [&](int at) {
        if (!ONE && at < stop)
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int f = 0; f < 4; ++f) {
                    ahead[n][f] = make_uint2(0, 0);
                    if (!TAIL || at * 64 + f * 16 + t * 4 < in.columns)
                        ahead[n][f] = *reinterpret_cast<const uint2*>(x_lane[n] + at * 64 + f * 16);
                }
    };
    ask_x(tile);

    float sums[NT][4] = {};
    for (; tile < stop; tile += AHEAD * WK) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int here = tile + i * WK;
            if (here >= stop) break;
            uint32_t now[WORDS];
            Meta meta_now[HALF_COUNT];
#pragma unroll
            for (int w = 0; w < WORDS; ++w) now[w] = words[i][w];
#pragma unroll
            for (int half = 0; half < HALF_COUNT; ++half) meta_now[half] = meta[i][half];
            ask(i, here + AHEAD * WK);
            uint2 b[NT][4];
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int f = 0; f < 4; ++f)
                    b[n][f] = ONE ? *reinterpret_cast<const uint2*>(x_shared + here * 128 + f * 32 + t * 8)
                                  : ahead[ONE ? 0 : n][f];
            ask_x(here + WK);

            float part[NT][4] = {};
            Offset offset[BITS == 2 ? 5 : 3];
            uint32_t a[4];
            const auto product = [&](int f) {
#pragma unroll
                for (int n = 0; n < NT; ++n) multiply(LUT ? sums[n] : part[n], a, b[n][f].x, b[n][f].y);
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
            fragment<0, WR>(a, now, offset, tables, base);
            product(0);
            fragment<4, WR>(a, now, offset, tables, base);
            product(1);
            if (HALVES && !LUT) {
                finish(meta_now[0].scales);
                all_offsets(offset, meta_now[HALF_COUNT - 1].zeros);
            }
            fragment<8, WR>(a, now, offset, tables, base);
            product(2);
            fragment<12, WR>(a, now, offset, tables, base);
            product(3);
            if (!LUT) finish(meta_now[HALF_COUNT - 1].scales);
        }
    }

    // [WK][BATCH][ROWS]: the warps' sums, over what was there
    __syncthreads();
    float residual_sums[8] = {};
    const int row = threadIdx.x / LANES, lane_of_row = threadIdx.x % LANES;
    if (ONE && has_residual)
        residual.add(residual_sums, in.entries, reinterpret_cast<const uint16_t*>(x_shared), 0, 1);
    if (ONE) __syncthreads();
    float* const reduced = reinterpret_cast<float*>(shared);
    float* const mine = reduced + wk * BATCH * ROWS + wr * 16 + g;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j)
            if (!ONE || (t == 0 && j == 0)) {
                const int m = n * 8 + t * 2 + j;
                mine[m * ROWS] = sums[n][j];
                mine[m * ROWS + 8] = sums[n][j + 2];
            }
    __syncthreads();
    const bool alone = gridDim.y == 1, inside = first_row + row < in.rows;
#pragma unroll
    for (int first = 0; first < BATCH; first += 8) {
        if (first >= in.batch) break;
        const int count = min(in.batch - first, 8);
        if (has_residual) {
            if (!ONE) {
#pragma unroll
                for (int m = 0; m < 8; ++m) residual_sums[m] = 0;
                residual.add(residual_sums, in.entries, in.x + first * in.x_stride, in.x_stride, count);
            }
#pragma unroll
            for (int m = 0; m < (ONE ? 1 : 8); ++m)
                if (m < count) residual_sums[m] = sum_over_lanes<LANES>(residual_sums[m]);
        }
#pragma unroll
        for (int m = 0; m < (ONE ? 1 : 8); ++m)
            if (m < count && m % LANES == lane_of_row && inside) {
                float sum = residual_sums[m];
#pragma unroll
                for (int k = 0; k < WK; ++k) sum += reduced[(k * BATCH + first + m) * ROWS + row];
                const int64_t at = int64_t(first + m) * in.rows + first_row + row;
                if (alone)
                    in.y[at] = from_float(sum);
                else
                    in.partial[int64_t(blockIdx.y) * in.batch * in.rows + at] = sum;
            }
    }
    if (alone || !last_to_arrive(in.locks + blockIdx.x, gridDim.y)) return;
    for (int i = threadIdx.x; i < ROWS * in.batch; i += THREADS) {
        const int m = i / ROWS, r = first_row + i % ROWS;
        if (r >= in.rows) continue;
        const int64_t at = int64_t(m) * in.rows + r;
        float sum = 0;
        for (int k = 0; k < int(gridDim.y); ++k) sum += load_coherent(in.partial + int64_t(k) * in.batch * in.rows + at);
        in.y[at] = from_float(sum);
    }
}

#define MATVEC(NT, ONE, WR, WK, AHEAD, BLOCKS)                                                                       \
    extern "C" __global__ void __launch_bounds__(32 * WR * WK, BLOCKS)                                               \
        matvec_##NT##_##ONE##_##WR##_##WK##_##AHEAD##_##BLOCKS(const __grid_constant__ Arguments in) {               \
        matvec<NT, ONE, WR, WK, AHEAD>(in);                                                                          \
    }

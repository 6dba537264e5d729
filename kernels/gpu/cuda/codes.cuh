// Codes of the uniform and lut kinds, decoded in registers from the layout of layout.py into the 16 x 16 operand of the
// tensor cores, float16.
//
// A code of the uniform kind at bit s of the mantissa, under the exponent of 2^(10 - s), is 2^(10 - s) plus the code: one
// instruction for two weights. What that adds, and the zero point, is taken off later.
//
// Macros beside those of primitives.cuh: LUT (else uniform), BITS, METAS (groups of 128 columns: 1, where one may go on,
// 2 or 4), TAIL (columns are no multiple of 128).
constexpr bool HALVES = METAS == 4;  // a tile of 64 columns holds two groups, else one or a part of one

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
    const int* experts;       // of experts.cu: [gridDim.z], which one's weights; below zero nobody's
    int64_t x_stride;
    int64_t codes_stride, params_stride, zeros_stride;  // from one expert to the next
    int batch, rows, columns, tiles, groups;
    int share;                // of experts.cu: neighbours with the same activation
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
// with 32 slots every lane has a bank of its own, with 8 the four lanes of a row share a table.
template <int SLOTS>
struct Tables {
    static constexpr int COPIES = SLOTS / 8;
    static constexpr int PAIRS = 1 << (2 * BITS);
    static constexpr int WORDS_A_HALF = PAIRS * SLOTS;
    static constexpr int WORDS_A_TILE = 2 * WORDS_A_HALF;
    static constexpr int ALIGNMENT = BITS == 4 ? 16 : WORDS_A_HALF * 4;  // the bits of a pair are zero in an address
    static constexpr int SHIFT = SLOTS == 32 ? 7 : 5;                    // pair to byte offset
};

// The tables of the next TILES row tiles, a part for each thread: asked for, then stored.
template <int TILES, int SLOTS, int THREADS>
struct NextTables {
    using T = Tables<SLOTS>;
    static constexpr int ENTRIES = 1 << BITS;
    static constexpr int JOBS = TILES * 2 * 8 * ENTRIES;  // a job: the pairs of a row that begin with one code
    static constexpr int COUNT = (JOBS + THREADS - 1) / THREADS;
    uint32_t table[COUNT][ENTRIES / 2];
    uint16_t first[COUNT];

    DEVICE void ask(const uint16_t* source, int first_row, int rows) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int job = threadIdx.x + i * THREADS, row = first_row + job / (8 * ENTRIES) * 8 + job % 8;
            first[i] = 0;
#pragma unroll
            for (int j = 0; j < ENTRIES / 2; ++j) table[i][j] = 0;
            if (row < rows && (JOBS % THREADS == 0 || job < JOBS)) {
                const uint16_t* from = source + (int64_t(row) << BITS);
                first[i] = from[job / 8 % ENTRIES];
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
            const int half = job / (8 * ENTRIES), code = job / 8 % ENTRIES;
            uint32_t* const here = to + half * T::WORDS_A_HALF + code * SLOTS + job % 8 * T::COPIES;
#pragma unroll
            for (int j = 0; j < ENTRIES; ++j) {
                const uint32_t pair = permute(low, table[i][j / 2], j % 2 ? 0x7610 : 0x5410);
                uint32_t* const of = here + j * (SLOTS * ENTRIES);
                if (SLOTS == 32)
                    *reinterpret_cast<uint4*>(of) = make_uint4(pair, pair, pair, pair);
                else
                    *of = pair;
            }
        }
    }
};

// `base` is the shared address of the row tile's tables and the lane's slot.
template <int SLOTS, int P>
DEVICE uint32_t lut_pair(const uint32_t (&words)[WORDS], uint32_t base) {
    using T = Tables<SLOTS>;
    constexpr int field = 2 * BITS, count = 32 / field;
    constexpr uint32_t mask = uint32_t(T::PAIRS - 1) << T::SHIFT;
    uint32_t address;
    if constexpr (BITS == 4) {  // a pair is a byte
        address = permute(words[P / 4], 0, 0x4440 + P % 4) * (1u << T::SHIFT) + base;
    } else if constexpr (P < count * WORDS) {
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
template <int F, int SLOTS>
DEVICE void fragment(uint32_t (&a)[4], const uint32_t (&words)[WORDS], uint32_t base) {
#if LUT
    a[0] = lut_pair<SLOTS, 4 * F>(words, base);
    a[1] = lut_pair<SLOTS, 4 * F + 1>(words, base);
    a[2] = lut_pair<SLOTS, 4 * F + 2>(words, base);
    a[3] = lut_pair<SLOTS, 4 * F + 3>(words, base);
#else
    a[0] = uniform_pair<2 * F, 0>(words);
    a[1] = uniform_pair<2 * F, 1>(words);
    a[2] = uniform_pair<2 * F + 1, 0>(words);
    a[3] = uniform_pair<2 * F + 1, 1>(words);
#endif
}

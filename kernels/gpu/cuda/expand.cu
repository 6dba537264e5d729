// y [rows from first_row on, columns] = dense + sparse, rounded (where there is a residual, also before it is added). A
// block for a row tile and a part of the columns; in.rows ends the part that is wanted. Through shared memory, so that a
// warp writes whole lines of 128 bytes: the second-level cache takes few requests, not few bytes.
DEVICE void expand(const Arguments& in, int first_row) {
    constexpr int WARPS = 8, THREADS = 32 * WARPS, LANES = THREADS / 16, AHEAD = 2, LINE = 144, SLOTS = BITS == 4 ? 8 : 32;
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
    using T = Tables<SLOTS>;
    base = (shared_address(shared) + T::ALIGNMENT - 1) / T::ALIGNMENT * T::ALIGNMENT;
    NextTables<1, SLOTS, THREADS> tables;
    tables.ask(reinterpret_cast<const uint16_t*>(in.params), row_tile * 16, in.rows);
    tables.store(reinterpret_cast<uint32_t*>(shared + (base - shared_address(shared))));
    base += lane / (4 / T::COPIES) * 4;
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
            fragment<0, SLOTS>(a[0], words[i], base);
            fragment<1, SLOTS>(a[1], words[i], base);
            fragment<2, SLOTS>(a[2], words[i], base);
            fragment<3, SLOTS>(a[3], words[i], base);
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

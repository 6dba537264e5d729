constexpr int PITCH = ROWS + 8;

// y [rows from the row block in.batch on, columns] = dense + sparse, rounded (where there is a residual, also before it
// is added); a block for 128 x 128 elements. The tensor cores transform 16 columns at a time, additions do the rest: over
// the runs of 16 columns and the lowest bit of the row in registers, over the other bits of the row, which lie in other
// warps and lanes, by way of shared memory [rows with bits 4 to 6 last][PITCH]. Sums of 16 are exact, others float32.
DEVICE void expand(const Arguments& in) {
    extern __shared__ __align__(16) char shared[];
    float* const turned = reinterpret_cast<float*>(shared);
    float* const row_signs = turned + ROWS * PITCH;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int row_block = in.batch + blockIdx.x, first_column = blockIdx.y * ROWS, units = in.columns / UNIT;
    if (threadIdx.x < ROWS) row_signs[threadIdx.x] = in.signs_out[row_block * ROWS + threadIdx.x];

    // signs of the transform of 16, for the operand's columns t, t + 4 and t + 8, t + 12
    uint32_t b[2][2];
#pragma unroll
    for (int q = 0; q < 2; ++q)
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const int n = 8 * q + g, c = 8 * part + t;
            b[q][part] = (__popc(n & c) & 1 ? 0xBC00u : 0x3C00u) | (__popc(n & (c + 4)) & 1 ? 0xBC000000u : 0x3C000000u);
        }

    // this warp's windows 2 * warp and 2 * warp + 1 of every column
    const int at = 2 * warp * BITS, shift = at & 31;
    constexpr uint32_t mask = (1u << STATE_BITS) - 1;
    float sums[8][2][4] = {};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        if (first_column + k * 16 >= in.columns) break;
        uint32_t a[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t step = (int64_t(row_block) * units * UNIT + first_column + k * 16) / 8 + half;
            uint32_t words[BITS];
            load_words<BITS>(words, in.codes + step * (32 * BITS) + words_before<BITS>(lane), lane);
            Strings strings;
            unpack(strings, words, lane);
            uint32_t sum[2][2];  // column, window: 1024 and the sum of bytes as float16
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t both = __funnelshift_r(at < 32 ? strings.first[i] : strings.second[i],
                                                      at < 32 ? strings.second[i] : strings.third[i], shift);
                sum[i][0] = __dp4a((both & mask) * HASH, 0x01010101u, 0x6400u);
                sum[i][1] = __dp4a((both >> BITS & mask) * HASH, 0x01010101u, 0x6400u);
            }
#pragma unroll
            for (int w = 0; w < 2; ++w)  // less 1024 and 510
                a[2 * half + w] = half_add2(permute(sum[0][w], sum[1][w], 0x5410), 0xE5FEE5FEu);
        }
        multiply(sums[k][0], a, b[0][0], b[0][1]);
        multiply(sums[k][1], a, b[1][0], b[1][1]);
    }
#pragma unroll
    for (int level = 1; level < 8; level *= 2) {
        if (level * 16 >= in.block_in) break;
#pragma unroll
        for (int k = 0; k < 8; ++k)
            if (!(k & level))
#pragma unroll
                for (int q = 0; q < 2; ++q)
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const float x = sums[k][q][j], y = sums[k | level][q][j];
                        sums[k][q][j] = x + y;
                        sums[k | level][q][j] = x - y;
                    }
    }
#pragma unroll
    for (int k = 0; k < 8; ++k)
#pragma unroll
        for (int q = 0; q < 2; ++q) {
            float* const to = turned + (2 * warp * 8 + g) * PITCH + k * 16 + q * 8 + t * 2;
            const float* const s = sums[k][q];
            *reinterpret_cast<float2*>(to) = make_float2(s[0] + s[2], s[1] + s[3]);
            *reinterpret_cast<float2*>(to + 8 * PITCH) = make_float2(s[0] - s[2], s[1] - s[3]);
        }
    __syncthreads();

    // a thread for two columns and the rows of one bit 0 and one bit 3
    const int column = 2 * (threadIdx.x & 63), low = threadIdx.x >> 6 & 1, third = threadIdx.x >> 7;
    float2 v[32];  // bits 1, 2 of the row, then 4, 5, 6
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        const float* const from = turned + ((2 * (i & 3) + low) * 8 + (i >> 2)) * PITCH + column;
        const float2 x = *reinterpret_cast<const float2*>(from);
        const float2 y = *reinterpret_cast<const float2*>(from + 8 * 8 * PITCH);
        v[i] = third ? make_float2(x.x - y.x, x.y - y.y) : make_float2(x.x + y.x, x.y + y.y);
    }
#pragma unroll
    for (int level = 1; level < 32; level *= 2)
#pragma unroll
        for (int i = 0; i < 32; ++i)
            if (!(i & level)) {
                const float2 x = v[i], y = v[i | level];
                v[i] = make_float2(x.x + y.x, x.y + y.y);
                v[i | level] = make_float2(x.x - y.x, x.y - y.y);
            }
    uint16_t* const out = in.y + int64_t(blockIdx.x) * ROWS * in.columns + first_column;
    if (first_column + column < in.columns) {
        const int scale_at = (first_column + column) / in.block_in;
        const float scale = half_to_float(in.scales[int64_t(row_block) * (in.columns / in.block_in) + scale_at]);
        const float s0 = in.signs_in[first_column + column] * scale, s1 = in.signs_in[first_column + column + 1] * scale;
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const int row = low | (i & 3) << 1 | third << 3 | (i >> 2) << 4;
            const float sign = row_signs[row];
            *reinterpret_cast<uint32_t*>(out + int64_t(row) * in.columns + column) =
                pair_from_floats(v[i].x * (sign * s0), v[i].y * (sign * s1));
        }
    }
    if (in.indptr == nullptr) return;
    __syncthreads();
    Residual<2, 2> residual;
    residual.begin(in.indptr, row_block * ROWS + threadIdx.x / 2, in.rows, threadIdx.x % 2);
    residual.ask(in.entries);
    uint16_t* const mine = out + int64_t(threadIdx.x / 2) * in.columns;
    residual.walk(in.entries, [&](uint32_t c, float value) {
        const int here = int(c) - first_column;
        if (here < 0 || here >= ROWS) return;
        mine[here] = from_float(to_float(mine[here]) + value);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) expand_strings(const __grid_constant__ Arguments in) {
    expand(in);
}

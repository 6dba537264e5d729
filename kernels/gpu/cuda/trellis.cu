// y = x * (dense + sparse)^T for the trellis kind with 128 rows a string and up to 64 activations.
//
// A weight is a sum of the four bytes of state * 0x83DCD12D mod 2^32, less 510. The tensor cores add the bytes: the
// product is four neighbours of an operand of unsigned bytes, which meet one activation four times. An activation,
// rotated and scaled, is an integer of 16 bits: two columns of signed bytes. Sums are exact over 64 columns, then float32.
//
// A lane holds 16 consecutive windows of a column; the rows of an operand are numbered accordingly, and put in order
// when 128 rows are rotated back. Columns are shared by the warps of a block and by gridDim.y blocks; the last of these to
// arrive adds up what all have, in order. A block stays for several row blocks, gridDim.x apart. gridDim.z blocks share
// the activations.
//
// Macros beside those of primitives.cuh: BITS (2, 3 or 4) and STATE_BITS.
struct Arguments {
    const uint32_t* codes;     // [row blocks, columns / 8, 32 lanes, BITS words]
    const uint16_t* scales;    // float16 [row blocks, columns / block_in]
    const float* signs_in;     // [columns], with the factor of the transform
    const float* signs_out;    // [rows], likewise
    const int* indptr;         // [rows + 1], or null
    const Entry* entries;      // [nnz]
    const uint16_t* x;         // [batch, columns], rows x_stride apart
    uint16_t* y;               // [batch, rows]
    float* partial;            // [gridDim.y, batch, rows] and [batch, rows], where gridDim.y > 1
    int* locks;                // [row blocks * gridDim.z], zero
    uint8_t* rotated;          // what rotate() made, or null: a block then rotates what it needs
    int64_t x_stride;
    int batch, rows, columns, block_in;
};

constexpr int ROWS = 128, WARPS = 8, THREADS = 32 * WARPS;
constexpr int UNIT = 64, STEPS = UNIT / 8;  // columns whose sums are exact
constexpr uint32_t HASH = 0x83DCD12Du;

// Activations as the operand wants them. Of every unit and activation: the planes of its 8 steps, 16 bytes each (high
// bytes of 8 columns, low bytes of these), then the scale (float) and 510 times the sum (int).
constexpr int PLANES = STEPS * 16, RECORD = PLANES + 16;

// ---- rotation of activations and results ------------------------------------------------------------------

// Four neighbours a lane: unnormalized Hadamard transform of every `block` of the warp's 128.
DEVICE void hadamard(float (&v)[4], int block, int lane) {
    float a = v[0] + v[1], b = v[0] - v[1], c = v[2] + v[3], d = v[2] - v[3];
    v[0] = a + c;
    v[1] = b + d;
    v[2] = a - c;
    v[3] = b - d;
    for (int step = 1; step * 4 < block; step *= 2)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float other = __shfl_xor_sync(0xFFFFFFFFu, v[i], step);
            v[i] = lane & step ? other - v[i] : v[i] + other;
        }
}

// Records [2 units of 64 columns] of activation m, columns `column` ... + 127; they lie `stride` bytes apart.
DEVICE void rotate(const Arguments& in, int m, int column, uint8_t* to, int64_t stride, int lane) {
    const int at = column + lane * 4;
    float v[4] = {};
    if (at < in.columns) {
        const uint2 two = *reinterpret_cast<const uint2*>(in.x + m * in.x_stride + at);
        const float4 signs = *reinterpret_cast<const float4*>(in.signs_in + at);
        v[0] = to_float(two.x & 0xFFFF) * signs.x;
        v[1] = to_float(two.x >> 16) * signs.y;
        v[2] = to_float(two.y & 0xFFFF) * signs.z;
        v[3] = to_float(two.y >> 16) * signs.w;
    }
    hadamard(v, in.block_in, lane);
    float most = fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3])));
#pragma unroll
    for (int step = 8; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, step));
    // 32,639 = 127 * 256 + 127 is the largest whose high byte, rounded, is no more than 127
    const float inverse = most > 0 ? 32639.0f / most : 0.0f;
    uint32_t high = 0, low = 0;
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int whole = __float2int_rn(v[i] * inverse), top = (whole + 128) >> 8;
        high |= (uint32_t(top) & 0xFF) << (8 * i);
        low |= (uint32_t(whole) & 0xFF) << (8 * i);  // whole - 256 * top is the low byte, signed
        sum += whole;
    }
#pragma unroll
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
    uint8_t* const record = to + (lane >> 4) * stride;
    const int step = (lane & 15) >> 1, part = (lane & 1) * 4;
    *reinterpret_cast<uint32_t*>(record + step * 16 + part) = high;
    *reinterpret_cast<uint32_t*>(record + step * 16 + 8 + part) = low;
    if ((lane & 15) == 0) {
        *reinterpret_cast<float*>(record + PLANES) = most * (1.0f / 32639.0f);
        *reinterpret_cast<int*>(record + PLANES + 4) = 510 * sum;
    }
}

// Records [units, batch] of all activations; a warp for 128 columns of one.
extern "C" __global__ void __launch_bounds__(128) rotate_activations(const __grid_constant__ Arguments in) {
    next_may_launch();
    launched_before_is_done();
    const int task = blockIdx.x * 4 + (threadIdx.x >> 5), pieces = (in.columns + 127) / 128;
    if (task >= pieces * in.batch) return;
    const int piece = task / in.batch, m = task % in.batch;
    const int64_t stride = int64_t(in.batch) * RECORD;
    rotate(in, m, piece * 128, in.rotated + piece * 2 * stride + int64_t(m) * RECORD, stride, threadIdx.x & 31);
}

// ---- windows ----------------------------------------------------------------------------------------------

// The J-th of 16 windows in 16 * BITS bits and those that follow, times the factor of the code.
template <int J>
DEVICE uint32_t hashed(uint32_t first, uint32_t second, uint32_t third) {
    constexpr int at = J * BITS, shift = at % 32;
    constexpr uint32_t mask = (1u << STATE_BITS) - 1;
    const uint32_t low = at < 32 ? first : second, high = at < 32 ? second : third;
    if constexpr (shift + STATE_BITS > 32) return (__funnelshift_r(low, high, shift) & mask) * HASH;
    if constexpr (shift + STATE_BITS < 32 && J % 3) {
        // a shift to the left can be a multiplication, which another unit does; written so that it stays one
        uint32_t top;
        asm("shl.b32 %0, %1, %2;" : "=r"(top) : "r"(low), "n"((32 - shift - STATE_BITS) & 31));
        return (top >> (32 - STATE_BITS)) * HASH;
    }
    return (low >> shift & mask) * HASH;
}

struct Strings {  // the windows of two columns
    uint32_t first[2], second[2], third[2];
};

DEVICE void unpack(Strings& s, const uint32_t (&words)[BITS], int lane) {
    const int next = (lane + 4) & 31;  // the string is circular
    if constexpr (BITS == 4) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            s.first[i] = words[2 * i];
            s.second[i] = words[2 * i + 1];
            s.third[i] = __shfl_sync(0xFFFFFFFFu, words[2 * i], next);
        }
    } else if constexpr (BITS == 3) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            s.first[i] = words[i];
            // the upper halves of both columns share a word
            s.second[i] = __byte_perm(words[2], __shfl_sync(0xFFFFFFFFu, words[i], next), i ? 0x5432 : 0x5410);
            s.third[i] = 0;
        }
    } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            s.first[i] = words[i];
            s.second[i] = __shfl_sync(0xFFFFFFFFu, words[i], next);
            s.third[i] = 0;
        }
    }
}

template <int RT, int NT>
DEVICE void row_tiles(int (&sums)[NT][8][4], const Strings& s, const uint32_t (&b)[NT][2]) {
    if constexpr (RT < 8) {
        const uint32_t a0 = hashed<2 * RT>(s.first[0], s.second[0], s.third[0]);
        const uint32_t a1 = hashed<2 * RT + 1>(s.first[0], s.second[0], s.third[0]);
        const uint32_t a2 = hashed<2 * RT>(s.first[1], s.second[1], s.third[1]);
        const uint32_t a3 = hashed<2 * RT + 1>(s.first[1], s.second[1], s.third[1]);
#pragma unroll
        for (int n = 0; n < NT; ++n) multiply_bytes(sums[n][RT], a0, a1, a2, a3, b[n][0], b[n][1]);
        row_tiles<RT + 1, NT>(sums, s, b);
    }
}

// ---- the product ------------------------------------------------------------------------------------------

// NT times four activations. LANES threads of a block walk a row of the residual; gridDim.y = LANES / 2 blocks share the
// rows as they do the columns.
template <int NT, int LANES, int AHEAD>
DEVICE void trellis(const Arguments& in) {
    constexpr int BATCH = 4 * NT, RESIDUAL_ROWS = THREADS / LANES, SPLITS = LANES / 2;
    extern __shared__ __align__(16) char shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int row_blocks = in.rows / ROWS, first_m = blockIdx.z * BATCH, batch = min(BATCH, in.batch - first_m);
    next_may_launch();

    const int units = in.columns / UNIT, share = ((units + 1) / 2 + SPLITS - 1) / SPLITS * 2;
    const int begin = min(units, int(blockIdx.y) * share), end = min(units, begin + share);
    // two of [WARPS + 1][batch][ROWS] sums, the last the residual's; then records [units, batch]
    float* const reduced = reinterpret_cast<float*>(shared);
    const int reduced_size = (WARPS + 1) * batch * ROWS;

    uint32_t words[AHEAD][BITS];
    const auto ask = [&](int slot, int row_block, int unit, int step) {
        if (unit < end && row_block < row_blocks)
            load_words<BITS>(words[slot],
                             in.codes + ((int64_t(row_block) * units + unit) * STEPS + step) * (32 * BITS) +
                                 words_before<BITS>(lane),
                             lane);
    };
    int row_block = blockIdx.x;
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) ask(i, row_block, begin + warp, i);
    const int residual_row = blockIdx.y * RESIDUAL_ROWS + threadIdx.x / LANES;
    Residual<LANES, 2> residual;
    residual.begin(in.indptr, row_block * ROWS + residual_row, in.rows, threadIdx.x % LANES);
    residual.ask(in.entries);

    launched_before_is_done();
    const uint8_t* records;
    int64_t unit_stride;
    if (in.rotated != nullptr) {
        unit_stride = int64_t(in.batch) * RECORD;
        records = in.rotated + begin * unit_stride + int64_t(first_m) * RECORD;
    } else {
        unit_stride = int64_t(batch) * RECORD;
        uint8_t* const to = reinterpret_cast<uint8_t*>(reduced + 2 * reduced_size);
        for (int task = warp; task < (end - begin + 1) / 2 * batch; task += WARPS) {
            const int m = task % batch, piece = task / batch;
            rotate(in, first_m + m, (begin + piece * 2) * UNIT, to + piece * 2 * unit_stride + m * RECORD, unit_stride,
                   lane);
        }
        records = to;
        __syncthreads();
    }
    const int64_t plane = int64_t(in.batch) * in.rows;  // of partial sums; plane SPLITS is the residual's

    // rotates back and writes row block `of` of activation m
    const auto finish = [&](float (&v)[4], const float4& extra, int of, int m) {
        const int64_t at = int64_t(of) * ROWS + lane * 4;
        const float4 signs = *reinterpret_cast<const float4*>(in.signs_out + at);
        hadamard(v, ROWS, lane);
        uint2 out;
        out.x = pair_from_floats(v[0] * signs.x + extra.x, v[1] * signs.y + extra.y);
        out.y = pair_from_floats(v[2] * signs.z + extra.z, v[3] * signs.w + extra.w);
        *reinterpret_cast<uint2*>(in.y + int64_t(first_m + m) * in.rows + at) = out;
    };

    for (int round = 0; row_block < row_blocks; ++round) {
        const int next_block = row_block + gridDim.x;
        Residual<LANES, 2> next_residual;
        next_residual.begin(in.indptr, next_block * ROWS + residual_row, in.rows, threadIdx.x % LANES);

        float sums[NT][8][2] = {};
        for (int unit = begin + warp; unit < end; unit += WARPS) {
            const uint8_t* const here = records + (unit - begin) * unit_stride;
            const bool more = unit + WARPS < end;
            const uint8_t* x_lane[NT];
#pragma unroll
            for (int n = 0; n < NT; ++n)
                x_lane[n] = here + min(n * 4 + (g >> 1), batch - 1) * RECORD + (g & 1) * 8;
            int exact[NT][8][4] = {};
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                Strings strings;
                unpack(strings, words[step % AHEAD], lane);
                if (step + AHEAD < STEPS)
                    ask(step % AHEAD, row_block, unit, step + AHEAD);
                else
                    ask(step % AHEAD, more ? row_block : next_block, more ? unit + WARPS : begin + warp,
                        step + AHEAD - STEPS);
                uint32_t b[NT][2];
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    const uint2 eight = *reinterpret_cast<const uint2*>(x_lane[n] + step * 16);
                    b[n][0] = permute(eight.x, 0, t * 0x1111);
                    b[n][1] = permute(eight.y, 0, t * 0x1111);
                }
                row_tiles<0, NT>(exact, strings, b);
            }
            const int per_scale = in.block_in == UNIT ? 0 : 1;  // 64 columns, or 128
            const float scale = half_to_float(in.scales[int64_t(row_block) * (units >> per_scale) + (unit >> per_scale)]);
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                const uint8_t* const record = here + min(n * 4 + t, batch - 1) * RECORD + PLANES;
                const float factor = *reinterpret_cast<const float*>(record) * scale;
                const int less = *reinterpret_cast<const int*>(record + 4);
#pragma unroll
                for (int r = 0; r < 8; ++r)
#pragma unroll
                    for (int h = 0; h < 2; ++h)  // 256 times the high plane and the low one; wraps, its end does not
                        sums[n][r][h] += factor * float(int(uint32_t(exact[n][r][2 * h]) * 256u +
                                                            uint32_t(exact[n][r][2 * h + 1]) - uint32_t(less)));
            }
        }

        // the warps' sums and the residual's, then one barrier: the other parity's were read before it
        float* const here = reduced + (round & 1) * reduced_size;
#pragma unroll
        for (int n = 0; n < NT; ++n)
            if (n * 4 + t < batch) {
                float* const to = here + (warp * batch + n * 4 + t) * ROWS + g * 16;
#pragma unroll
                for (int r = 0; r < 8; r += 2)
                    *reinterpret_cast<float4*>(to + 2 * r) =
                        make_float4(sums[n][r][0], sums[n][r][1], sums[n][r + 1][0], sums[n][r + 1][1]);
            }
        if (in.indptr != nullptr) {
            float extra[BATCH] = {};
            residual.walk(in.entries, [&](uint32_t column, float value) {
                const uint16_t* from = in.x + first_m * in.x_stride + column;
#pragma unroll
                for (int m = 0; m < BATCH; ++m)
                    if (m < batch) extra[m] += value * to_float(from[m * in.x_stride]);
            });
            const bool first = threadIdx.x % LANES == 0;
#pragma unroll
            for (int m = 0; m < BATCH; ++m)
                if (m < batch) {
                    const float sum = sum_over_lanes<LANES>(extra[m]);
                    if (SPLITS == 1 && first) here[(WARPS * batch + m) * ROWS + residual_row] = sum;
                    if (SPLITS > 1 && first)
                        in.partial[SPLITS * plane + int64_t(first_m + m) * in.rows + row_block * ROWS + residual_row] =
                            sum;
                }
            residual = next_residual;
            residual.ask(in.entries);
        }
        __syncthreads();
        for (int m = (warp + round) % WARPS; m < batch; m += WARPS) {
            float v[4] = {};
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float4 four = *reinterpret_cast<const float4*>(here + (w * batch + m) * ROWS + lane * 4);
                v[0] += four.x;
                v[1] += four.y;
                v[2] += four.z;
                v[3] += four.w;
            }
            if (SPLITS > 1) {
                *reinterpret_cast<float4*>(in.partial + blockIdx.y * plane + int64_t(first_m + m) * in.rows +
                                           int64_t(row_block) * ROWS + lane * 4) = make_float4(v[0], v[1], v[2], v[3]);
                continue;
            }
            float4 extra = make_float4(0, 0, 0, 0);
            if (in.indptr != nullptr)
                extra = *reinterpret_cast<const float4*>(here + (WARPS * batch + m) * ROWS + lane * 4);
            finish(v, extra, row_block, m);
        }
        row_block = next_block;
    }
    if (SPLITS == 1 || !last_to_arrive(in.locks + blockIdx.z * gridDim.x + blockIdx.x, SPLITS)) return;
    for (int task = warp;; task += WARPS) {
        const int m = task % batch, of = blockIdx.x + task / batch * gridDim.x;
        if (of >= row_blocks) return;
        const float* from = in.partial + int64_t(first_m + m) * in.rows + int64_t(of) * ROWS + lane * 4;
        float4 part[SPLITS], extra = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int k = 0; k < SPLITS; ++k) part[k] = load_coherent4(from + k * plane);
        if (in.indptr != nullptr) extra = load_coherent4(from + SPLITS * plane);
        float v[4] = {};
#pragma unroll
        for (int k = 0; k < SPLITS; ++k) {
            v[0] += part[k].x;
            v[1] += part[k].y;
            v[2] += part[k].z;
            v[3] += part[k].w;
        }
        finish(v, extra, of, m);
    }
}

// ---- weights -----------------------------------------------------------------------------------------------

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

#define TRELLIS(NT, LANES, AHEAD, BLOCKS)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                    \
        trellis_##NT##_##LANES##_##AHEAD##_##BLOCKS(const __grid_constant__ Arguments in) {                          \
        trellis<NT, LANES, AHEAD>(in);                                                                               \
    }

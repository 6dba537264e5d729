// y = x * (dense + sparse)^T for the trellis kind.
//
// The tensor cores add the bytes of a weight: its product is four neighbours of an operand of unsigned bytes, which meet
// one activation four times. An activation, rotated and scaled, is an integer of 16 bits: two columns of signed bytes.
// Sums are exact over 64 columns, then float32. The rows of an operand are numbered as a lane's windows are, and put in
// order when 128 rows are rotated back.
//
// Columns are shared by the warps of a block and by gridDim.y blocks; the last of these to arrive adds up what all have,
// in order. A block stays for several row blocks, gridDim.x apart. gridDim.z blocks share the activations.
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

#define TRELLIS(NT, LANES, AHEAD, BLOCKS)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                    \
        trellis_##NT##_##LANES##_##AHEAD##_##BLOCKS(const __grid_constant__ Arguments in) {                          \
        trellis<NT, LANES, AHEAD>(in);                                                                               \
    }

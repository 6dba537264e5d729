// y = x * (dense + sparse)^T for the uniform and lut kinds and up to 64 activations: weights are one operand of the tensor
// cores, eight activations at a time the other.
//
// A block takes 16 * WR rows at a time, a warp 16 of these; WK warps share the columns, a chunk of two records (of two
// tiles each) at a time, and gridDim.y blocks, each of which has some, share them again. A block stays for several such
// stretches, gridDim.x apart, and its warps take the chunks of all of them in turn. Sums are float32, in an order that
// depends on nothing but the launch.
//
// Every warp has a ring of chunks in shared memory. Copies into it are asked for a ring ahead, over the ends of
// stretches, and from before the launch's predecessor has ended: between two layers the memory keeps working. (Loads
// into registers would not do: what waits for one of them waits for those asked for since.)
//
// A few warps more walk the residual's rows of a stretch while the others multiply, and add up what these have: neither
// waits for the other, unless it is a round of buffers ahead.
//
// Activations lie in shared memory in the order of the operand. bfloat16 becomes float16 exactly, times a power of two of
// each activation's own, except for elements of less than 2^-29 of the largest. What codes.cuh adds to the weights adds to
// the sums the same for every row: it is known from the activations, and is where the sums begin; the zero point, times
// the sum of activations, is taken off last.
constexpr int UNITS = LUT ? 1 : METAS;  // parts of a record that have scales of their own
constexpr int FRAGMENTS = 8 / UNITS;    // of 16 columns, in a unit
constexpr int CHUNK = 256;              // columns
constexpr int CODE_BYTES = 512 * BITS, SLOT_BYTES = CODE_BYTES + (LUT ? 0 : 96 * METAS);  // of a chunk

// Warps that do not multiply.
template <int NT, bool ONE>
constexpr int ADDERS = ONE ? 1 : NT <= 2 ? 2 : 4;

// What the sums of an activation begin with, and the sum of its elements; of a unit.
typedef float2 Sums;

// A lane's operand of fragments 2 * HALF and 2 * HALF + 1 of a tile, of eight activations from the n-th eight on.
template <int PLACES>
DEVICE uint4 activations_at(uint32_t tile, int half, int n) {
    uint4 out;
    shared_load4(out, tile + (half * PLACES + n * 8) * 64);
    return out;
}

// Activations in shared memory: [tiles][2 halves][PLACES][4 lanes][2 runs of 16 columns][4], float16, so that a lane reads
// 16 bytes of half a tile; nothing is in the places of activations that there are not. [units][PLACES] sums. `factors` are
// the powers of two that bring the elements back.
template <int THREADS, int PLACES>
DEVICE void take_activations(const Arguments& in, char* x_shared, Sums* sums, float* factors, int begin, int stop,
                             int batch) {
    constexpr bool ONE = PLACES == 1;
    constexpr int WARPS = THREADS / 32, DEEP = 8;  // reads in flight
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int records = (stop - begin) * 2, columns = min(stop * CHUNK, in.columns) - begin * CHUNK;
    uint32_t* const largest = reinterpret_cast<uint32_t*>(factors);
    if (BF16) {
        for (int m = threadIdx.x; m < batch; m += THREADS) largest[m] = 0;
        __syncthreads();
    }
    launched_before_is_done();

    // a task: some records of one activation, four columns a lane
    const int parts = max(1, WARPS / batch), each = (records + parts - 1) / parts;
    const int q = lane & 15, f = q >> 2, t = q & 3;
    char* const mine = x_shared + (lane >> 4) * PLACES * 128 + (f >> 1) * PLACES * 64 + t * 16 + (f & 1) * 8;
    const auto place = [&](int m, int record) {
        return reinterpret_cast<uint2*>(mine + record * PLACES * 256 + m * 64);
    };
    for (int task = warp; task < batch * parts; task += WARPS) {
        const int m = task % batch, first = task / batch * each, end = min(records, first + each);
        const uint16_t* const from = in.x + m * in.x_stride + begin * CHUNK + lane * 4;
        uint32_t most = 0;  // without its sign a 16-bit float is ordered as an integer
        for (int record = first; record < end; record += DEEP) {
            uint2 four[DEEP];
#pragma unroll
            for (int i = 0; i < DEEP; ++i) {
                four[i] = make_uint2(0, 0);
                if (record + i < end && (record + i) * 128 + lane * 4 < columns)
                    four[i] = *reinterpret_cast<const uint2*>(from + (record + i) * 128);
            }
#pragma unroll
            for (int i = 0; i < DEEP; ++i) {
                if (record + i >= end) break;
                *place(m, record + i) = four[i];
                most = __vmaxu2(most, __vmaxu2(four[i].x & 0x7FFF7FFFu, four[i].y & 0x7FFF7FFFu));
            }
        }
        if (!BF16) continue;
        most = largest_of_warp(max(most & 0xFFFF, most >> 16));
        if (lane == 0) atomicMax(largest + m, most);
    }
    __syncthreads();

    if (BF16) {
        // the power of two that leaves the largest below 2^15; a float's range holds it, whatever is largest
        const auto exponent_up = [&](int m) {
            const int exponent = int((__float_as_uint(to_float(largest[m])) >> 23) & 0xFF) - 127;
            return min(max(14 - exponent, -126), 126);
        };
        for (int task = warp; task < batch * parts; task += WARPS) {
            const int m = task % batch, first = task / batch * each, end = min(records, first + each);
            const float factor = __uint_as_float(uint32_t(exponent_up(m) + 127) << 23);
#pragma unroll 4
            for (int record = first; record < end; ++record) {
                const uint2 four = *place(m, record);
                *place(m, record) = make_uint2(
                    half_pair(to_float(four.x & 0xFFFF) * factor, to_float(four.x >> 16) * factor),
                    half_pair(to_float(four.y & 0xFFFF) * factor, to_float(four.y >> 16) * factor));
            }
        }
        __syncthreads();
        for (int m = threadIdx.x; m < batch; m += THREADS)
            factors[m] = __uint_as_float(uint32_t(127 - exponent_up(m)) << 23);
    }
    if (LUT) {
        if (BF16) __syncthreads();
        return;
    }

    // row 0 of the operand is minus what the weights are raised by, row 1 is ones
    const int g = lane >> 2;
    const uint32_t ones = g == 1 ? 0x3C003C00u : 0;
    const uint32_t x_at = shared_address(x_shared) + (ONE ? 0 : g * 64) + (lane & 3) * 16;
    for (int record = warp; record < records; record += WARPS) {
#pragma unroll
        for (int n = 0; n < (ONE ? 1 : PLACES / 8); ++n) {
            float c[2][4];  // two chains
#pragma unroll
            for (int fragment = 0; fragment < 8; fragment += 2) {
                if (fragment % FRAGMENTS == 0)
#pragma unroll
                    for (int i = 0; i < 4; ++i) c[0][i] = c[1][i] = 0;
                const uint4 b =
                    activations_at<PLACES>(x_at + (record * 2 + fragment / 4) * PLACES * 128, fragment / 2 % 2, n);
#pragma unroll
                for (int of = 0; of < 2; ++of) {
                    uint32_t a[4] = {};
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int exponent = 25 - position(2 * (fragment % 4 + of) + i);  // of a float16
                        a[2 * i] = g == 0 ? 0x80008000u | exponent * 0x04000400u : ones;
                    }
                    multiply(c[of], a, of ? b.z : b.x, of ? b.w : b.y);
                }
                if ((fragment + 2) % FRAGMENTS != 0 || g >= 2 || (ONE && lane % 4 != 0)) continue;
                float* const to = reinterpret_cast<float*>(sums + (record * UNITS + fragment / FRAGMENTS) * PLACES) + g;
                if (ONE) {
                    *to = c[0][0] + c[1][0];
                } else {
                    to[2 * (n * 8 + lane % 4 * 2)] = c[0][0] + c[1][0];
                    to[2 * (n * 8 + lane % 4 * 2) + 2] = c[0][1] + c[1][1];
                }
            }
        }
    }
    __syncthreads();
}

// A warp's ring of chunks, and which of them it asks for next: pointers of its lanes into the row tile, and how far the
// chunk lies behind them.
template <int WR, int WK, int SLOTS>
struct Ring {
    const char* codes;
    const char* meta;  // lane l < 4 * METAS: half the scales of meta l / 2; then the zero points of meta l - 4 * METAS
    uint32_t base, to;
    int chunk, row_tile;

    DEVICE void begin(const Arguments& in, uint32_t at, int lane, int wr, int wk, int first, int count) {
        base = at + lane * 16;
        to = base;
        row_tile = blockIdx.x * WR + wr;
        for (chunk = wk; chunk >= count; chunk -= count) row_tile += gridDim.x * WR;
        chunk += first;
        codes = reinterpret_cast<const char*>(in.codes) + lane * 16 + int64_t(row_tile) * in.tiles * (CODE_BYTES / 4);
        if (LUT) return;
        const int64_t groups = int64_t(row_tile) * in.groups;
        meta = lane < 4 * METAS ? reinterpret_cast<const char*>(in.params) + groups * 32 + lane % 2 * 16
                                : reinterpret_cast<const char*>(in.zeros) + groups * 16;
    }

    // Chunks of the block: `count`, up to `stop`.
    DEVICE void ask(const Arguments& in, int lane, int row_tiles, int stop, int count) {
        if (row_tile < row_tiles) {
            const char* const from = codes + uint32_t(chunk * CODE_BYTES);
            // where there is no second record any codes do, its activations being zeros, but not any scales
            const bool both = chunk * 4 + 2 < in.tiles;
#pragma unroll
            for (int i = 0; i < CODE_BYTES; i += 512)
                if (i + 512 <= CODE_BYTES / 2 || both || i + lane * 16 < CODE_BYTES / 2) copy_async(to + i, from + i);
            if (!LUT && lane < 6 * METAS) {
                const int of = lane < 4 * METAS ? lane / 2 : lane - 4 * METAS;
                const int group = __umulhi(uint32_t(chunk * 16 + of * (8 / METAS)), in.group_factor);
                copy_async(to + CODE_BYTES, meta + uint32_t(min(group, in.groups - 1)) * (lane < 4 * METAS ? 32 : 16));
            }
            chunk += WK;
            while (chunk >= stop) {
                chunk -= count;
                row_tile += gridDim.x * WR;
                codes += int64_t(gridDim.x * WR) * in.tiles * (CODE_BYTES / 4);
                if (!LUT) meta += int64_t(gridDim.x * WR) * in.groups * (lane < 4 * METAS ? 32 : 16);
            }
            to = to == base + (SLOTS - 1) * SLOT_BYTES ? base : to + SLOT_BYTES;
        }
        copies_asked();  // one after each chunk, so that they can be counted
    }
};

// What the warps do that do not multiply.
template <int ROWS, int WK, int THREADS, int PLACES>
struct Adder {
    static constexpr bool ONE = PLACES == 1;
    static constexpr int LANES = THREADS / ROWS, TILE_BYTES = PLACES * 128;
    const int thread, row, lane_of_row;
    Residual<LANES, 8> residual;

    DEVICE explicit Adder(int of) : thread(of), row(of / LANES), lane_of_row(of % LANES) {}

    DEVICE void begin(const Arguments& in, int stretch) {
        residual.begin(in.indptr, stretch * ROWS + row, in.rows, lane_of_row);
        residual.ask(in.entries);
    }

    // The residual's part of the sums, [batch][pitch]; then asks for the next stretch's.
    DEVICE void walk(const Arguments& in, float* to, int pitch, const char* x_shared, int begin, int columns, int batch,
                     int next_stretch) {
        if (in.indptr == nullptr) return;
        Residual<LANES, 8> next;
        next.begin(in.indptr, next_stretch * ROWS + row, in.rows, lane_of_row);
#pragma unroll 1
        for (int first = 0; first < batch; first += 8) {
            float extra[ONE ? 1 : 8] = {};
            residual.walk_fours(in.entries, [&](const Entry (&four)[4]) {
                // without branches, so that the reads of all four are on their way together
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    int at = int(entry_column(four[i])) - begin;
                    const bool inside = uint32_t(at) < uint32_t(columns);
                    const float value = inside ? entry_value(four[i]) : 0.0f;
                    at = inside ? at : 0;
                    const char* const from = x_shared + (at >> 6) * TILE_BYTES + ((at >> 5 & 1) * PLACES + first) * 64 +
                                             (at >> 2 & 3) * 16 + (at >> 4 & 1) * 8 + (at & 3) * 2;
#pragma unroll
                    for (int m = 0; m < (ONE ? 1 : 8); ++m)
                        if (ONE || first + m < batch)
                            extra[m] += value * half_to_float(*reinterpret_cast<const uint16_t*>(from + m * 64));
                }
            });
#pragma unroll
            for (int m = 0; m < (ONE ? 1 : 8); ++m)
                if (ONE || first + m < batch) {
                    const float sum = sum_over_lanes<LANES>(extra[m]);
                    if (lane_of_row == m % LANES) to[(first + m) * pitch + row] = sum;
                }
        }
        residual = next;
        residual.ask(in.entries);
    }

    // Sums of WK warps and the residual's, to results or to what blocks that share the columns have of them.
    DEVICE void add(const Arguments& in, const float* here, int pitch, const float* factors, int stretch, int batch) const {
        for (int i = thread; i < ROWS * batch; i += THREADS) {
            const int m = i / ROWS, r = i % ROWS;
            if (stretch * ROWS + r >= in.rows) continue;
            float sum = in.indptr != nullptr ? here[(WK * batch + m) * pitch + r] : 0.0f;
#pragma unroll
            for (int k = 0; k < WK; ++k) sum += here[(k * batch + m) * pitch + r];
            if (BF16) sum *= factors[m];
            const int64_t at = int64_t(m) * in.rows + stretch * ROWS + r;
            if (gridDim.y == 1)
                in.y[at] = from_float(sum);
            else
                in.partial[int64_t(blockIdx.y) * batch * in.rows + at] = sum;
        }
    }
};

// NT times eight activations; with ONE a single one. A ring has KBYTES KB of codes, or two chunks.
template <int NT, bool ONE, int WR, int WK, int KBYTES>
DEVICE void matvec(const Arguments& in) {
    constexpr int MULTIPLIERS = WR * WK, ADDING = ADDERS<NT, ONE>, THREADS = 32 * (MULTIPLIERS + ADDING);
    constexpr int ROWS = 16 * WR, PITCH = ROWS + 4;
    constexpr int RING = KBYTES * 2 / BITS > 2 ? KBYTES * 2 / BITS : 2;
    constexpr int SLOTS = WR == 1 || BITS < 4 ? 32 : 8;  // of tables
    constexpr int BUFFERS = ONE ? 4 : 2;
    extern __shared__ __align__(16) char shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, wr = warp % WR, wk = warp / WR;
    const int g = lane >> 2, t = lane & 3;
    const int batch = ONE ? 1 : in.batch, row_tiles = (in.rows + 15) / 16;
    const bool multiplies = warp < MULTIPLIERS;
    next_may_launch();

    // columns of this block, in chunks
    const int chunks = (in.tiles + 3) / 4, share = (chunks + gridDim.y - 1) / gridDim.y;
    const int begin = min(chunks, int(blockIdx.y) * share), stop = min(chunks, begin + share), count = stop - begin;

    // tables; rings; activations; their sums; [batch] factors; BUFFERS of [WK + 1][batch][PITCH] sums
    constexpr int PLACES = ONE ? 1 : 8 * NT, TILE_BYTES = PLACES * 128;
    constexpr int TABLE_BYTES = LUT ? WR * Tables<SLOTS>::WORDS_A_TILE * 4 : 0;
    uint32_t table_at = shared_address(shared);
    if (LUT) table_at = (table_at + Tables<SLOTS>::ALIGNMENT - 1) / Tables<SLOTS>::ALIGNMENT * Tables<SLOTS>::ALIGNMENT;
    char* const tables = shared + (table_at - shared_address(shared));
    char* const rings = tables + TABLE_BYTES;
    char* const x_shared = rings + MULTIPLIERS * RING * SLOT_BYTES;
    Sums* const unit_sums = reinterpret_cast<Sums*>(x_shared + share * 4 * TILE_BYTES);
    float* const factors = reinterpret_cast<float*>(unit_sums + (LUT ? 0 : share * 2 * UNITS * PLACES));
    float* const reduced = factors + (batch + 3) / 4 * 4;
    const int reduced_size = (WK + 1) * batch * PITCH;
    __shared__ __align__(16) uint64_t written[BUFFERS], read[BUFFERS];
    if (threadIdx.x == 0)
        for (int i = 0; i < BUFFERS; ++i) {
            arrivals_begin(written + i, MULTIPLIERS);
            arrivals_begin(read + i, ADDING);
        }

    const uint32_t ring_at = shared_address(rings) + warp * RING * SLOT_BYTES;
    Ring<WR, WK, RING> ring;
    ring.begin(in, ring_at, lane, wr, wk, begin, count);
    if (multiplies)
        for (int i = 0; i < RING - 1; ++i) ring.ask(in, lane, row_tiles, stop, count);
    Adder<ROWS, WK, 32 * ADDING, PLACES> adder(threadIdx.x - 32 * MULTIPLIERS);
    if (!multiplies) adder.begin(in, blockIdx.x);
#if LUT
    using T = Tables<SLOTS>;
    NextTables<WR, SLOTS, 32 * MULTIPLIERS> next_tables;
    if (multiplies) {
        next_tables.ask(reinterpret_cast<const uint16_t*>(in.params), blockIdx.x * ROWS, in.rows);
        next_tables.store(reinterpret_cast<uint32_t*>(tables));
    }
    const uint32_t base = table_at + wr * T::WORDS_A_TILE * 4 + lane / (4 / T::COPIES) * 4;
#else
    const uint32_t base = 0;
#endif

    take_activations<THREADS, PLACES>(in, x_shared, unit_sums, factors, begin, stop, batch);
    const uint32_t first_x = shared_address(x_shared) + (ONE ? 0 : g * 64) + t * 16;
    const uint32_t first_sums = shared_address(unit_sums) + (ONE ? 0 : t * 16);
    uint32_t slot_at = ring_at;

    int chunk = wk;
    for (int stretch = blockIdx.x, round = 0; stretch * WR < row_tiles; stretch += gridDim.x, ++round) {
        const int buffer = round % BUFFERS, phase = round / BUFFERS & 1;
        float* const here = reduced + buffer * reduced_size;
        if (!multiplies) {
            adder.walk(in, here + WK * batch * PITCH, PITCH, x_shared, begin * CHUNK, count * CHUNK, batch,
                       stretch + gridDim.x);
            if (ADDING > 1) some_warps<1, 32 * ADDING>();
            await_arrivals(written + buffer, phase);
            __syncwarp();
            adder.add(in, here, PITCH, factors, stretch, batch);
            __syncwarp();
            if (lane == 0) arrive(read + buffer);
            continue;
        }
#if LUT
        next_tables.ask(reinterpret_cast<const uint16_t*>(in.params), (stretch + gridDim.x) * ROWS, in.rows);
#endif
        float sums[NT][4] = {};
        for (; chunk < count; chunk += WK) {
            await_copies<RING - 2>();
            __syncwarp();  // also: all lanes have read the chunk before, whose slot is filled anew
            ring.ask(in, lane, row_tiles, stop, count);
            const uint32_t x_at = first_x + chunk * 4 * TILE_BYTES;
            const uint32_t sums_at = first_sums + chunk * 2 * UNITS * PLACES * 8;
            // a unit has two chains of sums, unless there are chains enough
            constexpr int CHAINS = NT == 1 ? 2 : 1;
            float part[CHAINS][NT][4] = {}, plain[NT][2];
            uint32_t words[WORDS];
#pragma unroll
            for (int half = 0; half < 8; ++half) {
                const int unit = half * 2 / FRAGMENTS;  // of the chunk's 2 * UNITS
                if (!LUT && half * 2 % FRAGMENTS == 0)
#pragma unroll
                    for (int n = 0; n < NT; ++n) {
                        // of a single activation columns 1, 3 ... of the result mean nothing
                        float4 two;
                        const uint32_t at = sums_at + (unit * PLACES + n * 8) * 8;
                        if (ONE) shared_load2(two.x, two.y, at);
                        if (!ONE) shared_load4(two, at);
                        part[0][n][0] = part[0][n][2] = two.x;
                        part[0][n][1] = part[0][n][3] = ONE ? 0 : two.z;
                        plain[n][0] = two.y;
                        plain[n][1] = ONE ? 0 : two.w;
#pragma unroll
                        for (int i = 0; i < 4; ++i)
                            if (CHAINS > 1) part[CHAINS - 1][n][i] = 0;
                    }
                uint32_t a0[4], a1[4];
                if (half % 2 == 0) {
                    shared_words<WORDS>(words, slot_at + half / 2 * (CODE_BYTES / 4), lane);
                    fragment<0, SLOTS>(a0, words, base);
                    fragment<1, SLOTS>(a1, words, base);
                } else {
                    fragment<2, SLOTS>(a0, words, base);
                    fragment<3, SLOTS>(a1, words, base);
                }
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    const uint4 b = activations_at<PLACES>(x_at + half / 2 * TILE_BYTES, half % 2, n);
                    multiply(part[UNITS == 4 ? 0 : half % CHAINS][n], a0, b.x, b.y);
                    multiply(part[UNITS == 4 ? CHAINS - 1 : half % CHAINS][n], a1, b.z, b.w);
                }
                if (LUT || (half * 2 + 2) % FRAGMENTS != 0) continue;
                const uint32_t scales = shared_load<CODE_BYTES>(slot_at + unit * 32 + g * 4);
                const uint32_t zeros = shared_load_half(slot_at + CODE_BYTES + METAS * 64 + unit * 16 + g * 2);
                const float s0 = half_to_float(scales & 0xFFFF), s1 = half_to_float(scales >> 16);
                const float z0 = float(zeros & 0xFF), z1 = float(zeros >> 8);
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float whole = CHAINS > 1 ? part[0][n][i] + part[CHAINS - 1][n][i] : part[0][n][i];
                        sums[n][i] += (i < 2 ? s0 : s1) * (whole - (i < 2 ? z0 : z1) * plain[n][i % 2]);
                    }
            }
            if (LUT)
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        sums[n][i] += CHAINS > 1 ? part[0][n][i] + part[CHAINS - 1][n][i] : part[0][n][i];
            slot_at = slot_at == ring_at + (RING - 1) * SLOT_BYTES ? ring_at : slot_at + SLOT_BYTES;
        }

        chunk -= count;
        await_arrivals(read + buffer, phase ^ 1);  // in the first round at once
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
        __syncwarp();
        if (lane == 0) arrive(written + buffer);
#if LUT
        some_warps<2, 32 * MULTIPLIERS>();
        next_tables.store(reinterpret_cast<uint32_t*>(tables));
        some_warps<2, 32 * MULTIPLIERS>();
#endif
    }
    if (gridDim.y == 1 || !last_to_arrive(in.locks + blockIdx.x, gridDim.y)) return;
    for (int stretch = blockIdx.x; stretch * WR < row_tiles; stretch += gridDim.x)
        for (int i = threadIdx.x; i < ROWS * batch; i += THREADS) {
            const int m = i / ROWS, r = stretch * ROWS + i % ROWS;
            if (r >= in.rows) continue;
            const int64_t at = int64_t(m) * in.rows + r;
            float sum = 0;
            for (int k = 0; k < int(gridDim.y); ++k) sum += load_coherent(in.partial + int64_t(k) * batch * in.rows + at);
            in.y[at] = from_float(sum);
        }
}

#define MATVEC(NT, ONE, WR, WK, KBYTES, BLOCKS)                                                                      \
    extern "C" __global__ void __launch_bounds__(32 * (WR * WK + ADDERS<NT, ONE>), BLOCKS)                           \
        matvec_##NT##_##ONE##_##WR##_##WK##_##KBYTES##_##BLOCKS(const __grid_constant__ Arguments in) {              \
        matvec<NT, ONE, WR, WK, KBYTES>(in);                                                                         \
    }

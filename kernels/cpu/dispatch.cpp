// The C ABI: plans a call, shares its rows among OpenMP threads and picks the instruction set. Compiled for the
// base instruction set; nothing here depends on torch or Python.
//
// Functions return 0 or a negative Status. Pointers are to contiguous host memory whose shapes the caller has
// checked. A result depends on neither the number of threads nor, in requant_linear, on the size of the batch.
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <vector>

#include "kernels.h"

#define REQUANT_API extern "C" __attribute__((visibility("default")))

namespace {

using namespace requant;

enum Status : int { OK = 0, BAD_ARGUMENT = -1, OUT_OF_MEMORY = -2, ID_OUT_OF_RANGE = -3 };
enum Isa : int { ISA_SCALAR = 0, ISA_AVX2 = 1, ISA_AVX512 = 2 };

// Waking a second thread costs some microseconds: about what one core decodes of this many weights.
constexpr int64_t WEIGHTS_PER_THREAD = 1 << 16;

int supported_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return ISA_AVX512;
    // every processor with AVX2 and FMA has F16C, for which GCC 11 and earlier know no name here
    if (avx2) return ISA_AVX2;
#endif
    return ISA_SCALAR;
}

int current_isa = supported_isa();

const Tier& tier() {
#if defined(__x86_64__)
    if (current_isa == ISA_AVX512) return AVX512_TIER;
    if (current_isa == ISA_AVX2) return AVX2_TIER;
#endif
    return SCALAR_TIER;
}

struct PlannedRow {
    Plan plan{};
    std::vector<int32_t> group_of_part;

    PlannedRow(int bits, int64_t group_size, int64_t columns) {
        if (bits == 8) {
            plan.row_bytes = columns;
            plan.full = columns / BLOCK;
            if (columns % BLOCK) plan.tail[plan.tails++] = {plan.full * BLOCK, plan.full * BLOCK, LANES};
        } else {
            plan.full = columns / BLOCK;
            int64_t start = plan.full * BLOCK, offset = plan.full * LANES * bits;
            for (int64_t width : {BLOCK / 2, BLOCK / 4, columns % (BLOCK / 4)}) {
                if (width == 0 || columns - start < width) continue;
                const int lanes = int((width + CODES - 1) / CODES);
                plan.tail[plan.tails++] = {start, offset, lanes};
                start += width;
                offset += int64_t(lanes) * bits;
            }
            plan.row_bytes = offset;
        }
        if (group_size == 0) return;
        plan.groups = (columns + group_size - 1) / group_size;
        plan.parts = group_size % BLOCK == 0 ? 1 : group_size % (BLOCK / 2) == 0 ? 2 : 4;
        const int64_t segments = plan.full + plan.tails;
        group_of_part.resize(size_t(segments * plan.parts));
        for (int64_t s = 0; s < segments; ++s) {
            const bool full = s < plan.full;
            const int64_t start = full ? s * BLOCK : plan.tail[s - plan.full].start;
            const int64_t lanes = full ? LANES : plan.tail[s - plan.full].lanes;
            for (int64_t p = 0; p < plan.parts; ++p) {
                // a part without columns is padding: any group will do
                const int64_t column = std::min(start + p * (CODES / plan.parts) * lanes, columns - 1);
                group_of_part[size_t(s * plan.parts + p)] = int32_t(column / group_size);
            }
        }
        plan.group_of_part = group_of_part.data();
    }
};

bool valid(int kind, int bits, int64_t group_size, int64_t rows, int64_t columns) {
    if (rows < 0 || columns < 1) return false;
    if (kind == LUT) return group_size == 0 && bits >= 2 && bits <= 4;
    if (kind != UNIFORM || group_size < 32 || group_size % 32) return false;
    return bits == 2 || bits == 3 || bits == 4 || bits == 8;
}

int thread_count(int64_t work, int64_t units) {
    const int64_t most = std::min<int64_t>(work / WEIGHTS_PER_THREAD, units);
    return int(std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), most)));
}

// Buffers of the calling thread; they grow to what the largest call needs and stay.
float* buffer(int which, int64_t floats) {
    thread_local std::vector<float> buffers[3];
    std::vector<float>& mine = buffers[which];
    if (int64_t(mine.size()) < floats) mine.resize(size_t(floats));
    return mine.data();
}

// Calls body(begin, end, scratch) on every thread with its share of `units`, in contiguous ranges.
template <class Body>
void share(int threads, int64_t units, int64_t scratch_size, const Body& body) {
    scratch_size = (scratch_size + 31) / 16 * 16;  // no cache line belongs to two threads
    float* scratch = buffer(0, threads * scratch_size);
    if (threads == 1) return body(0, units, scratch);
#pragma omp parallel num_threads(threads)
    {
        const int64_t count = omp_get_num_threads(), id = omp_get_thread_num();
        body(units * id / count, units * (id + 1) / count, scratch + id * scratch_size);
    }
}

// One column of a tail segment in the padded copy.
void spread_tails(const Plan& plan, int64_t columns, const float* x, float* out) {
    std::memset(out, 0, sizeof(float) * size_t(plan.tails * BLOCK));
    for (int t = 0; t < plan.tails; ++t, out += BLOCK) {
        const Tail& tail = plan.tail[t];
        for (int j = 0; j < CODES; ++j)
            for (int i = 0; i < tail.lanes; ++i) {
                const int64_t column = tail.start + j * tail.lanes + i;
                if (column < columns) out[j * LANES + i] = x[column];
            }
    }
}

template <class Body>
int guarded(const Body& body) {
    try {
        return body();
    } catch (const std::exception&) {
        return OUT_OF_MEMORY;
    }
}

}  // namespace

// Instruction set in use: 0 scalar, 1 AVX2, 2 AVX-512.
REQUANT_API int requant_isa() { return current_isa; }

// Use at most `cap`; returns what is in use then. Not to be called while a kernel runs.
REQUANT_API int requant_set_isa(int cap) {
    current_isa = std::max<int>(ISA_SCALAR, std::min(cap, supported_isa()));
    return current_isa;
}

// Bytes of the run-time codes of a weight, slack included.
REQUANT_API int64_t requant_codes_bytes(int bits, int64_t rows, int64_t columns) {
    return rows * PlannedRow(bits, 0, columns).plan.row_bytes + CODE_SLACK;
}

// Canonical row bit streams [rows, ceil(columns * bits / 8)] to the run-time layout.
REQUANT_API int requant_repack_codes(int bits, int64_t rows, int64_t columns, const uint8_t* in, uint8_t* out) {
    return guarded([&]() -> int {
        if (!valid(UNIFORM, bits, 32, rows, columns)) return BAD_ARGUMENT;
        const PlannedRow planned(bits, 0, columns);
        const Plan& plan = planned.plan;
        const int64_t in_bytes = (columns * bits + 7) / 8;
        const uint32_t mask = (1u << bits) - 1;
        const auto repack_rows = [&](int64_t begin, int64_t end, float*) {
            for (int64_t row = begin; row < end; ++row) {
                const uint8_t* from = in + row * in_bytes;
                uint8_t* to = out + row * plan.row_bytes;
                if (bits == 8) {
                    std::memcpy(to, from, size_t(columns));
                    continue;
                }
                const auto code = [&](int64_t column) -> uint32_t {
                    if (column >= columns) return 0;
                    const int64_t bit = column * bits, byte = bit / 8;
                    uint32_t word = from[byte];
                    if (byte + 1 < in_bytes) word |= uint32_t(from[byte + 1]) << 8;
                    return word >> (bit % 8) & mask;
                };
                for (int64_t s = 0; s < plan.full + plan.tails; ++s) {
                    const bool full = s < plan.full;
                    const Tail tail = full ? Tail{s * BLOCK, s * LANES * bits, LANES} : plan.tail[s - plan.full];
                    for (int i = 0; i < tail.lanes; ++i) {
                        uint32_t lane = 0;
                        for (int j = 0; j < CODES; ++j)
                            lane |= code(tail.start + j * tail.lanes + i) << (j * bits);
                        for (int b = 0; b < bits; ++b)
                            to[tail.offset + i * bits + b] = uint8_t(lane >> (8 * b));
                    }
                }
            }
        };
        share(thread_count(rows * columns, rows), rows, 0, repack_rows);
        std::memset(out + rows * plan.row_bytes, 0, size_t(CODE_SLACK));
        return OK;
    });
}

// y [batch, rows] = x [batch, columns] times the transposed weight; x and y of type `dtype`, sums in float32.
REQUANT_API int requant_linear(int kind, int bits, int64_t group_size, int64_t rows, int64_t columns,
                               const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros,
                               const int32_t* indptr, const void* indices, int wide_indices,
                               const uint16_t* values, int dtype, int64_t batch, const void* x, void* y) {
    return guarded([&]() -> int {
        if (!valid(kind, bits, group_size, rows, columns) || dtype < F32 || dtype > F16 || batch < 0)
            return BAD_ARGUMENT;
        const Weights w{kind,  bits,   group_size, rows,    columns,           codes,
                        scales, zeros, indptr,     indices, wide_indices != 0, values};
        const Tier& isa = tier();
        const PlannedRow planned(bits, group_size, columns);
        const Plan& plan = planned.plan;
        const float* wide = static_cast<const float*>(x);
        if (dtype != F32) {
            float* copy = buffer(1, batch * columns);
            isa.widen(dtype, x, copy, batch * columns);
            wide = copy;
        }
        const int64_t tail_stride = plan.tails * BLOCK;
        float* tails = buffer(2, batch * tail_stride);
        for (int64_t m = 0; plan.tails && m < batch; ++m)
            spread_tails(plan, columns, wide + m * columns, tails + m * tail_stride);
        const Input in{batch, wide, columns, tails, tail_stride};
        const int64_t tiles = (rows + isa.row_tile - 1) / isa.row_tile;
        share(thread_count(rows * columns * batch, tiles), tiles, scratch_floats(plan, columns),
              [&](int64_t begin, int64_t end, float* scratch) {
                  isa.linear(w, plan, in, begin * isa.row_tile, std::min(end * isa.row_tile, rows), dtype, y,
                             rows, scratch);
              });
        return OK;
    });
}

// out [count, columns] of type `dtype`: the rows `ids`, or, without ids, the rows first ... first + count - 1.
REQUANT_API int requant_dequantize(int kind, int bits, int64_t group_size, int64_t rows, int64_t columns,
                                   const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros,
                                   const int32_t* indptr, const void* indices, int wide_indices,
                                   const uint16_t* values, int dtype, const int64_t* ids, int64_t first,
                                   int64_t count, void* out) {
    return guarded([&]() -> int {
        if (!valid(kind, bits, group_size, rows, columns) || dtype < F32 || dtype > F16 || count < 0)
            return BAD_ARGUMENT;
        if (ids) {
            for (int64_t i = 0; i < count; ++i)
                if (ids[i] < 0 || ids[i] >= rows) return ID_OUT_OF_RANGE;
        } else if (first < 0 || first + count > rows) {
            return ID_OUT_OF_RANGE;
        }
        const Weights w{kind,  bits,   group_size, rows,    columns,           codes,
                        scales, zeros, indptr,     indices, wide_indices != 0, values};
        const PlannedRow planned(bits, group_size, columns);
        const Plan& plan = planned.plan;
        const Tier& isa = tier();
        const int64_t origin = ids ? 0 : first;
        share(thread_count(count * columns, count), count, scratch_floats(plan, columns),
              [&](int64_t begin, int64_t end, float* scratch) {
                  isa.dequantize(w, plan, ids, origin, origin + begin, origin + end, dtype, out, scratch);
              });
        return OK;
    });
}

// Reads `bytes` (a multiple of 64) with `threads` threads and returns a checksum: the yardstick of the
// benchmark for what memory delivers.
REQUANT_API uint64_t requant_read(const uint64_t* data, int64_t bytes, int threads) {
    const int64_t words = bytes / 8;
    uint64_t total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
    for (int64_t i = 0; i < words; i += 8) {
        __builtin_prefetch(data + i + 256);
        uint64_t line = 0;
        for (int j = 0; j < 8; ++j) line += data[i + j];
        total += line;
    }
    return total;
}

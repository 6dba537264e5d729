// The C ABI: packs weights into one block of memory, shares the windows of a call among OpenMP threads and picks the
// instruction set. Compiled for the base instruction set; nothing here depends on torch or Python.
//
// Functions return 0 or a negative Status. Pointers are to contiguous host memory whose shapes the caller has
// checked. A result depends on neither the number of threads nor on the size of the batch.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <vector>

#include "kernels.h"

#define REQUANT_API extern "C" __attribute__((visibility("default")))

namespace {

using namespace requant;

enum Status : int { OK = 0, BAD_ARGUMENT = -1, OUT_OF_MEMORY = -2, ID_OUT_OF_RANGE = -3 };
enum Isa : int { ISA_SCALAR = 0, ISA_AVX2 = 1, ISA_AVX512 = 2 };

// Waking a second thread costs some microseconds: about what one core multiplies of this many weights.
constexpr int64_t WEIGHTS_PER_THREAD = 1 << 17;

int supported_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni"))
        return ISA_AVX512;
    // every processor with AVX2 and FMA has F16C, for which GCC 11 and earlier know no name here
    if (avx2) return ISA_AVX2;
#endif
    return ISA_SCALAR;
}

int current_isa = supported_isa();
int64_t fused_batch[] = {INT64_MAX, INT64_MAX, INT64_MAX, INT64_MAX};  // by kind; the last one is of long activations

const Tier& tier() {
#if defined(__x86_64__)
    if (current_isa == ISA_AVX512) return AVX512_TIER;
    if (current_isa == ISA_AVX2) return AVX2_TIER;
#endif
    return SCALAR_TIER;
}

bool valid(int kind, int bits, int64_t group_size, int64_t rows, int64_t columns) {
    if (rows < 0 || columns < 1) return false;
    if (kind == LUT) return group_size == 0 && bits >= 2 && bits <= 4;
    if (kind != UNIFORM || group_size < 32 || group_size % 32) return false;
    return bits == 2 || bits == 3 || bits == 4 || bits == 8;
}

bool block_size(int64_t block) { return block == 16 || block == 32 || block == 64 || block == 128; }

bool valid_trellis(int bits, int state_bits, int64_t rows, int64_t columns, int64_t block_out, int64_t block_in) {
    return bits >= 1 && bits <= 6 && state_bits >= bits && state_bits <= 16 && block_size(block_out) &&
           block_size(block_in) && rows >= 0 && columns > 0 && rows % block_out == 0 && columns % block_in == 0;
}

// ---- one block of memory: a header, then what it points to ---------------------------------------------------

struct Header {
    uint64_t magic;
    int64_t bytes;  // of the whole block
    int32_t kind, bits, state_bits, wide;
    int64_t rows, columns, group_size, block_out, block_in;
    // offsets; 0 for what a weight does not have
    int64_t codes, scales, zeros, units, signs_in, signs_out;
    int64_t windows, slices;
};

constexpr uint64_t MAGIC = 0x31746e6175716572;  // "requant1"
constexpr int64_t ALIGNMENT = 64;

const Header* header_of(const void* packed, int64_t bytes) {
    const Header* header = static_cast<const Header*>(packed);
    const bool known = bytes >= int64_t(sizeof(Header)) && header->magic == MAGIC && header->bytes == bytes;
    return known ? header : nullptr;
}

template <class T>
const T* section(const Header& header, int64_t offset) {
    return offset ? reinterpret_cast<const T*>(reinterpret_cast<const char*>(&header) + offset) : nullptr;
}

Sparse sparse_of(const Header& h) {
    return {section<int32_t>(h, h.windows), section<uint8_t>(h, h.slices), h.wide != 0};
}

Weights weights_of(const Header& h) {
    return {h.kind,
            h.bits,
            h.group_size,
            h.rows,
            h.columns,
            section<uint8_t>(h, h.codes),
            section<uint16_t>(h, h.scales),
            section<uint8_t>(h, h.zeros),
            section<float>(h, h.units),
            sparse_of(h)};
}

Trellis trellis_of(const Header& h) {
    return {h.bits,
            h.state_bits,
            h.rows,
            h.columns,
            h.block_out,
            h.block_in,
            section<uint8_t>(h, h.codes),
            section<uint16_t>(h, h.scales),
            section<float>(h, h.signs_in),
            section<float>(h, h.signs_out),
            sparse_of(h)};
}

// How the sparse part of a weight is cut into slices.
struct Slices {
    struct Lane {
        int32_t length, first;  // of its elements, in the checkpoint's order
        uint8_t row;            // in its window
    };
    std::vector<int32_t> windows{0};  // units before a window
    std::vector<Lane> lanes;          // 16 a slice, the longest first

    Slices(int64_t rows, const int32_t* indptr, bool wide) {
        for (int64_t begin = 0; begin < rows; begin += WINDOW) {
            const int64_t end = std::min(begin + WINDOW, rows);
            std::vector<Lane> best = cut(indptr, begin, end, INT32_MAX);
            for (int part : {1, 2, 4}) {
                const int64_t times_mean = part * int64_t(indptr[end] - indptr[begin]) / (end - begin);
                std::vector<Lane> now = cut(indptr, begin, end, int32_t(std::max<int64_t>(1, times_mean)));
                if (cost(now) < cost(best)) best.swap(now);
            }
            // lanes that add nothing, to different rows: additions to one wait for each other
            while (best.size() % STEP) best.push_back({0, 0, uint8_t(best.size() % STEP)});
            int64_t units = windows.back();
            for (size_t i = 0; i < best.size(); i += STEP) units += slice_units(best[i].length, wide);
            lanes.insert(lanes.end(), best.begin(), best.end());
            windows.push_back(int32_t(units));
        }
    }

  private:
    // Runs of up to `longest` elements of the rows begin ... end - 1, long ones first.
    static std::vector<Lane> cut(const int32_t* indptr, int64_t begin, int64_t end, int32_t longest) {
        std::vector<Lane> runs;
        for (int64_t row = begin; row < end; ++row)
            for (int32_t e = indptr[row], left; (left = indptr[row + 1] - e) > 0; e += runs.back().length)
                runs.push_back({std::min(longest, left), e, uint8_t(row - begin)});
        std::stable_sort(runs.begin(), runs.end(), [](const Lane& a, const Lane& b) { return a.length > b.length; });
        return runs;
    }

    // Longer lanes pad others; more of them cost additions at the end.
    static int64_t cost(const std::vector<Lane>& runs) {
        int64_t total = 0;
        for (size_t i = 0; i < runs.size(); i += STEP) total += STEP * (runs[i].length + 1);
        return total;
    }
};

// Lays a header out, and the sections behind it. Without memory to write to it only counts.
class Packer {
  public:
    explicit Packer(char* out) : out_(out), at_(round(sizeof(Header))) {
        if (out_) std::memset(out_, 0, size_t(at_));
    }

    // Room for `count` elements, zeroed; null where nothing is written.
    template <class T>
    T* room(int64_t& offset, int64_t count) {
        offset = at_;
        at_ += round(count * int64_t(sizeof(T)));
        if (!out_) return nullptr;
        std::memset(out_ + offset, 0, size_t(at_ - offset));
        return reinterpret_cast<T*>(out_ + offset);
    }

    int64_t bytes() const { return at_; }

  private:
    static int64_t round(int64_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }
    char* out_;
    int64_t at_;
};

template <class T>
void copy(T* to, const T* from, int64_t count) {
    if (to && count) std::memcpy(to, from, size_t(count) * sizeof(T));
}

template <class Index>
void pack_slices(const Slices& slices, const Index* indices, const uint16_t* values, uint8_t* to) {
    for (size_t i = 0; i < slices.lanes.size(); i += STEP) {
        const Slices::Lane* lanes = &slices.lanes[i];
        SliceHead& head = *reinterpret_cast<SliceHead*>(to);
        head.length = lanes[0].length;
        SliceStep<Index>* steps = reinterpret_cast<SliceStep<Index>*>(to + sizeof head);
        for (int l = 0; l < STEP; ++l) {
            head.rows[l] = lanes[l].row;
            for (int32_t k = 0; k < lanes[l].length; ++k) {
                steps[k].columns[l] = indices[lanes[l].first + k];
                steps[k].values[l] = values[lanes[l].first + k];
            }
        }
        to += SLICE_UNIT * slice_units(head.length, sizeof(Index) == 4);
    }
}

void pack_sparse(Packer& packer, Header& h, int64_t rows, const int32_t* indptr, const void* indices, bool wide,
                 const uint16_t* values) {
    if (!indptr || indptr[rows] == 0) return;
    const Slices slices(rows, indptr, wide);
    h.wide = wide;
    copy(packer.room<int32_t>(h.windows, int64_t(slices.windows.size())), slices.windows.data(),
         int64_t(slices.windows.size()));
    uint8_t* to = packer.room<uint8_t>(h.slices, SLICE_UNIT * slices.windows.back());
    if (!to) return;
    if (wide)
        pack_slices(slices, static_cast<const int32_t*>(indices), values, to);
    else
        pack_slices(slices, static_cast<const uint16_t*>(indices), values, to);
}

// The code of a column in a row's bit stream of `bytes` bytes.
struct BitRow {
    const uint8_t* from;
    int64_t bytes, columns;
    int bits;
    uint32_t operator[](int64_t column) const {
        if (column >= columns) return 0;
        const int64_t bit = column * bits, byte = bit / 8;
        uint32_t word = from[byte];
        if (byte + 1 < bytes) word |= uint32_t(from[byte + 1]) << 8;
        return word >> (bit % 8) & ((1u << bits) - 1);
    }
};

// A row's part of a chunk, codes[64], to where it belongs in the block at `to`; `row` is that in the block.
void place_codes(int bits, const uint32_t* codes, int row, uint8_t* to) {
    for (int c = 0; c < CHUNK; ++c) {
        const int step = c / STEP, i = c % STEP, byte = row * STEP + i;
        if (bits == 8) {
            to[64 * step + byte] = uint8_t(codes[c]);
        } else if (bits == 4) {
            to[64 * (step / 2) + byte] |= uint8_t(codes[c] << (4 * (step % 2)));
        } else if (bits == 2) {
            to[byte] |= uint8_t(codes[c] << (2 * step));
        } else {
            const int half = 64 + row * 8 + i / 2, shift = 4 * (i % 2);
            if (step == 2) to[half] |= uint8_t(codes[c] << shift);
            if (step == 3) to[half] |= uint8_t((codes[c] >> 2) << (shift + 3));
            if (step != 2) to[byte] |= uint8_t(codes[c] << (step == 3 ? 6 : 3 * step));
        }
    }
}

int thread_count(int64_t work, int64_t units) {
    const int64_t most = std::min<int64_t>(work / WEIGHTS_PER_THREAD, units);
    return int(std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), most)));
}

// Calls body(begin, end, thread) on every thread with its share of `units`, in contiguous ranges.
template <class Body>
void share(int threads, int64_t units, const Body& body) {
    if (threads == 1) return body(0, units, 0);
#pragma omp parallel num_threads(threads)
    {
        const int64_t count = omp_get_num_threads(), id = omp_get_thread_num();
        body(units * id / count, units * (id + 1) / count, int(id));
    }
}

void pack_codes(int bits, int64_t rows, int64_t columns, const uint8_t* in, uint8_t* out) {
    const int64_t in_bytes = (columns * bits + 7) / 8, chunks = chunks_of(columns);
    share(thread_count(rows * columns, tiles_of(rows)), tiles_of(rows), [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin * TILE_ROWS; row < std::min(end * TILE_ROWS, rows); ++row) {
            const BitRow stream{in + row * in_bytes, in_bytes, columns, bits};
            const int64_t tile = row / TILE_ROWS, block = row % TILE_ROWS / BLOCK_ROWS;
            for (int64_t c = 0; c < chunks; ++c) {
                uint32_t codes[CHUNK];
                for (int64_t i = 0; i < CHUNK; ++i) codes[i] = stream[c * CHUNK + i];
                uint8_t* to = out + (tile * chunks + c) * tile_chunk_bytes(bits) + block * (32 * bits);
                place_codes(bits, codes, int(row % BLOCK_ROWS), to);
            }
        }
    });
}

// Entries against the largest of their row, as PLANES bytes of 7 bits, most significant first.
void pack_tables(int64_t rows, int64_t entries, const float* tables, uint8_t* planes, float* units) {
    constexpr int BITS = TABLE_SHIFT * PLANES;
    constexpr int32_t MIDDLE = 1 << (BITS - 1);
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t tile = row / TILE_ROWS, r = row % TILE_ROWS;
        float largest = 0;
        for (int64_t i = 0; i < entries; ++i) largest = std::max(largest, std::fabs(tables[row * entries + i]));
        const float unit = units[row] = largest / float(MIDDLE - 1);
        for (int64_t i = 0; i < entries; ++i) {
            const double steps = largest > 0 ? double(tables[row * entries + i]) / unit : 0.0;
            const int32_t whole = std::max(-MIDDLE + 1, std::min(MIDDLE - 1, int32_t(std::lround(steps)))) + MIDDLE;
            for (int d = 0; d < PLANES; ++d)
                planes[((tile * PLANES + d) * TILE_ROWS + r) * ENTRIES + i] =
                    uint8_t(whole >> (TABLE_SHIFT * (PLANES - 1 - d)) & 127);
        }
    }
}

// Buffers of the calling thread; they grow to what the largest call needs and stay.
template <class T>
T* buffer(int which, int64_t count) {
    thread_local std::vector<T> buffers[5];
    std::vector<T>& mine = buffers[which];
    if (int64_t(mine.size()) < count) mine.resize(size_t(count));
    return mine.data();
}

// Floats for activations side by side, and behind them what it takes to begin with a line of memory.
constexpr int64_t side_by_side_of(int64_t columns) { return (columns + 1) * STEP; }

// A batch of at most MAX_BATCH, x [batch, columns], for the sparse part of a weight; `memory`: side_by_side_of(columns),
// without it a buffer of this thread.
SparseActivations for_sparse(const Sparse& sparse, const float* x, int64_t batch, int64_t columns,
                             float* memory = nullptr) {
    if (!sparse.windows || batch < SIDE_BY_SIDE) return {batch, columns, x, nullptr};
    if (!memory) memory = buffer<float>(4, side_by_side_of(columns));
    const auto line = (reinterpret_cast<uintptr_t>(memory) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    float* side_by_side = reinterpret_cast<float*>(line);
    tier().side_by_side(x, batch, columns, side_by_side);
    return {batch, columns, x, side_by_side};
}

template <class Body>
int guarded(const Body& body) {
    try {
        return body();
    } catch (const std::exception&) {
        return OUT_OF_MEMORY;
    }
}

// Lets `body` fill a header and its sections, at `out` or nowhere; returns the bytes or a status.
template <class Body>
int64_t packed(const Body& body, void* out) {
    int64_t bytes = 0;
    const int status = guarded([&]() -> int {
        Header h{};
        h.magic = MAGIC;
        Packer packer(static_cast<char*>(out));
        if (!body(h, packer)) return BAD_ARGUMENT;
        bytes = h.bytes = packer.bytes();
        if (out) std::memcpy(out, &h, sizeof h);
        return OK;
    });
    return status == OK ? bytes : status;
}

// A batch of at most MAX_BATCH.
void integer_linear(const Weights& w, const float* x, int64_t batch, int planes, int dtype, void* y) {
    const Tier& isa = tier();
    const int64_t cells = w.chunks() * batch, windows = windows_of(w.rows);
    float* scales = buffer<float>(1, cells);
    float* sums = buffer<float>(2, cells * w.parts());
    int8_t* bytes = buffer<int8_t>(0, cells * planes * CHUNK);
    isa.quantize(x, batch, w.columns, planes, isa.order(w.kind, w.bits, planes), w.parts(), bytes, scales, sums);
    const Activations in{batch, planes, w.parts(), bytes, scales, sums, for_sparse(w.sparse, x, batch, w.columns)};
    const int threads = thread_count(w.rows * w.columns * batch, windows);
    float* scratch = buffer<float>(3, threads * scratch_of(batch, WINDOW));
    share(threads, windows, [&](int64_t begin, int64_t end, int thread) {
        isa.linear(w, in, begin, end, dtype, y, scratch + thread * scratch_of(batch, WINDOW));
    });
}

void trellis_linear(const Trellis& w, const float* x, int64_t batch, int planes, int dtype, void* y) {
    const Tier& isa = tier();
    const int count = planes > 2 ? 2 : 1;
    const int64_t cells = w.columns / w.block_in * batch, unit = trellis_unit(w.block_out);
    const int64_t units = (w.rows + unit - 1) / unit;
    float* rotated = buffer<float>(2, batch * w.columns);
    std::memcpy(rotated, x, size_t(batch * w.columns) * 4);
    isa.rotate(batch, w.columns, w.block_in, w.signs_in, rotated);
    float* scales = buffer<float>(1, cells);
    int16_t* words = buffer<int16_t>(0, batch * w.columns * count);
    int32_t* sums = buffer<int32_t>(1, cells * count);
    isa.quantize_words(rotated, batch, w.columns, w.block_in, count, words, scales, sums);
    const TrellisActivations in{batch, count, words, scales, sums, for_sparse(w.sparse, x, batch, w.columns)};
    const int threads = thread_count(2 * w.rows * w.columns * batch, units);
    float* scratch = buffer<float>(3, threads * scratch_of(batch, unit));
    share(threads, units, [&](int64_t begin, int64_t end, int thread) {
        isa.trellis_linear(w, in, begin, end, dtype, y, scratch + thread * scratch_of(batch, unit));
    });
}

}  // namespace

// Instruction set in use: 0 scalar, 1 AVX2, 2 AVX-512 with VNNI.
REQUANT_API int requant_isa() { return current_isa; }

// Use at most `cap`; returns what is in use then. Not to be called while a kernel runs.
REQUANT_API int requant_set_isa(int cap) {
    current_isa = std::max<int>(ISA_SCALAR, std::min(cap, supported_isa()));
    return current_isa;
}

// Packs the canonical tensors of a weight (SPEC.md, section 4) into `out`, or, without it, returns the bytes that takes.
// codes: row bit streams. scales: float16 [rows, groups], or tables [rows, 2^bits]; tables: these in float32. zeros:
// a byte each, [rows, groups]. indptr: null without a sparse part.
REQUANT_API int64_t requant_pack(int kind, int bits, int64_t group_size, int64_t rows, int64_t columns,
                                 const uint8_t* codes, const uint16_t* scales, const float* tables,
                                 const uint8_t* zeros, const int32_t* indptr, const void* indices, int wide,
                                 const uint16_t* values, void* out) {
    return packed([&](Header& h, Packer& packer) {
        if (!valid(kind, bits, group_size, rows, columns)) return false;
        h.kind = kind, h.bits = bits, h.group_size = group_size, h.rows = rows, h.columns = columns;
        const int64_t tiles = tiles_of(rows), chunks = chunks_of(columns);
        uint8_t* to_codes = packer.room<uint8_t>(h.codes, tiles * chunks * tile_chunk_bytes(bits) + CODE_SLACK);
        if (to_codes) pack_codes(bits, rows, columns, codes, to_codes);
        if (kind == LUT) {
            const int64_t entries = int64_t(1) << bits;
            copy(packer.room<uint16_t>(h.scales, rows * entries), scales, rows * entries);
            uint8_t* planes = packer.room<uint8_t>(h.zeros, tiles * PLANES * TILE_ROWS * ENTRIES);
            float* units = packer.room<float>(h.units, tiles * TILE_ROWS);
            if (units) pack_tables(rows, entries, tables, planes, units);
        } else {
            const int64_t groups = (columns + group_size - 1) / group_size;
            uint16_t* to_scales = packer.room<uint16_t>(h.scales, tiles * groups * TILE_ROWS);
            uint8_t* to_zeros = packer.room<uint8_t>(h.zeros, tiles * groups * TILE_ROWS);
            for (int64_t row = 0; to_scales && row < rows; ++row)
                for (int64_t g = 0; g < groups; ++g) {
                    const int64_t to = (row / TILE_ROWS * groups + g) * TILE_ROWS + row % TILE_ROWS;
                    to_scales[to] = scales[row * groups + g];
                    to_zeros[to] = zeros[row * groups + g];
                }
        }
        pack_sparse(packer, h, rows, indptr, indices, wide != 0, values);
        return true;
    }, out);
}

// The same for the trellis kind. codes: [rows / block_out, columns block_out / 128, 16 bits]; scales: float16
// [rows / block_out, columns / block_in]; signs: +- block^-1/2 of every feature.
REQUANT_API int64_t requant_pack_trellis(int bits, int state_bits, int64_t rows, int64_t columns, int64_t block_out,
                                         int64_t block_in, const uint8_t* codes, const uint16_t* scales,
                                         const float* signs_in, const float* signs_out, const int32_t* indptr,
                                         const void* indices, int wide, const uint16_t* values, void* out) {
    return packed([&](Header& h, Packer& packer) {
        if (!valid_trellis(bits, state_bits, rows, columns, block_out, block_in)) return false;
        h.kind = TRELLIS, h.bits = bits, h.state_bits = state_bits;
        h.rows = rows, h.columns = columns, h.block_out = block_out, h.block_in = block_in;
        const int64_t strings = rows * columns / TILE, bytes = TILE * bits / 8, stride = trellis_stride(bits);
        uint8_t* to_codes = packer.room<uint8_t>(h.codes, strings * stride + CODE_SLACK);
        for (int64_t i = 0; to_codes && i < strings; ++i)
            for (int64_t b = 0; b < stride; ++b) to_codes[i * stride + b] = codes[i * bytes + b % bytes];
        copy(packer.room<uint16_t>(h.scales, rows / block_out * (columns / block_in)), scales,
             rows / block_out * (columns / block_in));
        copy(packer.room<float>(h.signs_in, columns), signs_in, columns);
        copy(packer.room<float>(h.signs_out, rows), signs_out, rows);
        pack_sparse(packer, h, rows, indptr, indices, wide != 0, values);
        return true;
    }, out);
}

// y [batch, rows] = x [batch, columns] times the transposed weight; x and y of type `dtype`. Activations count with
// 8 bits for each of `planes`, 1 to 3; those of a trellis with at least 16.
REQUANT_API int requant_linear(const void* packed, int64_t packed_bytes, int64_t rows, int64_t columns, int planes,
                               int dtype, int64_t batch, const void* x, void* y) {
    return guarded([&]() -> int {
        const Header* h = header_of(packed, packed_bytes);
        if (!h || h->rows != rows || h->columns != columns || dtype < F32 || dtype > F16 || batch < 0 || planes < 1 ||
            planes > PLANES)
            return BAD_ARGUMENT;
        const int64_t size = size_of(dtype);
        float* wide = buffer<float>(0, dtype == F32 ? 0 : std::min(batch, MAX_BATCH) * columns);
        for (int64_t first = 0; first < batch; first += MAX_BATCH) {
            const int64_t count = std::min(batch - first, MAX_BATCH);
            const char* from = static_cast<const char*>(x) + first * columns * size;
            char* to = static_cast<char*>(y) + first * rows * size;
            const float* values = reinterpret_cast<const float*>(from);
            if (dtype != F32) {
                tier().widen(dtype, from, wide, count * columns);
                values = wide;
            }
            if (h->kind == TRELLIS)
                trellis_linear(trellis_of(*h), values, count, planes, dtype, to);
            else
                integer_linear(weights_of(*h), values, count, planes, dtype, to);
        }
        return OK;
    });
}

// out [count, columns] of type `dtype`: the rows `ids`, or, without ids, the rows first ... first + count - 1.
REQUANT_API int requant_dequantize(const void* packed, int64_t packed_bytes, int64_t columns, int dtype,
                                   const int64_t* ids, int64_t first, int64_t count, void* out) {
    return guarded([&]() -> int {
        const Header* h = header_of(packed, packed_bytes);
        if (!h || h->kind == TRELLIS || h->columns != columns || dtype < F32 || dtype > F16 || count < 0)
            return BAD_ARGUMENT;
        if (ids) {
            for (int64_t i = 0; i < count; ++i)
                if (ids[i] < 0 || ids[i] >= h->rows) return ID_OUT_OF_RANGE;
        } else if (first < 0 || first + count > h->rows) {
            return ID_OUT_OF_RANGE;
        }
        const Weights w = weights_of(*h);
        const Tier& isa = tier();
        const int64_t origin = ids ? 0 : first;
        const int threads = thread_count(count * columns, count);
        float* lines = buffer<float>(3, threads * (columns + 16));
        share(threads, count, [&](int64_t begin, int64_t end, int thread) {
            isa.dequantize(w, ids, origin, origin + begin, origin + end, dtype, out, lines + thread * (columns + 16));
        });
        return OK;
    });
}

// out [columns, count] of type `dtype`: rotated weights of the rows first ... first + count - 1, whole output blocks.
REQUANT_API int requant_trellis_dequantize(const void* packed, int64_t packed_bytes, int64_t columns, int dtype,
                                           int64_t first, int64_t count, void* out) {
    const Header* h = header_of(packed, packed_bytes);
    if (!h || h->kind != TRELLIS || h->columns != columns || dtype < F32 || dtype > F16) return BAD_ARGUMENT;
    const int64_t block = h->block_out;
    if (first < 0 || count < 0 || first + count > h->rows || first % block || count % block) return ID_OUT_OF_RANGE;
    const Trellis w = trellis_of(*h);
    share(thread_count(count * columns, count / block), count / block, [&](int64_t begin, int64_t end, int) {
        char* to = static_cast<char*>(out) + begin * block * size_of(dtype);
        tier().trellis_dequantize(w, first / block + begin, first / block + end, dtype, to, count);
    });
    return OK;
}

// Rows of x [count, columns] into the coordinates of a trellis, in place; or, with `back`, rows of y [count, rows] out of
// them, residual of x [count, columns] included.
REQUANT_API int requant_trellis_rotate(const void* packed, int64_t packed_bytes, int64_t count, const float* x,
                                       float* in_place, int back) {
    const Header* h = header_of(packed, packed_bytes);
    if (!h || h->kind != TRELLIS || count < 0) return BAD_ARGUMENT;
    return guarded([&]() -> int {
        const Trellis w = trellis_of(*h);
        const int64_t width = back ? w.rows : w.columns;
        const int threads = thread_count(8 * count * width, count);
        const int64_t room = back && w.sparse.windows ? side_by_side_of(w.columns) + scratch_of(MAX_BATCH, 0) : 0;
        float* memory = buffer<float>(4, threads * room);
        share(threads, count, [&](int64_t begin, int64_t end, int thread) {
            float* rows = in_place + begin * width;
            if (!back) return tier().rotate(end - begin, width, w.block_in, w.signs_in, rows);
            tier().rotate_back(end - begin, width, w.block_out, w.signs_out, rows);
            float* mine = memory + thread * room;
            for (int64_t m = begin; room && m < end; m += MAX_BATCH) {
                const int64_t batch = std::min(end - m, MAX_BATCH);
                const SparseActivations in = for_sparse(w.sparse, x + m * w.columns, batch, w.columns, mine);
                tier().sparse(w.sparse, width, in, in_place + m * width, width, mine + side_by_side_of(w.columns));
            }
        });
        return OK;
    });
}

// Kind of a packed weight: 0 uniform, 1 lut, 2 trellis.
REQUANT_API int requant_kind(const void* packed, int64_t packed_bytes) {
    const Header* h = header_of(packed, packed_bytes);
    return h ? h->kind : BAD_ARGUMENT;
}

// Largest batches that are to be multiplied from codes: of a kind with activations of up to 16 bits, of all with longer
// ones.
REQUANT_API void requant_set_fused_batch(int64_t uniform, int64_t lut, int64_t trellis, int64_t long_activations) {
    const int64_t largest[] = {uniform, lut, trellis, long_activations};
    for (int i = 0; i < 4; ++i) fused_batch[i] = largest[i];
}

REQUANT_API int64_t requant_fused_batch(const void* packed, int64_t packed_bytes, int planes) {
    const Header* h = header_of(packed, packed_bytes);
    if (!h) return BAD_ARGUMENT;
    return fused_batch[planes > 2 ? 3 : h->kind];
}

// Reads `bytes` (a multiple of 256) with `threads` threads and returns a checksum: the yardstick of the benchmark for
// what memory delivers.
REQUANT_API uint64_t requant_read(const uint8_t* data, int64_t bytes, int threads) {
    std::atomic<uint64_t> total{0};
    share(threads, bytes / 256, [&](int64_t begin, int64_t end, int) {
        total ^= tier().read(data + begin * 256, (end - begin) * 256);
    });
    return total;
}

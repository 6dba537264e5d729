// What the instruction-set tiers share: the run-time layout of a weight, and the interface of a tier.
//
// Run-time layout of the codes (2, 3, 4 or 8 bits). Rows come in tiles of 16, columns in chunks of 64; both are padded
// with codes 0. Tiles follow each other, in a tile its chunks, in a chunk the four blocks of 4 rows, 32 * bits bytes
// each. A block is computed as four vectors of 4 rows x 16 consecutive columns, one byte a weight, row by row:
//
//     2 bits: one line of 64 bytes; byte i of row r holds the codes of columns i, 16 + i, 32 + i, 48 + i
//     4 bits: two lines; the first holds the codes of columns i and 16 + i, the second 32 + i and 48 + i
//     3 bits: a line with the codes of columns i and 16 + i, then the two lower bits of 48 + i; then 8 bytes a row, of
//             which each half i holds the code of column 32 + i, then the upper bit of 48 + i
//     8 bits: four lines of 16 columns
//
// with lower columns in lower bits. So all four vectors come out of loads by shifts and masks alone, one stream of
// memory serves 16 rows, and vectors of 1, 2 or 4 rows read the same bytes. Behind the last tile CODE_SLACK bytes may
// be read (never used).
//
// Products are of integers: activations become 8, 16 or 24 bits against the largest of their chunk (Activations), and
// tables 14 or 21 bits against the range of their row.
#pragma once

#include <cstddef>
#include <cstdint>

namespace requant {

constexpr int TILE_ROWS = 16;        // rows whose codes lie together
constexpr int BLOCK_ROWS = 4;        // rows of a block
constexpr int64_t CHUNK = 64;        // columns whose activations share a scale
constexpr int STEP = 16;             // columns of a vector; lanes of a slice
constexpr int STEPS = 4;             // vectors of a block
constexpr int64_t CODE_SLACK = 64;   // readable bytes behind the last tile
constexpr int64_t WINDOW = 64;       // rows whose sparse weights lie together; what threads share
constexpr int PLANES = 3;            // bytes of the widest activation or table entry
constexpr int TABLE_SHIFT = 7;       // bits of a byte of a table entry
constexpr int ENTRIES = 16;          // bytes of a row in a plane of tables
constexpr int64_t MAX_BATCH = 16;    // activations that are multiplied together

constexpr int64_t SIDE_BY_SIDE = 4;  // from as many activations on the sparse part is multiplied with all at once
static_assert(MAX_BATCH == STEP, "all of a batch side by side are a line of memory");

constexpr int64_t STRETCH = 64;  // windows whose residual is computed at a time, times activations
constexpr int64_t stretch_of(int64_t batch) { return STRETCH / batch; }
// Floats of scratch for dense sums of up to `rows` rows and, twice, the residual of a stretch.
constexpr int64_t scratch_of(int64_t batch, int64_t rows) { return batch * rows + 2 * STRETCH * WINDOW; }

enum Kind : int { UNIFORM = 0, LUT = 1, TRELLIS = 2 };
enum Dtype : int { F32 = 0, BF16 = 1, F16 = 2 };
// How integers of activations lie: byte by byte; as words of 16 bits; as words, of every step of 16 columns those with
// even numbers first.
enum Order : int { BYTES = 0, WORDS = 1, EVEN_FIRST = 2 };

constexpr int64_t size_of(int dtype) { return dtype == F32 ? 4 : 2; }
constexpr int64_t tiles_of(int64_t rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }
constexpr int64_t chunks_of(int64_t columns) { return (columns + CHUNK - 1) / CHUNK; }
constexpr int64_t windows_of(int64_t rows) { return (rows + WINDOW - 1) / WINDOW; }
constexpr int64_t tile_chunk_bytes(int bits) { return TILE_ROWS * CHUNK * bits / 8; }

// The sparse part, window by window. The elements of a row are cut into runs, which are the 16 lanes of slices. A slice is
// the length of its longest lane and the lanes' rows in the window (SliceHead), then element after element of all lanes
// (SliceStep); shorter lanes are padded with column 0 and value 0. All of it is one stream of memory.
struct SliceHead {
    int32_t length, unused[3];
    uint8_t rows[STEP];
};

template <class Index>  // uint16_t or int32_t
struct SliceStep {
    Index columns[STEP];
    uint16_t values[STEP];  // float16
};

constexpr int64_t SLICE_UNIT = 32;  // bytes; every slice is a multiple
static_assert(sizeof(SliceHead) == SLICE_UNIT, "");
constexpr int64_t slice_units(int64_t length, bool wide) {
    return 1 + length * int64_t(wide ? sizeof(SliceStep<int32_t>) : sizeof(SliceStep<uint16_t>)) / SLICE_UNIT;
}

struct Sparse {
    const int32_t* windows;  // [windows + 1] units before those of a window; null without a sparse part
    const uint8_t* slices;
    bool wide;               // columns are int32
};

// What the sparse part is multiplied with: activations as they are.
struct SparseActivations {
    int64_t batch, columns;
    const float* x;             // [batch, columns]
    const float* side_by_side;  // [columns, STEP]: transposed, of no meaning behind the batch; null below SIDE_BY_SIDE
};

struct Weights {
    int kind;
    int bits;
    int64_t group_size;      // columns sharing a scale; 0 for LUT
    int64_t rows, columns;
    const uint8_t* codes;
    const uint16_t* scales;  // UNIFORM: float16 [tiles, groups, 16]; LUT: float16 tables [rows, 2^bits]
    const uint8_t* zeros;    // UNIFORM: [tiles, groups, 16]; LUT: planes of tables, [tiles, PLANES, 16, ENTRIES]
    const float* units;      // LUT: [tiles, 16] what an entry is a multiple of
    Sparse sparse;

    int64_t chunks() const { return chunks_of(columns); }
    int64_t tiles() const { return tiles_of(rows); }
    int64_t groups() const { return group_size ? (columns + group_size - 1) / group_size : 0; }
    // quantization groups of which a chunk may hold parts; a group is a multiple of 32
    int parts() const { return group_size % CHUNK ? 2 : 1; }
};

// The groups of columns that grow by at most a group's size at a time: without divisions.
class GroupWalk {
  public:
    explicit GroupWalk(const Weights& w) : size_(w.group_size), last_(w.groups() - 1), end_(w.group_size) {}
    int64_t count() const { return last_ + 1; }
    // that of a column; of padding, the last
    int64_t at(int64_t column) {
        if (column >= end_ && group_ < last_) ++group_, end_ += size_;
        return group_;
    }

  private:
    int64_t size_, last_, end_, group_ = 0;
};

// Activations as integers of `planes` bytes, chunk by chunk, most significant byte first; or as words, in the order that
// the tier wants. x = scale * integer.
struct Activations {
    int64_t batch;
    int planes;
    int parts;           // as those of the weight
    const int8_t* bytes;   // [chunks, batch, planes, CHUNK]; words: int16 [chunks, batch, CHUNK]
    const float* scales;   // [chunks, batch]
    const float* sums;     // [chunks, batch, parts] minus the sums of the integers
    SparseActivations sparse;
};

// ---- the trellis kind ----------------------------------------------------------------------------------------
//
// Strings keep their order on disk, but each is followed by its first bytes once more: the last windows run over the
// end.

constexpr int TILE = 128;       // weights in a circular string
constexpr int TILE_TAIL = 2;    // bytes that are repeated

constexpr int64_t trellis_stride(int bits) { return TILE * bits / 8 + TILE_TAIL; }
// what threads share: whole output blocks, and windows of the sparse part
constexpr int64_t trellis_unit(int64_t block_out) { return block_out > WINDOW ? block_out : WINDOW; }

struct Trellis {
    int bits, state_bits;
    int64_t rows, columns, block_out, block_in;
    const uint8_t* codes;    // [rows / block_out, columns / (TILE / block_out), trellis_stride]
    const uint16_t* scales;  // float16 [rows / block_out, columns / block_in]
    const float* signs_in;   // +- block_in^-1/2 [columns]
    const float* signs_out;  // +- block_out^-1/2 [rows]
    Sparse sparse;
};

// Rotated activations as integers of one or two words of 16 bits: word 0 times 2^15 (or alone), plus word 1.
struct TrellisActivations {
    int64_t batch;
    int count;              // words of an activation
    const int16_t* words;   // [columns / block_in, batch, count, block_in]
    const float* scales;    // [columns / block_in, batch]
    const int32_t* sums;    // [columns / block_in, batch, count] 510 times the words' sum
    SparseActivations sparse;
};

// ---- one instruction set -------------------------------------------------------------------------------------

struct Tier {
    const char* name;
    // bytes, scales and sums of an Activations from its x
    void (*quantize)(const float* x, int64_t batch, int64_t columns, int planes, Order order, int parts, int8_t* bytes,
                     float* scales, float* sums);
    // how `linear` takes the activations of such a weight
    Order (*order)(int kind, int bits, int planes);
    // y[m, n] for the rows n of the windows begin ... end - 1 and all m; out: scratch_of(batch, WINDOW) floats
    void (*linear)(const Weights&, const Activations&, int64_t begin, int64_t end, int dtype, void* y, float* out);
    // out[i - first] = row ids[i] (or row i, without ids) for i in [begin, end); line: columns floats of scratch
    void (*dequantize)(const Weights&, const int64_t* ids, int64_t first, int64_t begin, int64_t end, int dtype,
                       void* out, float* line);
    void (*widen)(int dtype, const void* in, float* out, int64_t count);
    // side_by_side of a SparseActivations from its x
    void (*side_by_side)(const float* x, int64_t batch, int64_t columns, float* out);
    // sums[m, row] += sparse part of the first `rows` rows times activation m, the columns of a row of sums being `stride`
    // apart; scratch: scratch_of(batch, 0) floats
    void (*sparse)(const Sparse&, int64_t rows, const SparseActivations&, float* sums, int64_t stride, float* scratch);

    // x [count, columns] times signs, then through the Hadamard transform of every block, without its factor
    void (*rotate)(int64_t count, int64_t columns, int64_t block, const float* signs, float* x);
    // the transform first, then signs
    void (*rotate_back)(int64_t count, int64_t columns, int64_t block, const float* signs, float* x);
    // words, scales and sums of a TrellisActivations from its rotated x
    void (*quantize_words)(const float* rotated, int64_t batch, int64_t columns, int64_t block, int count,
                           int16_t* words, float* scales, int32_t* sums);
    // y[m, n] for the rows n of the units begin ... end - 1 and all m; sums: scratch_of(batch, trellis_unit) floats
    void (*trellis_linear)(const Trellis&, const TrellisActivations&, int64_t begin, int64_t end, int dtype, void* y,
                           float* sums);
    // out [columns, stride] of type `dtype`: rotated weights of the row blocks begin ... end - 1, from block `begin` on
    void (*trellis_dequantize)(const Trellis&, int64_t begin, int64_t end, int dtype, void* out, int64_t stride);

    // a checksum of `bytes` bytes, a multiple of 256, as fast as they can be loaded
    uint64_t (*read)(const uint8_t* data, int64_t bytes);
};

extern const Tier SCALAR_TIER;
#if defined(__x86_64__)
extern const Tier AVX2_TIER;
extern const Tier AVX512_TIER;
#endif

}  // namespace requant

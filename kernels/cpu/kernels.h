// What the instruction-set tiers share: the run-time layout of a weight, and the interface of a tier.
//
// Run-time layout of the codes (2, 3, 4 bits). A row is cut into segments: blocks of 128 columns, then at most
// one of 64, one of 32 and one of the remaining 1 to 31 columns. A segment of `lanes` lanes holds column
// `start + j * lanes + i` (0 <= j < 8, 0 <= i < lanes) as code j of lane i, and the eight codes of a lane fill
// exactly `bits` bytes (least significant bit first, code 0 lowest). One vector load therefore yields, after
// shifts alone, vectors of consecutive columns; no column group of 32 is ever split over two values of j that
// belong to different quantization groups; and a row takes no more bytes than in the checkpoint, but for fewer
// than eight padding codes. Codes of 8 bits lie in column order. Behind the last row CODE_SLACK bytes may be
// read (never used).
//
// Short segments are computed as if they had 16 lanes: the surplus lanes decode whatever follows in memory
// and meet an activation that is zero.
#pragma once

#include <cstdint>

namespace requant {

constexpr int64_t BLOCK = 128;       // columns of a full segment
constexpr int LANES = 16;            // lanes of a full segment
constexpr int CODES = 8;             // codes of a lane
constexpr int64_t CODE_SLACK = 128;  // readable bytes behind the last row
constexpr int MAX_TAILS = 3;
constexpr int MAX_ROW_TILE = 4;

enum Kind : int { UNIFORM = 0, LUT = 1 };
enum Dtype : int { F32 = 0, BF16 = 1, F16 = 2 };

struct Weights {
    int kind;
    int bits;
    int64_t group_size;      // columns sharing a scale; 0 for LUT
    int64_t rows, columns;
    const uint8_t* codes;    // run-time layout above
    const uint16_t* scales;  // float16: scales [rows, groups], or tables [rows, 2^bits] for LUT
    const uint8_t* zeros;    // zero points [rows, groups], one byte each; null for LUT
    const int32_t* indptr;   // CSR row pointers [rows + 1]; null without a sparse part
    const void* indices;     // CSR columns, uint16 or int32
    bool wide_indices;
    const uint16_t* values;  // float16
};

struct Tail {
    int64_t start;   // first column
    int64_t offset;  // bytes from the start of the row
    int lanes;
};

// Where the segments of a row lie; the same for all rows of a weight.
struct Plan {
    int64_t row_bytes;
    int64_t groups;
    int64_t full;  // segments of BLOCK columns
    int tails;
    Tail tail[MAX_TAILS];
    int parts;                     // quantization groups a segment is cut into: 1, 2 or 4 (UNIFORM)
    const int32_t* group_of_part;  // [(full + tails) * parts]
};

// Activations in float32, plus the columns of the tail segments spread to 16 lanes and padded with zeros.
struct Input {
    int64_t batch;
    const float* x;  // [batch, columns]
    int64_t stride;
    const float* tail;  // [batch, tails * BLOCK]
    int64_t tail_stride;
};

// One instruction set. `scratch` holds scratch_floats(plan, columns) floats that belong to the caller's thread.
struct Tier {
    const char* name;
    int row_tile;  // rows computed together; ranges of rows start at its multiples
    // y[m, n] for n in [row_begin, row_end) and all m
    void (*linear)(const Weights&, const Plan&, const Input&, int64_t row_begin, int64_t row_end, int dtype,
                   void* y, int64_t y_stride, float* scratch);
    // out[i - first] = row ids[i] (or row i, without ids) for i in [begin, end)
    void (*dequantize)(const Weights&, const Plan&, const int64_t* ids, int64_t first, int64_t begin,
                       int64_t end, int dtype, void* out, float* scratch);
    void (*widen)(int dtype, const void* in, float* out, int64_t count);
};

// ---- the trellis kind, whose codes keep their disk layout ---------------------------------------------------

constexpr int TILE = 128;  // weights in a circular string

struct Trellis {
    int bits, state_bits;
    int64_t rows, columns, block_out, block_in;
    const uint8_t* codes;    // [rows / block_out, columns / (TILE / block_out), 16 bits]
    const uint16_t* scales;  // float16 [rows / block_out, columns / block_in]
    const float* signs_in;   // +- block_in^-1/2 [columns]
    const float* signs_out;  // +- block_out^-1/2 [rows]
    const int32_t* indptr;   // CSR as in Weights
    const void* indices;
    bool wide_indices;
    const uint16_t* values;
};

// One instruction set; arrays are by bits - 1.
struct TrellisTier {
    // out [batch, rows] of the row blocks begin ... end - 1, rotated back, residual included. `x` is as given, `rotated`
    // is x times signs through the Hadamard transform, both [batch, columns]. sums: 2 batch block_out floats.
    void (*linear[6])(const Trellis&, const float* x, const float* rotated, int64_t batch, int64_t begin,
                      int64_t end, float* out, float* sums);
    // out [.., columns]: rotated weights of the row blocks begin ... end - 1, from block `begin` on
    void (*dequantize[6])(const Trellis&, int64_t begin, int64_t end, float* out);
};

extern const TrellisTier SCALAR_TRELLIS;
#if defined(__x86_64__)
extern const TrellisTier AVX2_TRELLIS;
extern const TrellisTier AVX512_TRELLIS;
#endif

// scales and zero points of a tile of rows, then one row of weights
inline int64_t scratch_floats(const Plan& plan, int64_t columns) {
    return 2 * MAX_ROW_TILE * plan.groups + columns;
}

extern const Tier SCALAR_TIER;
#if defined(__x86_64__)
extern const Tier AVX2_TIER;
extern const Tier AVX512_TIER;
#endif

}  // namespace requant

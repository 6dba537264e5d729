// What the kernels of the trellis kind share, for 128 rows a string: the rotation of activations, and the windows.
//
// A weight is a sum of the four bytes of state * 0x83DCD12D mod 2^32, less 510. A lane holds 16 consecutive windows of a
// column.
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

// The C ABI of the trellis kind: checks, shares row blocks among OpenMP threads, picks the instruction set. Activations
// are rotated once a call. Under the same rules as dispatch.cpp.
#include <omp.h>

#include <algorithm>
#include <exception>
#include <vector>

#include "kernels.h"

#define REQUANT_API extern "C" __attribute__((visibility("default")))

extern "C" int requant_isa();

namespace {

using namespace requant;

constexpr int64_t WEIGHTS_PER_THREAD = 1 << 15;

const TrellisTier& tier() {
#if defined(__x86_64__)
    const int isa = requant_isa();
    if (isa == 2) return AVX512_TRELLIS;
    if (isa == 1) return AVX2_TRELLIS;
#endif
    return SCALAR_TRELLIS;
}

bool block_size(int64_t block) { return block == 16 || block == 32 || block == 64 || block == 128; }

bool valid(const Trellis& w) {
    return w.bits >= 1 && w.bits <= 6 && w.state_bits >= w.bits && w.state_bits <= 16 && block_size(w.block_out) &&
           block_size(w.block_in) && w.rows >= 0 && w.columns > 0 && w.rows % w.block_out == 0 &&
           w.columns % w.block_in == 0;
}

int threads_for(int64_t work, int64_t units) {
    const int64_t most = std::min<int64_t>(work / WEIGHTS_PER_THREAD, units);
    return int(std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), most)));
}

template <class Body>
int guarded(const Body& body) {
    try {
        return body();
    } catch (const std::exception&) {
        return -2;
    }
}

}  // namespace

// The block Hadamard transform of every row of x [count, columns], in place and without its factor, with the rows times
// `signs` before it or, with signs_last, after it.
REQUANT_API int requant_trellis_rotate(int64_t count, int64_t columns, int64_t block, const float* signs,
                                       int signs_last, float* x) {
    if (count < 0 || columns < 1 || !block_size(block) || columns % block) return -1;
#pragma omp parallel for num_threads(threads_for(count * columns, count))
    for (int64_t m = 0; m < count; ++m) {
        float* row = x + m * columns;
        if (!signs_last)
            for (int64_t i = 0; i < columns; ++i) row[i] *= signs[i];
        for (int64_t at = 0; at < columns; at += block)
            for (int64_t width = 1; width < block; width *= 2)
                for (int64_t pair = at; pair < at + block; pair += 2 * width)
                    for (int64_t i = pair; i < pair + width; ++i) {
                        const float u = row[i], v = row[i + width];
                        row[i] = u + v;
                        row[i + width] = u - v;
                    }
        if (signs_last)
            for (int64_t i = 0; i < columns; ++i) row[i] *= signs[i];
    }
    return 0;
}

// y [batch, rows] float32 = x [batch, columns] float32 times the transposed weight, residual included.
REQUANT_API int requant_trellis_linear(int bits, int state_bits, int64_t rows, int64_t columns, int64_t block_out,
                                       int64_t block_in, const uint8_t* codes, const uint16_t* scales,
                                       const float* signs_in, const float* signs_out, const int32_t* indptr,
                                       const void* indices, int wide_indices, const uint16_t* values, int64_t batch,
                                       const float* x, float* y) {
    return guarded([&]() -> int {
        const Trellis w{bits,   state_bits, rows,      columns, block_out, block_in,          codes,
                        scales, signs_in,   signs_out, indptr,  indices,   wide_indices != 0, values};
        if (!valid(w) || batch < 0) return -1;
        thread_local std::vector<float> rotated;
        rotated.assign(x, x + batch * columns);
        requant_trellis_rotate(batch, columns, block_in, signs_in, 0, rotated.data());
        const float* turned = rotated.data();
        const auto run = tier().linear[bits - 1];
        const int64_t blocks = rows / block_out, sums = 2 * batch * block_out;
        const int threads = threads_for(rows * columns * batch, blocks);
        thread_local std::vector<float> scratch;
        scratch.resize(size_t(threads * (sums + 32)));
        float* buffer = scratch.data();
#pragma omp parallel num_threads(threads)
        {
            const int64_t count = omp_get_num_threads(), id = omp_get_thread_num();
            run(w, x, turned, batch, blocks * id / count, blocks * (id + 1) / count, y, buffer + id * (sums + 32));
        }
        return 0;
    });
}

// out [count, columns] float32: rotated weights of the rows first ... first + count - 1, whole output blocks.
REQUANT_API int requant_trellis_dequantize(int bits, int state_bits, int64_t rows, int64_t columns, int64_t block_out,
                                           int64_t block_in, const uint8_t* codes, const uint16_t* scales,
                                           int64_t first, int64_t count, float* out) {
    const Trellis w{bits,   state_bits, rows,    columns, block_out, block_in, codes,
                    scales, nullptr,    nullptr, nullptr, nullptr,   false,    nullptr};
    if (!valid(w)) return -1;
    if (first < 0 || count < 0 || first + count > rows || first % block_out || count % block_out) return -3;
    const auto run = tier().dequantize[bits - 1];
    const int64_t begin = first / block_out, blocks = count / block_out;
    const int threads = threads_for(count * columns, blocks);
#pragma omp parallel num_threads(threads)
    {
        const int64_t n = omp_get_num_threads(), id = omp_get_thread_num();
        const int64_t from = blocks * id / n, to = blocks * (id + 1) / n;
        run(w, begin + from, begin + to, out + from * block_out * columns);
    }
    return 0;
}

// y [batch, rows] += x [batch, columns] times the transposed residual; values float32.
REQUANT_API int requant_add_sparse_product(int64_t rows, int64_t columns, const int32_t* indptr, const void* indices,
                                           int wide_indices, const float* values, int64_t batch, const float* x,
                                           float* y) {
    const uint16_t* narrow = static_cast<const uint16_t*>(indices);
    const int32_t* wide = static_cast<const int32_t*>(indices);
#pragma omp parallel for num_threads(threads_for(int64_t(indptr[rows]) * batch, batch))
    for (int64_t m = 0; m < batch; ++m)
        for (int64_t row = 0; row < rows; ++row) {
            float sum = 0;
            for (int64_t e = indptr[row]; e < indptr[row + 1]; ++e)
                sum += values[e] * x[m * columns + (wide_indices ? wide[e] : narrow[e])];
            y[m * rows + row] += sum;
        }
    return 0;
}

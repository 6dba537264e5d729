// y[p] = x[p / share] * (dense + sparse)^T of expert experts[p]: blockIdx.z is p, and the weights of all experts of a layer
// lie one behind the other. Rows of y whose expert is not here are left as they are.
DEVICE bool find_expert(Arguments& in) {
    launched_before_is_done();  // which expert it is was computed there
    const int p = blockIdx.z, expert = in.experts[p];
    if (expert < 0) return false;
    in.codes += expert * in.codes_stride;
    in.params += expert * in.params_stride;
    in.zeros += expert * in.zeros_stride;
    if (in.indptr != nullptr) in.indptr += int64_t(expert) * (in.rows + 1);  // they count entries of all experts
    in.x += p / in.share * in.x_stride;
    in.y += int64_t(p) * in.rows;
    return true;
}

#define EXPERTS(NT, ONE, WR, WK, KBYTES, BLOCKS)                                                                     \
    extern "C" __global__ void __launch_bounds__(32 * (WR * WK + ADDERS<NT, ONE>), BLOCKS)                           \
        experts(const __grid_constant__ Arguments given) {                                                           \
        Arguments in = given;                                                                                        \
        if (find_expert(in)) matvec<NT, ONE, WR, WK, KBYTES>(in);                                                    \
    }

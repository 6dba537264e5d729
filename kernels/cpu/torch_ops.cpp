// The product as a torch op, through torch's stable C interface: a call costs a microsecond or two where one through
// Python costs ten, and the shared object needs torch neither to be built nor of a certain version.
//
// The few functions of that interface that are needed are declared here, as torch/csrc/inductor/aoti_torch/c/shim.h and
// torch/csrc/stable/c/shim.h have them, and looked up in the loaded torch by requant_register_ops.
#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>

#define REQUANT_API extern "C" __attribute__((visibility("default")))

extern "C" int64_t requant_fused_batch(const void* packed, int64_t packed_bytes, int planes);
extern "C" int requant_linear(const void* packed, int64_t packed_bytes, int64_t rows, int64_t columns, int planes,
                              int dtype, int64_t batch, const void* x, void* y);

namespace {

using Value = uint64_t;  // StableIValue: a handle of a tensor, or an integer
using Tensor = struct AtenTensorOpaque*;
using Library = struct TorchLibraryOpaque*;
using Kernel = void (*)(Value* stack, uint64_t arguments, uint64_t results);

struct Torch {
    int32_t (*aoti_torch_dtype_float32)();
    int32_t (*aoti_torch_dtype_bfloat16)();
    int32_t (*aoti_torch_dtype_float16)();
    int32_t (*aoti_torch_device_type_cpu)();
    int32_t (*aoti_torch_get_dtype)(Tensor, int32_t*);
    int32_t (*aoti_torch_get_dim)(Tensor, int64_t*);
    int32_t (*aoti_torch_get_numel)(Tensor, int64_t*);
    int32_t (*aoti_torch_get_sizes)(Tensor, int64_t**);
    int32_t (*aoti_torch_is_contiguous)(Tensor, bool*);
    int32_t (*aoti_torch_get_data_ptr)(Tensor, void**);
    int32_t (*aoti_torch_empty_strided)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Tensor*);
    int32_t (*aoti_torch_delete_tensor_object)(Tensor);
    int32_t (*aoti_torch_call_dispatcher)(const char*, const char*, Value*);
    int32_t (*aoti_torch_library_init_impl)(const char*, const char*, const char*, uint32_t, Library*);
    int32_t (*aoti_torch_library_impl)(Library, const char*, Kernel);
    int32_t dtypes[3];  // by requant::Dtype
    int32_t cpu;
};

Torch torch;

void check(int32_t status) {
    if (status) throw std::runtime_error("requant: a call into torch failed");
}

// A tensor that is released at the end of a block, as the callee of an op has to.
struct Owned {
    Tensor handle;
    ~Owned() { torch.aoti_torch_delete_tensor_object(handle); }
};

constexpr int64_t MAX_DIM = 8;

// packed_linear(Tensor x, Tensor packed, int out_features, int planes) -> Tensor
void packed_linear(Value* stack, uint64_t, uint64_t) {
    const Tensor x = reinterpret_cast<Tensor>(stack[0]), packed = reinterpret_cast<Tensor>(stack[1]);
    const int64_t rows = int64_t(stack[2]), planes = int64_t(stack[3]);
    bool contiguous = false;
    int64_t dim = 0, numel = 0, *sizes = nullptr;
    check(torch.aoti_torch_is_contiguous(x, &contiguous));
    check(torch.aoti_torch_get_dim(x, &dim));
    check(torch.aoti_torch_get_numel(x, &numel));
    check(torch.aoti_torch_get_sizes(x, &sizes));
    void *in = nullptr, *weight = nullptr, *out = nullptr;
    int64_t packed_bytes = 0;
    check(torch.aoti_torch_get_data_ptr(packed, &weight));
    check(torch.aoti_torch_get_numel(packed, &packed_bytes));
    const int64_t columns = dim ? sizes[dim - 1] : 0, batch = columns ? numel / columns : 0;
    if (!contiguous || dim > MAX_DIM || columns == 0 ||
        batch > requant_fused_batch(weight, packed_bytes, int(planes))) {
        check(torch.aoti_torch_call_dispatcher("requant::packed_linear_any", "", stack));
        return;
    }
    const Owned owned[2] = {{x}, {packed}};
    int32_t dtype = 0;
    check(torch.aoti_torch_get_dtype(x, &dtype));
    int kind = 0;
    while (kind < 3 && torch.dtypes[kind] != dtype) ++kind;
    int64_t shape[MAX_DIM], strides[MAX_DIM], stride = 1;
    for (int64_t d = dim - 1; d >= 0; --d) {
        shape[d] = d == dim - 1 ? rows : sizes[d];
        strides[d] = stride;
        stride *= shape[d];
    }
    check(torch.aoti_torch_get_data_ptr(x, &in));
    Tensor y = nullptr;
    check(torch.aoti_torch_empty_strided(dim, shape, strides, dtype, torch.cpu, 0, &y));
    check(torch.aoti_torch_get_data_ptr(y, &out));
    if (requant_linear(weight, packed_bytes, rows, columns, int(planes), kind, batch, in, out)) {
        torch.aoti_torch_delete_tensor_object(y);
        throw std::runtime_error("requant: the packed weight does not fit x");
    }
    stack[0] = reinterpret_cast<Value>(y);
}

}  // namespace

// Registers the CPU kernel of requant::packed_linear, whose schema torch knows by then. `handle`: libtorch_cpu, as dlopen
// gave it. Returns 0, or 1 if that lacks a function.
REQUANT_API int requant_register_ops(void* handle) {
#define REQUANT_FIND(NAME)                                                    \
    torch.NAME = reinterpret_cast<decltype(torch.NAME)>(dlsym(handle, #NAME)); \
    if (!torch.NAME) return 1;
    REQUANT_FIND(aoti_torch_dtype_float32)
    REQUANT_FIND(aoti_torch_dtype_bfloat16)
    REQUANT_FIND(aoti_torch_dtype_float16)
    REQUANT_FIND(aoti_torch_device_type_cpu)
    REQUANT_FIND(aoti_torch_get_dtype)
    REQUANT_FIND(aoti_torch_get_dim)
    REQUANT_FIND(aoti_torch_get_numel)
    REQUANT_FIND(aoti_torch_get_sizes)
    REQUANT_FIND(aoti_torch_is_contiguous)
    REQUANT_FIND(aoti_torch_get_data_ptr)
    REQUANT_FIND(aoti_torch_empty_strided)
    REQUANT_FIND(aoti_torch_delete_tensor_object)
    REQUANT_FIND(aoti_torch_call_dispatcher)
    REQUANT_FIND(aoti_torch_library_init_impl)
    REQUANT_FIND(aoti_torch_library_impl)
#undef REQUANT_FIND
    torch.dtypes[0] = torch.aoti_torch_dtype_float32();
    torch.dtypes[1] = torch.aoti_torch_dtype_bfloat16();
    torch.dtypes[2] = torch.aoti_torch_dtype_float16();
    torch.cpu = torch.aoti_torch_device_type_cpu();
    Library library = nullptr;  // the registration lives as long as the process
    if (torch.aoti_torch_library_init_impl("requant", "CPU", __FILE__, __LINE__, &library)) return 1;
    return torch.aoti_torch_library_impl(library, "packed_linear", &packed_linear);
}

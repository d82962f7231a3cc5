// What every kernel file starts from: errors, launches, shared memory, reductions.
//
// The same file compiles with nvcc and, with PAE_EMULATED, as plain C++ against host/emulation.h,
// where the threads of a block are fibers on one CPU core. So kernels are launched by PAE_LAUNCH
// alone, declare shared memory by the two macros below, and put what cannot be emulated (inline
// PTX, tensor cores, asynchronous copies) into small functions with a plain twin under
// PAE_EMULATED.
#pragma once

#include "pae.h"

#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef PAE_EMULATED
#include "host/emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

// ---- errors

namespace pae {

// Keeps the message for pae_last_error() and returns `status`.
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
int fail(int status, const char* format, ...);

}  // namespace pae

// In an entry point: the struct is there and is the one that this library was compiled with.
#define PAE_CHECK_STRUCT(p)                                                                    \
  do {                                                                                         \
    if ((p) == nullptr) return pae::fail(PAE_INVALID_PARAMS, "%s: params are null", __func__); \
    if ((p)->struct_size != sizeof(*(p)))                                                      \
      return pae::fail(PAE_INVALID_PARAMS, "%s: struct_size is %u, expected %u", __func__,     \
                       unsigned((p)->struct_size), unsigned(sizeof(*(p))));                    \
  } while (0)

// In an entry point: PAE_REQUIRE(p->k <= 512, "k is %lld, expected at most 512", (long long)p->k).
#define PAE_REQUIRE(condition, format, ...)                                         \
  do {                                                                              \
    if (!(condition))                                                               \
      return pae::fail(PAE_INVALID_PARAMS, "%s: " format, __func__, ##__VA_ARGS__); \
  } while (0)

// At file level, once per struct: PAE_DEFINE_SIZEOF(koopman_fwd).
#define PAE_DEFINE_SIZEOF(noun)                                  \
  extern "C" PAE_API uint32_t pae_sizeof_##noun##_params(void) { \
    return uint32_t(sizeof(pae_##noun##_params));                \
  }

// ---- launches

namespace pae {

// A parameter type that is not deduced: arguments convert to what the kernel takes.
template <typename T>
struct Exactly {
  using type = T;
};

#ifdef PAE_EMULATED

inline int max_shared_bytes() { return emulation::kSharedBytes; }

template <typename... Params>
int launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
           cudaStream_t, typename Exactly<Params>::type... arguments) {
  auto body = [&] { kernel(arguments...); };
  const char* trouble = emulation::run(name, grid, block, shared_bytes, body);
  return trouble ? fail(PAE_CUDA_ERROR, "%s: emulation: %s", name, trouble) : PAE_OK;
}

#else

inline int cuda_failed(const char* what, cudaError_t error) {
  cudaGetLastError();  // reported here: the next caller of the runtime must not find it again
  return fail(PAE_CUDA_ERROR, "%s: %s: %s", what, cudaGetErrorName(error),
              cudaGetErrorString(error));
}

// Most shared memory that a block can have on the current device; 0 where there is none.
inline int max_shared_bytes() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) == cudaSuccess)
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

template <typename... Params>
int launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
           cudaStream_t stream, typename Exactly<Params>::type... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024)  // more than that is granted on demand only
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(shared_bytes));
  if (error == cudaSuccess) {
    void* pointers[] = {static_cast<void*>(&arguments)..., nullptr};
    error = cudaLaunchKernel(function, grid, block, pointers, shared_bytes, stream);
  }
  return error == cudaSuccess ? PAE_OK : cuda_failed(name, error);
}

#endif

}  // namespace pae

// In an entry point: launches, and returns from it on failure. A kernel with template arguments
// stands in parentheses. `stream` is the entry point's void*; a grid without blocks is no launch.
#define PAE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                \
  do {                                                                            \
    const dim3 pae_grid(grid);                                                    \
    if (size_t(pae_grid.x) * pae_grid.y * pae_grid.z == 0) break;                 \
    const int pae_status =                                                        \
        pae::launch(#kernel, kernel, pae_grid, dim3(block), size_t(shared_bytes), \
                    static_cast<cudaStream_t>(stream), ##__VA_ARGS__);            \
    if (pae_status != PAE_OK) return pae_status;                                  \
  } while (0)

// ---- shared memory: PAE_SHARED(float, tile, [32][33]); PAE_SHARED(int, count, );
//      PAE_DYNAMIC_SHARED(float, buffer) declares a pointer to the bytes named at the launch.

#ifdef PAE_EMULATED
#define PAE_SHARED(type, name, extent)                          \
  typedef type name##_shared_type extent;                       \
  static const char name##_shared_site = 0;                     \
  name##_shared_type& name = *static_cast<name##_shared_type*>( \
      emulation::shared_memory(&name##_shared_site, sizeof(name##_shared_type)))
#define PAE_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(emulation::dynamic_shared_memory())
#else
#define PAE_SHARED(type, name, extent) __shared__ type name extent
#define PAE_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char pae_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(pae_dynamic_shared)
#endif

// ---- small helpers of device code

namespace pae {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// N elements that travel as one load or store; the address is a multiple of its size.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// from_float<T>(x): to the nearest T, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// ---- reductions. The order of additions is fixed by the shape of the launch alone, so results are
//      the same bits from run to run; every thread gets the same bits (but for the sign of a zero
//      maximum). All threads must take part.

struct Sum {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

// NaN is larger than everything, unlike in fmaxf: it must not be lost on the way.
struct Max {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b || a != a ? a : b;
  }
};

// Over groups of `kLanes` neighbouring lanes, a power of two. A butterfly: lanes i and i ^ offset
// add the same two numbers, so that they agree in the last bit.
template <int kLanes = kWarp, typename T, typename Op>
__device__ __forceinline__ T warp_reduce(T value, Op op) {
  static_assert(kLanes >= 1 && kLanes <= kWarp && (kLanes & (kLanes - 1)) == 0, "a power of two");
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    value = op(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

template <int kLanes = kWarp, typename T>
__device__ __forceinline__ T warp_sum(T value) {
  return warp_reduce<kLanes>(value, Sum());
}

template <int kLanes = kWarp, typename T>
__device__ __forceinline__ T warp_max(T value) {
  return warp_reduce<kLanes>(value, Max());
}

// Over a one-dimensional block of kThreads, whole warps: within warps, then warp after warp. Two
// barriers, the second one so that the next reduction may follow at once.
template <int kThreads, typename T, typename Op>
__device__ __forceinline__ T block_reduce(T value, Op op) {
  static_assert(kThreads % kWarp == 0 && kThreads <= 1024, "whole warps");
  constexpr int kWarps = kThreads / kWarp;
  value = warp_reduce(value, op);
  if constexpr (kWarps > 1) {
    PAE_SHARED(T, partial, [kWarps]);
    if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = partial[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) value = op(value, partial[w]);
    __syncthreads();
  }
  return value;
}

template <int kThreads, typename T>
__device__ __forceinline__ T block_sum(T value) {
  return block_reduce<kThreads>(value, Sum());
}

template <int kThreads, typename T>
__device__ __forceinline__ T block_max(T value) {
  return block_reduce<kThreads>(value, Max());
}

}  // namespace pae

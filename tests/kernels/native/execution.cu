// Kernels that try common.cuh and the emulation: what must work, and what must be noticed.

#include "common.cuh"

struct pae_arrays_params {
  uint32_t struct_size;
  int32_t mode;
  int64_t n;
  const void* in;
  void* out;
};
PAE_DEFINE_SIZEOF(arrays)

namespace pae {
namespace {

template <int kThreads>
__global__ void reductions(const float* in, float* out, int n) {
  float sum = 0.0f, largest = -INFINITY;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    sum += in[i];
    largest = pae::Max()(largest, in[i]);
  }
  sum = pae::block_sum<kThreads>(sum);
  largest = pae::block_max<kThreads>(largest);
  out[2 * threadIdx.x] = sum;
  out[2 * threadIdx.x + 1] = largest;
}

// 8 numbers a lane: every kind of shuffle and vote, whole warps and parts.
__global__ void lanes(const int* in, int* out, int) {
  const int value = in[threadIdx.x], lane = threadIdx.x % 32;
  int* o = out + 8 * threadIdx.x;
  o[0] = __shfl_xor_sync(pae::kAllLanes, value, 5);
  o[1] = __shfl_down_sync(pae::kAllLanes, value, 3);
  o[2] = __shfl_up_sync(pae::kAllLanes, value, 3, 8);
  o[3] = __shfl_sync(pae::kAllLanes, value, 9, 8);
  o[4] = int(__ballot_sync(pae::kAllLanes, value % 3 == 0));
  // two halves that never meet
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  o[5] = lane < 16 ? __shfl_xor_sync(half, value, 1) : __shfl_xor_sync(half, value, 2);
  o[6] = __any_sync(half, value == 7);
  __syncwarp();
  o[7] = pae::warp_sum<8>(value);
}

// (n, n) transposed through dynamic shared memory, one block per pair of tiles of 16.
__global__ void transpose(const float* in, float* out, int n) {
  PAE_DYNAMIC_SHARED(float, tile);
  const int row = blockIdx.y * 16 + threadIdx.y, column = blockIdx.x * 16 + threadIdx.x;
  if (row < n && column < n) tile[17 * threadIdx.y + threadIdx.x] = in[row * n + column];
  __syncthreads();
  const int to_row = blockIdx.x * 16 + threadIdx.y, to_column = blockIdx.y * 16 + threadIdx.x;
  if (to_row < n && to_column < n)
    out[to_row * n + to_column] = tile[17 * threadIdx.x + threadIdx.y];
}

template <typename T>
__global__ void narrow(const float* in, T* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = pae::from_float<T>(in[i]);
}

template <typename T>
__global__ void widen(const T* in, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = pae::to_float(in[i]);
}

// ---- mistakes, one per mode

__global__ void mistake(float* out, int mode) {
  PAE_SHARED(float, shared, [64]);
  const int t = threadIdx.x;
  switch (mode) {
    case 0:  // reads what nobody wrote
      out[t] = shared[t];
      break;
    case 1:  // reads a neighbour's value before it must be there
      shared[t] = float(t);
      out[t] = shared[(t + 1) % 64];
      break;
    case 2:  // some wait for all
      if (t < 8) __syncthreads();
      break;
    case 3:  // two barriers that look like one
      if (t < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case 4:  // half a warp in a shuffle of the whole one
      if (t % 2 == 0) out[t] = __shfl_xor_sync(pae::kAllLanes, float(t), 2);
      break;
    case 5:  // reads a lane that is not in the mask
      if (t < 16) out[t] = __shfl_down_sync(0xffffu, float(t), 8);
      break;
    case 6: shared[t + 1] = 0.0f; break;
    default: break;
  }
}

__global__ void nothing() {}

}  // namespace
}  // namespace pae

using namespace pae;

extern "C" PAE_API int pae_reductions(const pae_arrays_params* p, void* stream) {
  PAE_CHECK_STRUCT(p);
  const float* in = static_cast<const float*>(p->in);
  float* out = static_cast<float*>(p->out);
  if (p->mode == 32) PAE_LAUNCH(reductions<32>, 1, 32, 0, stream, in, out, int(p->n));
  if (p->mode == 256) PAE_LAUNCH(reductions<256>, 1, 256, 0, stream, in, out, int(p->n));
  return PAE_OK;
}

extern "C" PAE_API int pae_lanes(const pae_arrays_params* p, void* stream) {
  PAE_CHECK_STRUCT(p);
  PAE_REQUIRE(p->n % 32 == 0 && p->n <= 1024, "n is %lld, expected whole warps of one block",
              (long long)p->n);
  PAE_LAUNCH(lanes, 1, unsigned(p->n), 0, stream, static_cast<const int*>(p->in),
             static_cast<int*>(p->out), 0);
  return PAE_OK;
}

extern "C" PAE_API int pae_transpose(const pae_arrays_params* p, void* stream) {
  PAE_CHECK_STRUCT(p);
  const unsigned tiles = unsigned(pae::ceil_div<int64_t>(p->n, 16));
  PAE_LAUNCH(transpose, dim3(tiles, tiles), dim3(16, 16), sizeof(float) * (16 * 17 - 1), stream,
             static_cast<const float*>(p->in), static_cast<float*>(p->out), int(p->n));
  return PAE_OK;
}

extern "C" PAE_API int pae_convert(const pae_arrays_params* p, void* stream) {
  PAE_CHECK_STRUCT(p);
  const unsigned blocks = unsigned(pae::ceil_div<int64_t>(p->n, 256));
  const int n = int(p->n);
  const auto* wide = static_cast<const float*>(p->in);
  auto* wide_out = static_cast<float*>(p->out);
  switch (p->mode) {
    case 0:
      PAE_LAUNCH(narrow<__half>, blocks, 256, 0, stream, wide, static_cast<__half*>(p->out), n);
      break;
    case 1:
      PAE_LAUNCH(narrow<__nv_bfloat16>, blocks, 256, 0, stream, wide,
                 static_cast<__nv_bfloat16*>(p->out), n);
      break;
    case 2:
      PAE_LAUNCH(widen<__half>, blocks, 256, 0, stream, static_cast<const __half*>(p->in), wide_out,
                 n);
      break;
    case 3:
      PAE_LAUNCH(widen<__nv_bfloat16>, blocks, 256, 0, stream,
                 static_cast<const __nv_bfloat16*>(p->in), wide_out, n);
      break;
    default: return pae::fail(PAE_INVALID_PARAMS, "mode is %d, expected 0 to 3", p->mode);
  }
  return PAE_OK;
}

extern "C" PAE_API int pae_mistake(const pae_arrays_params* p, void* stream) {
  PAE_CHECK_STRUCT(p);
  PAE_LAUNCH(mistake, 1, 64, 0, stream, static_cast<float*>(p->out), p->mode);
  return PAE_OK;
}

// mode: threads; n: dynamic shared bytes
extern "C" PAE_API int pae_nothing(const pae_arrays_params* p, void* stream) {
  PAE_CHECK_STRUCT(p);
  PAE_LAUNCH(nothing, 1, unsigned(p->mode), p->n, stream);
  return PAE_OK;
}

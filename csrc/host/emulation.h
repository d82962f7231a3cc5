// CUDA's execution model on one CPU core, for tests of the kernels without a GPU. Never shipped.
//
// Blocks run one after another. The threads of a block are fibers that give way where a GPU's
// threads wait for each other: __syncthreads, __syncwarp, shuffles and votes. That is faithful in
// what decides correctness, not in speed, and stricter than a GPU in what it tolerates:
//
// - Threads that wait at different barriers, or for threads that have returned, are an error that
//   says who waits where. So is a shuffle from a lane that does not take part.
// - Shared memory holds NaN when a block starts, and so do 64 bytes around every array of it, which
//   nobody may write: checked at the end of every block.
// - The order in which threads (and blocks) run can be changed, which shows a missing barrier as a
//   changed result: pae_emulation_set_order.
// - A launch that a device of sm_80 to sm_120 would refuse is refused.
//
// Not emulated: what a thread sees of other blocks' writes while they run, memory order, timing.
#pragma once

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#include "floats.h"
#include "vectors.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

typedef struct CUstream_st* cudaStream_t;

// Written by the scheduler before a thread goes on.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulation {

// What a block may have on every shipped architecture: 99 KiB, of sm_86, sm_89 and sm_120.
constexpr int kSharedBytes = 99 * 1024;

// Runs body() once for every thread. The trouble in words, kept until the next run, or null.
const char* run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
                void* argument);

template <typename Body>
const char* run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, Body& body) {
  return run(kernel, grid, block, shared_bytes, [](void* b) { (*static_cast<Body*>(b))(); }, &body);
}

// The block's array that is declared at `site`; the first thread to come makes it.
void* shared_memory(const void* site, size_t bytes);
void* dynamic_shared_memory();

struct Site {
  const char* what;
  const char* file;
  int line;
};

void sync_threads(Site site);
// Sum of `value` over the block's threads.
int sync_threads_count(Site site, int value);

// Every lane of `mask` hands in `bytes` at `value` and gets those of lane `source`.
void exchange(Site site, unsigned mask, void* value, size_t bytes, int source);
// The lanes of `mask` whose predicate is not zero.
unsigned ballot(Site site, unsigned mask, bool predicate);
int lane();

enum class Shuffle { kIndex, kUp, kDown, kXor };

template <typename T>
T shuffle(Site site, Shuffle kind, unsigned mask, T value, int argument, int width) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "what a shuffle moves");
  const int own = lane(), first = own & ~(width - 1);
  int source = own;
  switch (kind) {
    case Shuffle::kIndex: source = first + (argument & (width - 1)); break;
    case Shuffle::kUp: source = own - argument < first ? own : own - argument; break;
    case Shuffle::kDown: source = own + argument >= first + width ? own : own + argument; break;
    case Shuffle::kXor: source = (own ^ argument) >= first + width ? own : own ^ argument; break;
  }
  exchange(site, mask, &value, sizeof(T), source);
  return value;
}

}  // namespace emulation

#define PAE_SITE(what) (::emulation::Site{what, __FILE__, __LINE__})

#define __syncthreads() ::emulation::sync_threads(PAE_SITE("__syncthreads"))
#define __syncthreads_count(p) \
  ::emulation::sync_threads_count(PAE_SITE("__syncthreads_count"), (p) ? 1 : 0)
#define __syncthreads_or(p) \
  (::emulation::sync_threads_count(PAE_SITE("__syncthreads_or"), (p) ? 1 : 0) != 0)
#define __syncthreads_and(p) \
  (::emulation::sync_threads_count(PAE_SITE("__syncthreads_and"), (p) ? 0 : 1) == 0)

// A macro with the place of its use in it, whose lane mask or width may be left out.
#define PAE_MASK(...) (sizeof(#__VA_ARGS__) > 1 ? (__VA_ARGS__ + 0u) : 0xffffffffu)
#define __syncwarp(...) \
  (void)::emulation::ballot(PAE_SITE("__syncwarp"), PAE_MASK(__VA_ARGS__), true)
#define __ballot_sync(mask, p) ::emulation::ballot(PAE_SITE("__ballot_sync"), mask, p)
#define __any_sync(mask, p) (::emulation::ballot(PAE_SITE("__any_sync"), mask, p) != 0)
#define __all_sync(mask, p) (::emulation::ballot(PAE_SITE("__all_sync"), mask, !(p)) == 0)

namespace emulation {

// Binds the site, so that the width may be left out as in CUDA.
struct Shuffler {
  Site site;
  Shuffle kind;
  template <typename T>
  T operator()(unsigned mask, T value, int argument, int width = 32) const {
    return shuffle(site, kind, mask, value, argument, width);
  }
};

}  // namespace emulation

#define PAE_SHUFFLER(what, kind) (::emulation::Shuffler{PAE_SITE(what), ::emulation::Shuffle::kind})
#define __shfl_sync PAE_SHUFFLER("__shfl_sync", kIndex)
#define __shfl_up_sync PAE_SHUFFLER("__shfl_up_sync", kUp)
#define __shfl_down_sync PAE_SHUFFLER("__shfl_down_sync", kDown)
#define __shfl_xor_sync PAE_SHUFFLER("__shfl_xor_sync", kXor)

inline void __threadfence() {}
inline void __threadfence_block() {}

// Blocks do not overlap, so a plain read-modify-write is one.
template <typename T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_integral<T>::value, "floats are never added atomically: order decides");
  const T before = *address;
  *address = before + value;
  return before;
}
template <typename T>
T atomicMax(T* address, T value) {
  const T before = *address;
  *address = value > before ? value : before;
  return before;
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
void __stcg(T* address, T value) {
  *address = value;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}

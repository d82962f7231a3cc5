// What library.cpp knows of kernels.cpp, which is compiled once for each instruction set: a
// function works on the rows or entries [begin, end) of what a struct describes.
#ifndef PAE_CPU_KERNELS_H_
#define PAE_CPU_KERNELS_H_

#include "cpu.h"

namespace pae {

struct Kernels {
  const char* name;
  void (*norm_fwd)(const pae_cpu_norm_fwd_params&, int64_t begin, int64_t end);
  void (*norm_bwd)(const pae_cpu_norm_bwd_params&, int64_t begin, int64_t end);
  void (*activation_fwd)(const pae_cpu_activation_fwd_params&, int64_t begin, int64_t end);
  void (*activation_bwd)(const pae_cpu_activation_bwd_params&, int64_t begin, int64_t end);
  void (*gated)(const pae_cpu_gated_params&, int64_t begin, int64_t end);
  void (*gated_norm)(const pae_cpu_gated_norm_params&, int64_t begin, int64_t end);
  void (*rotate)(const pae_cpu_rotate_params&, int64_t begin, int64_t end);
  void (*eigenvector)(const pae_cpu_eigenvector_params&, int64_t begin, int64_t end);
  void (*enlarged_fwd)(const pae_cpu_enlarged_params&, int64_t begin, int64_t end);
  void (*enlarged_bwd)(const pae_cpu_enlarged_params&, int64_t begin, int64_t end);
  void (*pixel_loss_fwd)(const pae_cpu_pixel_loss_params&, int64_t begin, int64_t end);
  void (*pixel_loss_bwd)(const pae_cpu_pixel_loss_params&, int64_t begin, int64_t end);
  // one unit of work, in a thread's own memory of `attention_room` entries
  int64_t (*attention_room)(const pae_cpu_attention_params&, bool backward);
  void (*attention_fwd)(const pae_cpu_attention_params&, int64_t unit, float* memory);
  void (*attention_bwd)(const pae_cpu_attention_params&, int64_t unit, float* memory);
};

extern const Kernels avx512_bf16, avx512, avx2, portable;

}  // namespace pae

#endif

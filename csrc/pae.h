/* The whole C interface of the compiled kernels.
 *
 * One function per op and direction:   int pae_<noun>(const pae_<noun>_params* p, void* stream)
 *
 * - `p` is a plain struct of fixed-width types: device pointers, sizes, strides in elements. Its
 *   first field is its size, which the callee checks; pae_sizeof_<noun>_params() tells it ahead.
 * - `stream` is a cudaStream_t of the current device. A call enqueues work there and returns: it
 *   never allocates, never synchronises and touches no memory but what the struct points to, so it
 *   may be captured in a CUDA graph. Results are the same bits from run to run.
 * - It returns PAE_OK or another status, and then pae_last_error() of the same thread says why.
 *   Shapes, dtypes and devices are checked by the caller in Python; what is checked here is what
 *   would make a kernel read or write outside its buffers.
 *
 * Any change to a struct, a function or their meaning raises PAE_ABI_VERSION.
 */
#ifndef PAE_H_
#define PAE_H_

#include <stdint.h>

#define PAE_ABI_VERSION 2

#if defined(__GNUC__)
#define PAE_API __attribute__((visibility("default")))
#else
#define PAE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum {
  PAE_OK = 0,
  PAE_INVALID_PARAMS = 1, /* the struct is not one that this library understands or supports */
  PAE_CUDA_ERROR = 2,     /* CUDA refused; the message holds its name for the error and its words */
};

/* Element types, as an int32_t. */
enum {
  PAE_FLOAT32 = 0,
  PAE_FLOAT16 = 1,
  PAE_BFLOAT16 = 2,
};

/* ---- the library itself (library.cu) */

PAE_API uint32_t pae_abi_version(void);

/* The last failure of a call on this thread, "" before the first; valid until the next one. */
PAE_API const char* pae_last_error(void);

/* What this library and the current device make of each other. Filled as far as it is known, also
 * when the status is not PAE_OK: without a driver, or without code for this device. */
typedef struct pae_probe_params {
  uint32_t struct_size;
  int32_t toolkit_version; /* of the runtime linked in: 1000 * major + 10 * minor */
  int32_t driver_version;  /* newest toolkit version that the driver serves; 0 without a driver */
  int32_t capability;      /* of the current device: 10 * major + minor */
  int32_t code_version;    /* architecture of the code that would run there, likewise */
  int32_t multiprocessors;
} pae_probe_params;

PAE_API int pae_probe(pae_probe_params* p, void* stream);
PAE_API uint32_t pae_sizeof_probe_params(void);

/* ---- Koopman and Lyapunov losses (koopman_fwd.cu, koopman_bwd.cu)
 *
 * All tensors contiguous fp32, named and shaped as in pae_kernels/koopman/reference.py. With R runs,
 * J >= 2 blocks, P prompts, width D, m = J - 1 pairs, and G = m operators a run in use if
 * `layerwise`, else 1; K and L hold J or 1 of them. In "paper" mode (code = 0) spin, left and right
 * are neither written nor may they be left undefined: they are zeros. */

typedef struct pae_koopman_fwd_params {
  uint32_t struct_size;
  int32_t layerwise, code, gauge; /* booleans; gauge: prompts pass through LayerNorm */
  int64_t runs, blocks, prompts, width, k;
  const void *prompts_in, *lift, *K, *L; /* (R, J, P, D), (R, k, D), (R, 1 or J, k, k) twice */
  void *consistency, *lyapunov;          /* (R) */
  void *states, *predicted, *images;     /* (R, J, P, k), (R, m, P, k), (R, m, 2P, k) */
  void *pull, *radial;                   /* (R, m, 2P) */
  void *spin, *left, *right;             /* (R, G, 2), (R, G, k) twice */
  void* statistics;                      /* (R, J, P, 2), or null without gauge */
  void* workspace;                       /* scratch */
  int64_t workspace_floats;              /* at least what pae_koopman_workspace says */
  int32_t tile, square_tile;             /* 16, 32 or 64: of the products, and of a squaring */
  int32_t squarings;                     /* at most; see pae_kernels/koopman/spectral.py */
  float settled, settled_first, eps;
} pae_koopman_fwd_params;

PAE_API int pae_koopman_fwd(const pae_koopman_fwd_params* p, void* stream);
PAE_API uint32_t pae_sizeof_koopman_fwd_params(void);

/* Sets workspace_floats to what a forward with these sizes, tiles and squarings needs; reads no
 * pointer and enqueues nothing. */
PAE_API int pae_koopman_workspace(pae_koopman_fwd_params* p, void* stream);

typedef struct pae_koopman_bwd_params {
  uint32_t struct_size;
  int32_t layerwise, code, gauge;
  int64_t runs, blocks, prompts, width, k;
  const void *d_consistency, *d_lyapunov; /* (R) */
  const void *prompts_in, *lift, *K, *L;
  const void *states, *predicted, *images, *pull, *radial, *spin, *left, *right, *statistics;
  void *d_prompts, *d_lift, *d_K, *d_L; /* all entries are written */
  void *d_states, *d_points;            /* scratch: (R, J, P, k) and (R, m, 2P, k) */
  int32_t tile, input_tile;             /* 16, 32 or 64: of launches 1 and 2, and of launch 3 */
} pae_koopman_bwd_params;

PAE_API int pae_koopman_bwd(const pae_koopman_bwd_params* p, void* stream);
PAE_API uint32_t pae_sizeof_koopman_bwd_params(void);

/* ---- Frequency-shortcut statistics (spectrum.cu)
 *
 * Named as in pae_kernels/spectrum/. S = count windows of w = window bins a side, B = batch images of
 * C x H x W, patches of ph x pw, L = lines = B H / ph, K = C ph, D = dim channels. */

typedef struct pae_shortcut_tokens_params {
  uint32_t struct_size;
  int32_t dtype; /* of out. Factors, the elements of strips and taps: bf16 if it is, else fp32 */
  int64_t count, batch, channels, height, width, window, patch_height, patch_width, dim;
  const void* spectrum; /* (B, C, H, W) pairs of fp32, strides in floats */
  int64_t stride_b, stride_c, stride_u, stride_v;
  const void* origins; /* (S, 2) int64, contiguous */
  const void* weight;  /* (pw, C, ph, D) fp32, contiguous */
  const void* shift;   /* fp32, what is added: (N, D) with shift_stride D, (D) with 0; or null */
  int64_t shift_stride;
  /* scratch, 16-byte aligned; what pads it must be 0 before the call */
  void* strips; /* (S, w, 2, lines_padded, depth_padded) */
  void* taps;   /* (S, w, 2, depth_padded, channels_padded) */
  int64_t lines, lines_padded, depth_padded, channels_padded; /* multiples of 1, 32, 16, 64 */
  void* out; /* (S, B, N, D), contiguous; 16-byte aligned */
} pae_shortcut_tokens_params;

PAE_API int pae_shortcut_tokens(const pae_shortcut_tokens_params* p, void* stream);
PAE_API uint32_t pae_sizeof_shortcut_tokens_params(void);

typedef struct pae_shortcut_pool_params {
  uint32_t struct_size;
  int32_t dtype;   /* of tokens and out */
  int32_t vectors; /* boolean: every token starts at a multiple of 4 elements, D is one */
  int32_t reserved;
  int64_t count, batch, tokens_per_image, dim; /* dim <= 2048 */
  const void* tokens; /* (S, B, N, D), strides in elements, the innermost one 1 */
  int64_t stride_s, stride_b, stride_n;
  const void* rows; /* (N, D) fp32, contiguous, added to every image's tokens; or null */
  int64_t parts;    /* ceil(B N / 64) */
  /* scratch: (S, parts) int32, (S, parts) and (S, parts, D) fp32 */
  void *exponents, *energies, *sums;
  void* out; /* (S, D) */
} pae_shortcut_pool_params;

PAE_API int pae_shortcut_pool(const pae_shortcut_pool_params* p, void* stream);
PAE_API uint32_t pae_sizeof_shortcut_pool_params(void);

#ifdef __cplusplus
}
#endif

#endif /* PAE_H_ */

/* The C interface of the kernels for CPUs; conventions as in ../pae.h.
 *
 * Every struct starts with its size, which the callee checks, and the number of threads that share
 * the work; results are the same bits for any number. Arrays are contiguous; where a pointer may be
 * null, what it would hold is not asked for. */
#ifndef PAE_CPU_H_
#define PAE_CPU_H_

#include <stdint.h>

#define PAE_CPU_ABI_VERSION 5

#define PAE_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum { PAE_OK = 0, PAE_INVALID_PARAMS = 1 };

/* Element types, as an int32_t; numbered as in ../pae.h, without fp16. */
enum { PAE_FLOAT32 = 0, PAE_BFLOAT16 = 2, PAE_UINT8 = 3 };

PAE_API uint32_t pae_abi_version(void);
PAE_API const char* pae_last_error(void);

/* The instruction set in use: the first of "avx512_bf16", "avx512", "avx2" and "portable" that this
 * processor runs, or the one of them that PAE_CPU_ISA names, read at first use. */
PAE_API const char* pae_cpu_isa(void);

/* `GOMP_parallel` of the OpenMP runtime that the process already has, or null: one thread. The
 * library brings no runtime of its own, so that there is one pool of threads in a process. */
typedef void (*pae_cpu_parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
PAE_API void pae_cpu_set_parallel(pae_cpu_parallel parallel);

/* y = x + delta rounded to the type of x; xhat = (y - mean) / sqrt(var + eps); rstd = that root's
 * inverse. Without delta, y is x and not written. rms: the mean counts as 0, in the backward too. */
typedef struct pae_cpu_norm_fwd_params {
  uint32_t struct_size;
  int32_t threads;
  int32_t x_type, delta_type, xhat_type;
  float eps;
  int32_t rms, reserved;
  int64_t rows, width;
  const void *x, *delta;
  void *y, *xhat, *rstd; /* rstd fp32 */
} pae_cpu_norm_fwd_params;
PAE_API int pae_cpu_norm_fwd(const pae_cpu_norm_fwd_params* p, void* stream);
PAE_API uint32_t pae_sizeof_cpu_norm_fwd_params(void);

/* dx = residual + rstd (d - mean(d) - xhat mean(d xhat)), and a copy of it in another type. */
typedef struct pae_cpu_norm_bwd_params {
  uint32_t struct_size;
  int32_t threads;
  int32_t d_type, xhat_type, residual_type, dx_type, copy_type;
  int32_t rms;
  int64_t rows, width;
  const void *d, *xhat, *rstd, *residual; /* residual may be null */
  void *dx, *copy;                        /* copy may be null */
} pae_cpu_norm_bwd_params;
PAE_API int pae_cpu_norm_bwd(const pae_cpu_norm_bwd_params* p, void* stream);
PAE_API uint32_t pae_sizeof_cpu_norm_bwd_params(void);

/* Activations, as an int32_t. */
enum { PAE_GELU = 0, PAE_GELU_TANH = 1, PAE_QUICK_GELU = 2, PAE_SILU = 3, PAE_RELU = 4 };

/* y = act(u), and act'(u) as a byte, round(200 act' + 27). */
typedef struct pae_cpu_activation_fwd_params {
  uint32_t struct_size;
  int32_t threads;
  int32_t type, kind;
  int64_t count;
  const void* u;
  void *y, *code; /* code may be null */
} pae_cpu_activation_fwd_params;
PAE_API int pae_cpu_activation_fwd(const pae_cpu_activation_fwd_params* p, void* stream);
PAE_API uint32_t pae_sizeof_cpu_activation_fwd_params(void);

/* du = d act'(u), from u or from the bytes of the forward. */
typedef struct pae_cpu_activation_bwd_params {
  uint32_t struct_size;
  int32_t threads;
  int32_t type, kept_type, kind; /* type: of d and du; kept_type PAE_UINT8 for bytes */
  int32_t reserved;
  int64_t count;
  const void *d, *kept;
  void* du;
} pae_cpu_activation_bwd_params;
PAE_API int pae_cpu_activation_bwd(const pae_cpu_activation_bwd_params* p, void* stream);
PAE_API uint32_t pae_sizeof_cpu_activation_bwd_params(void);

/* Gated rows: y = act(u[:width]) u[width:] of every row of u, and its gradient
 *   du = d u[width:] act'(u[:width]), then d act(u[:width]). */
typedef struct pae_cpu_gated_params {
  uint32_t struct_size;
  int32_t threads;
  int32_t type, kind;
  int64_t rows, width;
  const void *u, *d; /* (rows, 2 width); d (rows, width), null in the forward */
  void* y;           /* (rows, width) in the forward, (rows, 2 width) in the backward */
} pae_cpu_gated_params;
PAE_API int pae_cpu_gated(const pae_cpu_gated_params* p, void* stream);
PAE_API uint32_t pae_sizeof_cpu_gated_params(void);

/* A norm behind such a gate: the normalised rows, as of pae_cpu_norm_fwd, or the gradient of u. */
typedef struct pae_cpu_gated_norm_params {
  uint32_t struct_size;
  int32_t threads;
  int32_t type, kind;
  float eps;
  int32_t rms;
  int64_t rows, width;
  const void *u, *d; /* (rows, 2 width); d (rows, width), null in the forward */
  void* y;           /* (rows, width) in the forward, (rows, 2 width) in the backward */
} pae_cpu_gated_norm_params;
PAE_API int pae_cpu_gated_norm(const pae_cpu_gated_norm_params* p, void* stream);
PAE_API uint32_t pae_sizeof_cpu_gated_norm_params(void);

/* In place, the first two parts, queries and keys, or the only one, of the last `count` of `tokens` rows turned by angles: entries i and
 * i + width/2 of a head, (a, b) to (a cos - b sin, b cos + a sin); `back`: by minus the angle. */
typedef struct pae_cpu_rotate_params {
  uint32_t struct_size;
  int32_t threads;
  int32_t type, back;
  int64_t batch, tokens, count, parts, heads, width;
  int64_t table_head; /* entries between the heads' tables, 0 for one that all have */
  const float *sin, *cos; /* (heads or 1, count, width / 2) */
  void* qkv; /* (batch, tokens, parts, heads, width) */
} pae_cpu_rotate_params;
PAE_API int pae_cpu_rotate(const pae_cpu_rotate_params* p, void* stream);
PAE_API uint32_t pae_sizeof_cpu_rotate_params(void);

/* Attention of image rows over prompts and image rows, and its gradient:
 *   logits = scale q k^T + bias,  lse = log sum exp(logits),  out = exp(logits - lse) v.
 * The `width` entries of a row lie side by side, everything else at distances in entries. The
 * first `rows` rows of an image ask. In the backward, without d_qkv, keys and values of image rows
 * are not read; with it, the queries' part of it is written for those rows alone. Of causal rows,
 * each sees those before it and itself, and all prompts. */
typedef struct pae_cpu_attention_params {
  uint32_t struct_size;
  int32_t threads;
  int32_t type; /* of all that is not said to be fp32 */
  float scale;
  int64_t batch, tokens, rows, prompts, heads, sets, width;
  int64_t qkv_image, qkv_row, qkv_part, qkv_head;
  int64_t kv_set, kv_row, kv_part, kv_head;
  const void *qkv, *kv;
  const int64_t* group; /* (batch): which set; null: the only one, or one for each image */
  const float* log_m;   /* (sets, prompts), or null */
  void* out;            /* (batch, rows, heads, width) */
  float* lse;           /* (batch, heads, rows) */
  /* added to logits of image rows, or null; bias_head is 0 for one of all heads: */
  const float* bias; /* (heads or 1, tokens, tokens) */
  const float* mask; /* (windows, tokens, tokens): image i has that of i mod windows */
  int64_t bias_head, windows;
  /* of the backward alone: */
  int64_t images; /* in turn, whose gradients of prompts are added up */
  int64_t d_out_image, d_out_row;
  const void* d_out;
  void* d_qkv; /* (batch, tokens, 3, heads, width), or null */
  float* d_kv; /* (batch / images rounded up, prompts, 2, heads, width) */
  int32_t causal, reserved;
} pae_cpu_attention_params;
PAE_API int pae_cpu_attention_fwd(const pae_cpu_attention_params* p, void* stream);
PAE_API int pae_cpu_attention_bwd(const pae_cpu_attention_params* p, void* stream);
PAE_API uint32_t pae_sizeof_cpu_attention_params(void);

/* The eigenvectors of the largest eigenvalues of symmetric matrices, as Lanczos' method finds them
 * from one start: to a residual of `tolerance` times a matrix's size, or what `steps` steps give.
 * It may be another eigenvalue's if the start is orthogonal to all that belongs to the largest. */
enum { PAE_CPU_MOST_STEPS = 192 };
typedef struct pae_cpu_eigenvector_params {
  uint32_t struct_size;
  int32_t threads;
  int32_t steps; /* from 1 to PAE_CPU_MOST_STEPS */
  float tolerance;
  int64_t count, width;
  const void *matrices, *start;            /* fp32: (count, width, width), (width) */
  void *vectors;                           /* fp32: (count, width), of length 1 */
  void *values, *residuals, *sizes;        /* fp32: (count); a size is at most the spectral norm */
  void *taken;                             /* int32_t: (count), steps */
  void *workspace;                         /* fp32: (count, steps + 1, width) */
} pae_cpu_eigenvector_params;
PAE_API int pae_cpu_eigenvector(const pae_cpu_eigenvector_params* p, void* stream);
PAE_API uint32_t pae_sizeof_cpu_eigenvector_params(void);

/* A 3 x 3 convolution of a map that was enlarged bilinearly `scale` times, between the centres of
 * pixels, and padded with zeros, from its nine products at the small size. fwd: every entry of
 * `map` is the sum of up to 36 entries of `taps`; bwd: the adjoint, `taps` of `map`. */
enum { PAE_CPU_MOST_SCALE = 16 };
typedef struct pae_cpu_enlarged_params {
  uint32_t struct_size;
  int32_t threads;
  int32_t scale, reserved; /* from 1 to PAE_CPU_MOST_SCALE */
  int64_t images, rows, columns, channels;
  float* taps; /* (images, rows, columns, 3, 3, channels) */
  float* map;  /* (images, scale rows, scale columns, channels) */
} pae_cpu_enlarged_params;
PAE_API int pae_cpu_enlarged_fwd(const pae_cpu_enlarged_params* p, void* stream);
PAE_API int pae_cpu_enlarged_bwd(const pae_cpu_enlarged_params* p, void* stream);
PAE_API uint32_t pae_sizeof_cpu_enlarged_params(void);

/* Cross-entropy of maps that are enlarged bilinearly to the size of masks, pixel by pixel, and its
 * gradient: that of a sum, times `factor`. A label that is neither a class nor `ignored` is NaN. */
typedef struct pae_cpu_pixel_loss_params {
  uint32_t struct_size;
  int32_t threads;
  int32_t ignored;
  float factor;
  int64_t images, rows, columns, classes, height, width;
  const float* logits;  /* (images, rows, columns, classes) */
  const int64_t* masks; /* (images, height, width) */
  float* lse;           /* (images, height, width): log sum exp, written by the forward */
  float* losses;        /* (images, height): of every row, a sum */
  float* d_logits;      /* of the backward, like logits */
} pae_cpu_pixel_loss_params;
PAE_API int pae_cpu_pixel_loss_fwd(const pae_cpu_pixel_loss_params* p, void* stream);
PAE_API int pae_cpu_pixel_loss_bwd(const pae_cpu_pixel_loss_params* p, void* stream);
PAE_API uint32_t pae_sizeof_cpu_pixel_loss_params(void);

#ifdef __cplusplus
}
#endif

#endif

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

#define PAE_ABI_VERSION 1

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

#ifdef __cplusplus
}
#endif

#endif /* PAE_H_ */

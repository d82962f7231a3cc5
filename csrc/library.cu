// The library itself: version, last error, and what it and the device make of each other.

#include "common.cuh"

#include <cstdarg>
#include <cstdio>

namespace pae {

namespace {
thread_local char last_error[512] = "";
}

int fail(int status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof(last_error), format, arguments);
  va_end(arguments);
  return status;
}

namespace {

// Never launched. CUDA is asked which of its images this device would run.
__global__ void probe_kernel() {}

int probe(pae_probe_params* p) {
#ifdef PAE_EMULATED
  (void)probe_kernel;
  p->multiprocessors = 1;
  return PAE_OK;
#else
  cudaFuncAttributes attributes = {};
  int device = 0, devices = 0, major = 0, minor = 0;
  cudaError_t error = cudaRuntimeGetVersion(&p->toolkit_version);
  if (error == cudaSuccess) error = cudaDriverGetVersion(&p->driver_version);
  if (error == cudaSuccess) error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  p->capability = 10 * major + minor;
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&p->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe_kernel));
  p->code_version = attributes.binaryVersion;
  return error == cudaSuccess ? PAE_OK : cuda_failed("pae_probe", error);
#endif
}

}  // namespace
}  // namespace pae

extern "C" uint32_t pae_abi_version(void) { return PAE_ABI_VERSION; }

extern "C" const char* pae_last_error(void) { return pae::last_error; }

extern "C" int pae_probe(pae_probe_params* p, void*) {
  PAE_CHECK_STRUCT(p);
  p->toolkit_version = p->driver_version = p->capability = 0;
  p->code_version = p->multiprocessors = 0;
  return pae::probe(p);
}

PAE_DEFINE_SIZEOF(probe)

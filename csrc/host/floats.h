// CUDA's 16-bit floats and device arithmetic in plain C++.
//
// Conversions round to nearest, ties to even, as CUDA's do. The fast intrinsics are exact here:
// what a kernel loses by them is seen on a GPU only.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace emulation {

template <typename To, typename From>
inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

inline uint16_t bfloat16_bits(float x) {
  const uint32_t u = bits<uint32_t>(x);
  if (x != x) return 0x7fff;
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline float from_bfloat16_bits(uint16_t u) { return bits<float>(uint32_t(u) << 16); }

inline uint16_t half_bits(float x) {
  if (x != x) return 0x7fff;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (size >= 65520.0f) return sign | 0x7c00;  // half-way to what would be the next number
  // adding 2^(10 + e) and taking it away leaves a multiple of 2^(e - 13): the FPU rounds
  int exponent;
  std::frexp(size, &exponent);
  const float magic = std::ldexp(1.0f, (exponent < -13 ? -13 : exponent) + 12);
  volatile float rounded = size + magic;
  rounded = rounded - magic;
  const float r = rounded;
  if (r < 0x1p-14f) return sign | uint16_t(r * 0x1p24f);
  const uint32_t u = bits<uint32_t>(r);
  return sign | uint16_t((((u >> 23) - 112) << 10) | ((u >> 13) & 0x3ff));
}

inline float from_half_bits(uint16_t u) {
  const float sign = u & 0x8000 ? -1.0f : 1.0f;
  const int exponent = (u >> 10) & 31, mantissa = u & 0x3ff;
  if (exponent == 31) return mantissa ? bits<float>(0x7fffffffu) : sign * INFINITY;
  if (exponent == 0) return sign * float(mantissa) * 0x1p-24f;
  return sign * std::ldexp(float(1024 + mantissa), exponent - 25);
}

}  // namespace emulation

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __half2float(__half x) { return emulation::from_half_bits(x.bits); }
inline __half __float2half_rn(float x) { return {emulation::half_bits(x)}; }
inline __half __float2half(float x) { return __float2half_rn(x); }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline float __bfloat162float(__nv_bfloat16 x) { return emulation::from_bfloat16_bits(x.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {emulation::bfloat16_bits(x)}; }
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

// ---- device functions that the C++ library does not have. float in, float out.

inline float rsqrtf(float x) { return float(1.0 / std::sqrt(double(x))); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
// volatile: the compiler must not contract what CUDA promises to round on its own
inline float __fadd_rn(float x, float y) {
  volatile float r = x + y;
  return r;
}
inline float __fsub_rn(float x, float y) {
  volatile float r = x - y;
  return r;
}
inline float __fmul_rn(float x, float y) {
  volatile float r = x * y;
  return r;
}
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float exp10f(float x) { return float(std::pow(10.0, double(x))); }
inline float sinpif(float x) { return float(std::sin(M_PI * std::remainder(double(x), 2.0))); }
inline float cospif(float x) { return float(std::cos(M_PI * std::remainder(double(x), 2.0))); }
inline double sinpi(double x) { return std::sin(M_PI * std::remainder(x, 2.0)); }
inline double cospi(double x) { return std::cos(M_PI * std::remainder(x, 2.0)); }
inline void sincospif(float x, float* s, float* c) { *s = sinpif(x), *c = cospif(x); }
inline void sincospi(double x, double* s, double* c) { *s = sinpi(x), *c = cospi(x); }
inline void __sincosf(float x, float* s, float* c) { *s = std::sin(x), *c = std::cos(x); }

inline int __float_as_int(float x) { return emulation::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulation::bits<unsigned>(x); }
inline float __int_as_float(int x) { return emulation::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emulation::bits<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }

// CUDA's min and max: of mixed integers the wider type wins; of floats NaN loses.
template <typename A, typename B>
inline auto min(A a, B b) -> decltype(a + b) {
  typedef decltype(a + b) T;
  if constexpr (std::is_floating_point<T>::value) return std::fmin(T(a), T(b));
  return T(b) < T(a) ? T(b) : T(a);
}
template <typename A, typename B>
inline auto max(A a, B b) -> decltype(a + b) {
  typedef decltype(a + b) T;
  if constexpr (std::is_floating_point<T>::value) return std::fmax(T(a), T(b));
  return T(a) < T(b) ? T(b) : T(a);
}

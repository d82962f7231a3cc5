// Vectors of fp32 as wide as the instruction set that this file is compiled for, by the compiler's
// own vector types: one source for AVX-512, AVX2, NEON and anything else. A value that is loaded
// from bf16 or stored to it is fp32 in between; rounding is to nearest even, NaN stays NaN.
#ifndef PAE_CPU_VECTOR_H_
#define PAE_CPU_VECTOR_H_

#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "cpu.h"

namespace pae {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));
typedef uint8_t B __attribute__((vector_size(W)));

#define PAE_INLINE static inline __attribute__((always_inline))

template <typename To, typename From>
PAE_INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "");
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

PAE_INLINE F splat(float x) { return x - F{}; }  // 0 + x would be an addition: it makes -0 to 0

PAE_INLINE F widen(H h) { return bits<F>(__builtin_convertvector(h, U) << 16); }

PAE_INLINE H narrow(F x) {
#if defined(__AVX512BF16__)  // what is below the smallest normal number becomes 0
  return bits<H>(_mm512_cvtneps_pbh(bits<__m512>(x)));
#else
  U u = bits<U>(x);
  U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  U nan = (u >> 16) | 0x40u;
  return __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded, H);
#endif
}

// Bytes as integers and back, x from 0 to 255. In one step, GCC moves them one by one.
PAE_INLINE I widen(B b) {
#if defined(__AVX512F__)
  return bits<I>(_mm512_maskz_cvtepu8_epi32(0xffff, bits<__m128i>(b)));
#else
  return __builtin_convertvector(__builtin_convertvector(b, H), I);
#endif
}
PAE_INLINE B narrow(U x) {
#if defined(__AVX512F__)
  return bits<B>(_mm512_maskz_cvtepi32_epi8(0xffff, bits<__m512i>(x)));
#else
  return __builtin_convertvector(__builtin_convertvector(x, H), B);
#endif
}

PAE_INLINE float largest(F x) {
  float most = x[0];
  for (int i = 1; i < W; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

PAE_INLINE float total(F x) {
  float lanes[W];
  std::memcpy(lanes, &x, sizeof(x));
  for (int step = W / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

// Arrays of an element type: fp32 (`float`) and bf16 (`Half`). The last vector of a row may be a
// part of one, `n` elements: what is behind them is 0 when read and left alone when written.
struct Half {
  uint16_t value;
};

PAE_INLINE F load(const float* p) {
  F x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
PAE_INLINE F load(const Half* p) {
  H h;
  std::memcpy(&h, p, sizeof(h));
  return widen(h);
}
PAE_INLINE void store(float* p, F x) { std::memcpy(p, &x, sizeof(x)); }
PAE_INLINE void store(Half* p, F x) {
  H h = narrow(x);
  std::memcpy(p, &h, sizeof(h));
}
template <typename T>
PAE_INLINE F load_part(const T* p, int n) {
  T part[W] = {};
  std::memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <typename T>
PAE_INLINE void store_part(T* p, F x, int n) {
  T part[W];
  store(part, x);
  std::memcpy(p, part, n * sizeof(T));
}

// The same by masks, where there are some: a copy through memory waits for its own stores. A
// sanitizer sees copies alone.
#if defined(__SANITIZE_ADDRESS__)
#elif defined(__AVX512F__)
PAE_INLINE uint16_t first(int n) { return static_cast<uint16_t>((1u << n) - 1); }
PAE_INLINE F load_part(const float* p, int n) {
  return bits<F>(_mm512_maskz_loadu_ps(first(n), p));
}
PAE_INLINE F load_part(const Half* p, int n) {
  return widen(bits<H>(_mm256_maskz_loadu_epi16(first(n), p)));
}
PAE_INLINE void store_part(float* p, F x, int n) {
  _mm512_mask_storeu_ps(p, first(n), bits<__m512>(x));
}
PAE_INLINE void store_part(Half* p, F x, int n) {
  _mm256_mask_storeu_epi16(p, first(n), bits<__m256i>(narrow(x)));
}
#elif defined(__AVX__)
PAE_INLINE __m256i first(int n) {
  const I lane{0, 1, 2, 3, 4, 5, 6, 7};
  return bits<__m256i>(lane < n);
}
PAE_INLINE F load_part(const float* p, int n) { return bits<F>(_mm256_maskload_ps(p, first(n))); }
PAE_INLINE void store_part(float* p, F x, int n) {
  _mm256_maskstore_ps(p, first(n), bits<__m256>(x));
}
#endif

// `body(i, load, store)` for every vector of `n` elements. The two functions given to it read and
// write at an array's start plus i, and know whether the vector is a whole one.
struct Whole {
  template <typename T>
  inline __attribute__((always_inline)) F load(const T* p) const { return pae::load(p); }
  template <typename T>
  inline __attribute__((always_inline)) void store(T* p, F x) const { pae::store(p, x); }
  inline __attribute__((always_inline)) F only(F x) const { return x; }
  inline __attribute__((always_inline)) F or_else(F x, F) const { return x; }
};
struct Part {
  int n;
  template <typename T>
  inline __attribute__((always_inline)) F load(const T* p) const { return load_part(p, n); }
  template <typename T>
  inline __attribute__((always_inline)) void store(T* p, F x) const { store_part(p, x, n); }
  // x on the elements that there are, 0 or `rest` behind them
  inline __attribute__((always_inline)) F only(F x) const { return or_else(x, F{}); }
  inline __attribute__((always_inline)) F or_else(F x, F rest) const {
    I lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    return lane < n ? x : rest;
  }
};

template <typename Body>
PAE_INLINE void vectors(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + W <= n; i += W) body(i, Whole{});
  if (i < n) body(i, Part{static_cast<int>(n - i)});
}

// e^x for x <= 88, relative error 1e-7; where x < -87 it is e^-87.
PAE_INLINE F exponential(F x) {
  const F magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  x = x < -87.0f ? splat(-87.0f) : x;  // no comparison is true of a NaN, which stays one
  F shifted = x * 1.44269504f + magic;
  F k = shifted - magic;
  F r = x - k * 0.693359375f;
  r = r + k * 2.12194440e-4f;
  F p = splat(1.381459878757596e-3f);
  p = p * r + 8.3687175065279e-3f;
  p = p * r + 4.166838899254799e-2f;
  p = p * r + 1.666652113199234e-1f;
  p = p * r + 4.999999403953552e-1f;
  p = p * r * r + r + 1.0f;
  return p * bits<F>((bits<I>(shifted) + (127 - 0x4b400000)) << 23);
}

// 1 / x, to the last bit or two; x is neither 0 nor infinite.
PAE_INLINE F reciprocal(F x) {
#if defined(__AVX512F__)
  F y = bits<F>(_mm512_maskz_rcp14_ps(0xffff, bits<__m512>(x)));
  return y * (2.0f - x * y);
#else
  return 1.0f / x;
#endif
}

}  // namespace
}  // namespace pae

#endif

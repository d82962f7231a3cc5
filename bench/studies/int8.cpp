// Codes of 8 bits written inside the pass before a product, for bench/studies/int8.py, which
// compiles this for the processor at hand. `kind` of an array: 0 fp32, 2 bf16. One thread. A row is
// read from memory once and stays in the first cache until its codes are written.
#include <cmath>

#include "vector.h"

namespace pae {
namespace {

PAE_INLINE int length(Whole) { return W; }
PAE_INLINE int length(Part part) { return part.n; }

// x times the inverse of its scale, to nearest, between -127 and 127, plus 128.
PAE_INLINE void store_codes(uint8_t* p, F scaled, int n) {
  scaled = scaled < -127.0f ? splat(-127.0f) : scaled;
  scaled = scaled > 127.0f ? splat(127.0f) : scaled;
  const F magic = splat(12582912.0f + 128);  // adding 1.5 * 2^23 rounds to an integer
  B bytes = __builtin_convertvector(bits<U>(scaled + magic) & 0xffu, B);
  std::memcpy(p, &bytes, n);
}

template <typename Body>
void each(int kind, const void* x, Body body) {
  if (kind == 0) body(static_cast<const float*>(x));
  if (kind == 2) body(static_cast<const Half*>(x));
}

constexpr float PHI[] = {0.12855193f,    -0.064172335f,   0.0477376282f,  -0.0387927853f,
                         0.0320702605f,  -0.0260482617f,  0.0203645658f,  -0.0149990711f,
                         0.0102278311f,  -0.00681992853f, 0.00462177536f, -0.002418624f,
                         0.000720110722f, -0.000529150071f, 0.000631557719f, -0.000236412641f};

PAE_INLINE F gelu(F u) {  // as in csrc/cpu/kernels.cpp
  F t = u * u * (2.0f / (5.5f * 5.5f)) - 1.0f, p = splat(PHI[15]);
  for (int k = 14; k >= 0; --k) p = p * t + PHI[k];
  p = u * p + 0.5f;
  p = u < -5.5f ? F{} : p;
  return u * (u > 5.5f ? splat(1.0f) : p);
}

// x + delta, its normalised rows and 1/std as csrc/cpu/kernels.cpp has them, and their codes.
template <typename X, typename T>
void norm(const X* x, const T* delta, X* y, T* xhat, float* rstd, uint8_t* codes,
          const float* inverse, float eps, int64_t n) {
  F sum = {}, squares = {};
  vectors(n, [&](int64_t i, auto v) {
    if (delta != nullptr) v.store(y + i, v.load(x + i) + v.load(delta + i));
    sum += v.load((delta != nullptr ? y : x) + i);
  });
  if (delta != nullptr) x = y;
  const float mean = total(sum) / static_cast<float>(n);
  vectors(n, [&](int64_t i, auto v) {
    F c = v.only(v.load(x + i) - mean);
    squares += c * c;
  });
  *rstd = 1.0f / std::sqrt(total(squares) / static_cast<float>(n) + eps);
  vectors(n, [&](int64_t i, auto v) {
    F hat = (v.load(x + i) - mean) * *rstd;
    v.store(xhat + i, hat);
    store_codes(codes + i, hat * v.load(inverse + i), length(v));
  });
}

}  // namespace
}  // namespace pae

using namespace pae;
#define EXPORT extern "C" __attribute__((visibility("default"))) void

// Each row with a scale of its own.
EXPORT rows_codes(int kind, const void* from, uint8_t* codes, float* scale, int64_t rows,
                  int64_t n) {
  each(kind, from, [&](auto* x) {
    for (; rows > 0; --rows, x += n, codes += n, ++scale) {
      F most = {};
      vectors(n, [&](int64_t i, auto v) {
        F a = v.load(x + i);
        a = a < 0.0f ? -a : a;
        most = a > most ? a : most;
      });
      float largest = 1e-30f;
      for (int lane = 0; lane < W; ++lane) largest = std::fmax(largest, most[lane]);
      *scale = largest / 127.0f;
      vectors(n, [&](int64_t i, auto v) {
        store_codes(codes + i, v.load(x + i) * (1.0f / *scale), length(v));
      });
    }
  });
}

// A scale for each column, of x or of GELU(x), whose values nobody needs.
EXPORT column_codes(int kind, int act, const void* from, uint8_t* codes, const float* inverse,
                    int64_t rows, int64_t n) {
  each(kind, from, [&](auto* x) {
    for (; rows > 0; --rows, x += n, codes += n)
      vectors(n, [&](int64_t i, auto v) {
        F y = v.load(x + i);
        store_codes(codes + i, (act ? gelu(y) : y) * v.load(inverse + i), length(v));
      });
  });
}

EXPORT norm_codes(int stream, int kind, const void* from, const void* delta, void* y, void* xhat,
                  float* rstd, uint8_t* codes, const float* inverse, float eps, int64_t rows,
                  int64_t n) {
  each(stream, from, [&](auto* x) {
    each(kind, delta, [&](auto* d) {
      auto* sum = static_cast<std::remove_const_t<std::remove_pointer_t<decltype(x)>>*>(y);
      auto* hat = static_cast<std::remove_const_t<std::remove_pointer_t<decltype(d)>>*>(xhat);
      for (int64_t at = 0; at < rows * n; at += n)
        norm(x + at, d == nullptr ? d : d + at, sum + at, hat + at, rstd++, codes + at, inverse,
             eps, n);
    });
  });
}

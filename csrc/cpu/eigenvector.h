// The eigenvector of the largest eigenvalue of a symmetric matrix, by Lanczos' method. Included by
// kernels.cpp, and compiled once for each instruction set.
//
// A step reads the matrix once (k = 256: 256 KB from the second cache) and the basis four times, for
// two passes of Gram-Schmidt, without which fp32 loses the basis' orthogonality as soon as the first
// vector converges. 40 to 80 steps do where a decomposition needs k. The small tridiagonal problem
// is solved in fp64 at every eighth step; its last component says how far the method is.
#ifndef PAE_CPU_EIGENVECTOR_H_
#define PAE_CPU_EIGENVECTOR_H_

#include <cmath>

#include "cpu.h"
#include "vector.h"

namespace pae {
namespace {

// y = M^T x, eight rows of M at a time: no sum across lanes, and y is touched once for all eight.
PAE_INLINE void weighted_rows(const float* m, const float* x, int64_t rows, int64_t n, float sign,
                              float* y) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) {
    const float* at = m + r * n;
    float w[8];
    for (int j = 0; j < 8; ++j) w[j] = sign * x[r + j];
    vectors(n, [&](int64_t i, auto v) {
      F a = v.load(at + i) * w[0] + v.load(at + n + i) * w[1];
      F b = v.load(at + 2 * n + i) * w[2] + v.load(at + 3 * n + i) * w[3];
      a += v.load(at + 4 * n + i) * w[4] + v.load(at + 5 * n + i) * w[5];
      b += v.load(at + 6 * n + i) * w[6] + v.load(at + 7 * n + i) * w[7];
      v.store(y + i, v.load(y + i) + (a + b));
    });
  }
  for (; r < rows; ++r) {
    const float w = sign * x[r];
    vectors(n, [&](int64_t i, auto v) {
      v.store(y + i, v.load(y + i) + v.load(m + r * n + i) * w);
    });
  }
}

PAE_INLINE float dot(const float* x, const float* y, int64_t n) {
  F sum = {};
  vectors(n, [&](int64_t i, auto v) { sum += v.load(x + i) * v.load(y + i); });
  return total(sum);
}

PAE_INLINE void scale(float* x, float by, int64_t n) {
  vectors(n, [&](int64_t i, auto v) { v.store(x + i, v.load(x + i) * by); });
}

constexpr int MOST_STEPS = PAE_CPU_MOST_STEPS;

// The symmetric tridiagonal matrix of the first `n` steps, and its largest eigenvalue.
struct Tridiagonal {
  double diagonal[MOST_STEPS], beside[MOST_STEPS];  // beside[i] between i and i + 1
  double vector[MOST_STEPS];                        // unit length, after `solve`
  double pivot[MOST_STEPS];
  int n;
  double largest;  // at most the largest eigenvalue of any longer matrix

  // Whether x lies above all eigenvalues: x I - T is then positive definite, and its pivots are here.
  bool above(double x) {
    for (int i = 0; i < n; ++i) {
      const double before = i == 0 ? 0.0 : beside[i - 1] * beside[i - 1] / pivot[i - 1];
      pivot[i] = x - diagonal[i] - before;
      if (!(pivot[i] > 0.0)) return false;
    }
    return true;
  }

  // The largest norm of a column: at most the spectral norm, and no less than it divided by 3.
  double size() const {
    double most = 0.0;
    for (int i = 0; i < n; ++i) {
      const double left = i == 0 ? 0.0 : beside[i - 1], right = i + 1 < n ? beside[i] : 0.0;
      const double norm = left * left + diagonal[i] * diagonal[i] + right * right;
      if (norm > most) most = norm;
    }
    return std::sqrt(most);
  }

  void solve() {
    double low = largest, high = low;
    for (int i = 0; i < n; ++i) {
      const double left = i == 0 ? 0.0 : beside[i - 1], right = i + 1 < n ? beside[i] : 0.0;
      if (diagonal[i] > low) low = diagonal[i];
      if (diagonal[i] + left + right > high) high = diagonal[i] + left + right;
    }
    const double unit = size(), least = unit * 1e-10 + 1e-300;
    high += least;
    while (high - low > least) {
      const double middle = 0.5 * (low + high);
      if (above(middle))
        high = middle;
      else
        low = middle;
    }
    // inverse iteration from above, where the factors are stable without an exchange of rows
    while (!above(high)) high += least;
    for (int i = 0; i < n; ++i) vector[i] = 1.0;
    for (int round = 0; round < 3; ++round) {
      for (int i = 1; i < n; ++i) vector[i] += beside[i - 1] / pivot[i - 1] * vector[i - 1];
      for (int i = n - 1; i >= 0; --i) {
        const double next = i + 1 < n ? beside[i] * vector[i + 1] : 0.0;
        vector[i] = (vector[i] + next) / pivot[i];
      }
      double norm = 0.0;
      for (int i = 0; i < n; ++i) norm += vector[i] * vector[i];
      norm = 1.0 / std::sqrt(norm);
      for (int i = 0; i < n; ++i) vector[i] *= norm;
    }
    largest = low;
  }
};

void eigenvector(const pae_cpu_eigenvector_params& p, int64_t begin, int64_t end) {
  const int64_t n = p.width;
  const int steps = static_cast<int>(n < p.steps ? n : p.steps);
  float along[MOST_STEPS];
  Tridiagonal t;
  for (int64_t number = begin; number < end; ++number) {
    const float* m = static_cast<const float*>(p.matrices) + number * n * n;
    float* basis = static_cast<float*>(p.workspace) + number * (p.steps + 1) * n;
    std::memcpy(basis, p.start, n * sizeof(float));
    scale(basis, 1.0f / std::sqrt(dot(basis, basis, n)), n);
    t.largest = -HUGE_VAL;
    for (t.n = 1;; ++t.n) {
      const int j = t.n;
      float* next = basis + j * n;  // one vector more than steps
      std::memset(next, 0, n * sizeof(float));
      weighted_rows(m, basis + (j - 1) * n, n, n, 1.0f, next);
      for (int pass = 0; pass < 2; ++pass) {
        for (int i = 0; i < j; ++i) along[i] = dot(basis + i * n, next, n);
        weighted_rows(basis, along, j, n, -1.0f, next);
        t.diagonal[j - 1] = along[j - 1] + (pass == 0 ? 0.0 : t.diagonal[j - 1]);
      }
      const float length = std::sqrt(dot(next, next, n));
      t.beside[j - 1] = length;
      const double enough = p.tolerance * t.size();
      const bool exhausted = j == steps || !(length > enough);
      if (exhausted || j % 8 == 0) {
        t.solve();
        if (exhausted || length * std::fabs(t.vector[j - 1]) <= enough) break;
      }
      scale(next, 1.0f / length, n);
    }
    // the combination of the basis, its eigenvalue, and how far it is from one
    float* vector = static_cast<float*>(p.vectors) + number * n;
    std::memset(vector, 0, n * sizeof(float));
    for (int i = 0; i < t.n; ++i) along[i] = static_cast<float>(t.vector[i]);
    weighted_rows(basis, along, t.n, n, 1.0f, vector);
    scale(vector, 1.0f / std::sqrt(dot(vector, vector, n)), n);
    std::memset(basis, 0, n * sizeof(float));
    weighted_rows(m, vector, n, n, 1.0f, basis);
    const float value = dot(vector, basis, n);
    weighted_rows(vector, &value, 1, n, -1.0f, basis);
    static_cast<float*>(p.values)[number] = value;
    static_cast<float*>(p.residuals)[number] = std::sqrt(dot(basis, basis, n));
    static_cast<float*>(p.sizes)[number] = static_cast<float>(t.size());
    static_cast<int32_t*>(p.taken)[number] = t.n;
  }
}

}  // namespace
}  // namespace pae

#endif

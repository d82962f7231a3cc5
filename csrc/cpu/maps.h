// Enlarged maps: a convolution behind an enlargement, and cross-entropy behind one. Included by
// kernels.cpp, and compiled once for each instruction set.
//
// Convolution. Enlarging and multiplying by a tap's matrix act on different axes, so they change
// places: nine products are made at the small size, scale^2 times fewer multiplications than behind
// the enlargement, and what is left is the sum of this file. An entry has at most 6 x 6 terms, one
// multiply-add each: bound by loads from the second cache (scale 2, 256 channels: 36 loads of 64
// bytes for each 64 written). The nine maps are written once and come from memory once, since rows
// that share them follow each other.
//
// Loss. Logits at the size of the masks (150 classes, 512 x 512: 157 MB) exist nowhere: a pixel's
// are made of four rows of the small map, in the forward twice, for their largest and for the sum
// of exponentials, in the backward once for each small row that they reach, two as a rule, so that
// every row of the gradient belongs to one thread. Bound by the exponentials.
#ifndef PAE_CPU_MAPS_H_
#define PAE_CPU_MAPS_H_

#include <cmath>
#include <limits>

#include "cpu.h"
#include "vector.h"

namespace pae {
namespace {

// What position `at` of an enlarged axis is made of; `step` is small / large. As PyTorch's bilinear
// enlargement with align_corners=False.
struct Between {
  int64_t first, second;
  float near, far;

  float of(int64_t index) const {
    return (first == index ? near : 0.0f) + (second == index ? far : 0.0f);
  }
};

PAE_INLINE Between between(int64_t at, float step, int64_t small) {
  float place = (static_cast<float>(at) + 0.5f) * step - 0.5f;
  place = place < 0.0f ? 0.0f : place;
  int64_t first = static_cast<int64_t>(place);
  first = first < small - 1 ? first : small - 1;
  float far = place - static_cast<float>(first);
  far = far < 1.0f ? far : 1.0f;
  return {first, first < small - 1 ? first + 1 : first, 1.0f - far, far};
}

struct Term {
  int64_t offset;
  float weight;
};

// to = the sum of rows of `n` entries
PAE_INLINE void weighted(const float* from, const Term* terms, int count, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    F a = {}, b = {}, c = {}, d = {};
    for (int t = 0; t < count; ++t) {
      const float* at = from + terms[t].offset + i;
      const float weight = terms[t].weight;
      a += load(at) * weight;
      b += load(at + W) * weight;
      c += load(at + 2 * W) * weight;
      d += load(at + 3 * W) * weight;
    }
    store(to + i, a);
    store(to + i + W, b);
    store(to + i + 2 * W, c);
    store(to + i + 3 * W, d);
  }
  vectors(n - i, [&](int64_t k, auto v) {
    F sum = {};
    for (int t = 0; t < count; ++t)
      sum += v.load(from + terms[t].offset + i + k) * terms[t].weight;
    v.store(to + i + k, sum);
  });
}

// `all` = every pair of two axes
PAE_INLINE int pairs(const Term* down, int rows, const Term* across, int columns, Term* all) {
  int count = 0;
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c)
      all[count++] = {down[r].offset + across[c].offset, down[r].weight * across[c].weight};
  return count;
}

// Along one axis: the entries of three taps at small positions that position `at` sums.
PAE_INLINE int taps_of(int64_t at, int64_t scale, int64_t small, int64_t each, int64_t tap,
                       Term* found) {
  int count = 0;
  for (int64_t k = 0; k < 3; ++k) {
    const int64_t read = at + k - 1;
    if (read < 0 || read >= small * scale) continue;  // zeros of the padding
    const Between b = between(read, 1.0f / static_cast<float>(scale), small);
    found[count++] = {b.first * each + k * tap, b.near};
    if (b.far != 0.0f) found[count++] = {b.second * each + k * tap, b.far};
  }
  return count;
}

// Its adjoint: the large positions that sum tap `k` at small position `index`.
PAE_INLINE int readers_of(int64_t index, int64_t k, int64_t scale, int64_t small, int64_t each,
                          Term* found) {
  int count = 0;
  const int64_t large = small * scale, end = (index + 2) * scale;
  for (int64_t read = index > 0 ? (index - 1) * scale : 0; read < end && read < large; ++read) {
    const float weight = between(read, 1.0f / static_cast<float>(scale), small).of(index);
    const int64_t at = read - k + 1;
    if (weight != 0.0f && at >= 0 && at < large) found[count++] = {at * each, weight};
  }
  return count;
}

// rows [begin, end) of images * scale * rows
void enlarged_fwd(const pae_cpu_enlarged_params& p, int64_t begin, int64_t end) {
  const int64_t large = p.rows * p.scale, wide = p.columns * p.scale, pixel = 9 * p.channels;
  Term down[6], across[6], all[36];
  for (int64_t row = begin; row < end; ++row) {
    const float* taps = p.taps + row / large * p.rows * p.columns * pixel;
    const int rows =
        taps_of(row % large, p.scale, p.rows, p.columns * pixel, 3 * p.channels, down);
    for (int64_t q = 0; q < wide; ++q) {
      const int columns = taps_of(q, p.scale, p.columns, pixel, p.channels, across);
      const int count = pairs(down, rows, across, columns, all);
      weighted(taps, all, count, p.channels, p.map + (row * wide + q) * p.channels);
    }
  }
}

// rows [begin, end) of images * rows
void enlarged_bwd(const pae_cpu_enlarged_params& p, int64_t begin, int64_t end) {
  constexpr int MOST = 3 * PAE_CPU_MOST_SCALE;
  const int64_t wide = p.columns * p.scale;
  Term down[3][MOST], across[MOST], all[MOST * MOST];
  int rows[3];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / p.rows;
    const float* map = p.map + image * p.rows * p.scale * wide * p.channels;
    for (int64_t k = 0; k < 3; ++k)
      rows[k] = readers_of(row % p.rows, k, p.scale, p.rows, wide * p.channels, down[k]);
    for (int64_t j = 0; j < p.columns; ++j) {
      float* to = p.taps + (row * p.columns + j) * 9 * p.channels;
      for (int64_t b = 0; b < 3; ++b) {
        const int columns = readers_of(j, b, p.scale, p.columns, p.channels, across);
        for (int64_t a = 0; a < 3; ++a) {
          const int count = pairs(down[a], rows[a], across, columns, all);
          weighted(map, all, count, p.channels, to + (3 * a + b) * p.channels);
        }
      }
    }
  }
}

// The logits of one pixel: `at(i, v)` is a vector of them.
struct Pixel {
  const float* corner[4];
  float weight[4];

  static inline __attribute__((always_inline)) Pixel of(const float* above, const float* below, const Between& r, const Between& c,
                      int64_t classes) {
    return {{above + c.first * classes, above + c.second * classes, below + c.first * classes,
             below + c.second * classes},
            {r.near * c.near, r.near * c.far, r.far * c.near, r.far * c.far}};
  }
  template <typename V>
  inline __attribute__((always_inline)) F at(int64_t i, V v) const {
    return v.load(corner[0] + i) * weight[0] + v.load(corner[1] + i) * weight[1] +
           v.load(corner[2] + i) * weight[2] + v.load(corner[3] + i) * weight[3];
  }
  float one(int64_t i) const {
    return corner[0][i] * weight[0] + corner[1][i] * weight[1] + corner[2][i] * weight[2] +
           corner[3][i] * weight[3];
  }
};

// rows [begin, end) of images * height
void pixel_loss_fwd(const pae_cpu_pixel_loss_params& p, int64_t begin, int64_t end) {
  const int64_t n = p.classes, line = p.columns * n;
  const float down = static_cast<float>(p.rows) / static_cast<float>(p.height);
  const float across = static_cast<float>(p.columns) / static_cast<float>(p.width);
  for (int64_t row = begin; row < end; ++row) {
    const Between r = between(row % p.height, down, p.rows);
    const float* image = p.logits + row / p.height * p.rows * line;
    const float *above = image + r.first * line, *below = image + r.second * line;
    double sum = 0.0;
    for (int64_t q = 0; q < p.width; ++q) {
      const Pixel x = Pixel::of(above, below, r, between(q, across, p.columns), n);
      F high = splat(-std::numeric_limits<float>::infinity()), low = high;
      vectors(n, [&](int64_t i, auto v) {
        F y = v.or_else(x.at(i, v), low);
        high = y > high ? y : high;  // a NaN shows in the sum
      });
      const float most = largest(high);
      F parts = {};
      vectors(n, [&](int64_t i, auto v) { parts += v.only(exponential(x.at(i, v) - most)); });
      const float lse = most + std::log(total(parts));
      const int64_t label = p.masks[row * p.width + q];
      p.lse[row * p.width + q] = lse;
      if (label == p.ignored) continue;
      sum += label >= 0 && label < n ? lse - x.one(label) : std::numeric_limits<float>::quiet_NaN();
    }
    p.losses[row] = static_cast<float>(sum);
  }
}

// rows [begin, end) of images * rows
void pixel_loss_bwd(const pae_cpu_pixel_loss_params& p, int64_t begin, int64_t end) {
  const int64_t n = p.classes, line = p.columns * n;
  const float down = static_cast<float>(p.rows) / static_cast<float>(p.height);
  const float across = static_cast<float>(p.columns) / static_cast<float>(p.width);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t index = row % p.rows, image = row / p.rows;
    float* to = p.d_logits + row * line;
    std::memset(to, 0, line * sizeof(float));
    // the large rows from the centre of the small row above to that of the one below, and one more
    const int64_t first = static_cast<int64_t>((index - 1) / down) - 1;
    const int64_t last = static_cast<int64_t>((index + 2) / down) + 2;
    for (int64_t at = first > 0 ? first : 0; at < last && at < p.height; ++at) {
      const Between r = between(at, down, p.rows);
      const float share = r.of(index) * p.factor;
      if (share == 0.0f) continue;
      const float* from = p.logits + image * p.rows * line;
      const int64_t pixels = (image * p.height + at) * p.width;
      for (int64_t q = 0; q < p.width; ++q) {
        const int64_t label = p.masks[pixels + q];
        if (label == p.ignored) continue;
        const Between c = between(q, across, p.columns);
        const Pixel x = Pixel::of(from + r.first * line, from + r.second * line, r, c, n);
        const float lse = p.lse[pixels + q], near = share * c.near, far = share * c.far;
        float *one = to + c.first * n, *other = to + c.second * n;
        vectors(n, [&](int64_t i, auto v) {
          F d = exponential(x.at(i, v) - lse);
          v.store(one + i, v.load(one + i) + d * near);
          v.store(other + i, v.load(other + i) + d * far);  // may be the same row
        });
        if (label >= 0 && label < n) {
          one[label] -= near;
          other[label] -= far;
        }
      }
    }
  }
}

}  // namespace
}  // namespace pae

#endif

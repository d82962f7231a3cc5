// The spectral norm: launches 1 to 27 of the forward, as far as they concern L.
// pae_kernels/koopman/spectral.py, `top_by_squaring`, is the same in PyTorch and says why.
#pragma once

#include "koopman.cuh"

namespace pae {
namespace {

constexpr float kSmallestSpread = 1e-30f;  // of |M|^2: below, its squares have left fp32's range
constexpr int kScaleParts = 32;            // most blocks that look for max |L| in one matrix

// Tile number `index` of the upper triangle, diagonal included, of a square of `side` tiles.
template <int TILE>
__device__ __forceinline__ TileAt upper_tile_at(int index, int side) {
  int row = 0;
  while (index >= side - row) index -= side - row++;
  return {row * TILE, (row + index) * TILE};
}

__host__ __device__ constexpr int upper_tiles(int side) { return side * (side + 1) / 2; }

// Power of two at most max |L| and more than a quarter of it, 1 for zeros, NaN where L has NaN or
// infinity. Neither it nor its inverse is denormal.
__device__ __forceinline__ float unit_of(float largest) {
  if (!(largest <= 3.402823466e38f)) return largest - largest;  // NaN of infinity and NaN
  if (largest == 0.0f) return 1.0f;
  int exponent;
  frexpf(largest, &exponent);
  exponent = exponent - 1 < -126 ? -126 : exponent - 1 > 126 ? 126 : exponent - 1;
  return ldexpf(1.0f, exponent);
}

struct Scale {
  float unit;     // NaN where L is not finite
  float inverse;  // 1 / unit; 0 where L is not finite
  float mean;     // of the diagonal of L / unit: s
};

// Trace parts are kept 2^-12 times smaller: the sum of many huge entries must stay finite.
constexpr float kTracePart = 1.0f / 4096;

// Every warp for itself, all with the same bits.
__device__ __forceinline__ Scale read_scale(const float* parts, int count, int k) {
  const int lane = threadIdx.x % kWarp;
  const float largest = warp_max(lane < count ? parts[2 * lane] : 0.0f);
  const float trace = warp_sum(lane < count ? parts[2 * lane + 1] : 0.0f);
  const float unit = unit_of(largest);
  const bool finite = unit == unit;
  return {unit, finite ? 1.0f / unit : 0.0f, finite ? trace / unit / (kTracePart * k) : 0.0f};
}

// Sums of two numbers that every tile of a matrix left; every warp for itself.
struct Pair {
  float first, second;
};

__device__ __forceinline__ Pair read_sums(const float* parts, int count) {
  Pair sum = {0, 0};
  for (int i = threadIdx.x % kWarp; i < count; i += kWarp) {
    sum.first += parts[2 * i];
    sum.second += parts[2 * i + 1];
  }
  return {warp_sum(sum.first), warp_sum(sum.second)};
}

// Where the spectral norm keeps its intermediate results; all pointers of one (run, operator).
// Three buffers take turns: M, M^2, then the projector after squaring q in 2 (q even) or 0 (odd).
struct Spectral {
  float* workspace;
  int k, scale_parts, tiles;  // tiles of the upper triangle in launches 2 and 3
  int square_tiles, squarings;
  float settled, settled_first;

  __host__ __device__ Index square() const { return Index(k) * k; }
  __host__ __device__ Index sums() const {
    return 2 * Index(tiles > square_tiles ? tiles : square_tiles);
  }
  // floats of one (run, operator)
  __host__ __device__ Index size() const {
    return 3 * square() + (squarings + 1) * sums() + 2 * kScaleParts + (squarings + 1) + k;
  }
  __device__ Spectral of(Index matrix) const {
    Spectral mine = *this;
    mine.workspace += matrix * size();
    return mine;
  }
  __device__ float* buffer(int b) const { return workspace + b * square(); }
  __device__ float* projector(int q) const { return buffer(q == 1 ? 1 : q % 2 == 0 ? 2 : 0); }
  __device__ float* sums_of(int q) const { return workspace + 3 * square() + q * sums(); }
  __device__ float* scale() const { return sums_of(squarings + 1); }
  // number of the squaring after which the projector had settled, -1 before: known to launch q
  __device__ int* settled_at(int q) const {
    return reinterpret_cast<int*>(scale() + 2 * kScaleParts) + q;
  }
  __device__ float* image() const { return scale() + 2 * kScaleParts + squarings + 1; }  // L right
  __device__ Scale read() const { return read_scale(scale(), scale_parts, k); }
};

// Launch 1: part `part` of max |L| and trace L.
__device__ void measure_scale(const float* L, const Spectral& at, int part) {
  const Index first = Index(part) * kThreads + threadIdx.x;
  const Index step = Index(at.scale_parts) * kThreads;
  float largest = 0, trace = 0;
  for (Index e = first; e < at.square(); e += step) largest = Max()(fabsf(L[e]), largest);
  for (Index i = first; i < at.k; i += step) trace += L[i * at.k + i] * kTracePart;
  largest = block_max<kThreads>(largest);
  trace = block_sum<kThreads>(trace);
  if (threadIdx.x == 0) {
    at.scale()[2 * part] = largest;
    at.scale()[2 * part + 1] = trace;
  }
}

// Writes entry (i, j) of a symmetric matrix of which the upper tiles are computed, and its mirror
// image. What is summed over such a tile counts `weight` times.
__device__ __forceinline__ void store_mirrored(float* to, int k, TileAt at, int i, int j, float x) {
  to[Index(i) * k + j] = x;
  if (at.row != at.column) to[Index(j) * k + i] = x;
}

__device__ __forceinline__ void store_sums(float* sums, int tile, TileAt at, float a, float b) {
  const float weight = at.row == at.column ? 1.0f : 2.0f;
  a = block_sum<kThreads>(a);
  b = block_sum<kThreads>(b);
  if (threadIdx.x == 0) {
    sums[2 * tile] = weight * a;
    sums[2 * tile + 1] = weight * b;
  }
}

// Launch 2: one tile of M = E^T E + s (E + E^T); sums |M|^2 and, of diagonal tiles, tr M.
template <int TILE>
__device__ void split_identity(Scratch<TILE>& scratch, const float* L, const Spectral& at,
                               int tile) {
  const int k = at.k;
  const TileAt corner = upper_tile_at<TILE>(tile, ceil_div(k, TILE));
  const Scale scale = at.read();
  const float inverse = scale.inverse, s = scale.mean;
  auto E = [&](int i, int j) {
    const float x = inverse == 0.0f ? 0.0f : L[Index(i) * k + j] * inverse;
    return i == j ? x - s : x;
  };
  multiply<TILE, false, false>(
      scratch, k, [&](int i, int d) { return corner.row + i < k ? E(d, corner.row + i) : 0.0f; },
      [&](int d, int j) { return corner.column + j < k ? E(d, corner.column + j) : 0.0f; });
  float squares = 0, trace = 0;
  visit_entries<TILE>(scratch, [&](int i, int j, float x) {
    i += corner.row, j += corner.column;
    if (i >= k || j >= k) return;
    x += s * (E(i, j) + E(j, i));
    store_mirrored(at.buffer(0), k, corner, i, j, x);
    squares += x * x;
    if (i == j) trace += x;
  });
  store_sums(at.sums_of(0), tile, corner, squares, trace);
  if (tile == 0 && threadIdx.x == 0) *at.settled_at(2) = -1;
}

// 1 / |M|, 0 where M has no spread at all.
__device__ __forceinline__ float inverse_spread(float squares) {
  return squares < kSmallestSpread ? 0.0f : 1.0f / sqrtf(squares);
}

// Launch 3: one tile of (M / |M|)^2, and its sum of squares.
template <int TILE>
__device__ void square_spread(Scratch<TILE>& scratch, const Spectral& at, int tile) {
  const int k = at.k;
  const TileAt corner = upper_tile_at<TILE>(tile, ceil_div(k, TILE));
  const float scale = inverse_spread(read_sums(at.sums_of(0), at.tiles).first);
  const float* M = at.buffer(0);
  multiply<TILE, false, false>(
      scratch, k,
      [&](int i, int d) {
        return corner.row + i < k ? M[Index(d) * k + corner.row + i] * scale : 0.0f;
      },
      [&](int d, int j) {
        return corner.column + j < k ? M[Index(d) * k + corner.column + j] * scale : 0.0f;
      });
  float squares = 0;
  visit_entries<TILE>(scratch, [&](int i, int j, float x) {
    i += corner.row, j += corner.column;
    if (i >= k || j >= k) return;
    store_mirrored(at.buffer(1), k, corner, i, j, x);
    squares += x * x;
  });
  store_sums(at.sums_of(1), tile, corner, squares, 0.0f);
}

// Launch q + 2: the projector after squaring q >= 2 from the one before. kFirst: from
// X = (M / |M| + c)^2, divided by its trace, which is put together as it is read.
template <int TILE, bool kFirst>
__global__ void __launch_bounds__(kThreads, Tiling<TILE>::kResident)
    koopman_square_kernel(Spectral all, int q) {
  PAE_SHARED(Scratch<TILE>, scratch, );
  const Spectral at = all.of(blockIdx.y);
  const int tile = blockIdx.x, k = at.k;
  const bool first_thread = tile == 0 && threadIdx.x == 0;
  float share = 1.0f;  // 1 / tr X^2 = 1 / |X|^2: makes the trace 1 again
  float spread = 0, shift = 0, weight = 0;
  if constexpr (kFirst) {
    const Pair m = read_sums(at.sums_of(0), at.tiles);
    const float fourth = read_sums(at.sums_of(1), at.tiles).first;
    const float s = at.read().mean;
    spread = inverse_spread(m.first);
    shift = spread == 0.0f ? 1.0f : fminf(sqrtf(sqrtf(fourth)), s * s * spread);
    const float square = spread == 0.0f ? 0.0f : 1.0f;  // tr (M / |M|)^2
    weight = 1.0f / (square + 2 * shift * m.second * spread + shift * shift * k);
  } else {
    // both are read at once, so that neither waits for the other
    const int settled = *at.settled_at(q - 1);
    const Pair sums = read_sums(at.sums_of(q - 1), at.square_tiles);
    const float below = fminf(at.settled, ldexpf(at.settled_first, q - 1));
    const bool done = settled >= 0 || sums.second <= below * below * sums.first;
    if (first_thread) *at.settled_at(q) = settled >= 0 ? settled : done ? q - 1 : -1;
    if (done) {
      // the next launch reads them
      if (threadIdx.x < 2) at.sums_of(q)[2 * tile + threadIdx.x] = 0.0f;
      return;
    }
    share = 1.0f / sums.first;
  }

  const TileAt corner = upper_tile_at<TILE>(tile, ceil_div(k, TILE));
  const float* before = at.projector(q - 1);
  const float* M = at.buffer(0);
  auto X = [&](int i, int j) {
    const Index e = Index(i) * k + j;
    if constexpr (!kFirst) return before[e];
    const float x = before[e] + 2 * shift * spread * M[e];
    return weight * (i == j ? x + shift * shift : x);
  };
  multiply<TILE, false, false>(
      scratch, k, [&](int i, int d) { return corner.row + i < k ? X(d, corner.row + i) : 0.0f; },
      [&](int d, int j) { return corner.column + j < k ? X(d, corner.column + j) : 0.0f; });
  float squares = 0, change = 0;
  visit_entries<TILE>(scratch, [&](int i, int j, float x) {
    i += corner.row, j += corner.column;
    if (i >= k || j >= k) return;
    x *= share;
    store_mirrored(at.projector(q), k, corner, i, j, x);
    squares += x * x;
    const float moved = x - X(i, j);
    change += moved * moved;
  });
  store_sums(at.sums_of(q), tile, corner, squares, change);
}

struct Min {
  __device__ __forceinline__ int operator()(int a, int b) const { return a < b ? a : b; }
};

// The longest column of the projector, normalised: right. And L / unit right, 32 rows a block.
constexpr int kImageRows = 32;

__global__ void __launch_bounds__(kThreads)
    koopman_vector_kernel(Spectral all, Sizes n, const float* L, float* right) {
  PAE_DYNAMIC_SHARED(float, v);
  const int matrix = blockIdx.y, k = n.k;
  const Spectral at = all.of(matrix);
  const int settled = *at.settled_at(at.squarings);
  const float* X = at.projector(settled >= 0 ? settled : at.squarings);
  float best = -1;
  for (int i = threadIdx.x; i < k; i += kThreads) best = Max()(X[Index(i) * k + i], best);
  best = block_max<kThreads>(best);
  int column = k - 1;
  for (int i = threadIdx.x; i < k; i += kThreads)
    if (X[Index(i) * k + i] == best) column = Min()(i, column);
  column = block_reduce<kThreads>(column, Min());
  float squares = 0;
  for (int i = threadIdx.x; i < k; i += kThreads) {
    v[i] = X[Index(column) * k + i] / best;  // may be 1 / k and less: squares might vanish
    squares += v[i] * v[i];
  }
  const float length = 1.0f / sqrtf(block_sum<kThreads>(squares));
  for (int i = threadIdx.x; i < k; i += kThreads) {
    v[i] *= length;
    if (blockIdx.x == 0) right[Index(matrix) * k + i] = v[i];
  }
  __syncthreads();
  const float inverse = at.read().inverse;
  const float* mine = n.matrix(L, matrix / n.groups(), matrix % n.groups());
  for (int r = threadIdx.x / kWarp; r < kImageRows; r += kWarps) {
    const int row = blockIdx.x * kImageRows + r;
    float sum = 0;
    if (row < k && inverse != 0.0f)
      for (int i = threadIdx.x % kWarp; i < k; i += kWarp)
        sum = fmaf(mine[Index(row) * k + i] * inverse, v[i], sum);
    sum = warp_sum(sum);
    if (row < k && threadIdx.x % kWarp == 0) at.image()[row] = sum;
  }
}

}  // namespace
}  // namespace pae

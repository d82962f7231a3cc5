// Koopman and Lyapunov losses of lifted prompts: values, saved tensors, all gradients, in fp32.
// pae_kernels/koopman/reference.py is the definition and names every tensor; spectral.py has the
// spectral norm as it is taken here, in PyTorch.
//
// Everything is a product with a fused beginning and end. One block of 256 threads makes one square
// tile of an output (TILE 16, 32 or 64): operands pass through shared memory in stages of 32 or 64
// of the depth, fetched into registers one stage ahead; groups of threads share the depth and their
// sums are added in a fixed order, so that a small output still keeps every warp busy and no
// reduction leaves the block. Products are fp32 FMAs: no tensor core, whatever the flags say.
//
//   launch  forward                                    beside it, in other blocks of the same launch
//   1       states = g(prompts) lift^T, row norms       max |L|, trace L
//   2       predicted = now K, row norms, |error|^2     M = E^T E + s (E + E^T), |M|^2, tr M
//   3       images = points L^T / unit, row squares     M^2, |M^2|^2
//   4..26   one squaring of the projector each; once it has settled the rest return at once
//   27      its largest column: right; L right
//   28      one warp a pair: sigma, V, both losses, and all scalars of the gradient
//   ("paper": 1, 2, 3 without what stands beside, and 28)
//
//   launch  backward
//   1       d points = pull (images L) - radial points, d predicted
//   2       d states = d predicted K^T + d now - d error
//   3       d prompts, d lift, d K, d L, each in its own blocks
//   4       only with LayerNorm: its backward, row by row, in place
//
// 28 + 3 launches in "code", 4 + 3 in "paper". What bounds them at R = 1, 11 blocks x 50 prompts,
// D = 768, k = 256 is latency: 0.9 GFLOP forward and 1.5 backward would take 45 us at the H200's
// 60 TFLOP/s, and 8 MB of traffic stay in L2. Estimate, not a measurement, for one captured graph:
// launches of a dependent chain 1.2 us each, an active squaring (136 tiles of 16, 2 MFLOP halved by
// symmetry) 3 us, a settled one 1.2 us, 12 of them active at spectra of training: 55 us; launches 1
// to 3 5 + 3 + 3 us, 27 and 28 4 us each, backward 8 + 5 + 12 us: about 100 us together, 110 us if
// all 23 squarings are active. At k = 1024 a squaring is 1.1 GFLOP on 136 tiles of 64, about 35 us
// while active, so the spectral norm takes 0.45 ms of 0.6 ms.
//
// Not one kernel with a barrier across the grid: the losses run beside a network's forward, where
// no block may count on the others being resident.
#include "common.cuh"

namespace pae {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr float kEps = 1e-8f;
constexpr float kCeiling = 10.0f;
constexpr float kTiny = 1.17549435e-38f;
constexpr float kSmallestSpread = 1e-30f;  // of |M|^2: below, its squares have left fp32's range
constexpr int kScaleParts = 32;            // most blocks that look for max |L| in one matrix

typedef long long Index;

// ---- products

template <int TILE>
struct Tiling {
  static constexpr int kMicro = TILE == 64 ? 8 : 4;     // a thread's outputs: kMicro x kMicro
  static constexpr int kSide = TILE / kMicro;           // threads along one side of the tile
  static constexpr int kGroups = kThreads / (kSide * kSide);
  static constexpr int kDepth = TILE == 16 ? 64 : 32;   // of one stage
  static constexpr int kPitch = TILE + 4;               // keeps rows aligned to 16 bytes
  static constexpr int kSlots = TILE == 64 ? 1 : kGroups;  // sums of groups kept apart
  static constexpr int kFetch = TILE * kDepth / kThreads;  // entries a thread fetches per stage
  static constexpr int kEntries = TILE * TILE / kThreads;  // of the output, per thread
  static constexpr int kChunk = TILE < kWarp ? TILE : kWarp;  // columns of a row summed by one warp
};

template <int TILE>
struct alignas(16) Scratch {
  float a[Tiling<TILE>::kDepth][Tiling<TILE>::kPitch];
  float b[Tiling<TILE>::kDepth][Tiling<TILE>::kPitch];
  float sums[Tiling<TILE>::kSlots][TILE * TILE];
};

// sums[.][i, j] = sum over d < depth of a(i, d) b(d, j); a and b give 0 outside their matrices, and
// are asked for d < depth alone. kDeepA: neighbouring d lie side by side in a's memory, so
// neighbouring threads take neighbouring d; else they take neighbouring i. kDeepB likewise.
template <int TILE, bool kDeepA, bool kDeepB, typename A, typename B>
__device__ __forceinline__ void multiply(Scratch<TILE>& scratch, int depth, A a, B b) {
  using T = Tiling<TILE>;
  const int group = threadIdx.x / (T::kSide * T::kSide);
  const int row = threadIdx.x / T::kSide % T::kSide * T::kMicro;
  const int column = threadIdx.x % T::kSide * T::kMicro;
  float sum[T::kMicro][T::kMicro] = {};
  float next_a[T::kFetch], next_b[T::kFetch];

  auto place = [](int f, bool deep, int& along, int& d) {
    const int e = f * kThreads + int(threadIdx.x);
    along = deep ? e / T::kDepth : e % TILE;
    d = deep ? e % T::kDepth : e / TILE;
  };
  auto fetch = [&](int start) {
#pragma unroll
    for (int f = 0; f < T::kFetch; ++f) {
      int along, d;
      place(f, kDeepA, along, d);
      next_a[f] = start + d < depth ? a(along, start + d) : 0.0f;
      place(f, kDeepB, along, d);
      next_b[f] = start + d < depth ? b(start + d, along) : 0.0f;
    }
  };

  fetch(0);
  for (int start = 0; start < depth; start += T::kDepth) {
    __syncthreads();  // the stage before has been used
#pragma unroll
    for (int f = 0; f < T::kFetch; ++f) {
      int along, d;
      place(f, kDeepA, along, d);
      scratch.a[d][along] = next_a[f];
      place(f, kDeepB, along, d);
      scratch.b[d][along] = next_b[f];
    }
    __syncthreads();
    if (start + T::kDepth < depth) fetch(start + T::kDepth);
#pragma unroll
    for (int d = group; d < T::kDepth; d += T::kGroups) {
      Pack<float, 4> pa[T::kMicro / 4], pb[T::kMicro / 4];
#pragma unroll
      for (int q = 0; q < T::kMicro / 4; ++q) {
        pa[q] = *reinterpret_cast<const Pack<float, 4>*>(&scratch.a[d][row + 4 * q]);
        pb[q] = *reinterpret_cast<const Pack<float, 4>*>(&scratch.b[d][column + 4 * q]);
      }
#pragma unroll
      for (int i = 0; i < T::kMicro; ++i)
#pragma unroll
        for (int j = 0; j < T::kMicro; ++j)
          sum[i][j] = fmaf(pa[i / 4].v[i % 4], pb[j / 4].v[j % 4], sum[i][j]);
    }
  }

  for (int turn = 0; turn < T::kGroups / T::kSlots; ++turn) {
    if (group / T::kSlots == turn) {
      float* slot = scratch.sums[group % T::kSlots];
#pragma unroll
      for (int i = 0; i < T::kMicro; ++i)
#pragma unroll
        for (int j = 0; j < T::kMicro; ++j) {
          float& at = slot[(row + i) * TILE + column + j];
          at = turn == 0 ? sum[i][j] : at + sum[i][j];
        }
    }
    __syncthreads();
  }
}

// visit(i, j, sum) for every entry of the tile that `multiply` left; a warp visits kChunk
// neighbouring columns of a row (two rows at TILE 16) at a time, all its lanes at once.
template <int TILE, typename Visit>
__device__ __forceinline__ void visit_entries(const Scratch<TILE>& scratch, Visit visit) {
  using T = Tiling<TILE>;
#pragma unroll 4
  for (int f = 0; f < T::kEntries; ++f) {
    const int e = f * kThreads + int(threadIdx.x);
    float sum = scratch.sums[0][e];
#pragma unroll
    for (int s = 1; s < T::kSlots; ++s) sum += scratch.sums[s][e];
    visit(e / TILE, e % TILE, sum);
  }
}

// Tile number `index` of a matrix with `columns` tiles in a row, row by row.
struct TileAt {
  int row, column;
};

template <int TILE>
__device__ __forceinline__ TileAt tile_at(int index, int columns) {
  return {index / columns * TILE, index % columns * TILE};
}

// Tile number `index` of the upper triangle, diagonal included, of a square of `side` tiles.
template <int TILE>
__device__ __forceinline__ TileAt upper_tile_at(int index, int side) {
  int row = 0;
  while (index >= side - row) index -= side - row++;
  return {row * TILE, (row + index) * TILE};
}

__host__ __device__ constexpr int upper_tiles(int side) { return side * (side + 1) / 2; }

// ---- where things lie

struct Sizes {
  int runs, blocks, prompts, width, k;
  bool layerwise, code;
  __host__ __device__ int pairs() const { return blocks - 1; }
  __host__ __device__ int groups() const { return layerwise ? pairs() : 1; }
  __host__ __device__ int stack() const { return layerwise ? blocks : 1; }  // operators kept a run
  // rows that meet the same operator, as now-states and as points of V
  __host__ __device__ int now_rows() const { return (layerwise ? 1 : pairs()) * prompts; }
  __host__ __device__ Index square() const { return Index(k) * k; }
  // first row of (run, operator): of the (R, J, P) states, of (R, m, P), and twice that of (R, m, 2P)
  __device__ Index first_state(int run, int group) const {
    return (Index(run) * blocks + group) * prompts;
  }
  __device__ Index first_pair_row(int run, int group) const {
    return (Index(run) * pairs() + group) * prompts;
  }
  __device__ const float* matrix(const float* stack_of, int run, int group) const {
    return stack_of + (Index(run) * stack() + group) * square();
  }
  // row of `states` that is point `row` of V among the points of (run, group); code: the later
  // state of a pair is its prediction, which lies elsewhere
  __device__ void point(int row, int& pair_row, bool& later) const {
    const int pair = row / (2 * prompts), within = row % (2 * prompts);
    later = within < prompts;
    pair_row = pair * prompts + (later ? within : within - prompts);
  }
};

struct Points {
  const float* states;     // of the first pair of this operator
  const float* predicted;  // likewise
  Sizes n;
  __device__ float operator()(int row, int column) const {
    int at;
    bool later;
    n.point(row, at, later);
    if (!later) return states[Index(at) * n.k + column];
    if (n.code) return predicted[Index(at) * n.k + column];
    return states[(Index(at) + n.prompts) * n.k + column];
  }
};

// ---- the spectral norm

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
  __host__ __device__ Index sums() const { return 2 * Index(tiles > square_tiles ? tiles : square_tiles); }
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
__device__ void split_identity(Scratch<TILE>& scratch, const float* L, const Spectral& at, int tile) {
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
__global__ void __launch_bounds__(kThreads) koopman_square_kernel(Spectral all, int q) {
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
      if (threadIdx.x < 2) at.sums_of(q)[2 * tile + threadIdx.x] = 0.0f;  // the next launch reads it
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
    v[i] = X[Index(column) * k + i] / best;  // entries of 1 / k and less: their squares might vanish
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

// ---- forward

struct Forward {
  Sizes n;
  Spectral spectral;
  const float *prompts, *lift, *K, *L;
  float *consistency, *lyapunov;
  float *states, *predicted, *images, *pull, *radial, *spin, *left, *right, *statistics;
  // sums over chunks of a row: (R, J, P, chunks), (R, m, P, chunks), (R, m, 2P, chunks)
  float *state_squares, *predicted_squares, *image_squares;
  float* error_squares;  // (R, tiles of a run)
  int chunks, error_tiles;
  bool gauge;
  float eps;
};

// Sum over the columns of one row that lie in a tile, by the warp that visits them.
template <int TILE>
__device__ __forceinline__ void store_row_sum(float* sums, int chunks, Index row, int column, float x,
                                              bool inside) {
  constexpr int kChunk = Tiling<TILE>::kChunk;
  x = warp_sum<kChunk>(x);
  if (inside && column % kChunk == 0) sums[row * chunks + column / kChunk] = x;
}

// Launch 1: a tile of states.
template <int TILE>
__device__ void lift_tile(Scratch<TILE>& scratch, float (&mean)[TILE], float (&rstd)[TILE],
                          const Forward& p, int run, int tile) {
  const Sizes& n = p.n;
  const int rows = n.blocks * n.prompts, width = n.width;
  const TileAt corner = tile_at<TILE>(tile, ceil_div(n.k, TILE));
  const float* prompts = p.prompts + Index(run) * rows * width;
  const float* lift = p.lift + Index(run) * n.k * width;
  if (p.gauge) {
    for (int r = threadIdx.x / kWarp; r < TILE; r += kWarps) {
      const int row = corner.row + r, lane = threadIdx.x % kWarp;
      float sum = 0, squares = 0;
      const float* x = prompts + Index(row) * width;
      if (row < rows)
        for (int d = lane; d < width; d += kWarp) sum += x[d];
      const float centre = warp_sum(sum) / width;
      if (row < rows)
        for (int d = lane; d < width; d += kWarp) squares += (x[d] - centre) * (x[d] - centre);
      const float scale = 1.0f / sqrtf(warp_sum(squares) / width + p.eps);
      if (lane == 0) {
        mean[r] = centre;
        rstd[r] = scale;
        if (row < rows && corner.column == 0) {
          p.statistics[2 * (Index(run) * rows + row)] = centre;
          p.statistics[2 * (Index(run) * rows + row) + 1] = scale;
        }
      }
    }
    __syncthreads();
  }
  multiply<TILE, true, true>(
      scratch, width,
      [&](int i, int d) {
        if (corner.row + i >= rows) return 0.0f;
        const float x = prompts[Index(corner.row + i) * width + d];
        return p.gauge ? (x - mean[i]) * rstd[i] : x;
      },
      [&](int d, int j) {
        return corner.column + j < n.k ? lift[Index(corner.column + j) * width + d] : 0.0f;
      });
  visit_entries<TILE>(scratch, [&](int i, int j, float x) {
    i += corner.row, j += corner.column;
    const bool inside = i < rows && j < n.k;
    if (inside) p.states[(Index(run) * rows + i) * n.k + j] = x;
    store_row_sum<TILE>(p.state_squares, p.chunks, Index(run) * rows + i, j, inside ? x * x : 0.0f,
                        inside);
  });
}

template <int TILE>
__global__ void __launch_bounds__(kThreads) koopman_lift_kernel(Forward p, int lift_tiles) {
  PAE_SHARED(Scratch<TILE>, scratch, );
  PAE_SHARED(float, mean, [TILE]);
  PAE_SHARED(float, rstd, [TILE]);
  const int block = blockIdx.x - lift_tiles;
  if (block < 0) {
    const int tiles = lift_tiles / p.n.runs;
    lift_tile<TILE>(scratch, mean, rstd, p, blockIdx.x / tiles, blockIdx.x % tiles);
  } else {
    const int matrix = block / p.spectral.scale_parts, groups = p.n.groups();
    measure_scale(p.n.matrix(p.L, matrix / groups, matrix % groups), p.spectral.of(matrix),
                  block % p.spectral.scale_parts);
  }
}

// Launch 2: a tile of predicted states.
template <int TILE>
__device__ void predict_tile(Scratch<TILE>& scratch, const Forward& p, int run, int group, int tile) {
  const Sizes& n = p.n;
  const int rows = n.now_rows(), k = n.k;
  const TileAt corner = tile_at<TILE>(tile, ceil_div(k, TILE));
  const float* now = p.states + n.first_state(run, group) * k;
  const float* K = n.matrix(p.K, run, group);
  const Index first = n.first_pair_row(run, group);
  multiply<TILE, true, false>(
      scratch, k,
      [&](int i, int d) {
        return corner.row + i < rows ? now[Index(corner.row + i) * k + d] : 0.0f;
      },
      [&](int d, int j) { return corner.column + j < k ? K[Index(d) * k + corner.column + j] : 0.0f; });
  float squares = 0;
  visit_entries<TILE>(scratch, [&](int i, int j, float x) {
    i += corner.row, j += corner.column;
    const bool inside = i < rows && j < k;
    if (inside) {
      p.predicted[(first + i) * k + j] = x;
      const float error = x - now[(Index(i) + n.prompts) * k + j];
      squares += error * error;
    }
    store_row_sum<TILE>(p.predicted_squares, p.chunks, first + i, j, inside ? x * x : 0.0f, inside);
  });
  squares = block_sum<kThreads>(squares);
  const int tiles = p.error_tiles / n.groups();
  if (threadIdx.x == 0)
    p.error_squares[Index(run) * p.error_tiles + group * tiles + tile] = squares;
}

template <int TILE>
__global__ void __launch_bounds__(kThreads) koopman_predict_kernel(Forward p, int predict_tiles) {
  PAE_SHARED(Scratch<TILE>, scratch, );
  const int groups = p.n.groups(), block = blockIdx.x - predict_tiles;
  if (block < 0) {
    const int tiles = p.error_tiles / groups, batch = blockIdx.x / tiles;
    predict_tile<TILE>(scratch, p, batch / groups, batch % groups, blockIdx.x % tiles);
  } else {
    const int matrix = block / p.spectral.tiles;
    split_identity<TILE>(scratch, p.n.matrix(p.L, matrix / groups, matrix % groups),
                         p.spectral.of(matrix), block % p.spectral.tiles);
  }
}

// Launch 3: a tile of images.
template <int TILE>
__device__ void image_tile(Scratch<TILE>& scratch, const Forward& p, int run, int group, int tile) {
  const Sizes& n = p.n;
  const int rows = 2 * n.now_rows(), k = n.k;
  const TileAt corner = tile_at<TILE>(tile, ceil_div(k, TILE));
  const Index first = n.first_pair_row(run, group);
  const Points points = {p.states + n.first_state(run, group) * k, p.predicted + first * k, n};
  const float* L = n.matrix(p.L, run, group);
  const float unit =
      n.code ? p.spectral.of(Index(run) * n.groups() + group).read().unit : 1.0f;
  const float inverse = 1.0f / unit;
  multiply<TILE, true, true>(
      scratch, k,
      [&](int i, int d) { return corner.row + i < rows ? points(corner.row + i, d) : 0.0f; },
      [&](int d, int j) {
        return corner.column + j < k ? L[Index(corner.column + j) * k + d] * inverse : 0.0f;
      });
  visit_entries<TILE>(scratch, [&](int i, int j, float x) {
    i += corner.row, j += corner.column;
    const bool inside = i < rows && j < k;
    if (inside) p.images[(2 * first + i) * k + j] = x;
    store_row_sum<TILE>(p.image_squares, p.chunks, 2 * first + i, j, inside ? x * x : 0.0f, inside);
  });
}

template <int TILE>
__global__ void __launch_bounds__(kThreads, TILE == 64 ? 1 : 2)
    koopman_image_kernel(Forward p, int image_tiles) {
  PAE_SHARED(Scratch<TILE>, scratch, );
  const int groups = p.n.groups(), block = blockIdx.x - image_tiles;
  if (block < 0) {
    const int tiles = image_tiles / (p.n.runs * groups), batch = blockIdx.x / tiles;
    image_tile<TILE>(scratch, p, batch / groups, batch % groups, blockIdx.x % tiles);
  } else {
    square_spread<TILE>(scratch, p.spectral.of(block / p.spectral.tiles), block % p.spectral.tiles);
  }
}

// Launch 28: one block a run, a warp takes pairs in turn.
struct Energy {
  float length, norm, value;
};

__device__ __forceinline__ float sum_chunks(const float* sums, int chunks) {
  float sum = 0;
  for (int c = 0; c < chunks; ++c) sum += sums[c];
  return sum;
}

constexpr int kFinishThreads = 512;

__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

__global__ void __launch_bounds__(kFinishThreads) koopman_finish_kernel(Forward p) {
  const Sizes& n = p.n;
  const int run = blockIdx.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int pairs = n.pairs(), groups = n.groups(), P = n.prompts, chunks = p.chunks;
  const bool code = n.code;
  float lyapunov = 0, flow_of_run = 0, gain = 0;
  for (int j = warp; j < pairs; j += kFinishThreads / kWarp) {
    const int group = n.layerwise ? j : 0, matrix = run * groups + group;
    // V = weight |image|^2 / length^2; over = weight / unit has no range of its own to lose
    float over = 1, weight = 1;
    if (code) {
      const Spectral at = p.spectral.of(matrix);
      const float* image = at.image();
      float squares = 0;
      for (int i = lane; i < n.k; i += kWarp) squares = fmaf(image[i], image[i], squares);
      const float stretch = sqrtf(warp_sum(squares)), unit = at.read().unit;
      // no sigma^2 and no division by sigma = 0: right wherever L z itself is finite
      const float sigma = unit == unit ? fmaxf(stretch * unit, kTiny) : unit;
      gain = 1.0f / (sigma + kEps / sigma);
      over = gain / (sigma / unit);
      weight = over * unit;
      if (j == group)
        for (int i = lane; i < n.k; i += kWarp)
          p.left[Index(matrix) * n.k + i] = image[i] / fmaxf(stretch, kTiny);
    }
    const Index first = (Index(run) * pairs + j) * P;
    const float* state_squares = p.state_squares + (Index(run) * n.blocks + j) * P * chunks;
    auto energy = [&](int t, bool later) {
      const Index row = 2 * first + (later ? 0 : P) + t;
      Energy e = {1, 0, 0};
      if (code) {
        e.norm = sqrtf(sum_chunks(later ? p.predicted_squares + (first + t) * chunks
                                        : state_squares + Index(t) * chunks, chunks));
        e.length = fmaxf(e.norm + kEps, 1.0f);
      }
      e.value = sum_chunks(p.image_squares + row * chunks, chunks) * weight / (e.length * e.length);
      return e;
    };
    float total = 0;
    for (int t = lane; t < P; t += kWarp) {
      const float rise = energy(t, true).value - energy(t, false).value;
      total += code ? softplus(rise) : rise;
    }
    total = warp_sum(total);
    float outer;  // d lyapunov / d (softplus of) a rise
    if (code) {
      const float saturated = tanhf(total / P / kCeiling);
      lyapunov += kCeiling * saturated;
      outer = (1 - saturated * saturated) / P;
    } else {
      lyapunov += total > 0 || total != total ? total : 0.0f;
      outer = total > 0 ? 1.0f : 0.0f;
    }
    float flow = 0;
    for (int t = lane; t < P; t += kWarp) {
      const Energy later = energy(t, true), now = energy(t, false);
      const float slope = code ? outer / (1 + expf(now.value - later.value)) : outer;
      flow += slope * (later.value - now.value);
      for (int h = 0; h < 2; ++h) {
        const Energy& e = h == 0 ? later : now;
        const float signed_slope = h == 0 ? slope : -slope;
        const Index row = 2 * first + h * P + t;
        p.pull[row] = 2 * signed_slope * over / (e.length * e.length);
        p.radial[row] =
            code && e.norm + kEps > 1 ? 2 * signed_slope * e.value / (e.norm * e.length) : 0.0f;
      }
    }
    flow = warp_sum(flow);
    flow_of_run += flow;
    if (code && n.layerwise && lane == 0) p.spin[matrix] = -2 * flow * gain;
  }
  // every lane of a warp holds its sums: one lane speaks for it
  const bool speaks = lane == 0;
  lyapunov = block_sum<kFinishThreads>(speaks ? lyapunov : 0.0f);
  flow_of_run = block_sum<kFinishThreads>(speaks ? flow_of_run : 0.0f);
  float squares = 0;
  for (int i = threadIdx.x; i < p.error_tiles; i += kFinishThreads)
    squares += p.error_squares[Index(run) * p.error_tiles + i];
  squares = block_sum<kFinishThreads>(squares);
  if (threadIdx.x == 0) {
    p.consistency[run] = code ? squares / (float(P) * n.k) : squares;
    p.lyapunov[run] = lyapunov;
    if (code && !n.layerwise) p.spin[run] = -2 * flow_of_run * gain;
  }
}

// ---- backward

struct Backward {
  Sizes n;
  const float *d_consistency, *d_lyapunov;
  const float *prompts, *lift, *K, *L;
  const float *states, *predicted, *images, *pull, *radial, *spin, *left, *right, *statistics;
  float *d_prompts, *d_lift, *d_K, *d_L;
  float *d_states;  // (R, J, P, k)
  // (R, m, 2P, k): of the later half d predicted, all of it ("paper": d of the actual later state,
  // without the error's); of the other half d now, without what passes through K
  float* d_points;
  bool gauge;

  // of the error of a pair, d consistency / d error = error_weight error
  __device__ float error_weight(int run) const {
    const float weight = 2 * d_consistency[run];
    return n.code ? weight / (float(n.prompts) * n.k) : weight;
  }
};

// Launch 1: a tile of d_points.
template <int TILE>
__global__ void __launch_bounds__(kThreads) koopman_bwd_points_kernel(Backward p) {
  PAE_SHARED(Scratch<TILE>, scratch, );
  const Sizes& n = p.n;
  const int groups = n.groups(), run = blockIdx.y / groups, group = blockIdx.y % groups;
  const int rows = 2 * n.now_rows(), k = n.k;
  const TileAt corner = tile_at<TILE>(blockIdx.x, ceil_div(k, TILE));
  const Index first = n.first_pair_row(run, group);
  const float* states = p.states + n.first_state(run, group) * k;
  const float* predicted = p.predicted + first * k;
  const float* images = p.images + 2 * first * k;
  const float* pull = p.pull + 2 * first;
  const float* L = n.matrix(p.L, run, group);
  const float d_lyapunov = p.d_lyapunov[run], error_weight = p.error_weight(run);
  multiply<TILE, true, false>(
      scratch, k,
      [&](int i, int d) {
        i += corner.row;
        return i < rows ? images[Index(i) * k + d] * (d_lyapunov * pull[i]) : 0.0f;
      },
      [&](int d, int j) { return corner.column + j < k ? L[Index(d) * k + corner.column + j] : 0.0f; });
  const Points points = {states, predicted, n};
  visit_entries<TILE>(scratch, [&](int i, int j, float x) {
    i += corner.row, j += corner.column;
    if (i >= rows || j >= k) return;
    x -= d_lyapunov * p.radial[2 * first + i] * points(i, j);
    int at;
    bool later;
    n.point(i, at, later);
    if (later && n.code) {
      const Index e = Index(at) * k + j;
      x += error_weight * (predicted[e] - states[e + Index(n.prompts) * k]);
    }
    p.d_points[(2 * first + i) * k + j] = x;
  });
}

// d predicted of the pairs of one operator, as it is read.
struct DPredicted {
  const float* d_points;
  const float* predicted;
  const float* states;
  Sizes n;
  float error_weight;
  __device__ DPredicted(const Backward& p, int run, int group)
      : d_points(p.d_points + 2 * p.n.first_pair_row(run, group) * p.n.k),
        predicted(p.predicted + p.n.first_pair_row(run, group) * p.n.k),
        states(p.states + p.n.first_state(run, group) * p.n.k),
        n(p.n),
        error_weight(p.error_weight(run)) {}
  __device__ float operator()(int row, int column) const {
    if (n.code) {
      const int pair = row / n.prompts;
      return d_points[(Index(row) + Index(pair) * n.prompts) * n.k + column];
    }
    const Index e = Index(row) * n.k + column;
    return error_weight * (predicted[e] - states[e + Index(n.prompts) * n.k]);
  }
};

// Launch 2: a tile of d_states. In "layerwise" the rows of one block meet one operator.
template <int TILE>
__global__ void __launch_bounds__(kThreads) koopman_bwd_states_kernel(Backward p) {
  PAE_SHARED(Scratch<TILE>, scratch, );
  const Sizes& n = p.n;
  const int stack = n.stack(), run = blockIdx.y / stack, group = blockIdx.y % stack;
  const int P = n.prompts, k = n.k, rows = (n.layerwise ? 1 : n.blocks) * P;
  const int with_pair = n.layerwise && group == n.pairs() ? 0 : n.now_rows();
  const TileAt corner = tile_at<TILE>(blockIdx.x, ceil_div(k, TILE));
  const DPredicted d_predicted(p, run, group);
  const float* K = n.matrix(p.K, run, group);
  multiply<TILE, true, true>(
      scratch, k,
      [&](int i, int d) {
        return corner.row + i < with_pair ? d_predicted(corner.row + i, d) : 0.0f;
      },
      [&](int d, int j) {
        return with_pair && corner.column + j < k ? K[Index(corner.column + j) * k + d] : 0.0f;
      });
  const float error_weight = p.error_weight(run);
  visit_entries<TILE>(scratch, [&](int i, int j, float x) {
    i += corner.row, j += corner.column;
    if (i >= rows || j >= k) return;
    const int block = group + i / P, t = i % P;  // group is 0 for global operators
    const Index pair = Index(run) * n.pairs() + block;
    if (block < n.pairs()) x += p.d_points[((2 * pair + 1) * P + t) * k + j];
    if (block > 0) {
      const Index row = ((pair - 1) * P + t) * k + j;
      const Index state = ((Index(run) * n.blocks + block) * P + t) * k + j;
      x -= error_weight * (p.predicted[row] - p.states[state]);
      if (!n.code) x += p.d_points[(2 * (pair - 1) * P + t) * k + j];
    }
    p.d_states[((Index(run) * n.blocks + block) * P + t) * k + j] = x;
  });
}

// Prompt rows as they were lifted.
struct Rows {
  const float* prompts;
  const float* statistics;
  int width;
  bool gauge;
  __device__ Rows(const Backward& p, int run)
      : prompts(p.prompts + Index(run) * p.n.blocks * p.n.prompts * p.n.width),
        statistics(p.gauge ? p.statistics + 2 * Index(run) * p.n.blocks * p.n.prompts : nullptr),
        width(p.n.width),
        gauge(p.gauge) {}
  __device__ float operator()(int row, int column) const {
    const float x = prompts[Index(row) * width + column];
    return gauge ? (x - statistics[2 * row]) * statistics[2 * row + 1] : x;
  }
};

// Launch 3, first role: a tile of d_prompts (before LayerNorm's backward).
template <int TILE>
__device__ void prompt_gradient(Scratch<TILE>& scratch, const Backward& p, int run, int tile) {
  const Sizes& n = p.n;
  const int rows = n.blocks * n.prompts, k = n.k, width = n.width;
  const TileAt corner = tile_at<TILE>(tile, ceil_div(width, TILE));
  const float* d_states = p.d_states + Index(run) * rows * k;
  const float* lift = p.lift + Index(run) * k * width;
  multiply<TILE, true, false>(
      scratch, k,
      [&](int i, int d) {
        return corner.row + i < rows ? d_states[Index(corner.row + i) * k + d] : 0.0f;
      },
      [&](int d, int j) {
        return corner.column + j < width ? lift[Index(d) * width + corner.column + j] : 0.0f;
      });
  visit_entries<TILE>(scratch, [&](int i, int j, float x) {
    i += corner.row, j += corner.column;
    if (i < rows && j < width) p.d_prompts[(Index(run) * rows + i) * width + j] = x;
  });
}

// Second role: a tile of d_lift.
template <int TILE>
__device__ void lift_gradient(Scratch<TILE>& scratch, const Backward& p, int run, int tile) {
  const Sizes& n = p.n;
  const int rows = n.blocks * n.prompts, k = n.k, width = n.width;
  const TileAt corner = tile_at<TILE>(tile, ceil_div(width, TILE));
  const float* d_states = p.d_states + Index(run) * rows * k;
  const Rows lifted(p, run);
  multiply<TILE, false, false>(
      scratch, rows,
      [&](int i, int d) { return corner.row + i < k ? d_states[Index(d) * k + corner.row + i] : 0.0f; },
      [&](int d, int j) { return corner.column + j < width ? lifted(d, corner.column + j) : 0.0f; });
  visit_entries<TILE>(scratch, [&](int i, int j, float x) {
    i += corner.row, j += corner.column;
    if (i < k && j < width) p.d_lift[(Index(run) * k + i) * width + j] = x;
  });
}

// Third role: a tile of d_K; zeros for the layerwise operator that belongs to no pair.
template <int TILE>
__device__ void koopman_gradient(Scratch<TILE>& scratch, const Backward& p, int run, int group,
                                 int tile) {
  const Sizes& n = p.n;
  const int k = n.k, rows = n.layerwise && group == n.pairs() ? 0 : n.now_rows();
  const TileAt corner = tile_at<TILE>(tile, ceil_div(k, TILE));
  const float* now = p.states + n.first_state(run, group) * k;
  const DPredicted d_predicted(p, run, group);
  multiply<TILE, false, false>(
      scratch, rows,
      [&](int i, int d) { return corner.row + i < k ? now[Index(d) * k + corner.row + i] : 0.0f; },
      [&](int d, int j) { return corner.column + j < k ? d_predicted(d, corner.column + j) : 0.0f; });
  visit_entries<TILE>(scratch, [&](int i, int j, float x) {
    i += corner.row, j += corner.column;
    if (i < k && j < k) p.d_K[((Index(run) * n.stack() + group) * k + i) * k + j] = x;
  });
}

// Fourth role: a tile of d_L.
template <int TILE>
__device__ void lyapunov_gradient(Scratch<TILE>& scratch, const Backward& p, int run, int group,
                                  int tile) {
  const Sizes& n = p.n;
  const bool used = !(n.layerwise && group == n.pairs());
  const int k = n.k, rows = used ? 2 * n.now_rows() : 0;
  const TileAt corner = tile_at<TILE>(tile, ceil_div(k, TILE));
  const Index first = n.first_pair_row(run, group);
  const Points points = {p.states + n.first_state(run, group) * k, p.predicted + first * k, n};
  const float* images = p.images + 2 * first * k;
  const float* pull = p.pull + 2 * first;
  const float d_lyapunov = p.d_lyapunov[run];
  multiply<TILE, false, false>(
      scratch, rows,
      [&](int i, int d) {
        i += corner.row;
        return i < k ? images[Index(d) * k + i] * (d_lyapunov * pull[d]) : 0.0f;
      },
      [&](int d, int j) { return corner.column + j < k ? points(d, corner.column + j) : 0.0f; });
  const Index matrix = Index(run) * n.groups() + group;
  const float spin = used ? d_lyapunov * p.spin[matrix] : 0.0f;
  visit_entries<TILE>(scratch, [&](int i, int j, float x) {
    i += corner.row, j += corner.column;
    if (i >= k || j >= k) return;
    if (used) x += spin * p.left[matrix * k + i] * p.right[matrix * k + j];
    p.d_L[((Index(run) * n.stack() + group) * k + i) * k + j] = x;
  });
}

// Tiles of the four roles, per run (and operator), and where each role begins.
struct Roles {
  int prompts, lift, operators;  // tiles of one d_prompts, one d_lift, one d_K or d_L
};

template <int TILE>
__global__ void __launch_bounds__(kThreads) koopman_bwd_inputs_kernel(Backward p, Roles roles) {
  PAE_SHARED(Scratch<TILE>, scratch, );
  const int runs = p.n.runs, stack = p.n.stack();
  int block = blockIdx.x;
  if (block < roles.prompts * runs)
    return prompt_gradient<TILE>(scratch, p, block / roles.prompts, block % roles.prompts);
  block -= roles.prompts * runs;
  if (block < roles.lift * runs)
    return lift_gradient<TILE>(scratch, p, block / roles.lift, block % roles.lift);
  block -= roles.lift * runs;
  const int matrices = runs * stack, tile = block % roles.operators;
  const int matrix = block / roles.operators;
  if (matrix < matrices)
    return koopman_gradient<TILE>(scratch, p, matrix / stack, matrix % stack, tile);
  lyapunov_gradient<TILE>(scratch, p, (matrix - matrices) / stack, (matrix - matrices) % stack, tile);
}

// Launch 4: LayerNorm's backward of d_prompts, in place; one warp a row.
__global__ void __launch_bounds__(kThreads)
    koopman_bwd_gauge_kernel(const float* prompts, const float* statistics, float* d_prompts,
                             Index rows, int width) {
  const Index row = Index(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const bool inside = row < rows;
  const float* x = prompts + row * width;
  float* d = d_prompts + row * width;
  const float mean = inside ? statistics[2 * row] : 0.0f;
  const float rstd = inside ? statistics[2 * row + 1] : 0.0f;
  float sum = 0, along = 0;
  if (inside)
    for (int i = lane; i < width; i += kWarp) {
      sum += d[i];
      along = fmaf(d[i], (x[i] - mean) * rstd, along);
    }
  sum = warp_sum(sum) / width;
  along = warp_sum(along) / width;
  if (inside)
    for (int i = lane; i < width; i += kWarp)
      d[i] = rstd * (d[i] - sum - (x[i] - mean) * rstd * along);
}

// ---- entry points

int tiles_of(Index rows, Index columns, int tile) {
  return int(ceil_div(rows, Index(tile)) * ceil_div(columns, Index(tile)));
}

template <typename Params>
Sizes sizes_of(const Params* p) {
  return {int(p->runs), int(p->blocks), int(p->prompts), int(p->width),
          int(p->k),    p->layerwise != 0, p->code != 0};
}

template <typename Params>
const char* trouble_with(const Params* p) {
  const int64_t most = int64_t(1) << 31;
  if (p->runs < 1 || p->blocks < 2 || p->prompts < 1 || p->width < 1 || p->k < 1)
    return "an empty size, or no pair of blocks";
  if (p->runs * p->blocks >= 1 << 16 || p->blocks * p->prompts * 2 >= most / 64 ||
      p->width >= most / 64 || p->k > 8192)
    return "a size beyond what the kernels count with";
  return nullptr;
}

bool known_tile(int tile) { return tile == 16 || tile == 32 || tile == 64; }

int scale_parts(int64_t k) { return int(k > kScaleParts * 32 ? kScaleParts : ceil_div(k, int64_t(32))); }

Spectral spectral_of(const pae_koopman_fwd_params* p) {
  const int k = int(p->k);
  return {nullptr,
          k,
          scale_parts(k),
          upper_tiles(ceil_div(k, int(p->tile))),
          upper_tiles(ceil_div(k, int(p->square_tile))),
          int(p->squarings),
          p->settled,
          p->settled_first};
}

template <int TILE>
int launch_squarings(const Spectral& spectral, int matrices, void* stream) {
  const dim3 grid(spectral.square_tiles, matrices);
  PAE_LAUNCH((koopman_square_kernel<TILE, true>), grid, kThreads, 0, stream, spectral, 2);
  for (int q = 3; q <= spectral.squarings; ++q)
    PAE_LAUNCH((koopman_square_kernel<TILE, false>), grid, kThreads, 0, stream, spectral, q);
  return PAE_OK;
}

template <int TILE>
int launch_forward(const Forward& p, int square_tile, void* stream) {
  const Sizes& n = p.n;
  const Spectral& spectral = p.spectral;
  const int matrices = n.runs * n.groups();
  const int lift = n.runs * tiles_of(Index(n.blocks) * n.prompts, n.k, TILE);
  const int predict = matrices * tiles_of(n.now_rows(), n.k, TILE);
  const int image = matrices * tiles_of(2 * n.now_rows(), n.k, TILE);
  const int beside = n.code ? matrices : 0;
  PAE_LAUNCH((koopman_lift_kernel<TILE>), lift + beside * spectral.scale_parts, kThreads, 0, stream,
             p, lift);
  PAE_LAUNCH((koopman_predict_kernel<TILE>), predict + beside * spectral.tiles, kThreads, 0, stream,
             p, predict);
  PAE_LAUNCH((koopman_image_kernel<TILE>), image + beside * spectral.tiles, kThreads, 0, stream, p,
             image);
  if (n.code) {
    const int status = square_tile == 16   ? launch_squarings<16>(spectral, matrices, stream)
                       : square_tile == 32 ? launch_squarings<32>(spectral, matrices, stream)
                                           : launch_squarings<64>(spectral, matrices, stream);
    if (status != PAE_OK) return status;
    PAE_LAUNCH(koopman_vector_kernel, dim3(ceil_div(n.k, kImageRows), matrices), kThreads,
               n.k * sizeof(float), stream, spectral, n, p.L, p.right);
  }
  PAE_LAUNCH(koopman_finish_kernel, n.runs, kFinishThreads, 0, stream, p);
  return PAE_OK;
}

template <int TILE>
int launch_backward(const Backward& p, void* stream) {
  const Sizes& n = p.n;
  const Index rows = Index(n.blocks) * n.prompts;
  PAE_LAUNCH((koopman_bwd_points_kernel<TILE>),
             dim3(tiles_of(2 * n.now_rows(), n.k, TILE), n.runs * n.groups()), kThreads, 0, stream,
             p);
  PAE_LAUNCH((koopman_bwd_states_kernel<TILE>),
             dim3(tiles_of(n.layerwise ? n.prompts : rows, n.k, TILE), n.runs * n.stack()), kThreads,
             0, stream, p);
  const Roles roles = {tiles_of(rows, n.width, TILE), tiles_of(n.k, n.width, TILE),
                       tiles_of(n.k, n.k, TILE)};
  const int blocks = n.runs * (roles.prompts + roles.lift + 2 * n.stack() * roles.operators);
  PAE_LAUNCH((koopman_bwd_inputs_kernel<TILE>), blocks, kThreads, 0, stream, p, roles);
  if (p.gauge)
    PAE_LAUNCH(koopman_bwd_gauge_kernel, int(ceil_div(n.runs * rows, Index(kWarps))), kThreads, 0,
               stream, p.prompts, p.statistics, p.d_prompts, n.runs * rows, n.width);
  return PAE_OK;
}

}  // namespace
}  // namespace pae

PAE_DEFINE_SIZEOF(koopman_fwd)
PAE_DEFINE_SIZEOF(koopman_bwd)

namespace pae {
namespace {

// Floats of the parts of the workspace, in their order.
struct Workspace {
  int64_t chunks, error_tiles;
  int64_t state_squares, predicted_squares, image_squares, error_squares, spectral;
  explicit Workspace(const pae_koopman_fwd_params* p) {
    const Sizes n = sizes_of(p);
    const int64_t pair_rows = p->runs * int64_t(n.pairs()) * p->prompts;
    chunks = ceil_div(n.k, p->tile < kWarp ? p->tile : kWarp);
    error_tiles = n.groups() * int64_t(tiles_of(n.now_rows(), n.k, p->tile));
    state_squares = p->runs * p->blocks * p->prompts * chunks;
    predicted_squares = pair_rows * chunks;
    image_squares = 2 * pair_rows * chunks;
    error_squares = p->runs * error_tiles;
    spectral = n.code ? p->runs * n.groups() * spectral_of(p).size() : 0;
  }
  int64_t floats() const {
    return state_squares + predicted_squares + image_squares + error_squares + spectral;
  }
};

int check_forward(const pae_koopman_fwd_params* p) {
  PAE_CHECK_STRUCT(p);
  const char* trouble = trouble_with(p);
  PAE_REQUIRE(trouble == nullptr, "%s", trouble);
  PAE_REQUIRE(known_tile(p->tile) && known_tile(p->square_tile),
              "tiles are %d and %d, expected 16, 32 or 64", p->tile, p->square_tile);
  PAE_REQUIRE(p->squarings >= 3 && p->squarings <= 64, "squarings is %d, expected 3 to 64",
              p->squarings);
  return PAE_OK;
}

}  // namespace
}  // namespace pae

extern "C" PAE_API int pae_koopman_workspace(pae_koopman_fwd_params* p, void*) {
  const int status = pae::check_forward(p);
  if (status == PAE_OK) p->workspace_floats = pae::Workspace(p).floats();
  return status;
}

extern "C" PAE_API int pae_koopman_fwd(const pae_koopman_fwd_params* p, void* stream) {
  using namespace pae;
  const int status = check_forward(p);
  if (status != PAE_OK) return status;
  const Workspace parts(p);
  PAE_REQUIRE(p->workspace_floats >= parts.floats(), "workspace has %lld floats, expected %lld",
              (long long)p->workspace_floats, (long long)parts.floats());
  auto f = [](void* pointer) { return static_cast<float*>(pointer); };
  auto c = [](const void* pointer) { return static_cast<const float*>(pointer); };
  Forward forward = {};
  forward.n = sizes_of(p);
  forward.prompts = c(p->prompts_in), forward.lift = c(p->lift);
  forward.K = c(p->K), forward.L = c(p->L);
  forward.consistency = f(p->consistency), forward.lyapunov = f(p->lyapunov);
  forward.states = f(p->states), forward.predicted = f(p->predicted), forward.images = f(p->images);
  forward.pull = f(p->pull), forward.radial = f(p->radial), forward.spin = f(p->spin);
  forward.left = f(p->left), forward.right = f(p->right), forward.statistics = f(p->statistics);
  forward.state_squares = f(p->workspace);
  forward.predicted_squares = forward.state_squares + parts.state_squares;
  forward.image_squares = forward.predicted_squares + parts.predicted_squares;
  forward.error_squares = forward.image_squares + parts.image_squares;
  forward.spectral = spectral_of(p);
  forward.spectral.workspace = forward.error_squares + parts.error_squares;
  forward.chunks = int(parts.chunks);
  forward.error_tiles = int(parts.error_tiles);
  forward.gauge = p->gauge != 0;
  forward.eps = p->eps;
  return p->tile == 16   ? launch_forward<16>(forward, p->square_tile, stream)
         : p->tile == 32 ? launch_forward<32>(forward, p->square_tile, stream)
                         : launch_forward<64>(forward, p->square_tile, stream);
}

extern "C" PAE_API int pae_koopman_bwd(const pae_koopman_bwd_params* p, void* stream) {
  using namespace pae;
  PAE_CHECK_STRUCT(p);
  const char* trouble = trouble_with(p);
  PAE_REQUIRE(trouble == nullptr, "%s", trouble);
  PAE_REQUIRE(known_tile(p->tile), "tile is %d, expected 16, 32 or 64", p->tile);
  auto f = [](void* pointer) { return static_cast<float*>(pointer); };
  auto c = [](const void* pointer) { return static_cast<const float*>(pointer); };
  Backward backward = {};
  backward.n = sizes_of(p);
  backward.d_consistency = c(p->d_consistency), backward.d_lyapunov = c(p->d_lyapunov);
  backward.prompts = c(p->prompts_in), backward.lift = c(p->lift);
  backward.K = c(p->K), backward.L = c(p->L);
  backward.states = c(p->states), backward.predicted = c(p->predicted);
  backward.images = c(p->images), backward.pull = c(p->pull), backward.radial = c(p->radial);
  backward.spin = c(p->spin), backward.left = c(p->left), backward.right = c(p->right);
  backward.statistics = c(p->statistics);
  backward.d_prompts = f(p->d_prompts), backward.d_lift = f(p->d_lift);
  backward.d_K = f(p->d_K), backward.d_L = f(p->d_L);
  backward.d_states = f(p->d_states), backward.d_points = f(p->d_points);
  backward.gauge = p->gauge != 0;
  return p->tile == 16   ? launch_backward<16>(backward, stream)
         : p->tile == 32 ? launch_backward<32>(backward, stream)
                         : launch_backward<64>(backward, stream);
}

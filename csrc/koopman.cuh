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
//   launch  forward                                    beside it, in other blocks of the launch
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
// 28 + 3 launches in "code", 4 + 3 in "paper". At R = 1, 11 blocks x 50 prompts, D = 768, k = 256
// neither operations nor bytes bind them: 0.9 GFLOP forward and 1.5 backward would take 45 us at the
// H200's 60 TFLOP/s, and 8 MB of traffic stay in L2. A chain of dependent launches binds, and in it
// the instructions of the squarings (136 tiles of 16 each, halved by symmetry; at k = 1024 136 tiles
// of 64, 1.1 GFLOP). bench/predictions.py counts those that nvcc made: 0.30 ms in one captured
// graph, 1.4 ms at k = 1024, with 12 squarings active as at spectra of training; 1.5 and 1.4 times
// what it says of the Triton version. It is not measured. Outside of graphs the host binds both.
//
// Not one kernel with a barrier across the grid: the losses run beside a network's forward, where
// no block may count on the others being resident.
#pragma once

#include "common.cuh"

namespace pae {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

typedef long long Index;

// ---- products

template <int TILE>
struct Tiling {
  static constexpr int kMicro = TILE == 64 ? 8 : 4;  // a thread's outputs: kMicro x kMicro
  static constexpr int kSide = TILE / kMicro;        // threads along one side of the tile
  static constexpr int kGroups = kThreads / (kSide * kSide);
  static constexpr int kDepth = TILE == 16 ? 64 : 32;      // of one stage
  static constexpr int kPitch = TILE + 4;                  // keeps rows aligned to 16 bytes
  static constexpr int kSlots = TILE == 64 ? 1 : kGroups;  // sums of groups kept apart
  static constexpr int kFetch = TILE * kDepth / kThreads;  // entries a thread fetches per stage
  static constexpr int kEntries = TILE * TILE / kThreads;  // of the output, per thread
  static constexpr int kResident = TILE == 64 ? 1 : 2;  // blocks that find registers side by side
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
  // first row of (run, operator): of the (R, J, P) states, of (R, m, P), and half of (R, m, 2P)'s
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

// ---- launches

inline int tiles_of(Index rows, Index columns, int tile) {
  return int(ceil_div(rows, Index(tile)) * ceil_div(columns, Index(tile)));
}

template <typename Params>
Sizes sizes_of(const Params* p) {
  return {int(p->runs), int(p->blocks),    int(p->prompts), int(p->width),
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

inline bool known_tile(int tile) { return tile == 16 || tile == 32 || tile == 64; }

}  // namespace
}  // namespace pae

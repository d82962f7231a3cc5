// Koopman and Lyapunov losses, forward; koopman.cuh says what is launched and what it costs.
#include "koopman_spectral.cuh"

namespace pae {
namespace {

constexpr float kEps = 1e-8f;
constexpr float kCeiling = 10.0f;
constexpr float kTiny = 1.17549435e-38f;

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
__device__ __forceinline__ void store_row_sum(float* sums, int chunks, Index row, int column,
                                              float x, bool inside) {
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
__global__ void __launch_bounds__(kThreads, Tiling<TILE>::kResident)
    koopman_lift_kernel(Forward p, int lift_tiles) {
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
__device__ void predict_tile(Scratch<TILE>& scratch, const Forward& p, int run, int group,
                             int tile) {
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
      [&](int d, int j) {
        return corner.column + j < k ? K[Index(d) * k + corner.column + j] : 0.0f;
      });
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
__global__ void __launch_bounds__(kThreads, Tiling<TILE>::kResident)
    koopman_predict_kernel(Forward p, int predict_tiles) {
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
  const float unit = n.code ? p.spectral.of(Index(run) * n.groups() + group).read().unit : 1.0f;
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
__global__ void __launch_bounds__(kThreads, Tiling<TILE>::kResident)
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

__device__ __forceinline__ float softplus(float x) {
  return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)));
}

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
      const float spread = read_sums(at.sums_of(0), at.tiles).first;
      if (j == group && lane == 0)
        p.spin[2 * matrix + 1] = inverse_spread(spread) == 0.0f ? 1.0f / (sigma * n.k) : 0.0f;
    }
    const Index first = (Index(run) * pairs + j) * P;
    const float* state_squares = p.state_squares + (Index(run) * n.blocks + j) * P * chunks;
    auto energy = [&](int t, bool later) {
      const Index row = 2 * first + (later ? 0 : P) + t;
      Energy e = {1, 0, 0};
      if (code) {
        e.norm = sqrtf(sum_chunks(
            later ? p.predicted_squares + (first + t) * chunks : state_squares + Index(t) * chunks,
            chunks));
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
    if (code && n.layerwise && lane == 0) p.spin[2 * matrix] = -2 * flow * gain;
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
    if (code && !n.layerwise) p.spin[2 * run] = -2 * flow_of_run * gain;
  }
}

// ---- entry points

int scale_parts(int k) { return k > kScaleParts * 32 ? kScaleParts : ceil_div(k, 32); }

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

}  // namespace
}  // namespace pae

PAE_DEFINE_SIZEOF(koopman_fwd)

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

// Koopman and Lyapunov losses, backward; koopman.cuh says what is launched and what it costs.
#include "koopman.cuh"

namespace pae {
namespace {

struct Backward {
  Sizes n;
  const float *d_consistency, *d_lyapunov;
  const float *prompts, *lift, *K, *L;
  const float *states, *predicted, *images, *pull, *radial, *spin, *left, *right, *statistics;
  float *d_prompts, *d_lift, *d_K, *d_L;
  float* d_states;  // (R, J, P, k)
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
__global__ void __launch_bounds__(kThreads, Tiling<TILE>::kResident)
    koopman_bwd_points_kernel(Backward p) {
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
      [&](int d, int j) {
        return corner.column + j < k ? L[Index(d) * k + corner.column + j] : 0.0f;
      });
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
__global__ void __launch_bounds__(kThreads, Tiling<TILE>::kResident)
    koopman_bwd_states_kernel(Backward p) {
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
      [&](int i, int d) {
        return corner.row + i < k ? d_states[Index(d) * k + corner.row + i] : 0.0f;
      },
      [&](int d, int j) {
        return corner.column + j < width ? lifted(d, corner.column + j) : 0.0f;
      });
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
      [&](int d, int j) {
        return corner.column + j < k ? d_predicted(d, corner.column + j) : 0.0f;
      });
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
  // The two rows of a prompt enter by their differences, as in the reference: exactly 0 where the
  // operators change nothing. No sum is written as a product and its opposite, because a fused
  // multiply-add would round only one of them.
  multiply<TILE, false, false>(
      scratch, rows,
      [&](int i, int d) {
        i += corner.row;
        if (i >= k) return 0.0f;
        const float image = images[Index(d) * k + i];
        if (d % (2 * n.prompts) < n.prompts) return image * (d_lyapunov * pull[d]);
        const float later = images[Index(d - n.prompts) * k + i];
        return later * (d_lyapunov * (pull[d - n.prompts] + pull[d])) +
               (image - later) * (d_lyapunov * pull[d]);
      },
      [&](int d, int j) {
        j += corner.column;
        if (j >= k) return 0.0f;
        const bool later = d % (2 * n.prompts) < n.prompts;
        return points(d, j) - (later ? points(d + n.prompts, j) : 0.0f);
      });
  const Index matrix = Index(run) * n.groups() + group;
  const float spin = used ? d_lyapunov * p.spin[2 * matrix] : 0.0f;
  const float level = used ? p.spin[2 * matrix + 1] : 0.0f;
  const float* L = n.matrix(p.L, run, group);
  visit_entries<TILE>(scratch, [&](int i, int j, float x) {
    i += corner.row, j += corner.column;
    if (i >= k || j >= k) return;
    if (used)
      x += spin * (level > 0 ? level * L[Index(i) * k + j]
                             : p.left[matrix * k + i] * p.right[matrix * k + j]);
    p.d_L[((Index(run) * n.stack() + group) * k + i) * k + j] = x;
  });
}

// Tiles of the four roles, per run (and operator), and where each role begins.
struct Roles {
  int prompts, lift, operators;  // tiles of one d_prompts, one d_lift, one d_K or d_L
};

template <int TILE>
__global__ void __launch_bounds__(kThreads, Tiling<TILE>::kResident)
    koopman_bwd_inputs_kernel(Backward p, Roles roles) {
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
  int matrix = block / roles.operators;
  if (matrix < matrices)
    return koopman_gradient<TILE>(scratch, p, matrix / stack, matrix % stack, tile);
  matrix -= matrices;
  lyapunov_gradient<TILE>(scratch, p, matrix / stack, matrix % stack, tile);
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

// ---- entry point

template <int TILE>
int launch_states(const Backward& p, void* stream) {
  const Sizes& n = p.n;
  const Index rows = Index(n.layerwise ? 1 : n.blocks) * n.prompts;
  PAE_LAUNCH((koopman_bwd_points_kernel<TILE>),
             dim3(tiles_of(2 * n.now_rows(), n.k, TILE), n.runs * n.groups()), kThreads, 0, stream,
             p);
  PAE_LAUNCH((koopman_bwd_states_kernel<TILE>), dim3(tiles_of(rows, n.k, TILE), n.runs * n.stack()),
             kThreads, 0, stream, p);
  return PAE_OK;
}

template <int TILE>
int launch_inputs(const Backward& p, void* stream) {
  const Sizes& n = p.n;
  const Index rows = Index(n.blocks) * n.prompts;
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

PAE_DEFINE_SIZEOF(koopman_bwd)

extern "C" PAE_API int pae_koopman_bwd(const pae_koopman_bwd_params* p, void* stream) {
  using namespace pae;
  PAE_CHECK_STRUCT(p);
  const char* trouble = trouble_with(p);
  PAE_REQUIRE(trouble == nullptr, "%s", trouble);
  PAE_REQUIRE(known_tile(p->tile) && known_tile(p->input_tile),
              "tiles are %d and %d, expected 16, 32 or 64", p->tile, p->input_tile);
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
  const int status = p->tile == 16   ? launch_states<16>(backward, stream)
                     : p->tile == 32 ? launch_states<32>(backward, stream)
                                     : launch_states<64>(backward, stream);
  if (status != PAE_OK) return status;
  return p->input_tile == 16   ? launch_inputs<16>(backward, stream)
         : p->input_tile == 32 ? launch_inputs<32>(backward, stream)
                               : launch_inputs<64>(backward, stream);
}

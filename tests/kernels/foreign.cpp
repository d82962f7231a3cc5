// A program around the kernels for CPUs, for processors that no Python runs on here: every function
// once, on arrays from stdin. ROWS and WIDTH are given; results go to stdout in the order below.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu.h"

namespace {

constexpr int64_t COUNT = ROWS * WIDTH;

template <typename T>
std::vector<T> taken(size_t count) {
  std::vector<T> array(count);
  if (std::fread(array.data(), sizeof(T), count, stdin) != count) std::exit(2);
  return array;
}

template <typename T>
void give(const std::vector<T>& array) {
  std::fwrite(array.data(), sizeof(T), array.size(), stdout);
}

template <typename Params>
Params made(int32_t threads = 1) {
  Params p = {};
  p.struct_size = sizeof(p);
  p.threads = threads;
  return p;
}

void ended(int status) {
  if (status == PAE_OK) return;
  std::fprintf(stderr, "%s\n", pae_last_error());
  std::exit(1);
}

template <typename T>
void all_of(int32_t type) {
  auto x = taken<T>(COUNT), delta = taken<T>(COUNT), d = taken<T>(COUNT);
  std::vector<T> y(COUNT), xhat(COUNT), dx(COUNT), value(COUNT), slope(COUNT);
  std::vector<float> rstd(ROWS);
  std::vector<uint8_t> code(COUNT);
  auto forward = made<pae_cpu_norm_fwd_params>();
  forward.x_type = forward.delta_type = forward.xhat_type = type;
  forward.eps = 1e-5f;
  forward.rows = ROWS, forward.width = WIDTH;
  forward.x = x.data(), forward.delta = delta.data(), forward.y = y.data();
  forward.xhat = xhat.data(), forward.rstd = rstd.data();
  ended(pae_cpu_norm_fwd(&forward, nullptr));
  auto backward = made<pae_cpu_norm_bwd_params>();
  backward.d_type = backward.xhat_type = backward.residual_type = backward.dx_type = type;
  backward.rows = ROWS, backward.width = WIDTH;
  backward.d = d.data(), backward.xhat = xhat.data(), backward.rstd = rstd.data();
  backward.residual = x.data(), backward.dx = dx.data();
  ended(pae_cpu_norm_bwd(&backward, nullptr));
  give(y), give(xhat), give(rstd), give(dx);
  for (int32_t kind = PAE_GELU; kind <= PAE_RELU; ++kind) {
    auto act = made<pae_cpu_activation_fwd_params>();
    act.type = type, act.kind = kind, act.count = COUNT;
    act.u = x.data(), act.y = value.data(), act.code = code.data();
    ended(pae_cpu_activation_fwd(&act, nullptr));
    auto back = made<pae_cpu_activation_bwd_params>();
    back.type = back.kept_type = type, back.kind = kind, back.count = COUNT;
    back.d = d.data(), back.kept = x.data(), back.du = slope.data();
    ended(pae_cpu_activation_bwd(&back, nullptr));
    give(value), give(slope), give(code);
  }
}

}  // namespace

int main() {
  all_of<float>(PAE_FLOAT32);
  all_of<uint16_t>(PAE_BFLOAT16);
  // one image of ROWS rows, ROWS prompts, two heads
  auto qkv = taken<float>(6 * COUNT), kv = taken<float>(4 * COUNT), d_out = taken<float>(2 * COUNT);
  std::vector<float> out(2 * COUNT), lse(2 * ROWS), d_qkv(6 * COUNT), d_kv(4 * COUNT);
  auto attention = made<pae_cpu_attention_params>();
  attention.scale = 0.3f, attention.batch = attention.sets = attention.images = 1;
  attention.tokens = attention.rows = attention.prompts = ROWS;
  attention.heads = 2, attention.width = WIDTH;
  attention.qkv_row = 6 * WIDTH, attention.kv_row = 4 * WIDTH, attention.d_out_row = 2 * WIDTH;
  attention.qkv_part = attention.kv_part = 2 * WIDTH;
  attention.qkv_head = attention.kv_head = WIDTH;
  attention.qkv = qkv.data(), attention.kv = kv.data(), attention.d_out = d_out.data();
  attention.out = out.data(), attention.lse = lse.data();
  attention.d_qkv = d_qkv.data(), attention.d_kv = d_kv.data();
  ended(pae_cpu_attention_fwd(&attention, nullptr));
  ended(pae_cpu_attention_bwd(&attention, nullptr));
  give(out), give(lse), give(d_qkv), give(d_kv);
  auto matrix = taken<float>(WIDTH * WIDTH), start = taken<float>(WIDTH);
  std::vector<float> vector(WIDTH), value(1), residual(1), size(1), room((WIDTH + 1) * WIDTH);
  std::vector<int32_t> steps(1);
  auto eigen = made<pae_cpu_eigenvector_params>();
  eigen.steps = WIDTH, eigen.tolerance = 2.4e-7f, eigen.count = 1, eigen.width = WIDTH;
  eigen.matrices = matrix.data(), eigen.start = start.data(), eigen.vectors = vector.data();
  eigen.values = value.data(), eigen.residuals = residual.data(), eigen.sizes = size.data();
  eigen.taken = steps.data(), eigen.workspace = room.data();
  ended(pae_cpu_eigenvector(&eigen, nullptr));
  give(vector), give(value), give(residual);
}

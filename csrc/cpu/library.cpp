// The C interface: checks, the instruction set, and the sharing of rows among threads.

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace pae {
namespace {

thread_local char last_error[512] = "";

int fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof(last_error), format, arguments);
  va_end(arguments);
  return PAE_INVALID_PARAMS;
}

// The widest table that this processor runs, or the one that PAE_CPU_ISA names among those it runs.
const Kernels& choose() {
  const char* most = std::getenv("PAE_CPU_ISA");
  const Kernels* tables[4];
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    if (__builtin_cpu_supports("avx512bf16")) tables[count++] = &avx512_bf16;
    tables[count++] = &avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables[count++] = &avx2;
#endif
  tables[count++] = &portable;
  for (int i = 0; most != nullptr && i < count; ++i)
    if (std::strcmp(tables[i]->name, most) == 0) return *tables[i];
  return *tables[0];
}

// Not a static variable of `kernels`, whose guard would need the C++ runtime. Whoever comes first
// chooses; so do those that come at the same time, and all choose alike.
std::atomic<const Kernels*> chosen{nullptr};

const Kernels& kernels() {
  const Kernels* found = chosen.load(std::memory_order_acquire);
  if (found == nullptr) chosen.store(found = &choose(), std::memory_order_release);
  return *found;
}

std::atomic<pae_cpu_parallel> parallel{nullptr};

// Chunks are taken by whoever is free: which thread works on a row changes nothing in it.
template <typename Params>
struct Work {
  const Params& params;
  void (*function)(const Params&, int64_t, int64_t);
  int64_t count, chunk;
  std::atomic<int64_t> next{0};

  void run() {
    for (;;) {
      const int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
      if (begin >= count) return;
      function(params, begin, begin + chunk < count ? begin + chunk : count);
    }
  }
};

// `size`: entries of one of the `count` units. Below 2^15 entries a thread costs more than it gives.
template <typename Params>
int share(const Params& p, void (*function)(const Params&, int64_t, int64_t), int64_t count,
          int64_t size) {
  constexpr int64_t LEAST = 1 << 15;
  const int64_t useful = (count * size + LEAST - 1) / LEAST;
  int64_t threads = p.threads < useful ? p.threads : useful;
  pae_cpu_parallel start = parallel.load(std::memory_order_acquire);
  if (threads < 2 || start == nullptr) {
    function(p, 0, count);
    return PAE_OK;
  }
  // four chunks a thread: one that is late delays the others by an eighth; whole vectors, so that
  // the last part of one is at the end alone
  int64_t chunk = (count + 4 * threads - 1) / (4 * threads);
  if (size == 1) chunk = (chunk + 63) / 64 * 64;
  Work<Params> work{p, function, count, chunk};
  start([](void* data) { static_cast<Work<Params>*>(data)->run(); }, &work,
        static_cast<unsigned>(threads), 0);
  return PAE_OK;
}

bool is_float(int32_t type) { return type == PAE_FLOAT32 || type == PAE_BFLOAT16; }

// Units of attention, one at a time: each is much work, and every thread has a room for it.
struct Attention {
  const pae_cpu_attention_params& params;
  void (*function)(const pae_cpu_attention_params&, int64_t, float*);
  int64_t units, room;
  float* rooms;
  std::atomic<int64_t> next{0}, taken{0};

  void run() {
    float* own = rooms + taken.fetch_add(1, std::memory_order_relaxed) * room;
    for (;;) {
      const int64_t unit = next.fetch_add(1, std::memory_order_relaxed);
      if (unit >= units) return;
      function(params, unit, own);
    }
  }
};

int attend(const pae_cpu_attention_params& p, bool backward) {
  for (int64_t i = 0; p.group != nullptr && i < p.batch; ++i)
    if (p.group[i] < 0 || p.group[i] >= p.sets)
      return fail("group[%lld] is %lld: there are %lld sets of prompts", static_cast<long long>(i),
                  static_cast<long long>(p.group[i]), static_cast<long long>(p.sets));
  const Kernels& table = kernels();
  const int64_t turns = backward ? (p.batch + p.images - 1) / p.images : p.batch;
  const int64_t units = turns * p.heads, room = table.attention_room(p, backward);
  int64_t threads = p.threads < units ? p.threads : units;
  pae_cpu_parallel start = parallel.load(std::memory_order_acquire);
  if (threads < 1 || start == nullptr) threads = 1;
  void* memory = std::malloc(threads * room * sizeof(float) + 64);
  if (memory == nullptr) return fail("attention: out of memory");
  const uintptr_t aligned = (reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64;
  Attention work{p, backward ? table.attention_bwd : table.attention_fwd, units, room,
                 reinterpret_cast<float*>(aligned)};
  if (threads == 1)
    work.run();
  else
    start([](void* data) { static_cast<Attention*>(data)->run(); }, &work,
          static_cast<unsigned>(threads), 0);
  std::free(memory);
  return PAE_OK;
}

bool is_right(const pae_cpu_attention_params& p) {
  return p.batch >= 0 && p.rows > 0 && p.tokens >= p.rows && p.prompts >= 0 && p.heads > 0 &&
         p.width > 0 && is_float(p.type) && (p.mask == nullptr || p.windows > 0);
}

bool is_right(const pae_cpu_enlarged_params& p) {
  return p.images >= 0 && p.rows > 0 && p.columns > 0 && p.channels > 0 && p.scale > 0 &&
         p.scale <= PAE_CPU_MOST_SCALE;
}

bool is_right(const pae_cpu_pixel_loss_params& p) {
  return p.images >= 0 && p.rows > 0 && p.columns > 0 && p.classes > 0 && p.height > 0 &&
         p.width > 0;
}

}  // namespace
}  // namespace pae

#define PAE_CHECK(p, condition)                                                                \
  do {                                                                                         \
    if ((p) == nullptr || (p)->struct_size != sizeof(*(p)))                                    \
      return pae::fail("%s: the struct has another size than this library's", __func__);       \
    if (!(condition)) return pae::fail("%s: not " #condition, __func__);                       \
  } while (false)

#define PAE_DEFINE_SIZEOF(noun) \
  extern "C" uint32_t pae_sizeof_##noun##_params(void) { return sizeof(pae_##noun##_params); }

extern "C" uint32_t pae_abi_version(void) { return PAE_CPU_ABI_VERSION; }

extern "C" const char* pae_last_error(void) { return pae::last_error; }

extern "C" const char* pae_cpu_isa(void) { return pae::kernels().name; }

extern "C" void pae_cpu_set_parallel(pae_cpu_parallel start) {
  pae::parallel.store(start, std::memory_order_release);
}

extern "C" int pae_cpu_norm_fwd(const pae_cpu_norm_fwd_params* p, void*) {
  PAE_CHECK(p, p->rows >= 0 && p->width > 0);
  PAE_CHECK(p, pae::is_float(p->x_type) && pae::is_float(p->delta_type) &&
                   pae::is_float(p->xhat_type));
  return pae::share(*p, pae::kernels().norm_fwd, p->rows, p->width);
}
PAE_DEFINE_SIZEOF(cpu_norm_fwd)

extern "C" int pae_cpu_norm_bwd(const pae_cpu_norm_bwd_params* p, void*) {
  PAE_CHECK(p, p->rows >= 0 && p->width > 0);
  PAE_CHECK(p, pae::is_float(p->d_type) && pae::is_float(p->xhat_type) &&
                   pae::is_float(p->residual_type) && pae::is_float(p->dx_type) &&
                   pae::is_float(p->copy_type));
  return pae::share(*p, pae::kernels().norm_bwd, p->rows, p->width);
}
PAE_DEFINE_SIZEOF(cpu_norm_bwd)

extern "C" int pae_cpu_activation_fwd(const pae_cpu_activation_fwd_params* p, void*) {
  PAE_CHECK(p, p->count >= 0 && p->kind >= PAE_GELU && p->kind <= PAE_RELU);
  PAE_CHECK(p, pae::is_float(p->type));
  return pae::share(*p, pae::kernels().activation_fwd, p->count, 1);
}
PAE_DEFINE_SIZEOF(cpu_activation_fwd)

extern "C" int pae_cpu_activation_bwd(const pae_cpu_activation_bwd_params* p, void*) {
  PAE_CHECK(p, p->count >= 0 && p->kind >= PAE_GELU && p->kind <= PAE_RELU);
  PAE_CHECK(p, pae::is_float(p->type) &&
                   (pae::is_float(p->kept_type) || p->kept_type == PAE_UINT8));
  return pae::share(*p, pae::kernels().activation_bwd, p->count, 1);
}
PAE_DEFINE_SIZEOF(cpu_activation_bwd)

extern "C" int pae_cpu_gated(const pae_cpu_gated_params* p, void*) {
  PAE_CHECK(p, p->rows >= 0 && p->width > 0 && p->kind >= PAE_GELU && p->kind <= PAE_RELU);
  PAE_CHECK(p, pae::is_float(p->type));
  return pae::share(*p, pae::kernels().gated, p->rows, p->width);
}
PAE_DEFINE_SIZEOF(cpu_gated)

extern "C" int pae_cpu_gated_norm(const pae_cpu_gated_norm_params* p, void*) {
  PAE_CHECK(p, p->rows >= 0 && p->width > 0 && p->kind >= PAE_GELU && p->kind <= PAE_RELU);
  PAE_CHECK(p, pae::is_float(p->type));
  return pae::share(*p, pae::kernels().gated_norm, p->rows, 3 * p->width);
}
PAE_DEFINE_SIZEOF(cpu_gated_norm)

extern "C" int pae_cpu_rotate(const pae_cpu_rotate_params* p, void*) {
  PAE_CHECK(p, p->batch >= 0 && p->count > 0 && p->tokens >= p->count && p->heads > 0);
  PAE_CHECK(p, p->width > 0 && p->width % 2 == 0 && pae::is_float(p->type));
  return pae::share(*p, pae::kernels().rotate, p->batch * p->count, 2 * p->heads * p->width);
}
PAE_DEFINE_SIZEOF(cpu_rotate)

extern "C" int pae_cpu_attention_fwd(const pae_cpu_attention_params* p, void*) {
  PAE_CHECK(p, pae::is_right(*p));
  return pae::attend(*p, false);
}

extern "C" int pae_cpu_attention_bwd(const pae_cpu_attention_params* p, void*) {
  PAE_CHECK(p, pae::is_right(*p) && p->images > 0);
  return pae::attend(*p, true);
}
PAE_DEFINE_SIZEOF(cpu_attention)

extern "C" int pae_cpu_eigenvector(const pae_cpu_eigenvector_params* p, void*) {
  PAE_CHECK(p, p->count >= 0 && p->width > 0 && p->steps > 0 && p->steps <= PAE_CPU_MOST_STEPS);
  return pae::share(*p, pae::kernels().eigenvector, p->count, 32 * p->width * p->width);
}
PAE_DEFINE_SIZEOF(cpu_eigenvector)

extern "C" int pae_cpu_enlarged_fwd(const pae_cpu_enlarged_params* p, void*) {
  PAE_CHECK(p, pae::is_right(*p));
  return pae::share(*p, pae::kernels().enlarged_fwd, p->images * p->rows * p->scale,
                    p->columns * p->scale * p->channels);
}

extern "C" int pae_cpu_enlarged_bwd(const pae_cpu_enlarged_params* p, void*) {
  PAE_CHECK(p, pae::is_right(*p));
  return pae::share(*p, pae::kernels().enlarged_bwd, p->images * p->rows,
                    9 * p->columns * p->channels);
}
PAE_DEFINE_SIZEOF(cpu_enlarged)

extern "C" int pae_cpu_pixel_loss_fwd(const pae_cpu_pixel_loss_params* p, void*) {
  PAE_CHECK(p, pae::is_right(*p));
  return pae::share(*p, pae::kernels().pixel_loss_fwd, p->images * p->height,
                    p->width * p->classes);
}

extern "C" int pae_cpu_pixel_loss_bwd(const pae_cpu_pixel_loss_params* p, void*) {
  PAE_CHECK(p, pae::is_right(*p) && (p->images == 0 || p->d_logits != nullptr));
  return pae::share(*p, pae::kernels().pixel_loss_bwd, p->images * p->rows,
                    p->width * p->height / p->rows * p->classes);
}
PAE_DEFINE_SIZEOF(cpu_pixel_loss)

// The scheduler: a block's threads as fibers, and what they wait for.
//
// A fiber runs until it waits or returns, then the scheduler takes the next one that can go on.
// When nobody can and not all have returned, the block has diverged, and the report says who waits
// where. Nothing is unwound then: fibers are left as they stand, and the next run makes new ones.

#undef _FORTIFY_SOURCE  // whose longjmp refuses to go to another stack
#include "emulation.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kPageBytes = 4096;
constexpr size_t kMarginBytes = 64;
constexpr unsigned char kPoison = 0xff;  // NaN in every float type

enum class State { kReady, kWaiting, kDone };

// ---- fibers

struct Fiber {
  jmp_buf context;
  void* stack = nullptr;
  State state = State::kDone;
  Site waits_at = {};
  unsigned mask = 0;  // of a shuffle or vote; 0 at a barrier of the block

  Fiber() {
    stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) std::abort();
    mprotect(stack, kPageBytes, PROT_NONE);  // an overflow faults instead of writing elsewhere
  }
  ~Fiber() { munmap(stack, kStackBytes); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
};

// ---- one rendezvous of lanes of a warp: every lane hands in a value, all read when all are there

struct Exchange {
  unsigned mask = 0, arrived = 0;
  Site site = {};
  int round = 0;
  unsigned char values[2][32][8];  // of this round and the one before, which some still read
};

struct Array {
  const void* site;
  size_t offset, bytes;
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<int> order;
  jmp_buf scheduler;
  ucontext_t starting;
  int threads = 0, current = 0;
  int done = 0, waiting = 0, count = 0, last_count = 0;
  Site barrier = {};
  std::vector<std::vector<Exchange>> exchanges;  // of each warp, by mask
  alignas(16) unsigned char shared[kSharedBytes + 64 * 1024];
  size_t shared_end = 0, dynamic_bytes = 0;
  std::vector<Array> arrays;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  std::string trouble;
};

Block block;
unsigned order_seed = 0;
std::mutex one_launch_at_a_time;

std::string text(const char* format, ...) {
  char buffer[400];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof(buffer), format, arguments);
  va_end(arguments);
  return buffer;
}

const char* name_of(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash ? slash + 1 : path;
}

std::string says(const Site& site) {
  return text("%s (%s:%d)", site.what, name_of(site.file), site.line);
}

bool same(const Site& a, const Site& b) {
  return a.line == b.line && std::strcmp(a.file, b.file) == 0 && std::strcmp(a.what, b.what) == 0;
}

// ---- switching

void to_scheduler() {
  if (_setjmp(block.fibers[block.current]->context) == 0) _longjmp(block.scheduler, 1);
}

// The fiber that runs does not go on, and neither does the launch.
[[noreturn]] void stop(const std::string& trouble) {
  block.trouble = trouble;
  _longjmp(block.scheduler, 1);
}

void wait(const Site& site, unsigned mask) {
  Fiber& fiber = *block.fibers[block.current];
  fiber.state = State::kWaiting;
  fiber.waits_at = site;
  fiber.mask = mask;
  to_scheduler();
}

// Life of a fiber: one body after another, so that its stack is set up once.
void fiber_main() {
  for (;;) {
    block.body(block.argument);
    block.fibers[block.current]->state = State::kDone;
    ++block.done;
    to_scheduler();
  }
}

void make_fibers(int count) {
  while (int(block.fibers.size()) < count) {
    block.fibers.emplace_back(new Fiber);
    Fiber& fiber = *block.fibers.back();
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(
        &context,
        [] {
          // up to here by swapcontext, which saves signal masks; from here on without
          if (_setjmp(block.fibers[block.current]->context) == 0) setcontext(&block.starting);
          fiber_main();
        },
        0);
    block.current = int(block.fibers.size()) - 1;
    swapcontext(&block.starting, &context);
  }
}

void resume(int thread) {
  block.current = thread;
  const unsigned x = blockDim.x, y = blockDim.y;
  threadIdx = {thread % x, thread / x % y, thread / (x * y)};
  if (_setjmp(block.scheduler) == 0) _longjmp(block.fibers[thread]->context, 1);
}

// ---- shared memory

size_t round_up(size_t bytes) { return (bytes + 15) / 16 * 16; }

// Room for an array behind those there are, poisoned with its margin.
size_t place(const void* site, size_t bytes) {
  const size_t offset = block.shared_end;
  block.shared_end += round_up(bytes) + kMarginBytes;
  std::memset(block.shared + offset, kPoison, block.shared_end - offset);
  block.arrays.push_back({site, offset, bytes});
  return offset;
}

void clear_shared() {
  block.arrays.clear();
  block.shared_end = kMarginBytes;
  std::memset(block.shared, kPoison, kMarginBytes);
  place(nullptr, block.dynamic_bytes);
}

void check_margins() {
  size_t at = 0;
  for (const Array& array : block.arrays) {
    for (; at < array.offset; ++at)
      if (block.shared[at] != kPoison) {
        block.trouble = text("shared memory written %zu bytes before an array of %zu bytes",
                             array.offset - at, array.bytes);
        return;
      }
    at += array.bytes;
    const size_t next = array.offset + round_up(array.bytes) + kMarginBytes;
    for (; at < next; ++at)
      if (block.shared[at] != kPoison) {
        block.trouble = text("shared memory written %zu bytes past an array of %zu bytes",
                             at - array.offset - array.bytes, array.bytes);
        return;
      }
  }
}

// ---- one block

void shuffle_order() {
  std::iota(block.order.begin(), block.order.end(), 0);
  if (order_seed == 1) std::reverse(block.order.begin(), block.order.end());
  if (order_seed < 2) return;
  unsigned state = order_seed;
  for (size_t i = block.order.size() - 1; i > 0; --i) {
    state = state * 1664525u + 1013904223u;
    std::swap(block.order[i], block.order[(state >> 8) % (i + 1)]);
  }
}

void diverged() {
  std::string who;
  int listed = 0;
  for (int t = 0; t < block.threads && listed < 4; ++t) {
    const Fiber& fiber = *block.fibers[t];
    if (fiber.state != State::kWaiting) continue;
    bool news = true;
    for (int u = 0; u < t && news; ++u)
      news = block.fibers[u]->state != State::kWaiting ||
             !same(block.fibers[u]->waits_at, fiber.waits_at);
    if (!news) continue;
    who += text("%sthread %d waits at %s", listed++ ? ", " : "", t, says(fiber.waits_at).c_str());
    if (fiber.mask) who += text(" for lanes %08x", fiber.mask);
  }
  block.trouble = text("threads diverged: %s; %d of %d threads have returned", who.c_str(),
                       block.done, block.threads);
}

void run_block() {
  block.done = block.waiting = block.count = 0;
  for (auto& warp : block.exchanges) warp.clear();
  clear_shared();
  for (int t = 0; t < block.threads; ++t) block.fibers[t]->state = State::kReady;
  bool progress = true;
  while (block.done < block.threads && progress && block.trouble.empty()) {
    progress = false;
    for (int t : block.order) {
      if (block.fibers[t]->state != State::kReady) continue;
      progress = true;
      resume(t);
      if (!block.trouble.empty()) return;
    }
  }
  if (block.done < block.threads) return diverged();
  check_margins();
}

std::string refusal(dim3 grid, dim3 threads, size_t shared_bytes) {
  if (threads.x == 0 || threads.y == 0 || threads.z == 0 ||
      uint64_t(threads.x) * threads.y * threads.z > 1024 || threads.z > 64)
    return text("no device runs a block of (%u, %u, %u)", threads.x, threads.y, threads.z);
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return text("no device runs a grid of (%u, %u, %u)", grid.x, grid.y, grid.z);
  if (shared_bytes > size_t(kSharedBytes))
    return text("%zu bytes of shared memory, more than %d", shared_bytes, kSharedBytes);
  return "";
}

}  // namespace

const char* run(const char*, dim3 grid, dim3 threads, size_t shared_bytes, void (*body)(void*),
                void* argument) {
  std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  block.trouble = refusal(grid, threads, shared_bytes);
  if (!block.trouble.empty()) return block.trouble.c_str();

  block.threads = int(threads.x * threads.y * threads.z);
  block.body = body;
  block.argument = argument;
  block.dynamic_bytes = shared_bytes;
  block.order.resize(block.threads);
  block.exchanges.resize((block.threads + 31) / 32);
  make_fibers(block.threads);
  shuffle_order();
  gridDim = grid;
  blockDim = threads;

  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks && block.trouble.empty(); ++i) {
    const uint64_t b = order_seed == 1 ? blocks - 1 - i : i;
    blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    run_block();
    if (!block.trouble.empty())
      block.trouble =
          text("block (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z) + block.trouble;
  }
  if (block.trouble.empty()) return nullptr;
  block.fibers.clear();
  return block.trouble.c_str();
}

void* shared_memory(const void* site, size_t bytes) {
  for (const Array& array : block.arrays)
    if (array.site == site) return block.shared + array.offset;
  size_t asked = bytes;
  for (const Array& array : block.arrays) asked += array.bytes;
  if (asked > size_t(kSharedBytes) ||
      block.shared_end + round_up(bytes) + kMarginBytes > sizeof(block.shared))
    stop(text("%zu bytes of shared memory, more than %d", asked, kSharedBytes));
  return block.shared + place(site, bytes);
}

void* dynamic_shared_memory() { return block.shared + block.arrays.front().offset; }

int lane() { return block.current % 32; }

int sync_threads_count(Site site, int value) {
  if (block.waiting == 0) block.barrier = site;
  if (!same(block.barrier, site))
    stop(text("threads diverged: thread %d is at %s while others wait at %s", block.current,
              says(site).c_str(), says(block.barrier).c_str()));
  block.count += value;
  if (++block.waiting < block.threads) {
    wait(site, 0);
    return block.last_count;
  }
  block.last_count = block.count;
  block.count = block.waiting = 0;
  for (int t = 0; t < block.threads; ++t) block.fibers[t]->state = State::kReady;
  return block.last_count;
}

void sync_threads(Site site) { sync_threads_count(site, 0); }

namespace {

// Waits until all lanes of `mask` have handed in 8 bytes; then values[lane] of this round stand.
const unsigned char (*meet(Site site, unsigned mask, const void* value, size_t bytes))[8] {
  const int own = lane(), warp = block.current / 32;
  const int lanes = std::min(32, block.threads - 32 * warp);
  if (lanes < 32) mask &= (1u << lanes) - 1;
  if (!(mask >> own & 1))
    stop(text("lane %d is not in its own mask %08x at %s", own, mask, says(site).c_str()));
  std::vector<Exchange>& all = block.exchanges[warp];
  size_t at = 0;
  while (at < all.size() && all[at].mask != mask) ++at;
  if (at == all.size()) {
    all.emplace_back();
    all[at].mask = mask;
  }
  if (all[at].arrived == 0) all[at].site = site;
  if (!same(all[at].site, site))
    stop(text("threads diverged: lane %d of warp %d is at %s while others wait at %s", own, warp,
              says(site).c_str(), says(all[at].site).c_str()));
  const int round = all[at].round;
  std::memcpy(all[at].values[round][own], value, bytes);
  all[at].arrived |= 1u << own;
  if (all[at].arrived != mask) {
    wait(site, mask);
  } else {
    all[at].arrived = 0;
    all[at].round = 1 - round;
    for (int l = 0; l < lanes; ++l)
      if (mask >> l & 1) block.fibers[32 * warp + l]->state = State::kReady;
  }
  return all[at].values[round];
}

}  // namespace

void exchange(Site site, unsigned mask, void* value, size_t bytes, int source) {
  const int warp = block.current / 32;
  if (!(mask >> source & 1) || 32 * warp + source >= block.threads)
    stop(text("lane %d of warp %d reads lane %d, which takes no part in %s", lane(), warp, source,
              says(site).c_str()));
  std::memcpy(value, meet(site, mask, value, bytes)[source], bytes);
}

unsigned ballot(Site site, unsigned mask, bool predicate) {
  const unsigned char own = predicate;
  const unsigned char (*values)[8] = meet(site, mask, &own, 1);
  const int lanes = std::min(32, block.threads - block.current / 32 * 32);
  unsigned votes = 0;
  for (int l = 0; l < lanes; ++l)
    if (mask >> l & 1 && values[l][0]) votes |= 1u << l;
  return votes;
}

}  // namespace emulation

// 0: threads in their order. 1: threads and blocks from the last to the first. Otherwise a seed.
extern "C" __attribute__((visibility("default"))) void pae_emulation_set_order(unsigned seed) {
  std::lock_guard<std::mutex> lock(emulation::one_launch_at_a_time);
  emulation::order_seed = seed;
}

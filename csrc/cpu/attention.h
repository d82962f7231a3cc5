// Attention of image rows over prompts and image rows: forward, and backward from the log-sum-exp.
//
// A unit of work is one head of one image. What products read column by column (keys; values in the
// backward) is packed once a head as its transpose, the other operands as plain rows of fp32, from
// where the packed q, k, v and the prompts lie: 0.3 MB at 197 rows and 50 prompts, 1.1 MB in the
// backward at 577, so that all stays in the second cache. Queries go in blocks of rows whose logits
// against all keys stay there too, which makes the softmax one of whole rows; no (rows x keys)
// matrix reaches memory. Traffic to memory: every input once, every output once. Floor: 4 (forward)
// or 10 (backward) rows keys width operations a head; a tile of the products is as many sums as
// fill the registers, and a vector is loaded once for 6 to 12 rows of it.
//
// bf16 is widened when packed, all products and sums are fp32: where vdpbf16ps was measured, it did
// half the operations a second that fp32 does.

#ifndef PAE_CPU_ATTENTION_H_
#define PAE_CPU_ATTENTION_H_

#include <cmath>
#include <initializer_list>

#include "kernels.h"
#include "vector.h"

namespace pae {
namespace {

// ---- products

// A tile's vectors in a row, at most, and how many rows then fill the registers: 32 of them on
// AVX-512 and aarch64, else 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MOST = 4;
constexpr int tile_rows(int vectors) { return vectors == 4 ? 6 : vectors == 3 ? 8 : 12; }
#else
constexpr int MOST = 2;
constexpr int tile_rows(int vectors) { return vectors == 2 ? 6 : 12; }
#endif

// Row-major. An entry (r, k) lies at r * stride + k, or at k * stride + r of the transpose.
struct Matrix {
  const float* at;
  int64_t stride;
};

// c[R][C vectors] += or = sum over k < n of A[r][k] b[k][C vectors].
template <int R, int C, bool TRANSPOSED>
PAE_INLINE void tile(int64_t n, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                     float* c, int64_t c_stride, bool add) {
  F sum[R][C];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) sum[r][v] = add ? load(c + r * c_stride + v * W) : F{};
  for (int64_t k = 0; k < n; ++k) {
    F row[C];
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) row[v] = load(b + v * W);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const F x = splat(TRANSPOSED ? a[r] : a[r * a_stride]);
#pragma GCC unroll 4
      for (int v = 0; v < C; ++v) sum[r][v] += x * row[v];
    }
    a += TRANSPOSED ? a_stride : 1;
    b += b_stride;
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) store(c + r * c_stride + v * W, sum[r][v]);
}

// The last rows, fewer than a tile has.
template <int R, int C, bool TRANSPOSED, typename... Rest>
PAE_INLINE void last_rows(int64_t rows, Rest... rest) {
  if constexpr (R > 0) {
    if (rows == R)
      tile<R, C, TRANSPOSED>(rest...);
    else
      last_rows<R - 1, C, TRANSPOSED>(rows, rest...);
  }
}

template <int C, bool TRANSPOSED>
__attribute__((noinline)) void panel(int64_t rows, int64_t n, Matrix a, const float* b,
                                     int64_t b_stride, float* c, int64_t c_stride, bool add) {
  constexpr int R = tile_rows(C);
  const int64_t next = TRANSPOSED ? 1 : a.stride;
  int64_t i = 0;
  for (; i + R <= rows; i += R)
    tile<R, C, TRANSPOSED>(n, a.at + i * next, a.stride, b, b_stride, c + i * c_stride, c_stride,
                           add);
  last_rows<R - 1, C, TRANSPOSED>(rows - i, n, a.at + i * next, a.stride, b, b_stride,
                                  c + i * c_stride, c_stride, add);
}

// C (rows x columns) += or = A (rows x n) B (n x columns); columns are whole vectors. They are cut
// into panels of like width, and sums into parts whose rows of B stay in the first cache.
template <bool TRANSPOSED>
void multiply(int64_t rows, int64_t columns, int64_t n, Matrix a, Matrix b, float* c,
              int64_t c_stride, bool add) {
  constexpr int64_t PART = 128;
  const int64_t vectors = columns / W, panels = (vectors + MOST - 1) / MOST;
  for (int64_t k = 0; k < n; k += PART) {
    const int64_t part = n - k < PART ? n - k : PART;
    const Matrix left{a.at + k * (TRANSPOSED ? a.stride : 1), a.stride};
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t from = vectors * p / panels, width = vectors * (p + 1) / panels - from;
      const float* right = b.at + k * b.stride + from * W;
      float* to = c + from * W;
      const bool more = add || k > 0;
      if (width == 1) panel<1, TRANSPOSED>(rows, part, left, right, b.stride, to, c_stride, more);
      if (width == 2) panel<2, TRANSPOSED>(rows, part, left, right, b.stride, to, c_stride, more);
      if constexpr (MOST > 2) {
        if (width == 3) panel<3, TRANSPOSED>(rows, part, left, right, b.stride, to, c_stride, more);
        if (width == 4) panel<4, TRANSPOSED>(rows, part, left, right, b.stride, to, c_stride, more);
      }
    }
  }
}

// ---- packing

#if defined(__clang__) || __GNUC__ >= 12
#define PAE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PAE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif

// The lower and the upper halves of two vectors, entry by entry in turn.
PAE_INLINE void interleave(F& a, F& b) {
  const F x = a, y = b;
#if defined(__AVX512F__)
  a = PAE_SHUFFLE(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  b = PAE_SHUFFLE(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX__)
  a = PAE_SHUFFLE(x, y, 0, 8, 1, 9, 2, 10, 3, 11);
  b = PAE_SHUFFLE(x, y, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  a = PAE_SHUFFLE(x, y, 0, 4, 1, 5);
  b = PAE_SHUFFLE(x, y, 2, 6, 3, 7);
#endif
}

// W rows of W entries, transposed in place.
PAE_INLINE void transpose(F (&x)[W]) {
  constexpr int HALF = W / 2;
#pragma GCC unroll 4
  for (int step = 1; step < W; step *= 2) {
    F y[W];
#pragma GCC unroll 8
    for (int i = 0; i < HALF; ++i) {
      y[2 * i] = x[i];
      y[2 * i + 1] = x[i + HALF];
      interleave(y[2 * i], y[2 * i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = y[i];
  }
}

// `rows` rows of `width` entries; packed, of `wide`: the next multiple of 16, zeros behind them.
struct Rows {
  int64_t rows, width, wide;

  // Packed, times `factor`.
  template <typename T>
  void pack(const T* from, int64_t stride, float factor, float* to) const {
    for (int64_t i = 0; i < rows; ++i, from += stride, to += wide) {
      vectors(width, [&](int64_t c, auto v) { store(to + c, v.load(from + c) * factor); });
      for (int64_t c = (width + W - 1) / W * W; c < wide; c += W) store(to + c, F{});
    }
  }

  // The transpose of packed rows; columns behind the last row are 0 up to `stride`.
  void transpose(const float* from, float* to, int64_t stride) const {
    for (int64_t i = 0; i < stride; i += W)
      for (int64_t c = 0; c < wide; c += W) {
        F x[W];
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) x[r] = i + r < rows ? load(from + (i + r) * wide + c) : F{};
        pae::transpose(x);
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) store(to + (c + r) * stride + i, x[r]);
      }
  }

  // Out of packed rows, times a factor for each row.
  template <typename T, typename Factor>
  void unpack(const float* from, Factor factor, T* to, int64_t stride) const {
    for (int64_t i = 0; i < rows; ++i, from += wide, to += stride) {
      const float by = factor(i);
      vectors(width, [&](int64_t c, auto v) { v.store(to + c, load(from + c) * by); });
    }
  }
};

// ---- softmax

// e^x for x <= 88 or NaN, relative error 3e-7; 0 below e^-87.7.
PAE_INLINE F exponential_or_0(F x) {
  const F magic = splat(12583039.0f);  // 1.5 * 2^23 + 127: rounds, and leaves the exponent's bits
#if defined(__AVX512F__)
  x = bits<F>(_mm512_max_ps(bits<__m512>(splat(-88.0f)), bits<__m512>(x)));  // keeps a NaN
#else
  x = x < -88.0f ? splat(-88.0f) : x;
#endif
  const F shifted = x * 1.44269504f + magic;
  const F r = x - (shifted - magic) * 0.693147182f;
  F p = splat(8.29031505e-3f);
  p = p * r + 4.18979302e-2f;
  p = p * r + 1.66676357e-1f;
  p = p * r + 4.99991506e-1f;
  p = p * r + 9.99999702e-1f;
  p = p * r + 1.0f;
  return p * bits<F>(bits<I>(shifted) << 23);
}

// `op` of all entries.
template <typename Op>
PAE_INLINE float folded(F x, Op op) {
#if defined(__AVX512F__)
  x = op(x, PAE_SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  x = op(x, PAE_SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  x = op(x, PAE_SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  x = op(x, PAE_SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#elif defined(__AVX__)
  x = op(x, PAE_SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
  x = op(x, PAE_SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5));
  x = op(x, PAE_SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6));
#else
  x = op(x, PAE_SHUFFLE(x, x, 2, 3, 0, 1));
  x = op(x, PAE_SHUFFLE(x, x, 1, 0, 3, 2));
#endif
  return x[0];
}
PAE_INLINE F larger(F a, F b) { return a < b ? b : a; }
PAE_INLINE F plus(F a, F b) { return a + b; }

// What is added to the logits of a head of an image.
struct Added {
  int64_t prompts, tokens;                   // keys that have a place among the latter
  const float *log_m, *bias, *mask;          // or null

  // Logits of row `i` of the image, with that; -inf behind the `keys` that it sees.
  void finish(float* row, int64_t i, int64_t keys, int64_t padded) const {
    if (log_m != nullptr)
      for (int64_t j = 0; j < prompts; j += W) store(row + j, load(row + j) + load(log_m + j));
    for (const float* table : {bias, mask}) {
      if (table == nullptr) continue;
      float* places = row + prompts;
      const float* more = table + i * tokens;
      vectors(keys - prompts, [&](int64_t j, auto v) {
        v.store(places + j, v.load(places + j) + v.load(more + j));
      });
    }
    const F never = splat(-INFINITY);
    int64_t j = keys / W * W;
    if (j < keys) {
      store(row + j, Part{static_cast<int>(keys - j)}.or_else(load(row + j), never));
      j += W;
    }
    for (; j < padded; j += W) store(row + j, never);
  }
};

// A row's logits become e^(logit - their maximum). Returns the sum of these, and the maximum.
PAE_INLINE float softmax_row(float* row, int64_t padded, float& most) {
  F top = load(row);
  for (int64_t j = W; j < padded; j += W) top = larger(top, load(row + j));
  most = folded(top, larger);
  F sum = {};
  for (int64_t j = 0; j < padded; j += W) {
    const F e = exponential_or_0(load(row + j) - most);
    store(row + j, e);
    sum += e;
  }
  return folded(sum, plus);
}

// ---- one head

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// What a thread works in. Without memory it only counts what that would have to hold.
struct Room {
  static constexpr int64_t MOST_ROWS = 96;

  int64_t keys, wide, padded, line, block, later;
  float *q, *k, *v, *kt, *logits, *rows, *log_m;     // of both directions
  float *vt, *d_out, *d_logits, *dk, *dv;            // of the backward
  int64_t size = 0;

  Room(const pae_cpu_attention_params& p, bool backward, float* memory) {
    keys = p.prompts + (backward && p.d_qkv == nullptr ? 0 : p.tokens);
    wide = round_up(p.width, 16);
    padded = round_up(keys, 16);
    line = padded | 16;  // an odd number of cache lines: a column's entries fall in all sets
    // of causal rows, before row i + 1: prompts and those up to its own
    later = p.causal ? p.prompts : keys;
    // rows of queries at a time, whose logits take up to 128 KB; a multiple of all tiles' rows. Of
    // causal rows few, which see about as much
    block = 24;
    while (!p.causal && 2 * block <= MOST_ROWS && 2 * block * line <= 32768 && block < p.rows) block *= 2;
    auto take = [&](int64_t count) {
      float* piece = memory == nullptr ? nullptr : memory + size;
      size += round_up(count, 16);
      return piece;
    };
    q = take(p.rows * wide);
    k = take(keys * wide);
    v = take(keys * wide);
    kt = take(line * wide);
    logits = take(block * line);
    rows = take(block * wide);
    log_m = take(padded);
    if (!backward) return;
    vt = take(line * wide);
    d_out = take(p.rows * wide);
    d_logits = take(block * line);
    dk = take(keys * wide);
    dv = take(keys * wide);
  }

  // Keys that the first `rows` rows see between them.
  int64_t seen(int64_t rows) const { return smaller(keys, later + rows); }
};

// One head of one image, packed, and what is added to its logits.
template <typename T>
Added pack_head(const pae_cpu_attention_params& p, const Room& to, int64_t image, int64_t head) {
  const int64_t set = p.group != nullptr ? p.group[image] : p.sets == 1 ? 0 : image;
  const T* row = static_cast<const T*>(p.qkv) + image * p.qkv_image + head * p.qkv_head;
  const Rows queries{p.rows, p.width, to.wide}, prompts{p.prompts, p.width, to.wide};
  const Rows keys{to.keys, p.width, to.wide}, images{to.keys - p.prompts, p.width, to.wide};
  queries.pack(row, p.qkv_row, p.scale, to.q);
  if (prompts.rows > 0) {
    const T* prompt = static_cast<const T*>(p.kv) + set * p.kv_set + head * p.kv_head;
    prompts.pack(prompt, p.kv_row, 1.0f, to.k);
    prompts.pack(prompt + p.kv_part, p.kv_row, 1.0f, to.v);
  }
  if (images.rows > 0) {
    images.pack(row + p.qkv_part, p.qkv_row, 1.0f, to.k + p.prompts * to.wide);
    images.pack(row + 2 * p.qkv_part, p.qkv_row, 1.0f, to.v + p.prompts * to.wide);
  }
  keys.transpose(to.k, to.kt, to.line);
  for (int64_t j = 0; p.log_m != nullptr && j < to.padded; ++j)
    to.log_m[j] = j < p.prompts ? p.log_m[set * p.prompts + j] : 0.0f;
  const int64_t places = p.tokens * p.tokens;
  return {p.prompts, p.tokens, p.log_m == nullptr ? nullptr : to.log_m,
          p.bias == nullptr ? nullptr : p.bias + head * p.bias_head,
          p.mask == nullptr ? nullptr : p.mask + image % p.windows * places};
}

template <typename T>
void attention_fwd_unit(const pae_cpu_attention_params& p, int64_t unit, float* memory) {
  const Room room(p, false, memory);
  const int64_t wide = room.wide, line = room.line;
  const int64_t row = p.heads * p.width;
  const int64_t image = unit / p.heads, head = unit % p.heads;
  const Added added = pack_head<T>(p, room, image, head);
  T* out = static_cast<T*>(p.out) + image * p.rows * row + head * p.width;
  float* lse = p.lse + unit * p.rows;
  for (int64_t from = 0; from < p.rows; from += room.block) {
    const int64_t rows = smaller(p.rows - from, room.block);
    const int64_t seen = room.seen(from + rows), padded = round_up(seen, 16);
    multiply<false>(rows, padded, p.width, {room.q + from * wide, wide}, {room.kt, line},
                    room.logits, line, false);
    float shares[Room::MOST_ROWS];
    for (int64_t i = 0; i < rows; ++i) {
      float most, *logits = room.logits + i * line;
      added.finish(logits, from + i, room.seen(from + i + 1), padded);
      const float sum = softmax_row(logits, padded, most);
      lse[from + i] = most + std::log(sum);
      shares[i] = 1.0f / sum;
    }
    multiply<false>(rows, wide, seen, {room.logits, line}, {room.v, wide}, room.rows, wide, false);
    Rows{rows, p.width, wide}.unpack(
        room.rows, [&](int64_t i) { return shares[i]; }, out + from * row, row);
  }
}

// A unit: one head of `p.images` images in turn, whose prompt gradients are added in that order.
template <typename T>
void attention_bwd_unit(const pae_cpu_attention_params& p, int64_t unit, float* memory) {
  const Room room(p, true, memory);
  const bool all = p.d_qkv != nullptr;
  // sum(probs d_probs) is d_out out too, but what `out` lost in 16 bits would be most of the error
  const bool whole_rows = all && sizeof(T) < sizeof(float);
  const int64_t wide = room.wide, line = room.line;
  const int64_t row = p.heads * p.width;
  const int64_t fixed = p.prompts * wide, moving = room.keys * wide - fixed;
  const Rows prompts{p.prompts, p.width, wide}, images{p.tokens, p.width, wide};
  const auto by_one = [](int64_t) { return 1.0f; };
  const int64_t part = unit / p.heads, head = unit % p.heads;
  std::memset(room.dk, 0, fixed * sizeof(float));
  std::memset(room.dv, 0, fixed * sizeof(float));
  const int64_t last = smaller(part * p.images + p.images, p.batch);
  for (int64_t image = part * p.images; image < last; ++image) {
    const Added added = pack_head<T>(p, room, image, head);
    Rows{room.keys, p.width, wide}.transpose(room.v, room.vt, line);
    const T* out = static_cast<const T*>(p.out) + image * p.rows * row + head * p.width;
    const T* given = static_cast<const T*>(p.d_out) + image * p.d_out_image + head * p.width;
    Rows{p.rows, p.width, wide}.pack(given, p.d_out_row, 1.0f, room.d_out);
    std::memset(room.dk + fixed, 0, moving * sizeof(float));
    std::memset(room.dv + fixed, 0, moving * sizeof(float));
    T* d_rows = static_cast<T*>(p.d_qkv);
    if (all) d_rows += image * p.tokens * 3 * row + head * p.width;
    const float* lse = p.lse + (image * p.heads + head) * p.rows;
    for (int64_t from = 0; from < p.rows; from += room.block) {
      const int64_t rows = smaller(p.rows - from, room.block);
      const int64_t seen = room.seen(from + rows), padded = round_up(seen, 16);
      const float *q = room.q + from * wide, *d_out = room.d_out + from * wide;
      multiply<false>(rows, padded, p.width, {q, wide}, {room.kt, line}, room.logits, line, false);
      multiply<false>(rows, padded, p.width, {d_out, wide}, {room.vt, line}, room.d_logits, line,
                      false);
      for (int64_t i = 0; i < rows; ++i) {
        float *probs = room.logits + i * line, *grads = room.d_logits + i * line;
        added.finish(probs, from + i, room.seen(from + i + 1), padded);
        F along = {}, sum = {};
        if (whole_rows) {
          for (int64_t j = 0; j < padded; j += W) {
            const F e = exponential_or_0(load(probs + j) - lse[from + i]);
            store(probs + j, e);
            sum += e;
            along += e * load(grads + j);
          }
          // the sum is 1 but for the rounding of `lse`, which would be left over in sums of `grads`
          const float delta = folded(along, plus) / folded(sum, plus);
          for (int64_t j = 0; j < padded; j += W)
            store(grads + j, load(probs + j) * (load(grads + j) - delta));
          continue;
        }
        vectors(p.width, [&](int64_t c, auto v) {
          along += load(d_out + i * wide + c) * v.load(out + (from + i) * row + c);
        });
        const float delta = folded(along, plus);
        for (int64_t j = 0; j < padded; j += W) {
          const F e = exponential_or_0(load(probs + j) - lse[from + i]);
          store(probs + j, e);
          store(grads + j, e * (load(grads + j) - delta));
        }
      }
      const Matrix probs{room.logits, line}, grads{room.d_logits, line};
      multiply<true>(seen, wide, rows, probs, {d_out, wide}, room.dv, wide, true);
      multiply<true>(seen, wide, rows, grads, {q, wide}, room.dk, wide, true);
      if (!all) continue;
      multiply<false>(rows, wide, seen, grads, {room.k, wide}, room.rows, wide, false);
      Rows{rows, p.width, wide}.unpack(
          room.rows, [&](int64_t) { return p.scale; }, d_rows + from * 3 * row, 3 * row);
    }
    if (!all) continue;
    images.unpack(room.dk + fixed, by_one, d_rows + row, 3 * row);
    images.unpack(room.dv + fixed, by_one, d_rows + 2 * row, 3 * row);
  }
  if (prompts.rows == 0) return;
  float* d_kv = p.d_kv + part * p.prompts * 2 * row + head * p.width;
  prompts.unpack(room.dk, by_one, d_kv, 2 * row);
  prompts.unpack(room.dv, by_one, d_kv + row, 2 * row);
}

int64_t attention_room(const pae_cpu_attention_params& p, bool backward) {
  return Room(p, backward, nullptr).size;
}

void attention_fwd(const pae_cpu_attention_params& p, int64_t unit, float* memory) {
  if (p.type == PAE_FLOAT32)
    attention_fwd_unit<float>(p, unit, memory);
  else
    attention_fwd_unit<Half>(p, unit, memory);
}

void attention_bwd(const pae_cpu_attention_params& p, int64_t unit, float* memory) {
  if (p.type == PAE_FLOAT32)
    attention_bwd_unit<float>(p, unit, memory);
  else
    attention_bwd_unit<Half>(p, unit, memory);
}

}  // namespace
}  // namespace pae

#endif

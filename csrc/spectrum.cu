// Patch tokens and pooled prompts of frequency windows. pae_kernels/spectrum/reference.py is the
// definition, pae_kernels/spectrum/triton.py the same algorithm; names are theirs. w bins a side,
// K = C ph, L = B nh rows of patches ("lines").
//
//   strips  one block: one colour plane of one image at 16 column bins, a thread an image row. The
//           box of the spectrum is read once, into shared memory.
//   taps    one block: one tap row (c, p) at 16 column bins, a thread a channel.
//   tokens  one block of 8 warps: 32 lines x 64 channels x all patches of the line (16 at a time).
//           Column bin after column bin, strips @ taps as a complex product on the tensor cores
//           (a warp: 16 lines x 16 channels), fetched two stages ahead by cp.async; every entry is
//           then turned by its phase into 8 sums of even and 8 of odd frequencies, which serve 16
//           patches and stay in registers to the end.
//
// Factors are bf16 for bf16 tokens: mma m16n8k16. Else fp32, each split into two TF32 numbers and
// multiplied three times (large large, large small, small large): mma m16n8k8, exact to about
// 2^-21. Both instructions take operands as 32-bit words in the same places, 8 words deep, so one
// kernel serves both. Error to fp64, norm-relative, patches of 16, w = 16 (emulated): bf16 2.9e-3
// where the textbook (filter in fp32, images and convolution in bf16) has 2.3e-3; fp32 3.5e-7 where
// filter and convolution have 5.0e-7.
//
// Bytes, ViT-B/16 at 224 px, w = 16, B = 128, one window: 38.5 MB (bf16) or 77 MB (fp32) of tokens
// written, 0.8 MB of spectrum and 2.4 MB of weights read: a floor of 9 or 18 us at 4.3 TB/s. Strips
// and taps, 8 MB (16 MB), are written and read once more, in L2; the last kernel fetches 98 + 196 KB
// (twice that) in each of 672 blocks, 200 MB (400 MB) from L2. Work: 8.5 GFLOP of products, three
// times that in TF32, and 0.7 GFLOP of turned sums. Bandwidth alone would allow 45 us in bf16 (L2 at
// 5.5 TB/s 36 us, tensor cores by mma.sync 18 us, shared memory 18 us, which overlap; strips 5 us),
// five times the floor: 16 sums of an entry fill the registers at 2048 entries, and tiles that small
// fetch every operand often. By the instructions that nvcc made (bench/predictions.py) it is 0.18
// ms, for issuing binds: of 1,841 in the loop over bins about 300 are products or turned sums, and
// about 680 the addresses of copies. It is not measured. Filter and convolution multiply 31 GFLOP
// and move the images three times.
//
// pool    one block of 8 warps: 64 tokens, each read once and kept in a warp's registers between its
//         energy and its weighted sum; partial sums relative to the largest exponent seen, a power of
//         two, since energies leave the range of fp32. pool_sum adds the parts in a fixed order.
//         Bytes: the tokens, and 3 % (fp32) or 6 % (bf16) of that for parts written and read.
#include "common.cuh"

namespace pae {
namespace {

typedef long long Index;

// cos and sin of 2 pi turns / size, 0 <= turns < size. The angle is reduced in integers to at most
// pi / 4, where short series are exact to the last bit or two.
__device__ __forceinline__ float2 wave(int turns, int size) {
  const int quarter = (4 * turns + size / 2) / size;  // nearest quarter of a turn, 0 to 4
  const float x = float(4 * turns - quarter * size) / float(size) * 1.57079632679489662f;
  const float y = x * x;
  const float s =
      x + x * y * (-1.6666667e-1f + y * (8.3333333e-3f + y * (-1.9841270e-4f + y * 2.7557319e-6f)));
  const float c4 = 4.1666668e-2f + y * (-1.3888889e-3f + y * (2.4801587e-5f - y * 2.7557319e-7f));
  const float c = 1.0f - (0.5f * y - y * y * c4);
  const float cosine = quarter & 1 ? -s : c, sine = quarter & 1 ? c : s;
  return quarter & 2 ? make_float2(-cosine, -sine) : make_float2(cosine, sine);
}

// Unshifted bin of the centred one at `first` + `offset`.
__device__ __forceinline__ int bin(int first, int offset, int size) {
  return (first + offset + size - size / 2) % size;
}

// Where channel d lies in a row of taps: within 16, the 4 channels that one thread of a warp holds
// of two neighbouring instructions come to lie in the columns that the instructions give it.
__device__ __forceinline__ int column_of_channel(int d) {
  return (d & ~15) | (d & 2) << 2 | (d & 12) >> 1 | (d & 1);
}

// ---- strips and taps

constexpr int kBins = 16;  // column bins of a block
constexpr int kRows = 256;

template <typename T>
__global__ void __launch_bounds__(kRows) strips_kernel(pae_shortcut_tokens_params p) {
  PAE_DYNAMIC_SHARED(float2, shared);
  const int height = int(p.height), window = int(p.window), ph = int(p.patch_height);
  float2* const waves = shared;         // (H): one turn
  float2* const box = shared + height;  // (w, kBins)
  const int i_c = blockIdx.x % p.channels;
  const Index i_b = blockIdx.x / p.channels % p.batch;
  const Index i_s = blockIdx.x / (p.channels * p.batch);
  const int first_v = blockIdx.y * kBins;
  const int64_t* const origin = static_cast<const int64_t*>(p.origins) + 2 * i_s;
  const float* const plane =
      static_cast<const float*>(p.spectrum) + i_b * p.stride_b + i_c * p.stride_c;
  for (int h = threadIdx.x; h < height; h += kRows) waves[h] = wave(h, height);
  for (int i = threadIdx.x; i < window * kBins; i += kRows) {
    const int u = i / kBins, v = first_v + i % kBins;
    float2 x = make_float2(0.0f, 0.0f);
    if (v < window) {
      const float* const at = plane + bin(int(origin[0]), u, height) * Index(p.stride_u) +
                              bin(int(origin[1]), v, int(p.width)) * Index(p.stride_v);
      x = make_float2(at[0], at[1]);
    }
    box[i] = x;
  }
  __syncthreads();
  const float scale = 1.0f / (float(height) * float(p.width));
  const int first_u = bin(int(origin[0]), 0, height);
  T* const strips =
      static_cast<T*>(p.strips) + (i_s * window + first_v) * 2 * p.lines_padded * p.depth_padded;
  for (int h = threadIdx.x; h < height; h += kRows) {
    float re[kBins] = {}, im[kBins] = {};
    int turns = int(Index(first_u) * h % height);
    for (int u = 0; u < window; ++u) {
      const float2 e = waves[turns];
      turns += h;
      if (turns >= height) turns -= height;
#pragma unroll
      for (int v = 0; v < kBins; ++v) {
        const float2 x = box[u * kBins + v];
        re[v] += e.x * x.x - e.y * x.y;
        im[v] += e.x * x.y + e.y * x.x;
      }
    }
    const Index line = i_b * (height / ph) + h / ph;
    T* out = strips + line * p.depth_padded + i_c * ph + h % ph;
#pragma unroll
    for (int v = 0; v < kBins; ++v) {
      if (first_v + v >= window) break;
      out[0] = from_float<T>(re[v] * scale);
      out[p.lines_padded * p.depth_padded] = from_float<T>(im[v] * scale);
      out += 2 * p.lines_padded * p.depth_padded;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kRows) taps_kernel(pae_shortcut_tokens_params p) {
  PAE_DYNAMIC_SHARED(float2, waves);  // (pw, kBins)
  const int width = int(p.width), window = int(p.window), pw = int(p.patch_width);
  const int inner = int(p.channels * p.patch_height);
  const int i_k = blockIdx.x % inner;
  const Index i_s = blockIdx.x / inner;
  const int first_v = blockIdx.y * kBins;
  const int origin = int(static_cast<const int64_t*>(p.origins)[2 * i_s + 1]);
  for (int i = threadIdx.x; i < pw * kBins; i += kRows) {
    const int v = bin(origin, first_v + i % kBins, width);
    waves[i] = wave(int(Index(v) * (i / kBins) % width), width);
  }
  __syncthreads();
  // words of `kPack` neighbouring k, then channels
  constexpr int kPack = 4 / sizeof(T);
  T* const taps =
      static_cast<T*>(p.taps) + (i_s * window + first_v) * 2 * p.depth_padded * p.channels_padded;
  const float* const weight = static_cast<const float*>(p.weight) + i_k * p.dim;
  for (int d = threadIdx.x; d < p.dim; d += kRows) {
    float re[kBins] = {}, im[kBins] = {};
    for (int q = 0; q < pw; ++q) {
      const float tap = weight[q * inner * p.dim + d];
#pragma unroll
      for (int v = 0; v < kBins; ++v) {
        const float2 e = waves[q * kBins + v];
        re[v] += e.x * tap;
        im[v] += e.y * tap;
      }
    }
    const Index word = i_k / kPack * p.channels_padded + column_of_channel(d);
    T* out = taps + word * kPack + i_k % kPack;
#pragma unroll
    for (int v = 0; v < kBins; ++v) {
      if (first_v + v >= window) break;
      out[0] = from_float<T>(re[v]);
      out[p.depth_padded * p.channels_padded] = from_float<T>(im[v]);
      out += 2 * p.depth_padded * p.channels_padded;
    }
  }
}

// ---- tensor cores. Operands are 32-bit words: of lane l, with g = l / 4 and q = l % 4,
//      a: (row g, word q), (g + 8, q), (g, q + 4), (g + 8, q + 4)    16 rows x 8 words
//      b: (word q, column g), (q + 4, g)                             8 words x 8 columns
//      c: (row g, column 2 q), (g, 2 q + 1), (g + 8, 2 q), (g + 8, 2 q + 1), to which is added
//      A word is one TF32 number, or two neighbouring bf16 numbers of the depth.

struct TwoBf16 {
  typedef __nv_bfloat16 Factor;
  static __device__ __forceinline__ uint32_t negated(uint32_t word) { return word ^ 0x80008000u; }
#ifdef PAE_EMULATED
  static float dot(uint32_t a, uint32_t b) {
    const auto low = [](uint32_t x) { return emulation::from_bfloat16_bits(uint16_t(x)); };
    return low(a) * low(b) + low(a >> 16) * low(b >> 16);
  }
#endif
};

struct OneTf32 {
  typedef float Factor;
  static __device__ __forceinline__ uint32_t negated(uint32_t word) { return word ^ 0x80000000u; }
#ifdef PAE_EMULATED
  static float dot(uint32_t a, uint32_t b) {  // the hardware drops what a TF32 number cannot hold
    const auto kept = [](uint32_t x) { return emulation::bits<float>(x & ~0x1fffu); };
    return kept(a) * kept(b);
  }
#endif
};

#ifdef PAE_EMULATED

template <typename Word>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const int lane = threadIdx.x % kWarp, row = lane / 4, column = lane % 4 * 2;
  const auto pair = [](uint32_t low, uint32_t high) { return uint64_t(high) << 32 | low; };
  for (int q = 0; q < 4; ++q) {
    const uint64_t upper = __shfl_sync(kAllLanes, pair(a[0], a[2]), row * 4 + q);
    const uint64_t lower = __shfl_sync(kAllLanes, pair(a[1], a[3]), row * 4 + q);
    for (int e = 0; e < 2; ++e) {
      const uint64_t words = __shfl_sync(kAllLanes, pair(b[0], b[1]), (column + e) * 4 + q);
      for (int half = 0; half < 64; half += 32) {
        c[e] += Word::dot(uint32_t(upper >> half), uint32_t(words >> half));
        c[2 + e] += Word::dot(uint32_t(lower >> half), uint32_t(words >> half));
      }
    }
  }
}

uint32_t to_tf32(float x) {  // nearest, ties away from zero
  return (emulation::bits<uint32_t>(x) + 0x1000u) & ~0x1fffu;
}

void copy_16_bytes(uint32_t* to, const uint32_t* from) { std::memcpy(to, from, 16); }
void commit_copies() {}
template <int kPending>
void wait_for_copies() {}

#else

template <typename Word>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same<Word, TwoBf16>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(x));
  return word;
}

__device__ __forceinline__ void copy_16_bytes(uint32_t* to, const uint32_t* from) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#endif

__device__ __forceinline__ float as_float(uint32_t word) {
#ifdef PAE_EMULATED
  return emulation::bits<float>(word);
#else
  return __uint_as_float(word);
#endif
}

// The two TF32 numbers whose sum is x to 2^-22.
template <int N>
__device__ __forceinline__ void split(const uint32_t (&x)[N], uint32_t (&large)[N],
                                      uint32_t (&small)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    large[i] = to_tf32(as_float(x[i]));
    small[i] = to_tf32(as_float(x[i]) - as_float(large[i]));
  }
}

// re + i im += (a_re + i a_im) (b_re + i b_im)
template <typename Word>
__device__ __forceinline__ void complex_mma(float (&re)[4], float (&im)[4],
                                            const uint32_t (&a_re)[4], const uint32_t (&a_im)[4],
                                            const uint32_t (&b_re)[2], const uint32_t (&b_im)[2]) {
  uint32_t minus[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) minus[i] = Word::negated(a_im[i]);
  mma<Word>(re, a_re, b_re);
  mma<Word>(im, a_re, b_im);
  mma<Word>(re, minus, b_im);
  mma<Word>(im, a_im, b_re);
}

// ---- tokens

constexpr int kWarps = 8;
constexpr int kLines = 32;
constexpr int kChannels = 64;
constexpr int kPatches = 8;  // of half a line
constexpr int kStageWords = 24;
constexpr int kStripPitch = kStageWords + 4;  // words; 8 rows of 4 words hit 32 banks
constexpr int kTapPitch = kChannels + 8;      // words; 4 rows of 8 words hit 32 banks
constexpr int kStages = 3;
constexpr int kStripStage = 2 * kLines * kStripPitch;
constexpr int kStage = kStripStage + 2 * kStageWords * kTapPitch;

// Where a block's operands lie: words of one (window, column bin) and how far apart the next is.
struct Operands {
  const uint32_t *strips, *taps;
  Index strip_plane, tap_plane;  // words between real and imaginary part
  int depth, row_words;          // words of the depth; words of a row of taps

  // Starts copying words [word, word + kStageWords) of bin k's depth into `stage`.
  __device__ __forceinline__ void fetch(uint32_t* stage, int k, int word) const {
    const int words = min(kStageWords, depth - word);  // a multiple of 8
    const uint32_t* const a = strips + 2 * k * strip_plane + word;
    const uint32_t* const b = taps + 2 * k * tap_plane + Index(word) * row_words;
    for (int i = threadIdx.x; i < 2 * kLines * (kStageWords / 4); i += kWarps * kWarp) {
      const int column = i % (kStageWords / 4) * 4, row = i / (kStageWords / 4);
      if (column < words)
        copy_16_bytes(stage + row * kStripPitch + column,
                      a + row / kLines * strip_plane + Index(row % kLines) * depth + column);
    }
    for (int i = threadIdx.x; i < 2 * kStageWords * (kChannels / 4); i += kWarps * kWarp) {
      const int column = i % (kChannels / 4) * 4, row = i / (kChannels / 4);
      if (row % kStageWords < words)
        copy_16_bytes(
            stage + kStripStage + row * kTapPitch + column,
            b + row / kStageWords * tap_plane + Index(row % kStageWords) * row_words + column);
    }
  }
};

template <typename Word>
__device__ __forceinline__ void multiply(const uint32_t* stage, int words, float (&re)[2][4],
                                         float (&im)[2][4]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t* const strips = stage + (warp % 2 * 16 + lane / 4) * kStripPitch + lane % 4;
  const uint32_t* const taps =
      stage + kStripStage + lane % 4 * kTapPitch + warp / 2 * 16 + lane / 4;
#pragma unroll
  for (int word = 0; word < kStageWords; word += 8) {
    if (word >= words) break;
    uint32_t a[2][4];
#pragma unroll
    for (int part = 0; part < 2; ++part)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[part][i] = strips[(part * kLines + i % 2 * 8) * kStripPitch + word + i / 2 * 4];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      uint32_t b[2][2];
#pragma unroll
      for (int part = 0; part < 2; ++part)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          b[part][i] = taps[(part * kStageWords + word + i * 4) * kTapPitch + tile * 8];
      if constexpr (std::is_same<Word, TwoBf16>::value) {
        complex_mma<Word>(re[tile], im[tile], a[0], a[1], b[0], b[1]);
      } else {
        uint32_t a_large[2][4], a_small[2][4], b_large[2][2], b_small[2][2];
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          split(a[part], a_large[part], a_small[part]);
          split(b[part], b_large[part], b_small[part]);
        }
        // small terms first: they are lost least beside a sum that is still small
        complex_mma<Word>(re[tile], im[tile], a_small[0], a_small[1], b_large[0], b_large[1]);
        complex_mma<Word>(re[tile], im[tile], a_large[0], a_large[1], b_small[0], b_small[1]);
        complex_mma<Word>(re[tile], im[tile], a_large[0], a_large[1], b_large[0], b_large[1]);
      }
    }
  }
}

// Four neighbouring channels of one token, from `d` on.
template <typename Out>
__device__ __forceinline__ void store_token(const pae_shortcut_tokens_params& p, Index line,
                                            int patch, int d, const float (&sum)[4]) {
  const int grid = int(p.width / p.patch_width), in_image = int(p.height / p.patch_height);
  const Index line_of_window = line % p.lines;
  Out* const out = static_cast<Out*>(p.out) + (line * grid + patch) * p.dim + d;
  const float* shift = static_cast<const float*>(p.shift);
  if (shift != nullptr) shift += (line_of_window % in_image * grid + patch) * p.shift_stride + d;
  if (p.dim % 4 == 0) {
    float4 s = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (shift != nullptr) s = *reinterpret_cast<const float4*>(shift);
    Pack<Out, 4> packed = {{from_float<Out>(sum[0] + s.x), from_float<Out>(sum[1] + s.y),
                            from_float<Out>(sum[2] + s.z), from_float<Out>(sum[3] + s.w)}};
    *reinterpret_cast<Pack<Out, 4>*>(out) = packed;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (d + i < p.dim) out[i] = from_float<Out>(sum[i] + (shift != nullptr ? shift[i] : 0.0f));
  }
}

// Grid (S tiles of lines, tiles of channels, tiles of patches). kHalved: an even number of patches
// in a line. A wave of even column frequency is the same half a line on, one of odd frequency has
// changed its sign: the sums of both serve two patches.
template <typename Word, typename Out, bool kHalved>
__global__ void __launch_bounds__(kWarps* kWarp, 1) tokens_kernel(pae_shortcut_tokens_params p) {
  PAE_DYNAMIC_SHARED(uint32_t, shared);
  const int window = int(p.window), grid = int(p.width / p.patch_width);
  const int reach = kHalved ? grid / 2 : grid;
  float2* const turns = reinterpret_cast<float2*>(shared + kStages * kStage);  // (w, kPatches)
  const int tiles = int(p.lines_padded / kLines);
  const Index i_s = blockIdx.x / tiles;
  const int first_line = int(blockIdx.x % tiles) * kLines, first_channel = blockIdx.y * kChannels;
  const int first_patch = blockIdx.z * kPatches;
  const int first_bin =
      bin(int(static_cast<const int64_t*>(p.origins)[2 * i_s + 1]), 0, int(p.width));
  for (int i = threadIdx.x; i < window * kPatches; i += kWarps * kWarp) {
    const int v = (first_bin + i / kPatches) % int(p.width) % grid;
    turns[i] = wave(v * (first_patch + i % kPatches) % grid, grid);
  }

  constexpr int kPack = 4 / sizeof(typename Word::Factor);
  Operands operands;
  operands.depth = int(p.depth_padded / kPack);
  operands.row_words = int(p.channels_padded);
  operands.strip_plane = p.lines_padded * operands.depth;
  operands.tap_plane = Index(operands.depth) * operands.row_words;
  operands.strips = static_cast<const uint32_t*>(p.strips) +
                    i_s * window * 2 * operands.strip_plane + Index(first_line) * operands.depth;
  operands.taps =
      static_cast<const uint32_t*>(p.taps) + i_s * window * 2 * operands.tap_plane + first_channel;
  const int pieces = ceil_div(operands.depth, kStageWords), stages = window * pieces;
  const auto fetch = [&](int stage) {
    if (stage < stages)
      operands.fetch(shared + stage % kStages * kStage, stage / pieces,
                     stage % pieces * kStageWords);
    commit_copies();
  };
  for (int stage = 0; stage < kStages - 1; ++stage) fetch(stage);

  float even[kPatches][2][4] = {}, odd[kPatches][2][4] = {};
  int stage = 0;
  for (int pair = 0; pair < window; pair += 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int k = pair + half;
      if (k >= window) break;
      float re[2][4] = {}, im[2][4] = {};
      for (int piece = 0; piece < pieces; ++piece, ++stage) {
        wait_for_copies<kStages - 2>();
        __syncthreads();  // the stage is there, and nobody reads the one that is written next
        fetch(stage + kStages - 1);
        multiply<Word>(shared + stage % kStages * kStage, operands.depth - piece * kStageWords, re,
                       im);
      }
#pragma unroll
      for (int j = 0; j < kPatches; ++j) {
        const float2 e = turns[k * kPatches + j];
#pragma unroll
        for (int tile = 0; tile < 2; ++tile)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& sum = kHalved && half == 1 ? odd[j][tile][i] : even[j][tile][i];
            sum += e.x * re[tile][i] - e.y * im[tile][i];
          }
      }
    }
  }

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int d = first_channel + warp / 2 * 16 + lane % 4 * 4;
  const float sign = first_bin % 2 ? -1.0f : 1.0f;
#pragma unroll
  for (int below = 0; below < 2; ++below) {
    const int line = first_line + warp % 2 * 16 + below * 8 + lane / 4;
    if (line >= p.lines || d >= p.dim) continue;
#pragma unroll
    for (int j = 0; j < kPatches; ++j) {
      if (first_patch + j >= reach) break;
      float sum[4], difference[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float e = even[j][i / 2][below * 2 + i % 2], o = odd[j][i / 2][below * 2 + i % 2];
        sum[i] = e + o;
        difference[i] = sign * (e - o);
      }
      store_token<Out>(p, i_s * p.lines + line, first_patch + j, d, sum);
      if (kHalved)
        store_token<Out>(p, i_s * p.lines + line, first_patch + j + reach, d, difference);
    }
  }
}

template <typename Word, typename Out>
int launch_tokens(const pae_shortcut_tokens_params& p, void* stream) {
  typedef typename Word::Factor Factor;
  const int64_t planes = p.count * p.batch * p.channels,
                taps = p.count * p.channels * p.patch_height;
  const unsigned bins = unsigned(ceil_div(p.window, int64_t(kBins)));
  const size_t strip_bytes = size_t(p.height + p.window * kBins) * sizeof(float2);
  const size_t token_bytes = size_t(kStages * kStage) * 4 + size_t(p.window * kPatches) * 8;
  PAE_LAUNCH((strips_kernel<Factor>), dim3(unsigned(planes), bins), kRows, strip_bytes, stream, p);
  PAE_LAUNCH((taps_kernel<Factor>), dim3(unsigned(taps), bins), kRows,
             size_t(p.patch_width * kBins) * sizeof(float2), stream, p);
  const int64_t grid = p.width / p.patch_width, reach = grid % 2 ? grid : grid / 2;
  const dim3 blocks(unsigned(p.count * (p.lines_padded / kLines)),
                    unsigned(p.channels_padded / kChannels),
                    unsigned(ceil_div(reach, int64_t(kPatches))));
  if (grid % 2)
    PAE_LAUNCH((tokens_kernel<Word, Out, false>), blocks, kWarps * kWarp, token_bytes, stream, p);
  else
    PAE_LAUNCH((tokens_kernel<Word, Out, true>), blocks, kWarps * kWarp, token_bytes, stream, p);
  return PAE_OK;
}

// ---- pooling

constexpr int kPooled = 64;  // tokens of a block: fixed, so that a window's bits never change
constexpr int kPoolThreads = 256;

// 2^(field - 127), 0 from field 0 down; field is at most 254.
__device__ __forceinline__ float power_of_two(int field) {
  return as_float(uint32_t(field > 0 ? field : 0) << 23);
}

__device__ __forceinline__ int exponent_field(float x) {
#ifdef PAE_EMULATED
  return int(emulation::bits<uint32_t>(x) >> 23) & 255;
#else
  return (__float_as_int(x) >> 23) & 255;
#endif
}

// Grid (S parts). A warp takes 8 of the block's tokens in turn; a lane holds kVectors x 4 channels.
template <typename T, int kVectors>
__global__ void __launch_bounds__(kPoolThreads) pool_kernel(pae_shortcut_pool_params p) {
  PAE_DYNAMIC_SHARED(float, partial);  // (warps, D)
  constexpr int kPoolWarps = kPoolThreads / kWarp;
  PAE_SHARED(float, energies, [kPoolWarps]);
  PAE_SHARED(int, fields, [kPoolWarps]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, dim = int(p.dim);
  const Index i_s = blockIdx.x / p.parts, first = blockIdx.x % p.parts * kPooled;
  const bool whole = p.vectors != 0;
  float sum[kVectors][4] = {}, energy = 0.0f;
  int field = 1;
  for (int turn = 0; turn < kPooled / kPoolWarps; ++turn) {
    const Index row = first + turn * kPoolWarps + warp;
    if (row >= p.batch * p.tokens_per_image) break;
    const Index image = row / p.tokens_per_image, token = row % p.tokens_per_image;
    const T* const at = static_cast<const T*>(p.tokens) + i_s * p.stride_s + image * p.stride_b +
                        token * p.stride_n;
    const float* const shift =
        p.rows == nullptr ? nullptr : static_cast<const float*>(p.rows) + token * dim;
    float t[kVectors][4], largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int d = (i * kWarp + lane) * 4;
      if (whole && d < dim) {
        const Pack<T, 4> packed = *reinterpret_cast<const Pack<T, 4>*>(at + d);
#pragma unroll
        for (int e = 0; e < 4; ++e) t[i][e] = to_float(packed.v[e]);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) t[i][e] = d + e < dim ? to_float(at[d + e]) : 0.0f;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (shift != nullptr && d + e < dim) t[i][e] += shift[d + e];
        largest = fmaxf(largest, fabsf(t[i][e]));
      }
    }
    const int before = field;
    field = max(before, min(exponent_field(warp_max(largest)), 253));
    const float shrunk = power_of_two(127 + before - field), scale = power_of_two(254 - field);
    float e = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        t[i][c] *= scale;
        e += t[i][c] * t[i][c];
      }
    e = warp_sum(e);
    energy = energy * (shrunk * shrunk) + e;
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[i][c] = sum[i][c] * (shrunk * shrunk * shrunk) + e * t[i][c];
  }
  if (lane == 0) energies[warp] = energy, fields[warp] = field;
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int d = (i * kWarp + lane) * 4 + c;
      if (d < dim) partial[warp * dim + d] = sum[i][c];
    }
  __syncthreads();
  int top = 1;
  for (int w = 0; w < kPoolWarps; ++w) top = max(top, fields[w]);
  float shrunk[kPoolWarps], total = 0.0f;
#pragma unroll
  for (int w = 0; w < kPoolWarps; ++w) {
    shrunk[w] = power_of_two(127 + fields[w] - top);
    total += energies[w] * shrunk[w] * shrunk[w];
  }
  for (int d = threadIdx.x; d < dim; d += kPoolThreads) {
    float value = 0.0f;
#pragma unroll
    for (int w = 0; w < kPoolWarps; ++w)
      value += partial[w * dim + d] * (shrunk[w] * shrunk[w] * shrunk[w]);
    static_cast<float*>(p.sums)[blockIdx.x * Index(dim) + d] = value;
  }
  if (threadIdx.x == 0) {
    static_cast<float*>(p.energies)[blockIdx.x] = total;
    static_cast<int32_t*>(p.exponents)[blockIdx.x] = top;
  }
}

// Grid (S, tiles of 32 channels): 8 groups of parts a channel, each in turn, then the groups.
template <typename T>
__global__ void __launch_bounds__(kPoolThreads) pool_sum_kernel(pae_shortcut_pool_params p) {
  constexpr int kGroups = kPoolThreads / kWarp;
  PAE_SHARED(float, values, [kGroups][kWarp]);
  const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp;
  const Index first = blockIdx.x * p.parts;
  const int d = blockIdx.y * kWarp + lane;
  const int32_t* const exponents = static_cast<const int32_t*>(p.exponents) + first;
  const float* const energies = static_cast<const float*>(p.energies) + first;
  int top = 1;
  for (int part = threadIdx.x; part < p.parts; part += kPoolThreads)
    top = max(top, exponents[part]);
  top = block_max<kPoolThreads>(top);
  float energy = 0.0f, value = 0.0f;
  for (int part = threadIdx.x; part < p.parts; part += kPoolThreads) {
    const float shrunk = power_of_two(127 + exponents[part] - top);
    energy += energies[part] * shrunk * shrunk;
  }
  energy = block_sum<kPoolThreads>(energy);
  if (d < p.dim)
    for (int part = group; part < p.parts; part += kGroups) {
      const float shrunk = power_of_two(127 + exponents[part] - top);
      value += static_cast<const float*>(p.sums)[(first + part) * p.dim + d] *
               (shrunk * shrunk * shrunk);
    }
  values[group][lane] = value;
  __syncthreads();
  if (group != 0 || d >= p.dim) return;
  for (int g = 1; g < kGroups; ++g) value += values[g][lane];
  value = value / (energy == 0.0f ? 1.0f : energy) * power_of_two(top);
  static_cast<T*>(p.out)[blockIdx.x * p.dim + d] = from_float<T>(value);
}

template <typename T, int kVectors>
int launch_pool(const pae_shortcut_pool_params& p, void* stream) {
  const size_t bytes = size_t(kPoolThreads / kWarp) * size_t(p.dim) * sizeof(float);
  PAE_LAUNCH((pool_kernel<T, kVectors>), unsigned(p.count * p.parts), kPoolThreads, bytes, stream,
             p);
  PAE_LAUNCH((pool_sum_kernel<T>),
             dim3(unsigned(p.count), unsigned(ceil_div(p.dim, int64_t(kWarp)))), kPoolThreads, 0,
             stream, p);
  return PAE_OK;
}

template <typename T>
int launch_pool(const pae_shortcut_pool_params& p, void* stream) {
  const int64_t vectors = ceil_div(p.dim, int64_t(4 * kWarp));
  if (vectors <= 3) return launch_pool<T, 3>(p, stream);
  if (vectors <= 6) return launch_pool<T, 6>(p, stream);
  if (vectors <= 10) return launch_pool<T, 10>(p, stream);
  return launch_pool<T, 16>(p, stream);
}

}  // namespace
}  // namespace pae

PAE_DEFINE_SIZEOF(shortcut_tokens)
PAE_DEFINE_SIZEOF(shortcut_pool)

extern "C" PAE_API int pae_shortcut_tokens(const pae_shortcut_tokens_params* p, void* stream) {
  PAE_CHECK_STRUCT(p);
  PAE_REQUIRE(p->height % p->patch_height == 0 && p->width % p->patch_width == 0,
              "patches of %lld x %lld do not tile the images", (long long)p->patch_height,
              (long long)p->patch_width);
  PAE_REQUIRE(p->lines == p->batch * (p->height / p->patch_height) && p->lines_padded >= p->lines &&
                  p->lines_padded % pae::kLines == 0,
              "lines_padded is %lld, expected whole tiles of %d", (long long)p->lines_padded,
              pae::kLines);
  PAE_REQUIRE(p->depth_padded >= p->channels * p->patch_height && p->depth_padded % 16 == 0,
              "depth_padded is %lld, expected whole tiles of 16", (long long)p->depth_padded);
  PAE_REQUIRE(p->channels_padded >= p->dim && p->channels_padded % pae::kChannels == 0,
              "channels_padded is %lld, expected whole tiles of %d", (long long)p->channels_padded,
              pae::kChannels);
  PAE_REQUIRE(p->window >= 1 && p->window <= p->height && p->window <= p->width, "window is %lld",
              (long long)p->window);
  switch (p->dtype) {
    case PAE_FLOAT32: return pae::launch_tokens<pae::OneTf32, float>(*p, stream);
    case PAE_FLOAT16: return pae::launch_tokens<pae::OneTf32, __half>(*p, stream);
    case PAE_BFLOAT16: return pae::launch_tokens<pae::TwoBf16, __nv_bfloat16>(*p, stream);
  }
  return pae::fail(PAE_INVALID_PARAMS, "%s: dtype is %d", __func__, p->dtype);
}

extern "C" PAE_API int pae_shortcut_pool(const pae_shortcut_pool_params* p, void* stream) {
  PAE_CHECK_STRUCT(p);
  PAE_REQUIRE(p->dim >= 1 && p->dim <= 2048, "dim is %lld, expected 1 to 2048", (long long)p->dim);
  PAE_REQUIRE(p->parts == pae::ceil_div(p->batch * p->tokens_per_image, int64_t(pae::kPooled)),
              "parts is %lld, expected one for every %d tokens", (long long)p->parts, pae::kPooled);
  switch (p->dtype) {
    case PAE_FLOAT32: return pae::launch_pool<float>(*p, stream);
    case PAE_FLOAT16: return pae::launch_pool<__half>(*p, stream);
    case PAE_BFLOAT16: return pae::launch_pool<__nv_bfloat16>(*p, stream);
  }
  return pae::fail(PAE_INVALID_PARAMS, "%s: dtype is %d", __func__, p->dtype);
}

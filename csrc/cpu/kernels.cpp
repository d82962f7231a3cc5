// The kernels, compiled once for each instruction set; PAE_ISA is the name of the table they go in.
//
// Those in this file are bound by memory: every array is read or written once from there, and a row
// of a norm (3 KB in fp32 at width 768) stays in the first cache between its two or three passes.
// Statistics and sums are fp32, one partial sum a lane, two vectors at a time.

#include "kernels.h"

#include <cmath>
#include <type_traits>

#include "attention.h"
#include "eigenvector.h"
#include "maps.h"
#include "vector.h"

namespace pae {
namespace {

// `f` of a null pointer to the C++ type of an element type. One instance of a kernel for each
// combination is what makes the loops free of branches.
template <typename Function>
PAE_INLINE void with_type(int32_t type, Function f) {
  if (type == PAE_FLOAT32)
    f(static_cast<float*>(nullptr));
  else
    f(static_cast<Half*>(nullptr));
}

// ---- norms

template <typename X, typename Delta, typename Out>
void norm_fwd_rows(const pae_cpu_norm_fwd_params& p, int64_t begin, int64_t end) {
  const int64_t n = p.width;
  const float share = 1.0f / static_cast<float>(n);
  for (int64_t row = begin; row < end; ++row) {
    const X* x = static_cast<const X*>(p.x) + row * n;
    F sum = {};
    if (p.delta != nullptr) {
      const Delta* delta = static_cast<const Delta*>(p.delta) + row * n;
      X* y = static_cast<X*>(p.y) + row * n;
      vectors(n, [&](int64_t i, auto v) {
        v.store(y + i, v.load(x + i) + v.load(delta + i));
        sum += v.load(y + i);  // as it was rounded
      });
      x = y;
    } else {
      vectors(n, [&](int64_t i, auto v) { sum += v.load(x + i); });
    }
    const float mean = p.rms ? 0.0f : total(sum) * share;
    F squares = {};
    vectors(n, [&](int64_t i, auto v) {
      F c = v.only(v.load(x + i) - mean);
      squares += c * c;
    });
    const float rstd = 1.0f / std::sqrt(total(squares) * share + p.eps);
    Out* xhat = static_cast<Out*>(p.xhat) + row * n;
    vectors(n, [&](int64_t i, auto v) { v.store(xhat + i, (v.load(x + i) - mean) * rstd); });
    static_cast<float*>(p.rstd)[row] = rstd;
  }
}

void norm_fwd(const pae_cpu_norm_fwd_params& p, int64_t begin, int64_t end) {
  with_type(p.x_type, [&](auto* x) {
    with_type(p.delta_type, [&](auto* delta) {
      with_type(p.xhat_type, [&](auto* out) {
        norm_fwd_rows<std::decay_t<decltype(*x)>, std::decay_t<decltype(*delta)>,
                      std::decay_t<decltype(*out)>>(p, begin, end);
      });
    });
  });
}

template <typename D, typename Xhat, typename Residual, typename Dx>
void norm_bwd_rows(const pae_cpu_norm_bwd_params& p, int64_t begin, int64_t end) {
  const int64_t n = p.width;
  const float share = 1.0f / static_cast<float>(n);
  const bool half_copy = p.copy_type == PAE_BFLOAT16;
  for (int64_t row = begin; row < end; ++row) {
    const D* d = static_cast<const D*>(p.d) + row * n;
    const Xhat* xhat = static_cast<const Xhat*>(p.xhat) + row * n;
    F sum = {}, dot = {};
    vectors(n, [&](int64_t i, auto v) {
      F g = v.load(d + i);
      sum += g;
      dot += g * v.load(xhat + i);
    });
    const float rstd = static_cast<const float*>(p.rstd)[row];
    const float mean = p.rms ? 0.0f : total(sum) * share, along = total(dot) * share;
    const Residual* residual = static_cast<const Residual*>(p.residual) + row * n;
    Dx* dx = static_cast<Dx*>(p.dx) + row * n;
    vectors(n, [&](int64_t i, auto v) {
      F g = (v.load(d + i) - mean - v.load(xhat + i) * along) * rstd;
      if (p.residual != nullptr) g += v.load(residual + i);
      v.store(dx + i, g);
      if (p.copy == nullptr) return;
      if (half_copy)
        v.store(static_cast<Half*>(p.copy) + row * n + i, g);
      else
        v.store(static_cast<float*>(p.copy) + row * n + i, g);
    });
  }
}

void norm_bwd(const pae_cpu_norm_bwd_params& p, int64_t begin, int64_t end) {
  with_type(p.d_type, [&](auto* d) {
    with_type(p.xhat_type, [&](auto* xhat) {
      with_type(p.residual_type, [&](auto* residual) {
        with_type(p.dx_type, [&](auto* dx) {
          norm_bwd_rows<std::decay_t<decltype(*d)>, std::decay_t<decltype(*xhat)>,
                        std::decay_t<decltype(*residual)>, std::decay_t<decltype(*dx)>>(p, begin,
                                                                                        end);
        });
      });
    });
  });
}

// ---- activations

// c[0] + c[1] t + ..., even and odd powers apart: products that wait for each other fill the
// scheduler, and two chains are half as long as one.
template <int count>
PAE_INLINE F polynomial(const float (&c)[count], F t) {
  constexpr int last_even = (count - 1) / 2 * 2, last_odd = (count - 2) / 2 * 2 + 1;
  const F square = t * t;
  F even = splat(c[last_even]), odd = splat(c[last_odd]);
  for (int k = last_even - 2; k >= 0; k -= 2) even = even * square + c[k];
  for (int k = last_odd - 2; k >= 1; k -= 2) odd = odd * square + c[k];
  return odd * t + even;
}

// 1/2 + u p(u^2) between -`bound` and `bound`, 0 below and 1 above: both functions below are odd
// around 1/2. The polynomial runs in t = 2 u^2 / bound^2 - 1, where its coefficients are small and
// fp32 loses nothing to cancellation. Neither an exponential nor a division is needed.
template <int count>
PAE_INLINE F odd_around_half(const float (&c)[count], float bound, F u) {
  F p = 0.5f + u * polynomial(c, u * u * (2.0f / (bound * bound)) - 1.0f);
  p = u < -bound ? F{} : p;
  return u > bound ? splat(1.0f) : p;
}

// The normal distribution function Phi(u), fitted to 8e-9.
constexpr float PHI[] = {0.12855193f,    -0.064172335f,   0.0477376282f,  -0.0387927853f,
                         0.0320702605f,  -0.0260482617f,  0.0203645658f,  -0.0149990711f,
                         0.0102278311f,  -0.00681992853f, 0.00462177536f, -0.002418624f,
                         0.000720110722f, -0.000529150071f, 0.000631557719f, -0.000236412641f};
// Phi(u) + u Phi'(u), the slope of u Phi(u), fitted to 3e-8.
constexpr float SLOPE[] = {0.114074908f,  -0.0572679117f, 0.0439286344f,  -0.0393206552f,
                           0.0399719141f, -0.0448890515f, 0.0519184992f,  -0.0578813665f,
                           0.0638372451f, -0.0691928416f, 0.0581091903f,  -0.0340015478f,
                           0.0366517529f, -0.0515117161f, 0.0243083201f,  0.00863994379f,
                           0.0008720365f, -0.0131944483f, 0.0055922633f};

// The same two for what is rounded to bf16, shorter: u Phi(u) is off by at most 1.01e-5 and by
// 2e-5 |u|, the slope by 2e-5, which is half a step of bf16 at 0.005 and at 0.01.
constexpr float HALF_PHI[] = {0.153543551f,  -0.0757574096f, 0.0541312192f,  -0.0405858619f,
                              0.0295680799f, -0.0191564632f, 0.0108626719f,  -0.0076194326f,
                              0.00567554882f, -0.0019671688f};
constexpr float HALF_SLOPE[] = {0.150162958f,  -0.0816624849f, 0.0759113206f,  -0.0828640088f,
                                0.0884096752f, -0.0891566504f, 0.0844197553f,  -0.0593343458f,
                                0.0262461024f, -0.0224202259f, 0.0264102913f,  -0.01085561f};

// Value and slope of an activation. What is not used of the two is not computed.
struct Gelu {
  PAE_INLINE void both(F u, F& y, F& slope) {
    y = u * odd_around_half(PHI, 5.5f, u);
    slope = odd_around_half(SLOPE, 6.2f, u);
  }
};
struct HalfGelu {
  PAE_INLINE void both(F u, F& y, F& slope) {
    y = u * odd_around_half(HALF_PHI, 4.6f, u);
    slope = odd_around_half(HALF_SLOPE, 4.75f, u);
  }
};
PAE_INLINE F clamp(F x, float bound) {
  x = x < -bound ? splat(-bound) : x;
  return x > bound ? splat(bound) : x;
}

// 1 / (1 + e^-x), and `rest` is 1 minus that, without the cancellation.
PAE_INLINE F sigmoid(F x, F& rest) {
  F e = exponential(-clamp(x, 87.0f));
  F s = reciprocal(1.0f + e);
  rest = e * s;
  return x < -87.0f ? F{} : s;
}

struct GeluTanh {  // u sigmoid(2 z), z = sqrt(2 / pi) (u + 0.044715 u^3)
  PAE_INLINE void both(F u, F& y, F& slope) {
    F v = clamp(u, 12.0f);  // where s has long been 0 or 1: the cube of what is larger overflows
    F square = v * v;
    F rest, s = sigmoid(v * (1.5957691f + 0.071354814f * square), rest);
    y = u * s;
    slope = s + v * s * rest * (1.5957691f + 0.21406444f * square);
  }
};
struct QuickGelu {
  PAE_INLINE void both(F u, F& y, F& slope) {
    F rest, s = sigmoid(1.702f * u, rest);
    y = u * s;
    slope = s + 1.702f * y * rest;
  }
};
struct Silu {
  PAE_INLINE void both(F u, F& y, F& slope) {
    F rest, s = sigmoid(u, rest);
    y = u * s;
    slope = s + y * rest;
  }
};
struct Relu {
  PAE_INLINE void both(F u, F& y, F& slope) {
    y = u < 0.0f ? F{} : u;  // a NaN stays one
    slope = u > 0.0f ? splat(1.0f) : F{};
  }
};

// `T`: of the array that u is read from.
template <typename T, typename Function>
PAE_INLINE void with_kind(int32_t kind, Function f) {
  if (kind == PAE_GELU) f(std::conditional_t<std::is_same_v<T, Half>, HalfGelu, Gelu>{});
  if (kind == PAE_GELU_TANH) f(GeluTanh{});
  if (kind == PAE_QUICK_GELU) f(QuickGelu{});
  if (kind == PAE_SILU) f(Silu{});
  if (kind == PAE_RELU) f(Relu{});
}

constexpr float CODE_SCALE = 200.0f, CODE_ZERO = 27.0f;

PAE_INLINE void store_code(uint8_t* p, F slope, int n) {
  const F magic = splat(12582912.0f);
  F scaled = slope * CODE_SCALE + CODE_ZERO;
  scaled = scaled < 0.0f ? F{} : scaled;
  scaled = scaled > 255.0f ? splat(255.0f) : scaled;
  B bytes = narrow(bits<U>(scaled + magic) & 0xffu);
  std::memcpy(p, &bytes, n);
}

PAE_INLINE F load_code(const uint8_t* p, int n) {
  B bytes = {};
  std::memcpy(&bytes, p, n);
  return (__builtin_convertvector(widen(bytes), F) - CODE_ZERO) * (1.0f / CODE_SCALE);
}

PAE_INLINE int length(Whole) { return W; }
PAE_INLINE int length(Part part) { return part.n; }

void activation_fwd(const pae_cpu_activation_fwd_params& p, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) {
    using T = std::decay_t<decltype(*type)>;
    with_kind<T>(p.kind, [&](auto act) {
      const T* u = static_cast<const T*>(p.u) + begin;
      T* y = static_cast<T*>(p.y) + begin;
      uint8_t* code = static_cast<uint8_t*>(p.code) + begin;
      if (p.code == nullptr)
        vectors(end - begin, [&](int64_t i, auto v) {
          F value, slope;
          act.both(v.load(u + i), value, slope);
          v.store(y + i, value);
        });
      else
        vectors(end - begin, [&](int64_t i, auto v) {
          F value, slope;
          act.both(v.load(u + i), value, slope);
          v.store(y + i, value);
          store_code(code + i, slope, length(v));
        });
    });
  });
}

void activation_bwd(const pae_cpu_activation_bwd_params& p, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) {
    using T = std::decay_t<decltype(*type)>;
    const T* d = static_cast<const T*>(p.d) + begin;
    T* du = static_cast<T*>(p.du) + begin;
    if (p.kept_type == PAE_UINT8) {
      const uint8_t* code = static_cast<const uint8_t*>(p.kept) + begin;
      vectors(end - begin, [&](int64_t i, auto v) {
        v.store(du + i, v.load(d + i) * load_code(code + i, length(v)));
      });
      return;
    }
    with_type(p.kept_type, [&](auto* kept_type) {
      using U = std::decay_t<decltype(*kept_type)>;
      const U* u = static_cast<const U*>(p.kept) + begin;
      with_kind<U>(p.kind, [&](auto act) {
        vectors(end - begin, [&](int64_t i, auto v) {
          F value, slope;
          act.both(v.load(u + i), value, slope);
          v.store(du + i, v.load(d + i) * slope);
        });
      });
    });
  });
}

// ---- gates

void gated(const pae_cpu_gated_params& p, int64_t begin, int64_t end) {
  const int64_t n = p.width;
  with_type(p.type, [&](auto* type) {
    using T = std::decay_t<decltype(*type)>;
    with_kind<T>(p.kind, [&](auto act) {
      for (int64_t row = begin; row < end; ++row) {
        const T* u = static_cast<const T*>(p.u) + row * 2 * n;
        if (p.d == nullptr) {
          T* y = static_cast<T*>(p.y) + row * n;
          vectors(n, [&](int64_t i, auto v) {
            F value, slope;
            act.both(v.load(u + i), value, slope);
            v.store(y + i, value * v.load(u + n + i));
          });
          continue;
        }
        const T* d = static_cast<const T*>(p.d) + row * n;
        T* du = static_cast<T*>(p.y) + row * 2 * n;
        vectors(n, [&](int64_t i, auto v) {
          F value, slope, g = v.load(d + i);
          act.both(v.load(u + i), value, slope);
          v.store(du + i, g * v.load(u + n + i) * slope);
          v.store(du + n + i, g * value);
        });
      }
    });
  });
}

// A norm behind a gate, row by row. Gated rows are not kept: the backward forms them again, in what
// will be the second half of the gradient's row, and gates and ups are read from the first cache
// where they are read twice. Traffic: 3 n entries a row in the forward and 5 n in the backward; of a
// gate and a norm apart it is 5 n and 13 n.
void gated_norm(const pae_cpu_gated_norm_params& p, int64_t begin, int64_t end) {
  const int64_t n = p.width;
  const float share = 1.0f / static_cast<float>(n);
  with_type(p.type, [&](auto* type) {
    using T = std::decay_t<decltype(*type)>;
    with_kind<T>(p.kind, [&](auto act) {
      for (int64_t row = begin; row < end; ++row) {
        const T* u = static_cast<const T*>(p.u) + row * 2 * n;
        T* du = static_cast<T*>(p.y) + row * 2 * n;
        T* y = p.d == nullptr ? static_cast<T*>(p.y) + row * n : du + n;
        F sum = {};
        vectors(n, [&](int64_t i, auto v) {
          F value, slope;
          act.both(v.load(u + i), value, slope);
          v.store(y + i, value * v.load(u + n + i));
          sum += v.load(y + i);  // as it was rounded
        });
        const float mean = p.rms ? 0.0f : total(sum) * share;
        F squares = {};
        vectors(n, [&](int64_t i, auto v) {
          F c = v.only(v.load(y + i) - mean);
          squares += c * c;
        });
        const float rstd = 1.0f / std::sqrt(total(squares) * share + p.eps);
        if (p.d == nullptr) {
          vectors(n, [&](int64_t i, auto v) { v.store(y + i, (v.load(y + i) - mean) * rstd); });
          continue;
        }
        const T* d = static_cast<const T*>(p.d) + row * n;
        F d_sum = {}, dot = {};
        vectors(n, [&](int64_t i, auto v) {
          F g = v.load(d + i);
          d_sum += g;
          dot += g * (v.load(y + i) - mean);
        });
        const float d_mean = p.rms ? 0.0f : total(d_sum) * share;
        const float along = total(dot) * share * rstd * rstd;
        vectors(n, [&](int64_t i, auto v) {
          F value, slope, up = v.load(u + n + i);
          act.both(v.load(u + i), value, slope);
          F g = (v.load(d + i) - d_mean - (v.load(y + i) - mean) * along) * rstd;
          v.store(du + i, g * up * slope);
          v.store(du + n + i, g * value);
        });
      }
    });
  });
}

// ---- rotations

// of the rows [begin, end) of batch * count
void rotate(const pae_cpu_rotate_params& p, int64_t begin, int64_t end) {
  const int64_t half = p.width / 2, first = p.tokens - p.count;
  const int64_t turned = (p.parts > 1 ? 2 : 1) * p.heads;
  const float sign = p.back ? -1.0f : 1.0f;
  with_type(p.type, [&](auto* type) {
    using T = std::decay_t<decltype(*type)>;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / p.count, at = row % p.count;
      T* own = static_cast<T*>(p.qkv) +
               (image * p.tokens + first + at) * p.parts * p.heads * p.width;
      for (int64_t part = 0; part < turned; ++part) {  // heads of queries, then of keys
        const int64_t table = part % p.heads * p.table_head + at * half;
        T* a = own + part * p.width;
        vectors(half, [&](int64_t i, auto v) {
          F x = v.load(a + i), y = v.load(a + half + i);
          F sin = v.load(p.sin + table + i) * sign, cos = v.load(p.cos + table + i);
          v.store(a + i, x * cos - y * sin);
          v.store(a + half + i, y * cos + x * sin);
        });
      }
    }
  });
}

}  // namespace

#define PAE_STRING_(x) #x
#define PAE_STRING(x) PAE_STRING_(x)

extern const Kernels PAE_ISA = {
    PAE_STRING(PAE_ISA), norm_fwd,       norm_bwd,      activation_fwd, activation_bwd,
    gated,               gated_norm,     rotate,        eigenvector,    enlarged_fwd,
    enlarged_bwd,        pixel_loss_fwd, pixel_loss_bwd, attention_room, attention_fwd,
    attention_bwd,
};

}  // namespace pae

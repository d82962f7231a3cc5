// CUDA's small vector types, as far as the kernels use them.
#pragma once

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define PAE_VECTORS(type, name)                                                           \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                \
  struct alignas(sizeof(type) == 8 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                        \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

PAE_VECTORS(float, float)
PAE_VECTORS(double, double)
PAE_VECTORS(int, int)
PAE_VECTORS(unsigned, uint)
#undef PAE_VECTORS

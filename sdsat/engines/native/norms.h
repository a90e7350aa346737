// RMS norms and rotary positions of one row, with transformers' roundings between operations.
//
// Exact: a row is normed and turned by itself, so nothing here can depend on the rows beside it.
#pragma once
#include <cmath>

#include "vectors.h"

// y [size] = x / sqrt(mean of x^2 + eps) * weight.
template <class T, class X, class Y>
static void rms_norm(const X* x, const void* weight, int size, float eps, Y* y) {
  f32x squares = {};
  for (int i = 0; i < size; i += LANES) squares += load(x + i) * load(x + i);
  float factor = 1.f / std::sqrt(sum(squares) / size + eps);
  for (int i = 0; i < size; i += LANES)
    store_nearest<T>(y + i, nearest<T>(load(x + i) * factor) * load((const T*)weight + i));
}

// Turn the two halves of a head x [dim] by its position's angles, in place.
template <class T, class X> static void rotate(X* x, const float* cos, const float* sin, int dim) {
  const int half = dim / 2;
  for (int i = 0; i < half; i += LANES) {
    f32x a = load(x + i);
    f32x b = load(x + half + i);
    store_nearest<T>(x + i, nearest<T>(a * load(cos + i)) + nearest<T>(-b * load(sin + i)));
    store_nearest<T>(x + half + i,
                     nearest<T>(b * load(cos + half + i)) + nearest<T>(a * load(sin + half + i)));
  }
}

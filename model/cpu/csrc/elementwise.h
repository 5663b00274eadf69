// The small operations between matrix products, in float32 whatever goes in and out.
#pragma once

#include "simd.h"

namespace {

using octavo::Norm;
using octavo::Rope;
using octavo::SiluMul;

// Root-mean-square norm (arXiv:1910.07467) of rows begin to end.
void norm(const Norm& n, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t from = row * n.x_stride, to = row * n.out_stride;
    float* residual = n.residual ? n.residual + row * n.dim : nullptr;
    Vec squares = {};
    for (int64_t i = 0; i < n.dim; i += kWidth) {
      Vec x = load_some(n.x, n.x_dtype, from + i, n.dim - i);
      if (residual) {
        x += load_some(residual + i, n.dim - i);
        store_some(residual + i, x, n.dim - i);
      }
      squares += x * x;
    }
    const float scale = 1.0f / __builtin_sqrtf(sum(squares) / float(n.dim) + n.eps);
    for (int64_t i = 0; i < n.dim; i += kWidth) {
      const Vec x = residual ? load_some(residual + i, n.dim - i)
                             : load_some(n.x, n.x_dtype, from + i, n.dim - i);
      const Vec weight = load_some(n.weight, n.weight_dtype, i, n.dim - i);
      store_some(n.out, n.out_dtype, to + i, x * scale * weight, n.dim - i);
    }
  }
}

// Rotary embedding (arXiv:2104.09864), halves layout, in place.
void rope(const Rope& r, int64_t begin, int64_t end) {
  const int64_t half = r.rotary_dim / 2;
  for (int64_t token = begin; token < end; ++token) {
    const float* cos = r.cos_sin + r.positions[token] * r.rotary_dim;
    const float* sin = cos + half;
    for (int64_t head = 0; head < r.num_heads; ++head) {
      const int64_t at = token * r.x.token_stride + head * r.x.head_stride;
      for (int64_t i = 0; i < half; i += kWidth) {
        const int64_t count = half - i;
        const Vec c = load_some(cos + i, count), s = load_some(sin + i, count);
        const Vec first = load_some(r.x.data, r.x.dtype, at + i, count);
        const Vec second = load_some(r.x.data, r.x.dtype, at + half + i, count);
        store_some(r.x.data, r.x.dtype, at + i, first * c - second * s, count);
        store_some(r.x.data, r.x.dtype, at + half + i, second * c + first * s, count);
      }
    }
  }
}

void silu_mul(const SiluMul& s, int64_t begin, int64_t end) {
  const float log2e = 1.44269504f;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t from = row * s.gate_up_stride;
    for (int64_t i = 0; i < s.dim; i += kWidth) {
      const int64_t count = s.dim - i;
      const Vec gate = load_some(s.gate_up, s.dtype, from + i, count);
      const Vec up = load_some(s.gate_up, s.dtype, from + s.dim + i, count);
      store_some(s.out, s.dtype, row * s.dim + i, gate / (1.0f + exp2(gate * -log2e)) * up, count);
    }
  }
}

}  // namespace

// A whole decoder in one call: threads synchronise at barriers instead of being woken for each
// operation, and no intermediate result is a tensor. Knows nothing of instruction sets (`Kernels`)
// nor of how attention is split into units (`Session`).

#include <cstring>
#include <memory>
#include <vector>

#include "attention.h"
#include "threads.h"

namespace octavo {
namespace {

constexpr int64_t kPanelRows = 16;
constexpr int64_t kAlignment = 64;

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

void* aligned(std::vector<char>& memory) {
  return reinterpret_cast<void*>(round_up(reinterpret_cast<intptr_t>(memory.data()), kAlignment));
}

// In the order of model/cpu/decoder.py; a pointer is null where the model has no such weight.
struct Layer {
  const float* input_norm;
  Weights qkv;
  const float* q_norm;
  const float* k_norm;
  Weights o;
  const float* post_norm;
  Weights gate_up;
  Weights down;
};

struct Shape {
  int64_t hidden;
  int64_t inner;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t rotary_dim;
};

// The rotation of a step's tokens.
struct Angles {
  // [tokens]: rows of `cos_sin`, or of the decoder's own table if that is null.
  const int64_t* rows;
  const float* cos_sin;
  // [tokens]: the row of the decoder's own table for the queries that meet sinks, negative for the
  // others; null where no row has sinks.
  const int64_t* sink_positions;
};

// Where rotated queries are copied to, beside their use.
struct QueryCopy {
  // [tokens]: the token's row in `queries`, negative for tokens that are not copied; may be null.
  const int64_t* rows;
  // [layers, num_rows, heads * head_dim].
  float* queries;
  int64_t num_rows;
};

// The input rows of a product, in the kernels' panel dtype, padded with zeros. The padding is never
// written to.
class Panel {
 public:
  void fit(int64_t rows, int64_t width, int64_t element_bytes) {
    num_inputs_ = round_up(width, kByteTileInputs);
    // An odd number of cache lines, so that the same input of several rows is not in the same set.
    stride_ = num_inputs_ + kAlignment / element_bytes;
    const size_t bytes = round_up(rows, kPanelRows) * stride_ * element_bytes;
    if (memory_.size() < bytes + kAlignment) memory_.assign(bytes + kAlignment, 0);
  }
  void* data() { return aligned(memory_); }
  int64_t stride() const { return stride_; }
  int64_t num_inputs() const { return num_inputs_; }

 private:
  std::vector<char> memory_;
  int64_t stride_ = 0, num_inputs_ = 0;
};

// The same rows as integers, where the weights are; see `Kernels::split_rows`.
class SplitRows {
 public:
  void fit(int64_t bytes) {
    if (int64_t(memory_.size()) < bytes + kAlignment) memory_.assign(bytes + kAlignment, 0);
  }
  void* data() { return aligned(memory_); }

 private:
  std::vector<char> memory_;
};

Product product_of(Panel& panel, int64_t rows, const Weights& weights, int64_t num_outputs,
                   SplitRows& split) {
  Product p = {};
  p.panel = panel.data();
  p.panel_stride = panel.stride();
  p.num_inputs = panel.num_inputs();
  p.num_rows = rows;
  p.weights = weights;
  p.num_outputs = num_outputs;
  p.split = split.data();
  return p;
}

class Decoder {
 public:
  Decoder(const Kernels* kernels, const Shape& shape, float eps, const Layer* layers,
          int64_t num_layers, const float* cos_sin)
      : kernels_(*kernels), shape_(shape), eps_(eps), layers_(layers, layers + num_layers),
        cos_sin_(cos_sin) {}

  // Runs the layers over the planned step; updates `residual` [tokens, hidden] in place.
  void forward(Session& session, const Angles& angles, const QueryCopy& copy, float* residual) {
    const int64_t tokens = session.num_tokens;
    const int64_t element_bytes = kernels_.panel_dtype() == kFloat32 ? 4 : 2;
    normed_.fit(tokens, shape_.hidden, element_bytes);
    attended_.fit(tokens, shape_.num_heads * shape_.head_dim, element_bytes);
    gated_.fit(tokens, shape_.inner, element_bytes);
    qkv_.resize(tokens * qkv_width());
    if (angles.sink_positions) sink_queries_.resize(tokens * attention_width());
    const int64_t widest = std::max({shape_.hidden, shape_.inner, attention_width()});
    split_.fit(kernels_.split_bytes(tokens, round_up(widest, kByteTileInputs)));
    const int64_t scratch = round_up(kernels_.product_scratch_floats(), 16);
    scratch_.resize(scratch * session.threads + 16);
#pragma omp parallel num_threads(session.threads)
    {
      const auto begin = reinterpret_cast<uintptr_t>(scratch_.data());
      float* mine = reinterpret_cast<float*>((begin + 63) / 64 * 64) +
                    omp_get_thread_num() * scratch;
      kernels_.configure_tiles();
      for (size_t i = 0; i < layers_.size(); ++i)
        layer(layers_[i], int32_t(i), session, angles, copy, residual, mine);
      kernels_.release_tiles();
    }
  }

 private:
  int64_t attention_width() const { return shape_.num_heads * shape_.head_dim; }
  int64_t qkv_width() const {
    return (shape_.num_heads + 2 * shape_.num_kv_heads) * shape_.head_dim;
  }

  // Every operation ends with a barrier, since the next one reads results of other threads.
  void layer(const Layer& layer, int32_t index, Session& session, const Angles& angles,
             const QueryCopy& copy, float* residual, float* scratch) {
    const int64_t tokens = session.num_tokens;
    norm(layer.input_norm, residual, tokens, layer.qkv);
    multiply(normed_, tokens, layer.qkv, qkv_width(), qkv_.data(), scratch);
    const Place place = place_of(session, index);
    Session& own = *place.session;
    const Attention attention = attention_to(place.layer, own);
    rope_and_store(layer, index, place.layer, own, angles, copy, attention);
    attend(own, attention, scratch_of(own, omp_get_thread_num()));
#pragma omp barrier
    add_product(attended_, tokens, layer.o, residual, scratch);
    norm(layer.post_norm, residual, tokens, layer.gate_up);
    gate(layer.gate_up, tokens, scratch);
    add_product(gated_, tokens, layer.down, residual, scratch);
  }

  // Runs function(begin, end) on this thread's share of [0, count), then waits for the others.
  template <class Function>
  void share(int64_t count, const Function& function) {
    const int64_t thread = omp_get_thread_num(), of = omp_get_num_threads();
    const int64_t begin = count * thread / of, end = count * (thread + 1) / of;
    if (begin < end) function(begin, end);
#pragma omp barrier
  }

  // Norms the rows, and splits them for their product with `weights`.
  void norm(const float* weight, const float* residual, int64_t tokens, const Weights& weights) {
    const Product p = product(normed_, tokens, weights, 0);
    Norm n = {};
    n.x = residual;
    n.x_dtype = kFloat32;
    n.x_stride = n.dim = shape_.hidden;
    n.weight = weight;
    n.weight_dtype = kFloat32;
    n.out = normed_.data();
    n.out_dtype = kernels_.panel_dtype();
    n.out_stride = normed_.stride();
    n.eps = eps_;
    share(tokens, [&](int64_t begin, int64_t end) {
      kernels_.norm(n, begin, end);
      if (weights.scales) kernels_.split_rows(p, begin, end);
    });
  }

  Product product(Panel& panel, int64_t tokens, const Weights& weights, int64_t num_outputs) {
    return product_of(panel, tokens, weights, num_outputs, split_);
  }

  void multiply(Panel& panel, int64_t tokens, const Weights& weights, int64_t num_outputs,
                float* out, float* scratch) {
    Product p = product(panel, tokens, weights, num_outputs);
    p.out = out;
    p.out_stride = num_outputs;
    run(p, scratch);
  }

  void add_product(Panel& panel, int64_t tokens, const Weights& weights, float* residual,
                   float* scratch) {
    Product p = product(panel, tokens, weights, shape_.hidden);
    p.out = residual;
    p.out_stride = shape_.hidden;
    p.is_added = true;
    if (p.weights.scales)
      share(tokens, [&](int64_t begin, int64_t end) { kernels_.split_rows(p, begin, end); });
    run(p, scratch);
  }

  void gate(const Weights& weights, int64_t tokens, float* scratch) {
    Product p = product(normed_, tokens, weights, 2 * shape_.inner);
    p.out = gated_.data();
    p.out_stride = gated_.stride();
    p.out_dtype = kernels_.panel_dtype();
    p.is_gated = true;
    run(p, scratch);
  }

  void run(Product& p, float* scratch) {
    const int64_t groups = round_up(p.num_outputs, kTileOutputs) / kTileOutputs;
    share(p.is_gated ? groups / 2 : groups, [&](int64_t begin, int64_t end) {
      kernels_.product(p, begin, end, scratch);
    });
  }

  // `index`: of the layer; `stored`: of its pages in the session.
  void rope_and_store(const Layer& layer, int32_t index, int32_t stored, Session& session,
                      const Angles& angles, const QueryCopy& copy, const Attention& attention) {
    const int64_t width = qkv_width(), dim = shape_.head_dim;
    float* k = qkv_.data() + shape_.num_heads * dim;
    const float* cos_sin = angles.cos_sin ? angles.cos_sin : cos_sin_;
    const Rope queries = {{qkv_.data(), width, dim, kFloat32}, angles.rows, cos_sin,
                          int32_t(shape_.num_heads), int32_t(shape_.rotary_dim)};
    const Rope keys = {{k, width, dim, kFloat32}, angles.rows, cos_sin,
                       int32_t(shape_.num_kv_heads), int32_t(shape_.rotary_dim)};
    const Write key_pages = key_write(session, stored, attention.own.keys);
    const Write value_pages = value_write(session, stored, attention.own.values);
    const bool has_desks = is_by_page(attention.kv_dtype);
    share(session.num_tokens, [&](int64_t begin, int64_t end) {
      if (layer.q_norm)
        for (int64_t token = begin; token < end; ++token) {
          norm_heads(layer.q_norm, qkv_.data() + token * width, shape_.num_heads);
          norm_heads(layer.k_norm, k + token * width, shape_.num_kv_heads);
        }
      if (angles.sink_positions) rotate_to_sinks(angles.sink_positions, begin, end);
      kernels_.rope(queries, begin, end);
      kernels_.rope(keys, begin, end);
      if (copy.rows) copy_queries(copy, index, begin, end);
      if (has_desks) return;
      kernels_.write(key_pages, begin, end);
      kernels_.write(value_pages, begin, end);
    });
    if (has_desks)
      share(num_page_heads(session, attention), [&](int64_t begin, int64_t end) {
        encode_page_heads(session, attention, begin, end);
      });
  }

  // Writes the queries, not rotated yet, as they meet the sinks; only those that need it.
  void rotate_to_sinks(const int64_t* positions, int64_t begin, int64_t end) {
    const int64_t width = attention_width();
    const Rope rope = {{sink_queries_.data(), width, shape_.head_dim, kFloat32}, positions,
                       cos_sin_, int32_t(shape_.num_heads), int32_t(shape_.rotary_dim)};
    for (int64_t token = begin; token < end; ++token) {
      if (positions[token] < 0) continue;
      std::memcpy(sink_queries_.data() + token * width, qkv_.data() + token * qkv_width(),
                  width * sizeof(float));
      kernels_.rope(rope, token, token + 1);
    }
  }

  void copy_queries(const QueryCopy& copy, int32_t index, int64_t begin, int64_t end) {
    const int64_t width = attention_width();
    float* layer = copy.queries + index * copy.num_rows * width;
    for (int64_t token = begin; token < end; ++token)
      if (copy.rows[token] >= 0)
        std::memcpy(layer + copy.rows[token] * width, qkv_.data() + token * qkv_width(),
                    width * sizeof(float));
  }

  void norm_heads(const float* weight, float* heads, int64_t count) {
    Norm n = {};
    n.x = n.out = heads;
    n.x_dtype = n.weight_dtype = n.out_dtype = kFloat32;
    n.weight = weight;
    n.dim = n.x_stride = n.out_stride = shape_.head_dim;
    n.eps = eps_;
    kernels_.norm(n, 0, count);
  }

  Attention attention_to(int32_t index, Session& session) {
    const int64_t width = qkv_width(), dim = shape_.head_dim;
    float* k = qkv_.data() + shape_.num_heads * dim;
    float* v = k + shape_.num_kv_heads * dim;
    Attention a =
        attention_of(session, index, {k, width, dim, kFloat32}, {v, width, dim, kFloat32});
    a.q = {qkv_.data(), width, dim, kFloat32};
    a.sink_q = {sink_queries_.data(), attention_width(), dim, kFloat32};
    a.out = {attended_.data(), attended_.stride(), dim, kernels_.panel_dtype()};
    return a;
  }

  const Kernels& kernels_;
  const Shape shape_;
  const float eps_;
  const std::vector<Layer> layers_;
  const float* cos_sin_;
  Panel normed_, attended_, gated_;
  SplitRows split_;
  std::vector<float> qkv_, sink_queries_, scratch_;
};

}  // namespace
}  // namespace octavo

using namespace octavo;

extern "C" {

// `layers` is [num_layers] of `Layer`; everything pointed to must outlive the decoder.
Decoder* octavo_decoder_new(const Kernels* kernels, const int64_t* shape, float eps,
                            const void* layers, int64_t num_layers, const float* cos_sin) {
  const Shape s = {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]};
  return std::make_unique<Decoder>(kernels, s, eps, static_cast<const Layer*>(layers), num_layers,
                                   cos_sin)
      .release();
}

void octavo_decoder_free(Decoder* decoder) { delete decoder; }

// Pointers behind `residual` may be null: see `Angles` and `QueryCopy`.
void octavo_decoder_forward(Decoder* decoder, Session* session, const int64_t* positions,
                            float* residual, const float* cos_sin, const int64_t* sink_positions,
                            const int64_t* query_rows, float* queries, int64_t num_query_rows) {
  decoder->forward(*session, {positions, cos_sin, sink_positions},
                   {query_rows, queries, num_query_rows}, residual);
}

// Float32 `x` [rows, inputs] times packed weights, to `out` [rows, num_outputs].
void octavo_product(const Kernels* kernels, const float* x, int64_t rows, int64_t inputs,
                    const Weights* weights, int64_t num_outputs, float* out, int32_t threads) {
  Panel panel;
  panel.fit(rows, inputs, kernels->panel_dtype() == kFloat32 ? 4 : 2);
  SplitRows split;
  if (weights->scales) split.fit(kernels->split_bytes(rows, panel.num_inputs()));
  Product p = product_of(panel, rows, *weights, num_outputs, split);
  p.out = out;
  p.out_stride = num_outputs;
  const int64_t scratch = round_up(kernels->product_scratch_floats(), 16);
  std::vector<char> memory(scratch * threads * sizeof(float) + kAlignment);
  float* floats = static_cast<float*>(aligned(memory));
  const int64_t groups = round_up(num_outputs, kTileOutputs) / kTileOutputs;
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), of = omp_get_num_threads();
    const int64_t begin = rows * thread / of, end = rows * (thread + 1) / of;
    kernels->pack_rows(x, inputs, panel.data(), panel.stride(), begin, end);
    if (weights->scales) kernels->split_rows(p, begin, end);
#pragma omp barrier
    kernels->configure_tiles();
    kernels->product(p, groups * thread / of, groups * (thread + 1) / of, floats + thread * scratch);
    kernels->release_tiles();
  }
}

// Rows of packed weights [num_outputs, inputs] to `out` [count, inputs]. Returns false, without a row
// written, if an index is out of range.
bool octavo_look_up(const Kernels* kernels, const Weights* weights, int64_t num_outputs,
                    int64_t inputs, const int64_t* rows, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i)
    if (rows[i] < 0 || rows[i] >= num_outputs) return false;
  Product p = {};
  p.weights = *weights;
  p.num_outputs = num_outputs;
  p.num_inputs = round_up(inputs, kByteTileInputs);
  p.out = out;
  p.out_stride = inputs;
  in_parallel(count, 2 * inputs,
              [&](int64_t begin, int64_t end) { kernels->look_up(p, rows, begin, end); });
  return true;
}

}  // extern "C"

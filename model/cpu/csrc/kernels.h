// The interface between the threads of octavo_cpu.cpp and the arithmetic of kernels.cpp.
//
// Plain data and one table of functions: kernels.cpp is compiled once per instruction set, and the
// linker must never choose between two versions of one inline function.
#pragma once

#include <cstdint>

namespace octavo {

// model/cpu/library.py has the same numbers. Those from kInt8 on are of pages alone: codes, with scales
// in planes of their own (attention_codes.h).
enum DType : int32_t {
  kFloat32 = 0,
  kFloat16 = 1,
  kBFloat16 = 2,
  kInt8 = 3,
  kFloat8 = 4,
  kInt4 = 5,
  // Encoded by whole pages: attention_pages.h.
  kKivi4 = 6,
  kKivi2 = 7,
};

static constexpr bool is_by_page(DType dtype) { return dtype >= kKivi4; }

// Keys of one chunk, and so of one decode unit. Fixed, so that a row's result depends neither on the
// rows beside it nor on the step.
constexpr int kChunkKeys = 256;
// (token, head) pairs of one unit at most: by vectors, and by matrix instructions.
constexpr int kVectorLanes = 96;
constexpr int kTileLanes = 128;
constexpr int kMaxHeadDim = 1024;
// A window that hides no key.
constexpr int32_t kAllKeys = 2147483647;

// Elements, not bytes, between tokens and between heads; the last dimension is contiguous.
struct Rows {
  void* data;
  int64_t token_stride;
  int64_t head_stride;
  DType dtype;
};

// Where pages are encoded as a whole: keys and values in full precision, of the queries' own pages.
struct OwnPages {
  // Of the step's tokens.
  Rows keys;
  Rows values;
  // Of the tokens before them: float32 [slots, desk_tokens, kv_heads, head_dim] each. Stored index i
  // of a slot is at i % desk_tokens.
  float* desk_keys;
  float* desk_values;
  int32_t desk_tokens;
  // [rows]
  const int32_t* slots;
};

// One layer's attention of one step.
struct Attention {
  Rows q;
  Rows out;
  // [pages, page_size, kv_heads, head_dim], contiguous; of codes as many dimensions a byte as it has.
  void* keys;
  void* values;
  // Where there are codes: bfloat16 [pages, page_size, kv_heads], for kInt4 [.., 2] with a minimum.
  // By pages the same for keys [pages, kv_heads, head_dim, 2], for values [.., groups, 2].
  void* key_scales;
  void* value_scales;
  DType kv_dtype;
  int32_t head_dim;
  int32_t num_kv_heads;
  // Query heads to each KV head.
  int32_t group;
  int32_t page_size;
  // [rows + 1], [rows], [rows, table_stride]. A key's index counts the row's stored keys; the row's
  // tokens have the last indices of its seq_lens. Windows compare indices, not positions in the text.
  const int32_t* query_starts;
  const int32_t* seq_lens;
  const int32_t* block_table;
  int64_t table_stride;
  // Of the layer: see `Unit`. No key before the first query's window is read, but for sinks.
  int32_t window;
  // Factor on q·k, times log2(e): the softmax is in powers of two.
  float scale_log2e;
  // [partials, heads, head_dim + 2]: sum of weighted values, largest score, sum of weights.
  float* partials;
  // The queries as they meet the sinks of their row's view: q, rotated to another position.
  Rows sink_q;
  OwnPages own;
};

// A page of a row whose last token is in the step.
struct WholePage {
  int32_t row;
  // In the row's block table.
  int32_t index;
};

// A unit of work for one thread. Lanes are the row's (token, head in group) pairs, flattened.
struct Unit {
  int32_t row;
  int32_t head_begin;
  int32_t head_end;
  int32_t key_begin;
  int32_t key_end;
  // Empty for a decode unit.
  int32_t lane_begin;
  int32_t lane_end;
  // Index of a decode unit's partial result; -1: the unit is the whole row.
  int32_t partial;
  // Tokens that a query sees, itself included, of the keys from `key_begin` on.
  int32_t window;
  // Keys that all lanes meet with their `sink_q`, before the others. A decode unit has either.
  int32_t sink_begin;
  int32_t sink_end;
};

// A row whose decode was split along its keys.
struct Merge {
  int32_t row;
  int32_t first_partial;
  int32_t num_partials;
};

struct Norm {
  const void* x;
  DType x_dtype;
  // Null for a plain norm; otherwise x is added to it in place and the sum is normed.
  float* residual;
  const void* weight;
  DType weight_dtype;
  void* out;
  DType out_dtype;
  int64_t dim;
  int64_t x_stride;
  int64_t out_stride;
  float eps;
};

struct Rope {
  Rows x;
  const int64_t* positions;
  // [max_positions, rotary_dim]: cosines, then sines.
  const float* cos_sin;
  int32_t num_heads;
  int32_t rotary_dim;
};

struct SiluMul {
  const void* gate_up;
  void* out;
  DType dtype;
  int64_t dim;
  int64_t gate_up_stride;
};

struct Write {
  Rows from;
  void* to;
  // As in `Attention`.
  void* scales;
  DType to_dtype;
  const int64_t* slots;
  int32_t num_kv_heads;
  int32_t head_dim;
};

// Packed weights [outputs, inputs] in output groups of 16; see products.h. In the order of
// `Tiles.description` in model/weights/tiled_linear.py.
struct Weights {
  const void* tiles;
  // [output groups, scales, 16]: factors of integer codes. Null for bfloat16 weights.
  const void* scales;
  // The same shape: added to the scaled codes. May be null.
  const void* minimums;
  // Padded to whole output groups, or null.
  const float* bias;
  // 16 for bfloat16 weights, otherwise those of a code: 4, 5, 6 or 8.
  int64_t bits;
  // Inputs that share a scale: 16, 32, 64, or a multiple of 64 up to 128.
  int64_t group_inputs;
  // Subtracted from each code of less than eight bits.
  int64_t code_offset;
  // Of scales and minimums.
  int64_t scale_dtype;
  // Of the rows that meet codes: 16, or 8 with a scale to 32 inputs. See products_rows.h.
  int64_t activation_bits;
};

// A tile of bfloat16 weights, and one of codes. Inputs are padded to whole tiles of both.
constexpr int kTileOutputs = 16;
constexpr int kTileInputs = 32;
constexpr int kByteTileInputs = 64;

// Rows of a panel times packed weights.
struct Product {
  // [num_rows rounded up to 16, panel_stride] of the kernels' panel dtype.
  const void* panel;
  int64_t panel_stride;
  int64_t num_rows;
  // The panel as `split_rows` wrote it, where the weights are integers.
  void* split;
  Weights weights;
  int64_t num_outputs;
  int64_t num_inputs;
  // The outputs' halves become silu(first) * second, in out_dtype; otherwise out is float32.
  bool is_gated;
  bool is_added;
  void* out;
  int64_t out_stride;
  DType out_dtype;
};

// Rows of weights, and their place in tiles; see packing.h.
struct Packing {
  // [num_rows, num_inputs]: floats, or codes of a byte each.
  const void* rows;
  // Of floats.
  DType dtype;
  // Elements, not bytes.
  int64_t row_stride;
  int64_t num_rows;
  int64_t num_inputs;
  // Of an output group: of 32 inputs in bfloat16, otherwise of 64.
  int64_t num_tiles;
  // 16 for bfloat16, otherwise those of a code: 4, 5, 6 or 8.
  int64_t bits;
  // Added to each code.
  int64_t code_offset;
  // Of floats that are rounded to codes: inputs that share a scale, which 128 is a multiple of; 32
  // where they are searched.
  int64_t group_inputs;
  void* tiles;
  // [num_rows, groups] of floats that are rounded; null for codes.
  float* scales;
  // As scales, where codes of four bits are searched; otherwise null.
  float* minimums;
};

struct Kernels {
  const char* name;
  // Floats of scratch memory one thread needs.
  int64_t (*scratch_floats)(int head_dim);
  // Lanes of one unit.
  int32_t (*unit_lanes)(DType kv_dtype);
  void (*attend)(const Attention&, const Unit&, float* scratch);
  void (*merge)(const Attention&, const Merge&);
  // Encodes one KV head of a page from the step's tokens and the desk.
  void (*encode_page)(const Attention&, const WholePage&, int32_t head);
  // Over tokens (or rows) begin to end.
  void (*write)(const Write&, int64_t begin, int64_t end);
  void (*norm)(const Norm&, int64_t begin, int64_t end);
  void (*rope)(const Rope&, int64_t begin, int64_t end);
  void (*silu_mul)(const SiluMul&, int64_t begin, int64_t end);
  // The dtype of a product's rows, and the floats of scratch memory that one thread needs.
  DType (*panel_dtype)();
  int64_t (*product_scratch_floats)();
  // The bytes that `split_rows` writes for so many rows.
  int64_t (*split_bytes)(int64_t rows, int64_t num_inputs);
  // Writes rows begin to end of a product's panel to its `split`, for weights that are integers.
  void (*split_rows)(const Product&, int64_t begin, int64_t end);
  // Called before and after a thread's products, for instruction sets with a state.
  void (*configure_tiles)();
  void (*release_tiles)();
  // Float32 rows begin to end, [rows, width], into a panel.
  void (*pack_rows)(const float* x, int64_t width, void* panel, int64_t stride, int64_t begin,
                    int64_t end);
  // Output groups begin to end, of all rows; pairs of groups where they are gated.
  void (*product)(const Product&, int64_t begin, int64_t end, float* scratch);
  // Rows of the weights, by index, to `out` [rows, out_stride], for indices begin to end.
  void (*look_up)(const Product&, const int64_t* rows, int64_t begin, int64_t end);
  // Arranges weights in tiles, and returns whether all are finite.
  bool (*pack)(const Packing&);
};

const Kernels& kernels_scalar();
#if defined(__x86_64__)
const Kernels& kernels_avx2();
const Kernels& kernels_avx2_vnni();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_vnni();
const Kernels& kernels_avx512_bf16();
const Kernels& kernels_amx();
#elif defined(__aarch64__)
const Kernels& kernels_neon();
const Kernels& kernels_neon_dotprod();
const Kernels& kernels_neon_bf16();
#endif

}  // namespace octavo

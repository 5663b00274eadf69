// The C interface of packing (model/weights/tile_packer.py). It runs on the thread that calls it:
// weights are loaded by several threads, each with its own product.

#include "kernels.h"

using namespace octavo;

extern "C" {

// Returns whether all values are finite.
bool octavo_pack(const Kernels* kernels, const void* rows, int32_t dtype, int64_t row_stride,
                 int64_t num_rows, int64_t num_inputs, int64_t num_tiles, int64_t bits,
                 int64_t code_offset, int64_t group_inputs, void* tiles, float* scales,
                 float* minimums) {
  return kernels->pack({rows, DType(dtype), row_stride, num_rows, num_inputs, num_tiles, bits,
                        code_offset, group_inputs, tiles, scales, minimums});
}

}  // extern "C"

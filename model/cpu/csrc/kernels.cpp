// The arithmetic, compiled once per instruction set: OCTAVO_KERNELS names this one's table.

#include "kernels.h"

#include "attention_kernels.h"
#include "elementwise.h"
#include "look_up.h"
#include "packing.h"
#include "page_encode.h"
#include "page_write.h"
#include "products.h"

#define OCTAVO_TEXT_OF(x) #x
#define OCTAVO_TEXT(x) OCTAVO_TEXT_OF(x)
#define OCTAVO_JOIN_OF(a, b) a##b
#define OCTAVO_JOIN(a, b) OCTAVO_JOIN_OF(a, b)

namespace {

const octavo::Kernels table = {
    OCTAVO_TEXT(OCTAVO_ISA),
    scratch_floats,
    unit_lanes,
    attend_unit,
    merge,
    encode_page,
    write,
    norm,
    rope,
    silu_mul,
    panel_dtype,
    product_scratch_floats,
    split_bytes,
    split_rows,
    configure_tiles,
    release_tiles,
    pack_rows,
    product,
    look_up,
    pack,
};

}  // namespace

namespace octavo {

const Kernels& OCTAVO_JOIN(kernels_, OCTAVO_ISA)() { return table; }

}  // namespace octavo

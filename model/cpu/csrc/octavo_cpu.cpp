// The C interface of the small operations (model/cpu/ops.py), and the choice of instruction set.
// It knows nothing of torch, so one binary serves every torch.

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include "kernels.h"
#include "threads.h"

namespace octavo {
namespace {

#if defined(__x86_64__)
// Linux lets a process use tiles only after a request; threads started later inherit the permission.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

// GCC 11 cannot ask for it by name.
bool has_avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}

bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const unsigned bf16_tile_int8 = 1u << 22 | 1u << 24 | 1u << 25;
  return (d & bf16_tile_int8) == bf16_tile_int8 && may_use_tiles();
}
#elif defined(__aarch64__)
// The numbers of Linux's asm/hwcap.h: headers of old systems lack some.
inline bool has_dot_products() {
  constexpr unsigned long kDotProducts = 1ul << 20;
  return getauxval(AT_HWCAP) & kDotProducts;
}

inline bool has_bf16_and_i8mm() {
  constexpr unsigned long kBf16 = 1ul << 14, kI8mm = 1ul << 13, kBoth = kBf16 | kI8mm;
  return has_dot_products() && (getauxval(AT_HWCAP2) & kBoth) == kBoth;
}
#endif

struct InstructionSet {
  const char* name;
  const Kernels& (*kernels)();
  bool (*is_supported)();
};

// Those that this library was compiled with, each with all that the compiler may use.
const InstructionSet kInstructionSets[] = {
#if defined(OCTAVO_HAS_SCALAR)
    {"scalar", kernels_scalar, [] { return true; }},
#endif
#if defined(OCTAVO_HAS_AVX2)
    {"avx2", kernels_avx2, has_avx2},
#endif
#if defined(OCTAVO_HAS_AVX2_VNNI)
    {"avx2_vnni", kernels_avx2_vnni, [] { return has_avx2() && has_avx_vnni(); }},
#endif
#if defined(OCTAVO_HAS_AVX512)
    {"avx512", kernels_avx512, has_avx512},
#endif
#if defined(OCTAVO_HAS_AVX512_VNNI)
    {"avx512_vnni", kernels_avx512_vnni, has_avx512_vnni},
#endif
#if defined(OCTAVO_HAS_AVX512_BF16)
    {"avx512_bf16", kernels_avx512_bf16, has_avx512_bf16},
#endif
#if defined(OCTAVO_HAS_AMX)
    {"amx", kernels_amx, [] { return has_avx512_bf16() && has_amx(); }},
#endif
#if defined(OCTAVO_HAS_NEON)
    // Every 64-bit Arm CPU has it.
    {"neon", kernels_neon, [] { return true; }},
#endif
#if defined(OCTAVO_HAS_NEON_DOTPROD)
    {"neon_dotprod", kernels_neon_dotprod, has_dot_products},
#endif
#if defined(OCTAVO_HAS_NEON_BF16)
    {"neon_bf16", kernels_neon_bf16, has_bf16_and_i8mm},
#endif
};

const Kernels* kernels_of(const char* isa) {
  for (const InstructionSet& one : kInstructionSets)
    if (!std::strcmp(isa, one.name)) return one.is_supported() ? &one.kernels() : nullptr;
  return nullptr;
}

}  // namespace
}  // namespace octavo

using namespace octavo;

extern "C" {

// Returns the digest of the sources, which the loader compares.
const char* octavo_sources() { return OCTAVO_SOURCES; }

bool octavo_supports(const char* isa) { return kernels_of(isa) != nullptr; }

const Kernels* octavo_kernels(const char* isa) { return kernels_of(isa); }

void octavo_norm(const Kernels* kernels, int64_t rows, int64_t dim, const void* x, int32_t x_dtype,
                 int64_t x_stride, float* residual, const void* weight, int32_t weight_dtype,
                 float eps, void* out, int32_t out_dtype) {
  const Norm n = {x,   DType(x_dtype),   residual, weight,   DType(weight_dtype),
                  out, DType(out_dtype), dim,      x_stride, dim,    eps};
  in_parallel(rows, dim, [&](int64_t begin, int64_t end) { kernels->norm(n, begin, end); });
}

void octavo_rope(const Kernels* kernels, int64_t tokens, int32_t dtype, void* q,
                 int64_t q_token_stride, int64_t q_head_stride, int32_t num_heads, void* k,
                 int64_t k_token_stride, int64_t k_head_stride, int32_t num_kv_heads,
                 const int64_t* positions, const float* cos_sin, int32_t rotary_dim) {
  const DType type = DType(dtype);
  const Rope queries = {
      {q, q_token_stride, q_head_stride, type}, positions, cos_sin, num_heads, rotary_dim};
  const Rope keys = {
      {k, k_token_stride, k_head_stride, type}, positions, cos_sin, num_kv_heads, rotary_dim};
  in_parallel(tokens, rotary_dim * (num_heads + num_kv_heads), [&](int64_t begin, int64_t end) {
    kernels->rope(queries, begin, end);
    kernels->rope(keys, begin, end);
  });
}

void octavo_silu_mul(const Kernels* kernels, int64_t rows, int64_t dim, const void* gate_up,
                     int64_t gate_up_stride, int32_t dtype, void* out) {
  const SiluMul s = {gate_up, out, DType(dtype), dim, gate_up_stride};
  // An exponential weighs about four plain elements.
  in_parallel(rows, 4 * dim, [&](int64_t begin, int64_t end) { kernels->silu_mul(s, begin, end); });
}

}  // extern "C"

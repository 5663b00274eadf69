"""Compiles our Triton kernels, without a GPU, and prints the resources that they need.

A script of its own: in a process whose kernels are interpreted they cannot be compiled. It prints
JSON lines: `python tests/model/cuda/compile_kernels.py [--all] [capability ...]`, such as 80 90.
Without `--all` each kernel is compiled as it needs most, and for capabilities below 90 those alone
that need most memory.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model.attention import triton_code_kernels, triton_kernels
from model.cuda import coded_kernels
from model.cuda import kernels as gpu_kernels

BF16, FP32, INT32, INT64 = "*bf16", "*fp32", "*i32", "*i64"

#: Llama-3.1-8B's sizes in its own dtype, then other values that the kernels branch on.
HEAD = {"HEAD_DIM": 128, "DIM_BLOCK": 128}
NORM = {"NUM_INNER": 1, "WIDTH": 4096, "BLOCK": 4096}
COMMON: dict[str, Any] = HEAD | {"GROUP": 4, "TILE": 64, "KIND": "floats", "HAS_VIEWS": False}
COMMON |= {"DOT_DTYPE": tl.bfloat16, "WEIGHT_DTYPE": tl.bfloat16}
DECODE = COMMON | {"QUERIES": 1, "LANES": 16}
DRAFT = COMMON | {"QUERIES": 8, "LANES": 32}
PROMPT = COMMON | {"QUERY_TILE": 128, "FEW_QUERIES": 8}
#: Of a small model in float32, by which `bench/gpu/prove.py` compares tokens.
SMALL: dict[str, Any] = {"HEAD_DIM": 64, "DIM_BLOCK": 64, "GROUP": 2, "PAGE_SIZE": 16, "TILE": 64}
SMALL |= {"KIND": "floats", "HAS_VIEWS": False}
SMALL |= {"DOT_DTYPE": tl.float32, "WEIGHT_DTYPE": tl.float32}
SMALL_DECODE = SMALL | {"QUERIES": 8, "LANES": 16}
SMALL_PROMPT = SMALL | {"QUERY_TILE": 32, "FEW_QUERIES": 8}
#: Pages of codes, by kind: pointers to their codes.
CODES = {"int8": "*i8", "fp8": "*u8", "int4": "*u8"}
TURN = HEAD | {"STAGES": 7, "FACTOR": 128**-0.5}
ROPE = HEAD | {
    "NUM_HEADS": 32,
    "NUM_KV_HEADS": 8,
    "HALF": 64,
    "HALF_BLOCK": 64,
    "HEADS_EACH": 8,
}
#: A product of Llama-3.1-8B: one stream, and a chunk of a prompt.
CODED: dict[str, Any] = {
    "NUM_INPUTS": 4096,
    "NUM_OUTPUTS": 28672,
    "GROUP_INPUTS": 128,
    "BLOCK": 128,
}
CODED |= {"HAS_BIAS": False, "HAS_ZEROS": False}
ONE_STREAM, PROMPT_CHUNK = {"ROWS": 16, "OUTPUTS": 32}, {"ROWS": 64, "OUTPUTS": 64}
OTHER_POINTERS: dict[str, str] = {
    "codes_ptr": "*u8",
    "scales_ptr": FP32,
    "zeros_ptr": "*u8",
    "partial_ptr": FP32,
    "lse_ptr": FP32,
    "residual_ptr": FP32,
    "weight_ptr": FP32,
    "cos_sin_ptr": FP32,
    "sink_cos_sin_ptr": FP32,
    "positions_ptr": INT64,
    "sink_positions_ptr": INT64,
    "kv_slots_ptr": INT64,
    "table_ptr": INT32,
    "seq_lens_ptr": INT32,
    "query_starts_ptr": INT32,
    "row_sinks_ptr": INT32,
    "row_windows_ptr": INT32,
}
#: Divisions of any kind, fused products and sums, and operations that flush small numbers to zero.
ROUNDING = r"\b(?:div|fma)[a-z0-9.]*f32|\b[a-z0-9.]+\.ftz[a-z0-9.]*"


class Variant(NamedTuple):
    """A kernel, its constants, and how it is launched."""

    kernel: Any
    constants: dict[str, Any]
    options: dict[str, int]
    #: The lowest capability of a GPU for which it is compiled without `--all`; 0: none.
    brief_from: int = 0


#: Three tiles of keys and values at a time, or two.
THREE, TWO = {"num_stages": 3}, {"num_stages": 2}
ROUNDS_ONCE = {"num_warps": 1, "enable_fp_fusion": False}
TWO_WARPS = {"num_warps": 2}
decode, prompt = triton_kernels.decode_kernel, triton_kernels.prompt_kernel
store, rotate = triton_code_kernels.store_kernel, triton_code_kernels.rotate_kernel
product = coded_kernels.coded_product_kernel
VARIANTS = [
    Variant(decode, DECODE | {"PAGE_SIZE": 16, "NUM_SPLITS": 1}, THREE),
    Variant(decode, DECODE | {"PAGE_SIZE": 64, "NUM_SPLITS": 16}, THREE, 80),
    Variant(decode, DECODE | {"PAGE_SIZE": 16, "NUM_SPLITS": 16, "HAS_VIEWS": True}, THREE),
    Variant(decode, DRAFT | {"PAGE_SIZE": 16, "NUM_SPLITS": 16}, THREE),
    Variant(decode, DRAFT | {"PAGE_SIZE": 16, "NUM_SPLITS": 16, "HAS_VIEWS": True}, THREE, 80),
    Variant(triton_kernels.combine_kernel, HEAD | {"QUERIES": 8, "NUM_SPLITS": 64}, {}, 90),
    Variant(prompt, PROMPT | {"PAGE_SIZE": 16}, {"num_warps": 8} | TWO),
    Variant(prompt, PROMPT | {"PAGE_SIZE": 16, "HAS_VIEWS": True}, {"num_warps": 8} | TWO, 80),
    Variant(prompt, PROMPT | {"PAGE_SIZE": 64}, {"num_warps": 8} | TWO),
    Variant(prompt, PROMPT | {"PAGE_SIZE": 256, "QUERY_TILE": 16}, TWO),
    Variant(decode, SMALL_DECODE | {"NUM_SPLITS": 4}, THREE),
    Variant(prompt, SMALL_PROMPT, TWO),
    *(
        variant
        for kind in CODES
        for variant in (
            Variant(decode, DRAFT | {"PAGE_SIZE": 16, "NUM_SPLITS": 16, "KIND": kind}, THREE),
            Variant(
                decode,
                DRAFT | {"PAGE_SIZE": 16, "NUM_SPLITS": 16, "KIND": kind, "HAS_VIEWS": True},
                THREE,
                90 if kind == "int4" else 0,
            ),
            Variant(store, TURN | {"KIND": kind}, ROUNDS_ONCE, 90),
        )
    ),
    Variant(rotate, TURN | {"NUM_HEADS": 32, "HEADS_EACH": 8}, {"num_warps": 1}, 90),
    Variant(prompt, PROMPT | {"PAGE_SIZE": 16, "KIND": "int4"}, {"num_warps": 8} | TWO),
    Variant(
        prompt,
        PROMPT | {"PAGE_SIZE": 16, "KIND": "int4", "HAS_VIEWS": True},
        {"num_warps": 8} | TWO,
    ),
    Variant(gpu_kernels.rms_norm_kernel, NORM | {"ADDS": True}, {"num_warps": 8}, 90),
    Variant(gpu_kernels.rms_norm_kernel, NORM | {"ADDS": False}, {"num_warps": 8}),
    Variant(gpu_kernels.silu_and_mul_kernel, {"WIDTH": 14336, "BLOCK": 1024}, {}, 90),
    Variant(gpu_kernels.rope_kernel, ROPE | {"STORES": True, "HAS_SINKS": True}, TWO_WARPS, 90),
    Variant(gpu_kernels.rope_kernel, ROPE | {"STORES": True, "HAS_SINKS": False}, TWO_WARPS),
    Variant(gpu_kernels.rope_kernel, ROPE | {"STORES": False, "HAS_SINKS": False}, TWO_WARPS),
    Variant(gpu_kernels.rope_kernel, ROPE | {"STORES": False, "HAS_SINKS": True}, TWO_WARPS),
    *(
        Variant(product, CODED | {"KIND": kind, **tile}, {})
        for kind in ("nibbles", "bytes", "floats")
        for tile in (ONE_STREAM, PROMPT_CHUNK)
    ),
    Variant(
        product,
        CODED | {"KIND": "nibbles", "HAS_ZEROS": True, "HAS_BIAS": True, **ONE_STREAM},
        {},
        90,
    ),
]


def specialized(kernel: Any) -> list[str]:
    """Return the parameters for whose alignment the kernel is compiled, each time anew."""
    return [
        param.name
        for param in kernel.params
        if param.name.endswith(("_ptr", "_stride"))
        and not (param.do_not_specialize or param.do_not_specialize_on_alignment)
    ]


def compiled(kernel: Any, constants: dict[str, Any], options: dict[str, int], target: Any) -> Any:
    """Return the compiled kernel, for tensors that begin at multiples of 16 bytes.

    They are bfloat16 but for `OTHER_POINTERS`, and but for kernels that multiply in float32.
    """
    signature, aligned = {}, {}
    plain = FP32 if constants.get("DOT_DTYPE") == tl.float32 else BF16
    kind, pages = constants.get("KIND"), dict[str, str]()
    if kind in CODES:
        pages = dict.fromkeys(("keys_ptr", "values_ptr"), CODES[kind])
        pages |= dict.fromkeys(("key_scales_ptr", "value_scales_ptr"), "*i16")
    for place, name in enumerate(inspect.signature(kernel.fn).parameters):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = (pages | OTHER_POINTERS).get(name, plain)
        else:
            signature[name] = "fp32" if name in {"eps", "scale_log2"} else "i32"
        if name in specialized(kernel):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=target, options=options)


def main() -> None:
    """Compile variants; the first that does not compile ends the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("capabilities", type=int, nargs="*", default=[80, 90])
    args = parser.parse_args()
    for capability in args.capabilities:
        target = GPUTarget("cuda", capability, 32)
        for kernel, constants, options, brief_from in VARIANTS:
            if not args.all and not 0 < brief_from <= capability:
                continue
            found = compiled(kernel, constants, options, target)
            line = {
                "kernel": kernel.fn.__name__,
                "capability": capability,
                "cubin_bytes": len(found.asm["cubin"]),
                "shared_bytes": found.metadata.shared,
                "num_warps": found.metadata.num_warps,
                "specialized": specialized(kernel),
                # The instructions of matrix products, and the warps' shares of a result.
                "products": sorted(set(re.findall(r"nvidia_mma<\{[^}]*\}>", found.asm["ttgir"]))),
                # The operations that may round otherwise than a float32 operation by itself.
                "rounding": sorted(set(re.findall(ROUNDING, found.asm["ptx"]))),
            }
            print(json.dumps(line))  # noqa: T201 - its only purpose


if __name__ == "__main__":
    main()

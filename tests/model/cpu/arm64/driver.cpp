// Runs the compiled CPU operations as a program, so that an emulator can: tests/support/emulated_arm.py
// sends commands to its input and reads answers from its output.
//
//   "alloc" bytes           -> the address of so much memory, aligned to a cache line
//   "write" address, bytes  then the bytes
//   "read" address, bytes   -> the bytes
//   "call" count            then a name of 32 characters and so many arguments -> the result
//
// All numbers are int64. A float argument has its bits in the low half of one.

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include "octavo_cpu.cpp"

#include "attention.cpp"
#include "decoder.cpp"
#include "desks.cpp"
#include "packing.cpp"

namespace {

template <class Parameter>
Parameter argument(int64_t bits) {
  if constexpr (std::is_pointer_v<Parameter>) {
    return reinterpret_cast<Parameter>(bits);
  } else if constexpr (std::is_floating_point_v<Parameter>) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  } else {
    return Parameter(bits);
  }
}

template <class Result>
int64_t number(Result result) {
  if constexpr (std::is_pointer_v<Result>) return reinterpret_cast<int64_t>(result);
  else return int64_t(result);
}

template <class Result, class... Parameters, size_t... I>
int64_t call(Result (*function)(Parameters...), const int64_t* arguments,
             std::index_sequence<I...>) {
  if constexpr (std::is_void_v<Result>) return function(argument<Parameters>(arguments[I])...), 0;
  else return number(function(argument<Parameters>(arguments[I])...));
}

template <class Result, class... Parameters>
int64_t call(Result (*function)(Parameters...), const int64_t* arguments) {
  return call(function, arguments, std::index_sequence_for<Parameters...>());
}

// Stores float32 keys or values [tokens, heads, head_dim] in their slots.
void store_tokens(const Kernels* kernels, void* from, int64_t tokens, int32_t num_heads,
                  int32_t head_dim, void* to, void* scales, int32_t to_dtype,
                  const int64_t* slots) {
  const Write w = {{from, int64_t(num_heads) * head_dim, head_dim, kFloat32}, to, scales,
                   DType(to_dtype), slots, num_heads, head_dim};
  kernels->write(w, 0, tokens);
}

#define FUNCTION(name) {#name, [](const int64_t* arguments) { return call(name, arguments); }}

const struct {
  const char* name;
  int64_t (*run)(const int64_t* arguments);
} kFunctions[] = {
    FUNCTION(octavo_supports),       FUNCTION(octavo_kernels),
    FUNCTION(octavo_norm),           FUNCTION(octavo_rope),
    FUNCTION(octavo_silu_mul),       FUNCTION(octavo_product),
    FUNCTION(octavo_look_up),        FUNCTION(octavo_pack),
    FUNCTION(octavo_attention_new),  FUNCTION(octavo_attention_plan),
    FUNCTION(octavo_attention_attend), FUNCTION(octavo_decoder_new),
    FUNCTION(octavo_decoder_forward), FUNCTION(store_tokens),
};

void receive(void* to, size_t bytes) {
  if (bytes && std::fread(to, bytes, 1, stdin) != 1) std::exit(0);
}

void answer(const void* from, size_t bytes) {
  std::fwrite(from, bytes, 1, stdout);
  std::fflush(stdout);
}

void answer(int64_t value) { answer(&value, sizeof(value)); }

void run_named(int64_t count) {
  char name[32];
  int64_t arguments[32];
  receive(name, sizeof(name));
  receive(arguments, size_t(count) * sizeof(int64_t));
  for (const auto& one : kFunctions)
    if (!std::strncmp(one.name, name, sizeof(name))) return answer(one.run(arguments));
  std::fprintf(stderr, "no function %.32s\n", name);
  std::exit(1);
}

}  // namespace

int main() {
  for (;;) {
    char command[8];
    int64_t numbers[2];
    receive(command, sizeof(command));
    receive(numbers, sizeof(numbers));
    void* memory = reinterpret_cast<void*>(numbers[0]);
    if (!std::strcmp(command, "alloc")) answer(number(std::aligned_alloc(64, numbers[0])));
    if (!std::strcmp(command, "write")) receive(memory, size_t(numbers[1]));
    if (!std::strcmp(command, "read")) answer(memory, size_t(numbers[1]));
    if (!std::strcmp(command, "call")) run_named(numbers[0]);
  }
}

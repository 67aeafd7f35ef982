// How a C++ kernel meets Python: a plain function, listed in a table by name.
//
// Each cpu_kernel.cpp is compiled once per instruction set. Everything it includes must have internal linkage
// (anonymous namespace): an inline function shared between the copies could make the linker keep the AVX-512
// body for a machine without AVX-512. Tables are constant-initialised, so nothing runs at load time either.
#pragma once
#include <cstddef>
#include <cstdint>

// One argument as Python passed it: an integer, pointer or bool in `i`, a float in `f`.
struct Argument {
  int64_t i;
  double f;
};

struct Kernel {
  const char* name;
  int arguments;
  void (*call)(const Argument*);
};

struct IsaTable {
  const char* isa;
  const Kernel* kernels;  // ends with a null name
};

enum class Raised { kValueError, kMemoryError };

// Ends the call with that error of Python's, after the kernel's name; never inside a parallel region. Defined once, in
// module.cpp, and not inline, so that it belongs to no instruction set.
[[noreturn]] __attribute__((cold, format(printf, 2, 3))) void genai_fast_raise(Raised error, const char* format, ...);

namespace {

template <class T>
struct Unpack {
  static T from(const Argument& a) { return static_cast<T>(a.i); }
};
template <class T>
struct Unpack<T*> {
  static T* from(const Argument& a) { return reinterpret_cast<T*>(a.i); }
};
template <>
struct Unpack<float> {
  static float from(const Argument& a) { return static_cast<float>(a.f); }
};
template <>
struct Unpack<double> {
  static double from(const Argument& a) { return a.f; }
};

template <size_t...>
struct Indices {};
template <size_t N, size_t... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <size_t... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

template <auto function>
struct Entry;
template <class... A, void (*function)(A...)>
struct Entry<function> {
  template <size_t... I>
  static void spread([[maybe_unused]] const Argument* a, Indices<I...>) {
    function(Unpack<A>::from(a[I])...);
  }
  static void call(const Argument* a) { spread(a, typename MakeIndices<sizeof...(A)>::type{}); }
  static constexpr Kernel named(const char* name) { return {name, int(sizeof...(A)), &call}; }
};

}  // namespace

#define GENAI_FAST_JOIN3(a, b, c) a##_##b##_##c
#define GENAI_FAST_TABLE_NAME(op, isa) GENAI_FAST_JOIN3(genai_fast, op, isa)
// The table of this source: `GENAI_FAST_TABLE = {Entry<&f>::named("f"), {}};`
#define GENAI_FAST_TABLE                                                        \
  extern const Kernel GENAI_FAST_TABLE_NAME(GENAI_FAST_OP, GENAI_FAST_ISA_NAME)[]; \
  constexpr Kernel GENAI_FAST_TABLE_NAME(GENAI_FAST_OP, GENAI_FAST_ISA_NAME)[]

// The extension `genai_fast._cpu`: the kernels of every instruction set as Python callables.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <omp.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdarg>
#include <cstdio>
#include <string>

#include "kernel.h"
#include "kernel_tables.inc"

namespace nb = nanobind;

namespace {

constexpr int kMaxArguments = 48;

#if defined(__x86_64__)
// x86-64-v3 and v4. (Only newer compilers know these names, or the features that cpuid is asked for.)
bool has_avx2() {
  unsigned a, b, basic = 0, extended = 0, d;
  __get_cpuid(1, &a, &b, &basic, &d);
  __get_cpuid(0x80000001u, &a, &b, &extended, &d);
  constexpr unsigned kMovbe = 1u << 22, kF16c = 1u << 29, kLzcnt = 1u << 5;
  return (basic & kMovbe) && (basic & kF16c) && (extended & kLzcnt) && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

bool supports(const std::string& isa) {
  if (isa == "portable") return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == "avx2") return has_avx2();
  if (isa == "avx512") return has_avx512();
#endif
  return false;
}

// What a kernel refuses: the error, and its text without the kernel's name.
struct Refusal {
  Raised error;
  std::string text;
};

nb::object wrap(const Kernel* kernel) {
  return nb::cpp_function(
      [kernel](nb::args values) {
        const int n = int(values.size());
        if (n != kernel->arguments) {
          throw nb::type_error((std::string(kernel->name) + ": expected " + std::to_string(kernel->arguments) +
                                " arguments, got " + std::to_string(n))
                                   .c_str());
        }
        Argument arguments[kMaxArguments];
        for (int k = 0; k < n; ++k) {
          PyObject* value = PyTuple_GET_ITEM(values.ptr(), k);
          if (PyFloat_Check(value)) {
            arguments[k] = {0, PyFloat_AS_DOUBLE(value)};
          } else {
            const long long integer = PyLong_AsLongLong(value);
            if (integer == -1 && PyErr_Occurred()) throw nb::python_error();
            arguments[k] = {integer, double(integer)};
          }
        }
        try {
          nb::gil_scoped_release released;
          kernel->call(arguments);
        } catch (const Refusal& refused) {
          PyObject* const type = refused.error == Raised::kMemoryError ? PyExc_MemoryError : PyExc_ValueError;
          PyErr_SetString(type, (std::string(kernel->name) + ": " + refused.text).c_str());
          throw nb::python_error();
        }
      },
      nb::name(kernel->name));
}

}  // namespace

void genai_fast_raise(Raised error, const char* format, ...) {
  char text[256];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof(text), format, values);
  va_end(values);
  throw Refusal{error, text};
}

NB_MODULE(_cpu, m) {
  m.doc() = "Fused C++ kernels of genai_fast, one copy for each instruction set.";
  m.def(
      "instruction_sets",
      [] {
        nb::dict found;
        for (const IsaTable& table : kTables) found[table.isa] = supports(table.isa);
        return found;
      },
      "Compiled instruction sets, slowest first, and whether this processor has each.");
  m.def(
      "kernels",
      [](const std::string& isa) {
        nb::dict found;
        for (const IsaTable& table : kTables) {
          if (isa != table.isa) continue;
          for (const Kernel* kernel = table.kernels; kernel->name; ++kernel) {
            if (kernel->arguments > kMaxArguments) throw nb::type_error("a kernel takes too many arguments");
            found[kernel->name] = wrap(kernel);
          }
        }
        return found;
      },
      nb::arg("isa"), "Name -> callable on integers (pointers, sizes) and floats; checks only the argument count.");
}

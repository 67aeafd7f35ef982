// The extension `genai_fast._cpu`: the kernels of every instruction set as Python callables.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <omp.h>

#include <string>

#include "kernel.h"
#include "kernel_tables.inc"

namespace nb = nanobind;

namespace {

constexpr int kMaxArguments = 48;

bool supports(const std::string& isa) {
  if (isa == "portable") return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == "avx2") return __builtin_cpu_supports("x86-64-v3");
  if (isa == "avx512") return __builtin_cpu_supports("x86-64-v4");
#endif
  return false;
}

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
        nb::gil_scoped_release released;
        kernel->call(arguments);
      },
      nb::name(kernel->name));
}

}  // namespace

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

// The Python module of the CPU kernels: hands plain views of tensors to the kernels of the chosen instruction set.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <stdexcept>
#include <string>
#include <vector>

#include "tensors.h"

namespace py = pybind11;
using difuse::CpuOps;
using difuse::Tensor;

namespace difuse {
#define DIFUSE_TABLE(isa) namespace isa { extern const CpuOps table; }
DIFUSE_TABLES(DIFUSE_TABLE)  // setup.py defines the list of instruction sets in this build, oldest first
#undef DIFUSE_TABLE
}  // namespace difuse

namespace {

struct Isa { const char* name; const CpuOps* table; };
#define DIFUSE_ROW(isa) Isa{#isa, &difuse::isa::table},
const Isa kIsas[] = {DIFUSE_TABLES(DIFUSE_ROW)};
#undef DIFUSE_ROW
const Isa* chosen = nullptr;

bool cpu_supports(const std::string& isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == "v2") return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("f16c");
  if (isa == "v3") return v3;
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (isa == "v4") return v4;
  const bool vnni = v4 && __builtin_cpu_supports("avx512vnni");
  if (isa == "v4_vnni") return vnni;
  return isa == "v4_bf16" && vnni && __builtin_cpu_supports("avx512bf16");
#else
  return isa == "native_isa";
#endif
}

void choose_isa(const std::string& wanted) {
  for (const Isa& isa : kIsas)  // oldest first: the last that fits is the best
    if (cpu_supports(isa.name) && (wanted.empty() || wanted == isa.name)) chosen = &isa;
  if (!chosen || (!wanted.empty() && wanted != chosen->name)) {
    std::string usable;
    for (const Isa& isa : kIsas)
      if (cpu_supports(isa.name)) usable += std::string(usable.empty() ? "" : ", ") + isa.name;
    throw std::runtime_error("DIFUSE_ISA=" + (wanted.empty() ? "(none)" : wanted) + " cannot run here; this build and "
                             "CPU support: " + (usable.empty() ? "none" : usable) + ". Set DIFUSE_ISA to one of them");
  }
}

// Wraps a table entry: the tables' arguments are converted by the caster above, and the GIL is released while it runs.
template <class... A> auto kernel(void (*CpuOps::*entry)(A...)) {
  return [entry](A... arguments) {
    py::gil_scoped_release release;
    (chosen->table->*entry)(arguments...);
  };
}

// A hint on memory just allocated: 2 MB pages where they fit. Writing a fresh 37 MB output took 29 ms in 4 KB pages and
// 8 ms in 2 MB ones (Zen 3 virtual machine, Linux).
void prefer_huge_pages(const Tensor& t, int64_t bytes) {
#if defined(__linux__)
  const uintptr_t page = 1 << 21, begin = (reinterpret_cast<uintptr_t>(t.data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(t.data) + uintptr_t(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "difuse's C++ CPU kernels; see csrc/ops.h for what each takes.";
  difuse::python::names();  // now: made by the first call, two threads could wait for each other
  m.def("choose_isa", &choose_isa, "Pick the kernels: the best set this CPU runs, or the named one.");
  m.def("isa", [] { return std::string(chosen ? chosen->name : ""); }, "The instruction set in use.");
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Isa& isa : kIsas) names.push_back(isa.name);
    return names;
  }, "The instruction sets in this build.");
  m.def("prefer_huge_pages", &prefer_huge_pages, "Ask for 2 MB pages under a tensor of so many bytes (a hint).");
#define DIFUSE_BIND(name, arguments) m.def(#name, kernel(&CpuOps::name));
  DIFUSE_CPU_OPS(DIFUSE_BIND)
#undef DIFUSE_BIND
}

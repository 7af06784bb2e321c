// The only file that knows Python. Reads tensors through public interfaces (DLPack's exchange table, or their Python
// attributes), so one build serves every torch version, and hands plain views to the kernels of the chosen set.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <stdexcept>
#include <string>
#include <vector>

#include "ops.h"

namespace py = pybind11;
using difuse::CpuOps;
using difuse::DType;
using difuse::Tensor;
using difuse::TensorList;

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
  return isa == "v4_bf16" && v4 && __builtin_cpu_supports("avx512bf16");
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

// --- reading a tensor ------------------------------------------------------------------------------------------------
// torch 2.10+ offers DLPack's C exchange table (dlpack.h 1.3, a stable ABI): 40 ns a tensor. Older ones are asked for the
// same facts through their Python attributes: 400 ns.
struct DLTensor {
  void* data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct ExchangeApi {
  uint32_t major, minor;
  void *older, *allocate, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);
};

const ExchangeApi* exchange_api(PyTypeObject* type) {
  const py::object capsule = py::getattr(py::handle(reinterpret_cast<PyObject*>(type)), "__dlpack_c_exchange_api__",
                                         py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  const auto* api = static_cast<ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  return api->major == 1 ? api : nullptr;
}

py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// Interned attribute names and dtype objects, kept for the life of the process.
struct Names {
  PyObject *data_ptr = PyUnicode_InternFromString("data_ptr"), *stride = PyUnicode_InternFromString("stride"),
           *shape = PyUnicode_InternFromString("shape"), *dtype = PyUnicode_InternFromString("dtype");
  PyObject *dtypes[4], *tensor_type;
  const ExchangeApi* api;
  Names() {
    py::module_ torch = py::module_::import("torch");
    const char* names[] = {"float32", "bfloat16", "float16", "int32"};
    for (int i = 0; i < 4; ++i) dtypes[i] = py::object(torch.attr(names[i])).release().ptr();
    tensor_type = py::object(torch.attr("Tensor")).release().ptr();
    api = exchange_api(reinterpret_cast<PyTypeObject*>(tensor_type));
  }
};

[[noreturn]] void refuse_dtype() {
  throw std::runtime_error("the native kernels take float32, bfloat16, float16 and int32 tensors");
}
void check_dims(int ndim) {
  if (ndim > difuse::kMaxDims) throw std::runtime_error("the native kernels take at most 8 dimensions");
}

Tensor read_dlpack(PyObject* object, const ExchangeApi* api) {
  DLTensor d;
  if (api->tensor_from_object(object, &d)) throw py::error_already_set();
  Tensor t;
  if (d.code == 2 && d.bits == 32) t.dtype = DType::f32;
  else if (d.code == 4 && d.bits == 16) t.dtype = DType::bf16;
  else if (d.code == 2 && d.bits == 16) t.dtype = DType::f16;
  else if (d.code == 0 && d.bits == 32) t.dtype = DType::i32;
  else refuse_dtype();
  check_dims(t.ndim = d.ndim);
  for (int i = 0; i < t.ndim; ++i) t.size[i] = d.shape[i], t.stride[i] = d.strides[i];
  t.data = static_cast<char*>(d.data) + d.byte_offset;
  return t;
}

Tensor read_tensor(PyObject* object) {
  static const Names names;
  if (names.api && reinterpret_cast<PyObject*>(Py_TYPE(object)) == names.tensor_type)
    return read_dlpack(object, names.api);
  Tensor t;
  const py::object dtype = checked(PyObject_GetAttr(object, names.dtype));
  int code = 0;
  while (code < 4 && dtype.ptr() != names.dtypes[code]) ++code;
  if (code == 4) refuse_dtype();
  t.dtype = DType(code);
  const py::object shape = checked(PyObject_GetAttr(object, names.shape));
  const py::object stride = checked(PyObject_CallMethodNoArgs(object, names.stride));
  check_dims(t.ndim = int(PyTuple_GET_SIZE(shape.ptr())));
  for (int i = 0; i < t.ndim; ++i) {
    t.size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
    t.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), i));
  }
  const py::object pointer = checked(PyObject_CallMethodNoArgs(object, names.data_ptr));
  t.data = static_cast<char*>(PyLong_AsVoidPtr(pointer.ptr()));
  return t;
}

}  // namespace

namespace pybind11 {
namespace detail {
template <> struct type_caster<Tensor> {
  PYBIND11_TYPE_CASTER(Tensor, const_name("Tensor | None"));
  bool load(handle source, bool) {
    if (!source.is_none()) value = read_tensor(source.ptr());
    return true;
  }
};
template <> struct type_caster<TensorList> {
  PYBIND11_TYPE_CASTER(TensorList, const_name("Sequence[Tensor | None]"));
  bool load(handle source, bool) {
    const py::object items = checked(PySequence_Fast(source.ptr(), "expected a sequence of tensors"));
    value.n = int(PySequence_Fast_GET_SIZE(items.ptr()));
    if (value.n > difuse::kMaxList) throw std::runtime_error("the native kernels take at most 8 tensors in a list");
    for (int i = 0; i < value.n; ++i) {
      PyObject* item = PySequence_Fast_GET_ITEM(items.ptr(), i);
      if (item != Py_None) value.item[i] = read_tensor(item);
    }
    return true;
  }
};
}  // namespace detail
}  // namespace pybind11

namespace {

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

// Reads tensors through public interfaces (DLPack's exchange table, or their Python attributes), so that one build
// serves every torch version. Included by the two files that know Python, bindings.cpp and bindings_cuda.cpp.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "ops.h"

namespace difuse {
namespace python {

namespace py = pybind11;

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
  int (*current_stream)(int32_t device_type, int32_t device, void** out);
};
constexpr int kDLCpu = 1, kDLCuda = 2;

inline const ExchangeApi* exchange_api(PyTypeObject* type) {
  const py::object capsule = py::getattr(py::handle(reinterpret_cast<PyObject*>(type)), "__dlpack_c_exchange_api__",
                                         py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  const auto* api = static_cast<ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  return api->major == 1 ? api : nullptr;
}

inline py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// Interned attribute names and dtype objects, kept for the life of the process.
struct Names {
  PyObject *data_ptr = PyUnicode_InternFromString("data_ptr"), *stride = PyUnicode_InternFromString("stride"),
           *shape = PyUnicode_InternFromString("shape"), *dtype = PyUnicode_InternFromString("dtype"),
           *get_device = PyUnicode_InternFromString("get_device");
  PyObject *dtypes[5], *tensor_type;
  const ExchangeApi* api;
  Names() {
    py::module_ torch = py::module_::import("torch");
    const char* names[] = {"float32", "bfloat16", "float16", "int32", "uint8"};
    for (int i = 0; i < 5; ++i) dtypes[i] = py::object(torch.attr(names[i])).release().ptr();
    tensor_type = py::object(torch.attr("Tensor")).release().ptr();
    api = exchange_api(reinterpret_cast<PyTypeObject*>(tensor_type));
  }
};
inline const Names& names() {
  static const Names only;
  return only;
}

[[noreturn]] inline void refuse_dtype() {
  throw std::runtime_error("the native kernels take float32, bfloat16, float16, int32 and uint8 tensors");
}
inline void check_dims(int ndim) {
  if (ndim > difuse::kMaxDims) throw std::runtime_error("the native kernels take at most 8 dimensions");
}

inline Tensor read_dlpack(PyObject* object, const ExchangeApi* api) {
  DLTensor d;
  if (api->tensor_from_object(object, &d)) throw py::error_already_set();
  Tensor t;
  if (d.code == 2 && d.bits == 32) t.dtype = DType::f32;
  else if (d.code == 4 && d.bits == 16) t.dtype = DType::bf16;
  else if (d.code == 2 && d.bits == 16) t.dtype = DType::f16;
  else if (d.code == 0 && d.bits == 32) t.dtype = DType::i32;
  else if (d.code == 1 && d.bits == 8) t.dtype = DType::u8;
  else refuse_dtype();
  check_dims(t.ndim = d.ndim);
  for (int i = 0; i < t.ndim; ++i) t.size[i] = d.shape[i], t.stride[i] = d.strides[i];
  t.data = static_cast<char*>(d.data) + d.byte_offset;
  t.device = d.device_type == kDLCpu ? kCpu : d.device_id;
  return t;
}

inline Tensor read_tensor(PyObject* object) {
  const Names& names = python::names();
  if (names.api && reinterpret_cast<PyObject*>(Py_TYPE(object)) == names.tensor_type)
    return read_dlpack(object, names.api);
  Tensor t;
  const py::object dtype = checked(PyObject_GetAttr(object, names.dtype));
  int code = 0;
  while (code < 5 && dtype.ptr() != names.dtypes[code]) ++code;
  if (code == 5) refuse_dtype();
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
  const py::object device = checked(PyObject_CallMethodNoArgs(object, names.get_device));
  t.device = int(PyLong_AsLong(device.ptr()));  // -1 on the CPU
  return t;
}

}  // namespace python
}  // namespace difuse

namespace pybind11 {
namespace detail {
template <> struct type_caster<difuse::Tensor> {
  PYBIND11_TYPE_CASTER(difuse::Tensor, const_name("Tensor | None"));
  bool load(handle source, bool) {
    if (!source.is_none()) value = difuse::python::read_tensor(source.ptr());
    return true;
  }
};
template <> struct type_caster<difuse::TensorList> {
  PYBIND11_TYPE_CASTER(difuse::TensorList, const_name("Sequence[Tensor | None]"));
  bool load(handle source, bool) {
    const object items = difuse::python::checked(PySequence_Fast(source.ptr(), "expected a sequence of tensors"));
    value.n = int(PySequence_Fast_GET_SIZE(items.ptr()));
    if (value.n > difuse::kMaxList) throw std::runtime_error("the native kernels take at most 8 tensors in a list");
    for (int i = 0; i < value.n; ++i) {
      PyObject* item = PySequence_Fast_GET_ITEM(items.ptr(), i);
      if (item != Py_None) value.item[i] = difuse::python::read_tensor(item);
    }
    return true;
  }
};
}  // namespace detail
}  // namespace pybind11

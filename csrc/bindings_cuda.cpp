// The Python module of the CUDA kernels: hands them plain views of tensors and torch's current stream of their device.
#include <sstream>
#include <string>
#include <vector>

#include "tensors.h"

namespace py = pybind11;
using difuse::Queue;
using difuse::Tensor;
using difuse::TensorList;

namespace {

#ifdef DIFUSE_EMULATED  // tests/emulation: the same kernels on CPU tensors
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

void* current_stream(int device) {
  if (kEmulated) return nullptr;
  const auto* api = difuse::python::names().api;
  void* stream = nullptr;
  if (api && api->current_stream) {
    if (api->current_stream(difuse::python::kDLCuda, device, &stream)) throw py::error_already_set();
    return stream;
  }
  const py::object found = py::module_::import("torch").attr("cuda").attr("current_stream")(device);
  return PyLong_AsVoidPtr(py::object(found.attr("cuda_stream")).ptr());
}

// torch's current stream, and scratch from torch's allocator: it is reused in the order of the stream, so it may be
// given back as soon as everything is launched, and a graph under capture owns what is asked for meanwhile.
struct TorchQueue final : Queue {
  std::vector<py::object> kept;
  explicit TorchQueue(int on) {
    device = on;
    stream = current_stream(on);
  }
  float* scratch(int64_t floats) override {
    py::gil_scoped_acquire acquire;
    const py::module_ torch = py::module_::import("torch");
    const py::object where = kEmulated ? py::object(py::str("cpu")) : py::object(torch.attr("device")("cuda", device));
    kept.push_back(torch.attr("empty")(py::make_tuple(floats), py::arg("dtype") = torch.attr("float32"),
                                       py::arg("device") = where));
    return reinterpret_cast<float*>(difuse::python::read_tensor(kept.back().ptr()).data);
  }
};

// The device that all tensors of a call share.
struct Device {
  int found = difuse::kNoDevice;
  void see(const Tensor& t) {
    if (t.device == difuse::kNoDevice) return;
    if (found == difuse::kNoDevice) found = t.device;
    if (t.device == found && (t.device >= 0 || kEmulated)) return;
    const auto name = [](int d) { return d < 0 ? std::string("the CPU") : "cuda:" + std::to_string(d); };
    throw std::runtime_error("the CUDA kernels got tensors on " + name(found) + " and " + name(t.device) +
                             "; all of them belong on one GPU. Move them with .to()");
  }
  void see(const TensorList& list) {
    for (int i = 0; i < list.n; ++i) see(list.item[i]);
  }
  template <class T> void see(const T&) {}
};

template <class... A> auto kernel(void (*op)(Queue&, A...)) {
  return [op](A... arguments) {
    Device device;
    (device.see(arguments), ...);
    if (device.found == difuse::kNoDevice) return;  // no tensor, nothing to do
    TorchQueue queue(device.found);
    py::gil_scoped_release release;
    op(queue, arguments...);
  };
}

}  // namespace

PYBIND11_MODULE(_native_cuda, m) {
  m.doc() = "difuse's CUDA C++ kernels; see csrc/ops.h for what each takes.";
  difuse::python::names();  // now: made by the first call, two threads could wait for each other
  m.attr("emulated") = kEmulated;
  m.def("missing", &difuse::cuda::missing, "Why nothing can be launched here, or an empty string.");
  m.def("architectures", [] {
    std::istringstream text(difuse::cuda::architectures());
    std::vector<std::string> names;
    for (std::string name; text >> name;) names.push_back(name);
    return names;
  }, "What this build holds: machine code (sm_*) and PTX (compute_*).");
#define DIFUSE_BIND(name, arguments) m.def(#name, kernel(&difuse::cuda::name));
  DIFUSE_OPS(DIFUSE_BIND)
#undef DIFUSE_BIND
}

// Whether CUDA can run here, and what a failed launch says.
#include <stdexcept>

#include "cuda.h"

namespace difuse {
namespace cuda {

const char* architectures() { return DIFUSE_ARCHITECTURES; }  // setup.py defines it

std::string missing() {
  int driver = 0, runtime = 0, devices = 0;
  cudaRuntimeGetVersion(&runtime);
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver is loaded";
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess && devices > 0) return "";
  cudaGetLastError();  // forget it: torch would trip over it
  const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  if (error == cudaErrorInsufficientDriver)
    return "the NVIDIA driver is for CUDA " + version(driver) + "; this build needs " + version(runtime) +
           ". Update the driver";
  return std::string("no GPU is found: ") + cudaGetErrorString(error);
}

void refuse(cudaError_t error, const char* kernel, const Queue& queue) {
  cudaGetLastError();  // forget it: the next launch is not to blame
  std::string text = std::string(kernel) + " could not be launched on cuda:" + std::to_string(queue.device) + ": " +
                     cudaGetErrorName(error) + ", " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice)
    text += std::string(". This build holds ") + architectures() + "; reinstall with an nvcc that knows the GPU";
#if CUDART_VERSION >= 12080
  int owner = queue.device;
  if (queue.stream && cudaStreamGetDevice(static_cast<cudaStream_t>(queue.stream), &owner) == cudaSuccess &&
      owner != queue.device)
    text += ". The stream belongs to cuda:" + std::to_string(owner) +
            ", the tensors do not; use a stream of their device";
#endif
  throw std::runtime_error(text);
}

}  // namespace cuda
}  // namespace difuse

// Linked after the kernels: the end of their static __shared__ memory, see emulation.cpp.
namespace emulated {
__thread unsigned char shared_end[16];
}

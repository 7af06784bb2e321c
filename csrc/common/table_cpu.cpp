// One table of kernels per instruction set; setup.py compiles this file once for each.
#include "ops.h"

namespace difuse {
namespace DIFUSE_ISA {
#define DIFUSE_ENTRY(name, arguments) name,
extern const CpuOps table;
const CpuOps table = {DIFUSE_CPU_OPS(DIFUSE_ENTRY)};
}  // namespace DIFUSE_ISA
}  // namespace difuse

// Loops over torch's own OpenMP threads. Work is split by index only, so results never depend on the thread count.
#pragma once
#include <cstdint>
#include "rows.h"

namespace difuse {
namespace DIFUSE_ISA {

// Below this many elements of work a parallel region (2-5 us) costs more than it saves.
constexpr int64_t kSerialWork = 16384;

template <class F> static inline void parallel_for(int64_t n, int64_t work_each, F body) {
  if (n == 1 || n * work_each <= kSerialWork) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; ++i) body(i);
}

// body(i, scratch) for every i; scratch has `floats` floats and belongs to the thread. `flops`: of all tasks together.
template <class F> static inline void each_task(int64_t n, double flops, int64_t floats, F body) {
#pragma omp parallel if (n > 1 && flops > 1e6)
  {
    const Scratch scratch(floats);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < n; ++i) body(i, scratch.data);
  }
}

}  // namespace DIFUSE_ISA
}  // namespace difuse

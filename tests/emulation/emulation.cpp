// Runs a grid on the CPU, so that a kernel's indices, barriers and shuffles can be tested without a GPU.
//
// The threads of a block are fibers on one OS thread. One warp runs as far as it can, its lanes one after another, each
// until it waits; then the next warp. That is the order in which a missing barrier shows: what one warp reads, another
// has not written yet, or has written anew. `emulated_reverse` turns the order of blocks, warps and lanes around, since
// a missing barrier may show in one of the two only. Shared memory holds nans when a block starts.
#include <cuda_runtime.h>

#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>

#include "fibers.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulated {

extern __thread unsigned char shared_end[16];

namespace {

__thread unsigned char shared_begin[16];  // this file is linked before the kernels: theirs lies between these two

constexpr int kLanes = 32, kMaxThreads = 1024;
constexpr size_t kMaxShared = 48 << 10, kFence = 256;
struct Thread {
  uint3 index;
  Fiber* fiber;
  Place place;      // where it waits
  Shuffle kind;     // the rest: for what, in a warp
  unsigned mask;
  int by, width;
  uint64_t given, got;
};

struct Warp {  // lanes as bits; a lane is in one of the first five
  unsigned fresh, ready, asking, waiting, gone, all;
  Thread* threads;
};

struct Grid {
  std::mutex one_at_a_time;
  bool backwards = false;
  const char* name;
  void (*call)(const void*);
  const void* body;
  Thread threads[kMaxThreads];
  Warp warps[kMaxThreads / kLanes];
  int count;
  size_t shared;
  alignas(64) unsigned char memory[kMaxShared + kFence];

  Warp* warp;      // that runs
  Thread* thread;  // that runs
  Fibers fibers;
  std::exception_ptr failure;
};
Grid grid;

int next_lane(unsigned lanes) { return grid.backwards ? 31 - __builtin_clz(lanes) : __builtin_ctz(lanes); }

void enter(Thread& thread) {
  grid.thread = &thread;
  threadIdx = thread.index;
}

// What every fiber runs: the lanes of the current warp that have not begun.
void run_fresh_lanes() {
  try {
    while (grid.warp->fresh) {
      const unsigned lane = next_lane(grid.warp->fresh);
      grid.warp->fresh &= ~(1u << lane);
      enter(grid.warp->threads[lane]);
      grid.thread->fiber = grid.fibers.current();
      grid.call(grid.body);
      grid.warp->gone |= 1u << (grid.thread - grid.warp->threads);
    }
  } catch (...) {
    grid.failure = std::current_exception();
  }
}

void run_on(Fiber* fiber) {
  grid.fibers.run(fiber);
  if (grid.failure) std::rethrow_exception(grid.failure);
}

// --- faults ----------------------------------------------------------------------------------------------------------
[[noreturn]] void fail(const std::string& what) {
  std::string block = std::to_string(blockIdx.x);
  if (gridDim.y > 1 || gridDim.z > 1) block += "," + std::to_string(blockIdx.y) + "," + std::to_string(blockIdx.z);
  throw std::runtime_error(std::string(grid.name) + ", block " + block + ": " + what);
}

std::string text(const Thread& t) { return "thread " + std::to_string(&t - grid.threads); }

std::string text(Place place) {
  const std::string file = place.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line);
}

const char* text(Shuffle kind) {
  const char* names[] = {"__shfl_sync",     "__shfl_up_sync", "__shfl_down_sync",
                         "__shfl_xor_sync", "a vote",         "__syncwarp"};
  return names[int(kind)];
}

std::string doing(const Warp& w, int lane) {
  const unsigned bit = 1u << lane;
  const Thread& t = w.threads[lane];
  if (!(w.all & bit)) return "lane " + std::to_string(lane) + " of its warp does not exist";
  if (w.gone & bit) return text(t) + " has returned";
  return text(t) + " waits at " + (w.waiting & bit ? "__syncthreads" : text(t.kind)) + " (" + text(t.place) + ")";
}

bool same(Place a, Place b) { return a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file)); }

bool same(const Thread& a, const Thread& b) {
  return a.kind == b.kind && a.mask == b.mask && a.width == b.width && same(a.place, b.place);
}

[[noreturn]] void fail_warp(const Warp& w) {
  const int lane = __builtin_ctz(w.asking);
  const Thread& t = w.threads[lane];
  int other = 0;
  while (!(t.mask >> other & 1) || (w.asking >> other & 1 && same(t, w.threads[other]))) ++other;
  const std::string mask = t.mask == ~0u ? "all lanes" : "the lanes of its mask";
  const bool differs = w.asking >> other & 1 && same(t.place, w.threads[other].place);
  fail(doing(w, lane) + " for " + mask + ", but " + doing(w, other) + (differs ? " with another mask or width" : ""));
}

[[noreturn]] void fail_barrier(const Thread& waits, const Warp& w, int lane) {
  fail(text(waits) + " waits at __syncthreads (" + text(waits.place) + ") for all threads, but " + doing(w, lane));
}

// --- scheduling ------------------------------------------------------------------------------------------------------
int source_lane(const Thread& t, int lane) {
  const int begin = lane & ~(t.width - 1), end = begin + t.width;
  switch (t.kind) {
    case Shuffle::index: return begin + (t.by & (t.width - 1));
    case Shuffle::up: return lane - t.by < begin ? lane : lane - t.by;
    case Shuffle::down: return lane + t.by >= end ? lane : lane + t.by;
    default: return (lane ^ t.by) >= end ? lane : lane ^ t.by;
  }
}

// Completes the exchanges of a warp for which all lanes have come; whether there was one.
bool answer(Warp& w) {
  bool any = false;
  for (unsigned left = w.asking; left;) {
    const Thread& first = w.threads[__builtin_ctz(left)];
    const unsigned mask = first.mask;
    left &= left - 1;
    if (mask & ~w.asking) continue;
    bool together = true;
    uint64_t votes = 0;
    for (unsigned m = mask; m; m &= m - 1) {
      const int lane = __builtin_ctz(m);
      together &= same(first, w.threads[lane]);
      votes |= (w.threads[lane].given & 1) << lane;
    }
    if (!together) continue;
    for (unsigned m = mask; m; m &= m - 1) {
      const int lane = __builtin_ctz(m);
      Thread& t = w.threads[lane];
      if (t.kind == Shuffle::vote) t.got = votes;
      else if (t.kind != Shuffle::sync) {
        const int source = source_lane(t, lane);
        if (source < 0 || source >= kLanes || !(mask >> source & 1))
          fail(doing(w, lane) + " and reads lane " + std::to_string(source) + ", which its mask does not name");
        t.got = w.threads[source].given;
      }
    }
    w.asking &= ~mask, w.ready |= mask, left &= ~mask;
    any = true;
  }
  return any;
}

// Runs the lanes of a warp until all wait for the block or have returned.
void run_warp(Warp& w) {
  grid.warp = &w;
  for (;;) {
    while (w.fresh) run_on(grid.fibers.take(&run_fresh_lanes));
    while (w.ready) {
      const int lane = next_lane(w.ready);
      w.ready &= ~(1u << lane);
      enter(w.threads[lane]);
      run_on(grid.thread->fiber);
    }
    if (!w.asking) return;
    if (!answer(w)) fail_warp(w);
  }
}

// Lets all threads pass a barrier at which all of them wait; false when all have returned.
bool pass_barrier(int warps) {
  unsigned waiting = 0;
  const Thread* first = nullptr;
  for (int i = 0; i < warps && !first; ++i) {
    waiting = grid.warps[i].waiting;
    if (waiting) first = &grid.warps[i].threads[__builtin_ctz(waiting)];
  }
  if (!first) return false;
  for (int i = 0; i < warps; ++i) {
    Warp& w = grid.warps[i];
    for (unsigned m = w.all; m; m &= m - 1) {
      const int lane = __builtin_ctz(m);
      if (w.gone >> lane & 1 || !same(w.threads[lane].place, first->place)) fail_barrier(*first, w, lane);
    }
    w.ready = w.waiting, w.waiting = 0;
  }
  return true;
}

void run_block() {
  const int warps = (grid.count + kLanes - 1) / kLanes;
  memset(grid.memory, 0xff, grid.shared);
  memset(shared_begin, 0xff, size_t(&shared_end[0] - &shared_begin[0]));
  for (int i = 0; i < warps; ++i) {
    Warp& w = grid.warps[i];
    w = {};
    w.threads = grid.threads + i * kLanes;
    w.fresh = w.all = grid.count - i * kLanes >= kLanes ? ~0u : (1u << (grid.count - i * kLanes)) - 1;
  }
  do {
    for (int i = 0; i < warps; ++i) run_warp(grid.warps[grid.backwards ? warps - 1 - i : i]);
  } while (pass_barrier(warps));
}

void run_grid(dim3 blocks, dim3 threads) {
  const int64_t count = int64_t(blocks.x) * blocks.y * blocks.z;
  gridDim = blocks, blockDim = threads;
  for (int i = 0; i < grid.count; ++i) {
    const unsigned t = unsigned(i);
    grid.threads[i].index = {t % threads.x, t / threads.x % threads.y, t / threads.x / threads.y};
  }
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(grid.memory + grid.shared, sizeof grid.memory - grid.shared);
#else
  memset(grid.memory + grid.shared, 0x5a, kFence);
#endif
  for (int64_t i = 0; i < count; ++i) {
    const int64_t b = grid.backwards ? count - 1 - i : i;
    blockIdx = {unsigned(b % blocks.x), unsigned(b / blocks.x % blocks.y), unsigned(b / blocks.x / blocks.y)};
    run_block();
  }
#ifndef __SANITIZE_ADDRESS__
  for (size_t i = 0; i < kFence; ++i)
    if (grid.memory[grid.shared + i] != 0x5a)
      fail("wrote beyond its " + std::to_string(grid.shared) + " bytes of dynamic shared memory, here or before");
#endif
}

inline __attribute__((always_inline)) void wait(unsigned Warp::*queue, Place place) {
  Thread& self = *grid.thread;
  self.place = place;
  grid.warp->*queue |= 1u << (&self - grid.warp->threads);
  grid.fibers.wait();
}

}  // namespace

void run(const char* name, dim3 blocks, dim3 threads, size_t shared, void (*call)(const void*), const void* body) {
  const std::lock_guard<std::mutex> lock(grid.one_at_a_time);
  const int64_t count = int64_t(threads.x) * threads.y * threads.z;
  grid.name = name, grid.call = call, grid.body = body, grid.count = int(count), grid.shared = shared;
  blockIdx = {0, 0, 0};
  if (count < 1 || count > kMaxThreads || shared > kMaxShared || blocks.y > 65535 || blocks.z > 65535)
    fail("could not be launched with " + std::to_string(count) + " threads and " + std::to_string(shared) +
         " bytes of shared memory");
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(grid.memory, sizeof grid.memory);
#endif
  try {
    run_grid(blocks, threads);
  } catch (...) {  // fibers that wait will never go on
    grid.failure = nullptr;
    grid.fibers.abandon();
    throw;
  }
}

unsigned char* dynamic_shared() { return grid.memory; }

void check_global(const void* p) {
  const auto lies_in = [p](const unsigned char* begin, const unsigned char* end) { return begin <= p && p < end; };
  if (lies_in(grid.memory, grid.memory + sizeof grid.memory) || lies_in(shared_begin, shared_end))
    fail(text(*grid.thread) + " stores to shared memory by an instruction for global memory");
}

void block_barrier(Place place) { wait(&Warp::waiting, place); }

uint64_t warp_exchange(Shuffle kind, unsigned mask, uint64_t value, int by, int width, Place place) {
  Thread& self = *grid.thread;
  const int lane = int(&self - grid.warp->threads);
  self.kind = kind, self.mask = mask, self.by = by, self.width = width, self.given = value, self.place = place;
  if (width < 1 || width > kLanes || width & (width - 1))
    fail(text(self) + " asks " + text(kind) + " for width " + std::to_string(width) + " (" + text(place) + ")");
  if (!(mask >> lane & 1)) fail(text(self) + " is not in its own mask (" + text(place) + ")");
  wait(&Warp::asking, place);
  return self.got;
}

}  // namespace emulated

// The one function that tests call directly: runs blocks, warps and lanes in reverse order from now on.
extern "C" __attribute__((visibility("default"))) void emulated_reverse(int on) {
  const std::lock_guard<std::mutex> lock(emulated::grid.one_at_a_time);
  emulated::grid.backwards = on;
}

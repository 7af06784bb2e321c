// Stacks to run functions on, any of which may stop in the middle and be resumed later.
#pragma once
#include <memory>
#include <stdexcept>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

#define EMULATED_INLINE inline __attribute__((always_inline))

namespace emulated {

// No system call is made, unlike in swapcontext, which serves other CPUs; nor a call or return, which the CPU would
// mispredict: the compiler saves what registers it needs around the jump, since all count as overwritten.
#ifdef __x86_64__
using Context = void*;
EMULATED_INLINE void switch_context(Context& from, const Context& to) {
  Context *save = &from, next = to;
  asm volatile(
      "leaq -128(%%rsp), %%rsp\n\t"  // the red zone
      "pushq %%rbp\n\t"
      "leaq 1f(%%rip), %%rcx\n\t"
      "pushq %%rcx\n\t"
      "movq %%rsp, (%%rdi)\n\t"
      "movq %%rsi, %%rsp\n\t"
      "popq %%rcx\n\t"
      "jmpq *%%rcx\n"
      "1:\n\t"
      "popq %%rbp\n\t"
      "leaq 128(%%rsp), %%rsp"
      : "+D"(save), "+S"(next)
      :
      : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0", "xmm1", "xmm2",
        "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15",
        "memory", "cc");
}
#else
using Context = ucontext_t;
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

struct Stack {  // as the sanitizer wants to know it
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake = nullptr;
};

struct Fiber {
  Context context;
  Stack stack;
  void (*function)();
  bool idle;
};

class Fibers {
 public:
  // An idle fiber, to run `function` next.
  Fiber* take(void (*function)()) {
    if (idle_.empty()) add();
    Fiber* fiber = idle_.back();
    idle_.pop_back();
    fiber->function = function;
    fiber->idle = false;
    return fiber;
  }

  // Goes on with the fiber until its function waits or ends.
  void run(Fiber* fiber) {
    current_ = fiber;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&caller_.fake, fiber->stack.bottom, fiber->stack.size);
#endif
    switch_context(caller_context_, fiber->context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(caller_.fake, nullptr, nullptr);
#endif
    if (fiber->idle) idle_.push_back(fiber);
  }

  // Called by a function on a fiber: returns to `run`, until it is called again.
  EMULATED_INLINE void wait() {
    Fiber* self = current_;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&self->stack.fake, caller_.bottom, caller_.size);
#endif
    switch_context(self->context, caller_context_);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(self->stack.fake, &caller_.bottom, &caller_.size);
#endif
  }

  Fiber* current() { return current_; }

  // Makes all fibers idle; those that wait never go on.
  void abandon() {
    idle_.clear();
    for (size_t i = 0; i < all_.size(); ++i) prepare(*all_[i], i);
  }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t kStack = 256 << 10;
#else
  static constexpr size_t kStack = 64 << 10;
#endif

  static inline Fibers* starting_;  // has no argument to come in

  static void main() {
    Fibers* fibers = starting_;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &fibers->caller_.bottom, &fibers->caller_.size);
#endif
    Fiber* self = fibers->current_;
    for (;;) {
      self->function();
      self->idle = true;
      fibers->wait();
    }
  }

  void add() {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));  // one more, in front, catches a stack that runs over
    void* memory = mmap(nullptr, kStack + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE))
      throw std::runtime_error("the emulation got no memory for a stack");
    all_.push_back(std::make_unique<Fiber>());
    all_.back()->stack.bottom = static_cast<char*>(memory) + page;
    all_.back()->stack.size = kStack;
    prepare(*all_.back(), all_.size());
  }

  void prepare(Fiber& fiber, size_t number) {
    starting_ = this;
    fiber.idle = true;
    fiber.stack.fake = nullptr;
    char* bottom = static_cast<char*>(const_cast<void*>(fiber.stack.bottom));
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(bottom, kStack);
#endif
#ifdef __x86_64__
    // stacks begin at different offsets in their pages: else they would share the same few lines of the cache
    void** top = reinterpret_cast<void**>(bottom + kStack - 64 - number % 16 * 256);
    *--top = nullptr;                         // where main would return to
    *--top = reinterpret_cast<void*>(&main);  // where the switch jumps to
    fiber.context = top;
#else
    (void)number;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = bottom;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &main, 0);
#endif
    idle_.push_back(&fiber);
  }

  std::vector<std::unique_ptr<Fiber>> all_;
  std::vector<Fiber*> idle_;
  Fiber* current_ = nullptr;
  Context caller_context_;
  Stack caller_;
};

}  // namespace emulated

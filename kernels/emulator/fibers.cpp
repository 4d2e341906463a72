// Fibers: the context switch, the stacks, and what runs at the bottom of each stack.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>

#include "runtime.hpp"

// Saves the callee-saved registers and the stack pointer, and takes up another stack. A new stack "returns" into
// warpstep_emu_entry, whose undefined return address ends every backtrace.
extern "C" void warpstep_emu_switch(void** save, void* load);
extern "C" void warpstep_emu_entry();
asm(R"(.text
.globl warpstep_emu_switch
.type warpstep_emu_switch, @function
warpstep_emu_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.globl warpstep_emu_entry
.type warpstep_emu_entry, @function
warpstep_emu_entry:
  .cfi_startproc
  .cfi_undefined rip
  xor %ebp, %ebp
  and $-16, %rsp
  call warpstep_emu_fiber_main
  ud2
  .cfi_endproc
)");

#if EMU_ASAN
// With fake stacks (clang's default) this many fibers are 10 to 40 times slower.
extern "C" const char* __asan_default_options() { return "detect_stack_use_after_return=0:detect_leaks=0"; }
#endif

namespace emu {
namespace {

constexpr uint64_t kCanary = 0x5ac4ca9a11c0ffeeull;
// One mapping per stack would run into vm.max_map_count, so stacks come in slabs with a guard page each.
constexpr size_t kStacksPerSlab = 64, kGuardBytes = 4096, kSlabBytes = kStacksPerSlab * kStackBytes + kGuardBytes;
// Stack tops are spread over cache sets: page-aligned ones would all put their hot lines into the same.
constexpr size_t kColours = 32, kColourBytes = 128;

}  // namespace

char* Runner::take_stack() {
  if (stacks.empty()) {
    void* slab = mmap(nullptr, kSlabBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (slab == MAP_FAILED) {
      perror("warpstep emulator: cannot map fiber stacks");
      abort();
    }
    mprotect(slab, kGuardBytes, PROT_NONE);
    slabs.push_back(static_cast<char*>(slab));
    slabs_start = std::min(slabs_start, reinterpret_cast<uintptr_t>(slab));
    slabs_end = std::max(slabs_end, reinterpret_cast<uintptr_t>(slab) + kSlabBytes);
    for (size_t i = kStacksPerSlab; i-- > 0;) {
      char* stack = static_cast<char*>(slab) + kGuardBytes + i * kStackBytes;
      memcpy(stack, &kCanary, sizeof kCanary);
      stacks.push_back(stack);
    }
  }
  char* stack = stacks.back();
  stacks.pop_back();
#if EMU_ASAN
  __asan_unpoison_memory_region(stack, kStackBytes);  // its last user never returned from its frames
#endif
  return stack;
}

void Runner::start(Fiber* f) {
  f->stack = take_stack();
  const size_t colour = (f->linear * 5 + f->block->index * 7) % kColours;
  void** sp = reinterpret_cast<void**>(f->stack + kStackBytes - 64 - colour * kColourBytes);
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(&warpstep_emu_entry);
  for (int i = 0; i < 6; i++) *--sp = nullptr;  // the callee-saved registers
  f->sp = sp;
}

// From a fiber, or from the scheduler when `from` is null, to a fiber or (null) the scheduler.
void Runner::switch_to(Fiber* from, Fiber* to, bool dying) {
  if (to && !to->stack) start(to);
  self = to;
  // Never a local: for a dying fiber ASan may free the frame it would lie in.
  void** save = dying ? &dead_sp : from ? &from->sp : &main_sp;
#if EMU_ASAN
  __sanitizer_start_switch_fiber(dying  ? nullptr
                                 : from ? &from->fake_stack
                                        : &main_fake_stack,
                                 to ? to->stack : main_stack, to ? kStackBytes : main_stack_bytes);
#endif
  warpstep_emu_switch(save, to ? to->sp : main_sp);
#if EMU_ASAN
  __sanitizer_finish_switch_fiber(from ? from->fake_stack : main_fake_stack, nullptr, nullptr);
#endif
}

Runner::Runner() {
  pthread_attr_t attributes;
  if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
    void* low = nullptr;
    pthread_attr_getstack(&attributes, &low, &main_stack_bytes);
    main_stack = low;
    pthread_attr_destroy(&attributes);
  }
}

Runner::~Runner() {
  for (char* slab : slabs) {
#if EMU_ASAN
    __asan_unpoison_memory_region(slab + kGuardBytes, kSlabBytes - kGuardBytes);
#endif
    munmap(slab, kSlabBytes);
  }
}

bool on_fiber_stack(const Runner& r, const void* p) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  if (address < r.slabs_start || address >= r.slabs_end) return false;
  for (const char* slab : r.slabs)
    if (static_cast<size_t>(static_cast<const char*>(p) - slab) < kSlabBytes) return true;
  return false;
}

}  // namespace emu

// The body of every fiber stack. A thread that ends hands its stack to the next one that has not started, so
// threads that never block cost no switch.
extern "C" void warpstep_emu_fiber_main() {
  using namespace emu;
#if EMU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  for (;;) {
    Runner& r = *runner;
    r.launch->kernel->run(r.launch->request->params);
    Fiber* f = current();
    if (!f->copies.empty())
      fail(f->copies.back().site, "thread exits with %zu cp.async copies not waited for", f->copies.size());
    uint64_t canary;
    memcpy(&canary, f->stack, sizeof canary);
    if (canary != kCanary) fail({}, "a thread used more than %zu bytes of stack", kStackBytes);
    r.finish(f);
    Fiber* next = r.pick(f->block, f->warp);
    char* stack = f->stack;
    f->stack = nullptr;
    if (next && !next->stack) {
      next->stack = stack;
      self = next;
      continue;
    }
    r.stacks.push_back(stack);
    r.switch_to(f, next, true);
  }
}

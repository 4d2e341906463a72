// What the host side of dev.cuh asks of the emulator. One fiber per CUDA thread; everything that can suspend a
// thread, or that the emulator must see to check it, goes through one of these calls.
#pragma once
#if !defined(__x86_64__) || !defined(__linux__)
#error "warpstep's emulated device switches fibers in x86-64 Linux assembly; other hosts are not supported"
#endif
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

// Kernels are built four ways (build.rs): opt, asan, and with the compiler's hooks of -fsanitize=thread, which
// hooks.cpp implements without that sanitizer's library, race (to look for races) and count (to count bytes).
#if defined(WARPSTEP_EMULATOR_RACE)
#define EMU_RACE 1
#else
#define EMU_RACE 0
#endif
#if defined(WARPSTEP_EMULATOR_COUNT)
#define EMU_COUNT 1
#else
#define EMU_COUNT 0
#endif
#if defined(WARPSTEP_EMULATOR_ASAN)
#define EMU_ASAN 1
#else
#define EMU_ASAN 0
#endif
#define EMU_OBSERVED (EMU_RACE || EMU_COUNT)

// The line of a kernel that made a call. Outside the namespace, so that a call with a Site names dev.cuh's primitive
// and not, by argument-dependent lookup, the emulator function of the same name.
struct EmuSite {
  const char* file = nullptr;
  int line = 0;
};

namespace emu {

using Site = EmuSite;

struct Idx {
  uint32_t x, y, z;
};

// What device code may look at.
struct Thread {
  Idx tid, bid, bdim, gdim;
  uint32_t linear;  // rank in the block
  uint32_t lane, warp;
  uint32_t cluster_rank, cluster_size;
};
extern constinit thread_local Thread* self;

using KernelFn = void (*)(const void* params);
// Computes a warp operation for all lanes of `mask`; arg[lane] is what the lane handed in.
using WarpFn = void (*)(void* const* arg, uint32_t mask);

// One kernel; KERNEL makes a static one, and the constructor enters it in the list that warpstep_emu_find searches.
struct Kernel {
  Kernel(const char* symbol, const char* file, uint32_t params_bytes, uint32_t max_threads, KernelFn run);
  const char* symbol;
  const char* file;
  uint32_t params_bytes, max_threads;
  KernelFn run;
  const Kernel* next;
};

// Ends the launch with a report; the message names kernel, block, thread and site.
[[noreturn]] void fail(Site, const char* format, ...) __attribute__((format(printf, 2, 3)));

// synchronisation (collectives.cpp)
void warp_collective(WarpFn, void* arg, uint32_t mask, bool orders_memory, const char* what, Site);
void block_sync(Site);
void bar_sync(int id, uint32_t threads, Site);
void bar_arrive(int id, uint32_t threads, Site);
void cluster_sync(Site);
void griddep_wait(Site);

// shared memory (shared.cpp)
void* shared_static(const void* key, size_t bytes, size_t align, Site);
void* shared_dynamic();
uint32_t shared_offset(const void* p, Site);
void* cluster_map(const void* p, uint32_t rank, Site);

// asynchronous copies (async_copy.cpp)
void cp_async(void* dst, const void* src, size_t bytes, size_t src_bytes, Site);
void cp_async_commit();
void cp_async_wait(size_t in_flight);
void mbar_init(uint64_t* bar, uint32_t arrivals, Site);
void mbar_arrive(uint64_t* bar, uint32_t tx_bytes, Site);
void mbar_wait(uint64_t* bar, uint32_t parity, Site);
void bulk_g2s(void* dst, const void* src, uint32_t bytes, uint64_t* bar, Site);

// atomics and polling (atomics.cpp)
uint32_t atomic_add(uint32_t*, uint32_t, bool acqrel, Site);
uint32_t atomic_max(uint32_t*, uint32_t, Site);
void atomic_add(float*, float, Site);
uint32_t load_acquire(const uint32_t*, Site);
void store_release(uint32_t*, uint32_t, Site);
uint64_t poll_relaxed(const uint64_t*, Site);
void store_relaxed(uint64_t*, uint64_t, Site);
void poll_relaxed16(void* out, const void* p, Site);
void store_relaxed16(void* p, const void* v, Site);

#if EMU_OBSERVED
// An access that a primitive makes for its thread (observe.cpp).
void observe_read(const void* p, size_t bytes, Site);
// A load through the read-only path: observed, checked, and made outside instrumented code.
void load_nc(void* out, const void* p, size_t bytes, Site);
#else
inline void observe_read(const void*, size_t, Site) {}
inline void load_nc(void* out, const void* p, size_t bytes, Site) { memcpy(out, p, bytes); }
#endif
// A line that is asked into L2. asan: it must be there. count: of memory that the launch does not read itself it counts
// as read, and as undeclared; of what it reads the loads count.
#if EMU_COUNT
void prefetch(const void* p, Site);
#else
inline void prefetch([[maybe_unused]] const void* p, Site) {
#if EMU_ASAN
  (void)*static_cast<const volatile char*>(p);
#endif
}
#endif

}  // namespace emu

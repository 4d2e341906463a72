// What the observing builds hang on the runtime: happens-before clocks and the record of accesses (race), byte
// counts (count). In the builds that observe nothing every function here is empty.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "emu.hpp"

#if EMU_ASAN
#include <sanitizer/asan_interface.h>
extern "C" void __asan_report_load_n(void* p, size_t bytes);
extern "C" void __asan_report_store_n(void* p, size_t bytes);
#endif

namespace emu {

struct Block;
struct Fiber;
struct Launch;
struct Runner;

enum class Access : uint8_t { kRead, kWrite, kAtomic, kAtomicRead };

#if EMU_OBSERVED
#error "to come"
#else
struct Clock {};
struct BlockClocks {};
// The runtime is not instrumented, so what it reads and writes for a kernel is checked by hand.
inline void touch([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes, [[maybe_unused]] Access access, Site) {
#if EMU_ASAN
  void* start = const_cast<void*>(p);
  if (!__asan_region_is_poisoned(start, bytes)) return;
  if (access == Access::kRead || access == Access::kAtomicRead)
    __asan_report_load_n(start, bytes);
  else
    __asan_report_store_n(start, bytes);
#endif
}
inline void touch_landed(const void*, size_t, Site) {}
inline void clock_release(Fiber*, Clock&) {}
inline void clock_acquire(Fiber*, const Clock&) {}
inline void clock_reset(Clock&) {}
inline void clock_join_lanes(Fiber*, uint32_t) {}
inline void clock_release_at(Fiber*, const uint64_t*) {}
inline void clock_acquire_at(Fiber*, const uint64_t*) {}
inline void clock_release_global(Fiber*, const void*) {}
inline void clock_acquire_global(Fiber*, const void*) {}
inline void clock_dependence_waited(Fiber*) {}
inline void clock_shared_created(Block*, size_t, size_t) {}
inline void observe_launch(Launch&) {}
inline void observe_block(Block*) {}
#endif

}  // namespace emu

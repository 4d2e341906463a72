// What the observing builds hang on the runtime. race: happens-before clocks and a record of accesses (race.cpp).
// count: bytes per piece of memory (count.cpp). In the other builds nothing observes and every function is empty,
// except that the asan build checks what the runtime touches for a kernel.
//
// Clocks. A thread of a block has an exact vector clock over the threads of its block, and per other block the
// number of the latest *snapshot* of it that it has seen. A block takes a snapshot (the join of one thread's clock
// with the snapshot before) whenever one of its threads releases at device scope. So the cost of a barrier does not
// grow with the grid, and order between blocks is exact but for joining concurrent releases of one block.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "emu.hpp"

#if EMU_RACE
#include <unordered_map>
#endif
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

enum class Access : uint8_t { kRead = 0, kWrite = 1, kAtomicRead = 2, kAtomic = 3 };
inline constexpr bool is_write(Access a) { return static_cast<uint8_t>(a) & 1; }
inline constexpr bool is_atomic(Access a) { return static_cast<uint8_t>(a) & 2; }

#if EMU_OBSERVED
// An access made inside a primitive, of the calling thread.
void touch(const void* p, size_t bytes, Access, Site);
// The same, and the accesses of instrumented code; `origin` is a program counter or a packed Site.
void observe(const void* p, size_t bytes, Access, uint64_t origin);
[[noreturn]] void misaligned(const void* p, size_t bytes, uint64_t origin);
// The shadow memory or the counters of a launch.
struct LaunchObservations;
void observe_launch(Launch&);
#else
inline void touch([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes, [[maybe_unused]] Access access, Site) {
#if EMU_ASAN
  void* start = const_cast<void*>(p);
  if (!__asan_region_is_poisoned(start, bytes)) return;
  if (is_write(access))
    __asan_report_store_n(start, bytes);
  else
    __asan_report_load_n(start, bytes);
#endif
}
struct LaunchObservations {};
inline void observe_launch(Launch&) {}
#endif

#if EMU_RACE

// Components are 0 where nothing is known; a vector may be shorter than its full length.
struct Clock {
  std::vector<uint32_t> threads;  // of one block
  std::vector<uint32_t> blocks;   // snapshot numbers
};

// One access; `clock` 0 marks a free entry.
struct ShadowEntry {
  uint64_t origin;  // a program counter, or a packed Site
  uint32_t clock, block;
  uint16_t thread;
  uint8_t bytes;  // mask within the 8 bytes of the cell
  Access access;
};
// The latest accesses to 8 bytes of shared memory, and which of them were ever written.
struct SharedCell {
  ShadowEntry entries[8];
  uint8_t written;
};

struct BlockClocks {
  std::vector<Clock> of_thread;
  std::vector<uint8_t> waited;                       // by thread: ordered after a griddep_wait of the block
  std::vector<std::pair<uint16_t, uint32_t>> waits;  // thread and its clock at its griddep_wait
  std::unordered_map<const uint64_t*, Clock> mbarriers;
  std::vector<SharedCell> cells;
};

void clock_reset(Clock&);
void clock_release(Fiber*, Clock&);  // what the fiber did so far happens before what acquires the clock
void clock_acquire(Fiber*, const Clock&);
void clock_join_lanes(Fiber* lanes, uint32_t mask);
void clock_join_cluster();
void clock_release_at(Fiber*, const uint64_t* mbar);
void clock_acquire_at(Fiber*, const uint64_t* mbar);
void clock_release_global(Fiber*, const void* address);
void clock_acquire_global(Fiber*, const void* address);
void clock_dependence_waited(Fiber*);
void observe_block(Block*);
void observe_shared_array(Block*, size_t offset, size_t bytes);
// The bytes of a cp.async, when it was waited for: written by the waiting thread.
void touch_landed(const void* p, size_t bytes, Site);

#else

struct Clock {};
struct BlockClocks {};
inline void clock_reset(Clock&) {}
inline void clock_release(Fiber*, Clock&) {}
inline void clock_acquire(Fiber*, const Clock&) {}
inline void clock_join_lanes(Fiber*, uint32_t) {}
inline void clock_join_cluster() {}
inline void clock_release_at(Fiber*, const uint64_t*) {}
inline void clock_acquire_at(Fiber*, const uint64_t*) {}
inline void clock_release_global(Fiber*, const void*) {}
inline void clock_acquire_global(Fiber*, const void*) {}
inline void clock_dependence_waited(Fiber*) {}
inline void observe_block(Block*) {}
inline void observe_shared_array(Block*, size_t, size_t) {}
inline void touch_landed(const void*, size_t, Site) {}

#endif

}  // namespace emu

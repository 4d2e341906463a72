// The emulator's own state: fibers, warps, blocks, the launch they belong to, and the runner that schedules them.
//
//   Launch            what was asked for; shared by the workers that run its groups of blocks
//   Runner            one per OS thread: stacks, random numbers, and the group of blocks it runs now
//   Block, Warp, Fiber  a group's blocks are resident together: one block, a cluster, or a whole cooperative grid
#pragma once
#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "abi.h"
#include "emu.hpp"
#include "observe.hpp"

#if EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emu {

inline constexpr uint32_t kMaxThreads = 1024;
inline constexpr size_t kSharedLimit = 227 << 10;       // static + dynamic, per block, on Hopper
inline constexpr size_t kStaticSharedLimit = 48 << 10;  // what nvcc accepts
inline constexpr size_t kArenaBytes = 320 << 10;        // the limit plus the gaps between arrays
inline constexpr size_t kSharedGap = 64;
inline constexpr uint32_t kMaxClusterBlocks = 16;
inline constexpr size_t kStackBytes = EMU_ASAN ? 64 << 10 : 32 << 10;

enum class State : uint8_t { kReady, kWarpOp, kBarrier, kClusterBarrier, kMbarrier, kPolling, kDone };

struct Block;

struct CpAsync {
  void* dst;
  const void* src;
  size_t bytes, src_bytes;
  Site site;
};

struct Fiber : Thread {
  Block* block;
  void* sp;
  char* stack;       // null until started and after the end
  void* fake_stack;  // ASan's
  State state;
  // what it waits for, by state
  const char* what;
  Site site;
  WarpFn warp_fn;
  void* warp_arg;
  uint32_t mask;
  int barrier;
  uint64_t* mbar;
  uint32_t parity;
  const void* polled;  // by the last poll_relaxed
  uint32_t polls;      // since it let others run
  std::vector<CpAsync> copies;
  std::vector<size_t> copy_groups;  // end index in `copies` of each committed group
};

// Lane masks.
struct Warp {
  uint32_t lanes, ready, in_warp_op, exited;
};

struct NamedBarrier {
  uint32_t arrived, expected;
  std::array<uint32_t, 32> waiting;  // lane masks by warp
  Site first;
  Clock clock;
};

struct BulkCopy {
  void* dst;
  const void* src;
  uint32_t bytes;
  uint64_t* mbar;
  Site site;
};

struct StaticArray {
  const void* key;
  char* p;
  size_t bytes;
};

struct Block {
  Block();
  ~Block();
  Idx id;
  uint32_t index, cluster_rank;
  uint32_t threads, live;
  uint32_t ready_warps;
  std::vector<Fiber> fibers;
  std::array<Warp, 32> warps;
  std::array<NamedBarrier, 16> barriers;
  char* shared;  // arena of kArenaBytes; offsets in it are the 32-bit shared addresses
  size_t dynamic_bytes, static_bytes, used;
  std::vector<StaticArray> statics;
  std::vector<BulkCopy> bulk;
  bool dependence_waited;
  BlockClocks clocks;
};

struct ClusterBarrier {
  uint32_t arrived;
  Site first;
};

struct Launch {
  const WarpstepEmuLaunch* request;
  const Kernel* kernel;
  const WarpstepEmuGeometry* geometry;
  const WarpstepEmuOptions* options;
  uint32_t blocks, block_threads;
  uint32_t group_blocks;  // blocks resident together
  uint32_t groups;
  std::atomic<uint32_t> next_group{0};
  std::atomic<bool> failed{false};
  std::mutex report_mutex;
  std::string report;  // the first failure
  std::shared_ptr<LaunchObservations> observations;

  void set_report(std::string text);
};

// Schedules one group of blocks at a time on its OS thread.
struct Runner {
  Runner();
  ~Runner();
  static Runner& current();

  void run(Launch&);  // takes groups until none is left or the launch failed

  // scheduler.cpp
  void run_group();
  Fiber* pick(Block* preferred, int warp);
  void switch_to(Fiber* from, Fiber* to, bool dying = false);
  void suspend(Fiber*);
  void finish(Fiber*);
  void make_ready(Fiber*);
  bool wake_polling();
  std::string describe() const;
  // fibers.cpp
  char* take_stack();
  void start(Fiber*);
  // launch.cpp
  Block* take_block(uint32_t index);
  void release_blocks();
  // async_copy.cpp
  bool land_one_bulk_copy();

  uint32_t random(uint32_t bound);

  Launch* launch = nullptr;
  std::vector<Block*> blocks;  // the group
  std::vector<std::unique_ptr<Block>> all_blocks;
  std::vector<Block*> spare_blocks;
  ClusterBarrier cluster;
  std::vector<char*> stacks, slabs;
  uintptr_t slabs_start = UINTPTR_MAX, slabs_end = 0;  // bounds of all slabs
  void* main_sp = nullptr;
  void* dead_sp = nullptr;
  void* main_fake_stack = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
  bool failed = false;
  uint32_t live = 0, polling = 0;
  uint64_t events = 0;  // anything that may let another thread go on
  uint64_t rng = 1;
  size_t next_block = 0;
};

// The runner of this OS thread while it runs a launch.
extern constinit thread_local Runner* runner;

inline Fiber* current() { return static_cast<Fiber*>(self); }

// Whether instrumented code at `p` touches no device memory but the thread's own stack, its parameters, or what
// stands for its special registers.
inline bool is_thread_state(const Fiber* f, const void* p, const WarpstepEmuLaunch& l) {
  auto within = [p](const void* start, size_t bytes) {
    return static_cast<size_t>(static_cast<const char*>(p) - static_cast<const char*>(start)) < bytes;
  };
  return within(f->stack, kStackBytes) || within(&self, sizeof self) || within(f, sizeof *f) ||
         within(l.params, l.params_bytes);
}
const char* base_name(const char* path);
std::string site_text(Site);
bool on_fiber_stack(const Runner&, const void* p);

}  // namespace emu

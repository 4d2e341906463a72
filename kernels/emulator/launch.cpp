// Launches: the list of kernels, the checks that CUDA makes of a configuration, and the workers that run groups of
// blocks. This file holds the C interface that Rust calls.
#include <algorithm>
#include <condition_variable>
#include <deque>
#include <thread>

#include "runtime.hpp"

namespace emu {

void shared_start(Block*, size_t dynamic_bytes);
// What the block wrote past the end of, in words; null for nothing.
const char* shared_overrun(Block*);

namespace {

constinit const Kernel* first_kernel = nullptr;

constexpr uint32_t kThreadsPerSm = 2048, kBlocksPerSm = 32, kSharedPerSm = 228 << 10, kSharedReservedPerBlock = 1 << 10;

uint64_t volume(const uint32_t (&v)[3]) { return uint64_t{v[0]} * v[1] * v[2]; }
std::string dims(const uint32_t (&v)[3]) {
  return std::to_string(v[0]) + "x" + std::to_string(v[1]) + "x" + std::to_string(v[2]);
}

// Empty if the device would accept the launch.
std::string refusal(const WarpstepEmuLaunch& l, const Kernel& k) {
  const WarpstepEmuGeometry& g = l.geometry;
  const uint64_t threads = volume(g.block), blocks = volume(g.grid), cluster = volume(g.cluster);
  if (l.params_bytes != k.params_bytes)
    return "parameter struct of " + std::to_string(l.params_bytes) + " bytes, the kernel takes " +
           std::to_string(k.params_bytes);
  if (!blocks || g.grid[0] > 0x7fffffffu || g.grid[1] > 65535 || g.grid[2] > 65535 || blocks > 0x7fffffffu)
    return "grid " + dims(g.grid) + " is empty or too large";
  if (!threads || g.block[2] > 64 || threads > kMaxThreads || threads % 32)
    return "block " + dims(g.block) + ": 32 to 1024 threads in whole warps are supported";
  if (threads > k.max_threads)
    return "block of " + std::to_string(threads) + " threads, the kernel is built for " + std::to_string(k.max_threads);
  if (g.shared_bytes > kSharedLimit)
    return std::to_string(g.shared_bytes) + " bytes of dynamic shared memory, above the limit of " +
           std::to_string(kSharedLimit);
  if (!cluster || cluster > kMaxClusterBlocks) return "cluster " + dims(g.cluster) + ": 1 to 16 blocks are supported";
  for (int i = 0; i < 3; i++)
    if (g.grid[i] % g.cluster[i])
      return "grid " + dims(g.grid) + " is not a whole number of clusters " + dims(g.cluster);
  if (g.cooperative && cluster > 1) return "cooperative launches with clusters are not emulated";
  if (g.cooperative) {
    const uint64_t by_shared = kSharedPerSm / (g.shared_bytes + kSharedReservedPerBlock);
    const uint64_t per_sm = std::min({uint64_t{kBlocksPerSm}, kThreadsPerSm / threads, by_shared});
    if (blocks > per_sm * l.options.sm_count)
      return "cooperative launch of " + std::to_string(blocks) + " blocks, but only " + std::to_string(per_sm) +
             " fit on each of " + std::to_string(l.options.sm_count) + " SMs";
  }
  return "";
}

// OS threads that help with launches of independent blocks; any number of launches may ask at once.
class Helpers {
 public:
  void run(Launch& launch, uint32_t helpers) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (threads_ < helpers) {
        std::thread([this] { serve(); }).detach();
        threads_++;
      }
      for (uint32_t i = 0; i < helpers; i++) wanted_.push_back(&launch);
    }
    wake_.notify_all();
    Runner::current().run(launch);
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_.erase(std::remove(wanted_.begin(), wanted_.end(), &launch), wanted_.end());
    idle_.wait(lock, [&] { return std::find(busy_.begin(), busy_.end(), &launch) == busy_.end(); });
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return !wanted_.empty(); });
      Launch* launch = wanted_.front();
      wanted_.pop_front();
      busy_.push_back(launch);
      lock.unlock();
      Runner::current().run(*launch);
      lock.lock();
      busy_.erase(std::find(busy_.begin(), busy_.end(), launch));
      idle_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  std::deque<Launch*> wanted_;
  std::vector<Launch*> busy_;
  uint32_t threads_ = 0;
};

Helpers& helpers() {
  static Helpers* shared = new Helpers;  // never destroyed: its threads outlive main
  return *shared;
}

// Block index of member `rank` of a group: groups are blocks, clusters, or the whole grid.
uint32_t member(const Launch& l, uint32_t group, uint32_t rank) {
  const WarpstepEmuGeometry& g = *l.geometry;
  if (volume(g.cluster) == 1) return group * l.group_blocks + rank;
  const uint32_t cx = g.cluster[0], cy = g.cluster[1], nx = g.grid[0] / cx, ny = g.grid[1] / cy;
  const uint32_t x = group % nx * cx + rank % cx, y = group / nx % ny * cy + rank / cx % cy;
  const uint32_t z = group / nx / ny * g.cluster[2] + rank / cx / cy;
  return (z * g.grid[1] + y) * g.grid[0] + x;
}

}  // namespace

Kernel::Kernel(const char* symbol, const char* file, uint32_t params_bytes, uint32_t max_threads, KernelFn run)
    : symbol(symbol), file(file), params_bytes(params_bytes), max_threads(max_threads), run(run), next(first_kernel) {
  first_kernel = this;
}

Runner& Runner::current() {
  thread_local Runner instance;
  return instance;
}

Block* Runner::take_block(uint32_t index) {
  if (spare_blocks.empty()) {
    all_blocks.push_back(std::make_unique<Block>());
    spare_blocks.push_back(all_blocks.back().get());
  }
  Block* b = spare_blocks.back();
  spare_blocks.pop_back();
  const WarpstepEmuGeometry& g = *launch->geometry;
  const uint32_t threads = launch->block_threads;
  b->index = index;
  b->id = {index % g.grid[0], index / g.grid[0] % g.grid[1], index / g.grid[0] / g.grid[1]};
  b->cluster_rank = launch->geometry->cooperative ? 0 : static_cast<uint32_t>(blocks.size());
  b->threads = b->live = threads;
  b->ready_warps = 0;
  b->bulk.clear();
  b->dependence_waited = false;
  for (Warp& w : b->warps) w = {};
  for (NamedBarrier& bar : b->barriers) {
    bar.arrived = 0;
    bar.waiting.fill(0);
    clock_reset(bar.clock);
  }
  if (b->fibers.size() < threads) b->fibers.resize(threads);
  for (uint32_t t = 0; t < threads; t++) {
    Fiber& f = b->fibers[t];
    f.tid = {t % g.block[0], t / g.block[0] % g.block[1], t / g.block[0] / g.block[1]};
    f.bid = b->id;
    f.bdim = {g.block[0], g.block[1], g.block[2]};
    f.gdim = {g.grid[0], g.grid[1], g.grid[2]};
    f.linear = t, f.lane = t & 31, f.warp = t >> 5;
    f.cluster_rank = b->cluster_rank;
    f.cluster_size = static_cast<uint32_t>(volume(g.cluster));
    f.block = b, f.stack = nullptr, f.fake_stack = nullptr;
    f.state = State::kReady, f.what = nullptr, f.site = {};
    f.polled = nullptr, f.polls = 0;
    f.copies.clear();
    f.copy_groups.clear();
  }
  for (uint32_t w = 0; w * 32 < threads; w++) {
    b->warps[w].lanes = b->warps[w].ready = 0xffffffffu;
    b->ready_warps |= 1u << w;
  }
  observe_block(b);
  shared_start(b, g.shared_bytes);
  live += threads;
  return b;
}

// Takes back what the group used, the stacks of abandoned fibers included, and checks what it left behind.
void Runner::release_blocks() {
  for (Block* b : blocks) {
    if (!failed && !b->bulk.empty()) {
      launch->set_report("kernel " + std::string(launch->kernel->symbol) + ", block " + std::to_string(b->index) +
                         ": ended with a bulk copy in flight, issued at " + site_text(b->bulk[0].site));
      failed = true;
    }
    if (!failed && launch->geometry->dependent && !b->dependence_waited) {
      launch->set_report("kernel " + std::string(launch->kernel->symbol) + ", block " + std::to_string(b->index) +
                         ": a dependent launch ended without griddep_wait");
      failed = true;
    }
    if (const char* what = failed ? nullptr : shared_overrun(b)) {
      launch->set_report("kernel " + std::string(launch->kernel->symbol) + ", block " + std::to_string(b->index) +
                         ": wrote past the end of " + what);
      failed = true;
    }
    for (uint32_t t = 0; t < b->threads; t++) {
      Fiber& f = b->fibers[t];
      if (f.stack) stacks.push_back(f.stack);
      f.stack = nullptr;
    }
    spare_blocks.push_back(b);
  }
  blocks.clear();
  live = 0;
}

void Runner::run(Launch& l) {
  launch = &l;
  failed = false;
  runner = this;
  for (;;) {
    uint32_t group;
    if (l.failed || (group = l.next_group++) >= l.groups) break;
    if (l.options->order == 1) group = l.groups - 1 - group;
    // Seeded by group, so that a run does not depend on which worker took which.
    rng = (l.options->seed * 0x9e3779b97f4a7c15ull + group * 0xd1b54a32d192ed03ull) | 1;
    for (int i = 0; i < 4; i++) random(2);
    polling = 0;
    next_block = 0;
    cluster.arrived = 0;
    for (uint32_t rank = 0; rank < l.group_blocks; rank++) blocks.push_back(take_block(member(l, group, rank)));
    run_group();
    release_blocks();
    if (failed) break;
  }
  runner = nullptr;
  launch = nullptr;
}

}  // namespace emu

extern "C" {

// Of several kernels of one name the one that was entered first, which is that of a preloaded library: so
// tools/mutate.py puts a changed kernel in the place of the one in the program.
const void* warpstep_emu_find(const char* symbol, WarpstepEmuKernelInfo* info) {
  const emu::Kernel* found = nullptr;
  for (const emu::Kernel* k = emu::first_kernel; k; k = k->next)
    if (!strcmp(k->symbol, symbol)) found = k;
  if (found) *info = {found->params_bytes, found->max_threads};
  return found;
}

// 0, or 1 with a report in `report`, which is always terminated.
int warpstep_emu_launch(const WarpstepEmuLaunch* request, char* report, uint64_t report_bytes) {
  using namespace emu;
  const Kernel& k = *static_cast<const Kernel*>(request->kernel);
  std::string text = refusal(*request, k);
  if (text.empty()) {
    Launch l;
    l.request = request, l.kernel = &k, l.geometry = &request->geometry, l.options = &request->options;
    l.blocks = static_cast<uint32_t>(volume(l.geometry->grid));
    l.block_threads = static_cast<uint32_t>(volume(l.geometry->block));
    l.group_blocks = l.geometry->cooperative ? l.blocks : static_cast<uint32_t>(volume(l.geometry->cluster));
    l.groups = l.blocks / l.group_blocks;
    observe_launch(l);
    const uint32_t workers = EMU_OBSERVED ? 1 : std::min(l.options->workers, l.groups);
    if (workers > 1)
      helpers().run(l, workers - 1);
    else
      Runner::current().run(l);
    text = l.report;
    if (!l.failed) return 0;
  }
  const size_t n = std::min<size_t>(text.size(), report_bytes - 1);
  memcpy(report, text.data(), n);
  report[n] = 0;
  return 1;
}

// "opt", "asan", "race" or "count".
const char* warpstep_emu_build_kind() {
#if EMU_RACE
  return "race";
#elif EMU_COUNT
  return "count";
#else
  return EMU_ASAN ? "asan" : "opt";
#endif
}
}

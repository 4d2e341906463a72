// The race build: happens-before clocks, the shadow of shared and global memory, and the reports.
#include "runtime.hpp"

#if EMU_RACE

#include <dlfcn.h>
#include <stdio.h>

#include <algorithm>
#include <unordered_map>

// The bounds of this program's image, whose constant tables kernels may read; the linker defines them.
extern "C" const char __executable_start, _end;

namespace emu {

uint64_t pack_site(Site);

namespace {

constexpr uintptr_t kPageBytes = 4096;

struct GlobalCell {
  ShadowEntry entries[4];
  uint8_t written;  // bytes written by anyone in this launch
};
struct ShadowPage {
  GlobalCell cells[kPageBytes / 8];
};

void join(std::vector<uint32_t>& to, const std::vector<uint32_t>& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); i++) to[i] = std::max(to[i], from[i]);
}
void join(Clock& to, const Clock& from) {
  join(to.threads, from.threads);
  join(to.blocks, from.blocks);
}
uint32_t at(const std::vector<uint32_t>& v, size_t i) { return i < v.size() ? v[i] : 0; }

Clock& clock_of(Fiber* f) { return f->block->clocks.of_thread[f->linear]; }
void tick(Fiber* f) { clock_of(f).threads[f->linear]++; }

}  // namespace

struct LaunchObservations {
  std::unordered_map<uintptr_t, std::unique_ptr<ShadowPage>> pages;
  uintptr_t last_page = 0;
  ShadowPage* last = nullptr;
  const WarpstepEmuPiece* last_piece = nullptr;
  // By block: clocks over its threads; snapshot k is element k - 1, and each includes the one before.
  std::unordered_map<uint32_t, std::vector<std::vector<uint32_t>>> snapshots;
  std::unordered_map<const void*, std::vector<uint32_t>> released;  // snapshot numbers by block

  ShadowPage& page(uintptr_t address) {
    const uintptr_t number = address / kPageBytes;
    if (last && number == last_page) return *last;
    std::unique_ptr<ShadowPage>& slot = pages[number];
    if (!slot) slot = std::make_unique<ShadowPage>();
    last_page = number;
    return *(last = slot.get());
  }

  uint32_t take_snapshot(uint32_t block, const std::vector<uint32_t>& threads) {
    std::vector<std::vector<uint32_t>>& taken = snapshots[block];
    std::vector<uint32_t> next = threads;
    if (!taken.empty()) join(next, taken.back());
    if (taken.empty() || taken.back() != next) taken.push_back(std::move(next));
    return static_cast<uint32_t>(taken.size());
  }
};

namespace {

LaunchObservations& seen() { return *runner->launch->observations; }

// Whether the recorded access happens before what `f` does now.
bool happens_before(const ShadowEntry& e, Fiber* f) {
  const Clock& mine = clock_of(f);
  if (e.block == f->block->index) return mine.threads[e.thread] >= e.clock;
  const uint32_t snapshot = at(mine.blocks, e.block);
  return snapshot && at(seen().snapshots[e.block][snapshot - 1], e.thread) >= e.clock;
}

// file:line of a program counter: the innermost one that is in a kernel and not in dev.cuh. "?" without addr2line.
std::string line_of(uint64_t pc) {
  Dl_info object;
  if (!pc || !dladdr(reinterpret_cast<void*>(pc), &object)) return "?";
  char command[512];
  snprintf(command, sizeof command, "addr2line -i -s -e '%s' 0x%zx 2>/dev/null", object.dli_fname,
           static_cast<size_t>(pc - 1 - reinterpret_cast<uint64_t>(object.dli_fbase)));
  std::string best;
  if (FILE* lines = popen(command, "r")) {
    char line[512];
    while (fgets(line, sizeof line, lines)) {
      line[strcspn(line, "\n ")] = 0;
      const bool primitive = !strncmp(line, "dev.cuh", 7) || !strncmp(line, "dev_host.hpp", 12);
      if (best.empty() || !primitive) best = line;
      if (!primitive) break;
    }
    pclose(lines);
  }
  return best.empty() ? "?" : best;
}

std::string origin_text(uint64_t origin) {
  if (!(origin >> 63)) return line_of(origin);
  const uint64_t file = origin & ((uint64_t{1} << 47) - 1);
  return site_text({reinterpret_cast<const char*>(file), static_cast<int>(origin >> 47 & 0xffff)});
}

const char* access_text(Access a) {
  switch (a) {
    case Access::kRead: return "read";
    case Access::kWrite: return "write";
    case Access::kAtomicRead: return "atomic read";
    case Access::kAtomic: return "atomic update";
  }
  return "?";
}

// Compares the access with those recorded in the cell, and records it.
template <size_t kEntries>
void check_cell(ShadowEntry (&entries)[kEntries], const ShadowEntry& now, Fiber* f, const char* memory, const void* p,
                size_t bytes) {
  ShadowEntry* same = nullptr;  // of this thread and kind: to be replaced
  ShadowEntry* free_entry = nullptr;
  for (ShadowEntry& e : entries) {
    if (!e.clock) {
      if (!free_entry) free_entry = &e;
      continue;
    }
    const bool mine = e.block == now.block && e.thread == now.thread;
    const bool before = mine || happens_before(e, f);
    if (!before && (e.bytes & now.bytes) && (is_write(e.access) || is_write(now.access)) &&
        !(is_atomic(e.access) && is_atomic(now.access)))
      fail({}, "%s-memory race: %s of %zu bytes at %s (%p), unordered with a %s by block %u thread %u at %s", memory,
           access_text(now.access), bytes, origin_text(now.origin).c_str(), p, access_text(e.access), e.block, e.thread,
           origin_text(e.origin).c_str());
    if (mine && e.bytes == now.bytes && e.access <= now.access)
      same = &e;
    else if (before && !(e.bytes & ~now.bytes) && (is_write(now.access) || !is_write(e.access)) &&
             (!is_atomic(now.access) || is_atomic(e.access)))
      free_entry = &e;  // whoever races with it races with this access too
  }
  // With all entries taken one is dropped at random: a race with it is missed, in this run.
  *(same ? same : free_entry ? free_entry : &entries[runner->random(kEntries)]) = now;
}

// Calls `visit(cell index, byte mask)` for every 8 bytes that the range touches.
template <class Visit>
void for_cells(uintptr_t from, size_t bytes, Visit visit) {
  for (const uintptr_t to = from + bytes; from < to;) {
    const uintptr_t cell = from / 8, low = from % 8, high = std::min<uintptr_t>(8, to - cell * 8);
    visit(cell, static_cast<uint8_t>(((1u << high) - 1) & ~((1u << low) - 1)));
    from = cell * 8 + high;
  }
}

ShadowEntry entry(Fiber* f, uint8_t mask, Access access, uint64_t origin) {
  return {origin, clock_of(f).threads[f->linear], f->block->index, static_cast<uint16_t>(f->linear), mask, access};
}

void check_in_flight(Fiber* f, const char* p, size_t bytes, uint64_t origin) {
  auto touches = [&](const void* dst, size_t n) {
    return static_cast<const char*>(dst) < p + bytes && p < static_cast<const char*>(dst) + n;
  };
  for (const CpAsync& c : f->copies)
    if (touches(c.dst, c.bytes))
      fail(c.site, "%s touches the target of this cp.async, which is still in flight", origin_text(origin).c_str());
  for (const BulkCopy& c : f->block->bulk)
    if (touches(c.dst, c.bytes))
      fail(c.site, "%s touches the target of this bulk copy, which is still in flight", origin_text(origin).c_str());
}

void observe_shared(Fiber* f, Block* owner, const char* p, size_t bytes, Access access, uint64_t origin) {
  const size_t offset = static_cast<size_t>(p - owner->shared);
  bool inside = offset + bytes <= owner->dynamic_bytes;
  for (const StaticArray& a : owner->statics) inside |= p >= a.p && p + bytes <= a.p + a.bytes;
  if (!inside)
    fail({}, "shared-memory %s out of bounds: %zu bytes at shared+%zu, at %s", access_text(access), bytes, offset,
         origin_text(origin).c_str());
  check_in_flight(f, p, bytes, origin);
  for_cells(offset, bytes, [&](uintptr_t index, uint8_t mask) {
    SharedCell& cell = owner->clocks.cells[index];
    if (is_write(access))
      cell.written |= mask;
    else if ((cell.written & mask) != mask)
      fail({}, "read of uninitialised shared memory: %zu bytes at shared+%zu, at %s", bytes, offset,
           origin_text(origin).c_str());
    check_cell(cell.entries, entry(f, mask, access, origin), f, "shared", p, bytes);
  });
}

// Whether another node writes into the range.
bool is_foreign(uintptr_t from, size_t bytes) {
  const WarpstepEmuLaunch& l = *runner->launch->request;
  const WarpstepEmuSpan* end = l.foreign + l.foreign_count;
  const WarpstepEmuSpan* span =
      std::upper_bound(l.foreign, end, from, [](uintptr_t a, const WarpstepEmuSpan& s) { return a < s.end; });
  return span != end && span->start < from + bytes;
}

// What another node writes may be touched by a thread that is ordered after a griddep_wait of its block.
void check_dependence(Fiber* f, uintptr_t from, size_t bytes, Access access, uint64_t origin) {
  BlockClocks& clocks = f->block->clocks;
  if (clocks.waited[f->linear] || !is_foreign(from, bytes)) return;
  for (const auto& [thread, clock] : clocks.waits)
    if (clock_of(f).threads[thread] > clock) {
      clocks.waited[f->linear] = 1;
      return;
    }
  fail({}, "%s of %zu bytes at %s (%p) before griddep_wait: another node writes there", access_text(access), bytes,
       origin_text(origin).c_str(), reinterpret_cast<void*>(from));
}

// Whether the bytes lie in one allocation of the device.
bool allocated(uintptr_t from, size_t bytes) {
  const WarpstepEmuLaunch& l = *runner->launch->request;
  const WarpstepEmuPiece* end = l.pieces + l.piece_count;
  const WarpstepEmuPiece* piece = seen().last_piece;
  if (!piece || from < piece->start || from >= piece->end)
    piece = std::upper_bound<const WarpstepEmuPiece*>(l.pieces, end, from,
                                                      [](uintptr_t a, const WarpstepEmuPiece& q) { return a < q.end; });
  if (piece == end || from < piece->start || from + bytes > piece->end) return false;
  seen().last_piece = piece;
  return true;
}

void observe_global(Fiber* f, uintptr_t from, size_t bytes, Access access, uint64_t origin) {
  const char* start = reinterpret_cast<const char*>(from);
  Dl_info object;
  if (start >= &__executable_start && start < &_end) return;
  if (!allocated(from, bytes)) {
    if (dladdr(start, &object)) return;  // the same, of a shared library
    fail({}, "global-memory %s out of bounds: %zu bytes at %p, at %s", access_text(access), bytes, start,
         origin_text(origin).c_str());
  }
  if (runner->launch->geometry->dependent) check_dependence(f, from, bytes, access, origin);
  for_cells(from, bytes, [&](uintptr_t index, uint8_t mask) {
    GlobalCell& cell = seen().page(index * 8).cells[index % (kPageBytes / 8)];
    if (is_write(access)) cell.written |= mask;
    check_cell(cell.entries, entry(f, mask, access, origin), f, "global", start, bytes);
  });
}

}  // namespace

void observe(const void* p, size_t bytes, Access access, uint64_t origin) {
  Fiber* f = current();
  if (!f || runner->failed) return;
  const char* start = static_cast<const char*>(p);
  if (is_thread_state(f, p, *runner->launch->request)) return;
  if (static_cast<size_t>(start - f->block->shared) < kArenaBytes)
    return observe_shared(f, f->block, start, bytes, access, origin);
  if (f->cluster_size > 1)
    for (Block* peer : runner->blocks)
      if (static_cast<size_t>(start - peer->shared) < kArenaBytes)
        return observe_shared(f, peer, start, bytes, access, origin);
  if (on_fiber_stack(*runner, p)) return;
  observe_global(f, reinterpret_cast<uintptr_t>(p), bytes, access, origin);
}

void misaligned(const void* p, size_t bytes, uint64_t origin) {
  fail({}, "misaligned %zu-byte access at %p, at %s", bytes, p, origin_text(origin).c_str());
}

void touch_landed(const void* p, size_t bytes, Site site) { touch(p, bytes, Access::kWrite, site); }

void load_nc(void* out, const void* p, size_t bytes, Site site) {
  for_cells(reinterpret_cast<uintptr_t>(p), bytes, [&](uintptr_t index, uint8_t mask) {
    if (seen().page(index * 8).cells[index % (kPageBytes / 8)].written & mask)
      fail(site, "non-coherent load (ld.global.nc) of data that was written during this launch, at %p", p);
  });
  touch(p, bytes, Access::kRead, site);
  // Even after griddep_wait: the launch began while the other one wrote.
  if (runner->launch->geometry->dependent && is_foreign(reinterpret_cast<uintptr_t>(p), bytes))
    fail(site, "non-coherent load (ld.global.nc) in a dependent launch of data that another node writes, at %p", p);
  memcpy(out, p, bytes);
}

void observe_launch(Launch& l) { l.observations = std::make_shared<LaunchObservations>(); }

void observe_block(Block* b) {
  BlockClocks& c = b->clocks;
  c.of_thread.assign(b->threads, Clock{std::vector<uint32_t>(b->threads), {}});
  for (uint32_t t = 0; t < b->threads; t++) c.of_thread[t].threads[t] = 1;
  c.waited.assign(b->threads, 0);
  c.waits.clear();
  c.mbarriers.clear();
  c.cells.clear();
}

void observe_shared_array(Block* b, size_t offset, size_t bytes) {
  const size_t cells = (offset + bytes + 7) / 8;
  if (b->clocks.cells.size() < cells) b->clocks.cells.resize(cells);
}

void clock_reset(Clock& c) {
  c.threads.clear();
  c.blocks.clear();
}

void clock_release(Fiber* f, Clock& to) {
  join(to, clock_of(f));
  tick(f);
}

void clock_acquire(Fiber* f, const Clock& from) { join(clock_of(f), from); }

void clock_join_lanes(Fiber* lanes, uint32_t mask) {
  Clock all;
  for (uint32_t rest = mask; rest; rest &= rest - 1) clock_release(&lanes[__builtin_ctz(rest)], all);
  for (uint32_t rest = mask; rest; rest &= rest - 1) clock_acquire(&lanes[__builtin_ctz(rest)], all);
}

// All threads of the cluster wait here: every block takes a snapshot, and every thread sees them all.
void clock_join_cluster() {
  std::vector<uint32_t> numbers;
  for (Block* b : runner->blocks) {
    Clock all;
    for (uint32_t t = 0; t < b->threads; t++) clock_release(&b->fibers[t], all);
    join(numbers, all.blocks);
    if (numbers.size() <= b->index) numbers.resize(b->index + 1);
    numbers[b->index] = seen().take_snapshot(b->index, all.threads);
  }
  for (Block* b : runner->blocks)
    for (Clock& clock : b->clocks.of_thread) {
      join(clock.blocks, numbers);
      join(clock.threads, seen().snapshots[b->index].back());
    }
}

void clock_release_at(Fiber* f, const uint64_t* mbar) { clock_release(f, f->block->clocks.mbarriers[mbar]); }
void clock_acquire_at(Fiber* f, const uint64_t* mbar) { clock_acquire(f, f->block->clocks.mbarriers[mbar]); }

void clock_release_global(Fiber* f, const void* address) {
  const uint32_t block = f->block->index, number = seen().take_snapshot(block, clock_of(f).threads);
  tick(f);
  std::vector<uint32_t>& released = seen().released[address];
  join(released, clock_of(f).blocks);
  if (released.size() <= block) released.resize(block + 1);
  released[block] = number;
}

void clock_acquire_global(Fiber* f, const void* address) {
  const auto found = seen().released.find(address);
  if (found == seen().released.end()) return;
  join(clock_of(f).blocks, found->second);
  if (const uint32_t own = at(found->second, f->block->index))
    join(clock_of(f).threads, seen().snapshots[f->block->index][own - 1]);
}

void clock_dependence_waited(Fiber* f) {
  BlockClocks& c = f->block->clocks;
  if (c.waited[f->linear]) return;
  c.waited[f->linear] = 1;
  c.waits.emplace_back(f->linear, clock_of(f).threads[f->linear]);
  tick(f);
}

}  // namespace emu

#endif

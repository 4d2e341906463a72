// Asynchronous copies: cp.async, mbarriers and bulk copies. They land as late as allowed, at once, or at random:
// late makes a missing wait show as NaN, early makes a copy into a live buffer show.
#include "runtime.hpp"

namespace emu {
namespace {

enum Landing : uint32_t { kLate, kAtOnce, kRandomly };

bool land_now() {
  const uint32_t policy = runner->launch->options->async_copies;
  return policy == kAtOnce || (policy == kRandomly && runner->random(2));
}

void land(const CpAsync& c) {
  memcpy(c.dst, c.src, c.src_bytes);
  memset(static_cast<char*>(c.dst) + c.src_bytes, 0, c.bytes - c.src_bytes);
}

// The 64-bit word of an mbarrier; the layout is ours, as on the device it is nobody's business.
struct Mbarrier {
  int32_t tx_bytes;  // expected and not yet landed; may be negative while a copy is ahead of its arrival
  uint32_t arrivals : 15, pending : 15, initialised : 1, phase : 1;
};
static_assert(sizeof(Mbarrier) == 8);

Mbarrier* checked(uint64_t* bar, Site site) {
  shared_offset(bar, site);
  if (runner->launch->options->poison && *bar == ~0ull) fail(site, "mbarrier used before mbar_init");
  return reinterpret_cast<Mbarrier*>(bar);
}

// Ends the phase if nothing is pending, and wakes who waited for that.
void complete_phase(Block* b, uint64_t* bar) {
  Mbarrier* m = reinterpret_cast<Mbarrier*>(bar);
  if (m->pending || m->tx_bytes) return;
  m->phase ^= 1;
  m->pending = m->arrivals;
  runner->events++;
  for (uint32_t t = 0; t < b->threads; t++) {
    Fiber& f = b->fibers[t];
    if (f.state == State::kMbarrier && f.mbar == bar && f.parity != m->phase) {
      clock_acquire_at(&f, bar);
      runner->make_ready(&f);
    }
  }
}

void land(Block* b, const BulkCopy& c) {
  memcpy(c.dst, c.src, c.bytes);
  reinterpret_cast<Mbarrier*>(c.mbar)->tx_bytes -= static_cast<int32_t>(c.bytes);
  complete_phase(b, c.mbar);
}

}  // namespace

void cp_async(void* dst, const void* src, size_t bytes, size_t src_bytes, Site site) {
  Fiber* f = current();
  shared_offset(dst, site);
  if (reinterpret_cast<uintptr_t>(dst) % bytes || (src_bytes && reinterpret_cast<uintptr_t>(src) % bytes))
    fail(site, "cp.async of %zu bytes between unaligned addresses %p and %p", bytes, dst, src);
  touch(dst, bytes, Access::kWrite, site);
  if (src_bytes) touch(src, src_bytes, Access::kRead, site);
  const CpAsync copy{dst, src, bytes, src_bytes, site};
  if (land_now()) land(copy);  // and again when waited for, which then changes nothing
  f->copies.push_back(copy);
}

void cp_async_commit() {
  Fiber* f = current();
  f->copy_groups.push_back(f->copies.size());
}

void cp_async_wait(size_t in_flight) {
  Fiber* f = current();
  const size_t groups = f->copy_groups.size();
  if (groups <= in_flight) return;
  const size_t end = f->copy_groups[groups - 1 - in_flight];
  const std::vector<CpAsync> landed(f->copies.begin(), f->copies.begin() + end);
  f->copies.erase(f->copies.begin(), f->copies.begin() + end);
  f->copy_groups.erase(f->copy_groups.begin(), f->copy_groups.end() - in_flight);
  for (size_t& group_end : f->copy_groups) group_end -= end;
  for (const CpAsync& c : landed) {
    land(c);
    touch_landed(c.dst, c.bytes, c.site);
  }
}

void mbar_init(uint64_t* bar, uint32_t arrivals, Site site) {
  shared_offset(bar, site);
  if (arrivals == 0 || arrivals >= 1u << 15) fail(site, "mbar_init: %u arrivals", arrivals);
  Mbarrier m{};
  m.arrivals = m.pending = arrivals;
  m.initialised = 1;
  touch(bar, 8, Access::kWrite, site);
  memcpy(bar, &m, 8);
}

void mbar_arrive(uint64_t* bar, uint32_t tx_bytes, Site site) {
  Fiber* f = current();
  Mbarrier* m = checked(bar, site);
  touch(bar, 8, Access::kAtomic, site);
  if (!m->pending) fail(site, "mbarrier: more arrivals in a phase than its count of %u", m->arrivals);
  clock_release_at(f, bar);
  m->tx_bytes += static_cast<int32_t>(tx_bytes);
  m->pending--;
  runner->events++;
  complete_phase(f->block, bar);
}

void mbar_wait(uint64_t* bar, uint32_t parity, Site site) {
  Fiber* f = current();
  Mbarrier* m = checked(bar, site);
  touch(bar, 8, Access::kAtomicRead, site);
  if (m->phase != (parity & 1)) {
    clock_acquire_at(f, bar);
    return;
  }
  f->state = State::kMbarrier;
  f->mbar = bar, f->parity = parity & 1;
  f->what = "mbar_wait", f->site = site;
  runner->events++;
  runner->suspend(f);
}

void bulk_g2s(void* dst, const void* src, uint32_t bytes, uint64_t* bar, Site site) {
  Fiber* f = current();
  Block* b = f->block;
  shared_offset(dst, site);
  checked(bar, site);
  if (!bytes || ((reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(src) | bytes) & 15))
    fail(site, "bulk copy of %u bytes from %p to %p: addresses and size must be multiples of 16", bytes, src, dst);
  const char* first = static_cast<char*>(dst);
  for (const BulkCopy& c : b->bulk)
    if (static_cast<char*>(c.dst) < first + bytes && first < static_cast<char*>(c.dst) + c.bytes)
      fail(site, "bulk copy into the target of one still in flight, issued at %s", site_text(c.site).c_str());
  touch(dst, bytes, Access::kWrite, site);
  touch(src, bytes, Access::kRead, site);
  clock_release_at(f, bar);  // the landing is ordered before the end of the phase
  const BulkCopy copy{dst, src, bytes, bar, site};
  if (land_now())
    land(b, copy);
  else
    b->bulk.push_back(copy);
}

bool Runner::land_one_bulk_copy() {
  for (Block* b : blocks) {
    if (b->bulk.empty()) continue;
    const size_t i = launch->options->order == 2 ? random(b->bulk.size()) : 0;
    const BulkCopy copy = b->bulk[i];
    b->bulk.erase(b->bulk.begin() + i);
    land(b, copy);
    return true;
  }
  return false;
}

}  // namespace emu

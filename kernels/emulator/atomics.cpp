// Atomics, acquire and release at device scope, and the polling loads that let other threads run.
#include "runtime.hpp"

namespace emu {
namespace {

void yield(const char* what, Site site) {
  Fiber* f = current();
  f->state = State::kPolling;
  f->what = what, f->site = site;
  runner->polling++;
  runner->suspend(f);
}

// Looking at a word once is free, so that a kernel may take many words that are there without a switch for each;
// looking again at the same one, or at many, lets the others run.
void look(const void* p, const char* what, Site site) {
  constexpr uint32_t kFreePolls = 32;
  Fiber* f = current();
  if (f->polled == p || ++f->polls == kFreePolls) {
    f->polls = 0;
    yield(what, site);
  }
  f->polled = p;
}

template <size_t BYTES>
void require_aligned(const void* p, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % BYTES) fail(site, "misaligned atomic access at %p", p);
}
template <class T>
void require_aligned(const T* p, Site site) {
  require_aligned<sizeof(T)>(static_cast<const void*>(p), site);
}

}  // namespace

uint32_t atomic_add(uint32_t* p, uint32_t v, bool acqrel, Site site) {
  require_aligned(p, site);
  touch(p, 4, Access::kAtomic, site);
  if (acqrel) clock_release_global(current(), p);
  const uint32_t before = __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
  if (acqrel) clock_acquire_global(current(), p);
  runner->events += v != 0;
  return before;
}

uint32_t atomic_max(uint32_t* p, uint32_t v, Site site) {
  require_aligned(p, site);
  touch(p, 4, Access::kAtomic, site);
  uint32_t before = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (before < v && !__atomic_compare_exchange_n(p, &before, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  runner->events += before < v;
  return before;
}

void atomic_add(float* p, float v, Site site) {
  require_aligned(p, site);
  touch(p, 4, Access::kAtomic, site);
  uint32_t* word = reinterpret_cast<uint32_t*>(p);
  uint32_t before = __atomic_load_n(word, __ATOMIC_RELAXED), after;
  do {
    float sum;
    memcpy(&sum, &before, 4);
    sum += v;
    memcpy(&after, &sum, 4);
  } while (!__atomic_compare_exchange_n(word, &before, after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}

uint32_t load_acquire(const uint32_t* p, Site site) {
  require_aligned(p, site);
  yield("ld_acquire", site);
  touch(p, 4, Access::kAtomicRead, site);
  const uint32_t v = __atomic_load_n(p, __ATOMIC_ACQUIRE);
  clock_acquire_global(current(), p);
  return v;
}

void store_release(uint32_t* p, uint32_t v, Site site) {
  require_aligned(p, site);
  touch(p, 4, Access::kAtomic, site);
  clock_release_global(current(), p);
  runner->events += __atomic_exchange_n(p, v, __ATOMIC_ACQ_REL) != v;
}

uint64_t poll_relaxed(const uint64_t* p, Site site) {
  require_aligned(p, site);
  look(p, "poll_relaxed", site);
  touch(p, 8, Access::kAtomicRead, site);
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}

// Who polls and who stores are fibers of one host thread, so that the sixteen bytes are in one piece.
void poll_relaxed16(void* out, const void* p, Site site) {
  require_aligned<16>(p, site);
  look(p, "poll_relaxed_v4", site);
  touch(p, 16, Access::kAtomicRead, site);
  memcpy(out, p, 16);
}

void store_relaxed(uint64_t* p, uint64_t v, Site site) {
  require_aligned(p, site);
  touch(p, 8, Access::kAtomic, site);
  runner->events += __atomic_exchange_n(p, v, __ATOMIC_RELAXED) != v;
}

void store_relaxed16(void* p, const void* v, Site site) {
  require_aligned<16>(p, site);
  touch(p, 16, Access::kAtomic, site);
  runner->events += memcmp(p, v, 16) != 0;
  memcpy(p, v, 16);
}

}  // namespace emu

// Warp operations and barriers: everything that threads do together.
#include "runtime.hpp"

namespace emu {
namespace {

// Counts one arrival at a barrier of the block and checks that all agree on what it is.
NamedBarrier& arrive(Fiber* f, int id, uint32_t count, bool whole_block, Site site) {
  Block* b = f->block;
  NamedBarrier& bar = b->barriers[id];
  runner->events++;
  if (!bar.arrived) {
    bar.expected = count;
    bar.first = site;
  } else if (bar.expected != count) {
    fail(site, "barrier %d: %u threads expected here, %u at %s", id, count, bar.expected, site_text(bar.first).c_str());
  } else if (whole_block && runner->launch->options->strict &&
             (bar.first.line != site.line || bar.first.file != site.file)) {
    fail(site, "divergent block barrier: other threads of the block are at the one at %s\n%s",
         site_text(bar.first).c_str(), runner->describe().c_str());
  }
  bar.arrived++;
  clock_release(f, bar.clock);
  return bar;
}

// Opens the barrier if all have arrived.
bool complete(Fiber* f, NamedBarrier& bar) {
  if (bar.arrived < bar.expected) return false;
  Block* b = f->block;
  for (uint32_t w = 0; w * 32 < b->threads; w++) {
    for (uint32_t rest = bar.waiting[w]; rest; rest &= rest - 1) {
      Fiber& other = b->fibers[w * 32 + __builtin_ctz(rest)];
      other.state = State::kReady;
      clock_acquire(&other, bar.clock);
    }
    if (bar.waiting[w]) {
      b->warps[w].ready |= bar.waiting[w];
      b->ready_warps |= 1u << w;
      bar.waiting[w] = 0;
    }
  }
  bar.arrived = 0;
  return true;
}

void sync(Fiber* f, int id, uint32_t count, bool whole_block, Site site) {
  f->site = site;
  f->what = whole_block ? "block_sync" : "bar_sync";
  f->barrier = id;
  NamedBarrier& bar = arrive(f, id, count, whole_block, site);
  if (whole_block && runner->launch->options->strict && f->block->live < f->block->threads)
    fail(site, "block barrier after threads of the block have exited\n%s", runner->describe().c_str());
  if (complete(f, bar)) {
    clock_acquire(f, bar.clock);
    clock_reset(bar.clock);
    return;
  }
  f->state = State::kBarrier;
  bar.waiting[f->warp] |= 1u << f->lane;
  runner->suspend(f);
}

void check_named(Fiber* f, int id, uint32_t count, Site site) {
  if (id < 1 || id > 15) fail(site, "named barriers are 1 to 15, not %d", id);
  if (count == 0 || count % 32 || count > f->block->threads)
    fail(site, "barrier %d: a count of %u is not a number of whole warps of the block", id, count);
}

}  // namespace

// Every lane leaves its arguments on its own stack and waits; the last one computes for all.
void warp_collective(WarpFn fn, void* arg, uint32_t mask, bool orders_memory, const char* what, Site site) {
  Fiber* f = current();
  Block* b = f->block;
  Warp& w = b->warps[f->warp];
  const uint32_t bit = 1u << f->lane;
  if (!(mask & bit)) fail(site, "%s: lane %u is not in its own mask 0x%08x", what, f->lane, mask);
  if (mask & ~w.lanes) fail(site, "%s: mask 0x%08x names lanes that the block does not have", what, mask);
  if (mask & w.exited) fail(site, "%s: mask 0x%08x names exited lanes 0x%08x", what, mask, mask & w.exited);
  f->warp_fn = fn, f->warp_arg = arg, f->mask = mask;
  f->what = what, f->site = site, f->state = State::kWarpOp;
  w.in_warp_op |= bit;
  runner->events++;
  if ((w.in_warp_op & mask) != mask) {
    runner->suspend(f);
    return;
  }
  Fiber* lanes = &b->fibers[f->warp * 32];
  void* args[32];
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    const Fiber& other = lanes[__builtin_ctz(rest)];
    if (other.warp_fn != fn || other.mask != mask || other.site.line != site.line)
      fail(site, "divergent warp operation: lane %u is in %s (mask 0x%08x), lane %u in %s at %s (mask 0x%08x)", f->lane,
           what, mask, other.lane, other.what, site_text(other.site).c_str(), other.mask);
    args[other.lane] = other.warp_arg;
  }
  if (fn) fn(args, mask);
  if (orders_memory) clock_join_lanes(lanes, mask);
  w.in_warp_op &= ~mask;
  for (uint32_t rest = mask & ~bit; rest; rest &= rest - 1) lanes[__builtin_ctz(rest)].state = State::kReady;
  w.ready |= mask & ~bit;
  if (w.ready) b->ready_warps |= 1u << f->warp;
  f->state = State::kReady;
}

void block_sync(Site site) {
  Fiber* f = current();
  sync(f, 0, f->block->threads, true, site);
}

void bar_sync(int id, uint32_t threads, Site site) {
  Fiber* f = current();
  check_named(f, id, threads, site);
  sync(f, id, threads, false, site);
}

void bar_arrive(int id, uint32_t threads, Site site) {
  Fiber* f = current();
  check_named(f, id, threads, site);
  NamedBarrier& bar = arrive(f, id, threads, false, site);
  if (complete(f, bar)) clock_reset(bar.clock);
}

void cluster_sync(Site site) {
  Fiber* f = current();
  ClusterBarrier& bar = runner->cluster;
  const uint32_t expected = f->cluster_size * f->block->threads;
  runner->events++;
  if (f->cluster_size == 1) fail(site, "cluster_sync in a launch without clusters");
  if (bar.arrived == 0) bar.first = site;
  if (runner->launch->options->strict && (bar.first.line != site.line || bar.first.file != site.file))
    fail(site, "divergent cluster barrier: other threads of the cluster are at the one at %s",
         site_text(bar.first).c_str());
  if (runner->live < expected) fail(site, "cluster barrier after threads of the cluster have exited");
  bar.arrived++;
  f->what = "cluster_sync", f->site = site;
  if (bar.arrived < expected) {
    f->state = State::kClusterBarrier;
    runner->suspend(f);
    return;
  }
  bar.arrived = 0;
  clock_join_cluster();
  for (Block* b : runner->blocks)
    for (uint32_t t = 0; t < b->threads; t++)
      if (&b->fibers[t] != f) runner->make_ready(&b->fibers[t]);
}

void griddep_wait(Site) {
  Fiber* f = current();
  if (!runner->launch->geometry->dependent) return;  // as in PTX: nothing to wait for
  f->block->dependence_waited = true;
  clock_dependence_waited(f);
}

}  // namespace emu

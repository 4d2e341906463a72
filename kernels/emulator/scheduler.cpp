// The scheduler: which fiber runs next, what happens when none can, and how a launch ends in a report.
#include <stdarg.h>
#include <stdio.h>

#include "runtime.hpp"

namespace emu {

constinit thread_local Thread* self = nullptr;
constinit thread_local Runner* runner = nullptr;

namespace {

// Rounds in which every polling thread looked again and nothing happened, after which none ever will.
constexpr int kIdleRounds = 2000;

enum Order : uint32_t { kInOrder, kReverse, kRandom };

uint32_t nth_set_bit(uint32_t mask, uint32_t n) {
  while (n--) mask &= mask - 1;
  return __builtin_ctz(mask);
}

uint32_t choose(Runner& r, uint32_t mask) {
  switch (r.launch->options->order) {
    case kInOrder: return __builtin_ctz(mask);
    case kReverse: return 31 - __builtin_clz(mask);
    default: return nth_set_bit(mask, r.random(__builtin_popcount(mask)));
  }
}

const char* state_text(State s) {
  switch (s) {
    case State::kReady: return "ready";
    case State::kWarpOp: return "in warp operation";
    case State::kBarrier: return "at barrier";
    case State::kClusterBarrier: return "at cluster barrier";
    case State::kMbarrier: return "waiting on an mbarrier in";
    case State::kPolling: return "polling in";
    case State::kDone: return "exited";
  }
  return "?";
}

}  // namespace

uint32_t Runner::random(uint32_t bound) {
  rng ^= rng << 13;
  rng ^= rng >> 7;
  rng ^= rng << 17;
  return static_cast<uint32_t>(rng >> 20) % bound;
}

void Runner::make_ready(Fiber* f) {
  f->state = State::kReady;
  f->block->warps[f->warp].ready |= 1u << f->lane;
  f->block->ready_warps |= 1u << f->warp;
}

// A ready fiber, taken off the ready masks; null if there is none. Unless the order is random, the warp and the
// block that ran last go on.
Fiber* Runner::pick(Block* block, int warp) {
  const bool random_order = launch->options->order == kRandom;
  if (random_order || !block || !block->ready_warps) {
    const size_t n = blocks.size(), first = random_order && n > 1 ? random(n) : next_block;
    block = nullptr;
    for (size_t i = 0; i < n; i++) {
      Block* candidate = blocks[(first + i) % n];
      if (candidate->ready_warps) {
        block = candidate;
        next_block = (first + i) % n;
        break;
      }
    }
    if (!block) return nullptr;
  }
  const bool stay = !random_order && warp >= 0 && (block->ready_warps >> warp & 1);
  const uint32_t w = stay ? static_cast<uint32_t>(warp) : choose(*this, block->ready_warps);
  Warp& chosen = block->warps[w];
  const uint32_t lane = choose(*this, chosen.ready);
  chosen.ready &= ~(1u << lane);
  if (!chosen.ready) block->ready_warps &= ~(1u << w);
  return &block->fibers[w * 32 + lane];
}

// Gives up the processor; the caller has set the fiber's state. Returns when it was made ready and picked.
void Runner::suspend(Fiber* f) {
  Fiber* next = failed ? nullptr : pick(f->block, f->warp);
  if (next != f) switch_to(f, next);
}

void Runner::finish(Fiber* f) {
  f->state = State::kDone;
  f->block->warps[f->warp].exited |= 1u << f->lane;
  f->block->live--;
  live--;
  events++;
}

bool Runner::wake_polling() {
  bool any = false;
  for (Block* b : blocks)
    for (uint32_t t = 0; t < b->threads; t++)
      if (b->fibers[t].state == State::kPolling) make_ready(&b->fibers[t]), any = true;
  polling = 0;
  return any;
}

void Runner::run_group() {
  uint64_t seen = ~0ull;
  int idle = 0;
  while (live && !failed) {
    if (Fiber* next = pick(blocks[next_block % blocks.size()], -1)) {
      switch_to(nullptr, next);
    } else if (land_one_bulk_copy()) {
      idle = 0;
    } else {
      idle = seen == events ? idle + 1 : 0;
      seen = events;
      if (polling && idle < kIdleRounds && wake_polling()) continue;
      launch->set_report("kernel " + std::string(launch->kernel->symbol) + ": deadlock, no thread can go on\n" +
                         describe());
      failed = true;
    }
  }
  self = nullptr;
}

// One line per run of neighbouring threads that are in the same place.
std::string Runner::describe() const {
  constexpr int kMaxLines = 24;
  std::string text;
  int lines = 0;
  for (const Block* b : blocks) {
    if (!b->live) continue;
    for (uint32_t first = 0; first < b->threads;) {
      const Fiber& f = b->fibers[first];
      uint32_t last = first;
      while (last + 1 < b->threads) {
        const Fiber& g = b->fibers[last + 1];
        const bool same = g.state == f.state && (f.state == State::kDone || f.state == State::kReady ||
                                                 (g.site.line == f.site.line && g.site.file == f.site.file));
        if (!same) break;
        last++;
      }
      if (++lines > kMaxLines) return text + "  ...\n";
      text += "  block " + std::to_string(b->index) + " threads " + std::to_string(first) + "-" + std::to_string(last) +
              ": " + state_text(f.state);
      if (f.state != State::kDone && f.state != State::kReady)
        text += std::string(" ") + (f.what ? f.what : "") + " at " + site_text(f.site);
      char detail[96] = "";
      if (f.state == State::kBarrier) {
        const NamedBarrier& bar = b->barriers[f.barrier];
        snprintf(detail, sizeof detail, " (barrier %d: %u of %u arrived)", f.barrier, bar.arrived, bar.expected);
      } else if (f.state == State::kWarpOp) {
        snprintf(detail, sizeof detail, " (mask 0x%08x)", f.mask);
      } else if (f.state == State::kMbarrier) {
        snprintf(detail, sizeof detail, " (shared+%zu, parity %u)",
                 static_cast<size_t>(reinterpret_cast<char*>(f.mbar) - b->shared), f.parity);
      }
      text += std::string(detail) + "\n";
      first = last + 1;
    }
  }
  return text;
}

const char* base_name(const char* path) {
  const char* slash = path ? strrchr(path, '/') : nullptr;
  return slash ? slash + 1 : path ? path : "?";
}

std::string site_text(Site s) { return std::string(base_name(s.file)) + ":" + std::to_string(s.line); }

void Launch::set_report(std::string text) {
  std::lock_guard<std::mutex> lock(report_mutex);
  if (report.empty()) report = std::move(text);
  failed = true;
}

void fail(Site site, const char* format, ...) {
  char message[2048];
  va_list args;
  va_start(args, format);
  vsnprintf(message, sizeof message, format, args);
  va_end(args);
  Fiber* f = current();
  std::string text = "kernel " + std::string(runner->launch->kernel->symbol);
  if (f)
    text += ", block (" + std::to_string(f->bid.x) + "," + std::to_string(f->bid.y) + "," + std::to_string(f->bid.z) +
            ") thread " + std::to_string(f->linear);
  if (site.file) text += ", at " + site_text(site);
  runner->launch->set_report(text + ": " + message);
  runner->failed = true;
  // The fiber is abandoned where it stands; its stack is reclaimed with the group.
  if (f) runner->switch_to(f, nullptr);
  __builtin_trap();  // only fibers call this, and a failed group resumes none
}

}  // namespace emu

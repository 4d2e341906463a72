// What the stand-in driver remembers, and what every call of it does first: record itself, decide whether it fails,
// check what it was given.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../../kernels/emulator/abi.h"

namespace {

enum { kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2, kInvalidContext = 201, kInvalidHandle = 400, kNotFound = 500,
       kNotReady = 600 };

struct Module {
    std::map<std::string, size_t> params_bytes;
};

struct Function {
    std::string symbol;
    size_t params_bytes;
    unsigned dynamic_shared = 48 << 10;
    bool wide_cluster = false;
};

struct Event {
    uint64_t marker = 0;  // of the newest record that has not been passed; 0 for none
    uint64_t stamp = 0;   // of the newest record, passed or not: its time; 0 before the first
};

// A launch as it was enqueued: what later changes its node's parameters does not change it.
struct Launch {
    std::string symbol;
    WarpstepEmuGeometry geometry;
    std::vector<unsigned char> params;
};

struct Op {
    enum { kCopy, kFill, kMarker, kLaunch, kWait } kind;
    void* dst;  // of kWait the stream with the marker
    const void* src;
    size_t bytes;
    int value;
    uint64_t marker;
    std::shared_ptr<const Launch> launch = nullptr;
};

struct Stream {
    std::deque<Op> ops;
    uint64_t records = 0; // its clock: what other threads do in theirs takes no time here
};

struct GraphState {
    std::vector<struct NodeState*> nodes;
};

struct NodeState {
    GraphState* graph;
    int index;
    Launch launch;
    // Of to_rgb8, the one kernel whose result the host takes for an error: its marks of values that are not finite. No
    // kernel runs here, so a launch says that all were, whatever the memory held.
    void* marks = nullptr;
    size_t marks_bytes = 0;
};

struct State {
    std::mutex mutex;
    std::map<std::string, long> options = {{"version", 13000}, {"count", 1}, {"major", 9}, {"minor", 0},
                                           {"sms", 4}, {"l2", 1 << 16}, {"total", 1L << 34}, {"foreign", 0},
                                           {"fail", 0}, {"code", 1}};
    std::string fail_name;
    std::string log;
    uint64_t calls = 0, markers = 0;
    int sticky = 0;
    int contexts = 0;
    int graphs_made = 0;
    std::map<uintptr_t, size_t> memory, pinned;
    std::map<void*, std::string> live;  // handle -> kind
    std::map<Event*, Stream*> recorded;
    // The emulator, where launches are to be run.
    const void* (*find)(const char*, WarpstepEmuKernelInfo*) = nullptr;
    int32_t (*launch)(const WarpstepEmuLaunch*, char*, uint64_t) = nullptr;

    State() {
        const char* text = getenv("WARPSTEP_STUB");
        if (!text) return;
        // In a process of its own it obeys the variable that drivers obey.
        const char* visible = getenv("CUDA_VISIBLE_DEVICES");
        if (visible && !*visible) options["count"] = 0;
        configure(text);
        if (!options["execute"]) return;
        // The program must export them (tools/rehearse.sh).
        find = (decltype(find))dlsym(RTLD_DEFAULT, "warpstep_emu_find");
        launch = (decltype(launch))dlsym(RTLD_DEFAULT, "warpstep_emu_launch");
        if (!find || !launch) abort();
    }

    // key=value,key=value
    void configure(const std::string& text) {
        size_t at = 0;
        while (at < text.size()) {
            size_t end = text.find(',', at);
            if (end == std::string::npos) end = text.size();
            std::string item = text.substr(at, end - at);
            size_t equals = item.find('=');
            std::string key = item.substr(0, equals), value = item.substr(equals + 1);
            if (key == "fail_name") {
                fail_name = value;
            } else {
                options[key] = strtol(value.c_str(), nullptr, 0);
            }
            at = end + 1;
        }
    }

    template <typename... Args>
    void note(const char* format, Args... args) {
        char line[1536];
        snprintf(line, sizeof line, format, args...);
        // Of hours of work nobody reads the log.
        if (!options["quiet"])
            log += line;
        else if (strstr(line, " BAD "))
            fprintf(stderr, "stub:%s\n", line);
    }
};

// Never destroyed: the driver outlives its users.
State& state() {
    static State* const instance = new State;
    return *instance;
}

thread_local int pushed = 0;
thread_local bool push_failed = false;  // whoever cleans up then has no context and cannot help it

bool is_sticky(long code) {
    return code == 700 || code == 719 || code == 999;
}

// One recorded call: takes the lock, writes the name, and decides whether the call fails.
struct Call {
    State& s = state();
    std::lock_guard<std::mutex> lock{s.mutex};
    int code = kSuccess;

    explicit Call(const char* name, bool needs_context = true) {
        s.calls++;
        s.note("%s", name);
        bool chosen = s.fail_name.empty() ? (long)s.calls == s.options["fail"] : s.fail_name == name;
        if (chosen) {
            code = (int)s.options["code"];
            if (is_sticky(code)) s.sticky = code;
            s.fail_name.clear();
            if (s.options["fail"] == 0) s.options["fail"] = -1;
        } else if (s.sticky && needs_context) {
            code = s.sticky;
        } else if (needs_context && pushed == 0 && !push_failed) {
            bad("no context is current");
            code = kInvalidContext;
        }
    }

    ~Call() {
        if (code != kSuccess && code != kNotReady) s.note(" -> %d", code);
        s.note("\n");
    }

    void bad(const char* what) {
        s.note(" BAD %s", what);
    }

    bool live(const void* handle, const char* kind) {
        auto found = s.live.find(const_cast<void*>(handle));
        if (found != s.live.end() && found->second == kind) return true;
        bad("handle");
        if (code == kSuccess) code = kInvalidHandle;
        return false;
    }

    bool inside(uintptr_t ptr, size_t bytes) {
        auto found = s.memory.upper_bound(ptr);
        if (found != s.memory.begin() && (--found, ptr + bytes <= found->first + found->second)) return true;
        bad("range");
        code = kInvalidValue;
        return false;
    }

    template <typename T>
    int make(T** out, const char* kind, T* value) {
        if (code != kSuccess) {
            delete value;
            return code;
        }
        s.live[value] = kind;
        *out = value;
        return code;
    }

    template <typename T>
    int destroy(T* handle, const char* kind) {
        if (live(handle, kind)) {
            s.live.erase(handle);
            delete handle;
        }
        return code;
    }
};

// Runs a launch on the emulated device's kernels; what that finds wrong is a sticky error, as on a GPU.
void execute(State& s, const Launch& launch) {
    WarpstepEmuKernelInfo info;
    WarpstepEmuLaunch what = {};
    what.kernel = s.find(launch.symbol.c_str(), &info);
    what.params = launch.params.data();
    what.params_bytes = launch.params.size();
    what.geometry = launch.geometry;
    what.options = {1, 0, 0, 2, 1, 1, (uint32_t)s.options["sms"]};
    char report[1024] = "no such kernel";
    if (what.kernel && s.launch(&what, report, sizeof report) == 0) return;
    s.note("execution of %s BAD %s\n", launch.symbol.c_str(), report);
    s.sticky = 719;
}

void drain(State& s, Stream* stream, uint64_t marker = 0);

void run(State& s, Op& op) {
    if (op.kind == Op::kLaunch) execute(s, *op.launch);
    if (op.kind == Op::kCopy) memcpy(op.dst, op.src, op.bytes);
    if (op.kind == Op::kFill) memset(op.dst, op.value, op.bytes);
    if (op.kind == Op::kMarker) {
        for (auto& [event, stream] : s.recorded)
            if (event->marker == op.marker) event->marker = 0;
    }
    if (op.kind == Op::kWait) {
        // A stream that is gone has been carried out, and so may this part of a living one have been.
        auto alive = s.live.find(op.dst);
        if (alive == s.live.end() || alive->second != "stream") return;
        auto* other = static_cast<Stream*>(op.dst);
        for (const Op& waiting : other->ops)
            if (waiting.kind == Op::kMarker && waiting.marker == op.marker) return drain(s, other, op.marker);
    }
}

// Carries out what is in the stream, up to and including `marker`, or everything for 0.
void drain(State& s, Stream* stream, uint64_t marker) {
    while (!stream->ops.empty()) {
        Op op = stream->ops.front();
        stream->ops.pop_front();
        run(s, op);
        if (marker && op.kind == Op::kMarker && op.marker == marker) break;
    }
}

void drain_all(State& s) {
    for (auto& [handle, kind] : s.live)
        if (kind == "stream") drain(s, static_cast<Stream*>(handle));
}

void hex(State& s, const void* bytes, size_t count) {
    for (size_t i = 0; i < count; i++) s.note("%02x", static_cast<const unsigned char*>(bytes)[i]);
}

struct Attribute {
    unsigned id;
    unsigned pad;
    unsigned value[16];
};

struct Config {
    unsigned grid[3], block[3], shared_bytes;
    Stream* stream;
    const Attribute* attributes;
    unsigned count;
};

struct Edge {
    unsigned char from_port, to_port, type, reserved[5];
};

struct NodeParams {
    int type, reserved0[3];
    Function* function;
    unsigned grid[3], block[3], shared_bytes;
    void** arguments;
    void** extra;
    void* kernel;
    void* context;
    uint64_t rest[20];
    int64_t reserved2;
};

Launch launch_of(const Function* f, const unsigned* grid, const unsigned* block, unsigned shared, void** arguments) {
    Launch launch = {f->symbol, {}, {}};
    for (int axis = 0; axis < 3; axis++) {
        launch.geometry.grid[axis] = grid[axis];
        launch.geometry.block[axis] = block[axis];
        launch.geometry.cluster[axis] = 1;
    }
    launch.geometry.shared_bytes = shared;
    auto* bytes = static_cast<const unsigned char*>(arguments[0]);
    launch.params.assign(bytes, bytes + f->params_bytes);
    return launch;
}

void set_attribute(Launch& launch, unsigned id, const unsigned* value) {
    if (id == 2) launch.geometry.cooperative = value[0];
    for (int axis = 0; axis < 3 && id == 4; axis++) launch.geometry.cluster[axis] = value[axis];
    if (id == 6) launch.geometry.dependent = value[0];
}

void enqueue(State& s, Stream* stream, const Launch& launch) {
    if (s.launch) stream->ops.push_back({Op::kLaunch, nullptr, nullptr, 0, 0, 0, std::make_shared<Launch>(launch)});
}

void geometry(Call& call, const Function* f, const unsigned* grid, const unsigned* block, unsigned shared) {
    call.s.note(" symbol=%s grid=%u,%u,%u block=%u,%u,%u shared=%u", f->symbol.c_str(), grid[0], grid[1], grid[2],
                block[0], block[1], block[2], shared);
    if (shared > f->dynamic_shared) {
        call.bad("dynamic shared memory without the function's consent");
        call.code = kInvalidValue;
    }
}

void attribute(Call& call, const Function* f, unsigned id, const unsigned* value) {
    call.s.note(" attribute=%u:%u,%u,%u", id, value[0], value[1], value[2]);
    if (id == 4 && value[0] * value[1] * value[2] > 8 && f && !f->wide_cluster) {
        call.bad("wide cluster without the function's consent");
        call.code = kInvalidValue;
    }
}

void parameters(Call& call, const Function* f, void** arguments) {
    call.s.note(" params=");
    hex(call.s, arguments[0], f->params_bytes);
}

}  // namespace

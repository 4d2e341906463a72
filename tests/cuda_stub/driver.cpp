// A stand-in for libcuda.so.1 that records. It hands out host memory as device memory, checks that handles are live,
// that ranges lie inside allocations and that a context is current, counts what is alive, and fails the call it is
// told to. `stub.rs` compiles it and reads what it recorded.
//
// Copies, fills and launches are carried out as late as the driver may: when something waits for them. Launches only
// where `stub_execute` said with what; else no kernel runs.

#include "state.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void stub_configure(const char* text) {
    State& s = state();
    std::lock_guard<std::mutex> lock(s.mutex);
    s.fail_name.clear();
    s.sticky = 0;
    s.calls = 0;
    s.options["fail"] = 0;
    s.configure(text);
}

// From now on launches run, in the emulator whose two functions these are, and memory is handed out as NaN.
EXPORT void stub_execute(decltype(State::find) find, decltype(State::launch) launch) {
    State& s = state();
    std::lock_guard<std::mutex> lock(s.mutex);
    s.find = find;
    s.launch = launch;
}

EXPORT void stub_clear() {
    State& s = state();
    std::lock_guard<std::mutex> lock(s.mutex);
    s.log.clear();
}

EXPORT uint64_t stub_calls() {
    return state().calls;
}

// Valid until the next call of the library.
EXPORT const char* stub_log() {
    return state().log.c_str();
}

// Everything that is alive, in words; empty for nothing.
EXPORT const char* stub_live() {
    State& s = state();
    std::lock_guard<std::mutex> lock(s.mutex);
    static std::string* const text = new std::string;
    text->clear();
    std::map<std::string, int> counts;
    for (auto& [handle, kind] : s.live) counts[kind]++;
    if (s.contexts) counts["context"] = s.contexts;
    if (pushed) counts["pushed context"] = pushed;
    for (auto& [kind, count] : counts) *text += kind + ": " + std::to_string(count) + "; ";
    for (auto& [ptr, bytes] : s.memory) *text += "memory of " + std::to_string(bytes) + " bytes; ";
    for (auto& [ptr, bytes] : s.pinned) *text += "pinned memory of " + std::to_string(bytes) + " bytes; ";
    return text->c_str();
}

EXPORT int cuDriverGetVersion(int* version) {
    Call call("cuDriverGetVersion", false);
    *version = (int)call.s.options["version"];
    return call.code;
}

EXPORT int cuGetErrorName(int code, const char** text) {
    *text = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_STUB";
    return kSuccess;
}

EXPORT int cuGetErrorString(int, const char** text) {
    *text = "as the stub was told";
    return kSuccess;
}

EXPORT int cuInit(unsigned) {
    Call call("cuInit", false);
    if (call.code == kSuccess && call.s.options["count"] == 0) call.code = 100;
    return call.code;
}

EXPORT int cuDeviceGetCount(int* count) {
    Call call("cuDeviceGetCount", false);
    *count = (int)call.s.options["count"];
    return call.code;
}

EXPORT int cuDeviceGet(int* device, int ordinal) {
    Call call("cuDeviceGet", false);
    *device = ordinal;
    return call.code;
}

EXPORT int cuDeviceGetName(char* name, int bytes, int) {
    Call call("cuDeviceGetName", false);
    snprintf(name, (size_t)bytes, "Stub GPU");
    return call.code;
}

EXPORT int cuDeviceGetAttribute(int* value, int attribute, int) {
    Call call("cuDeviceGetAttribute", false);
    const char* option = attribute == 16 ? "sms" : attribute == 38 ? "l2" : attribute == 75 ? "major" : "minor";
    *value = (int)call.s.options[option];
    return call.code;
}

EXPORT int cuDeviceTotalMem_v2(size_t* bytes, int) {
    Call call("cuDeviceTotalMem_v2", false);
    *bytes = (size_t)call.s.options["total"];
    return call.code;
}

EXPORT int cuDevicePrimaryCtxRetain(void** context, int) {
    Call call("cuDevicePrimaryCtxRetain", false);
    if (call.code == kSuccess) {
        call.s.contexts++;
        *context = &state();
    }
    return call.code;
}

EXPORT int cuDevicePrimaryCtxRelease_v2(int) {
    Call call("cuDevicePrimaryCtxRelease_v2", false);
    call.s.contexts--;
    return call.code;
}

EXPORT int cuCtxPushCurrent_v2(void* context) {
    Call call("cuCtxPushCurrent_v2", false);
    if (context != &state() || call.s.contexts == 0) {
        call.bad("context");
        call.code = kInvalidContext;
    }
    push_failed = call.code != kSuccess;
    if (!push_failed) pushed++;
    return call.code;
}

EXPORT int cuCtxPopCurrent_v2(void** context) {
    Call call("cuCtxPopCurrent_v2");
    if (pushed > 0) pushed--;
    *context = &state();
    return call.code;
}

EXPORT int cuMemGetInfo_v2(size_t* free, size_t* total) {
    Call call("cuMemGetInfo_v2");
    size_t used = (size_t)call.s.options["foreign"];
    for (auto& [ptr, bytes] : call.s.memory) used += bytes;
    *total = (size_t)call.s.options["total"];
    *free = *total - used;
    return call.code;
}

EXPORT int cuMemAlloc_v2(uint64_t* ptr, size_t bytes) {
    Call call("cuMemAlloc_v2");
    call.s.note(" bytes=%zu", bytes);
    size_t used = bytes + (size_t)call.s.options["foreign"];
    for (auto& [start, size] : call.s.memory) used += size;
    if (call.code == kSuccess && bytes == 0) call.code = kInvalidValue;
    if (call.code == kSuccess && used > (size_t)call.s.options["total"]) call.code = kOutOfMemory;
    if (call.code != kSuccess) return call.code;
    void* memory = aligned_alloc(512, (bytes + 511) / 512 * 512);
    memset(memory, call.s.launch ? 0xff : 0, bytes);
    *ptr = (uint64_t)memory;
    call.s.memory[*ptr] = bytes;
    call.s.note(" ptr=%#lx", *ptr);
    return call.code;
}

EXPORT int cuMemFree_v2(uint64_t ptr) {
    Call call("cuMemFree_v2");
    drain_all(call.s);
    if (call.s.memory.erase(ptr)) {
        free((void*)ptr);
    } else {
        call.bad("freed twice");
    }
    return call.code;
}

EXPORT int cuMemHostAlloc(void** ptr, size_t bytes, unsigned) {
    Call call("cuMemHostAlloc");
    if (call.code != kSuccess) return call.code;
    *ptr = malloc(bytes);
    call.s.pinned[(uintptr_t)*ptr] = bytes;
    return call.code;
}

EXPORT int cuMemFreeHost(void* ptr) {
    Call call("cuMemFreeHost");
    for (auto& [handle, kind] : call.s.live)
        if (kind == "stream")
            for (Op& op : static_cast<Stream*>(handle)->ops)
                if (op.src == ptr) call.bad("a copy still reads the pinned memory");
    if (!call.s.pinned.erase((uintptr_t)ptr)) call.bad("freed twice");
    free(ptr);
    return call.code;
}

EXPORT int cuMemcpyHtoDAsync_v2(uint64_t dst, const void* src, size_t bytes, Stream* stream) {
    Call call("cuMemcpyHtoDAsync_v2");
    call.s.note(" bytes=%zu src=%zu", bytes, (size_t)src);
    if (!call.s.pinned.count((uintptr_t)src)) call.bad("source is not pinned");
    if (call.live(stream, "stream") && call.code == kSuccess && call.inside(dst, bytes))
        stream->ops.push_back({Op::kCopy, (void*)dst, src, bytes, 0, 0});
    return call.code;
}

EXPORT int cuMemcpyDtoHAsync_v2(void* dst, uint64_t src, size_t bytes, Stream* stream) {
    Call call("cuMemcpyDtoHAsync_v2");
    call.s.note(" bytes=%zu", bytes);
    if (call.live(stream, "stream") && call.code == kSuccess && call.inside(src, bytes)) {
        drain(call.s, stream);
        memcpy(dst, (void*)src, bytes);
    }
    return call.code;
}

EXPORT int cuMemsetD8Async(uint64_t dst, unsigned char value, size_t bytes, Stream* stream) {
    Call call("cuMemsetD8Async");
    if (call.live(stream, "stream") && call.code == kSuccess && call.inside(dst, bytes))
        stream->ops.push_back({Op::kFill, (void*)dst, nullptr, bytes, value, 0});
    return call.code;
}

EXPORT int cuMemsetD2D8Async(uint64_t dst, size_t pitch, unsigned char value, size_t bytes, size_t rows,
                             Stream* stream) {
    Call call("cuMemsetD2D8Async");
    call.s.note(" pitch=%zu bytes=%zu rows=%zu", pitch, bytes, rows);
    if (pitch < bytes || rows == 0) call.bad("pitch");
    for (size_t row = 0; row < rows; row++) {
        if (!call.live(stream, "stream") || call.code != kSuccess || !call.inside(dst + row * pitch, bytes)) break;
        stream->ops.push_back({Op::kFill, (void*)(dst + row * pitch), nullptr, bytes, value, 0});
    }
    return call.code;
}

EXPORT int cuStreamCreate(Stream** stream, unsigned) {
    Call call("cuStreamCreate");
    return call.make(stream, "stream", new Stream);
}

EXPORT int cuStreamDestroy_v2(Stream* stream) {
    Call call("cuStreamDestroy_v2");
    int code = call.code;
    if (!call.live(stream, "stream")) return call.code;
    drain(call.s, stream);
    call.code = code;
    return call.destroy(stream, "stream");
}

EXPORT int cuStreamSynchronize(Stream* stream) {
    Call call("cuStreamSynchronize");
    if (call.live(stream, "stream")) drain(call.s, stream);
    return call.code;
}

EXPORT int cuStreamWaitEvent(Stream* stream, Event* event, unsigned flags) {
    Call call("cuStreamWaitEvent");
    call.s.note(" event=%p", (void*)event);
    if (!call.live(stream, "stream") || !call.live(event, "event") || call.code != kSuccess) return call.code;
    if (flags != 0) call.bad("flags");
    if (event->marker) stream->ops.push_back({Op::kWait, call.s.recorded[event], nullptr, 0, 0, event->marker});
    return call.code;
}

EXPORT int cuEventCreate(Event** event, unsigned) {
    Call call("cuEventCreate");
    return call.make(event, "event", new Event);
}

EXPORT int cuEventDestroy_v2(Event* event) {
    Call call("cuEventDestroy_v2");
    call.s.recorded.erase(event);
    return call.destroy(event, "event");
}

EXPORT int cuEventRecord(Event* event, Stream* stream) {
    Call call("cuEventRecord");
    call.s.note(" event=%p", (void*)event);
    if (!call.live(event, "event") || !call.live(stream, "stream") || call.code != kSuccess) return call.code;
    event->marker = ++call.s.markers;
    event->stamp = ++stream->records;
    call.s.recorded[event] = stream;
    stream->ops.push_back({Op::kMarker, nullptr, nullptr, 0, 0, event->marker});
    return call.code;
}

EXPORT int cuEventQuery(Event* event) {
    Call call("cuEventQuery");
    if (!call.live(event, "event") || call.code != kSuccess || event->marker == 0) return call.code;
    // Passed when asked again.
    drain(call.s, call.s.recorded[event], event->marker);
    return call.code = kNotReady;
}

EXPORT int cuEventSynchronize(Event* event) {
    Call call("cuEventSynchronize");
    call.s.note(" event=%p", (void*)event);
    if (!call.live(event, "event") || call.code != kSuccess || event->marker == 0) return call.code;
    Stream* stream = call.s.recorded[event];
    auto alive = call.s.live.find(stream);
    if (alive != call.s.live.end()) drain(call.s, stream, event->marker);
    return call.code;
}

// A millisecond per record of the stream in between; only of events that were recorded and have been passed.
EXPORT int cuEventElapsedTime_v2(float* milliseconds, Event* start, Event* end) {
    Call call("cuEventElapsedTime_v2");
    if (!call.live(start, "event") || !call.live(end, "event") || call.code != kSuccess) return call.code;
    if (start->stamp == 0 || end->stamp == 0) return call.code = kInvalidHandle;
    if (start->marker != 0 || end->marker != 0) return call.code = kNotReady;
    *milliseconds = static_cast<float>(end->stamp - start->stamp);
    return call.code;
}

// The tests' images: an ELF header, then lines of "symbol bytes-of-its-parameters", then a zero.
EXPORT int cuModuleLoadData(Module** module, const void* image) {
    Call call("cuModuleLoadData");
    auto* loaded = new Module;
    const char* line = static_cast<const char*>(image) + 64;  // real images have no such lines
    char symbol[256];
    size_t bytes;
    int length;
    while (sscanf(line, "%255s %zu\n%n", symbol, &bytes, &length) == 2) {
        loaded->params_bytes[symbol] = bytes;
        line += length;
    }
    return call.make(module, "module", loaded);
}

EXPORT int cuModuleUnload(Module* module) {
    Call call("cuModuleUnload");
    for (auto it = call.s.live.begin(); it != call.s.live.end();) {
        // Functions go with their module; the names are enough to know whose they are.
        auto* f = it->second == "function" ? static_cast<Function*>(it->first) : nullptr;
        if (f && module->params_bytes.count(f->symbol)) {
            delete f;
            it = call.s.live.erase(it);
        } else {
            ++it;
        }
    }
    return call.destroy(module, "module");
}

EXPORT int cuModuleGetFunction(Function** function, Module* module, const char* name) {
    Call call("cuModuleGetFunction");
    call.s.note(" symbol=%s", name);
    if (!call.live(module, "module") || call.code != kSuccess) return call.code;
    auto found = module->params_bytes.find(name);
    if (found != module->params_bytes.end())
        return call.make(function, "function", new Function{name, found->second});
    // A real image, where the emulator knows what is in it.
    WarpstepEmuKernelInfo info;
    if (!call.s.find || !call.s.find(name, &info)) return call.code = kNotFound;
    return call.make(function, "function", new Function{name, (size_t)info.params_bytes});
}

EXPORT int cuFuncGetParamInfo(Function* function, size_t index, size_t* offset, size_t* bytes) {
    Call call("cuFuncGetParamInfo");
    if (!call.live(function, "function") || call.code != kSuccess) return call.code;
    if (index != 0) return call.code = kInvalidValue;
    *offset = 0;
    *bytes = function->params_bytes;
    return call.code;
}

EXPORT int cuFuncSetAttribute(Function* function, int id, int value) {
    Call call("cuFuncSetAttribute");
    if (!call.live(function, "function") || call.code != kSuccess) return call.code;
    call.s.note(" symbol=%s attribute=%d:%d", function->symbol.c_str(), id, value);
    if (id == 8) function->dynamic_shared = (unsigned)value;
    if (id == 14) function->wide_cluster = value != 0;
    return call.code;
}

EXPORT int cuLaunchKernelEx(const Config* config, Function* function, void** arguments, void**) {
    Call call("cuLaunchKernelEx");
    if (!call.live(function, "function") || !call.live(config->stream, "stream") || call.code != kSuccess)
        return call.code;
    geometry(call, function, config->grid, config->block, config->shared_bytes);
    for (unsigned i = 0; i < config->count; i++)
        attribute(call, function, config->attributes[i].id, config->attributes[i].value);
    parameters(call, function, arguments);
    if (call.code != kSuccess) return call.code;
    Launch launch = launch_of(function, config->grid, config->block, config->shared_bytes, arguments);
    for (unsigned i = 0; i < config->count; i++)
        set_attribute(launch, config->attributes[i].id, config->attributes[i].value);
    enqueue(call.s, config->stream, launch);
    return call.code;
}

EXPORT int cuGraphCreate(GraphState** graph, unsigned) {
    Call call("cuGraphCreate");
    return call.make(graph, "graph", new GraphState);
}

EXPORT int cuGraphDestroy(GraphState* graph) {
    Call call("cuGraphDestroy");
    int code = call.code;
    if (!call.live(graph, "graph")) return call.code;
    for (NodeState* node : graph->nodes) {
        call.s.live.erase(node);
        delete node;
    }
    call.code = code;
    return call.destroy(graph, "graph");
}

EXPORT int cuGraphAddNode_v2(NodeState** node, GraphState* graph, NodeState* const* dependencies, const Edge* edges,
                             size_t count, NodeParams* params) {
    Call call("cuGraphAddNode_v2");
    if (!call.live(graph, "graph") || !call.live(params->function, "function") || call.code != kSuccess)
        return call.code;
    call.s.note(" index=%zu", graph->nodes.size());
    geometry(call, params->function, params->grid, params->block, params->shared_bytes);
    call.s.note(" edges=");
    for (size_t i = 0; i < count; i++) {
        const Edge& e = edges[i];
        if (!call.live(dependencies[i], "node") || dependencies[i]->graph != graph) return call.code = kInvalidValue;
        bool programmatic = e.type == 1 && e.from_port == 1, full = e.type == 0 && e.from_port == 0;
        if (!programmatic && !full) call.bad("edge");
        call.s.note("%s%d%s", i ? "," : "", dependencies[i]->index, programmatic ? "p" : "f");
    }
    parameters(call, params->function, params->arguments);
    bool zero = params->type == 0 && params->extra == nullptr && params->reserved2 == 0;
    for (uint64_t word : params->rest) zero = zero && word == 0;
    for (int word : params->reserved0) zero = zero && word == 0;
    if (!zero) call.bad("reserved words");
    if (call.code != kSuccess) return call.code;
    auto* made = new NodeState{graph, (int)graph->nodes.size(), {}};
    made->launch = launch_of(params->function, params->grid, params->block, params->shared_bytes, params->arguments);
    made->launch.geometry.dependent = count > 0 && edges[0].type == 1;
    if (params->function->symbol.rfind("to_rgb8", 0) == 0) {
        auto* words = static_cast<const uint64_t*>(params->arguments[0]);  // ToRgb8Params: x, rgb, bad, elements
        made->marks = (void*)words[2];
        made->marks_bytes = (words[3] + 31) / 32 * 4;
    }
    graph->nodes.push_back(made);
    return call.make(node, "node", made);
}

EXPORT int cuGraphKernelNodeSetAttribute(NodeState* node, unsigned id, const unsigned* value) {
    Call call("cuGraphKernelNodeSetAttribute");
    if (!call.live(node, "node") || call.code != kSuccess) return call.code;
    call.s.note(" index=%d", node->index);
    attribute(call, nullptr, id, value);
    set_attribute(node->launch, id, value);
    return call.code;
}

struct Exec {
    int number;
    GraphState* graph;
};

EXPORT int cuGraphInstantiateWithParams(Exec** exec, GraphState* graph, void*) {
    Call call("cuGraphInstantiateWithParams");
    if (!call.live(graph, "graph")) return call.code;
    call.s.note(" nodes=%zu exec=%d", graph->nodes.size(), call.s.graphs_made);
    return call.make(exec, "executable graph", new Exec{call.s.graphs_made++, graph});
}

// The node names one of the executable's only as long as it and its graph live.
EXPORT int cuGraphExecNodeSetParams(Exec* exec, NodeState* node, NodeParams* params) {
    Call call("cuGraphExecNodeSetParams");
    if (!call.live(exec, "executable graph") || !call.live(node, "node") || !call.live(params->function, "function") ||
        call.code != kSuccess)
        return call.code;
    if (node->graph != exec->graph) call.bad("a node of another graph");
    call.s.note(" exec=%d index=%d", exec->number, node->index);
    geometry(call, params->function, params->grid, params->block, params->shared_bytes);
    parameters(call, params->function, params->arguments);
    if (call.code != kSuccess) return call.code;
    // The one executable of its graph: nobody asks for the graph's own parameters again.
    Launch launch = launch_of(params->function, params->grid, params->block, params->shared_bytes, params->arguments);
    node->launch.params = launch.params;
    return call.code;
}

EXPORT int cuGraphExecDestroy(Exec* exec) {
    Call call("cuGraphExecDestroy");
    return call.destroy(exec, "executable graph");
}

EXPORT int cuGraphLaunch(Exec* exec, Stream* stream) {
    Call call("cuGraphLaunch");
    if (call.live(exec, "executable graph") && call.live(stream, "stream")) call.s.note(" exec=%d", exec->number);
    if (call.code != kSuccess) return call.code;
    for (NodeState* node : exec->graph->nodes) {
        if (node->marks && !call.s.launch) memset(node->marks, 0, node->marks_bytes);
        enqueue(call.s, stream, node->launch);
    }
    return call.code;
}

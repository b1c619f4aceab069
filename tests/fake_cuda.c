/* A stand-in for libcuda.so.1: every call is recorded with its arguments, memory is that of this
   machine, and a function can be told to fail. Tests compile it; with -DWITH_CUDA_H the compiler
   also checks each function here against the real header.

   What it holds a caller to: cuInit first, a current context on the thread for whatever makes or
   frees, handles that are alive and of the right kind, copies inside of allocations, no waiting
   while a stream is captured. A module is the text of PTX: parameters of an entry are read by their
   types there, so that wrong sizes or a wrong order of arguments show in the record. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef WITH_CUDA_H
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#else
typedef int CUresult, CUdevice, CUdevice_attribute, CUfunction_attribute, CUjit_option;
typedef int CUstreamCaptureMode;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUgraph_st *CUgraph;
typedef struct CUgraphExec_st *CUgraphExec;
#endif

#define MOST 24

/* --- the record of calls, which tests read ---------------------------------------------------- */

typedef struct {
    char name[40];
    int count;
    uint64_t values[MOST];
} Call;

static Call *calls;
static int called, room;

int fake_calls(void) { return called; }
const Call *fake_call(int place) { return &calls[place]; }
void fake_forget(void) { called = 0; }

static char failing[40];
static int failing_code, failing_after;

/* The call after `after` further ones to `name` returns `code`, as do all that follow. */
void fake_fail(const char *name, int code, int after) {
    snprintf(failing, sizeof failing, "%s", name);
    failing_code = code;
    failing_after = after;
}

static int record(const char *name, int count, const uint64_t *values) {
    if (called == room) {
        room = room ? 2 * room : 256;
        calls = realloc(calls, room * sizeof *calls);
    }
    Call *call = &calls[called++];
    snprintf(call->name, sizeof call->name, "%s", name);
    call->count = count;
    memcpy(call->values, values, count * sizeof *values);
    if (failing_code && !strcmp(name, failing) && failing_after-- <= 0) return failing_code;
    return 0;
}

#define ARGS(...) (sizeof((uint64_t[]){__VA_ARGS__}) / 8), (const uint64_t[]){__VA_ARGS__}
#define RECORD(...)                                             \
    do {                                                        \
        int code_ = record(__func__, ARGS(__VA_ARGS__));        \
        if (code_) return code_;                                \
    } while (0)
#define U(x) ((uint64_t)(uintptr_t)(x))

/* --- what is alive ---------------------------------------------------------------------------- */

enum { MEMORY = 1, HOST, STREAM, EVENT, MODULE, FUNCTION, GRAPH, EXEC };

typedef struct Work {
    int kind; /* 0 copy, 1 launch, 2 call back */
    void *to;
    const void *from;
    size_t size;
    struct Thing *function;
    uint64_t values[MOST];
    void (*back)(int);
    int number;
} Work;

typedef struct Thing {
    int kind, alive;
    char *bytes;
    size_t size;
    int capturing, broken;
    Work *work;
    int works;
    char text[64], types[MOST];
    int parameters;
    float time;
    struct Thing *next;
} Thing;

static Thing *things;
static int ready, retained;
static _Thread_local int current;
static float now;

static Thing *make(int kind, size_t size) {
    Thing *thing = calloc(1, sizeof *thing);
    thing->kind = kind, thing->alive = 1, thing->size = size;
    thing->bytes = size ? malloc(size) : NULL;
    if (thing->bytes) memset(thing->bytes, 0xcd, size);
    thing->next = things, things = thing;
    return thing;
}

/* How many of a kind are alive; 0 for all but functions, which live with their module. */
int fake_alive(int kind) {
    int count = 0;
    for (Thing *t = things; t; t = t->next)
        count += t->alive && (kind ? t->kind == kind : t->kind != FUNCTION);
    return count;
}

int fake_retained(void) { return retained; }

static int good(Thing *thing, int kind) {
    for (Thing *t = things; t; t = t->next)
        if (t == thing) return t->alive && t->kind == kind;
    return 0;
}

static Thing *holding(uint64_t at, size_t size, int kind) {
    for (Thing *t = things; t; t = t->next)
        if (t->alive && t->kind == kind && at >= U(t->bytes) && at + size <= U(t->bytes) + t->size)
            return t;
    return NULL;
}

static int end(Thing *thing, int kind) {
    if (!good(thing, kind)) return 400;
    thing->alive = 0;
    if (thing->bytes) memset(thing->bytes, 0xdd, thing->size), free(thing->bytes);
    return 0;
}

#define NEED(condition, code) do { if (!(condition)) return code; } while (0)
#define CONTEXT() NEED(ready, 3); NEED(current, 201)

/* --- the driver and the device ---------------------------------------------------------------- */

static int devices = 1;
void fake_devices(int count) { devices = count; }

CUresult cuInit(unsigned int flags) {
    RECORD(flags);
    NEED(devices, 100);
    ready = 1;
    return 0;
}

CUresult cuGetErrorName(CUresult code, const char **text) {
    static const struct { int code; const char *name; } names[] = {
        {1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"},
        {100, "CUDA_ERROR_NO_DEVICE"}, {201, "CUDA_ERROR_INVALID_CONTEXT"},
        {218, "CUDA_ERROR_INVALID_PTX"}, {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"},
        {400, "CUDA_ERROR_INVALID_HANDLE"}, {500, "CUDA_ERROR_NOT_FOUND"},
        {700, "CUDA_ERROR_ILLEGAL_ADDRESS"}, {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
        {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"},
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (names[i].code == (int)code) { *text = names[i].name; return 0; }
    *text = NULL;
    return 1;
}

CUresult cuDriverGetVersion(int *version) { RECORD(0); *version = 13020; return 0; }
CUresult cuDeviceGetCount(int *count) { NEED(ready, 3); RECORD(0); *count = devices; return 0; }

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    RECORD(ordinal);
    NEED(ordinal >= 0 && ordinal < devices, 101);
    *device = ordinal;
    return 0;
}

CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    RECORD(length, device);
    snprintf(name, length, "Fake %d", device);
    return 0;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    RECORD(attribute, device);
    *value = attribute == 75 ? 8 : attribute == 76 ? 6 : attribute == 16 ? 84 : attribute == 97 ? 101376 : -1;
    return 0;
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    RECORD(device);
    *bytes = (size_t)24 << 30;
    return 0;
}

static char context;

CUresult cuDevicePrimaryCtxRetain(CUcontext *made, CUdevice device) {
    RECORD(device);
    retained++;
    *made = (CUcontext)&context;
    return 0;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) { RECORD(device); retained--; return 0; }

CUresult cuCtxSetCurrent(CUcontext wanted) {
    RECORD(U(wanted));
    NEED(wanted == (CUcontext)&context, 201);
    current = 1;
    return 0;
}

/* --- memory ----------------------------------------------------------------------------------- */

CUresult cuMemGetInfo_v2(size_t *left, size_t *total) {
    CONTEXT();
    RECORD(0);
    *left = (size_t)20 << 30, *total = (size_t)24 << 30;
    return 0;
}

CUresult cuMemAlloc_v2(CUdeviceptr *made, size_t size) {
    CONTEXT();
    RECORD(size);
    NEED(size, 1);
    *made = U(make(MEMORY, size)->bytes);
    return 0;
}

CUresult cuMemFree_v2(CUdeviceptr at) {
    CONTEXT();
    RECORD(at);
    Thing *thing = holding(at, 0, MEMORY);
    NEED(thing && U(thing->bytes) == at, 1);
    return end(thing, MEMORY);
}

CUresult cuMemHostAlloc(void **made, size_t size, unsigned int flags) {
    CONTEXT();
    RECORD(size, flags);
    *made = make(HOST, size)->bytes;
    return 0;
}

CUresult cuMemFreeHost(void *at) {
    CONTEXT();
    RECORD(U(at));
    Thing *thing = holding(U(at), 0, HOST);
    NEED(thing, 1);
    return end(thing, HOST);
}

/* --- streams, graphs: work is done at once, or kept where the stream is captured --------------- */

static int run(Work *work);

static CUresult put(CUstream at, Work work) {
    Thing *stream = (Thing *)at;
    NEED(good(stream, STREAM), 400);
    if (!stream->capturing) return run(&work);
    stream->work = realloc(stream->work, (stream->works + 1) * sizeof work);
    stream->work[stream->works++] = work;
    return 0;
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t size, CUstream stream) {
    CONTEXT();
    RECORD(to, U(from), size, U(stream));
    NEED(holding(to, size, MEMORY), 1);
    return put(stream, (Work){0, (void *)(uintptr_t)to, from, size});
}

CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t size, CUstream stream) {
    CONTEXT();
    RECORD(U(to), from, size, U(stream));
    NEED(holding(from, size, MEMORY), 1);
    return put(stream, (Work){0, to, (void *)(uintptr_t)from, size});
}

/* Stands for what an engine's runtime puts into a stream: `back` is called where it runs. */
int fake_enqueue(void *stream, void (*back)(int), int number) {
    return put((CUstream)stream, (Work){2, .back = back, .number = number});
}

int fake_capturing(void *stream) { return ((Thing *)stream)->capturing; }

CUresult cuStreamCreate(CUstream *made, unsigned int flags) {
    CONTEXT();
    RECORD(flags);
    *made = (CUstream)make(STREAM, 0);
    return 0;
}

CUresult cuStreamDestroy_v2(CUstream stream) {
    CONTEXT();
    RECORD(U(stream));
    return end((Thing *)stream, STREAM);
}

CUresult cuStreamSynchronize(CUstream at) {
    Thing *stream = (Thing *)at;
    CONTEXT();
    RECORD(U(stream));
    NEED(good(stream, STREAM), 400);
    if (stream->capturing) {
        stream->broken = 1;
        return 900;
    }
    return 0;
}

CUresult cuStreamBeginCapture_v2(CUstream at, CUstreamCaptureMode mode) {
    Thing *stream = (Thing *)at;
    CONTEXT();
    RECORD(U(stream), mode);
    NEED(good(stream, STREAM) && !stream->capturing, 400);
    stream->capturing = 1, stream->broken = 0, stream->works = 0, stream->work = NULL;
    return 0;
}

CUresult cuStreamEndCapture(CUstream at, CUgraph *made) {
    Thing *stream = (Thing *)at;
    CONTEXT();
    RECORD(U(stream));
    NEED(good(stream, STREAM) && stream->capturing, 400);
    stream->capturing = 0;
    *made = NULL;
    if (stream->broken) return 901;
    Thing *graph = make(GRAPH, 0);
    graph->work = stream->work, graph->works = stream->works;
    *made = (CUgraph)graph;
    return 0;
}

#undef cuGraphInstantiateWithFlags
CUresult cuGraphInstantiateWithFlags(CUgraphExec *made, CUgraph at, unsigned long long flags) {
    Thing *graph = (Thing *)at;
    CONTEXT();
    RECORD(U(graph), flags);
    NEED(good(graph, GRAPH), 400);
    Thing *exec = make(EXEC, 0);
    exec->work = graph->work, exec->works = graph->works;
    *made = (CUgraphExec)exec;
    return 0;
}

CUresult cuGraphLaunch(CUgraphExec at, CUstream stream) {
    Thing *exec = (Thing *)at;
    CONTEXT();
    RECORD(U(exec), U(stream));
    NEED(good(exec, EXEC) && good((Thing *)stream, STREAM), 400);
    for (int i = 0; i < exec->works; i++) {
        int code = run(&exec->work[i]);
        if (code) return code;
    }
    return 0;
}

CUresult cuGraphExecDestroy(CUgraphExec at) { CONTEXT(); RECORD(U(at)); return end((Thing *)at, EXEC); }
CUresult cuGraphDestroy(CUgraph at) { CONTEXT(); RECORD(U(at)); return end((Thing *)at, GRAPH); }

/* --- events: each record is 1.5 ms after the one before ---------------------------------------- */

CUresult cuEventCreate(CUevent *made, unsigned int flags) {
    CONTEXT();
    RECORD(flags);
    *made = (CUevent)make(EVENT, 0);
    return 0;
}

CUresult cuEventDestroy_v2(CUevent event) { CONTEXT(); RECORD(U(event)); return end((Thing *)event, EVENT); }

CUresult cuEventRecord(CUevent event, CUstream stream) {
    RECORD(U(event), U(stream));
    NEED(good((Thing *)event, EVENT) && good((Thing *)stream, STREAM), 400);
    ((Thing *)event)->time = now += 1.5f;
    return 0;
}

CUresult cuEventSynchronize(CUevent event) {
    RECORD(U(event));
    return good((Thing *)event, EVENT) ? 0 : 400;
}

CUresult cuEventElapsedTime(float *milliseconds, CUevent start, CUevent stop) {
    RECORD(U(start), U(stop));
    NEED(good((Thing *)start, EVENT) && good((Thing *)stop, EVENT), 400);
    *milliseconds = ((Thing *)stop)->time - ((Thing *)start)->time;
    return 0;
}

/* --- modules and launches --------------------------------------------------------------------- */

CUresult cuModuleLoadDataEx(CUmodule *made, const void *image, unsigned int count,
                            CUjit_option *options, void **values) {
    CONTEXT();
    char *log = NULL;
    unsigned int size = 0;
    for (unsigned int i = 0; i < count; i++) {
        if ((int)options[i] == 5) log = values[i];
        if ((int)options[i] == 6) size = (unsigned int)(uintptr_t)values[i];
    }
    if (log) snprintf(log, size, "ptxas fatal: line 3 of the image");
    RECORD(count, size);
    const char *text = image;
    NEED(strstr(text, ".entry") || !memcmp(text, "\177ELF", 4), 218);
    if (log) *log = 0;
    Thing *module = make(MODULE, strlen(text) + 1);
    memcpy(module->bytes, text, module->size);
    *made = (CUmodule)module;
    return 0;
}

CUresult cuModuleUnload(CUmodule module) { CONTEXT(); RECORD(U(module)); return end((Thing *)module, MODULE); }

CUresult cuModuleGetFunction(CUfunction *made, CUmodule at, const char *name) {
    Thing *module = (Thing *)at;
    CONTEXT();
    RECORD(U(module));
    NEED(good(module, MODULE), 400);
    char entry[80];
    snprintf(entry, sizeof entry, ".entry %s(", name);
    const char *from = strstr(module->bytes, entry);
    NEED(from, 500);
    const char *stop = strchr(from, ')');
    Thing *function = make(FUNCTION, 0);
    snprintf(function->text, sizeof function->text, "%s", name);
    for (const char *at = strstr(from, ".param ."); at && at < stop; at = strstr(at + 1, ".param ."))
        function->types[function->parameters++] = strncmp(at + 9, "64", 2) ? 4 : 8;
    *made = (CUfunction)function;
    return 0;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    CONTEXT();
    RECORD(attribute, U(function));
    *value = 100 + attribute;
    return 0;
}

static int allowed = 48 * 1024;

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    CONTEXT();
    RECORD(U(function), attribute, value);
    if ((int)attribute == 8) allowed = value;
    return 0;
}

CUresult cuLaunchKernel(CUfunction at, unsigned int gx, unsigned int gy, unsigned int gz,
                        unsigned int bx, unsigned int by, unsigned int bz, unsigned int shared,
                        CUstream stream, void **parameters, void **extra) {
    Thing *function = (Thing *)at;
    CONTEXT();
    NEED(good(function, FUNCTION), 400);
    uint64_t values[MOST] = {gx, gy, gz, bx, by, bz, shared, U(stream)};
    Work work = {1, .function = function};
    for (int i = 0; i < function->parameters; i++) {
        memcpy(&work.values[i], parameters[i], function->types[i]);
        values[8 + i] = work.values[i];
    }
    int code = record(__func__, 8 + function->parameters, values);
    if (code) return code;
    NEED(gx && gy && gz && bx && by && bz && !extra && (int)shared <= allowed, 1);
    return put(stream, work);
}

/* Two kernels (x, n, y): y = x + 1, and the same that writes one element more than there are. */
static int run(Work *work) {
    if (work->kind == 0) memcpy(work->to, work->from, work->size);
    if (work->kind == 2) work->back(work->number);
    if (work->kind != 1 || !strstr(work->function->text, "add_one")) return 0;
    const float *x = (float *)(uintptr_t)work->values[0];
    int n = (int)work->values[1];
    float *y = (float *)(uintptr_t)work->values[2];
    NEED(holding(U(x), n * sizeof *x, MEMORY) && holding(U(y), n * sizeof *y, MEMORY), 700);
    for (int i = 0; i < n; i++) y[i] = x[i] + 1;
    if (!strcmp(work->function->text, "add_one_too_far")) y[n] = 1;
    return 0;
}

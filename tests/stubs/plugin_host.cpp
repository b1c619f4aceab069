// What a library of plugins meets: a TensorRT that asks, and a driver that records launches.
//
// A plugin goes the way that it goes in TensorRT: made for the build, serialised, made again for
// the run, attached to a context. Tests call the functions here by ctypes.
#include <NvInfer.h>
#include <cuda.h>

#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;

// --- the driver ----------------------------------------------------------------------------------

struct Launched {
  char entry[96];
  int32_t numbers[7];  // grid, block, shared
  int32_t count;
  uint64_t stream, arguments[32];
};

struct CUlib_st {
  std::string text;
};
// The arguments of an entry, by the types of its parameters in PTX: 8 or 4 bytes each.
struct CUkern_st {
  std::string name;
  std::vector<int> bytes;
  int shared = 48 << 10;
};

static Launched last;
static int launches, loads, alive;
static std::string image, failing;
static std::deque<CUkern_st> kernels;

extern "C" {

Launched const* host_last() { return &last; }
int host_launches() { return launches; }
int host_loads() { return loads; }
int host_alive() { return alive; }
char const* host_image() { return image.c_str(); }
void host_fail(char const* call) { failing = call; }

#define REFUSE if (failing == __func__) return CUDA_ERROR_INVALID_VALUE

CUresult cuGetErrorName(CUresult code, char const** name) {
  *name = code == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : nullptr;
  return CUDA_SUCCESS;
}

CUresult cuLibraryLoadData(CUlibrary* made, void const* code, CUjit_option*, void**, unsigned,
                           CUlibraryOption*, void**, unsigned) {
  REFUSE;
  image = static_cast<char const*>(code);
  *made = new CUlib_st{image};
  loads++, alive++;
  return CUDA_SUCCESS;
}

CUresult cuLibraryUnload(CUlibrary library) {
  delete library;
  alive--;
  return CUDA_SUCCESS;
}

CUresult cuLibraryGetKernel(CUkernel* made, CUlibrary library, char const* name) {
  std::string const& text = library->text;
  size_t const from = text.find(".entry " + std::string(name) + "(");
  if (from == std::string::npos) return CUDA_ERROR_NOT_FOUND;
  std::istringstream words(text.substr(from, text.find(')', from) - from));
  *made = &kernels.emplace_back();
  (*made)->name = name;
  for (std::string word; words >> word;)
    if (word == ".u64" || word == ".u32") (*made)->bytes.push_back(word == ".u64" ? 8 : 4);
  return CUDA_SUCCESS;
}

CUresult cuKernelGetFunction(CUfunction* made, CUkernel kernel) {
  *made = reinterpret_cast<CUfunction>(kernel);
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute, int value) {
  reinterpret_cast<CUkernel>(function)->shared = value;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned blockX,
                        unsigned blockY, unsigned blockZ, unsigned shared, CUstream stream,
                        void** arguments, void** extra) {
  REFUSE;
  CUkern_st const& kernel = *reinterpret_cast<CUkernel>(function);
  if (!x || !y || !z || extra || int(shared) > kernel.shared) return CUDA_ERROR_INVALID_VALUE;
  last = {};
  std::strncpy(last.entry, kernel.name.c_str(), sizeof last.entry - 1);
  unsigned const numbers[] = {x, y, z, blockX, blockY, blockZ, shared};
  std::memcpy(last.numbers, numbers, sizeof numbers);
  last.count = int32_t(kernel.bytes.size());
  last.stream = reinterpret_cast<uintptr_t>(stream);
  for (int at = 0; at < last.count; at++)
    std::memcpy(&last.arguments[at], arguments[at], size_t(kernel.bytes[size_t(at)]));
  launches++;
  return CUDA_SUCCESS;
}

}  // extern "C"

// --- TensorRT ------------------------------------------------------------------------------------

namespace {

struct Finder : ILoggerFinder, ILogger {
  std::string said;
  ILogger* findLogger() override { return this; }
  void log(Severity severity, char const* text) noexcept override {
    if (severity == Severity::kERROR) said = text;
  }
} finder;

std::map<std::string, IPluginCreatorV3One*> creators;

template <class Capability>
Capability& capability(IPluginV3* plugin, PluginCapabilityType type) {
  return *static_cast<Capability*>(plugin->getCapabilityInterface(type));
}
IPluginV3OneBuild& build(IPluginV3* plugin) {
  return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}
IPluginV3OneRuntime& runtime(IPluginV3* plugin) {
  return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

}  // namespace

extern "C" {

char const* host_said() { return finder.said.c_str(); }

// Registers what a library offers; 0 where a name, version or namespace is not as it must be.
int host_register(IPluginCreatorInterface* const* (*get)(int32_t&), void (*set)(ILoggerFinder*)) {
  set(&finder);
  int32_t count = 0;
  IPluginCreatorInterface* const* found = get(count);
  for (int32_t at = 0; at < count; at++) {
    auto* creator = static_cast<IPluginCreatorV3One*>(found[at]);
    creators[creator->getPluginName()] = creator;
    if (std::strcmp(creator->getPluginVersion(), "1")) return 0;
    if (std::strcmp(creator->getPluginNamespace(), "effopt")) return 0;
  }
  return count;
}

PluginFieldCollection const* host_fields(char const* name) {
  return creators.at(name)->getFieldNames();
}

// For the build; then, from its serialised fields, for the run; null where it is refused.
IPluginV3* host_build(char const* name, PluginField const* fields, int32_t count) {
  finder.said.clear();
  PluginFieldCollection const given{count, fields};
  return creators.at(name)->createPlugin(name, &given, TensorRTPhase::kBUILD);
}
IPluginV3* host_attach(IPluginV3* built) {
  auto& core = capability<IPluginV3OneCore>(built, PluginCapabilityType::kCORE);
  IPluginV3* copy = built->clone();
  PluginFieldCollection const* kept = runtime(copy).getFieldsToSerialize();
  char const* name = core.getPluginName();
  IPluginV3* read = creators.at(name)->createPlugin(name, kept, TensorRTPhase::kRUNTIME);
  IPluginV3* made = runtime(read).attachToContext(nullptr);
  delete copy;
  delete read;
  return made;
}
void host_drop(IPluginV3* plugin) { delete plugin; }

int host_supports(IPluginV3* plugin, int32_t at, PluginTensorDesc const* all, int32_t inputs,
                  int32_t outputs) {
  std::vector<DynamicPluginTensorDesc> asked;
  for (int32_t tensor = 0; tensor < inputs + outputs; tensor++)
    asked.push_back({all[tensor], {}, {}, {}});
  return build(plugin).supportsFormatCombination(at, asked.data(), inputs, outputs);
}

// Writes types and sizes of the outputs; returns their count, or -1 for an error.
int host_results(IPluginV3* plugin, PluginTensorDesc const* inputs, int32_t count,
                 PluginTensorDesc* outputs) {
  int32_t const made = build(plugin).getNbOutputs();
  std::vector<DataType> given, types(static_cast<size_t>(made));
  IExprBuilder builder;
  std::vector<DimsExprs> sizes, shapes(static_cast<size_t>(made));
  for (int32_t at = 0; at < count; at++) {
    given.push_back(inputs[at].type);
    sizes.push_back({inputs[at].dims.nbDims, {}});
    for (int32_t axis = 0; axis < inputs[at].dims.nbDims; axis++)
      sizes.back().d[axis] = builder.constant(inputs[at].dims.d[axis]);
  }
  if (build(plugin).getOutputDataTypes(types.data(), made, given.data(), count)) return -1;
  if (build(plugin).getOutputShapes(sizes.data(), count, nullptr, 0, shapes.data(), made, builder))
    return -1;
  for (size_t at = 0; at < types.size(); at++) {
    outputs[at] = {{shapes[at].nbDims, {}}, types[at], TensorFormat::kLINEAR, 1};
    for (int32_t axis = 0; axis < shapes[at].nbDims; axis++)
      outputs[at].dims.d[axis] = shapes[at].d[axis]->getConstantValue();
  }
  return made;
}

int host_change(IPluginV3* plugin, PluginTensorDesc const* all, int32_t inputs, int32_t outputs) {
  return runtime(plugin).onShapeChange(all, inputs, all + inputs, outputs);
}
int host_enqueue(IPluginV3* plugin, PluginTensorDesc const* all, int32_t inputs,
                 void const* const* from, void* const* to, cudaStream_t stream) {
  return runtime(plugin).enqueue(all, all + inputs, from, to, nullptr, stream);
}

}  // extern "C"

#include "effopt_kernels.h"

#include <atomic>
#include <cstdio>
#include <limits>

namespace effopt {
namespace {

using namespace nvinfer1;

constexpr int64_t kPLAIN_SHARED = 48 << 10;  // bytes of shared memory that need no asking

std::atomic<ILoggerFinder*> loggers{nullptr};

void check(CUresult code, std::string const& call) {
  if (code == CUDA_SUCCESS) return;
  char const* name = nullptr;
  cuGetErrorName(code, &name);
  throw Error(call + " failed: " + (name ? name : "error " + std::to_string(code)));
}

}  // namespace

void reportTo(ILoggerFinder* finder) { loggers = finder; }

void report(Description const& of, std::string const& reason) {
  std::string const text = std::string("effopt::") + of.name + ": " + reason;
  ILoggerFinder* finder = loggers;
  ILogger* logger = finder ? finder->findLogger() : nullptr;
  if (logger) return logger->log(ILogger::Severity::kERROR, text.c_str());
  std::fprintf(stderr, "%s\n", text.c_str());
}

int32_t narrow(int64_t value, std::string const& what) {
  using Limits = std::numeric_limits<int32_t>;
  if (value < Limits::min() || value > Limits::max())
    throw Error(what + " of " + std::to_string(value) + " is no int32");
  return int32_t(value);
}

std::map<DataType, char const*> const& floats() {
  static std::map<DataType, char const*> const names = {
      {DataType::kFLOAT, "float32"}, {DataType::kHALF, "float16"}, {DataType::kBF16, "bfloat16"}};
  return names;
}

Kernels::~Kernels() {
  if (mLibrary) cuLibraryUnload(mLibrary);
}

CUfunction Kernels::at(DataType real) {
  CUfunction found = nullptr;
  check(cuKernelGetFunction(&found, kernel(real)), "cuKernelGetFunction");
  return found;
}

CUkernel Kernels::kernel(DataType real) {
  std::lock_guard<std::mutex> const lock(mMutex);
  if (!mLibrary) load();
  CUkernel& found = mFound[real];
  std::string const entry = std::string(mOf.stem) + "_" + floats().at(real);
  if (!found)
    check(cuLibraryGetKernel(&found, mLibrary, entry.c_str()), "looking for the kernel " + entry);
  return found;
}

void Kernels::load() {
  std::string text;
  for (char const* piece : mOf.ptx) text += piece;
  CUlibrary made = nullptr;
  check(cuLibraryLoadData(&made, text.c_str(), nullptr, nullptr, 0, nullptr, nullptr, 0),
        "loading the PTX");
  mLibrary = made;
}

void start(CUfunction kernel, Launch const& launch, void const* const* inputs, size_t inputCount,
           void* const* outputs, size_t outputCount, CUstream stream) {
  std::vector<int32_t> scalars;
  for (int64_t scalar : launch.scalars) scalars.push_back(narrow(scalar, "an argument"));
  std::vector<void*> arguments;
  for (size_t at = 0; at < inputCount; at++)
    arguments.push_back(const_cast<void const**>(inputs + at));
  for (int32_t& scalar : scalars) arguments.push_back(&scalar);
  for (size_t at = 0; at < outputCount; at++) arguments.push_back(const_cast<void**>(outputs + at));

  std::array<unsigned, 3> grid;
  for (size_t axis = 0; axis < 3; axis++)
    grid[axis] = unsigned(narrow(launch.grid[axis], "a grid"));
  int32_t const shared = narrow(launch.shared, "shared memory");
  if (shared > kPLAIN_SHARED)
    check(cuFuncSetAttribute(kernel, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared),
          "asking for " + std::to_string(shared) + " bytes of shared memory");
  check(cuLaunchKernel(kernel, grid[0], grid[1], grid[2], unsigned(launch.block), 1, 1,
                       unsigned(shared), stream, arguments.data(), nullptr),
        "cuLaunchKernel");
}

}  // namespace effopt

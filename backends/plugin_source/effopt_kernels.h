// The kernels of a plugin, through CUDA's driver; what goes wrong is thrown, and reported to TensorRT.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "effopt_plugin.h"

namespace effopt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Writes to the logger that TensorRT names for this thread, else to standard error.
void report(Description const& of, std::string const& reason);
void reportTo(nvinfer1::ILoggerFinder* finder);

// Does what TensorRT asks for: 0, or 1 with the reason reported.
template <class Work>
int32_t attempt(Description const& of, Work work) noexcept {
  try {
    work();
    return 0;
  } catch (std::exception const& error) {
    report(of, error.what());
    return 1;
  }
}

int32_t narrow(int64_t value, std::string const& what);

// The name of each type that the float type may be, which ends the names of entries.
std::map<nvinfer1::DataType, char const*> const& floats();

// The kernels of one row, loaded when first asked for, for every context of the process.
class Kernels {
 public:
  explicit Kernels(Description const& of) : mOf(of) {}
  Kernels(Kernels const&) = delete;
  ~Kernels();

  // The kernel of a float type in the current context.
  CUfunction at(nvinfer1::DataType real);

 private:
  CUkernel kernel(nvinfer1::DataType real);
  void load();

  Description const& mOf;
  std::mutex mMutex;
  CUlibrary mLibrary = nullptr;
  std::map<nvinfer1::DataType, CUkernel> mFound;
};

// Puts a launch into a stream; arguments are pointers to inputs, scalars and outputs, in this order.
void start(CUfunction kernel, Launch const& launch, void const* const* inputs, size_t inputCount,
           void* const* outputs, size_t outputCount, CUstream stream);

}  // namespace effopt

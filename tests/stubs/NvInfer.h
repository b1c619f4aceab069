// A stand-in for TensorRT's headers: the names that plugins of this project use, and no more.
//
// Sizes are numbers here, and so the algebra of sizes is computed at once.
#pragma once

#include <cstdint>
#include <deque>

typedef struct CUstream_st* cudaStream_t;

namespace nvinfer1 {

enum class DataType : int32_t { kFLOAT = 0, kHALF = 1, kINT8 = 2, kINT32 = 3, kBF16 = 7, kINT64 = 8 };
enum class TensorFormat : int32_t { kLINEAR = 0, kCHW2 = 1 };
enum class PluginFieldType : int32_t { kFLOAT32 = 1, kINT32 = 5, kINT64 = 10 };
enum class PluginCapabilityType : int32_t { kCORE, kBUILD, kRUNTIME };
enum class TensorRTPhase : int32_t { kBUILD, kRUNTIME };
enum class DimensionOperation : int32_t { kSUM, kPROD, kMAX, kMIN, kSUB, kEQUAL, kLESS, kFLOOR_DIV, kCEIL_DIV };

struct Dims {
  int32_t nbDims;
  int64_t d[8];
};

struct PluginTensorDesc {
  Dims dims;
  DataType type;
  TensorFormat format;
  float scale;
};

struct DynamicPluginTensorDesc {
  PluginTensorDesc desc;
  Dims min, max, opt;
};

// --- sizes ---------------------------------------------------------------------------------------

class IDimensionExpr {
 public:
  explicit IDimensionExpr(int64_t value) : mValue(value) {}
  bool isConstant() const noexcept { return true; }
  int64_t getConstantValue() const noexcept { return mValue; }

 private:
  int64_t mValue;
};

class IExprBuilder {
 public:
  IDimensionExpr const* constant(int64_t value) noexcept { return &mMade.emplace_back(value); }

  IDimensionExpr const* operation(DimensionOperation operation, IDimensionExpr const& first,
                                  IDimensionExpr const& second) noexcept {
    int64_t const a = first.getConstantValue(), b = second.getConstantValue();
    switch (operation) {
      case DimensionOperation::kSUM: return constant(a + b);
      case DimensionOperation::kSUB: return constant(a - b);
      case DimensionOperation::kPROD: return constant(a * b);
      case DimensionOperation::kFLOOR_DIV: return constant(a / b);
      case DimensionOperation::kCEIL_DIV: return constant(a / b + (a % b != 0));
      default: return nullptr;
    }
  }

 private:
  std::deque<IDimensionExpr> mMade;
};

struct DimsExprs {
  int32_t nbDims;
  IDimensionExpr const* d[8];
};

// --- loggers -------------------------------------------------------------------------------------

class ILogger {
 public:
  enum class Severity : int32_t { kINTERNAL_ERROR, kERROR, kWARNING, kINFO, kVERBOSE };
  virtual void log(Severity severity, char const* text) noexcept = 0;
  virtual ~ILogger() = default;
};

class ILoggerFinder {
 public:
  virtual ILogger* findLogger() = 0;
  virtual ~ILoggerFinder() = default;
};

// --- plugins -------------------------------------------------------------------------------------

struct PluginField {
  char const* name;
  void const* data;
  PluginFieldType type;
  int32_t length;
  PluginField(char const* name_, void const* data_, PluginFieldType type_, int32_t length_) noexcept
      : name(name_), data(data_), type(type_), length(length_) {}
};

struct PluginFieldCollection {
  int32_t nbFields{};
  PluginField const* fields{};
};

class IVersionedInterface {
 public:
  virtual ~IVersionedInterface() noexcept = default;
};

class IPluginCapability : public IVersionedInterface {};
class IPluginResourceContext;

class IPluginV3 : public IVersionedInterface {
 public:
  virtual IPluginCapability* getCapabilityInterface(PluginCapabilityType) noexcept = 0;
  virtual IPluginV3* clone() noexcept = 0;
};

class IPluginV3OneCore : public IPluginCapability {
 public:
  virtual char const* getPluginName() const noexcept = 0;
  virtual char const* getPluginVersion() const noexcept = 0;
  virtual char const* getPluginNamespace() const noexcept = 0;
};

class IPluginV3OneBuild : public IPluginCapability {
 public:
  virtual int32_t configurePlugin(DynamicPluginTensorDesc const*, int32_t,
                                  DynamicPluginTensorDesc const*, int32_t) noexcept = 0;
  virtual int32_t getOutputDataTypes(DataType*, int32_t, DataType const*, int32_t) const noexcept = 0;
  virtual int32_t getOutputShapes(DimsExprs const*, int32_t, DimsExprs const*, int32_t, DimsExprs*,
                                  int32_t, IExprBuilder&) noexcept = 0;
  virtual bool supportsFormatCombination(int32_t, DynamicPluginTensorDesc const*, int32_t,
                                         int32_t) noexcept = 0;
  virtual int32_t getNbOutputs() const noexcept = 0;
};

class IPluginV3OneRuntime : public IPluginCapability {
 public:
  virtual int32_t onShapeChange(PluginTensorDesc const*, int32_t, PluginTensorDesc const*,
                                int32_t) noexcept = 0;
  virtual int32_t enqueue(PluginTensorDesc const*, PluginTensorDesc const*, void const* const*,
                          void* const*, void*, cudaStream_t) noexcept = 0;
  virtual IPluginV3* attachToContext(IPluginResourceContext*) noexcept = 0;
  virtual PluginFieldCollection const* getFieldsToSerialize() noexcept = 0;
};

class IPluginCreatorInterface : public IVersionedInterface {};

class IPluginCreatorV3One : public IPluginCreatorInterface {
 public:
  virtual IPluginV3* createPlugin(char const*, PluginFieldCollection const*,
                                  TensorRTPhase) noexcept = 0;
  virtual PluginFieldCollection const* getFieldNames() noexcept = 0;
  virtual char const* getPluginName() const noexcept = 0;
  virtual char const* getPluginVersion() const noexcept = 0;
  virtual char const* getPluginNamespace() const noexcept = 0;
};

}  // namespace nvinfer1

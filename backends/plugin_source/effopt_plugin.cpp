// Plugins of TensorRT (IPluginV3) from the rows of a table.
#include "effopt_plugin.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <utility>

#include "effopt_kernels.h"

#ifdef _WIN32
#define EFFOPT_EXPORT __declspec(dllexport)
#else
#define EFFOPT_EXPORT __attribute__((visibility("default")))
#endif

namespace effopt {
namespace {

using namespace nvinfer1;

constexpr char const* kNAMESPACE = "effopt";
constexpr char const* kVERSION = "1";

// --- the plugin ------------------------------------------------------------------------------------

class Plugin final : public IPluginV3,
                     public IPluginV3OneCore,
                     public IPluginV3OneBuild,
                     public IPluginV3OneRuntime {
 public:
  Plugin(Description const& of, std::vector<int32_t> attributes, std::shared_ptr<Kernels> kernels)
      : mOf(of), mAttributes(std::move(attributes)), mKernels(std::move(kernels)) {}

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  IPluginV3* clone() noexcept override {
    IPluginV3* made = nullptr;
    attempt(mOf, [&] { made = new Plugin(mOf, mAttributes, mKernels); });
    return made;
  }
  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

  char const* getPluginName() const noexcept override { return mOf.name; }
  char const* getPluginVersion() const noexcept override { return kVERSION; }
  char const* getPluginNamespace() const noexcept override { return kNAMESPACE; }
  int32_t getNbOutputs() const noexcept override { return int32_t(mOf.outputs.size()); }

  int32_t configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*,
                          int32_t) noexcept override {
    return 0;
  }

  bool supportsFormatCombination(int32_t at, DynamicPluginTensorDesc const* all, int32_t,
                                 int32_t) noexcept override {
    PluginTensorDesc const& asked = all[at].desc;
    if (asked.format != TensorFormat::kLINEAR) return false;
    if (Type const fixed = type(at)) return asked.type == *fixed;
    for (int32_t before = 0; before < at; before++)
      if (!type(before)) return asked.type == all[before].desc.type;
    return floats().count(asked.type) > 0;
  }

  int32_t getOutputDataTypes(DataType* types, int32_t, DataType const* given,
                             int32_t count) const noexcept override {
    return attempt(mOf, [&] {
      checkCount(count);
      for (size_t at = 0; at < mOf.outputs.size(); at++)
        types[at] = mOf.outputs[at] ? *mOf.outputs[at] : given[real()];
    });
  }

  int32_t getOutputShapes(DimsExprs const* inputs, int32_t count, DimsExprs const*, int32_t,
                          DimsExprs* outputs, int32_t, IExprBuilder& builder) noexcept override {
    return attempt(mOf, [&] {
      checkCount(count);
      auto const lift = [&](IDimensionExpr const* size) { return Size(size, builder); };
      auto given = known<Size>([&](size_t at) -> auto& { return inputs[at]; }, lift);
      for (int32_t value : mAttributes) given.attributes.push_back(lift(builder.constant(value)));
      auto const made = mOf.results(given);
      for (size_t at = 0; at < made.size(); at++) {
        outputs[at].nbDims = int32_t(made[at].size());
        for (size_t axis = 0; axis < made[at].size(); axis++)
          outputs[at].d[axis] = made[at][axis].in(builder);
      }
    });
  }

  // Has the kernel loaded by the time that an application captures a launch into a graph.
  int32_t onShapeChange(PluginTensorDesc const* inputs, int32_t count, PluginTensorDesc const*,
                        int32_t) noexcept override {
    return attempt(mOf, [&] {
      checkCount(count);
      checkRepeated(numbers(inputs));
      mKernels->at(inputs[real()].type);
    });
  }

  int32_t enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* outputDesc,
                  void const* const* inputs, void* const* outputs, void*,
                  cudaStream_t stream) noexcept override {
    return attempt(mOf, [&] {
      if (allEmpty(outputDesc)) return;
      Launch const launch = mOf.launch(numbers(inputDesc));
      start(mKernels->at(inputDesc[real()].type), launch, inputs, mOf.inputs.size(), outputs,
            mOf.outputs.size(), stream);
    });
  }

  PluginFieldCollection const* getFieldsToSerialize() noexcept override {
    mFields.clear();
    for (size_t at = 0; at < mAttributes.size(); at++)
      mFields.emplace_back(mOf.attributes[at].name, &mAttributes[at], mOf.attributes[at].type, 1);
    mCollection = {int32_t(mFields.size()), mFields.data()};
    return &mCollection;
  }

 private:
  Type type(int32_t at) const {
    size_t const inputs = mOf.inputs.size(), place = size_t(at);
    return place < inputs ? mOf.inputs[place].type : mOf.outputs[place - inputs];
  }

  // The first input of the float type.
  size_t real() const {
    size_t at = 0;
    while (mOf.inputs[at].type) at++;
    return at;
  }

  // Such as those of a batch of 0, for which no launch has blocks.
  bool allEmpty(PluginTensorDesc const* outputs) const {
    for (size_t at = 0; at < mOf.outputs.size(); at++) {
      int64_t const* const sizes = outputs[at].dims.d;
      if (std::count(sizes, sizes + outputs[at].dims.nbDims, 0) == 0) return false;
    }
    return true;
  }

  void checkCount(int32_t inputs) const {
    if (size_t(inputs) != mOf.inputs.size())
      throw Error("it takes " + std::to_string(mOf.inputs.size()) + " inputs, not " +
                  std::to_string(inputs));
  }

  template <class Number, class Dimensions, class Lift>
  Known<Number> known(Dimensions dimensions, Lift lift) const {
    Known<Number> made;
    for (size_t at = 0; at < mOf.inputs.size(); at++) {
      Input const& input = mOf.inputs[at];
      auto const& given = dimensions(at);
      if (size_t(given.nbDims) != input.sizes.size())
        throw Error(std::string(input.name) + " has " + std::to_string(given.nbDims) +
                    " dimensions, not " + std::to_string(input.sizes.size()));
      made.sizes.emplace_back();
      for (int32_t axis = 0; axis < given.nbDims; axis++)
        made.sizes[at].push_back(lift(given.d[axis]));
    }
    return made;
  }

  Known<int64_t> numbers(PluginTensorDesc const* inputs) const {
    auto made = known<int64_t>([&](size_t at) -> auto& { return inputs[at].dims; },
                               [](int64_t size) { return size; });
    made.attributes.assign(mAttributes.begin(), mAttributes.end());
    return made;
  }

  // A kernel trusts that sizes of one name agree: it would read past the end of the smaller tensor.
  void checkRepeated(Known<int64_t> const& given) const {
    std::map<std::string, int64_t> seen;
    for (size_t at = 0; at < mOf.inputs.size(); at++)
      for (size_t axis = 0; axis < mOf.inputs[at].sizes.size(); axis++) {
        int64_t const size = given.sizes[at][axis];
        int64_t const before = seen.emplace(mOf.inputs[at].sizes[axis], size).first->second;
        if (size != before)
          throw Error(std::string(mOf.inputs[at].sizes[axis]) + " is " + std::to_string(before) +
                      ", but " + std::to_string(size) + " in " + mOf.inputs[at].name);
      }
  }

  Description const& mOf;
  std::vector<int32_t> const mAttributes;  // a float as its bits
  std::shared_ptr<Kernels> const mKernels;
  std::vector<PluginField> mFields;
  PluginFieldCollection mCollection;
};

// --- the creator -----------------------------------------------------------------------------------

class Creator final : public IPluginCreatorV3One {
 public:
  explicit Creator(Description const& of) : mOf(of) {
    for (Attribute const& one : of.attributes)
      mFields.emplace_back(one.name, nullptr, one.type, 1);
    mCollection = {int32_t(mFields.size()), mFields.data()};
  }
  Creator(Creator const&) = delete;

  char const* getPluginName() const noexcept override { return mOf.name; }
  char const* getPluginVersion() const noexcept override { return kVERSION; }
  char const* getPluginNamespace() const noexcept override { return kNAMESPACE; }
  PluginFieldCollection const* getFieldNames() noexcept override { return &mCollection; }

  IPluginV3* createPlugin(char const*, PluginFieldCollection const* given,
                          TensorRTPhase) noexcept override {
    IPluginV3* made = nullptr;
    attempt(mOf, [&] {
      std::vector<int32_t> values;
      for (Attribute const& one : mOf.attributes) values.push_back(read(find(one, given), one));
      made = new Plugin(mOf, std::move(values), kernels());
    });
    return made;
  }

 private:
  static PluginField const& find(Attribute const& wanted, PluginFieldCollection const* given) {
    for (int32_t at = 0; given && at < given->nbFields; at++)
      if (!std::strcmp(given->fields[at].name, wanted.name)) return given->fields[at];
    throw Error(std::string("the attribute ") + wanted.name + " is missing");
  }

  static int32_t read(PluginField const& field, Attribute const& wanted) {
    bool const wide =
        field.type == PluginFieldType::kINT64 && wanted.type == PluginFieldType::kINT32;
    if (field.length != 1 || !field.data || !(wide || field.type == wanted.type))
      throw Error(std::string("the attribute ") + wanted.name + " is no single " +
                  (wanted.type == PluginFieldType::kINT32 ? "integer" : "float32"));
    int64_t value = 0;
    if (wide) {
      std::memcpy(&value, field.data, sizeof value);
      return narrow(value, wanted.name);
    }
    int32_t held = 0;
    std::memcpy(&held, field.data, sizeof held);
    return held;
  }

  // Shared by the plugins of this row, and gone with the last of them.
  std::shared_ptr<Kernels> kernels() {
    std::lock_guard<std::mutex> const lock(mMutex);
    std::shared_ptr<Kernels> found = mKernels.lock();
    if (!found) mKernels = found = std::make_shared<Kernels>(mOf);
    return found;
  }

  Description const& mOf;
  std::vector<PluginField> mFields;
  PluginFieldCollection mCollection;
  std::mutex mMutex;
  std::weak_ptr<Kernels> mKernels;
};

}  // namespace
}  // namespace effopt

// What IPluginRegistry::loadLibrary looks for in a library of plugins.

extern "C" EFFOPT_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static std::deque<effopt::Creator> made;
  static std::vector<nvinfer1::IPluginCreatorInterface*> const listed = [] {
    std::vector<nvinfer1::IPluginCreatorInterface*> list;
    for (effopt::Description const& row : effopt::descriptions())
      list.push_back(&made.emplace_back(row));
    return list;
  }();
  count = int32_t(listed.size());
  return listed.data();
}

extern "C" EFFOPT_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  effopt::reportTo(finder);
}

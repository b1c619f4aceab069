// What a plugin is, apart from TensorRT's classes: one row of a table that is written for a model.
//
// A row computes the sizes of results from those of the inputs, and the launch of its kernel. Both
// are expressions of the same names; results in TensorRT's algebra of sizes, launches in numbers.
#pragma once

#include <NvInfer.h>

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

namespace effopt {

// A size that TensorRT knows when an engine runs, or a number in an expression of such sizes.
class Size {
 public:
  Size(int64_t number) : mNumber(number) {}
  Size(nvinfer1::IDimensionExpr const* made, nvinfer1::IExprBuilder& builder)
      : mMade(made), mBuilder(&builder) {}

  nvinfer1::IDimensionExpr const* in(nvinfer1::IExprBuilder& builder) const {
    return mMade ? mMade : builder.constant(mNumber);
  }

  using Operation = nvinfer1::DimensionOperation;
  friend Size operator+(Size a, Size b) { return made(Operation::kSUM, a, b); }
  friend Size operator-(Size a, Size b) { return made(Operation::kSUB, a, b); }
  friend Size operator*(Size a, Size b) { return made(Operation::kPROD, a, b); }
  friend Size operator/(Size a, Size b) { return made(Operation::kFLOOR_DIV, a, b); }
  friend Size cdiv(Size a, Size b) { return made(Operation::kCEIL_DIV, a, b); }

 private:
  // One of the two is no plain number: two of these are for C++ to compute.
  static Size made(Operation operation, Size a, Size b) {
    nvinfer1::IExprBuilder& builder = *(a.mBuilder ? a.mBuilder : b.mBuilder);
    return {builder.operation(operation, *a.in(builder), *b.in(builder)), builder};
  }

  int64_t mNumber = 0;
  nvinfer1::IDimensionExpr const* mMade = nullptr;
  nvinfer1::IExprBuilder* mBuilder = nullptr;
};

inline int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// An attribute that is a float, as the int32 of its bits: kernels take no other scalars.
struct Real {
  int64_t held;
};
inline int64_t bits(Real x) { return x.held; }

// What expressions read: the sizes of every input, and the attributes, a float as its bits.
template <class Number>
struct Known {
  std::vector<std::vector<Number>> sizes;
  std::vector<Number> attributes;
};

// Blocks, threads, dynamic shared memory in bytes, and the arguments between inputs and outputs.
struct Launch {
  std::array<int64_t, 3> grid;
  int64_t block, shared;
  std::vector<int64_t> scalars;
};

// The type of a tensor; without a value, the float type that all such tensors of a node share.
using Type = std::optional<nvinfer1::DataType>;
constexpr Type T = std::nullopt;

struct Input {
  char const* name;
  Type type;
  std::vector<char const*> sizes;  // names; one that comes again must be the same size again
};

struct Attribute {
  char const* name;
  nvinfer1::PluginFieldType type;  // kINT32 or kFLOAT32
};

struct Description {
  char const* name;
  char const* stem;  // entries of the PTX are <stem>_float32, <stem>_float16, <stem>_bfloat16
  std::vector<Input> inputs;
  std::vector<Type> outputs;
  std::vector<Attribute> attributes;
  std::vector<std::vector<Size>> (*results)(Known<Size> const&);
  Launch (*launch)(Known<int64_t> const&);
  std::vector<char const*> ptx;  // in pieces: some compilers take no long literal
};

std::vector<Description> const& descriptions();

}  // namespace effopt

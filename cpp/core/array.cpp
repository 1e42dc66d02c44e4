#include "moecalc/array.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "moecalc/error.h"

namespace moecalc {

const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return "float32";
    case Dtype::float64:
      return "float64";
    case Dtype::int64:
      return "int64";
    case Dtype::boolean:
      return "bool";
  }
  return "";
}

size_t bytes_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return 4;
    case Dtype::float64:
    case Dtype::int64:
      return 8;
    case Dtype::boolean:
      return 1;
  }
  return 0;
}

std::string shown(const Shape& shape) {
  std::string text = "[";
  for (size_t d = 0; d < shape.size(); ++d) text += (d > 0 ? ", " : "") + std::to_string(shape[d]);
  return text + "]";
}

namespace {

constexpr size_t alignment = 64;

int64_t product(const Shape& shape) {
  int64_t n = 1;
  for (const int64_t size : shape) n *= size;
  return n;
}

std::shared_ptr<void> allocate(size_t bytes) {
  const size_t rounded = std::max(alignment, (bytes + alignment - 1) / alignment * alignment);
  void* data = std::aligned_alloc(alignment, rounded);
  if (data == nullptr) throw std::bad_alloc();
  return {data, std::free};
}

template <class From, class To>
void convert(const void* from, void* to, int64_t n) {
  const auto* source = static_cast<const From*>(from);
  std::transform(source, source + n, static_cast<To*>(to), [](From x) { return static_cast<To>(x); });
}

template <class From>
void convert_from(const void* from, void* to, int64_t n, Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return convert<From, float>(from, to, n);
    case Dtype::float64:
      return convert<From, double>(from, to, n);
    case Dtype::int64:
      return convert<From, int64_t>(from, to, n);
    case Dtype::boolean:
      return convert<From, bool>(from, to, n);
  }
}

}  // namespace

int64_t Array::numel() const { return defined_ ? product(shape_) : 0; }

Array Array::empty(Shape shape, Dtype dtype) {
  Array array;
  array.defined_ = true;
  array.dtype_ = dtype;
  array.shape_ = std::move(shape);
  array.owner_ = allocate(array.bytes());
  array.data_ = array.owner_.get();
  return array;
}

Array Array::zeros(Shape shape, Dtype dtype) {
  Array array = empty(std::move(shape), dtype);
  std::memset(array.data_, 0, array.bytes());
  return array;
}

Array Array::copy_of(const void* values, Shape shape, Dtype dtype) {
  Array array = empty(std::move(shape), dtype);
  if (array.bytes() > 0) std::memcpy(array.data_, values, array.bytes());
  return array;
}

Array Array::view(void* data, Shape shape, Dtype dtype, std::shared_ptr<void> owner) {
  Array array;
  array.defined_ = true;
  array.dtype_ = dtype;
  array.shape_ = std::move(shape);
  array.data_ = data;
  array.owner_ = std::move(owner);
  return array;
}

void Array::check_type(Dtype wanted) const {
  if (!defined_) throw Error("expected an array, got none");
  if (wanted != dtype_) {
    throw Error(std::string("expected an array of ") + name_of(wanted) + ", got " + name_of(dtype_));
  }
}

Array Array::to(Dtype dtype) const {
  if (!defined_ || dtype == dtype_) return *this;
  Array out = empty(shape_, dtype);
  const int64_t n = numel();
  switch (dtype_) {
    case Dtype::float32:
      convert_from<float>(data_, out.data_, n, dtype);
      break;
    case Dtype::float64:
      convert_from<double>(data_, out.data_, n, dtype);
      break;
    case Dtype::int64:
      convert_from<int64_t>(data_, out.data_, n, dtype);
      break;
    case Dtype::boolean:
      convert_from<bool>(data_, out.data_, n, dtype);
      break;
  }
  return out;
}

Array Array::clone() const { return defined_ ? copy_of(data_, shape_, dtype_) : Array(); }

Array Array::reshape(Shape shape) const {
  if (product(shape) != numel()) {
    throw Error("expected " + std::to_string(numel()) + " numbers, got the shape " + shown(shape));
  }
  Array out = *this;
  out.shape_ = std::move(shape);
  return out;
}

Array Array::rows(int64_t first, int64_t n) const {
  if (dim() == 0 || first < 0 || n < 0 || first + n > size(0)) {
    throw Error("expected rows within " + shown(shape_) + ", got " + std::to_string(n) + " from " +
                std::to_string(first) + " on");
  }
  const size_t row = size(0) == 0 ? 0 : bytes() / static_cast<size_t>(size(0));
  Array out = *this;
  out.shape_[0] = n;
  out.data_ = static_cast<char*>(data_) + static_cast<size_t>(first) * row;
  return out;
}

Array Array::select(const std::vector<int64_t>& index) const {
  if (dim() == 0) throw Error("expected an array with rows, got a single number");
  Shape shape = shape_;
  shape[0] = static_cast<int64_t>(index.size());
  Array out = empty(shape, dtype_);
  const size_t row = size(0) == 0 ? 0 : bytes() / static_cast<size_t>(size(0));
  auto* to = static_cast<char*>(out.data_);
  for (const int64_t from : index) {
    if (from < 0 || from >= size(0)) {
      throw Error("expected rows in [0, " + std::to_string(size(0)) + "), got " + std::to_string(from));
    }
    std::memcpy(to, static_cast<const char*>(data_) + static_cast<size_t>(from) * row, row);
    to += row;
  }
  return out;
}

bool Array::equals(const Array& other) const {
  if (defined_ != other.defined_ || dtype_ != other.dtype_ || shape_ != other.shape_) return false;
  return bytes() == 0 || std::memcmp(data_, other.data_, bytes()) == 0;
}

}  // namespace moecalc

// Arrays that engines and models hand to each other: contiguous, on the CPU, of a type known at run time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "moecalc/version.h"

namespace moecalc {

enum class Dtype : uint8_t { float32, float64, int64, boolean };

MOECALC_API const char* name_of(Dtype dtype);  // "float32", ...
MOECALC_API size_t bytes_of(Dtype dtype);      // of one number

template <class T>
inline constexpr Dtype dtype_of = Dtype::boolean;
template <>
inline constexpr Dtype dtype_of<float> = Dtype::float32;
template <>
inline constexpr Dtype dtype_of<double> = Dtype::float64;
template <>
inline constexpr Dtype dtype_of<int64_t> = Dtype::int64;

using Shape = std::vector<int64_t>;

/// `[2, 3]`, for messages.
MOECALC_API std::string shown(const Shape& shape);

/// A row-major array. Copies of it share its numbers, as copies of a pointer do; an array that was made with
/// no arguments is undefined.
class MOECALC_API Array {
 public:
  Array() = default;

  /// Numbers that are not initialised, or zero.
  static Array empty(Shape shape, Dtype dtype);
  static Array zeros(Shape shape, Dtype dtype);
  /// A copy of `values`, which must be as many as the shape says.
  template <class T>
  static Array of(const std::vector<T>& values, Shape shape) {
    return of(values.data(), std::move(shape));
  }
  template <class T>
  static Array of(const std::vector<T>& values) {
    return of(values.data(), {static_cast<int64_t>(values.size())});
  }
  template <class T>
  static Array of(const T* values, Shape shape) {
    return copy_of(values, std::move(shape), dtype_of<T>);
  }
  /// The numbers at `data`, which `owner` keeps alive; with none the caller does.
  static Array view(void* data, Shape shape, Dtype dtype, std::shared_ptr<void> owner = nullptr);
  template <class T>
  static Array view(const T* data, Shape shape) {
    return view(const_cast<T*>(data), std::move(shape), dtype_of<T>);
  }

  bool defined() const { return defined_; }
  Dtype dtype() const { return dtype_; }
  const Shape& shape() const { return shape_; }
  int64_t dim() const { return static_cast<int64_t>(shape_.size()); }
  /// Of dimension `d`; -1 is the last.
  int64_t size(int64_t d) const { return shape_[static_cast<size_t>(d < 0 ? d + dim() : d)]; }
  int64_t numel() const;
  size_t bytes() const { return static_cast<size_t>(numel()) * bytes_of(dtype_); }

  /// First number. T must be the type that the array has: anything else is a mistake in our code, and throws
  /// Error.
  template <class T>
  T* data() const {
    check_type(dtype_of<T>);
    return static_cast<T*>(data_);
  }
  void* bytes_data() const { return data_; }

  /// The same numbers in another type; this very array where it has that type.
  Array to(Dtype dtype) const;
  Array clone() const;
  /// The same numbers as another shape.
  Array reshape(Shape shape) const;
  /// Rows first..first+n of dimension 0, shared.
  Array rows(int64_t first, int64_t n) const;
  /// Copy of the rows `index` of dimension 0.
  Array select(const std::vector<int64_t>& index) const;
  /// Whether type, shape and all numbers are the same.
  bool equals(const Array& other) const;

 private:
  static Array copy_of(const void* values, Shape shape, Dtype dtype);
  void check_type(Dtype wanted) const;

  bool defined_ = false;
  Dtype dtype_ = Dtype::float64;
  Shape shape_;
  void* data_ = nullptr;
  std::shared_ptr<void> owner_;
};

}  // namespace moecalc

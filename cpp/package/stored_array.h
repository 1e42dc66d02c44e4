// Numbers of a package that are read when they are needed.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "moecalc/array.h"
#include "moecalc/package_file.h"

namespace moecalc {

/// Numbers of the package that stay in the file until they are read.
class StoredArray {
 public:
  StoredArray() = default;
  StoredArray(std::shared_ptr<const PackageFile> file, uint64_t position, Shape shape, Dtype dtype);

  const Shape& shape() const { return shape_; }
  int64_t size(size_t d) const { return shape_[d]; }
  Dtype dtype() const { return dtype_; }
  /// All numbers, or those of the rows `index` of dimension 0, in another type. Throws Error where the file
  /// is unreadable.
  Array read(Dtype dtype) const;
  Array select(const std::vector<int64_t>& index, Dtype dtype) const;
  /// Whether all of its numbers are. They are read for it, a chunk at a time.
  bool is_finite() const;

 private:
  std::shared_ptr<const PackageFile> file_;
  uint64_t position_ = 0;
  Shape shape_;
  Dtype dtype_ = Dtype::float64;
};

}  // namespace moecalc

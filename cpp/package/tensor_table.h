// The tensors that a package lists in tensors.json.
#pragma once

#include <map>
#include <memory>
#include <set>
#include <string>

#include "core/json.h"
#include "moecalc/array.h"
#include "package/json_part.h"
#include "package/stored_array.h"

namespace moecalc {

constexpr int64_t max_width = 1 << 16;  // of a tensor of any model

/// The tensors of a package by name. Every size and place is checked against the file.
class TensorTable {
 public:
  TensorTable(std::shared_ptr<const PackageFile> file, const Json& json);

  /// The tensor `name` of exactly this type and shape. Throws Error.
  StoredArray take(const std::string& name, Dtype dtype, const Shape& shape);
  Array read(const std::string& name, Dtype dtype, const Shape& shape);

  /// Type of a tensor of a network in either precision. Throws Error for another.
  Dtype precision(const std::string& name) const;

  /// Size of dimension `d` of a tensor of `n_dims` dimensions, within what any model has.
  int64_t width(const std::string& name, size_t n_dims, size_t d) const;

  bool has(const std::string& name) const { return stored_.count(name) > 0; }

  /// Throws Error for numbers that are not finite.
  void check_finite() const;
  /// Throws Error for tensors that no part of the model took.
  void check_all_taken() const;

 private:
  [[noreturn]] static void refuse(const std::string& name, const std::string& expectation,
                                  const std::string& got);

  const StoredArray& find(const std::string& name) const;

  StoredArray stored(const JsonPart& part) const;

  std::shared_ptr<const PackageFile> file_;
  std::map<std::string, StoredArray> stored_;
  std::set<std::string> taken_;
};

}  // namespace moecalc

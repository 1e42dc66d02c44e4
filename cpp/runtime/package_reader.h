// Lets torch read a package, with or without the content of its large tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <caffe2/serialize/read_adapter_interface.h>
#include <torch/csrc/jit/api/module.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "moecalc/archive.h"

namespace moecalc {

class PackageReader : public caffe2::serialize::ReadAdapterInterface {
 public:
  /// `file` must outlive the reader.
  explicit PackageReader(const PackageFile& file) : file_(file) {}

  size_t size() const override { return static_cast<size_t>(file_.size()); }

  size_t read(uint64_t position, void* buffer, size_t n, const char* /*what*/) const override {
    if (position >= file_.size()) return 0;
    n = static_cast<size_t>(std::min<uint64_t>(n, file_.size() - position));
    file_.read(position, buffer, n);
    return n;
  }

 private:
  const PackageFile& file_;
};

struct LoadedPackage;

/// Tensors of a loaded package whose content is still in the file: their memory is reserved, but was never
/// written (and so takes no space).
class DeferredTensors {
 public:
  explicit DeferredTensors(std::shared_ptr<const PackageFile> file) : file_(std::move(file)) {}

  /// Whether the content of `tensor` is still in the file.
  bool holds(const at::Tensor& tensor) const;
  /// Place of its first byte in the file.
  uint64_t position(const at::Tensor& tensor) const;
  const std::shared_ptr<const PackageFile>& file() const { return file_; }
  /// Whether all of its numbers are, float32 or float64; they are read for it. Numbers of its storage that
  /// the tensor does not have count too.
  bool is_finite(const at::Tensor& tensor) const;
  /// Reads the content; the tensor is then like any other.
  void fill(const at::Tensor& tensor);

 private:
  friend LoadedPackage load_module(std::shared_ptr<const PackageFile> file);
  std::shared_ptr<const PackageFile> file_;
  struct Place {
    uint64_t position;
    size_t size;
  };
  std::map<const void*, Place> places_;
};

/// The model of a package on the CPU. Tensors of many bytes are left in the file where torch's reader allows
/// it: see `deferred`. The package's code is looked at before torch sees it (`check_package`), because torch
/// runs code while it loads a file. Nothing else in moecalc loads TorchScript in C++. Throws Error that
/// begins with the file's path.
struct LoadedPackage {
  torch::jit::Module model;
  DeferredTensors deferred;
};
LoadedPackage load_module(std::shared_ptr<const PackageFile> file);

}  // namespace moecalc

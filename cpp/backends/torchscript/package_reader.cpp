#include "backends/torchscript/package_reader.h"

#include <caffe2/serialize/read_adapter_interface.h>
#include <torch/csrc/jit/serialization/import.h>

#include <algorithm>
#include <cstdint>
#include <memory>

namespace moecalc {
namespace {

/// The file that was checked, whatever its name stands for by now.
class PackageReader final : public caffe2::serialize::ReadAdapterInterface {
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

}  // namespace

torch::jit::Module load_module(const PackageFile& file) {
  return torch::jit::load(std::make_shared<PackageReader>(file), at::Device(at::kCPU));
}

}  // namespace moecalc

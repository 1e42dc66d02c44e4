#include "package_reader.h"

#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/jit/serialization/import.h>

#include <set>
#include <tuple>
#include <utility>
#include <vector>

namespace moecalc {

namespace {

constexpr size_t smallest_deferred = 64 << 10;  // bytes

/// Leaves the destination of the large records untouched and notes it. torch reads a stored record in one
/// call, into the memory of the tensor's storage; `load_module` checks that this is so.
class DeferringReader final : public PackageReader {
 public:
  explicit DeferringReader(const PackageFile& file) : PackageReader(file) {
    caffe2::serialize::PyTorchStreamReader reader(std::make_shared<PackageReader>(file));
    for (const std::string& name : reader.getAllRecords()) {
      if (name.rfind("data/", 0) != 0) continue;
      const size_t size = reader.getRecordSize(name);
      if (size >= smallest_deferred) records_.emplace(reader.getRecordOffset(name), size);
    }
  }

  size_t read(uint64_t position, void* buffer, size_t n, const char* what) const override {
    const auto record = records_.find(position);
    if (record == records_.end() || record->second != n) {
      return PackageReader::read(position, buffer, n, what);
    }
    places.emplace_back(buffer, position, n);
    return n;
  }

  mutable std::vector<std::tuple<const void*, uint64_t, size_t>> places;

 private:
  std::map<uint64_t, size_t> records_;  // position: size
};

}  // namespace

bool DeferredTensors::holds(const at::Tensor& tensor) const {
  return places_.count(tensor.storage().data()) > 0;
}

uint64_t DeferredTensors::position(const at::Tensor& tensor) const {
  return places_.at(tensor.storage().data()).position +
         static_cast<uint64_t>(tensor.storage_offset()) * tensor.element_size();
}

void DeferredTensors::fill(const at::Tensor& tensor) {
  const auto found = places_.find(tensor.storage().data());
  if (found == places_.end()) return;
  file_->read(found->second.position, tensor.storage().mutable_data(), found->second.size);
  places_.erase(found);
}

LoadedPackage load_module(std::shared_ptr<const PackageFile> file) {
  DeferredTensors deferred(file);
  const auto reader = std::make_shared<DeferringReader>(*file);
  torch::jit::Module model = torch::jit::load(reader, at::Device(at::kCPU));
  for (const auto& [memory, position, size] : reader->places) deferred.places_[memory] = {position, size};
  std::set<const void*> found;
  const auto look_at = [&](const at::Tensor& tensor) {
    const auto place = deferred.places_.find(tensor.storage().data());
    if (place != deferred.places_.end() && tensor.storage().nbytes() == place->second.size) {
      found.insert(place->first);
    }
  };
  for (const at::Tensor& tensor : model.parameters()) look_at(tensor);
  for (const at::Tensor& tensor : model.buffers()) look_at(tensor);
  if (found.size() == reader->places.size()) return {std::move(model), std::move(deferred)};
  // some tensor is not where torch asked us to read it: read everything
  return {torch::jit::load(std::make_shared<PackageReader>(*file), at::Device(at::kCPU)),
          DeferredTensors(file)};
}

}  // namespace moecalc

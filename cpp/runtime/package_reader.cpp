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

namespace {

/// Infinities and NaN have all bits of the exponent set.
template <class Bits>
bool all_finite(const Bits* bits, size_t n, Bits exponent) {
  Bits found = 0;
  for (size_t i = 0; i < n; ++i) found |= static_cast<Bits>((bits[i] & exponent) == exponent);
  return found == 0;
}

}  // namespace

bool DeferredTensors::is_finite(const at::Tensor& tensor) const {
  const Place& place = places_.at(tensor.storage().data());
  std::vector<uint64_t> chunk(32 << 10);  // in cache
  for (size_t at = 0; at < place.size;) {
    const size_t n = std::min(chunk.size() * sizeof(uint64_t), place.size - at);
    file_->read(place.position + at, chunk.data(), n);
    const bool finite =
        tensor.scalar_type() == at::kDouble
            ? all_finite<uint64_t>(chunk.data(), n / 8, 0x7FF0000000000000U)
            : all_finite<uint32_t>(reinterpret_cast<const uint32_t*>(chunk.data()), n / 4, 0x7F800000U);
    if (!finite) return false;
    at += n;
  }
  return true;
}

void DeferredTensors::fill(const at::Tensor& tensor) {
  const auto found = places_.find(tensor.storage().data());
  if (found == places_.end()) return;
  file_->read(found->second.position, tensor.storage().mutable_data(), found->second.size);
  places_.erase(found);
}

LoadedPackage load_module(std::shared_ptr<const PackageFile> file) {
  check_package(*file);
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

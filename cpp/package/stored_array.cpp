#include "package/stored_array.h"

#include <algorithm>
#include <utility>

namespace moecalc {

namespace {

/// Infinities and NaN have all bits of the exponent set.
template <class Bits>
bool all_finite(const Bits* bits, size_t n, Bits exponent) {
  Bits found = 0;
  for (size_t i = 0; i < n; ++i) found |= static_cast<Bits>((bits[i] & exponent) == exponent);
  return found == 0;
}

}  // namespace

StoredArray::StoredArray(std::shared_ptr<const PackageFile> file, uint64_t position, Shape shape, Dtype dtype)
    : file_(std::move(file)), position_(position), shape_(std::move(shape)), dtype_(dtype) {}

Array StoredArray::read(Dtype dtype) const {
  const Array values = Array::empty(shape_, dtype_);
  if (values.bytes() > 0) file_->read(position_, values.bytes_data(), values.bytes());
  return values.to(dtype);
}

Array StoredArray::select(const std::vector<int64_t>& index, Dtype dtype) const {
  Shape shape = shape_;
  shape[0] = static_cast<int64_t>(index.size());
  const Array values = Array::empty(shape, dtype_);
  if (values.bytes() == 0) return values.to(dtype);
  const size_t row = values.bytes() / index.size();
  auto* to = static_cast<char*>(values.bytes_data());
  for (const int64_t id : index) {
    file_->read(position_ + static_cast<uint64_t>(id) * row, to, row);
    to += row;
  }
  return values.to(dtype);
}

bool StoredArray::is_finite() const {
  if (dtype_ != Dtype::float32 && dtype_ != Dtype::float64) return true;
  size_t left = bytes_of(dtype_);
  for (const int64_t size : shape_) left *= static_cast<size_t>(size);
  std::vector<uint64_t> chunk(std::min<size_t>(32 << 10, left / 8 + 1));  // in cache
  for (uint64_t at = position_; left > 0;) {
    const size_t n = std::min(chunk.size() * sizeof(uint64_t), left);
    file_->read(at, chunk.data(), n);
    const bool finite =
        dtype_ == Dtype::float64
            ? all_finite<uint64_t>(chunk.data(), n / 8, 0x7FF0000000000000U)
            : all_finite<uint32_t>(reinterpret_cast<const uint32_t*>(chunk.data()), n / 4, 0x7F800000U);
    if (!finite) return false;
    at += n;
    left -= n;
  }
  return true;
}

}  // namespace moecalc

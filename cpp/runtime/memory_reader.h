// Lets torch read a package from memory. (torch's own MemoryReadAdapter checks bounds only from 2.12 on.)
#pragma once

#include <caffe2/serialize/read_adapter_interface.h>

#include <algorithm>
#include <cstring>
#include <string>

namespace moecalc {

class MemoryReader final : public caffe2::serialize::ReadAdapterInterface {
 public:
  /// `bytes` must outlive the reader.
  explicit MemoryReader(const std::string& bytes) : bytes_(bytes) {}

  size_t size() const override { return bytes_.size(); }

  size_t read(uint64_t position, void* buffer, size_t n, const char* /*what*/) const override {
    if (position >= bytes_.size()) return 0;
    n = std::min(n, bytes_.size() - static_cast<size_t>(position));
    std::memcpy(buffer, bytes_.data() + position, n);
    return n;
  }

 private:
  const std::string& bytes_;
};

}  // namespace moecalc

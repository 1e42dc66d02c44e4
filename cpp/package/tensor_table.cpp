#include "package/tensor_table.h"

#include <cmath>
#include <optional>
#include <utility>

#include "moecalc/error.h"
#include "moecalc/text.h"

namespace moecalc {

namespace {

constexpr int64_t max_count = int64_t{1} << 40;

std::optional<Dtype> dtype_named(const std::string& name) {
  for (const Dtype dtype : {Dtype::float32, Dtype::float64, Dtype::int64, Dtype::boolean}) {
    if (name == name_of(dtype)) return dtype;
  }
  return std::nullopt;
}

}  // namespace

TensorTable::TensorTable(std::shared_ptr<const PackageFile> file, const Json& json) : file_(std::move(file)) {
  double total = 0.0;  // bytes
  for (const auto& [name, entry] : json.object()) {
    const JsonPart part(entry, printable(name, 80) + ".");
    part.only({"record", "dtype", "shape", "offset"});
    StoredArray array = stored(part);
    double bytes = static_cast<double>(bytes_of(array.dtype()));
    for (const int64_t size : array.shape()) bytes *= static_cast<double>(size);
    total += bytes;
    stored_.emplace(name, std::move(array));
  }
  // what a small file says must not fill the memory
  if (total > 4.0 * static_cast<double>(file_->size()) + 1048576.0) {
    throw Error(std::string("expected tensors with records of their own, got records that many share") +
                edited_file);
  }
}

StoredArray TensorTable::take(const std::string& name, Dtype dtype, const Shape& shape) {
  const StoredArray& found = find(name);
  if (found.dtype() != dtype) refuse(name, std::string("of type ") + name_of(dtype), name_of(found.dtype()));
  if (found.shape() != shape) refuse(name, "of shape " + shown(shape), shown(found.shape()));
  taken_.insert(name);
  return found;
}

Array TensorTable::read(const std::string& name, Dtype dtype, const Shape& shape) {
  return take(name, dtype, shape).read(dtype == Dtype::float32 ? Dtype::float64 : dtype);
}

Dtype TensorTable::precision(const std::string& name) const {
  const Dtype found = find(name).dtype();
  if (found != Dtype::float32 && found != Dtype::float64) {
    refuse(name, "of type float32 or float64", name_of(found));
  }
  return found;
}

int64_t TensorTable::width(const std::string& name, size_t n_dims, size_t d) const {
  const StoredArray& found = find(name);
  if (found.shape().size() != n_dims || found.size(d) < 1 || found.size(d) > max_width) {
    refuse(name,
           "of " + std::to_string(n_dims) + " dimensions with 1 to " + std::to_string(max_width) + " columns",
           "shape " + shown(found.shape()));
  }
  return found.size(d);
}

void TensorTable::check_finite() const {
  for (const auto& [name, array] : stored_) {
    if (!array.is_finite()) refuse(name, "finite", "NaN or infinity");
  }
}

void TensorTable::check_all_taken() const {
  for (const auto& [name, array] : stored_) {
    if (taken_.count(name) == 0 && name != "dtype_probe") {
      throw Error("expected no tensor `" + printable(name, 80) + "` in this architecture, got one" +
                  edited_file);
    }
  }
}

void TensorTable::refuse(const std::string& name, const std::string& expectation, const std::string& got) {
  throw Error("expected `" + printable(name, 80) + "` to be " + expectation + ", got " + got + edited_file);
}

const StoredArray& TensorTable::find(const std::string& name) const {
  const auto found = stored_.find(name);
  if (found == stored_.end()) {
    throw Error("expected a model with `" + printable(name, 120) +
                "`, got one without: package the checkpoint again");
  }
  return found->second;
}

StoredArray TensorTable::stored(const JsonPart& part) const {
  const std::string record = part.text("record");
  const auto place = file_->records().find(record);
  if (record.rfind("data/", 0) != 0 || place == file_->records().end()) {
    part.refuse("record", "a record of the package's data", quoted(record, 40, '\''));
  }
  const std::optional<Dtype> dtype = dtype_named(part.text("dtype"));
  if (!dtype) {
    part.refuse("dtype", "float32, float64, int64 or bool", quoted(part.text("dtype"), 20, '\''));
  }
  if (part.value("shape").kind() != Json::Kind::list || part.value("shape").list().size() > 4) {
    part.refuse("shape", "a list of at most 4 sizes", "another value");
  }
  Shape shape;
  // compared with the record before they are multiplied any further, so that no product overflows
  auto left = static_cast<double>(place->second.size);
  double count = static_cast<double>(bytes_of(*dtype));
  for (const Json& size : part.value("shape").list()) {
    const bool whole = size.kind() == Json::Kind::number && size.number() >= 0 &&
                       size.number() <= static_cast<double>(max_count) &&
                       size.number() == std::floor(size.number());
    if (!whole) part.refuse("shape", "sizes, whole numbers", "another value");
    shape.push_back(static_cast<int64_t>(size.number()));
    count *= size.number();
  }
  const int64_t offset = part.integer("offset", 0, max_count);
  left -= static_cast<double>(offset);
  if (count > left) {
    part.refuse("shape", "within its record of " + std::to_string(place->second.size) + " bytes",
                shown(shape) + " from byte " + std::to_string(offset) + " on");
  }
  return {file_, place->second.position + static_cast<uint64_t>(offset), std::move(shape), *dtype};
}

}  // namespace moecalc

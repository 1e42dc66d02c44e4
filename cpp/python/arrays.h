// Between numpy arrays and Array.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "moecalc/array.h"
#include "moecalc/error.h"

namespace moecalc {

namespace py = pybind11;

using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;

/// Converts to int64, but only from integers: a float index is a mistake of the caller.
inline py::array_t<int64_t, py::array::c_style> integers(const py::array& array, const char* name) {
  if (array.dtype().kind() != 'i' && array.dtype().kind() != 'u') {
    throw Error(std::string("expected `") + name + "` to be an array of integers, got " +
                py::str(array.dtype()).cast<std::string>());
  }
  return py::array_t<int64_t, py::array::c_style | py::array::forcecast>(array);
}

/// The same memory; `array` must outlive it.
template <class T, int flags>
Array view(const py::array_t<T, flags>& array) {
  return Array::view(array.data(), Shape(array.shape(), array.shape() + array.ndim()));
}

inline Dtype dtype_of_numpy(const py::array& array) {
  const char kind = array.dtype().kind();
  const py::ssize_t size = array.itemsize();
  if (kind == 'f' && size == 4) return Dtype::float32;
  if (kind == 'f' && size == 8) return Dtype::float64;
  if (kind == 'i' && size == 8) return Dtype::int64;
  throw Error("expected float32, float64 or int64, got " + py::str(array.dtype()).cast<std::string>());
}

/// A copy of a float32, float64 or int64 array, of whatever strides: the caller's memory may change.
inline Array copied(const py::array& array) {
  const Dtype dtype = dtype_of_numpy(array);
  const py::array rows = py::array::ensure(array, py::array::c_style);
  const Shape shape(rows.shape(), rows.shape() + rows.ndim());
  return Array::view(const_cast<void*>(rows.data()), shape, dtype).clone();
}

inline py::dtype numpy_dtype(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return py::dtype::of<float>();
    case Dtype::float64:
      return py::dtype::of<double>();
    case Dtype::int64:
      return py::dtype::of<int64_t>();
    case Dtype::boolean:
      return py::dtype::of<bool>();
  }
  throw Error("expected an array of numbers");
}

/// An array that shares the memory, and keeps it alive.
inline py::array to_numpy(const Array& array) {
  auto* owned = new Array(array);
  const py::capsule owner(owned, [](void* pointer) { delete static_cast<Array*>(pointer); });
  const std::vector<py::ssize_t> shape(array.shape().begin(), array.shape().end());
  return py::array(numpy_dtype(array.dtype()), shape, array.bytes_data(), owner);
}

}  // namespace moecalc

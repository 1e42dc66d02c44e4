// `moecalc._C.Trainer`: numpy in, numpy out (moecalc/training).
#include <ATen/ATen.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "moecalc/trainer.h"

namespace py = pybind11;

namespace {

at::ScalarType scalar_type(const py::array& array) {
  const char kind = array.dtype().kind();
  const py::ssize_t size = array.itemsize();
  if (kind == 'f' && size == 4) return at::kFloat;
  if (kind == 'f' && size == 8) return at::kDouble;
  if (kind == 'i' && size == 8) return at::kLong;
  throw moecalc::Error("expected float32, float64 or int64, got " +
                       py::str(array.dtype()).cast<std::string>());
}

/// A copy of the array as a tensor: the caller's memory may change.
at::Tensor tensor(const py::array& array) {
  const std::vector<int64_t> shape(array.shape(), array.shape() + array.ndim());
  std::vector<int64_t> strides;
  for (py::ssize_t d = 0; d < array.ndim(); ++d) strides.push_back(array.strides(d) / array.itemsize());
  return at::from_blob(const_cast<void*>(array.data()), shape, strides,
                       at::TensorOptions().dtype(scalar_type(array)))
      .clone(at::MemoryFormat::Contiguous);
}

template <class T>
py::array numpy_of(at::Tensor* owned) {
  const py::capsule owner(owned, [](void* pointer) { delete static_cast<at::Tensor*>(pointer); });
  const std::vector<py::ssize_t> shape(owned->sizes().begin(), owned->sizes().end());
  return py::array_t<T>(shape, owned->const_data_ptr<T>(), owner);
}

/// An array that owns the tensor's memory.
py::array numpy(const at::Tensor& values) {
  auto* owned = new at::Tensor(values.contiguous());
  if (values.scalar_type() == at::kFloat) return numpy_of<float>(owned);
  if (values.scalar_type() == at::kDouble) return numpy_of<double>(owned);
  return numpy_of<int64_t>(owned);
}

using Group = std::vector<py::array>;
using Layer = std::pair<std::vector<py::array>, std::vector<Group>>;

moecalc::TrainingWeights weights_from(const std::vector<py::array>& embedding,
                                      const std::vector<Layer>& layers) {
  if (embedding.size() != 4)
    throw moecalc::Error("expected 4 embedding arrays, got " + std::to_string(embedding.size()));
  moecalc::TrainingWeights weights;
  weights.edge_matrix = tensor(embedding[0]), weights.edge_bias = tensor(embedding[1]);
  weights.direction = tensor(embedding[2]), weights.node_table = tensor(embedding[3]);
  for (const auto& [updates, groups] : layers) {
    if (updates.size() != 3)
      throw moecalc::Error("expected 3 update arrays, got " + std::to_string(updates.size()));
    moecalc::TrainingWeights::Layer layer;
    layer.update_n = tensor(updates[0]), layer.update_e = tensor(updates[1]),
    layer.update_a = tensor(updates[2]);
    for (const Group& group : groups) {
      if (!group.empty() && group.size() != moecalc::TrainingWeights::kGroupSize) {
        throw moecalc::Error("expected " + std::to_string(moecalc::TrainingWeights::kGroupSize) +
                             " arrays of a group, got " + std::to_string(group.size()));
      }
      std::vector<at::Tensor> tensors;
      for (const py::array& array : group) tensors.push_back(tensor(array));
      layer.groups.push_back(std::move(tensors));
    }
    weights.layers.push_back(std::move(layer));
  }
  return weights;
}

std::pair<std::vector<py::array>, std::vector<Layer>> to_python(const moecalc::TrainingWeights& weights) {
  std::vector<Layer> layers;
  for (const auto& layer : weights.layers) {
    std::vector<Group> groups;
    for (const auto& group : layer.groups) {
      Group arrays;
      for (const at::Tensor& values : group) arrays.push_back(numpy(values));
      groups.push_back(std::move(arrays));
    }
    layers.emplace_back(
        std::vector<py::array>{numpy(layer.update_n), numpy(layer.update_e), numpy(layer.update_a)},
        std::move(groups));
  }
  return {{numpy(weights.edge_matrix), numpy(weights.edge_bias), numpy(weights.direction),
           numpy(weights.node_table)},
          std::move(layers)};
}

}  // namespace

void bind_training(py::module_& module) {
  std::vector<std::string> names(std::begin(moecalc::TrainingWeights::kGroupTensors),
                                 std::end(moecalc::TrainingWeights::kGroupTensors));
  module.attr("TRAINING_TENSORS") = names;
  py::class_<moecalc::Trainer>(module, "Trainer",
                               "Node features and their gradients for training: see trainer.h.")
      .def(py::init<const std::string&, const std::string&>(), py::arg("path"), py::arg("dtype"))
      .def(
          "set_graph",
          [](moecalc::Trainer& trainer, const py::array& types, const py::array& edge_index,
             const py::array& edge_vec, const py::array& system_index, int64_t n_systems) {
            return numpy(trainer.set_graph(
                {tensor(types), tensor(edge_index), tensor(edge_vec), tensor(system_index), n_systems}));
          },
          py::arg("types"), py::arg("edge_index"), py::arg("edge_vec"), py::arg("system_index"),
          py::arg("n_systems"))
      .def("graph",
           [](const moecalc::Trainer& trainer) {
             std::vector<py::array> arrays;
             for (const at::Tensor& values : trainer.graph()) arrays.push_back(numpy(values));
             return arrays;
           })
      .def("set_edge_vec", [](moecalc::Trainer& trainer,
                              const py::array& edge_vec) { trainer.set_edge_vec(tensor(edge_vec)); })
      .def("set_weights",
           [](moecalc::Trainer& trainer, const std::vector<py::array>& embedding,
              const std::vector<Layer>& layers) { trainer.set_weights(weights_from(embedding, layers)); })
      .def(
          "forward",
          [](moecalc::Trainer& trainer, bool keep) {
            at::Tensor v;
            {
              const py::gil_scoped_release release;
              v = trainer.forward(keep);
            }
            return numpy(v);
          },
          py::arg("keep_for_weights"))
      .def("backward",
           [](moecalc::Trainer& trainer, const py::array& dv_in) {
             const at::Tensor dv = tensor(dv_in);
             at::Tensor gradient;
             {
               const py::gil_scoped_release release;
               gradient = trainer.backward(dv);
             }
             return numpy(gradient);
           })
      .def("backward_to_weights", [](moecalc::Trainer& trainer, const py::array& dv_in) {
        const at::Tensor dv = tensor(dv_in);
        moecalc::TrainingWeights gradients;
        {
          const py::gil_scoped_release release;
          gradients = trainer.backward_to_weights(dv);
        }
        return to_python(gradients);
      });
}

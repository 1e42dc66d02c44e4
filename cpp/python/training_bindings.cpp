// `moecalc._C.Trainer`: numpy in, numpy out (moecalc/training).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "backends/cpu/training.h"
#include "python/arrays.h"

namespace py = pybind11;

namespace {

using moecalc::Array;
using moecalc::copied;
using moecalc::NamedArrays;
using moecalc::to_numpy;
using moecalc::TrainingWeights;

using Group = std::vector<py::array>;  // in the order of TRAINING_TENSORS; empty: absent
using Layer = std::pair<std::vector<py::array>, std::vector<Group>>;

void expect_arrays(const std::vector<py::array>& arrays, size_t n, const std::string& what) {
  if (arrays.size() == n) return;
  throw moecalc::Error("expected " + std::to_string(n) + " " + what + ", got " +
                       std::to_string(arrays.size()));
}

NamedArrays group_from(const Group& arrays) {
  if (arrays.empty()) return {};
  const std::vector<std::string>& names = moecalc::group_weight_names();
  expect_arrays(arrays, names.size(), "arrays of a group");
  NamedArrays group;
  for (size_t k = 0; k < names.size(); ++k) group.emplace(names[k], copied(arrays[k]));
  return group;
}

TrainingWeights weights_from(const std::vector<py::array>& embedding, const std::vector<Layer>& layers) {
  expect_arrays(embedding, 4, "embedding arrays");
  TrainingWeights weights;
  weights.edge_matrix = copied(embedding[0]);
  weights.edge_bias = copied(embedding[1]);
  weights.direction = copied(embedding[2]);
  weights.node_table = copied(embedding[3]);
  for (const auto& [updates, groups] : layers) {
    expect_arrays(updates, 3, "update arrays");
    TrainingWeights::Layer layer;
    layer.update_node = copied(updates[0]);
    layer.update_edge = copied(updates[1]);
    layer.update_angle = copied(updates[2]);
    for (const Group& group : groups) layer.groups.push_back(group_from(group));
    weights.layers.push_back(std::move(layer));
  }
  return weights;
}

Group to_python(const NamedArrays& group) {
  Group arrays;
  if (group.empty()) return arrays;
  for (const std::string& name : moecalc::group_weight_names()) arrays.push_back(to_numpy(group.at(name)));
  return arrays;
}

std::pair<std::vector<py::array>, std::vector<Layer>> to_python(const TrainingWeights& weights) {
  std::vector<Layer> layers;
  for (const TrainingWeights::Layer& layer : weights.layers) {
    std::vector<Group> groups;
    for (const NamedArrays& group : layer.groups) groups.push_back(to_python(group));
    layers.emplace_back(std::vector<py::array>{to_numpy(layer.update_node), to_numpy(layer.update_edge),
                                               to_numpy(layer.update_angle)},
                        std::move(groups));
  }
  return {{to_numpy(weights.edge_matrix), to_numpy(weights.edge_bias), to_numpy(weights.direction),
           to_numpy(weights.node_table)},
          std::move(layers)};
}

/// work() while other Python threads may run.
template <class Function>
auto without_gil(const Function& work) {
  const py::gil_scoped_release release;
  return work();
}

}  // namespace

void bind_training(py::module_& module) {
  using moecalc::Trainer;
  module.attr("TRAINING_TENSORS") = moecalc::group_weight_names();
  py::class_<Trainer>(module, "Trainer", "Node features and their gradients for training: see training.h.")
      .def(py::init<const std::string&, const std::string&>(), py::arg("path"), py::arg("dtype"),
           py::call_guard<py::gil_scoped_release>())
      .def_property("num_threads", &Trainer::num_threads, &Trainer::set_num_threads,
                    "Threads of the calls to come; 0: OMP_NUM_THREADS or the cores.")
      .def(
          "set_graph",
          [](Trainer& trainer, const py::array& types, const py::array& edge_index, const py::array& edge_vec,
             const py::array& system_index, int64_t n_systems) {
            return to_numpy(trainer.set_graph(copied(types), copied(edge_index), copied(edge_vec),
                                              copied(system_index), n_systems));
          },
          py::arg("types"), py::arg("edge_index"), py::arg("edge_vec"), py::arg("system_index"),
          py::arg("n_systems"), "Sort a graph; returns, for every row from now on, the atom of the input.")
      .def(
          "graph",
          [](const Trainer& trainer) {
            std::vector<py::array> arrays;
            for (const Array& array : trainer.graph()) arrays.push_back(to_numpy(array));
            return arrays;
          },
          "types (n,), edge_index (2, E) and edge_vec (E, 3) in that order.")
      .def(
          "set_edge_vec",
          [](Trainer& trainer, const py::array& edge_vec) { trainer.set_edge_vec(copied(edge_vec)); },
          py::arg("edge_vec"), "(E, 3) in that order, of the same edges and angles.")
      .def(
          "set_weights",
          [](Trainer& trainer, const std::vector<py::array>& embedding, const std::vector<Layer>& layers) {
            trainer.set_weights(weights_from(embedding, layers));
          },
          py::arg("embedding"), py::arg("layers"), "What Packed.arrays of moecalc.training.packing returns.")
      .def(
          "forward",
          [](Trainer& trainer, bool keep) {
            return to_numpy(without_gil([&] { return trainer.forward(keep); }));
          },
          py::arg("keep_for_weights"), "(n, n_dim) node features after the last layer.")
      .def(
          "backward",
          [](Trainer& trainer, const py::array& dv) {
            const Array rows = copied(dv);
            return to_numpy(without_gil([&] { return trainer.backward(rows); }));
          },
          py::arg("dv"), "d(sum(dv * v)) / d(edge_vec), (E, 3) float64.")
      .def(
          "backward_to_weights",
          [](Trainer& trainer, const py::array& dv) {
            const Array rows = copied(dv);
            return to_python(without_gil([&] { return trainer.backward_to_weights(rows); }));
          },
          py::arg("dv"), "Gradients of sum(dv * v), as set_weights takes the weights.");
}

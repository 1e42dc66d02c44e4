// The whole model on an accelerator: positions go in, energies, forces and virials come out, and everything
// between stays on the device. The same kernels run on the host as an emulation (one block at a time), so
// that their index logic is tested where there is no accelerator.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "conditions.h"
#include "graph.h"
#include "moecalc/evaluator.h"
#include "package_reader.h"

namespace moecalc {

/// How products are computed where the network is float32. float64 networks always use float64.
enum class ProductPrecision { fp32, tf32, bf16x3 };

struct DeviceOptions {
  c10::Device device = c10::Device(c10::kCUDA, 0);
  bool emulate = false;  // run the kernels on the host; `device` is then the CPU
  ProductPrecision precision = ProductPrecision::fp32;
  bool deterministic = true;
  int64_t memory_limit = 0;  // bytes that the model may hold; 0: what the device has free
};

class DeviceModel {
 public:
  virtual ~DeviceModel() = default;
  /// Tables of the types, and conditions of the structures, from now on; the list must be set again.
  /// `features`: router input of every element (or condition and element) where weights depend on these;
  /// `shift` (K, n_dim): charge and spin embedding of every condition, undefined where routers do not read
  /// it.
  virtual void set_conditions(const TypeTables& tables, const GraphRules& rules, const at::Tensor& features,
                              const at::Tensor& shift) = 0;
  /// Uploads `list`: the one upload per rebuild. Sorts atoms by routing group and edges by centre.
  virtual void set_list(const NeighborList& list) = 0;
  /// positions (n_position, 3) float64 on the CPU, pinned or not; cells (n_systems, 3, 3) float64, or
  /// undefined where the list has no shifts. Results as in Evaluation, engine order. No host synchronisation
  /// but the final copy, unless `exchange` is given (one per layer and direction).
  virtual Evaluation evaluate(const at::Tensor& positions, const at::Tensor& cells, const Request& request,
                              GhostExchange* exchange) = 0;
  /// Bytes held on the device, and bytes that a system of this size would need.
  virtual int64_t bytes() const = 0;
  virtual int64_t estimate_bytes(int64_t n_node, int64_t n_edge, int64_t n_angle) const = 0;
  /// Routing groups whose weights are on the device. And gives them all back; a list must be set again.
  virtual int64_t n_packed_groups() const = 0;
  /// Bytes of the weights that are laid out on the device.
  virtual int64_t weight_bytes() const = 0;
  virtual void release_weights() = 0;
  /// What runs: "cuda fp32", "cuda float64", "cuda emulated float64", ...
  virtual std::string name() const = 0;
};

/// Null, with `reason`, where the kernels do not cover an option of the package, or were not compiled.
std::unique_ptr<DeviceModel> make_device_model(const torch::jit::Module& geometry,
                                               const torch::jit::Module& embedding,
                                               const std::vector<torch::jit::Module>& layers,
                                               const torch::jit::Module& readout, const GraphRules& rules,
                                               at::ScalarType dtype, const DeviceOptions& options,
                                               std::string& reason,
                                               const DeferredTensors* deferred = nullptr);

}  // namespace moecalc

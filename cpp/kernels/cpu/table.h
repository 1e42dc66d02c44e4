// The kernels of one instruction set. layer_avx2.cpp and its like define what they are compiled for:
// MOECALC_ISA (namespace) and its name, the bytes of a vector, the number of registers.
#pragma once

#include "kernels/common/layer.h"
#include "kernels/cpu/activation.inl"
#include "kernels/cpu/centre.inl"
#include "kernels/cpu/node_parts.inl"
#include "kernels/cpu/nodes.inl"
#include "kernels/cpu/product.inl"
#include "kernels/cpu/weight_gradients.inl"

namespace moecalc::kernels::MOECALC_ISA {
namespace {

template <class Real>
void product_or_sum(int64_t rows, int64_t columns, int64_t inner, const Real* left, int64_t left_stride,
                    const Real* right, int64_t right_stride, Real* result, int64_t result_stride,
                    bool accumulate) {
  const auto form = accumulate ? add_product<Real> : product<Real>;
  form(rows, columns, inner, left, left_stride, right, right_stride, result, result_stride);
}

/// Backward kernels without and with gradients of the weights.
template <class Real>
struct Backward {
  using Layer = LayerArgs<Real>;
  using Memory = Scratch<Real>;
  using Groups = const GroupGradients<Real>*;

  static void centre(const Layer& layer, int64_t centre, Memory& scratch) {
    centre_backward(layer, centre, scratch, NoGradients());
  }
  static void centre_training(const Layer& layer, int64_t centre, Memory& scratch, Groups groups) {
    const WeightGradients<Real> gradients(layer, groups, layer.graph->group[centre]);
    centre_backward(layer, centre, scratch, gradients);
  }
  static void nodes(const Layer& layer, int64_t begin, int64_t end, Memory& scratch) {
    nodes_backward(layer, begin, end, scratch, NoGradients());
  }
  static void nodes_training(const Layer& layer, int64_t begin, int64_t end, Memory& scratch, Groups groups) {
    const WeightGradients<Real> gradients(layer, groups, layer.graph->group[begin]);
    nodes_backward(layer, begin, end, scratch, gradients);
  }
  static void slots(const Layer& layer, int64_t group, int64_t begin, int64_t end, Memory& scratch) {
    slots_backward(layer, group, begin, end, scratch, NoGradients());
  }
  static void slots_training(const Layer& layer, int64_t group, int64_t begin, int64_t end, Memory& scratch,
                             Groups groups) {
    const WeightGradients<Real> gradients(layer, groups, group);
    slots_backward(layer, group, begin, end, scratch, gradients);
  }
  static void centres(const Layer& layer, int64_t begin, int64_t end, Memory& scratch) {
    centres_backward(layer, begin, end, scratch, NoGradients());
  }
  static void centres_training(const Layer& layer, int64_t begin, int64_t end, Memory& scratch,
                               Groups groups) {
    const WeightGradients<Real> gradients(layer, groups, layer.graph->group[begin]);
    centres_backward(layer, begin, end, scratch, gradients);
  }
};

template <class Real>
constexpr Kernels<Real> kTable = {
    .name = MOECALC_ISA_NAME,
    .product = product_or_sum<Real>,
    .activate = activate<Real>,
    .activate_with_slope = activate_with_slope<Real>,
    .project_centres = project_centres<Real>,
    .project_slots = project_slots<Real>,
    .centre = centre<Real>,
    .centre_backward = Backward<Real>::centre,
    .centre_backward_training = Backward<Real>::centre_training,
    .nodes = nodes<Real>,
    .nodes_backward = Backward<Real>::nodes,
    .nodes_backward_training = Backward<Real>::nodes_training,
    .sum_slots = sum_slots<Real>,
    .slots_backward = Backward<Real>::slots,
    .slots_backward_training = Backward<Real>::slots_training,
    .centres_backward = Backward<Real>::centres,
    .centres_backward_training = Backward<Real>::centres_training,
};

}  // namespace

const Kernels<float>& table_float() { return kTable<float>; }
const Kernels<double>& table_double() { return kTable<double>; }

}  // namespace moecalc::kernels::MOECALC_ISA

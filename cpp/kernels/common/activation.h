// Activation functions that the kernels know (formulas: SPEC.md, section 6).
#pragma once

namespace moecalc::kernels {

enum class ActivationKind { linear, silu, silut, tanh, sigmoid, relu, relu6, gelu };

/// An activation and its constants. silut is silu(x) below `threshold`, then
/// tanh(slope (x - threshold)) + offset.
struct Activation {
  ActivationKind kind = ActivationKind::linear;
  double threshold = 0.0;  // silut only, as are the two below
  double slope = 0.0;
  double offset = 0.0;
};

}  // namespace moecalc::kernels

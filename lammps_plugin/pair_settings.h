// What `pair_style moe` takes: words of an input, or of a restart file, and back.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "moecalc/evaluator.h"

namespace LAMMPS_NS {

/// How several packages tell of their deviation: the keywords of DeePMD-kit's pair style.
struct DeviationSettings {
  std::string file = "model_devi.out";
  int64_t every = 100;             // steps; 0: never
  std::optional<double> relative;  // level of relative force deviations, in the force unit of the simulation
  std::optional<double> relative_v;  // level of relative virial deviations, in its energy unit
  bool atomic = false;               // write the deviation of each atom as well

  bool operator==(const DeviationSettings& other) const = default;
};

struct PairSettings {
  std::string device = "auto";     // auto, cpu, cuda or cuda:N
  std::string dtype;               // of the network: float32, float64, or "" for the package's own
  std::string precision = "fp32";  // of products on a GPU: fp32, fp32-ffma, bf16x3, tf32 or fp16
  bool allow_untrained = false;    // elements that the model was not trained on
  moecalc::GivenConditions given;  // charge, spin and frame parameters
  DeviationSettings deviation;

  /// From the words after the name of the style. Whether a model takes the conditions shows when it is
  /// loaded. Throws moecalc::Error.
  static PairSettings parse(const std::vector<std::string>& words);

  /// What a restart file keeps besides device, dtype and precision, in words that give the same values, bit
  /// by bit: `no charge 1`.
  std::vector<std::string> words_of_rest() const;
  /// The inverse. Throws moecalc::Error.
  void set_rest(const std::vector<std::string>& words);

  /// Whether a model that was loaded with the other settings can stay.
  bool loads_the_same(const PairSettings& other) const {
    return device == other.device && dtype == other.dtype && precision == other.precision;
  }
};

bool same(const moecalc::GivenConditions& one, const moecalc::GivenConditions& other);

/// The words with blanks between them.
std::string joined(const std::vector<std::string>& words, const std::string& separator = " ");

bool contains(const std::vector<std::string>& words, const std::string& word);

}  // namespace LAMMPS_NS

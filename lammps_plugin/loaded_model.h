// The package that an input names, as every rank has loaded it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "moecalc/evaluator.h"
#include "pair_settings.h"
#include "pointers.h"

namespace LAMMPS_NS {

/// Loads a package, applies charge, spin and frame parameters, and tells the log of it. What is collective is
/// agreed upon: no rank goes on when another failed.
class LoadedModel : protected Pointers {
 public:
  explicit LoadedModel(LAMMPS* lmp) : Pointers(lmp) {}

  /// Collective. labels: element or NULL per atom type.
  void load(const std::string& file, const std::vector<std::string>& labels, const PairSettings& settings);
  bool is_loaded() const { return evaluator_ != nullptr; }
  void unload() { evaluator_.reset(); }

  /// Collective: other charge, spin or frame parameters for the model that is loaded.
  void give_conditions(const moecalc::GivenConditions& given);

  moecalc::Evaluator& evaluator() { return *evaluator_; }
  const moecalc::Facts& facts() const { return evaluator_->facts(); }
  /// Index from 1; not_mapped for NULL.
  const std::vector<int>& element_of_type() const { return element_of_type_; }

 private:
  std::string path_of_file() const;
  std::string open(const std::vector<std::string>& labels, const PairSettings& settings,
                   const struct Node& node);
  void map_types(const std::vector<std::string>& labels, bool allow_untrained);
  void agree(const std::string& message);
  void set_conditions(const moecalc::GivenConditions& given);
  int choose_threads(int n_cores) const;
  void log_model(int n_threads);
  void log_conditions();

  std::string file_;  // as given
  std::unique_ptr<moecalc::Evaluator> evaluator_;
  std::vector<int> element_of_type_;
  moecalc::AppliedConditions conditions_;
  std::string told_defaults_;  // the last that the log says
};

}  // namespace LAMMPS_NS

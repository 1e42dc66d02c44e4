// The packages of one pair style: the first drives the dynamics, all of them tell how far they agree.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "loaded_model.h"
#include "moecalc/committee.h"
#include "pair_settings.h"
#include "pointers.h"

namespace LAMMPS_NS {

class LoadedModels : protected Pointers {
 public:
  explicit LoadedModels(LAMMPS* lmp) : Pointers(lmp) {}

  /// Collective. labels: element or NULL per atom type, which every model has to know.
  void load(const std::vector<std::string>& files, const std::vector<std::string>& labels,
            const PairSettings& settings);
  bool is_loaded() const { return committee_.size() > 0; }
  void unload();
  /// Collective: other charge, spin or frame parameters for the models that are loaded.
  void give_conditions(const moecalc::GivenConditions& given);

  int64_t size() const { return committee_.size(); }
  LoadedModel& first() { return *models_.front(); }
  const LoadedModel& first() const { return *models_.front(); }
  moecalc::Committee& committee() { return committee_; }

 private:
  std::vector<std::unique_ptr<LoadedModel>> models_;  // which remember what the log has, loaded or not
  moecalc::Committee committee_;
};

}  // namespace LAMMPS_NS

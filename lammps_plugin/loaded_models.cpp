#include "loaded_models.h"

#include <algorithm>

#include "ghost_exchange.h"

namespace LAMMPS_NS {

void LoadedModels::load(const std::vector<std::string>& files, const std::vector<std::string>& labels,
                        const PairSettings& settings) {
  unload();
  models_.resize(files.size());
  std::vector<moecalc::Evaluator*> members;
  for (size_t k = 0; k < files.size(); ++k) {
    if (models_[k] == nullptr) models_[k] = std::make_unique<LoadedModel>(lmp);
    models_[k]->load(files[k], labels, settings);
    members.push_back(&models_[k]->evaluator());
  }
  committee_ = moecalc::Committee(members);
}

void LoadedModels::unload() {
  committee_ = {};
  for (const auto& model : models_) {
    if (model != nullptr) model->unload();
  }
}

void LoadedModels::give_conditions(const moecalc::GivenConditions& given) {
  for (const auto& model : models_) model->give_conditions(given);
}

}  // namespace LAMMPS_NS

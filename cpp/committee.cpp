#include "moecalc/committee.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

namespace moecalc {

namespace {

/// The mean over members of n_rows * width numbers.
std::vector<double> mean_of_members(const std::vector<const double*>& values, int64_t n_rows, int64_t width) {
  std::vector<double> mean(n_rows * width, 0.0);
  for (const double* const of_member : values) {
    for (int64_t k = 0; k < n_rows * width; ++k) mean[k] += of_member[k];
  }
  for (double& value : mean) value /= static_cast<double>(values.size());
  return mean;
}

}  // namespace

Committee::Committee(std::vector<Evaluator*> members) : members_(std::move(members)) {
  if (members_.empty()) throw Error("expected at least one model, got none");
  for (size_t k = 0; k < members_.size(); ++k) {
    if (members_[k] == nullptr) {
      throw Error("expected a model for every member, got none for member " + std::to_string(k));
    }
  }
  const std::vector<std::string>& elements = members_[0]->elements();
  for (const Evaluator* const member : members_) {
    const std::vector<std::string>& known = member->elements();
    std::vector<int64_t> types;
    for (const std::string& element : elements) {
      const auto found = std::find(known.begin(), known.end(), element);
      types.push_back(found == known.end() ? -1 : found - known.begin());
    }
    type_of_.push_back(std::move(types));
  }
}

double Committee::cutoff() const {
  double largest = 0.0;
  for (const Evaluator* const member : members_) largest = std::max(largest, member->cutoff());
  return largest;
}

void Committee::set_list(const NeighborList& list) {
  members_[0]->set_list(list);
  const int64_t n_node = list.types.numel();
  const auto* const types = list.types.data<int64_t>();
  for (size_t k = 1; k < members_.size(); ++k) {
    std::vector<int64_t> own(types, types + n_node);
    for (int64_t& type : own) {
      const std::string& element = members_[0]->elements()[type];
      type = type_of_[k][type];
      if (type < 0) {
        throw Error("expected elements that all models know, got " + element + ", which " +
                    members_[k]->facts().name + " does not know");
      }
    }
    NeighborList of_member = list;
    of_member.types = Array::of(own);
    members_[k]->set_list(of_member);
  }
}

std::vector<Evaluation> Committee::evaluate(int64_t n_members, const Array& positions, const Array& cells,
                                            const Request& request, GhostExchange* exchange) {
  std::vector<Evaluation> results;
  for (int64_t k = 0; k < std::min(n_members, size()); ++k) {
    try {
      results.push_back(members_[k]->evaluate(positions, cells, request, exchange));
    } catch (const NotFiniteError& error) {
      if (size() == 1) throw;
      throw NotFiniteError("model " + members_[k]->facts().name + ": " + error.what(), error.atom);
    }
  }
  return results;
}

std::vector<double> deviations(const std::vector<const double*>& values, int64_t n_rows, int64_t width,
                               std::optional<double> level) {
  const std::vector<double> mean = mean_of_members(values, n_rows, width);
  std::vector<double> found(n_rows, 0.0);
  for (int64_t row = 0; row < n_rows; ++row) {
    double sum = 0.0;
    double mean2 = 0.0;
    for (int64_t k = row * width; k < (row + 1) * width; ++k) {
      mean2 += mean[k] * mean[k];
      for (const double* const of_member : values) sum += (of_member[k] - mean[k]) * (of_member[k] - mean[k]);
    }
    found[row] = std::sqrt(sum / static_cast<double>(values.size()));
    // no deviation from a mean of zero is none, also for a level of zero
    if (level && found[row] > 0.0) found[row] /= std::sqrt(mean2) + *level;
  }
  return found;
}

}  // namespace moecalc

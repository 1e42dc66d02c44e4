// Rows that name rows of another matrix, both ways.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace moecalc::plain {

/// Row r belongs to row of[r] of n_target others. Its inverse makes sums by index parallel, and their order
/// fixed.
class Index {
 public:
  Index() = default;
  Index(std::vector<int64_t> of, int64_t n_target)
      : of_(std::move(of)), begin_(static_cast<size_t>(n_target) + 1, 0) {
    for (const int64_t target : of_) ++begin_[static_cast<size_t>(target) + 1];
    for (size_t target = 1; target < begin_.size(); ++target) begin_[target] += begin_[target - 1];
    members_.resize(of_.size());
    std::vector<int64_t> next(begin_.begin(), begin_.end() - 1);
    for (size_t r = 0; r < of_.size(); ++r) {
      int64_t& place = next[static_cast<size_t>(of_[r])];
      members_[static_cast<size_t>(place)] = static_cast<int64_t>(r);
      ++place;
    }
  }

  int64_t rows() const { return static_cast<int64_t>(of_.size()); }
  int64_t targets() const { return static_cast<int64_t>(begin_.size()) - 1; }
  int64_t of(int64_t row) const { return of_[static_cast<size_t>(row)]; }
  /// Rows of a target, ascending.
  const int64_t* begin(int64_t target) const { return members_.data() + begin_[static_cast<size_t>(target)]; }
  const int64_t* end(int64_t target) const {
    return members_.data() + begin_[static_cast<size_t>(target) + 1];
  }

 private:
  std::vector<int64_t> of_;
  std::vector<int64_t> begin_;    // (n_target + 1) into members_
  std::vector<int64_t> members_;  // rows by target
};

}  // namespace moecalc::plain

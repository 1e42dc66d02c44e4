// Keywords charge, spin and fparam of pair_style moe: words of an input, or of a restart file, and back.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "moecalc/evaluator.h"

namespace LAMMPS_NS {

bool is_condition_keyword(const std::string& word);

/// Reads the keyword words[at] and its numbers: one, and for fparam all up to the next of `keywords` or the
/// end. Whether a model takes the values shows when it is loaded. Returns the index of the word that follows.
/// Throws moecalc::Error.
size_t read_condition(const std::vector<std::string>& words, size_t at,
                      const std::vector<std::string>& keywords, moecalc::GivenConditions& given);

/// Words that give the same values, bit by bit; none for what was not given.
std::vector<std::string> condition_words(const moecalc::GivenConditions& given);

bool same(const moecalc::GivenConditions& one, const moecalc::GivenConditions& other);

}  // namespace LAMMPS_NS

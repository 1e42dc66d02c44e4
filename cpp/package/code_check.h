// The TorchScript in a package: only what packages of moecalc are made of is let through to torch.
#pragma once

#include <set>
#include <string>
#include <string_view>

#include "moecalc/package_file.h"

namespace moecalc {

/// Words of a `code/` record that can make something happen: keywords ("for"), operators of torch
/// ("torch.add"), built-in functions ("getattr()"), methods (".tolist()") and bases of classes ("class
/// Module"). Throws Error for text that no package has: decorators, special methods, calls of what is not a
/// name. `shown` names the record.
std::set<std::string> code_words(std::string_view code, const std::string& shown);

/// Throws Error, without the name of the file, for a record that does not belong in a package, code with a
/// word that packages do not use (allowed_code.h), and pickles that hold more than numbers, strings and
/// tensors. After that torch may load the package: nothing in it can reach files, processes or the network,
/// neither while it is loaded nor in an evaluation.
void check_content(const PackageFile& file);

}  // namespace moecalc
